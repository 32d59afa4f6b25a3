"""One affine map per channel: where it comes from, what is left of it, and layers that take it."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from exporter.errors import GraphError

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Affine(NamedTuple):
    """``x ↦ scale·x + shift``, both (channels,) float64."""

    scale: torch.Tensor
    shift: torch.Tensor

    @property
    def inner(self) -> Affine:
        """Return what passes a positively homogeneous function: x ↦ |scale|·x."""
        return Affine(self.scale.abs(), torch.zeros_like(self.shift))

    @property
    def negative(self) -> int:
        return int((self.scale < 0).sum())

    @property
    def name(self) -> str:
        return "scale and shift" if self.shift.any() else "scale"

    def part(self, start: int, size: int) -> Affine:
        return Affine(self.scale[start : start + size], self.shift[start : start + size])


def affine_of(batchnorm: Any, name: str) -> Affine:
    """Return what a BatchNorm computes at inference. Raises `GraphError` if that means nothing."""
    mean, variance = batchnorm.running_mean, batchnorm.running_var
    if batchnorm.training:
        raise GraphError(f"{name} is in training mode", hint="call module.eval() first")
    if mean is None or variance is None:
        raise GraphError(f"{name} has no running statistics, so it cannot be folded or exported")
    gamma = torch.ones_like(mean) if batchnorm.weight is None else batchnorm.weight.detach()
    beta = torch.zeros_like(mean) if batchnorm.bias is None else batchnorm.bias.detach()
    named = {"running_mean": mean, "running_var": variance, "weight": gamma, "bias": beta}
    for kind, value in named.items():
        if bad := (~torch.isfinite(value)).nonzero().flatten().tolist():
            channel = bad[0]
            raise GraphError(f"{name}.{kind} is {value[channel].item()} in channel {channel}")
    if bad := (variance + batchnorm.eps <= 0).nonzero().flatten().tolist():
        found = variance[bad[0]].item()
        raise GraphError(f"{name}.running_var + eps is not above 0 in channel {bad[0]} ({found:g})")
    scale = gamma / torch.sqrt(variance + batchnorm.eps)
    return Affine(scale, beta - scale * mean)


# ── Layers that take a map ──────────────────────────────────────────────────────────


def out_channels(layer: Any) -> int:
    """Return how many channels, or features, a layer gives."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def scale_outputs(layer: Any, affine: Affine) -> None:
    """Let the layer give ``affine`` of what it gave: W ← a·W, b ← a·b + c, per output channel."""
    weight = layer.weight.detach()
    scale = affine.scale
    if isinstance(layer, TRANSPOSED):  # (in, out / groups, …): group g has the g-th part of a
        inputs, per_group = weight.shape[:2]
        by_group = scale.view(layer.groups, 1, per_group)
        rows = by_group.expand(-1, inputs // layer.groups, -1).reshape(inputs, per_group)
        factor = rows.view(inputs, per_group, *[1] * (weight.ndim - 2))
    else:
        factor = scale.view(-1, *[1] * (weight.ndim - 1))
    _set(layer, weight * factor, scale, affine.shift)


def scale_inputs(layer: Any, affine: Affine) -> None:
    """Let the layer read x as it read ``affine`` of x: W ← W·a, b ← b + Σ W·c."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        repeated = layer.in_features // len(affine.scale)  # of a flattened picture: H·W each
        scale, shift = (part.repeat_interleave(repeated) for part in affine)
        added = weight @ shift
        factor = scale.view(1, -1)
    elif isinstance(layer, TRANSPOSED):  # (in, out / groups, …); what it adds depends on the place
        assert not affine.shift.any()
        added = torch.zeros(layer.out_channels, dtype=weight.dtype)
        factor = affine.scale.view(-1, *[1] * (weight.ndim - 1))
    else:  # (out, in / groups, …): the outputs of group g read the g-th part of a and c
        per_group = weight.shape[1]
        rows = weight.shape[0] // layer.groups
        scale, shift = (
            part.view(layer.groups, 1, per_group).expand(-1, rows, -1).reshape(-1, per_group)
            for part in affine
        )
        added = (weight.flatten(2).sum(dim=2) * shift).sum(dim=1)
        factor = scale.view(*weight.shape[:2], *[1] * (weight.ndim - 2))
    _set(layer, weight * factor, torch.ones_like(added), added)


def _set(layer: Any, weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Give a layer new weights, and a bias of scale·b + shift where that is not nothing."""
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None or shift.any():
        bias = torch.zeros_like(shift) if layer.bias is None else layer.bias.detach()
        layer.bias = nn.Parameter(bias * scale + shift, requires_grad=False)


def misfit(layer: Any, take: Any, affine: Affine, dtype: torch.dtype) -> str | None:
    """Return why the layer's type could not hold what ``take`` would make of it, or None.

    An output whose largest weight, or bias, is below the smallest normal number has lost digits,
    which a network that goes on to normalise it would show.
    """
    made = copy.copy(layer)
    made._parameters = dict(layer._parameters)  # noqa: SLF001 - a copy that shares the old weights
    take(made, affine)
    weight = made.weight.detach().abs()
    if isinstance(layer, TRANSPOSED):
        grouped = weight.view(layer.groups, -1, *weight.shape[1:]).transpose(1, 2)
        largest = grouped.flatten(2).amax(dim=2).flatten()
    else:
        largest = weight.flatten(1).amax(dim=1)
    if made.bias is not None:
        largest = torch.maximum(largest, made.bias.detach().abs())
    limits = torch.finfo(dtype)
    if not bool((largest <= limits.max).all()):
        return f"its weights would overflow {_type(dtype)}"
    if bool(((largest < limits.tiny) & (largest > 0)).any()):
        return f"its weights would underflow {_type(dtype)}"
    return None


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def overflow(values: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Return why a type cannot hold values, or None."""
    fits = bool((values.abs() <= torch.finfo(dtype).max).all())
    return None if fits else f"{float(values.abs().max()):.2g} would overflow {_type(dtype)}"


# ── What is left of a map in a graph ────────────────────────────────────────────────


class ChannelShift(nn.Module):
    """Add one constant per channel."""

    shift: torch.Tensor

    def __init__(self, shift: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


class ChannelScale(nn.Module):
    """Multiply each channel by 1 or −1, which rounds nothing, or by 0 where γ = 0.

    (By its own scale where that is so far from 1 that only then all stays in range.)
    """

    scale: torch.Tensor

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class ChannelClamp(nn.Module):
    """Clamp each channel to bounds of its own: a ReLU6 or Hardtanh that took a BatchNorm."""

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, low: torch.Tensor, high: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.maximum(x, self.low), self.high)
