"""Channel factors and headroom, by cross-validation: errors on a fold that set no range.

So what inputs do that set no range is in the choice. Activations are quantised and weights are not,
since rounding to second order takes most of the weights' part out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporter.contracts import Progress
from exporter.digests import folds
from exporter.quantisation.equalisation import Factors
from exporter.quantisation.groups import Groups
from exporter.quantisation.judge import gain, is_better
from exporter.quantisation.network import Network, Reference, as_steps
from exporter.quantisation.observe import Observed, peak
from exporter.steps import Steps, steps_for

if TYPE_CHECKING:
    from exporter.records import Array

CROSSED = 32  # samples that a pair is judged on, in all folds
NORMS = (4.0, 8.0)
HEADROOM = (1.0, 1.2, 1.5)
_FEW = 64  # samples below which headroom matters so much that every pair is tried


class Folds:
    """Ranges from all folds of the samples but one, errors on that one, in turn."""

    def __init__(
        self,
        network: Network,
        observed: Observed,
        samples: Array,
        groups: Groups,
        factors: Factors,
        reference: Reference,
    ) -> None:
        self._network, self._observed, self._groups = network, observed, groups
        self._factors = factors
        self._reference = reference
        self._few = len(samples) < _FEW
        count = max(len(low) for low in observed.low.values())
        dealt: dict[int, list[int]] = {}
        for index, fold in enumerate(folds(samples, count)):
            dealt.setdefault(fold, []).append(index)
        self._judged = {fold: chosen[: CROSSED // count] for fold, chosen in dealt.items()}
        self._samples = {fold: samples[chosen] for fold, chosen in self._judged.items()}

    def best(self, progress: Progress) -> tuple[float | None, float]:
        """Return the norm and the headroom of the smallest error, or None and 1."""
        if len(self._samples) < 2:
            return None, 1.0
        first = [(p, h) for p in (None, *NORMS) for h in (HEADROOM if self._few else HEADROOM[:1])]
        count = len(first) + (0 if self._few else 1)
        with progress("int8: cross-validate channel factors", count) as advance:
            outputs = {fold: self._reference.outputs(i) for fold, i in self._judged.items()}
            steps = {norm: self._steps(norm) for norm in (None, *NORMS)}
            tried = {}
            for norm, headroom in first:
                tried[norm, headroom] = self._errors(outputs, steps[norm], headroom)
                advance()
            plain = tried[None, 1.0]

            def best() -> tuple[float | None, float]:
                return max(tried, key=lambda pair: gain(tried[pair], plain))

            if not self._few:
                norm, headroom = best()[0], HEADROOM[1]
                tried[norm, headroom] = self._errors(outputs, steps[norm], headroom)
                advance()
        return best() if is_better(tried[best()], plain) else (None, 1.0)

    def _errors(
        self,
        outputs: Mapping[int, Tensor],
        steps: Callable[[int, float], dict[str, Steps]],
        headroom: float,
    ) -> Tensor:
        """Return ‖ŷ − y‖² of each fold's samples, with activations quantised and weights not."""
        found = []
        for fold, x in self._samples.items():
            error = self._network.outputs(x, steps(fold, headroom)) - outputs[fold]
            found.append(error.square().sum(dim=1))
        return torch.cat(found)

    def _steps(self, norm: float | None) -> Callable[[int, float], dict[str, Steps]]:
        """Return what gives the steps for a fold, from the ranges of the others, and a headroom."""
        network = self._network
        ranges = {name: self._ranges(name) for name in network.tensors}
        peaks = {name: peak(network, name, *sides) for name, sides in ranges.items()}
        by_group = {} if norm is None else self._factors.best(peaks, norm)
        rows = {fold: row for row, fold in enumerate(self._samples)}

        def found(fold: int, headroom: float) -> dict[str, Steps]:
            row = rows[fold]
            divisors = {group: factors[row] for group, factors in by_group.items()}
            return {
                name: self._scaled(name, low[row], high[row], divisors, headroom)
                for name, (low, high) in ranges.items()
            }

        return found

    def _ranges(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a tensor's smallest and largest values in all folds but one, (folds, C)."""
        low, high = self._observed.low[name], self._observed.high[name]
        every = range(len(low))
        others = torch.tensor([[o for o in every if o != fold] for fold in self._samples])
        return low[others].amin(dim=1), high[others].amax(dim=1)

    def _scaled(
        self,
        name: str,
        low: Tensor,
        high: Tensor,
        by_group: Mapping[str, Tensor],
        headroom: float,
    ) -> Steps:
        """Return a tensor's steps, by channel: x / s in steps of Δ is x in steps of Δ · s."""
        divisor = by_group.get(self._groups.of(name) or "")
        if divisor is not None:
            low, high = low / divisor, high / divisor
        held = steps_for(
            self._network.kind(name), low.numpy(), high.numpy(), self._observed.samples, headroom
        )
        steps = as_steps(held)
        return steps if divisor is None else steps._replace(width=held.width * divisor)
