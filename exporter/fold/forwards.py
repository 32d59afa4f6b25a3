"""Push an affine map forwards into the layers that read it (see the package for the formulas)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from exporter.fold.affine import Affine, scale_inputs
from exporter.fold.graph import ADAPTIVE, Graph, Kinds, Plan, Stays

READERS = Kinds((nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
CENTRED = 0.5  # means in standard deviations up to which float32 loses nothing to speak of


def check_centred(batchnorm: Any) -> None:
    """Raise `Stays` where means are large beside the deviations.

    Σ W·a·x is then large and all but cancelled by Σ W·c: exact, but float32 would lose digits that
    subtracting the mean first keeps.
    """
    deviations = torch.sqrt(batchnorm.running_var + batchnorm.eps)
    largest = float((batchnorm.running_mean.abs() / deviations).max())
    if largest > CENTRED:
        raise Stays(f"a mean of {largest:.1f} deviations behind it would cost float32 its digits")


def push_forwards(graph: Graph, node: fx.Node, affine: Affine) -> Plan:
    """Plan how all that reads ``node`` comes to read the map's input as it read its output.

    Raises `Stays` with the reason if something behind cannot take it.
    """
    if not node.users:
        raise Stays("nothing reads it")
    plans = [_into(graph, user, node, affine, node, flat=False) for user in node.users]
    patterns = [plan.pattern for plan in plans]
    return _together(patterns[0] if len(patterns) == 1 else f"({', '.join(patterns)})", plans)


def _together(pattern: str, plans: list[Plan]) -> Plan:
    edits = tuple(edit for plan in plans for edit in plan.edits)
    return Plan(pattern, 0, edits, tuple(said for plan in plans for said in plan.said))


def _into(
    graph: Graph,
    node: fx.Node,
    source: fx.Node,
    affine: Affine,
    batchnorm: fx.Node,
    *,
    flat: bool,
) -> Plan:
    graph.check_hooks(node)
    if graph.is_a(node, READERS):
        graph.check_unchanged(batchnorm, node)  # it will be read here, and not there
        return _into_layer(graph, node, source, affine, flat=flat)
    if graph.is_a(node, ADAPTIVE):
        kind = type(graph.module(batchnorm))
        graph.check_pool(node, {nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}.get(kind))
    passes = graph.does_nothing(node) or graph.is_a(node, ADAPTIVE)
    if passes or graph.flattens(node):
        flat = flat or graph.flattens(node)
        if not node.users:
            raise Stays(f"{graph.label(node)} is read by nothing")
        plans = [_into(graph, user, node, affine, batchnorm, flat=flat) for user in node.users]
        return _together(f"{graph.kind(node)} → {plans[0].pattern}", plans)
    what = "the output" if node.op == "output" else graph.kind(node)
    raise Stays(f"no layer behind it can take it: {what} comes first")


def _into_layer(
    graph: Graph, node: fx.Node, source: fx.Node, affine: Affine, *, flat: bool
) -> Plan:
    name, layer = str(node.target), graph.module(node)
    graph.check_own(node)
    if isinstance(layer, nn.Linear):
        if not flat and not graph.is_matrix(source):
            raise Stays(f"{name} may read more than one axis behind the samples")
        if layer.in_features % len(affine.scale):
            raise Stays(f"{name} does not read {len(affine.scale)} channels")
    else:
        if layer.in_channels != len(affine.scale):
            raise Stays(f"{name} does not read {len(affine.scale)} channels")
        padded = layer.padding != "valid" and (layer.padding == "same" or any(layer.padding))
        if padded and layer.padding_mode == "zeros" and affine.shift.any():
            raise Stays(f"{name} pads with zeros, which the shift would have to reach")

    def edit(_: str) -> None:
        scale_inputs(layer, affine)

    return Plan(graph.kind(node), 0, (edit,), (f"{affine.name} forwards into {name}",))
