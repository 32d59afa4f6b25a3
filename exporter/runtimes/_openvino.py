"""What a compiled OpenVINO model says of itself: its layers' types, times, arithmetic and bytes.

Its runtime model is a graph of the kernels, each with the names of the layers that it was made
from, the types and, where the batch is fixed, the shapes of what it reads and writes. A product
whose bias is a layer of its own is called by its name and ``/WithoutBiases``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from statistics import median
from typing import TYPE_CHECKING, Any

from exporter.records import Executed, Kernel
from exporter.runtimes._asked import Layer

if TYPE_CHECKING:
    import onnx

PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_TYPES = {
    "u8": "int8",
    "i8": "int8",
    "f8e4m3": "fp8",
    "f16": "fp16",
    "bf16": "bf16",
    "f32": "fp32",
}
_BITS = {"f64": 64, "i64": 64, "f32": 32, "i32": 32, "f16": 16, "bf16": 16}


def executed(asked: Sequence[Layer], ran: Any) -> tuple[Executed, ...]:
    """Return every layer with the type that the kernel it became a part of reads."""
    kernels = [node for node in ran.get_ordered_ops() if told(node, "layerType") in PRODUCTS]
    records = []
    for layer in asked:
        own = [node for node in kernels if _is_of(node, layer.node)]
        if len(own) != 1:
            records.append(layer.as_run(None, "no layer of the compiled model can be told its own"))
            continue
        precision = told(own[0], "runtimePrecision")
        kind = _TYPES.get(precision, precision)
        records.append(layer.as_run(kind, _reason(layer, own[0])))
    return tuple(records)


def kernel_times(
    ran: Any, times: Mapping[str, Sequence[float]], graph: onnx.GraphProto
) -> Iterator[Kernel]:
    """Yield every kernel in running order, with the median of its ``times``, in milliseconds.

    One that computes a layer has the layer's name, as it is in ``graph``.
    """
    writers = {name: node.name for node in graph.node for name in node.output}
    for node in ran.get_ordered_ops():
        name = node.get_friendly_name()
        if not (spans := times.get(name)):
            continue
        op, reads, writes = told(node, "layerType"), _reads(node), _writes(node)
        layer = told(node, "originalLayersNames").split(",")[0].partition("/WithoutBiases")[0]
        yield Kernel(
            name=writers.get(layer, layer) if op in PRODUCTS else name,
            op=op,
            type=_TYPES.get(told(node, "runtimePrecision")),
            macs=_macs(op, [shape for _, shape in reads], writes[0][1]),
            bytes=sum(_BITS.get(kind, 8) * prod(shape) // 8 for kind, shape in (*reads, *writes)),
            milliseconds=median(spans),
        )


def told(node: Any, key: str) -> str:
    """Return what a kernel says of itself under a key, nothing if it does not."""
    info = node.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


def _is_of(kernel: Any, node: onnx.NodeProto) -> bool:
    names = told(kernel, "originalLayersNames").split(",")
    own = (node.name, *node.output)
    return any(name in own or name.startswith(f"{node.name}/WithoutBiases") for name in names)


def _reason(layer: Layer, kernel: Any) -> str:
    if layer.asked in ("fp16", "bf16"):
        return (
            f"OpenVINO has no {layer.asked.upper()} kernel for it on this device, so it rounds the "
            f"weights to {layer.asked.upper()} and the activations not at all"
        )
    if layer.asked == "int8":
        source = kernel.input_value(0).get_node()
        names = told(source, "originalLayersNames") or source.get_friendly_name()
        return f"its input reaches it in float, from {told(source, 'layerType')} of {names}"
    return f"OpenVINO has no kernel for {layer.asked.upper()} on this device and dequantises first"


def _reads(node: Any) -> list[tuple[str, tuple[int, ...]]]:
    found = []
    for port in (node.input_value(i) for i in range(node.get_input_size())):
        kinds = told(port.get_node(), "outputPrecisions").split(",")
        found.append((kinds[min(port.get_index(), len(kinds) - 1)], tuple(port.get_shape())))
    return found


def _writes(node: Any) -> list[tuple[str, tuple[int, ...]]]:
    kinds = told(node, "outputPrecisions").split(",")
    ports = [node.output(i) for i in range(node.get_output_size())]
    return [(kinds[min(i, len(kinds) - 1)], tuple(p.get_shape())) for i, p in enumerate(ports)]


def _macs(op: str, reads: Sequence[tuple[int, ...]], written: tuple[int, ...]) -> int:
    """Return the multiply-accumulates; grouped weights have the groups as an axis in front."""
    if op == "Convolution":
        return prod(written) * prod(reads[1][len(reads[1]) - len(written) + 1 :])
    if op == "Deconvolution":
        return prod(reads[0]) * prod(reads[1][len(reads[1]) - len(written) + 1 :])
    if op in PRODUCTS:
        return prod(written) * reads[0][-1]
    return 0
