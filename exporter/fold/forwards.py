"""Push an affine map forwards into the layers that read it (see the package for the formulas).

Three forms, the first that all readers can take:

    whole       scale and shift go forwards, and nothing is left
    scale       a goes forwards, one addition of c/a is left: padding and means do not matter
    magnitude   |a| goes forwards, a multiplication by sign(a) is left too: activations may follow

The last two are f·(m·x + t) = a·x + c with f the factor that goes forwards: m = a/f, t = c/f, where
f = 1 for a = 0, and where f or t would be out of the range of the network's type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from exporter.fold.affine import (
    CONVOLUTIONS,
    TRANSPOSED,
    Affine,
    ChannelClamp,
    ChannelScale,
    ChannelShift,
    scale_inputs,
)
from exporter.fold.graph import Graph, Plan, Stays
from exporter.fold.kinds import (
    AVGPOOL,
    CONCATENATION,
    HOMOGENEOUS,
    LAYERS,
    MAXPOOL,
    MEAN,
    ZERO_PAD,
)
from exporter.fold.passing import Clamp, bounds_of, passes_maps, spatial_behind_mean
from exporter.fold.shapes import label_channels, origins, shape_of

CENTRED = 0.5  # means in standard deviations up to which float32 loses nothing to speak of


@dataclass(frozen=True, slots=True)
class _Walk:
    """From one BatchNorm forwards; ``passed`` has the nodes that its map has passed."""

    graph: Graph
    batchnorm: fx.Node
    passed: list[fx.Node] = field(default_factory=list)


class _Carried(NamedTuple):
    """The map that is still to be applied to what a node gives, which has no other difference.

    ``spatial`` is the number of axes behind the channels, if known; ``labels`` say which channel
    each value is of, while a chain of rearrangements has no axis of channels.
    """

    affine: Affine
    spatial: int | None
    labels: torch.Tensor | None = None


def push_forwards(graph: Graph, batchnorm: fx.Node, affine: Affine) -> Plan:
    """Plan how all that reads ``batchnorm`` comes to read what is left of it, as it read it.

    Raises `Stays` with the reason if something behind cannot take it.
    """
    if not graph.readers(batchnorm):
        raise Stays("nothing reads it")
    spatial = _spatial(graph, batchnorm)
    try:
        _check_centred(graph.module(batchnorm))
        walk = _Walk(graph, batchnorm)
        plan = _behind(walk, batchnorm, _Carried(affine, spatial))
        _check_same_time(walk)
    except Stays as why:
        for factor in _factors(affine, graph.dtype):
            try:
                return _leaving_shift(graph, batchnorm, affine, factor, spatial, str(why))
            except Stays as stays:
                last = stays
        raise last from None
    return plan


def _check_centred(batchnorm: Any) -> None:
    """Raise `Stays` where means are large beside the deviations.

    Σ W·a·x is then large and all but cancelled by Σ W·c: exact, but float32 would lose digits that
    subtracting the mean first keeps.
    """
    deviations = torch.sqrt(batchnorm.running_var + batchnorm.eps)
    largest = float((batchnorm.running_mean.abs() / deviations).max())
    if largest > CENTRED:
        raise Stays(f"a mean of {largest:.1f} deviations would cost float32 its digits")


def _check_same_time(walk: _Walk) -> None:
    """Raise `Stays` if what the BatchNorm read may be something else by the time it is read."""
    for node in walk.passed:
        walk.graph.check_unchanged(walk.batchnorm, node)
        if walk.graph.is_in_place(node) and not walk.graph.does_nothing(node):
            raise Stays(f"{walk.graph.label(node)} changes it in place")


def _spatial(graph: Graph, batchnorm: fx.Node) -> int | None:
    """Return how many axes lie behind the channels, if that is known."""
    kind = type(graph.module(batchnorm))
    if kind is nn.BatchNorm1d:
        shape = shape_of(batchnorm)
        return len(shape) - 2 if shape else 0 if graph.is_matrix(batchnorm) else None
    return {nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[kind]


def _factors(affine: Affine, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield what may go forwards: a, and |a| if that is another."""
    most = torch.finfo(dtype).max ** 0.5
    size = affine.scale.abs()
    safe = (size >= 1 / most) & (size <= most) & (affine.shift.abs() <= most * size)
    yield torch.where(safe, affine.scale, 1.0)
    if affine.negative:
        yield torch.where(safe, size, 1.0)


def _leaving_shift(
    graph: Graph,
    batchnorm: fx.Node,
    affine: Affine,
    factor: torch.Tensor,
    spatial: int | None,
    why: str,
) -> Plan:
    """Let the factor go forwards, and leave the rest where the BatchNorm was."""
    walk = _Walk(graph, batchnorm)
    plan = _behind(walk, batchnorm, _Carried(Affine(factor, torch.zeros_like(factor)), spatial))
    if spatial is None:
        raise Stays("how many axes it reads, an example input would tell")
    multiplier, shift = affine.scale / factor, affine.shift / factor
    graph.check_range(batchnorm, multiplier, shift)
    scaled, shifted = bool((multiplier != 1).any()), bool(shift.any())
    if not (scaled or shifted):
        try:
            _check_same_time(walk)
        except Stays:
            shifted = True  # an addition of nothing is the copy that is needed
    along = (-1, *[1] * spatial)

    def edit(name: str) -> None:
        if shifted:
            graph.insert_behind(batchnorm, name, ChannelShift(shift.view(along)))
        if scaled:  # in front of the addition
            module = ChannelScale(multiplier.view(along))
            graph.insert_behind(batchnorm, f"{name}_scale" if shifted else name, module)

    said = list(plan.said)
    if scaled:
        said.append(_multiplied(multiplier))
    if shifted:
        said.append("shift left as one addition per channel")
    if shifted or scaled:
        said[-1] += f", since {why}"
    return plan._replace(edits=(*plan.edits, edit), said=tuple(said))


def _multiplied(multiplier: torch.Tensor) -> str:
    size = multiplier.abs()
    counts = {
        "sign of {} channels with γ < 0": int((multiplier == -1).sum()),
        "0 for {} channels with γ = 0": int((size == 0).sum()),
        "scale of {} channels out of range": int(((size != 0) & (size != 1)).sum()),
    }
    parts = [said.format(count) for said, count in counts.items() if count]
    return f"{' and '.join(parts)} by one multiplication"


# ── What reads it ───────────────────────────────────────────────────────────────────


def _behind(walk: _Walk, node: fx.Node, carried: _Carried) -> Plan:
    """Plan for all that reads ``node``."""
    users = walk.graph.readers(node)
    if not users:
        raise Stays(f"{walk.graph.label(node)} is read by nothing")
    plans = [_into(walk, user, node, carried) for user in users]
    patterns = [plan.pattern for plan in plans]
    return Plan(
        patterns[0] if len(patterns) == 1 else f"({', '.join(patterns)})",
        0,
        tuple(edit for plan in plans for edit in plan.edits),
        tuple(dict.fromkeys(said for plan in plans for said in plan.said)),
    )


def _into(walk: _Walk, node: fx.Node, source: fx.Node, carried: _Carried) -> Plan:
    graph = walk.graph
    graph.check_hooks(node)
    if node in walk.passed and bounds_of(graph, node):
        raise Stays(f"{graph.label(node)} is reached by two ways")
    walk.passed.append(node)
    if graph.rearranges(node):
        return _through_rearrangement(walk, node, source, carried)
    if carried.labels is not None:
        raise Stays(f"{graph.label(source)} does not keep channels whole")
    if graph.is_a(node, LAYERS):
        return _into_layer(graph, node, source, carried)
    if graph.is_a(node, CONCATENATION):
        return _through_concatenation(walk, node, source, carried)
    if clamp := bounds_of(graph, node):
        return _through_clamp(walk, node, clamp, carried)
    return _on(walk, node, _passing(graph, node, carried))


def _on(walk: _Walk, node: fx.Node, carried: _Carried) -> Plan:
    plan = _behind(walk, node, carried)
    return plan._replace(pattern=f"{walk.graph.kind(node)} → {plan.pattern}")


def _passing(graph: Graph, node: fx.Node, carried: _Carried) -> _Carried:
    """Return what is carried behind a node with one reading. Raises `Stays` if nothing is."""
    affine, spatial, _ = carried
    homogeneous = any(graph.is_a(node, kinds) for kinds in HOMOGENEOUS)
    shift_stops = homogeneous or graph.is_a(node, AVGPOOL) or graph.is_a(node, ZERO_PAD)
    if graph.flattens(node):
        return carried._replace(spatial=0)
    if graph.is_a(node, MEAN) and spatial is not None:
        left = spatial_behind_mean(node, spatial)
        if left is None:
            raise Stays(f"{graph.label(node)} is a mean over more than a channel's values")
        return carried._replace(spatial=left)
    if not (passes_maps(graph, node) or shift_stops):
        raise Stays(f"no layer behind it can take it: {graph.between(node)} comes first")
    graph.check_pool(node, spatial)
    if graph.is_a(node, MAXPOOL) and graph.returns_indices(node):
        raise Stays(f"{graph.label(node)} returns indices")
    if homogeneous and affine.negative:
        raise Stays(f"{graph.label(node)} lets no sign pass")
    if affine.shift.any() and not passes_maps(graph, node):
        raise Stays(f"{graph.label(node)} lets no shift pass")
    return carried


def _through_rearrangement(walk: _Walk, node: fx.Node, source: fx.Node, carried: _Carried) -> Plan:
    """Pass a view, a transpose, a chunk: what it makes of labels says where each channel went."""
    graph, labels = walk.graph, carried.labels
    if labels is None:
        shape = shape_of(source)
        if shape is None or len(shape) < 2 or shape[1] != len(carried.affine.scale):
            raise Stays(f"{graph.label(node)} does not keep channels whole")
        labels = label_channels(shape)
    return _on(walk, node, _relabelled(graph.moved(node, labels), carried.affine))


def _relabelled(labels: Any, affine: Affine) -> _Carried:
    """Return what is carried by what a rearrangement made of labels."""
    if not isinstance(labels, torch.Tensor):
        return _Carried(affine, None, labels)
    comes_from = origins(labels)
    if comes_from is None:
        return _Carried(affine, None, labels)
    picked = Affine(affine.scale[comes_from], affine.shift[comes_from])
    return _Carried(picked, labels.ndim - 2)


def _through_concatenation(walk: _Walk, node: fx.Node, source: fx.Node, carried: _Carried) -> Plan:
    """Pass a concatenation: the other branches' channels go on as they are."""
    graph, spatial = walk.graph, carried.spatial
    axis = graph.joined_axis(node)
    if spatial is None or axis not in (1, -1 - spatial):
        raise Stays(f"{graph.label(node)} does not join channels")
    scales, shifts = [], []
    for part in graph.joined(node):
        size = graph.channels(part)
        if size is None:
            raise Stays(f"how many channels {graph.label(part)} gives, an example input would tell")
        own = part is source
        if own and size != len(carried.affine.scale):
            raise Stays(f"{graph.label(node)} joins features, not channels")
        scales.append(carried.affine.scale if own else carried.affine.scale.new_ones(size))
        shifts.append(carried.affine.shift if own else carried.affine.scale.new_zeros(size))
    return _on(walk, node, _Carried(Affine(torch.cat(scales), torch.cat(shifts)), spatial))


def _through_clamp(walk: _Walk, node: fx.Node, clamp: Clamp, carried: _Carried) -> Plan:
    """Pass a clamp: clamp(k·z, l, h) = k·clamp(z, l/k, h/k) for k > 0."""
    graph, scale = walk.graph, carried.affine.scale
    label = graph.label(node)
    if carried.affine.shift.any():
        raise Stays(f"{label} lets no shift pass")
    if clamp.slope != 1 or clamp.offset:
        raise Stays(f"no layer behind it can take it: {graph.kind(node)} comes first")
    if carried.affine.negative or not scale.all():
        raise Stays(f"{label} lets no sign pass")
    low, high = clamp.low / scale, clamp.high / scale
    graph.check_range(node, low, high)
    if carried.spatial is None:
        raise Stays("how many axes it reads, an example input would tell")
    along = (-1, *[1] * carried.spatial)
    plan = _on(walk, node, carried)

    def edit(name: str) -> None:
        bounds = ChannelClamp(low.view(along), high.view(along))
        graph.insert_behind(node, f"{name}_clamp", bounds)
        graph.remove(node)

    said = f"bounds of {label} moved, one pair per channel"
    return plan._replace(edits=(*plan.edits, edit), said=(*plan.said, said))


def _into_layer(graph: Graph, node: fx.Node, source: fx.Node, carried: _Carried) -> Plan:
    affine, spatial, _ = carried
    name, layer, taker = str(node.target), graph.module(node), graph.taker(node)
    if isinstance(layer, nn.Linear):
        if spatial != 0 and not graph.is_matrix(source):
            raise Stays(f"{name} may read more than one axis behind the samples")
        fits = layer.in_features % len(affine.scale) == 0
    else:
        fits = layer.in_channels == len(affine.scale)
        fits = fits and spatial in (None, len(layer.kernel_size))
        graph.check_rank(source, len(layer.kernel_size))
    if not fits:
        raise Stays(f"{name} does not read {len(affine.scale)} channels")
    if affine.shift.any():
        _check_border(name, layer)
    graph.check_fits(node, scale_inputs, affine)

    def edit(_: str) -> None:
        scale_inputs(graph.owned(node), affine)

    return Plan(graph.kind(node), 0, (edit,), (f"{affine.name} forwards into {taker}",))


def _check_border(name: str, layer: Any) -> None:
    """Raise `Stays` if a shift in front of the layer is no constant behind it, at the borders."""
    if isinstance(layer, TRANSPOSED):
        raise Stays(f"{name} adds up fewer values at its borders")
    if isinstance(layer, CONVOLUTIONS):
        padded = layer.padding != "valid" and (layer.padding == "same" or any(layer.padding))
        if padded and layer.padding_mode == "zeros":
            raise Stays(f"{name} pads with zeros, which the shift would have to reach")
