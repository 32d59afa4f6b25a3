"""Weights rounded to second order: the error of one is made up for by those not rounded yet.

For a layer y = W·x the rounding that is nearest in its weights is not nearest in its outputs. With
H = E[x·xᵀ] over what the layer really reads (quantised), column after column is rounded, and its
error is taken out of the columns still to come along the inverse of H (E. Frantar et al., "GPTQ",
ICLR 2023, after "Optimal Brain Surgeon"):

    e_i = (w_i − q_i) / U_ii        w_j ← w_j − e_i · U_ij  for j > i        Uᵀ·U = H⁻¹

in the order of decreasing H_ii, with 1 % of H's mean diagonal added to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from exporter.emulation import Step

LIMIT = 127
_COLUMNS = 12288
_DAMPING = 0.01
_BLOCK = 128


def weight_scales(weights: Tensor) -> Tensor:
    """Return max |w| / 127 of each output channel, (O, 1); 1 for a channel of zeros."""
    largest = weights.flatten(1).abs().amax(dim=1, keepdim=True)
    return torch.where(largest > 0, largest / LIMIT, 1.0)


def nearest(weights: Tensor, scales: Tensor) -> Tensor:
    """Return the weights (O, …) as whole numbers of their channel's scale."""
    return (weights.flatten(1) / scales).round().clamp(-LIMIT, LIMIT).reshape(weights.shape)


def second_order(step: Step, weights: Tensor, scales: Tensor, inputs: Tensor, seed: int) -> Tensor:
    """Return the weights as whole numbers of their channel's scale, rounded for these inputs.

    ``inputs`` are what the layer reads, (samples, C, …); columns are drawn evenly from them.
    """
    count = step.attributes.get("group", 1)
    flat = weights.flatten(1)
    each = len(flat) // count
    rows = flat.reshape(count, each, -1)
    steps = scales.reshape(count, each, 1)
    parts = [
        _round(rows[group], columns @ columns.T / columns.shape[1], steps[group])
        for group, columns in enumerate(_columns(step, weights, inputs, count, seed))
    ]
    return torch.cat(parts).reshape(weights.shape)


def _round(weights: Tensor, second_moment: Tensor, scales: Tensor) -> Tensor:
    diagonal = second_moment.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    upper = _inverse_root(second_moment[order][:, order])
    if upper is None:
        return nearest(weights, scales)
    left = weights[:, order].clone()
    rounded = torch.empty_like(left)
    for start in range(0, left.shape[1], _BLOCK):
        stop = min(start + _BLOCK, left.shape[1])
        block, errors = left[:, start:stop], torch.empty_like(left[:, start:stop])
        inner = upper[start:stop, start:stop]
        for i in range(stop - start):
            q = (block[:, i : i + 1] / scales).round().clamp(-LIMIT, LIMIT)
            rounded[:, start + i : start + i + 1] = q
            error = (block[:, i : i + 1] - q * scales) / inner[i, i]
            block[:, i:] -= error @ inner[i : i + 1, i:]
            errors[:, i : i + 1] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return rounded[:, torch.argsort(order)]


def _inverse_root(matrix: Tensor) -> Tensor | None:
    """Return the upper U with Uᵀ·U = H⁻¹, H damped until it has one; None for a zero matrix."""
    mean = float(matrix.diagonal().mean())
    if not mean > 0:
        return None
    eye = torch.eye(len(matrix))
    for damping in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):
        root, info = torch.linalg.cholesky_ex(matrix + damping * mean * eye)
        if not info:
            inverse = torch.cholesky_inverse(root)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if not info:
                found: Tensor = upper
                return found
    return None


def _columns(
    step: Step, weights: Tensor, inputs: Tensor, count: int, seed: int
) -> Iterator[Tensor]:
    """Yield for each group of channels what its weights are multiplied with, (C · k, columns)."""
    if step.op != "Conv":
        yield inputs.T
        return
    windows = _windows(step, weights, inputs)
    spatial = weights.ndim - 2
    sizes = windows.shape[2 : 2 + spatial]
    positions = sizes.numel()
    each = max(1, min(positions, -(-_COLUMNS // len(inputs))))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(positions, generator=generator)[:each] for _ in inputs])
    sample = torch.arange(len(inputs))[:, None]
    where: tuple[Any, ...] = (sample, slice(None), *torch.unravel_index(chosen, sizes))
    picked = windows[where]  # (samples, each, C, k, …)
    picked = picked.reshape(len(inputs) * each, count, -1)
    for group in range(count):
        yield picked[:, group].T


def _windows(step: Step, weights: Tensor, inputs: Tensor) -> Tensor:
    """Return a view (samples, C, positions …, taps …) of the padded inputs."""
    spatial = weights.ndim - 2
    pads = step.attributes.get("pads", [0] * 2 * spatial)
    sides = [(pads[i], pads[spatial + i]) for i in range(spatial)]
    view = functional.pad(inputs, [n for side in reversed(sides) for n in side])
    strides = step.attributes.get("strides", [1] * spatial)
    dilations = step.attributes.get("dilations", [1] * spatial)
    for axis, (taps, stride, gap) in enumerate(
        zip(weights.shape[2:], strides, dilations, strict=True)
    ):
        view = view.unfold(2 + axis, gap * (taps - 1) + 1, stride)[..., ::gap]
    return view
