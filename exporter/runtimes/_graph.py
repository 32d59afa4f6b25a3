"""An ONNX file, read once, and what of it decides how a runtime must treat it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exporter.axes import shape_at_optimum
from exporter.errors import BuildError, InputRefused

if TYPE_CHECKING:
    import onnx

QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
WEIGHTED = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "MatMul")


def read_graph(path: Path) -> onnx.GraphProto:
    """Return the graph in a file. Raises `BuildError` if it is not ONNX, or has nothing in it."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path).graph
    except FileNotFoundError as error:
        raise BuildError(f"{path.name}: no such file") from error
    except DecodeError as error:
        raise BuildError(f"{path.name}: truncated, damaged or not an ONNX model") from error
    if not graph.input or not graph.output:
        raise BuildError(f"{path.name}: not an ONNX model with an input and an output")
    return graph


def shapes_to_run(path: Path, batch: int) -> dict[str, tuple[int, ...]]:
    """Return each input's shape for a batch, in the size that a graph is tuned for, by its name.

    Raises `InputRefused` for a graph of another batch, or one that leaves another size open.
    """
    import onnx

    model, found = onnx.load(path), {}
    stored = {tensor.name for tensor in model.graph.initializer}
    for value in (value for value in model.graph.input if value.name not in stored):
        first, *rest = value.type.tensor_type.shape.dim
        if first.HasField("dim_value") and first.dim_value != batch:
            raise InputRefused(f"{path.name} takes a batch of {first.dim_value}, not of {batch}")
        sizes = shape_at_optimum(model, value)
        if 0 in sizes:
            name = rest[sizes.index(0)].dim_param
            raise InputRefused(
                f"{path.name} leaves {name or 'an axis'!r} of {value.name!r} open, and says "
                "not which size it is tuned for",
                hint="export it in one size, or with [size] in a profile",
            )
        found[value.name] = (batch, *sizes)
    return found


def has_half_scales(graph: onnx.GraphProto) -> bool:
    """Return whether a tensor is quantised with a scale stored as half."""
    import onnx

    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    half = onnx.TensorProto.FLOAT16
    return any(types.get(n.input[1]) == half for n in graph.node if n.op_type in QUANTISERS)


def has_float8(graph: onnx.GraphProto) -> bool:
    """Return whether anything is stored as FP8 (E4M3), be it a zero point."""
    import onnx

    return any(tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN for tensor in graph.initializer)


def dequantised_weights(graph: onnx.GraphProto) -> set[str]:
    """Return the tensors that are stored quantised and dequantised in the graph."""
    stored = {tensor.name for tensor in graph.initializer}
    return {
        node.output[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }


def is_quantised(graph: onnx.GraphProto) -> bool:
    """Return whether an activation is quantised."""
    return any(node.op_type == "QuantizeLinear" for node in graph.node)


def float32_products(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Return the names of the matrix products whose weights are FP32."""
    import onnx

    floats = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    return tuple(
        node.name
        for node in graph.node
        if node.op_type in ("Gemm", "MatMul") and floats.intersection(node.input)
    )


def check_quantisation(graph: onnx.GraphProto, name: str) -> None:
    """Raise `BuildError` for what TensorRT would read as something else.

    It takes UINT8 with zero point 0 for INT8, with a warning alone, ignores an unknown domain, and
    saturates FP8 always.
    """
    import onnx

    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise BuildError(f"{name}: TensorRT does not know the domain {node.domain!r}")
        if node.op_type not in QUANTISERS or len(node.input) < 3:
            continue
        if any(a.name == "saturate" and not a.i for a in node.attribute):
            raise BuildError(f"{name}: {node.name!r} does not saturate, and TensorRT always does")
        zero = tensors.get(node.input[2])
        if zero is None:
            raise BuildError(f"{name}: the zero point of {node.name!r} is not a constant")
        if zero.data_type not in kinds:
            kind = onnx.TensorProto.DataType.Name(zero.data_type)
            allowed = " and ".join(map(onnx.TensorProto.DataType.Name, kinds))
            raise BuildError(f"{name}: {node.name!r} is {kind}, and TensorRT takes {allowed} alone")
        if onnx.numpy_helper.to_array(zero).any():
            raise BuildError(f"{name}: the zero point of {node.name!r} is not 0")
