"""Weights and biases of a network that is quantised layer after layer, in the order it runs.

Each layer is given what it will really read, everything before it quantised and repaired. Its
weights are rounded for those inputs (`rounding`), and what is left of its error on average, beside
the float network on the same samples, is taken out by its bias (Nagel et al., ICCV 2019):

    b_o ← b_o + shrink · mean(y_o − ŷ_o)

Where the layer's output is one side of a residual sum, y − ŷ is the error of the sum, so that the
error of the identity branch, which has no bias of its own, is made up for as well. A mean over few
samples is partly chance: it is shrunk by its own variance v over the samples (W. James, C. Stein,
1961), shrink = max(0, 1 − v / mean²).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from exporter.contracts import Advance
from exporter.emulation import Step
from exporter.quantisation.network import BATCH, Network, batches, fake_quantise
from exporter.quantisation.rounding import nearest, second_order, weight_scales
from exporter.steps import Steps

if TYPE_CHECKING:
    from exporter.records import Array

_MEMORY = 3 << 28  # bytes that the tensors alive at one time may take
Parts: TypeAlias = list[
    "Tensor | None"
]  # of one tensor, by batch; a constant is each time the same


@dataclass(slots=True)
class Repaired:
    """Weights as whole numbers, their scales (O, 1), and the biases that were corrected."""

    whole: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def constants(self, *, biases: bool) -> dict[str, Tensor]:
        """Return the constants in place of the float ones, with or without the biases."""
        weights = {
            name: (whole.flatten(1) * self.scales[name]).reshape(whole.shape)
            for name, whole in self.whole.items()
        }
        return {**weights, **self.biases} if biases else weights


def rounded(network: Network) -> Repaired:
    """Return every weight rounded to the nearest step, and no bias corrected."""
    found = Repaired()
    for layer in network.layers:
        name = layer.reads[1]
        weights = network.emulator.constants[name]
        found.scales[name] = weight_scales(weights)
        found.whole[name] = nearest(weights, found.scales[name])
    return found


def affordable(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many samples can be run side by side, written and read, in bounded memory."""
    sizes = sorted((torch.Size(shape[1:]).numel() for shape in shapes.values()), reverse=True)
    return max(BATCH, _MEMORY // (2 * 4 * sum(sizes[:4])))


def repair(
    network: Network,
    steps: Mapping[str, Steps],
    samples: Array,
    *,
    rounding: bool,
    advance: Advance = lambda: None,
) -> Repaired:
    """Return the network's weights, rounded for the samples or to the nearest, and its biases.

    ``steps`` are those of the tensors that are read quantised. ``advance`` is called after every
    layer.
    """
    with torch.inference_mode():
        layerwise = _Layerwise(network, steps, rounding, _float_means(network, samples))
        layerwise.run(samples, advance)
    return layerwise.found


def _float_means(network: Network, samples: Array) -> dict[str, Tensor]:
    """Return the float network's means over positions, (samples, C) float64.

    They are of what weighted layers write, and of what is added to that.
    """
    watch = [layer.writes[0] for layer in network.layers]
    watch += [other for name in watch if (other := _beside(network, name)) is not None]
    found: dict[str, list[Tensor]] = {name: [] for name in watch}
    for x in batches(samples):
        values = network.run(x, watch=watch)
        for name, parts in found.items():
            if values[name].ndim > 1:
                parts.append(_mean(values[name]))
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def _beside(network: Network, output: str) -> str | None:
    """Return what a layer's output is added to, if nothing else reads it."""
    readers = network.readers(output)
    if len(readers) != 1 or readers[0][0].op != "Add":
        return None
    add, index = readers[0]
    other = add.reads[1 - index]
    return None if other in network.emulator.constants else other


def _mean(x: Tensor) -> Tensor:
    """Return each channel's mean over positions, (samples, C) float64."""
    return x.reshape(len(x), x.shape[1], -1).mean(dim=2, dtype=torch.float64)


@dataclass(slots=True)
class _Layerwise:
    """The quantised network, run node by node on all samples, each layer repaired on the way.

    ``means`` are the float network's.
    """

    network: Network
    steps: Mapping[str, Steps]
    rounding: bool
    means: Mapping[str, Tensor]
    found: Repaired = field(default_factory=Repaired)
    count: int = 0  # batches
    values: dict[str, Parts] = field(default_factory=dict)
    read: dict[str, Parts] = field(default_factory=dict)

    def run(self, samples: Array, advance: Advance) -> None:
        emulator = self.network.emulator
        given = [self.network.given(x.to(emulator.kind)) for x in batches(samples)]
        self.count = len(given)
        self.values |= {name: [part[name] for part in given] for name in given[0]}
        last = {name: i for i, step in enumerate(emulator.steps) for name in step.reads}
        for i, step in enumerate(emulator.steps):
            inputs = [self._input(step, index) for index in range(len(step.reads))]
            if step in self.network.layers:
                self.values[step.writes[0]] = self._layer(step, inputs)
                advance()
            else:
                self.values |= self._compute(step, inputs)
            for name in step.reads:
                if last[name] == i:
                    self.values.pop(name, None)
                    self.read.pop(name, None)

    def _input(self, step: Step, index: int) -> Parts:
        """Return what a node of the quantised network reads."""
        name = step.reads[index]
        if name not in self.values:
            return [self.network.emulator.constants.get(name)] * self.count
        if (step.name, index) not in self.network.sites:
            return self.values[name]
        if name not in self.read:
            self.read[name] = [
                None if x is None else fake_quantise(x, self.steps[name]) for x in self.values[name]
            ]
        return self.read[name]

    def _compute(self, step: Step, inputs: list[Parts]) -> dict[str, Parts]:
        """Return what a node writes."""
        found = [
            self.network.emulator.compute(step, [parts[k] for parts in inputs])
            for k in range(self.count)
        ]
        return {name: [part[name] for part in found] for name in found[0]}

    def _layer(self, step: Step, inputs: list[Parts]) -> Parts:
        """Return what a layer writes with its weights rounded and its bias corrected."""
        name = step.reads[1]
        weights = self.network.emulator.constants[name]
        scales = self.found.scales.setdefault(name, weight_scales(weights))
        if name not in self.found.whole:
            self.found.whole[name] = self._rounded(step, weights, scales, inputs[0])
        inputs[1] = [(self.found.whole[name].flatten(1) * scales).reshape(weights.shape)]
        inputs[1] *= self.count
        output = self._compute(step, inputs)[step.writes[0]]
        if len(step.reads) < 3 or not step.reads[2] or step.reads[2] in self.found.biases:
            return output
        shift = _shrunk_mean(self._target(step) - _means(output)).to(weights.dtype)
        bias = self.network.emulator.constants[step.reads[2]]
        self.found.biases[step.reads[2]] = bias + shift
        return [x if x is None else x + shift.reshape(-1, *[1] * (x.ndim - 2)) for x in output]

    def _rounded(self, step: Step, weights: Tensor, scales: Tensor, inputs: Parts) -> Tensor:
        if not self.rounding or step.attributes.get("auto_pad", b"").startswith(b"SAME"):
            return nearest(weights, scales)
        return second_order(
            *(step, weights, scales),
            torch.cat([x for x in inputs if x is not None]),
            steps=self.steps[step.reads[0]] if (step.name, 0) in self.network.sites else None,
            seed=len(self.found.whole),
        )

    def _target(self, step: Step) -> Tensor:
        """Return the means that a layer should have: float, less an error it can make up for."""
        output = step.writes[0]
        target, other = self.means[output], _beside(self.network, output)
        if other is None or other not in self.means or other not in self.values:
            return target
        add, index = self.network.readers(output)[0]
        beside = _means(self._input(add, 1 - index))
        wanted = self.means[other]
        return target - (beside - wanted) if len(beside) == len(wanted) == len(target) else target


def _means(parts: Parts) -> Tensor:
    return torch.cat([_mean(x) for x in parts if x is not None])


def _shrunk_mean(error: Tensor) -> Tensor:
    """Return each channel's mean error over samples and positions, less what chance explains."""
    by_sample = error.reshape(len(error), error.shape[1], -1).mean(dim=2)
    mean = by_sample.mean(dim=0)
    if len(by_sample) < 2:
        return mean
    variance = by_sample.var(dim=0) / len(by_sample)
    shrink = (1 - variance / mean.square().clamp_min(torch.finfo(mean.dtype).tiny)).clamp_min(0)
    return mean * shrink
