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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from exporter.emulation import Step
from exporter.emulation.operators import along
from exporter.steps import OF_ZEROS, Steps

if TYPE_CHECKING:
    from exporter.records import Array

LIMIT = 127
_COLUMNS = 6144
_DAMPING = 0.01
_TOGETHER = 1152  # weights of a row that make up for one another: 128 channels of 3×3
_BLOCK = 128  # what is owed by all behind it is one product,
_PART = 16  # and what is owed by those behind it in the block another


def weight_scales(weights: Tensor) -> Tensor:
    """Return max |w| / 127 of each output channel, (O, 1); of zeros, the largest of the others."""
    largest = weights.flatten(1).abs().amax(dim=1, keepdim=True)
    others = float(largest.max()) / LIMIT or OF_ZEROS
    return torch.where(largest > 0, largest / LIMIT, others)


def nearest(weights: Tensor, scales: Tensor) -> Tensor:
    """Return the weights (O, …) as whole numbers of their channel's scale."""
    return (weights.flatten(1) / scales).round().clamp(-LIMIT, LIMIT).reshape(weights.shape)


def second_order(
    step: Step,
    weights: Tensor,
    scales: Tensor,
    inputs: Tensor,
    *,
    steps: Steps | None = None,
    seed: int = 0,
) -> Tensor:
    """Return the weights as whole numbers of their channel's scale, rounded for these inputs.

    ``inputs`` are what the layer reads, (samples, C, …); columns are drawn evenly from them. If
    they are read in ``steps``, their second moments are sums of whole numbers, the same on every
    machine.
    """
    count = step.attributes.get("group", 1)
    flat = weights.flatten(1)
    each = len(flat) // count
    rows = flat.reshape(count, each, -1)
    by_row = scales.reshape(count, each, 1)
    zeros = torch.zeros(count, rows.shape[2], dtype=torch.float64)
    pad = 0
    if steps is not None:
        zero = torch.as_tensor(steps.zero)
        taps = weights[0, 0].numel()
        zeros[:] = zero.repeat_interleave(taps).reshape(count, -1) if zero.ndim else zero
        pad = 0 if zero.ndim else -int(zero)
        inputs = (inputs / steps.width).round_().sub_(along(zero, inputs, 1)).to(torch.int8)
    read = _columns(step, weights, inputs, count, seed, pad)
    systems = [
        _System(part, _second_moment(x, zero), by_row[group])
        for group, columns in enumerate(read)
        for part, x, zero in zip(
            torch.split(rows[group], _TOGETHER, dim=1),
            torch.split(columns, _TOGETHER),
            torch.split(zeros[group], _TOGETHER),
            strict=True,
        )
    ]
    found = torch.cat(_rounded(systems), dim=1).reshape(each, count, -1)
    return found.transpose(0, 1).reshape(weights.shape)


class _System(NamedTuple):
    """Weights (O, K) of scales (O, 1) that make up for one another, and the H (K, K) they read."""

    weights: Tensor
    second_moment: Tensor
    scales: Tensor


def _second_moment(columns: Tensor, zero: Tensor) -> Tensor:
    """Return the sum of x·xᵀ, whose scale does not matter, (K, K) float32.

    ``columns`` (K, columns) are x, or INT8 numbers q of x = q + ``zero`` (K,).
    """
    if columns.is_floating_point():
        return columns @ columns.T
    product = torch._int_mm(columns, columns.T).double()  # noqa: SLF001 # torch has no other product of whole numbers
    if zero.any():
        half = columns.sum(dim=1, dtype=torch.float64) + zero * (columns.shape[1] / 2)
        product.addr_(zero, half).addr_(half, zero)
    return product.float()


def _rounded(systems: list[_System]) -> list[Tensor]:
    """Return whole numbers, (O, K), for each system; those of one shape are rounded together."""
    found: dict[int, Tensor] = {}
    alike: dict[torch.Size, list[int]] = {}
    for index, system in enumerate(systems):
        alike.setdefault(system.weights.shape, []).append(index)
    for indices in alike.values():
        together = _round([systems[index] for index in indices])
        found.update(zip(indices, together, strict=True))
    return [found[index] for index in range(len(systems))]


def _round(systems: list[_System]) -> Tensor:
    """Return whole numbers, (systems, O, K), of systems of one shape."""
    import numpy as np

    rows, columns = systems[0].weights.shape
    factor = np.empty((len(systems), columns, columns), dtype=np.float32)
    exact = np.empty((len(systems), columns, rows), dtype=np.float32)  # in steps
    errors, owed = (np.empty_like(exact) for _ in range(2))
    orders = []
    for system, root, weights in zip(systems, factor, exact, strict=True):
        order = torch.argsort(system.second_moment.diagonal(), stable=True)
        orders.append(order)
        in_order = system.second_moment.index_select(0, order).index_select(1, order)
        torch.from_numpy(root).copy_(_root(in_order))
        torch.from_numpy(weights).copy_((system.weights / system.scales)[:, order].T)
    for last in range(exact.shape[1], 0, -_BLOCK):
        first = max(last - _BLOCK, 0)
        owed[:, first:last] = factor[:, first:last, last:] @ errors[:, last:]
        for stop in range(last, first, -_PART):
            part = slice(max(stop - _PART, first), stop)
            owed[:, part] += factor[:, part, stop:last] @ errors[:, stop:last]
            _round_one_by_one(exact[:, part], factor[:, part, part], owed[:, part], errors[:, part])
    whole = np.rint(exact - errors)
    found = torch.empty(len(systems), rows, columns)
    for index, order in enumerate(orders):
        found[index, :, order] = torch.from_numpy(whole[index].T)
    return found


def _round_one_by_one(exact: Array, factor: Array, owed: Array, errors: Array) -> None:
    """Round (systems, k, O) weights from the last to the first; ``errors`` become theirs."""
    import numpy as np

    q = np.empty_like(exact[:, 0])
    for i in range(exact.shape[1] - 1, -1, -1):
        within = factor[:, i : i + 1, i + 1 :] @ errors[:, i + 1 :]
        np.add(within[:, 0], owed[:, i], out=q)
        np.rint(np.add(q, exact[:, i], out=q), out=q)
        np.minimum(np.maximum(q, -LIMIT, out=q), LIMIT, out=q)
        np.subtract(exact[:, i], q, out=errors[:, i])


def _root(matrix: Tensor) -> Tensor:
    """Return Cᵀ of the lower C with C·Cᵀ = H, each row over its diagonal; the identity for zeros.

    H is damped until it has one.
    """
    eye = torch.eye(len(matrix))
    mean = float(matrix.diagonal().mean())
    for damping in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING) if mean > 0 else ():
        root, info = torch.linalg.cholesky_ex(matrix + damping * mean * eye)
        if not info:
            found: Tensor = root / root.diagonal()
            return found.T
    return eye


def _columns(
    step: Step, weights: Tensor, inputs: Tensor, count: int, seed: int, pad: int
) -> Iterator[Tensor]:
    """Yield for each group of channels what its weights are multiplied with, (C · k, columns)."""
    if step.op != "Conv":
        yield inputs.T
        return
    windows = _windows(step, weights, inputs, pad)
    spatial = weights.ndim - 2
    sizes = windows.shape[2 : 2 + spatial]
    positions = sizes.numel()
    each = max(1, min(positions, -(-_COLUMNS // len(inputs))))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(positions, generator=generator)[:each] for _ in inputs])
    sample = torch.arange(len(inputs))[:, None]
    places = []
    for size in reversed(sizes):
        places.append(chosen % size)
        chosen = chosen // size
    where: tuple[Any, ...] = (sample, slice(None), *reversed(places))
    picked = windows[where]  # (samples, each, C, k, …)
    picked = picked.reshape(len(inputs) * each, count, -1)
    for group in range(count):
        yield picked[:, group].T


def _windows(step: Step, weights: Tensor, inputs: Tensor, pad: int) -> Tensor:
    """Return a view (samples, C, positions …, taps …) of the inputs, padded with a number."""
    spatial = weights.ndim - 2
    pads = step.attributes.get("pads", [0] * 2 * spatial)
    sides = [(pads[i], pads[spatial + i]) for i in range(spatial)]
    view = functional.pad(inputs, [n for side in reversed(sides) for n in side], value=pad)
    strides = step.attributes.get("strides", [1] * spatial)
    dilations = step.attributes.get("dilations", [1] * spatial)
    for axis, (taps, stride, gap) in enumerate(
        zip(weights.shape[2:], strides, dilations, strict=True)
    ):
        view = view.unfold(2 + axis, gap * (taps - 1) + 1, stride)[..., ::gap]
    return view
