"""One affine map per channel: where it comes from, what is left of it, and layers that take it."""

from __future__ import annotations

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
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach()
    layer.weight = nn.Parameter(weight * factor, requires_grad=False)
    layer.bias = nn.Parameter(bias * scale + affine.shift, requires_grad=False)


def scale_inputs(layer: Any, affine: Affine) -> None:
    """Let the layer read x as it read ``affine`` of x: W ← W·a, b ← b + Σ W·c."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        repeated = layer.in_features // len(affine.scale)  # of a flattened picture: H·W each
        scale, shift = (part.repeat_interleave(repeated) for part in affine)
        added = weight @ shift
        factor = scale.view(1, -1)
    else:  # (out, in / groups, …): the outputs of group g read the g-th part of a and c
        per_group = weight.shape[1]
        rows = weight.shape[0] // layer.groups
        scale, shift = (
            part.view(layer.groups, 1, per_group).expand(-1, rows, -1).reshape(-1, per_group)
            for part in affine
        )
        added = (weight.flatten(2).sum(dim=2) * shift).sum(dim=1)
        factor = scale.view(*weight.shape[:2], *[1] * (weight.ndim - 2))
    bias = torch.zeros_like(added) if layer.bias is None else layer.bias.detach()
    layer.weight = nn.Parameter(weight * factor, requires_grad=False)
    layer.bias = nn.Parameter(bias + added, requires_grad=False)


# ── What is left of a map in a graph ────────────────────────────────────────────────


class ChannelShift(nn.Module):
    """Add one constant per channel: what is left of a BatchNorm behind a ReLU."""

    shift: torch.Tensor

    def __init__(self, shift: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


class ChannelSign(nn.Module):
    """Multiply each channel by 1 or −1, which rounds nothing."""

    sign: torch.Tensor

    def __init__(self, sign: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("sign", sign)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.sign


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
