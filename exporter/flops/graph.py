"""Count an ONNX graph, node by node.

A DequantizeLinear is read where it stands: it writes nothing, its reader reads the bytes as they
are stored, and constants that it dequantises are its reader's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from exporter.errors import GraphError, InputRefused
from exporter.flops import formulas
from exporter.flops.formulas import Shape
from exporter.flops.liveness import Step, alive_bytes
from exporter.records import Cost, LayerCost

if TYPE_CHECKING:
    import onnx

Formula: TypeAlias = "Callable[[onnx.NodeProto, Mapping[str, Shape]], int]"


def _conv(weight: int) -> Formula:
    return lambda node, shape: formulas.convolution(
        shape[node.output[0]], shape[node.input[weight]]
    )


def _conv_transpose(node: onnx.NodeProto, shape: Mapping[str, Shape]) -> int:
    return formulas.transposed_convolution(shape[node.input[0]], shape[node.input[1]])


def _gemm(node: onnx.NodeProto, shape: Mapping[str, Shape]) -> int:
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return formulas.product(shape[node.output[0]], shape[node.input[0]][0 if transposed else 1])


def _matmul(node: onnx.NodeProto, shape: Mapping[str, Shape]) -> int:
    return formulas.product(shape[node.output[0]], shape[node.input[0]][-1])


MACS: dict[str, Formula] = {
    "Conv": _conv(1),
    "ConvInteger": _conv(1),
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearConv": _conv(3),
    "QLinearMatMul": _matmul,
}

# Moves, comparisons, or at most a few operations per element.
# fmt: off
FREE = frozenset({
    "Abs", "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant",
    "Celu", "ConstantOfShape", "Cos", "DepthToSpace", "DequantizeLinear", "Div", "Dropout", "Elu",
    "Equal", "Expand", "Flatten", "Gather", "GatherND", "GlobalAveragePool", "GlobalMaxPool",
    "Greater", "GreaterOrEqual", "GroupNormalization", "HardSigmoid", "HardSwish", "Identity",
    "InstanceNormalization", "LRN", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual",
    "LogSoftmax", "Max", "MaxPool", "Min", "Mul", "Neg", "PRelu", "Pad", "QuantizeLinear", "Range",
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "Round",
    "Shape", "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax", "Softsign", "SpaceToDepth",
    "Split", "Squeeze", "Sub", "Sum", "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose",
    "Unsqueeze", "Where",
})
# fmt: on
_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
_SMALL = 1024  # elements of a constant that may say what a shape is


def read_file(path: Path) -> onnx.ModelProto:
    """Return what an ONNX file says, external data not read: sizes are known without.

    Raises `InputRefused` if it is not an ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise InputRefused(f"{path}: no such file")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise InputRefused(f"{path.name}: truncated, damaged or not an ONNX model") from error
    if not model.graph.output:
        raise InputRefused(f"{path.name}: not an ONNX model with an input and an output")
    return model


def input_shape_of(model: onnx.ModelProto) -> Shape | None:
    """Return the shape of the one input behind its batch axis, None where it is not that plain."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1:
        return None
    sizes = tuple(dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim[1:])
    return sizes if all(sizes) else None


def count_flops(model: onnx.ModelProto, input_shape: Shape | None = None) -> Cost:
    """Return each node's multiply-accumulates, parameters and bytes, for a batch of one.

    ``input_shape`` is that of the one input without its batch axis, where the graph leaves it open.
    ``weight_bytes`` are the bytes of the constants a node brings in, as they are stored, a constant
    that several nodes read being the first one's; ``read_bytes`` those of all it reads, weights
    included; ``activation_bytes`` of what it writes; ``alive_bytes`` of all activations that are
    held while it runs. Raises `GraphError` if a shape cannot be inferred.
    """
    graph = _Graph.of(model, input_shape)
    alive = alive_bytes(
        [Step(graph.activations(node), graph.written(node)) for node in graph.nodes],
        graph.bytes,
        given=graph.given,
        wanted=[origin for name in graph.wanted for origin in graph.origins(name)],
    )
    counted, uncounted, new = [], Counter[str](), set(graph.stored)
    for node, held in zip(graph.nodes, alive, strict=True):
        kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        if kind not in MACS and kind not in FREE:
            uncounted[kind] += 1
        formula = MACS.get(kind)
        constants = graph.constants(node)
        brought = [name for name in constants if name in new]
        new.difference_update(brought)
        counted.append(
            LayerCost(
                name=node.name,
                op=node.op_type,
                output_shape=graph.shape[node.output[0]],
                macs=formula(node, graph.shape) if formula else 0,
                parameters=sum(prod(graph.shape[n]) for n in brought if n in graph.weights),
                weight_bytes=sum(graph.bytes[name] for name in brought),
                activation_bytes=sum(graph.bytes[name] for name in graph.written(node)),
                read_bytes=sum(graph.bytes[n] for n in (*constants, *graph.activations(node))),
                alive_bytes=held,
            )
        )
    return Cost(tuple(counted), dict(uncounted))


class _Graph(NamedTuple):
    """A graph for a batch of one: each tensor's shape and bytes, and what stands for another.

    ``read_in_place`` has, for what a DequantizeLinear gives, what it reads; ``weights`` are the
    constants that are a network's numbers, and not axes, shapes or scales.
    """

    nodes: tuple[onnx.NodeProto, ...]
    given: tuple[str, ...]
    wanted: tuple[str, ...]
    shape: Mapping[str, Shape]
    bytes: Mapping[str, int]
    stored: frozenset[str]
    weights: frozenset[str]
    read_in_place: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, model: onnx.ModelProto, input_shape: Shape | None) -> _Graph:
        import onnx

        graph = _inferred(model, input_shape)
        shape: dict[str, Shape] = {t.name: tuple(t.dims) for t in model.graph.initializer}
        kind = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        stored = {*kind, *(n.output[0] for n in graph.node if n.op_type == "Constant")}
        for value in (*graph.input, *graph.output, *graph.value_info):
            tensor = value.type.tensor_type
            known = tensor.HasField("shape")
            if known and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
                shape[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
                kind[value.name] = tensor.elem_type
        _check_shapes(graph, shape)
        kinds = onnx.TensorProto
        floats = (kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE)
        scales = {name for n in graph.node if _quantises(n) for name in n.input[1:]}
        quantised = {n.input[0] for n in graph.node if _quantises(n)}
        return cls(
            nodes=tuple(graph.node),
            given=tuple(v.name for v in model.graph.input if v.name not in stored),
            wanted=tuple(v.name for v in graph.output),
            shape=shape,
            bytes={name: _bytes(kind[name], shape[name]) for name in kind},
            stored=frozenset(stored),
            weights=frozenset(
                name
                for name in stored
                if name in quantised or (kind[name] in floats and name not in scales)
            ),
            read_in_place={
                n.output[0]: tuple(n.input) for n in graph.node if n.op_type == "DequantizeLinear"
            },
        )

    def origins(self, name: str) -> tuple[str, ...]:
        """Return what is read where a name is: itself, or what is dequantised there."""
        if name not in self.read_in_place:
            return (name,)
        return tuple(o for read in self.read_in_place[name] for o in self.origins(read))

    def constants(self, node: onnx.NodeProto) -> tuple[str, ...]:
        """Return the constants that a node reads, each once."""
        if node.output[0] in self.read_in_place:
            return ()
        read = dict.fromkeys(origin for name in node.input for origin in self.origins(name))
        return tuple(name for name in read if name in self.stored)

    def activations(self, node: onnx.NodeProto) -> tuple[str, ...]:
        """Return the activations that a node reads, each once."""
        if node.output[0] in self.read_in_place:
            return ()
        read = dict.fromkeys(origin for name in node.input for origin in self.origins(name))
        return tuple(name for name in read if name not in self.stored and name in self.bytes)

    def written(self, node: onnx.NodeProto) -> tuple[str, ...]:
        """Return what a node writes."""
        if node.output[0] in self.read_in_place:
            return ()
        return tuple(n for n in node.output if n in self.bytes and n not in self.stored)


def _quantises(node: onnx.NodeProto) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear")


def _bytes(kind: int, shape: Shape) -> int:
    """Return the bytes of a tensor as ONNX stores it: small types are packed."""
    import onnx

    name = onnx.TensorProto.DataType.Name(kind)
    bits = _BITS.get(name) or 8 * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    return -(-prod(shape) * bits // 8)


def _check_shapes(graph: onnx.GraphProto, shape: Mapping[str, Shape]) -> None:
    for node in graph.node:
        for name in (*node.input, node.output[0]):
            if name and name not in shape:
                raise GraphError(
                    f"cannot infer the shapes of the graph: {name!r}, read or written by "
                    f"{node.op_type} {node.name!r}, has none"
                )


def _inferred(model: onnx.ModelProto, input_shape: Shape | None) -> onnx.GraphProto:
    """Return the graph with its shapes for a batch of one, without its large constants' numbers."""
    import onnx

    single = onnx.ModelProto()
    single.ir_version = max(model.ir_version, 4)  # from which on constants need not be inputs
    single.opset_import.extend(model.opset_import)
    single.functions.extend(model.functions)
    graph = single.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    stored = {tensor.name for tensor in model.graph.initializer}
    graph.input.extend(value for value in model.graph.input if value.name not in stored)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    if input_shape is not None:
        _set_shape(graph, input_shape)
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= _SMALL and not tensor.external_data:
            graph.initializer.append(tensor)
        else:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(info)
    try:
        return onnx.shape_inference.infer_shapes(single, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        reason = str(error).strip().splitlines()[0]
        raise GraphError(f"cannot infer the shapes of the graph: {reason}") from error


def _set_shape(graph: onnx.GraphProto, wanted: Shape) -> None:
    """Give the one input this shape behind its batch axis. Raises `InputRefused`."""
    names = [value.name for value in graph.input]
    if len(names) != 1:
        raise InputRefused(
            f"an input shape was given for a graph of {len(names)} inputs: {', '.join(names)}"
        )
    shape = graph.input[0].type.tensor_type.shape
    said = ["N", *(str(d.dim_value or d.dim_param or "?") for d in shape.dim[1:])]
    fixed = [d.dim_value if d.HasField("dim_value") else None for d in shape.dim[1:]]
    asked = "×".join(["N", *map(str, wanted)])
    fits = len(fixed) == len(wanted) and all(
        one in (None, size) for one, size in zip(fixed, wanted, strict=True)
    )
    if not fits or min(wanted) < 1:
        raise InputRefused(f"the graph takes {'×'.join(said)}, and cannot take {asked}")
    for dim, size in zip(shape.dim[1:], wanted, strict=True):
        dim.dim_value = size
    for value in graph.output:  # what else was open follows from it
        for dim in value.type.tensor_type.shape.dim[1:]:
            if not dim.HasField("dim_value"):
                dim.Clear()
