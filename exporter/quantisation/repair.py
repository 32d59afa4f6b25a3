"""Weights and biases of a network that is quantised layer after layer, in the order it runs.

Each layer is given what it will really read, everything before it quantised and repaired, and the
float network runs beside it. Its weights are rounded for those inputs (`rounding`), and what is
left of its error on average is taken out by its bias (Nagel et al., ICCV 2019):

    b_o ← b_o + shrink · mean(y_o − ŷ_o)

Where the layer's output is one side of a residual sum, y − ŷ is the error of the sum, so that the
error of the identity branch, which has no bias of its own, is made up for as well. A mean over few
samples is partly chance: it is shrunk by its own variance v over the samples (W. James, C. Stein,
1961), shrink = max(0, 1 − v / mean²).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporter.contracts import Advance
from exporter.emulation import Step, Values
from exporter.emulation.rounding import LAYERS
from exporter.quantisation.network import BATCH, Network, fake_quantise
from exporter.quantisation.rounding import nearest, second_order, weight_scales
from exporter.steps import Steps

if TYPE_CHECKING:
    from exporter.records import Array

_MEMORY = 3 << 28  # bytes that the tensors alive at one time may take
# Costly operators whose first axis is that of the samples; others may be given any axes in front.
_BY_SAMPLE = LAYERS | {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"}


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
    """Return how many samples can be run side by side, float and quantised, in bounded memory."""
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
    pair = _Pair(network, steps, Repaired(), rounding)
    with torch.inference_mode():
        pair.run(torch.from_numpy(samples).to(network.emulator.kind), advance)
    return pair.found


@dataclass(slots=True)
class _Pair:
    """The float network and the quantised one, run side by side, node by node."""

    network: Network
    steps: Mapping[str, Steps]
    found: Repaired
    rounding: bool
    float_values: Values = field(default_factory=dict)
    values: Values = field(default_factory=dict)
    read: Values = field(default_factory=dict)

    def run(self, x: Tensor, advance: Advance) -> None:
        emulator = self.network.emulator
        self.float_values |= self.network.given(x)
        self.values |= self.network.given(x)
        last = {name: i for i, step in enumerate(emulator.steps) for name in step.reads}
        for i, step in enumerate(emulator.steps):
            self.float_values |= self._compute(step, [self._float(n) for n in step.reads])
            if step in self.network.layers:
                self.values[step.writes[0]] = self._layer(step)
                advance()
            else:
                inputs = [self._input(step, k) for k in range(len(step.reads))]
                self.values |= self._compute(step, inputs)
            for name in step.reads:
                if last[name] == i:
                    for values in (self.float_values, self.values, self.read):
                        values.pop(name, None)

    def _float(self, name: str) -> Tensor | None:
        return self.float_values.get(name, self.network.emulator.constants.get(name))

    def _input(self, step: Step, index: int) -> Tensor | None:
        """Return what a node of the quantised network reads."""
        name = step.reads[index]
        value = self.values.get(name, self.network.emulator.constants.get(name))
        if value is None or (step.name, index) not in self.network.sites:
            return value
        if name not in self.read:
            self.read[name] = fake_quantise(value, self.steps[name])
        return self.read[name]

    def _layer(self, step: Step) -> Tensor:
        name = step.reads[1]
        weights = self.network.emulator.constants[name]
        scales = self.found.scales.setdefault(name, weight_scales(weights))
        inputs = [self._input(step, index) for index in range(len(step.reads))]
        assert inputs[0] is not None
        if name not in self.found.whole:
            self.found.whole[name] = (
                second_order(
                    step,
                    weights,
                    scales,
                    inputs[0],
                    steps=self._steps(step),
                    seed=len(self.found.whole),
                )
                if self.rounding and not step.attributes.get("auto_pad", b"").startswith(b"SAME")
                else nearest(weights, scales)
            )
        inputs[1] = (self.found.whole[name].flatten(1) * scales).reshape(weights.shape)
        output = self._compute(step, inputs)[step.writes[0]]
        if len(step.reads) < 3 or not step.reads[2] or step.reads[2] in self.found.biases:
            return output
        error = self._target(step) - output
        shift = _shrunk_mean(error)
        bias = self.network.emulator.constants[step.reads[2]]
        self.found.biases[step.reads[2]] = bias + shift
        return output + shift.reshape(-1, *[1] * (output.ndim - 2))

    def _steps(self, step: Step) -> Steps | None:
        """Return the steps of a layer's input, if it is read quantised."""
        return self.steps[step.reads[0]] if (step.name, 0) in self.network.sites else None

    def _target(self, step: Step) -> Tensor:
        """Return what the layer should give: the float output, less an error it can make up for."""
        output = step.writes[0]
        target = self.float_values[output]
        readers = self.network.readers(output)
        if len(readers) != 1 or readers[0][0].op != "Add":
            return target
        add, index = readers[0]
        other = add.reads[1 - index]
        if other not in self.values:
            return target
        beside = self._input(add, 1 - index)
        assert beside is not None
        return target - (beside - self.float_values[other])

    def _compute(self, step: Step, inputs: list[Tensor | None]) -> Values:
        """Return what a node writes, the costly ones computed a few samples at a time."""
        constants = self.network.emulator.constants
        whole = [not name or name in constants for name in step.reads]
        lengths = [len(x) for x, c in zip(inputs, whole, strict=True) if x is not None and not c]
        if not lengths or min(lengths) <= BATCH or step.op not in _BY_SAMPLE:
            return self.network.emulator.compute(step, inputs)
        parts = [
            self.network.emulator.compute(
                step,
                [
                    x if x is None or c else x[start : start + BATCH]
                    for x, c in zip(inputs, whole, strict=True)
                ],
            )
            for start in range(0, min(lengths), BATCH)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _shrunk_mean(error: Tensor) -> Tensor:
    """Return each channel's mean error over samples and positions, less what chance explains."""
    by_sample = error.reshape(len(error), error.shape[1], -1).mean(dim=2)
    mean = by_sample.mean(dim=0)
    if len(by_sample) < 2:
        return mean
    variance = by_sample.var(dim=0) / len(by_sample)
    shrink = (1 - variance / mean.square().clamp_min(torch.finfo(mean.dtype).tiny)).clamp_min(0)
    return mean * shrink
