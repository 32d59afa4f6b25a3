"""Every FLOAT of a graph as FLOAT16, and nothing clamped in silence.

A float16 holds magnitudes up to 65504 and, at full precision, down to 2⁻¹⁴ ≈ 6.1e-5. A weight above
that range would become infinite (converters that clamp it to 65504 compute another network), so it
is refused; weights below the range lose bits or vanish, and are counted in a note.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import TYPE_CHECKING

from exporter.contracts import Converted
from exporter.errors import GraphError

if TYPE_CHECKING:
    import onnx

LARGEST = 65504.0
SMALLEST_NORMAL = 2.0**-14

# Inputs that stay FLOAT whatever the data's type is: https://onnx.ai/onnx/operators
_ALWAYS_FLOAT = {"Resize": (1, 2), "Upsample": (1,)}


def to_half(model: onnx.ModelProto, *, half_io: bool) -> Converted:
    """Return a copy whose floats are halves; with ``half_io`` its inputs and outputs are too.

    Raises `GraphError` naming the first tensor with a value beyond 65504, a scale of a quantised
    tensor below half's normal range, or an operator with a graph of its own.
    """
    import onnx

    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    del graph.value_info[:]
    kept = _always_float(graph)
    scales = {node.input[1] for node in graph.node if node.op_type.endswith("quantizeLinear")}
    scales |= {node.input[1] for node in graph.node if node.op_type == "QuantizeLinear"}
    below = total = 0
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in kept:
            small, count = _halve(tensor, is_scale=tensor.name in scales)
            below, total = below + small, total + count
    for node in graph.node:
        _halve_attributes(node)
    if half_io:
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    else:
        _cast_at_edges(graph)
    note = (
        f"{below} of {total} constants lie below half's normal range (6.1e-05) and lose precision"
    )
    return Converted(half, (note,) if below else ())


def _always_float(graph: onnx.GraphProto) -> set[str]:
    return {
        node.input[index]
        for node in graph.node
        for index in _ALWAYS_FLOAT.get(node.op_type, ())
        if index < len(node.input)
    }


def _halve(tensor: onnx.TensorProto, *, is_scale: bool) -> tuple[int, int]:
    """Store the tensor as FLOAT16; return how many values fall below its normal range, of all."""
    import numpy as np
    import onnx

    values = onnx.numpy_helper.to_array(tensor)
    magnitudes = np.abs(values)
    if over := int((~(magnitudes < LARGEST + 16)).sum()):  # 65520 and above round to infinity
        raise GraphError(
            f"{tensor.name!r} does not fit FP16: {over} values are beyond {LARGEST:.0f}, "
            f"the largest {magnitudes.max():g}",
            hint="export this network in fp32",
        )
    if is_scale and magnitudes.min() < SMALLEST_NORMAL:
        raise GraphError(
            f"{tensor.name!r} does not fit FP16: a quantisation scale of {magnitudes.min():g} is "
            f"below half's normal range ({SMALLEST_NORMAL:.2g})",
            hint='set around = "fp32" for this precision',
        )
    name = tensor.name
    tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), name))
    return int(((magnitudes < SMALLEST_NORMAL) & (magnitudes > 0)).sum()), values.size


def _halve_attributes(node: onnx.NodeProto) -> None:
    import onnx

    for attribute in node.attribute:
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            raise GraphError(f"{node.name!r}: {node.op_type} has a graph of its own, so it stays")
        if attribute.type == onnx.AttributeProto.TENSOR:
            if attribute.t.data_type == onnx.TensorProto.FLOAT:
                _halve(attribute.t, is_scale=False)
        elif node.op_type == "Cast" and attribute.name == "to":
            if attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.FLOAT16
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            raise GraphError(f"{node.name!r}: a Constant given as {attribute.name} is always FP32")


def _cast_at_edges(graph: onnx.GraphProto) -> None:
    """Cast inputs to half behind the graph's FLOAT inputs, and outputs back to FLOAT."""
    import onnx

    first, last = [], []
    for value in graph.input:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            inner = f"{value.name}_half"
            for node in graph.node:
                _rename(node.input, value.name, inner)
            first.append(
                onnx.helper.make_node("Cast", [value.name], [inner], f"{value.name}/Cast", to=10)
            )
    for value in graph.output:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            inner = f"{value.name}_half"
            for node in graph.node:
                _rename(node.input, value.name, inner)
                _rename(node.output, value.name, inner)
            last.append(
                onnx.helper.make_node("Cast", [inner], [value.name], f"{value.name}/Cast", to=1)
            )
    nodes = [*first, *graph.node, *last]
    del graph.node[:]
    graph.node.extend(nodes)


def _rename(names: MutableSequence[str], old: str, new: str) -> None:
    names[:] = [new if name == old else name for name in names]
