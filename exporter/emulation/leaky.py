"""Operators that let gradients leak where theirs is zero, for a search that climbs them.

Values are exact. Gradients are those of a neighbour that never goes flat: a clamp passes a tenth of
the gradient outside of its bounds, a maximum a tenth to the smaller side. So a branch that is off
still pulls the input towards where it is on; and two graphs with the same branches pull alike, so
that what is left is the pull of what only one of them has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from exporter.emulation.grids import LIMITS
from exporter.emulation.operators import OPERATORS, Attributes, Operator, along

LEAK = 0.1


def _as(value: Tensor, slope_of: Tensor) -> Tensor:
    """Return ``value``, with the gradient of ``slope_of``."""
    return slope_of + (value - slope_of).detach()


def _clamped(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    inside = torch.minimum(torch.maximum(x, low), high)
    return _as(inside, inside + LEAK * (x - inside))


def _relu(_: Attributes, x: Tensor) -> Tensor:
    return _as(torch.relu(x), torch.where(x > 0, x, LEAK * x))


def _clip(a: Attributes, x: Tensor, *bounds: Tensor | None) -> Tensor:
    value = OPERATORS["Clip"](a, x, *bounds)
    assert isinstance(value, Tensor)
    return _as(value, value + LEAK * (x - value))


def _hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    line = float(a.get("alpha", 0.2)) * x + float(a.get("beta", 0.5))
    return _clamped(line, torch.zeros_like(line), torch.ones_like(line))


def _extreme(pick: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def pair(x: Tensor, y: Tensor) -> Tensor:
        value = pick(x, y)
        return _as(value, (1 - LEAK) * value + LEAK * (x + y - value))

    return lambda _, *inputs: reduce(pair, inputs)


def _quantize(a: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    value = OPERATORS["QuantizeLinear"](a, x, scale, zero)
    assert isinstance(value, Tensor)
    axis = a.get("axis", 1)
    shift = 0.0 if zero is None else along(zero, x, axis)
    line = x / along(scale, x, axis) + shift
    low, high = (torch.full_like(line, float(bound)) for bound in LIMITS[a["to"]])
    return _as(value, _clamped(line, low, high))


LEAKY: dict[str, Operator] = {
    **OPERATORS,
    "Clip": _clip,
    "HardSigmoid": _hard_sigmoid,
    "Max": _extreme(torch.maximum),
    "Min": _extreme(torch.minimum),
    "QuantizeLinear": _quantize,
    "Relu": _relu,
}
