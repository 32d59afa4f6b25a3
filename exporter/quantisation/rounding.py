"""Weights rounded to second order: the error of one is made up for by those not rounded yet.

For a layer y = W·x the rounding that is nearest in its weights is not nearest in its outputs, whose
squared error is e·H·eᵀ for a row's error e = w − q and H = E[x·xᵀ] over what the layer really reads
(quantised). With H = C·Cᵀ, C lower triangular, that is ‖e·C‖², whose last component is e_K·C_KK
alone; so the last weight is rounded to the nearest, and each one before it to make up for those
behind it:

    q_i = rint((w_i + Σ_{j > i} e_j · C_ji / C_ii) / s)

Those with the largest H_ii come last and are rounded first; 1 % of H's mean diagonal is added to
it. This is GPTQ (E. Frantar et al., ICLR 2023) written as L. Babai's nearest plane (1986), which
gives the same roundings without the inverse of H (J. Chen et al., "The Geometry of LLM
Quantization: GPTQ as Babai's Nearest Plane Algorithm", 2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from exporter.emulation import Step

LIMIT = 127
_COLUMNS = 6144
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
    order = torch.argsort(second_moment.diagonal(), stable=True)
    root = _root(second_moment[order][:, order])
    if root is None:
        return nearest(weights, scales)
    exact = weights[:, order]
    rounded, errors = torch.empty_like(exact), torch.zeros_like(exact)
    for stop in range(exact.shape[1], 0, -_BLOCK):
        start = max(stop - _BLOCK, 0)
        behind = errors[:, stop:] @ root[stop:, start:stop]
        inner = root[start:stop, start:stop]
        block = errors[:, start:stop]
        for i in reversed(range(stop - start)):
            w = exact[:, start + i : start + i + 1]
            owed = behind[:, i : i + 1] + block[:, i + 1 :] @ inner[i + 1 :, i : i + 1]
            q = ((w + owed / inner[i, i]) / scales).round().clamp(-LIMIT, LIMIT)
            rounded[:, start + i : start + i + 1] = q
            block[:, i : i + 1] = w - q * scales
    return rounded[:, torch.argsort(order)]


def _root(matrix: Tensor) -> Tensor | None:
    """Return the lower C with C·Cᵀ = H, H damped until it has one; None for a zero matrix."""
    mean = float(matrix.diagonal().mean())
    if not mean > 0:
        return None
    eye = torch.eye(len(matrix))
    for damping in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):
        root, info = torch.linalg.cholesky_ex(matrix + damping * mean * eye)
        if not info:
            found: Tensor = root
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
