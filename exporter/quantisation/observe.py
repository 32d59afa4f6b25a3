"""What an error in each of the network's tensors would cost at its outputs.

Sensitivity: an error e in a tensor moves the outputs by J·e to first order, and for signs r drawn
at random E[(rᵀJe)²] = ‖Je‖². So with g = Jᵀr, one backward pass,

    ‖J·e‖² ≈ (Σ g·e)²                for an error that is known,
           ≈ Σ_c Σ g²_c · E[e²_c]     for one that is independent from value to value (rounding)

(M. Hutchinson, "A stochastic estimator of the trace", 1989). Values that are exactly 0 are stored
exactly, so they are left out of the second. A tensor counts where it is read quantised, and there
alone: the identity branch of a residual sum that is read in float passes no error on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from exporter.contracts import Advance, Progress, Statistics, silent
from exporter.emulation import Step, Values
from exporter.quantisation.network import Network, batches, fake_quantise, is_cut_off, parts
from exporter.records import Quantised
from exporter.steps import Steps, reach

if TYPE_CHECKING:
    from exporter.records import Array

_SEED = 0


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of each tensor that is read quantised, by its name.

    ``low`` and ``high`` (folds, C) are the ranges of each channel, from all ``samples``, ``power``
    (C,) its mean square, and ``gain`` (C,) is Σ g², the mean over samples; ``gain_behind`` (O,) is
    that of what each weighted layer writes. ``shapes`` are every tensor's.
    """

    samples: int
    low: Mapping[str, Tensor]
    high: Mapping[str, Tensor]
    power: Mapping[str, Tensor]
    gain: Mapping[str, Tensor]
    gain_behind: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]


def observe(
    network: Network, statistics: Statistics, samples: Array, *, progress: Progress = silent
) -> Observed:
    """Run the network backwards from each sample; the ranges are those of ``statistics``."""
    with progress("int8: observe what an error costs", parts(len(samples))) as advance:
        gain, behind = _gains(network, samples, advance)
    seen = {name: statistics[name] for name in network.tensors}
    return Observed(
        samples=next(iter(statistics.values())).samples,
        low={name: torch.from_numpy(tensor.fold_low) for name, tensor in seen.items()},
        high={name: torch.from_numpy(tensor.fold_high) for name, tensor in seen.items()},
        power={name: torch.from_numpy(tensor.channel_power) for name, tensor in seen.items()},
        gain=gain,
        gain_behind=behind,
        shapes=_shapes(network, samples[:1]),
    )


def peak(network: Network, tensor: str, low: Tensor, high: Tensor) -> Tensor:
    """Return how far each channel of a tensor goes from the middle of its steps, (C,)."""
    return torch.from_numpy(reach(network.kind(tensor), low.numpy(), high.numpy()))


def measured_error(
    network: Network,
    samples: Array,
    candidates: Mapping[str, Sequence[Steps]],
    *,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Return what each tensor's candidates for its steps cost alone: ‖J·e‖² by sample.

    The result is (candidates, samples) float64, to first order.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in candidates}
    count = parts(len(samples))
    with progress("int8: measure every tensor's thresholds", count) as advance:
        for probe in _probe(network, samples):
            with torch.inference_mode():
                for name, candidate in candidates.items():
                    rows = []
                    for steps in candidate:
                        value = probe.values[name]
                        error = fake_quantise(value, steps).sub_(value)
                        cost = error.mul_(probe.read[name]).flatten(1).sum(dim=1)
                        rows.append(cost.double().square())
                    found[name].append(torch.stack(rows))
            advance()
    return {name: torch.cat(rows, dim=1) for name, rows in found.items()}


def describe(
    network: Network,
    samples: Array,
    steps: Mapping[str, Steps],
    weights: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    *,
    statistics: Statistics,
    progress: Progress = silent,
) -> tuple[Quantised, ...]:
    """Return what each quantised tensor and each layer's weights came to, on the samples.

    ``weights`` are the dequantised ones and ``scales`` theirs, by the weights' name;
    ``statistics`` know the dead channels, from all calibration samples.
    """
    read = {name: _Seen() for name in network.tensors}
    written = {layer.writes[0]: _Seen() for layer in network.layers}
    with progress("int8: describe every tensor", parts(len(samples))) as advance:
        for probe in _probe(network, samples):
            with torch.inference_mode():
                for name, stored in steps.items():
                    value = probe.values[name]
                    as_read, beyond = fake_quantise(value, stored), is_cut_off(value, stored)
                    read[name].add(value, as_read, probe.read[name], beyond)
                for layer in network.layers:
                    name, constant = layer.writes[0], layer.reads[1]
                    off = weights[constant] - network.emulator.constants[constant]
                    error = _product(network, layer, probe.values[layer.reads[0]], off)
                    value = probe.values[name]
                    written[name].add(value, value + error, probe.written[name])
            advance()
    total = sum(part.cost for part in (*read.values(), *written.values())) or 1.0
    return (
        *(
            Quantised(
                name=name,
                layers=tuple(dict.fromkeys(n for (n, _), t in network.sites.items() if t == name)),
                is_weights=False,
                largest=read[name].largest,
                scale=float(steps[name].width),
                saturated=read[name].saturated / max(read[name].values, 1),
                dead=len(statistics[name].dead_channels),
                sqnr_db=decibels(read[name].power, read[name].error),
                share=read[name].cost / total,
            )
            for name in network.tensors
        ),
        *(
            _weights(network, layer, weights, scales, written[layer.writes[0]].cost / total)
            for layer in network.layers
        ),
    )


class _Seen:
    """Sums over batches of one tensor, float and quantised."""

    def __init__(self) -> None:
        self.largest = self.power = self.error = self.cost = 0.0
        self.saturated = self.values = 0

    def add(self, value: Tensor, read: Tensor, grad: Tensor, beyond: Tensor | None = None) -> None:
        error = read - value
        self.largest = max(self.largest, float(value.abs().max()))
        self.power += float(value.double().square().sum())
        self.error += float(error.double().square().sum())
        self.cost += float((error * grad).flatten(1).sum(dim=1).double().square().sum())
        self.values += value.numel()
        self.saturated += 0 if beyond is None else int(beyond.sum())


def _product(network: Network, layer: Step, x: Tensor, weights: Tensor) -> Tensor:
    """Return what a layer makes of x with other weights and no bias."""
    bias = len(layer.reads) > 2 and bool(layer.reads[2])
    zeros = torch.zeros_like(network.emulator.constants[layer.reads[2]]) if bias else None
    return network.emulator.compute(layer, [x, weights, zeros])[layer.writes[0]]


def _weights(
    network: Network,
    layer: Step,
    weights: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    share: float,
) -> Quantised:
    name = layer.reads[1]
    exact = network.emulator.constants[name].double()
    off = weights[name].double() - exact
    return Quantised(
        name=name,
        layers=(layer.name,),
        is_weights=True,
        largest=float(exact.abs().max()),
        scale=float(scales[name].max()),
        saturated=0.0,
        dead=int((exact.flatten(1).abs().amax(dim=1) == 0).sum()),
        sqnr_db=decibels(float(exact.square().sum()), float(off.square().sum())),
        share=share,
    )


def decibels(power: float, error: float) -> float | None:
    """Return 10 log₁₀ of their ratio, None where there is no error."""
    return 10 * math.log10(power / error) if power and error else None


def _gains(
    network: Network, samples: Array, advance: Advance
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    read: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    count = 0
    for probe in _probe(network, samples):
        for name, grad in probe.read.items():
            stored = _by_channel(probe.values[name]) != 0
            _add(read, name, _by_channel(grad.square()) * stored)
        for name, grad in probe.written.items():
            _add(written, name, _by_channel(grad.square()))
        count += probe.samples
        advance()
    return (
        {name: total / count for name, total in read.items()},
        {name: total / count for name, total in written.items()},
    )


def _add(totals: dict[str, Tensor], name: str, each: Tensor) -> None:
    part = each.sum(dim=(0, 2)).double()
    totals[name] = totals[name] + part if name in totals else part


class _Probe(NamedTuple):
    """Tensors of one batch, and the gradients of random signs of its outputs.

    ``read`` are those of what is read quantised, where it is read so, ``written`` those of what
    each weighted layer writes, wherever it is read.
    """

    samples: int
    values: dict[str, Tensor]
    read: dict[str, Tensor]
    written: dict[str, Tensor]


def _probe(network: Network, samples: Array) -> Iterator[_Probe]:
    """Yield every batch, with signs drawn for each sample."""
    generator = torch.Generator().manual_seed(_SEED)
    outputs = [layer.writes[0] for layer in network.layers]
    inputs = [layer.reads[0] for layer in network.layers]
    watch = list(dict.fromkeys([*network.tensors, *outputs, *inputs]))
    for x in batches(samples):
        leaves: Values = {}
        with torch.enable_grad():
            found = network.run(x, offsets=leaves, watch=watch)
            y = network.joined(found)
        values = {name: found[name].detach() for name in watch}
        wanted = [*leaves.values(), *(found[name] for name in outputs)]
        signs = torch.randint(0, 2, y.shape, generator=generator) * 2.0 - 1
        grads = torch.autograd.grad((y * signs).sum(), wanted)
        read = dict(zip(leaves, grads, strict=False))
        written = dict(zip(outputs, grads[len(leaves) :], strict=True))
        yield _Probe(len(x), values, read, written)


def _by_channel(x: Tensor) -> Tensor:
    """Return (samples, channels, positions)."""
    return x.reshape(x.shape[0], x.shape[1], -1)


def _shapes(network: Network, samples: Array) -> dict[str, tuple[int, ...]]:
    every = [name for step in network.emulator.steps for name in step.writes if name]
    with torch.inference_mode():
        found = network.run(torch.from_numpy(samples), watch=[*network.inputs, *every])
    return {name: tuple(value.shape) for name, value in found.items()}
