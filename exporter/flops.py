"""Count what one sample costs, on the graph that is deployed.

    Conv           out · k₁ · k₂ · … · C_in / groups      multiply-accumulates, with out = |output|
    ConvTranspose  in  · k₁ · k₂ · … · C_out / groups     with in = |input|
    Gemm, MatMul   |output| · inner dimension

One multiply-accumulate (MAC) is two FLOPs, as in torch.utils.flop_counter; fvcore calls one MAC one
"flop". Biases, activations, poolings and additions are free in this convention. An operator that is
neither counted nor known to be free is reported under ``uncounted``, never as zero in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from exporter.errors import GraphError
from exporter.records import Cost, LayerCost

if TYPE_CHECKING:
    import onnx

Shape: TypeAlias = tuple[int, ...]
Formula: TypeAlias = "Callable[[onnx.NodeProto, Mapping[str, Shape]], int]"


def _conv(node: onnx.NodeProto, shape: Mapping[str, Shape]) -> int:
    _, *kernel = shape[node.input[1]]  # (out, in / groups, k₁, k₂, …)
    return prod(shape[node.output[0]]) * prod(kernel)


def _conv_transpose(node: onnx.NodeProto, shape: Mapping[str, Shape]) -> int:
    _, *kernel = shape[node.input[1]]  # (in, out / groups, k₁, k₂, …)
    return prod(shape[node.input[0]]) * prod(kernel)


def _gemm(node: onnx.NodeProto, shape: Mapping[str, Shape]) -> int:
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return prod(shape[node.output[0]]) * shape[node.input[0]][0 if transposed else 1]


def _matmul(node: onnx.NodeProto, shape: Mapping[str, Shape]) -> int:
    return prod(shape[node.output[0]]) * shape[node.input[0]][-1]


MACS: dict[str, Formula] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
}

# Moves, comparisons, or at most a few operations per element.
# fmt: off
FREE = frozenset({
    "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant",
    "DequantizeLinear", "Div", "Dropout", "Expand", "Flatten", "Gather", "GlobalAveragePool",
    "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Max", "MaxPool", "Min",
    "Mul", "PRelu", "Pad", "QuantizeLinear", "ReduceMean", "Relu", "Reshape", "Shape", "Sigmoid",
    "Slice", "Softmax", "Split", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
})
# fmt: on


def count_flops(model: onnx.ModelProto) -> Cost:
    """Return each node's multiply-accumulates, parameters and bytes, for a batch of one.

    ``weight_bytes`` are the bytes of the constants a node brings in, as they are stored;
    ``activation_bytes`` those of what it writes, in the type it writes; a DequantizeLinear writes
    none, since it is read where it stands. A constant that several nodes read is the first one's.
    Raises `GraphError` if a shape cannot be inferred.
    """
    import onnx

    graph, shape, width = _inferred(model)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    counted, uncounted = [], Counter[str]()
    for node in graph.node:
        brought = [stored.pop(name) for name in dict.fromkeys(node.input) if name in stored]
        kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        if kind not in MACS and kind not in FREE:
            uncounted[kind] += 1
        formula = MACS.get(kind)
        counted.append(
            LayerCost(
                name=node.name,
                op=node.op_type,
                output_shape=shape[node.output[0]],
                macs=formula(node, shape) if formula else 0,
                parameters=sum(prod(tensor.dims) for tensor in brought if _is_weight(tensor, node)),
                weight_bytes=sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in brought),
                activation_bytes=sum(prod(shape[n]) * width[n] for n in _written(node, width)),
            )
        )
    return Cost(tuple(counted), dict(uncounted))


def _written(node: onnx.NodeProto, width: Mapping[str, int]) -> tuple[str, ...]:
    if node.op_type == "DequantizeLinear":
        return ()
    return tuple(name for name in node.output if name in width)


def _is_weight(tensor: onnx.TensorProto, node: onnx.NodeProto) -> bool:
    """Tell the numbers of a network from what describes a graph: axes, shapes, scales."""
    import onnx

    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return bool(tensor.name == node.input[0])
    kinds = onnx.TensorProto
    return tensor.data_type in (kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE)


def _inferred(
    model: onnx.ModelProto,
) -> tuple[onnx.GraphProto, dict[str, Shape], dict[str, int]]:
    """Return the graph for a batch of one, each tensor's shape, each activation's item size."""
    import onnx

    single = onnx.ModelProto()
    single.CopyFrom(model)
    for value in (*single.graph.input, *single.graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    del single.graph.value_info[:]
    try:
        single = onnx.shape_inference.infer_shapes(single, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        reason = str(error).strip().splitlines()[0]
        raise GraphError(f"cannot infer the shapes of the graph: {reason}") from error
    shape: dict[str, Shape] = {t.name: tuple(t.dims) for t in single.graph.initializer}
    width: dict[str, int] = {}
    for value in (*single.graph.input, *single.graph.output, *single.graph.value_info):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shape[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
            width[value.name] = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    for node in single.graph.node:
        for name in (*node.input, node.output[0]):
            if name and name not in shape:
                raise GraphError(
                    f"cannot infer the shapes of the graph: {name!r}, read or written by "
                    f"{node.op_type} {node.name!r}, has none"
                )
    return single.graph, shape, width
