"""What lets an affine map per channel pass, in either direction."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from exporter.fold.affine import ChannelClamp
from exporter.fold.graph import Graph
from exporter.fold.kinds import ADAPTIVE, AVGPOOL, RESIZE


def passes_maps(graph: Graph, node: fx.Node) -> bool:
    """Return whether every value a node gives is a mean of values of its channel."""
    if graph.does_nothing(node) or graph.is_a(node, ADAPTIVE) or graph.is_a(node, RESIZE):
        return True
    return graph.is_a(node, AVGPOOL) and _averages_whole(graph, node)


def _averages_whole(graph: Graph, node: fx.Node) -> bool:
    """Return whether an average pool never averages a padded zero, so that weights sum to 1."""
    pool = graph.module(node)
    if pool is None:  # a function: all but the picture and the window may say otherwise
        return len(node.args) <= 3 and set(node.kwargs) <= {"input", "kernel_size", "stride"}
    padding = pool.padding if isinstance(pool.padding, tuple) else (pool.padding,)
    own_divisor = getattr(pool, "divisor_override", None) is not None
    whole = not any(padding) and not pool.ceil_mode
    return not own_divisor and (whole or not pool.count_include_pad)


def spatial_behind_mean(node: fx.Node, spatial: int) -> int | None:
    """Return how many axes a mean leaves behind the channels; None if it is over others too."""
    named = node.kwargs.get("dim", node.kwargs.get("axis"))
    over = node.args[1] if len(node.args) > 1 else named
    axes = [over] if isinstance(over, int) else over
    if not isinstance(axes, list | tuple) or not all(isinstance(axis, int) for axis in axes):
        return None
    kept = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    places = {axis % (spatial + 2) for axis in axes if isinstance(axis, int)}
    if not places or places & {0, 1} or not isinstance(kept, bool):
        return None
    return spatial if kept else spatial - len(places)


class Clamp(NamedTuple):
    """``z ↦ clamp(slope·z + offset, low, high)``."""

    low: float | torch.Tensor
    high: float | torch.Tensor
    slope: float = 1.0
    offset: float = 0.0


def bounds_of(graph: Graph, node: fx.Node) -> Clamp | None:
    """Return what a node clamps to, or None if it clamps nothing."""
    module: Any = graph.module(node)
    if type(module) in (nn.Hardtanh, nn.ReLU6):
        if not (math.isfinite(module.min_val) and math.isfinite(module.max_val)):
            return None
        return Clamp(module.min_val, module.max_val)
    if type(module) is nn.Hardsigmoid or node.target is functional.hardsigmoid:
        return Clamp(0.0, 1.0, 1 / 6, 0.5)
    if isinstance(module, ChannelClamp):
        return Clamp(module.low.flatten(), module.high.flatten())
    if node.target is functional.relu6:
        return Clamp(0.0, 6.0)
    return None
