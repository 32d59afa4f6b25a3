"""Push an affine map backwards into the layers that feed it (see the package for the formulas)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from exporter.fold.affine import (
    BATCHNORMS,
    Affine,
    ChannelClamp,
    ChannelScale,
    ChannelShift,
    out_channels,
    scale_outputs,
)
from exporter.fold.graph import Edit, Graph, Left, Plan, Stays
from exporter.fold.kinds import (
    CONCATENATION,
    FLATTEN,
    HOMOGENEOUS,
    LAYERS,
    MAXPOOL,
    MEAN,
    SUM,
)
from exporter.fold.passing import Clamp, bounds_of, passes_maps, spatial_behind_mean
from exporter.fold.shapes import destinations, label_channels, shape_of


def push_backwards(
    graph: Graph, node: fx.Node, reader: fx.Node, affine: Affine, besides: Collection[fx.Node] = ()
) -> Plan:
    """Plan how ``node`` comes to give ``affine`` of what it gives to its only reader.

    ``besides`` may read it too: only channels that ``affine`` leaves as they are.

    Raises `Stays` with the reason if something in front cannot take it.
    """
    graph.only_reader(node, reader, besides)
    graph.check_hooks(node)
    if graph.is_a(node, LAYERS):
        return _into_layer(graph, node, affine)
    if type(graph.module(node)) in BATCHNORMS:
        return _into_batchnorm(graph, node, affine)
    if isinstance(graph.module(node), ChannelShift | ChannelScale):
        return _into_leftover(graph, node, affine)
    if passes_maps(graph, node):
        return _through(graph, node, affine)
    if graph.is_a(node, MEAN):
        return _through_mean(graph, node, affine)
    if graph.rearranges(node):
        return _through_rearrangement(graph, node, affine)
    if graph.is_a(node, FLATTEN) or graph.flattens(node):
        return _through_flatten(graph, node, affine)
    if graph.is_a(node, MAXPOOL):
        return _through_maxpool(graph, node, affine)
    if any(graph.is_a(node, kinds) for kinds in HOMOGENEOUS):
        return _through_homogeneous(graph, node, affine)
    if bounds := bounds_of(graph, node):
        return _through_clamp(graph, node, affine, bounds)
    if graph.is_a(node, SUM):
        return _into_sum(graph, node, affine)
    if graph.is_a(node, CONCATENATION):
        return _into_concatenation(graph, node, affine)
    if node.op == "placeholder":
        raise Stays("the network's input is in front of it")
    raise Stays(f"no layer in front of it can take it: {graph.between(node)} stands between")


# ── Where it ends ───────────────────────────────────────────────────────────────────


def _into_layer(graph: Graph, node: fx.Node, affine: Affine) -> Plan:
    name, layer, taker = str(node.target), graph.module(node), graph.taker(node)
    if isinstance(layer, nn.Linear):
        if not graph.is_matrix(node):
            raise Stays(f"{name} may give more than one axis behind the samples")
        spatial = 0
    else:
        spatial = len(layer.kernel_size)
    if out_channels(layer) != len(affine.scale):
        raise Stays(f"{name} gives {out_channels(layer)} channels and not {len(affine.scale)}")
    graph.check_rank(node, spatial)
    graph.check_fits(node, scale_outputs, affine)

    def edit(_: str) -> None:
        scale_outputs(graph.owned(node), affine)

    return Plan(graph.kind(node), spatial, (edit,), (f"{affine.name} into {taker}",))


def _into_batchnorm(graph: Graph, node: fx.Node, affine: Affine) -> Plan:
    """Into a BatchNorm that had to stay: γ ← a·γ, β ← a·β + c."""
    name, batchnorm, taker = str(node.target), graph.module(node), graph.taker(node)
    spatial = {nn.BatchNorm1d: None, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[type(batchnorm)]
    if spatial is None:
        raise Stays(f"{name} may give matrices or sequences")
    if batchnorm.num_features != len(affine.scale):
        raise Stays(f"{name} gives {batchnorm.num_features} channels, not {len(affine.scale)}")

    def edit(_: str) -> None:
        batchnorm = graph.owned(node)
        ones, zeros = torch.ones_like(affine.scale), torch.zeros_like(affine.shift)
        gamma = ones if batchnorm.weight is None else batchnorm.weight.detach()
        beta = zeros if batchnorm.bias is None else batchnorm.bias.detach()
        batchnorm.weight = nn.Parameter(gamma * affine.scale, requires_grad=False)
        batchnorm.bias = nn.Parameter(beta * affine.scale + affine.shift, requires_grad=False)

    return Plan(graph.kind(node), spatial, (edit,), (f"{affine.name} into {taker}",))


def _into_leftover(graph: Graph, node: fx.Node, affine: Affine) -> Plan:
    """Take up what an earlier fold left.

    a·(x + s) + c = a·x + (c + a·s), and a·(m·x) + c = (a·m)·x + c.
    """
    left = graph.module(node)
    if isinstance(left, ChannelShift):
        whole = Affine(affine.scale, affine.shift + affine.scale * left.shift.flatten())
    else:
        whole = Affine(affine.scale * left.scale.flatten(), affine.shift)
    plan = push_backwards(graph, node.all_input_nodes[0], node, whole)

    def edit(_: str) -> None:
        graph.remove(node)

    return plan._replace(edits=(*plan.edits, edit), once=(*plan.once, node))


# ── What it passes ──────────────────────────────────────────────────────────────────


def _through(graph: Graph, node: fx.Node, affine: Affine) -> Plan:
    plan = push_backwards(graph, node.all_input_nodes[0], node, affine)
    graph.check_pool(node, plan.spatial)
    return plan._replace(pattern=f"{plan.pattern} → {graph.kind(node)}")


def _through_mean(graph: Graph, node: fx.Node, affine: Affine) -> Plan:
    plan = _through(graph, node, affine)
    spatial = spatial_behind_mean(node, plan.spatial)
    if spatial is None:
        raise Stays(f"{graph.label(node)} is a mean over more than a channel's values")
    return plan._replace(spatial=spatial)


def _through_rearrangement(graph: Graph, node: fx.Node, affine: Affine) -> Plan:
    """Pass a chain of views, transposes, chunks and the like that keeps channels whole."""
    chain = [node]
    while graph.rearranges(source := graph.sources(chain[0])[0]):
        chain.insert(0, source)
    shape = shape_of(source)
    if shape is None or len(shape) < 2:
        raise Stays(f"{graph.label(node)} does not keep channels whole")
    values: dict[fx.Node, Any] = {source: label_channels(shape)}
    for read, step in zip((source, *chain), chain, strict=False):
        values[step] = graph.moved(step, values[read])
    found = values[node]
    becomes = destinations(found)
    if becomes is None or found.shape[1] != len(affine.scale):
        raise Stays(f"{graph.label(node)} does not keep channels whole")
    steps = list(zip((source, *chain), chain, strict=False))
    beside = {read: [u for u in graph.readers(read) if u is not step] for read, step in steps}
    for read, users in beside.items():
        for user in users:
            if not graph.rearranges(user) or _channels_of(graph, user, values[read]) & {*becomes}:
                raise Stays(f"{graph.label(read)} is also read by {user.name}")
    wide = Affine(affine.scale.new_ones(shape[1]), affine.scale.new_zeros(shape[1]))
    for origin, channel in becomes.items():
        wide.scale[origin], wide.shift[origin] = affine.scale[channel], affine.shift[channel]
    plan = push_backwards(graph, source, chain[0], wide, beside[source])
    pattern = " → ".join([plan.pattern, *map(graph.kind, chain)])
    return plan._replace(pattern=pattern, spatial=found.ndim - 2)


def _channels_of(graph: Graph, node: fx.Node, labels: Any) -> set[int]:
    """Return the channels that another reader of labelled values takes from them."""
    found = graph.moved(node, labels)
    parts = found if isinstance(found, tuple | list) else (found,)
    return {int(label) for part in parts for label in part.unique()}


def _through_flatten(graph: Graph, node: fx.Node, affine: Affine) -> Plan:
    """Pass a flatten of 1×1 pictures, where a feature is a channel."""
    source = node.all_input_nodes[0]
    if not graph.flattens(node) or graph.channels(source) != len(affine.scale):
        raise Stays(f"{graph.label(node)} makes several features of one channel")
    return _through(graph, node, affine)._replace(spatial=0)


def _through_maxpool(graph: Graph, node: fx.Node, affine: Affine) -> Plan:
    """Pass a max-pool whole where no scale is negative: it commutes with increasing maps."""
    if graph.returns_indices(node):
        raise Stays(f"{graph.label(node)} returns indices")
    if affine.negative:
        return _through_homogeneous(graph, node, affine)
    return _through(graph, node, affine)


def _through_homogeneous(graph: Graph, node: fx.Node, affine: Affine) -> Plan:
    """Pass |a| through f with f(k·z) = k·f(z) for k ≥ 0; sign and shift stay behind it."""
    graph.check_range(node, affine.shift)
    plan = _through(graph, node, affine.inner)
    return plan._replace(left=(*plan.left, Left(node, affine, plan.spatial)))


def _through_clamp(graph: Graph, node: fx.Node, affine: Affine, clamp: Clamp) -> Plan:
    """Pass a clamp whole, and move its bounds: they change places where a is negative."""
    scale, shift = affine
    whole = Affine(scale * clamp.slope, scale * clamp.offset + shift)
    one, other = (scale * bound + shift for bound in (clamp.low, clamp.high))
    graph.check_range(node, one, other)
    plan = _through(graph, node, whole)
    along = (-1, *[1] * plan.spatial)
    low, high = torch.minimum(one, other).view(along), torch.maximum(one, other).view(along)

    def edit(batchnorm: str) -> None:
        graph.insert_behind(node, f"{batchnorm}_clamp", ChannelClamp(low, high))
        graph.remove(node)

    said = f"bounds of {graph.label(node)} moved, one pair per channel"
    edits = (*plan.edits, edit)
    return plan._replace(edits=edits, said=(*plan.said, said), once=(*plan.once, node))


# ── Where branches meet ─────────────────────────────────────────────────────────────


def _into_sum(graph: Graph, node: fx.Node, affine: Affine) -> Plan:
    """Split over the terms: all take the scale, the first takes the shift."""
    if node.kwargs or not all(isinstance(term, fx.Node) for term in node.args):
        raise Stays(f"{graph.label(node)} is not a sum of two tensors alone")
    first, second = node.all_input_nodes if len(node.all_input_nodes) == 2 else (None, None)
    if first is None or second is None:
        raise Stays(f"{graph.label(node)} adds a tensor to itself")
    rest = Affine(affine.scale, torch.zeros_like(affine.shift))
    plans = [
        push_backwards(graph, first, node, affine),
        push_backwards(graph, second, node, rest),
    ]
    return _joined(graph, node, plans)


def _into_concatenation(graph: Graph, node: fx.Node, affine: Affine) -> Plan:
    """Split over the branches, each with its own channels."""
    parts = node.all_input_nodes
    sizes = [graph.channels(part) for part in parts]
    for part, size in zip(parts, sizes, strict=True):
        if size is None:
            raise Stays(f"how many channels {graph.label(part)} gives, an example input would tell")
    known = [size for size in sizes if size is not None]
    if sum(known) != len(affine.scale):
        raise Stays(f"{graph.label(node)} joins {sum(known)} channels, not {len(affine.scale)}")
    plans, start = [], 0
    for part, size in zip(parts, known, strict=True):
        plans.append(push_backwards(graph, part, node, affine.part(start, size)))
        start += size
    if graph.joined_axis(node) not in (1, -1 - plans[0].spatial):
        raise Stays(f"{graph.label(node)} does not join channels")
    return _joined(graph, node, plans)


def _joined(graph: Graph, node: fx.Node, plans: list[Plan]) -> Plan:
    if len({plan.spatial for plan in plans}) > 1:
        raise Stays(f"{graph.label(node)} joins tensors of different rank")
    once = [node for plan in plans for node in plan.once]
    if twice := [node for node in once if once.count(node) > 1]:
        raise Stays(f"{graph.label(twice[0])} is reached by two ways")
    edits: tuple[Edit, ...] = tuple(edit for plan in plans for edit in plan.edits)
    return Plan(
        f"({', '.join(plan.pattern for plan in plans)}) → {graph.kind(node)}",
        plans[0].spatial,
        edits,
        tuple(dict.fromkeys(said for plan in plans for said in plan.said)),
        tuple(left for plan in plans for left in plan.left),
        tuple(once),
    )
