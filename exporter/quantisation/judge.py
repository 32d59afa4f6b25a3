"""Is one way of quantising closer than another? Judged on samples that neither was made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporter.quantisation.network import Network
from exporter.quantisation.repair import rounded
from exporter.records import Repair
from exporter.steps import Steps

if TYPE_CHECKING:
    from exporter.records import Array

_GAIN = 0.1  # dB
CUT_GAIN = 1.0  # dB, since what is cut off a range is rare and dear on samples not seen here
_TENSOR_GAIN = 0.5  # dB
_SOUND = 32  # samples from which the sum decides


class Judge:
    """Compares with the float network's outputs, (samples, outputs), and notes what steps bring."""

    def __init__(self, samples: Array, outputs: Tensor) -> None:
        self.samples = samples
        self.repairs: list[Repair] = []
        self._reference = outputs
        self._power = outputs.square().sum()
        self._before = torch.empty(0)

    def first(self, network: Network, steps: Mapping[str, Steps]) -> None:
        """Judge the plain form: largest magnitudes, weights rounded to the nearest step."""
        self._before = self.errors(network, steps, nearest_weights(network))
        self.repairs.append(Repair("max", None, True, self.decibels(self._before)))

    def errors(
        self, network: Network, steps: Mapping[str, Steps], weights: Mapping[str, Tensor]
    ) -> Tensor:
        """Return ‖ŷ − y‖² of each sample."""
        outputs = network.outputs(self.samples, steps, weights)
        return (outputs - self._reference).square().sum(dim=1)

    def takes(self, name: str, detail: str | None, errors: Tensor, *, least: float = _GAIN) -> bool:
        """Note a step, and return whether it is better than the one before, by so many dB."""
        kept = is_better(errors, self._before, least)
        self.repairs.append(Repair(name, detail, kept, self.decibels(errors)))
        if kept:
            self._before = errors
        return kept

    def skips(self, name: str, detail: str) -> None:
        """Note a step that was not tried, and why."""
        self.repairs.append(Repair(name, detail, False, None))

    def decibels(self, errors: Tensor) -> float:
        total = float(errors.sum())
        return float(10 * torch.log10(self._power / total)) if total else float("inf")


def gain(errors: Tensor, before: Tensor) -> float:
    """Return by how many dB the errors are smaller, half of it over all, half sample by sample.

    A few samples, those that reach beyond the ranges, make most of the sum; the mean of the ratios
    says more about the rest.
    """
    tiny = torch.finfo(errors.dtype).tiny
    ratios = 10 * torch.log10(before.clamp_min(tiny) / errors.clamp_min(tiny))
    total = 10 * torch.log10(before.sum().clamp_min(tiny) / errors.sum().clamp_min(tiny))
    return float(total + ratios.mean()) / 2


def is_better(errors: Tensor, before: Tensor, least: float = _GAIN) -> bool:
    """Return whether the errors are smaller, and with few samples by more than chance explains."""
    if gain(errors, before) < least:
        return False
    if len(errors) >= _SOUND:
        return True
    gained = before - errors
    return len(gained) > 1 and float(gained.mean()) > float(gained.std() / len(gained) ** 0.5)


def costs_less(errors: Tensor, before: Tensor) -> bool:
    """Return whether a tensor's own error is smaller by far: one of many would be by chance."""
    gained = before - errors
    noise = float(gained.std()) / len(gained) ** 0.5
    return gain(errors, before) > _TENSOR_GAIN and float(gained.mean()) > 2 * noise


def nearest_weights(network: Network) -> dict[str, Tensor]:
    """Return the weights, each rounded to the nearest step."""
    return rounded(network).constants(biases=False)
