"""What is different about a node of a file, in words: why a layer that computes wrongly does.

Files are compared with the graph that was asked for, node by node, by the names of the tensors they
write. This explains a wrong number; it never finds one, since two graphs may differ and compute the
same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from exporter.records import Array

if TYPE_CHECKING:
    import onnx


def describe_difference(asked: onnx.ModelProto, found: onnx.ModelProto, tensor: str) -> str | None:
    """Return how ``found`` makes a tensor otherwise than ``asked`` does, or None if it does not."""
    want, got = _writer(asked.graph, tensor), _writer(found.graph, tensor)
    if want is None:
        return None
    if got is None:
        return f"the file has no node that writes {tensor!r}, which {want.name!r} should"
    said = list(_of_nodes(asked.graph, found.graph, want, got))
    return f"in the file, {want.name!r} {', '.join(said)}" if said else None


def _of_nodes(
    asked: onnx.GraphProto, found: onnx.GraphProto, want: onnx.NodeProto, got: onnx.NodeProto
) -> Iterator[str]:
    import onnx

    if got.op_type != want.op_type:
        yield f"is {got.op_type} where {want.op_type} was asked for"
        return
    attributes = _attributes(want), _attributes(got)
    for key in sorted(attributes[0].keys() | attributes[1].keys()):
        sides = [side.get(key) for side in attributes]
        if sides[0] != sides[1] and isinstance(sides[1], onnx.TensorProto):
            yield f"has another {key} than was asked for"
        elif sides[0] != sides[1]:
            yield f"has {key} {_short(sides[1])} where {_short(sides[0])} was asked for"
    if len(got.input) != len(want.input):
        yield f"reads {len(got.input)} tensors where {len(want.input)} were asked for"
    constants = _constants(asked), _constants(found)
    for one, other in zip(want.input, got.input, strict=False):
        if one in constants[0] and other in constants[1]:
            yield from _of_constants(one, constants[0][one], constants[1][other])
        elif one != other:
            yield f"reads {other!r} where {one!r} was asked for"


def _of_constants(name: str, want: onnx.TensorProto, got: onnx.TensorProto) -> Iterator[str]:
    import numpy as np
    import onnx

    sides = [onnx.numpy_helper.to_array(part) for part in (want, got)]
    if sides[0].shape != sides[1].shape:
        shapes = [list(side.shape) for side in sides]
        yield f"has {name!r} of shape {shapes[1]} where {shapes[0]} was asked for"
        return
    if want.data_type != got.data_type:
        kinds = [onnx.TensorProto.DataType.Name(part.data_type) for part in (want, got)]
        yield f"has {name!r} as {kinds[1]} where {kinds[0]} was asked for"
    wrong = ~_equal(*sides)
    if not wrong.any():
        return
    count = f"{int(wrong.sum())} of {wrong.size} values"
    if wrong.ndim > 0 and len(wrong) > 1:
        rows = np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))
        count += f", in {_some(rows)} of {len(wrong)} channels"
    yield f"has another {name!r} than was asked for ({count})"


def _equal(one: Array, other: Array) -> Array:
    import numpy as np

    wide = [np.asarray(side, dtype=np.float64) for side in (one, other)]
    same: Array = (wide[0] == wide[1]) | (np.isnan(wide[0]) & np.isnan(wide[1]))
    return same


def _some(rows: Array) -> str:
    return f"channel {int(rows[0])}" if len(rows) == 1 else str(len(rows))


def _writer(graph: onnx.GraphProto, tensor: str) -> onnx.NodeProto | None:
    return next((node for node in graph.node if tensor in node.output), None)


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer}


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx

    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {
        k: list(v) if hasattr(v, "__len__") and not isinstance(v, bytes) else v
        for k, v in found.items()
    }


def _short(value: Any) -> str:
    if value is None:
        return "none"
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
