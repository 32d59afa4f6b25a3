"""Normalisation by what a tensor itself holds, and the reductions that squares and products go by.

    InstanceNormalization   of each channel of each sample, over its plane
    GroupNormalization      of groups of channels; since opset 21 with a factor for each channel
    LayerNormalization      over the axes from ``axis`` on
    LRN                     by the squares of the channels around (A. Krizhevsky et al., 2012)

All but LRN are (x − μ) / √(σ² + ε) · γ + β, with μ and σ² the mean and variance of what is
normalised together, of n values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

Attributes: TypeAlias = Mapping[str, Any]


def normalised(op: str, a: Attributes, x: Tensor) -> Tensor:
    """Return x with what is normalised together along a last axis, (…, n)."""
    if op == "LayerNormalization":
        return x.flatten(a.get("axis", -1) % x.ndim)
    count = a["num_groups"] if op == "GroupNormalization" else x.shape[1]
    return x.reshape(len(x), count, -1)


def factor(op: str, a: Attributes, x: Tensor, part: Tensor) -> Tensor:
    """Return a scale or bias of a normalisation, to broadcast with x."""
    if op == "LayerNormalization":
        return part
    if op == "GroupNormalization" and part.numel() == a["num_groups"] != x.shape[1]:
        part = part.repeat_interleave(x.shape[1] // a["num_groups"])
    return part.reshape(-1, *[1] * (x.ndim - 2))


def moments(op: str, a: Attributes, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return μ and 1 / √(σ² + ε), as x is shaped."""
    together = normalised(op, a, x)
    mean = together.mean(-1, keepdim=True)
    spread = (together - mean).square().mean(-1, keepdim=True)
    found = (mean, (spread + a.get("epsilon", 1e-5)).rsqrt())
    first, second = (part.expand_as(together).reshape(x.shape) for part in found)
    return first, second


def normalisation(op: str) -> Callable[..., Tensor]:
    """Return the operator of that name."""

    def run(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        mean, inverse = moments(op, a, x)
        y = (x - mean) * inverse * factor(op, a, x, scale)
        return y if bias is None else y + factor(op, a, x, bias)

    return run


def lrn(a: Attributes, x: Tensor) -> Tensor:
    """Return x / (bias + α/size · Σ x²)^β, the sum over ``size`` channels around each."""
    size, channels = a["size"], x.shape[1]
    begin, end = (min(n, channels) for n in ((size - 1) // 2, size // 2))
    squares = functional.pad((x * x).transpose(1, -1), (begin, end))
    total = squares.unfold(-1, begin + 1 + end, 1).sum(-1).transpose(1, -1)
    scale: Tensor = float(a.get("bias", 1.0)) + float(a.get("alpha", 1e-4)) / size * total
    return x / scale ** float(a.get("beta", 0.75))


# ── Reductions, with the arguments that PyTorch's have ──────────────────────────────


def product(x: Tensor, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    """Return the product of all values."""
    for axis in sorted((axis % x.ndim for axis in dim), reverse=True):
        x = x.prod(dim=axis, keepdim=keepdim)
    return x


def sum_of_magnitudes(x: Tensor, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    """Return Σ |x|."""
    return x.abs().sum(dim=dim, keepdim=keepdim)


def sum_of_squares(x: Tensor, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    """Return Σ x²."""
    return x.square().sum(dim=dim, keepdim=keepdim)


def root_of_squares(x: Tensor, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    """Return √Σ x²."""
    found: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim)
    return found


def log_of_sum(x: Tensor, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    """Return ln Σ x."""
    return x.sum(dim=dim, keepdim=keepdim).log()
