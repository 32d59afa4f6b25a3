"""Which heights and widths a graph was made for, as the graph itself says it.

ONNX has names for axes that are open, and no ranges. So the metadata of a graph with free sides has
the least size of each, the one it is tuned for, and the largest:

    size.height    32 64 96

Whatever has to know a size, and has the graph alone, takes it from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from exporter.records import TensorSpec

if TYPE_CHECKING:
    import onnx

_KEY = "size."
_SUMS = frozenset({  # and pools, of what lies in a picture
    "GlobalLpPool", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSum",
    "ReduceSumSquare",
})  # fmt: skip


class Side(NamedTuple):
    """The sizes of one axis."""

    smallest: int
    optimum: int
    largest: int


def tell_sides(model: onnx.ModelProto, inputs: Iterable[TensorSpec]) -> None:
    """Write the ranges of the inputs' free axes into a graph's metadata."""
    sides = {
        axis.name: f"{axis.min} {spec.shape[axis.axis]} {axis.max}"
        for spec in inputs
        for axis in spec.free
    }
    for name, said in sides.items():
        model.metadata_props.add(key=f"{_KEY}{name}", value=said)


def sides_of(model: onnx.ModelProto) -> dict[str, Side]:
    """Return the sizes of every free axis that a graph's metadata has, by the axis's name."""
    found = {}
    for entry in model.metadata_props:
        numbers = re.fullmatch(r"(\d{1,9}) (\d{1,9}) (\d{1,9})", entry.value, re.ASCII)
        if entry.key.startswith(_KEY) and numbers:
            found[entry.key.removeprefix(_KEY)] = Side(*map(int, numbers.groups()))
    return found


def at_optimum(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph for the size that it is tuned for, itself where that is the only one."""
    return _at(model, {name: side.optimum for name, side in sides_of(model).items()})


def at_largest(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph for the largest size that it takes, itself where there is only one."""
    return _at(model, {name: side.largest for name, side in sides_of(model).items()})


def shape_at_optimum(model: onnx.ModelProto, value: onnx.ValueInfoProto) -> list[int]:
    """Return an input's sizes behind the batch axis; one that nothing is known of is 0."""
    sides = sides_of(model)
    return [
        axis.dim_value or (sides[axis.dim_param].optimum if axis.dim_param in sides else 0)
        for axis in value.type.tensor_type.shape.dim[1:]
    ]


def grows_with_size(model: onnx.ModelProto) -> str | None:
    """Return the name of a node that sums over a free axis, so that its values grow with it."""
    if not sides_of(model):
        return None
    small, large = (_shapes(_at(model, sizes)) for sizes in _both(sides_of(model)))
    for node in model.graph.node:
        if node.op_type in _SUMS:
            counts = {_summed(node, shapes) for shapes in (small, large)}
            if len(counts) > 1 or None in counts:
                return str(node.name)
    return None


def _both(sides: Mapping[str, Side]) -> tuple[dict[str, int], dict[str, int]]:
    return (
        {name: side.smallest for name, side in sides.items()},
        {name: side.largest for name, side in sides.items()},
    )


def _summed(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> float | None:
    """Return how many values one sum of a node adds up, None where that is not known."""
    if node.input[0] not in shapes or node.output[0] not in shapes:
        return None
    return prod(shapes[node.input[0]]) / prod(shapes[node.output[0]])


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the shapes that are known for a batch of one."""
    import onnx

    single = onnx.ModelProto()
    single.CopyFrom(model)
    for value in (*single.graph.input, *single.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(single, data_prop=True).graph
    found = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = tuple(dim.dim_value for dim in dims)
    return found


def _at(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """Return a copy whose free axes have these sizes; what else was open follows from them."""
    import onnx

    if not sizes:
        return model
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in sizes:
                axis.dim_value = sizes[axis.dim_param]
    for value in fixed.graph.output:
        for axis in list(value.type.tensor_type.shape.dim)[1:]:
            if axis.HasField("dim_param"):
                axis.Clear()
    del fixed.graph.value_info[:]
    return fixed
