"""Which tensors of a graph can never be negative: read off the operators, not off the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from exporter.records import Array

if TYPE_CHECKING:
    import onnx

AVERAGES = ("AveragePool", "GlobalAveragePool")
SHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity")
_POSITIVE = ("Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt")
_KEEPING = (  # they make no negative number where they read none
    *(*AVERAGES, *SHAPES, "Add", "Mul", "Concat", "LeakyRelu", "MaxPool", "GlobalMaxPool"),
    *("Min", "Max", "Mean", "Dropout", "Slice", "Split", "Gather", "GatherND", "Expand"),
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "DepthToSpace", "SpaceToDepth"),
)


def never_negative(graph: onnx.GraphProto, constants: Mapping[str, Array]) -> frozenset[str]:
    """Return the tensors, constants among them, that are 0 or more whatever the input."""
    found = {name for name, value in constants.items() if (value >= 0).all()}
    whole = {name for name, value in constants.items() if value.dtype.kind in "iu"}
    for node in graph.node:
        reads = [name for name in node.input if name and name not in whole]
        kept = node.op_type in _KEEPING and found.issuperset(reads)
        if node.op_type in _POSITIVE or kept or cuts_below_zero(node, constants):
            found.update(node.output)
    return frozenset(found)


def cuts_below_zero(node: onnx.NodeProto, constants: Mapping[str, Array]) -> bool:
    """Return whether a node cuts off what is below 0, and perhaps what is above a constant."""
    return node.op_type == "Relu" or (node.op_type == "Clip" and bound(node, 1, constants) == 0)


def bound(node: onnx.NodeProto, index: int, constants: Mapping[str, Array]) -> float | None:
    """Return a constant that a Clip or Min has, the largest of several."""
    value = constants.get(node.input[index]) if index < len(node.input) else None
    return None if value is None else float(value.max())
