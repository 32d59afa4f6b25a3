"""A graph's FLOAT tensors: what calibration and the graph itself say of their values.

Where calibration has no range for a tensor, one may follow from what it is made of: a maximum, a
mean or a move gives nothing larger than it is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from exporter.axes import at_largest
from exporter.errors import GraphError
from exporter.precisions._signs import never_negative
from exporter.records import Array

if TYPE_CHECKING:
    import onnx

    from exporter.contracts import Statistics

# Inputs that stay FLOAT whatever the data's type is: https://onnx.ai/onnx/operators
ALWAYS_FLOAT = {"Resize": (1, 2), "Upsample": (1,)}

MEANS = frozenset({"AveragePool", "GlobalAveragePool", "Mean", "ReduceMean"})

# Operators whose results lie within the range of what they read.
_WITHIN = MEANS | {
    "Clip", "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GatherND",
    "GlobalMaxPool", "Identity", "LeakyRelu", "Max", "MaxPool", "Min", "Pad", "ReduceMax",
    "ReduceMin", "Relu", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Transpose",
    "Unsqueeze", "Where", "QuantizeLinear",
}  # fmt: skip
_UP_TO_1 = frozenset({"HardSigmoid", "Sigmoid", "Softmax", "Tanh"})


class Half(NamedTuple):
    """A 16-bit float: its number in ONNX, largest and smallest normal value, unit roundoff."""

    name: str
    dtype: int
    largest: float
    normal: float
    roundoff: float

    def rounded(self, values: Array) -> Array:
        """Return what the type makes of the values, as float32."""
        import numpy as np

        if self.dtype == FP16.dtype:
            with np.errstate(over="ignore"):
                return values.astype(np.float16).astype(np.float32)
        return (self.bits(values).astype(np.uint32) << 16).view(np.float32)

    def bits(self, values: Array) -> Array:
        """Return the values, rounded to nearest even, as the 16 bits that the type stores."""
        import numpy as np

        if self.dtype == FP16.dtype:
            return values.astype(np.float16).view(np.uint16)
        wide = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
        return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


FP16 = Half("FP16", 10, 65504.0, 2.0**-14, 2.0**-11)
BF16 = Half("BF16", 16, (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-8)


@dataclass(frozen=True, slots=True)
class Floats:
    """A graph's FLOAT tensors: shapes, constants, the largest magnitudes, those never below 0.

    Shapes are those of the largest height and width that the graph takes.
    """

    graph: onnx.GraphProto
    types: Mapping[str, int]
    shapes: Mapping[str, tuple[int | None, ...]]
    constants: Mapping[str, Array]
    ranges: Mapping[str, float]
    positive: frozenset[str]

    @classmethod
    def of(cls, model: onnx.ModelProto, statistics: Statistics) -> Floats:
        """Read a graph. Raises `GraphError` for a tensor without a type, or values not finite."""
        import onnx

        inferred = onnx.shape_inference.infer_shapes(at_largest(model)).graph
        values = (*inferred.input, *inferred.output, *inferred.value_info)
        types = {v.name: int(v.type.tensor_type.elem_type) for v in values}
        types |= {t.name: int(t.data_type) for t in inferred.initializer}
        for node in model.graph.node:
            for name in node.output:
                if name and not types.get(name):
                    raise GraphError(f"{node.name!r}: the type of {name!r} is not known")
        constants = {t.name: onnx.numpy_helper.to_array(t) for t in inferred.initializer}
        found = cls(
            graph=model.graph,
            types=types,
            shapes={v.name: tuple(_shape(v)) for v in values},
            constants=constants,
            ranges=dict(_ranges(model.graph, types, constants, statistics)),
            positive=never_negative(model.graph, constants),
        )
        found.check_finite()
        return found

    def check_finite(self) -> None:
        import numpy as np

        for name, value in self.constants.items():
            if value.dtype == np.float32 and np.isnan(value).any():
                raise GraphError(f"{name!r} holds NaN")
        for name, amax in self.ranges.items():
            if math.isnan(amax):
                raise GraphError(f"the calibrated magnitude of {name!r} is NaN")

    def of_float(self, name: str) -> bool:
        """Whether a tensor is FLOAT, a constant or not."""
        return self.types.get(name) == 1

    def activation(self, name: str) -> bool:
        """Whether a tensor is FLOAT and computed."""
        return self.of_float(name) and name not in self.constants

    def unknown(self) -> list[str]:
        """Return the activations whose range is not known, in running order."""
        written = [v.name for v in self.graph.input]
        written += [name for node in self.graph.node for name in node.output]
        return [name for name in written if self.activation(name) and name not in self.ranges]


def _shape(value: Any) -> Iterator[int | None]:
    for dim in value.type.tensor_type.shape.dim:
        yield dim.dim_value if dim.HasField("dim_value") else None


def _ranges(
    graph: onnx.GraphProto,
    types: Mapping[str, int],
    constants: Mapping[str, Array],
    statistics: Statistics,
) -> Iterator[tuple[str, float]]:
    """Yield the largest magnitude of each tensor: calibrated, a constant's, or what follows."""
    import numpy as np

    found: dict[str, float] = {}
    for name, value in constants.items():
        if types[name] == 1 and value.size and not np.isnan(value).any():
            found[name] = float(np.abs(value).max())
    for item in graph.input:
        if item.name in statistics:
            found[item.name] = float(statistics[item.name].amax)
    for node in graph.node:
        for name in node.output:
            if name in statistics:
                found[name] = float(statistics[name].amax)
            elif (amax := _follows(node, types, constants, found)) is not None:
                found[name] = amax
    yield from found.items()


def _follows(
    node: onnx.NodeProto,
    types: Mapping[str, int],
    constants: Mapping[str, Array],
    found: Mapping[str, float],
) -> float | None:
    import numpy as np

    if node.op_type in _UP_TO_1:
        return 1.0
    if node.op_type == "DequantizeLinear":
        scale, stored = constants.get(node.input[1]), constants.get(node.input[0])
        if scale is None or stored is None:
            return found.get(node.input[0])
        return float(np.abs(scale).max()) * float(np.abs(stored.astype(np.float32)).max())
    if node.op_type not in _WITHIN:
        return None
    read = node.input[:1] if node.op_type == "QuantizeLinear" else node.input
    floats = [name for name in read if types.get(name) == 1 and np.size(constants.get(name, 0))]
    known = [found[name] for name in floats if name in found]
    return max(known) if known and len(known) == len(floats) else None
