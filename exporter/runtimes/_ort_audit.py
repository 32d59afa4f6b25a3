"""What ONNX Runtime really executes: the kernels in the profile of one run.

Kernels are known by the optimised graph's names, which its fusions decorate and sometimes replace,
so a layer is looked for by its own name, then by its bias, then by the tensor its kernel writes.

Why a layer is not an integer kernel, on the CPU provider, was found by trying every form: it wants
quantised input, weights and output; a ReLU in between only where the output's zero point is its
type's smallest value, so that the ReLU is in the quantisation; and one type for input and output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from exporter.records import Executed
from exporter.runtimes._asked import Layer
from exporter.runtimes._graph import WEIGHTED

if TYPE_CHECKING:
    import onnx

INTEGER = (
    *("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger"),
    *("MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
)
FUSED = ("FusedGemm", "FusedMatMul", "NhwcFusedConv")
TYPES = {
    "float": "fp32",
    "double": "fp64",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int8": "int8",
    "uint8": "int8",
    "float8e4m3fn": "fp8",
}
_DECORATION = re.compile(r"^(InsertedPrecisionFreeCast_|FusedBack_)+|(_nchwc|_token_\d+|_quant)+$")
POINTWISE = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid")


class Kernel(NamedTuple):
    """One kernel that ran: its operator, and the types it read."""

    op: str
    reads: tuple[str, ...]

    @property
    def type(self) -> str | None:
        """Return the type it computes in."""
        if self.op in INTEGER:
            return "int8"
        return TYPES.get(self.reads[0]) if self.reads else None


def kernels(events: Sequence[Mapping[str, Any]]) -> dict[str, Kernel]:
    """Return the kernels in a profile, by the name of their node in the optimised graph."""
    suffix = "_kernel_time"
    return {
        event["name"].removesuffix(suffix): Kernel(
            event["args"]["op_name"],
            tuple(kind for entry in event["args"].get("input_type_shape", ()) for kind in entry),
        )
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(suffix)
    }


def executed(
    asked: Sequence[Layer],
    graph: onnx.GraphProto,
    optimised: onnx.GraphProto,
    ran: Mapping[str, Kernel],
    *,
    as_written: str | None,
    explain: bool,
) -> tuple[Executed, ...]:
    """Return every layer that was asked for fewer bits, with the type of the kernel that ran.

    ``as_written`` says why its pairs are kept as they are, None where they are not;
    ``explain`` whether the CPU provider's reasons hold.
    """
    found = _find(asked, graph, optimised)
    records = []
    for layer in asked:
        node = found.get(layer.node.name)
        kernel = ran.get(node.name) if node is not None else None
        if node is None or kernel is None:
            records.append(layer.as_run(None, "no kernel in the profile can be told to be its own"))
            continue
        reason = None
        if explain:
            reason = _reason(layer, graph, node, optimised, as_written)
        records.append(layer.as_run(kernel.type, reason))
    return tuple(records)


# ── Which kernel is whose ───────────────────────────────────────────────────────────


def _find(
    asked: Sequence[Layer], graph: onnx.GraphProto, optimised: onnx.GraphProto
) -> dict[str, onnx.NodeProto]:
    """Return each layer's node in the optimised graph; one that two might be is nobody's."""
    made = {name: node for node in graph.node for name in node.output}
    layers = {layer.node.name for layer in asked}
    biases = {n.input[2]: n.name for n in graph.node if n.name in layers and len(n.input) > 2}
    kinds = (*WEIGHTED, *FUSED, *INTEGER)
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in optimised.node:
        if node.op_type not in kinds:
            continue
        name = plain_name(node.name)
        owner = name if name in layers else None
        owner = owner or next((biases[b] for b in map(plain_name, node.input) if b in biases), None)
        for tensor in (name, *map(plain_name, node.output)):
            owner = owner or _writer(tensor, made, layers)
        if owner:
            found.setdefault(owner, []).append(node)
    return {name: nodes[0] for name, nodes in found.items() if len(nodes) == 1}


def plain_name(name: str) -> str:
    return _DECORATION.sub("", name)


def _writer(tensor: str, made: Mapping[str, onnx.NodeProto], layers: set[str]) -> str | None:
    """Return the layer that writes a tensor, through operators of one input."""
    node = made.get(tensor)
    while node is not None and node.name not in layers:
        node = made.get(node.input[0]) if node.op_type in POINTWISE else None
    return node.name if node is not None else None


# ── Why a layer did not run as asked ────────────────────────────────────────────────


def _reason(
    layer: Layer,
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    optimised: onnx.GraphProto,
    as_written: str | None,
) -> str | None:
    if layer.asked in ("fp16", "bf16"):
        return (
            f"this provider has no {layer.asked.upper()} kernel for it, so it rounds the weights "
            f"to {layer.asked.upper()} and the activations not at all"
        )
    if layer.asked != "int8":
        return f"this provider has no kernel for {layer.asked.upper()} and dequantises first"
    if as_written:
        return as_written
    return _not_quantised(layer.node, graph) or _mixed(node, optimised)


def _not_quantised(node: onnx.NodeProto, graph: onnx.GraphProto) -> str | None:
    """Return what keeps the output from being quantised in the kernel, None if nothing does."""
    readers = [other for other in graph.node if node.output[0] in other.input]
    through = ""
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        through = f" or its {readers[0].op_type}"
        readers = [other for other in graph.node if readers[0].output[0] in other.input]
    others = [other for other in readers if other.op_type != "QuantizeLinear"]
    if others or not readers:
        if node.op_type == "Gemm" and not through and len(node.input) > 2:
            return (
                "its bias is in float, and this provider makes it an integer only where Q alone "
                "stands behind the layer"
            )
        read = f"read by {others[0].op_type} in float" if others else "the graph's own, in float"
        return (
            f"its output is {read}: this provider makes an integer kernel only where Q alone "
            f"stands behind the layer{through}"
        )
    zero, low = _zero_point(readers[0], graph)
    if through and zero != low:
        return (
            f"its output's zero point is {zero}: a{through.removeprefix(' or its')} between layer "
            f"and Q becomes part of an integer kernel only where that is {low}"
        )
    return None


def _zero_point(node: onnx.NodeProto, graph: onnx.GraphProto) -> tuple[int, int]:
    """Return a pair's zero point, and its type's smallest value."""
    import numpy as np
    import onnx

    for tensor in graph.initializer:
        if len(node.input) > 2 and tensor.name == node.input[2]:
            value = onnx.numpy_helper.to_array(tensor)
            if value.dtype.kind in "iu":
                return int(value.ravel()[0]), int(np.iinfo(value.dtype).min)
    return 0, 0


def _mixed(node: onnx.NodeProto, optimised: onnx.GraphProto) -> str | None:
    """Return that a pair in front of or behind the layer was made UINT8, the other one not."""
    import onnx

    types = {tensor.name: tensor.data_type for tensor in optimised.initializer}
    before = [n for n in optimised.node if node.input[0] in n.output and len(n.input) > 2]
    behind = [n for n in optimised.node if node.output[0] in n.input and len(n.input) > 2]
    kinds = {types.get(n.input[2]) for n in (*before, *behind)}
    if kinds == {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}:
        return (
            "this provider made one of the pairs around it UINT8 and left the other INT8, and has "
            "no integer kernel for two types"
        )
    return None
