"""Which layers of a graph ask for fewer bits than 32, read from the graph's own types."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from exporter.records import Executed
from exporter.runtimes._graph import WEIGHTED

if TYPE_CHECKING:
    import onnx

# ONNX's element types, by number (onnx.TensorProto.DataType).
_STORED = {2: "int8", 3: "int8", 17: "fp8", 18: "fp8", 19: "fp8", 20: "fp8", 21: "int4", 22: "int4"}
_FLOATS = {10: "fp16", 16: "bf16"}


class Layer(NamedTuple):
    """A weighted node that asks for fewer bits, and the type it asks for."""

    node: onnx.NodeProto
    asked: str

    def as_run(
        self, ran: str | None, reason: str | None = None, fused: tuple[str, ...] | None = None
    ) -> Executed:
        """Return its record; the layer is called as in the PyTorch module."""
        if ran == self.asked:
            reason = None
        name = self.node.name.partition("/")[0]
        return Executed(name, self.node.op_type, self.asked, ran, reason, fused)


def asked_layers(graph: onnx.GraphProto) -> tuple[Layer, ...]:
    """Return the weighted layers whose weights are stored in fewer bits, in running order."""
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    layers = []
    for node in graph.node:
        if node.op_type not in WEIGHTED or len(node.input) < 2:
            continue
        kind = _quantised(node.input[1], stored, made)
        if kind and _quantised(node.input[0], stored, made) != kind:
            kind = f"{kind} weights"
        kind = kind or _FLOATS.get(stored.get(node.input[1], 0))
        if kind:
            layers.append(Layer(node, kind))
    return tuple(layers)


def _quantised(name: str, stored: dict[str, int], made: dict[str, onnx.NodeProto]) -> str | None:
    """Return the type that a tensor is dequantised from, None if it is not."""
    node = made.get(name)
    while node is not None and node.op_type == "Cast":
        node = made.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        return None
    types = (stored[part] for part in (node.input[0], *node.input[2:]) if part in stored)
    return next((_STORED[kind] for kind in types if kind in _STORED), None)
