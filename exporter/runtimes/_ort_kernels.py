"""ONNX Runtime's profile as kernels: their times, their arithmetic, and the bytes that they move.

The profile gives the shapes and types that each kernel read and wrote, so that nothing has to be
inferred, fusions and layouts of ONNX Runtime's own included:

    convolution      MACs = |output| · |weights| / output channels
    matrix product   MACs = |output| · inner dimension
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from exporter.records import Kernel
from exporter.runtimes._graph import WEIGHTED
from exporter.runtimes._ort_audit import INTEGER, POINTWISE, TYPES, plain_name

if TYPE_CHECKING:
    import onnx

Tensor: TypeAlias = tuple[str, tuple[int, ...]]

_SUFFIX = "_kernel_time"
_CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger")
_PRODUCTS = (
    *("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "QGemm", "QLinearMatMul", "MatMulInteger"),
    *("MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
)
_WIDTHS = {"double": 8, "int64": 8, "uint64": 8, "float": 4, "int32": 4, "uint32": 4}
_NAMES = {1: "float", 2: "uint8", 3: "int8", 10: "float16", 11: "double", 16: "bfloat16"}
_WIDTHS |= {"float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2}


class Node(NamedTuple):
    """A node of the optimised graph: the layer that it computes, if one, and its weights."""

    layer: str | None
    weights: Tensor


def computing_nodes(graph: onnx.GraphProto, optimised: onnx.GraphProto) -> dict[str, Node]:
    """Return the nodes of the optimised graph that multiply by constants, by their names.

    A node's layer is the one whose weights or bias it reads; where those were laid out anew, the
    one that writes the tensor it is named after, behind a sum the one that is nobody else's.
    """
    constants = {
        t.name: (_NAMES.get(t.data_type, ""), tuple(t.dims)) for t in optimised.initializer
    }
    possible: dict[str, set[str]] = {}
    weights: dict[str, Tensor] = {}
    owners, writers = _owners(graph), {name: n for n in graph.node for name in n.output}
    for node in optimised.node:
        own = [constants[name] for name in node.input if name in constants]
        if node.op_type in (*_CONVOLUTIONS, *_PRODUCTS) and own:
            weights[node.name] = max(own, key=lambda tensor: len(tensor[1]))
            reads = [plain_name(name).removesuffix("_dq").removesuffix("_q") for name in node.input]
            layers = set().union(*(owners.get(name, ()) for name in reads))
            possible[node.name] = layers or _behind(plain_name(node.name), writers)
    taken = set().union(*(layers for layers in possible.values() if len(layers) == 1))
    found = {}
    for name, tensor in weights.items():
        layers = possible[name] if len(possible[name]) == 1 else possible[name] - taken
        found[name] = Node(next(iter(layers)) if len(layers) == 1 else None, tensor)
    return found


def _owners(graph: onnx.GraphProto) -> dict[str, set[str]]:
    """Return the layers that read each constant, by the name that it had before it was stored."""
    owners: dict[str, set[str]] = {}
    for node in graph.node:
        if node.op_type in WEIGHTED:
            for name in node.input[1:]:
                owners.setdefault(name.removesuffix("_dq"), set()).add(node.name)
    return owners


def _behind(tensor: str, writers: Mapping[str, onnx.NodeProto]) -> set[str]:
    """Return the layers that may write a tensor, through operators that are fused into layers."""
    node = writers.get(tensor)
    while node is not None and node.op_type in POINTWISE:
        node = writers.get(node.input[0])
    if node is None:
        return set()
    terms = [node] if node.op_type != "Add" else [writers.get(name) for name in node.input]
    return {term.name for term in terms if term is not None and term.op_type in WEIGHTED}


def kernel_times(
    events: Sequence[Mapping[str, Any]], nodes: Mapping[str, Node], *, skip: int
) -> tuple[Kernel, ...]:
    """Return every kernel in running order, with the median time of all runs but the first few.

    One that computes a layer has the layer's name. Weights that were laid out for good when the
    file was loaded are not in the profile, and are those of ``nodes``.
    """
    times: dict[str, list[float]] = {}
    last: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            name = event["name"].removesuffix(_SUFFIX)
            times.setdefault(name, []).append(event["dur"] / 1000)
            last[name] = event["args"]
    return tuple(
        _kernel(name, last[name], nodes.get(name), median(spans[skip:] or spans))
        for name, spans in times.items()
    )


def _kernel(name: str, args: Mapping[str, Any], node: Node | None, milliseconds: float) -> Kernel:
    op = args["op_name"]
    reads, writes = (_tensors(args, f"{side}_type_shape") for side in ("input", "output"))
    if node is not None and node.weights not in reads:
        reads.append(node.weights)
    kind = "int8" if op in INTEGER else TYPES.get(reads[0][0]) if reads else None
    return Kernel(
        name=(node.layer if node is not None else None) or plain_name(name),
        op=op,
        type=kind,
        macs=_macs(op, reads, writes),
        bytes=sum(_WIDTHS.get(kind, 1) * prod(shape) for kind, shape in (*reads, *writes)),
        milliseconds=milliseconds,
    )


def _tensors(args: Mapping[str, Any], side: str) -> list[Tensor]:
    found = [pair for entry in args.get(side, ()) for pair in entry.items()]
    return [(kind, tuple(map(int, shape))) for kind, shape in found]


def _macs(op: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> int:
    if op in _CONVOLUTIONS:  # beside its input, only its weights have more than one axis
        weights = max((shape for _, shape in reads[1:]), key=len)
        return prod(writes[0][1]) * prod(weights[1:])
    if op in _PRODUCTS:
        taken = reads[0][1]
        rows = prod(writes[0][1][:-1])
        return prod(writes[0][1]) * (prod(taken) // rows if rows else 0)
    return 0
