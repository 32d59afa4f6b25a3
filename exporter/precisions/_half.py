"""A graph in a 16-bit float, and in FP32 where that float's range does not do. Nothing is clamped.

`_floats` knows the values, `_range` finds what leaves half's range, `_losses` measures what small
weights cost, `_regions` decides which nodes stay in FP32 for it, and `_writing` writes the graph:
constants in the type of what reads them, and a Cast wherever the type changes. Every node that
stays is named in a note, with the reason and the figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from exporter.contracts import Converted, Statistics
from exporter.errors import GraphError, UnknownName
from exporter.onnx_edits import replace_nodes
from exporter.precisions._floats import FP16, Floats, Half
from exporter.precisions._losses import outputs_moved
from exporter.precisions._range import (
    QUANTISERS,
    long_sums,
    lossy_factors,
    unsafe_node,
    unsafe_tensors,
)
from exporter.precisions._regions import Regions
from exporter.precisions._writing import Writer
from exporter.records import Array

if TYPE_CHECKING:
    import onnx

MARGIN = 2.0
SMALLEST_NORMAL = FP16.normal


def to_half(
    model: onnx.ModelProto,
    *,
    half_io: bool,
    half: Half = FP16,
    statistics: Statistics | None = None,
    samples: Array | None = None,
    margin: float = MARGIN,
    keep: Sequence[str] = (),
) -> Converted:
    """Return a copy whose floats are halves; with ``half_io`` its inputs and outputs are too.

    Where ``statistics`` has no range for a tensor, and none follows from what it is made of, the
    tensor is taken to fit, and named in a note. Without ``samples``, weights that lose bits keep
    their layer in FP32, whether it matters or not. ``keep`` names more layers to keep.

    Raises `GraphError` for an operator with a graph of its own, NaN, or an input or output that
    does not fit where ``half_io`` is asked for; `UnknownName` for an unknown layer to keep.
    """
    import onnx

    written = onnx.ModelProto()
    written.CopyFrom(model)
    _take_constants_out(written.graph)
    floats = Floats.of(written, statistics or {})
    unsafe = unsafe_tensors(floats, half, margin)
    if half_io:
        _check_io(floats.graph, unsafe, half)
    regions = Regions(floats, half_io)
    kept = dict.fromkeys(_to_keep(floats.graph, keep), "as asked for")
    kept = _must_stay(floats, regions, unsafe, half, margin) | kept
    lossy = {i: names for i, names in lossy_factors(floats, half).items() if i not in kept}
    moved = outputs_moved(written, lossy, samples, half)
    kept |= {index: why for index, why in moved.kept.items() if index not in kept}
    for index in kept:
        regions.force(index)
    regions.grow()
    kept_notes = _of_kept(floats.graph, kept, regions.joined)
    other_notes = (*_of_sums(floats, regions, half, margin), *_of_unknown(floats, statistics))
    writer = Writer(written.graph, regions, half)
    writer.write()
    return Converted(
        written, (*kept_notes, *moved.notes, *_of_constants(writer, half), *other_notes)
    )


def check_half_io(around: str, *, half_io: bool) -> None:
    """Raise `ValueError` where input and output would be half around floats that are not."""
    if half_io and around != "fp16":
        raise ValueError('half_io needs around = "fp16"')


def in_halves(
    made: Converted, around: str, *, half_io: bool, statistics: Statistics, samples: Array
) -> Converted:
    """Return a quantised graph with its floats as halves where ``around`` says so.

    ``statistics`` are those of its floats; otherwise as `to_half`.
    """
    if around != "fp16":
        return made
    half = to_half(made.model, half_io=half_io, statistics=statistics, samples=samples)
    return made._replace(model=half.model, notes=(*made.notes, *half.notes))


def named(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type} of {node.output[0]}"


# ── What stays ──────────────────────────────────────────────────────────────────────


def _take_constants_out(graph: onnx.GraphProto) -> None:
    """Store what Constant nodes hold with the other constants. Raises `GraphError` for graphs."""
    import numpy as np
    import onnx

    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                raise GraphError(f"{named(node)!r}: {node.op_type} has a graph of its own")
        held = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type != "Constant" or not held.keys() & {"value", "value_float", "value_floats"}:
            nodes.append(node)
            continue
        if "value" in held:
            value = onnx.numpy_helper.to_array(held["value"].t)
        else:
            single = held.get("value_float")
            value = np.array(single.f if single else held["value_floats"].floats, dtype=np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(value, node.output[0]))
    replace_nodes(graph, nodes)
    del graph.value_info[:]


def _check_io(graph: onnx.GraphProto, unsafe: Mapping[str, str], half: Half) -> None:
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            if value.name in unsafe:
                raise GraphError(
                    f"the {kind} cannot be {half.name}: {unsafe[value.name]}",
                    hint="leave out half_io",
                )


def _to_keep(graph: onnx.GraphProto, keep: Sequence[str]) -> list[int]:
    """Return the nodes of the layers to keep, as a node or its PyTorch module is called."""
    names = [{node.name, node.name.partition("/")[0]} - {""} for node in graph.node]
    known = set().union(*names)
    for layer in keep:
        if layer not in known:
            raise UnknownName("layer to keep", layer, known)
    return [index for index, own in enumerate(names) if own.intersection(keep)]


def _must_stay(
    floats: Floats, regions: Regions, unsafe: Mapping[str, str], half: Half, margin: float
) -> dict[int, str]:
    """Return the nodes that cannot be half, with the reason: their own, or a tensor's."""
    found: dict[int, str] = {}
    nodes = floats.graph.node
    for index, node in enumerate(nodes):
        if why := unsafe_node(floats, node, half, margin):
            found[index] = why
            if node.op_type in QUANTISERS:
                for other in sorted(regions.pairs[index]):
                    found.setdefault(other, why)
                    for reader in regions.readers.get(nodes[other].output[0], ()):
                        found.setdefault(reader, why)
    for index in range(len(nodes)):
        for name in regions.tensors(index):
            if name in unsafe:
                found.setdefault(index, unsafe[name])
    return dict(sorted(found.items()))


# ── Notes ───────────────────────────────────────────────────────────────────────────


def _of_kept(graph: onnx.GraphProto, kept: Mapping[int, str], joined: Sequence[int]) -> list[str]:
    """Return one sentence for each reason, with all nodes that it keeps."""
    together: dict[str, list[str]] = {}
    for index, why in sorted(kept.items()):
        together.setdefault(why, []).append(named(graph.node[index]))
    notes = [f"in FP32: {', '.join(names)}: {why}" for why, names in together.items()]
    if joined:
        names = [named(graph.node[index]) for index in joined]
        notes.append(f"in FP32 with them: {', '.join(names)}: that saves casts")
    return notes


def _of_constants(writer: Writer, half: Half) -> list[str]:
    notes = []
    if writer.below:
        notes.append(
            f"{writer.below} of {writer.total} constants lie below half's normal range "
            f"({half.normal:.2g}) and lose precision"
        )
    if half.dtype != FP16.dtype and writer.total:
        notes.append(
            f"{half.name} keeps 8 bits of each constant, which are off by {writer.off():.2%} "
            "altogether"
        )
    return notes


def _of_sums(floats: Floats, regions: Regions, half: Half, margin: float) -> list[str]:
    named_half = {n.name for i, n in enumerate(floats.graph.node) if i not in regions.single}
    found = {n: most for n, most in long_sums(floats, half, margin).items() if n in named_half}
    if not found:
        return []
    return [
        f"the sums of {', '.join(found)} may reach {max(found.values()):.4g} on the way: taken to "
        "be kept in float32, as runtimes do unless told otherwise"
    ]


def _of_unknown(floats: Floats, statistics: Statistics | None) -> list[str]:
    unknown = floats.unknown()
    if not unknown:
        return []
    if not statistics:
        return ["the range of activations is not known, and was not checked"]
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    return [f"not checked, since calibration gave no range: {', '.join(unknown[:5])}{more}"]
