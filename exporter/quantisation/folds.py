"""Channel factors and headroom, by cross-validation: ranges from three folds, errors on the fourth.

So what inputs do that set no range is in the choice. Activations are quantised and weights are not,
since rounding to second order takes most of the weights' part out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporter.contracts import Progress
from exporter.quantisation.equalisation import factors
from exporter.quantisation.groups import Groups
from exporter.quantisation.judge import gain, is_better
from exporter.quantisation.network import HIGH, Network, Scale
from exporter.quantisation.observe import Observed

if TYPE_CHECKING:
    from exporter.records import Array

FOLDS = 4
CROSSED = 96  # samples that a pair is judged on, in all folds
NORMS = (4.0, 8.0)
HEADROOM = (1.0, 1.2, 1.5)
_FEW = 64  # samples below which headroom matters so much that every pair is tried


@dataclass(frozen=True, slots=True)
class Folds:
    """Ranges from three quarters of the samples, errors on the fourth, in turn."""

    network: Network
    observed: Observed
    samples: Array
    groups: Groups

    def best(self, progress: Progress) -> tuple[float | None, float]:
        """Return the norm and the headroom of the smallest error, or None and 1."""
        few = len(self.samples) < _FEW
        first = [(p, h) for p in (None, *NORMS) for h in (HEADROOM if few else HEADROOM[:1])]
        count = len(first) + (0 if few else 1)
        with progress("int8: cross-validate channel factors", count) as advance:
            scales = {norm: self._scales(norm) for norm in (None, *NORMS)}
            tried = {}
            for norm, headroom in first:
                tried[norm, headroom] = self._errors(scales[norm], headroom)
                advance()
            plain = tried[None, 1.0]

            def best() -> tuple[float | None, float]:
                return max(tried, key=lambda pair: gain(tried[pair], plain))

            if not few:
                norm, headroom = best()[0], HEADROOM[1]
                tried[norm, headroom] = self._errors(scales[norm], headroom)
                advance()
        return best() if is_better(tried[best()], plain) else (None, 1.0)

    def _errors(self, scales: Sequence[Mapping[str, Scale]], headroom: float) -> Tensor:
        """Return ‖ŷ − y‖² of each fold's samples, with activations quantised and weights not."""
        found = []
        for fold in range(FOLDS):
            chosen = list(range(fold, len(self.samples), FOLDS)[: CROSSED // FOLDS])
            wider = {name: headroom * scale for name, scale in scales[fold].items()}
            outputs = self.network.outputs(self.samples[chosen], wider)
            found.append((outputs - self.observed.outputs[chosen]).square().sum(dim=1))
        return torch.cat(found)

    def _scales(self, norm: float | None) -> list[dict[str, Scale]]:
        """Return the scales of each fold, from the samples of the others, with no headroom."""
        found = []
        for fold in range(FOLDS):
            others = [i for i in range(len(self.samples)) if i % FOLDS != fold]
            peaks = {name: p[others].amax(dim=0) for name, p in self.observed.peaks.items()}
            by_group = {}
            if norm is not None:
                by_group = factors(self.network, self.observed, peaks, self.groups, norm)
            found.append({n: self._scale(n, peaks[n], by_group) for n in self.network.tensors})
        return found

    def _scale(self, name: str, peak: Tensor, by_group: Mapping[str, Tensor]) -> Scale:
        """Return a tensor's scale, by channel: x / s in steps of Δ is x in steps of Δ · s."""
        divisor = by_group.get(self.groups.of(name) or "")
        if divisor is None:
            return float(peak.max()) / HIGH
        shape = (-1, *[1] * (len(self.observed.shapes[name]) - 2))
        step = float((peak / divisor).max()) / HIGH
        return (step * divisor).reshape(shape)
