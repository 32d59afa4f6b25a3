"""Channel factors and headroom, by cross-validation: errors on a fold that set no range.

So what inputs do that set no range is in the choice. Activations are quantised and weights are not,
since rounding to second order takes most of the weights' part out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporter.contracts import Progress
from exporter.digests import folds
from exporter.quantisation.equalisation import factors
from exporter.quantisation.groups import Groups
from exporter.quantisation.judge import gain, is_better
from exporter.quantisation.network import HIGH, Network, Scale
from exporter.quantisation.observe import Observed

if TYPE_CHECKING:
    from exporter.records import Array

CROSSED = 32  # samples that a pair is judged on, in all folds
NORMS = (4.0, 8.0)
HEADROOM = (1.0, 1.2, 1.5)
_FEW = 64  # samples below which headroom matters so much that every pair is tried


class Folds:
    """Ranges from all folds of the samples but one, errors on that one, in turn."""

    def __init__(
        self, network: Network, observed: Observed, samples: Array, groups: Groups
    ) -> None:
        self._network, self._observed, self._groups = network, observed, groups
        self._few = len(samples) < _FEW
        count = max(len(peaks) for peaks in observed.peaks.values())
        dealt: dict[int, list[int]] = {}
        for index, fold in enumerate(folds(samples, count)):
            dealt.setdefault(fold, []).append(index)
        self._samples = {
            fold: samples[chosen[: CROSSED // count]] for fold, chosen in dealt.items()
        }

    def best(self, progress: Progress) -> tuple[float | None, float]:
        """Return the norm and the headroom of the smallest error, or None and 1."""
        if len(self._samples) < 2:
            return None, 1.0
        first = [(p, h) for p in (None, *NORMS) for h in (HEADROOM if self._few else HEADROOM[:1])]
        count = len(first) + (0 if self._few else 1)
        with progress("int8: cross-validate channel factors", count) as advance:
            outputs = {fold: self._network.outputs(x) for fold, x in self._samples.items()}
            scales = {norm: self._scales(norm) for norm in (None, *NORMS)}
            tried = {}
            for norm, headroom in first:
                tried[norm, headroom] = self._errors(outputs, scales[norm], headroom)
                advance()
            plain = tried[None, 1.0]

            def best() -> tuple[float | None, float]:
                return max(tried, key=lambda pair: gain(tried[pair], plain))

            if not self._few:
                norm, headroom = best()[0], HEADROOM[1]
                tried[norm, headroom] = self._errors(outputs, scales[norm], headroom)
                advance()
        return best() if is_better(tried[best()], plain) else (None, 1.0)

    def _errors(
        self,
        outputs: Mapping[int, Tensor],
        scales: Mapping[int, Mapping[str, Scale]],
        headroom: float,
    ) -> Tensor:
        """Return ‖ŷ − y‖² of each fold's samples, with activations quantised and weights not."""
        found = []
        for fold, x in self._samples.items():
            wider = {name: headroom * scale for name, scale in scales[fold].items()}
            error = self._network.outputs(x, wider) - outputs[fold]
            found.append(error.square().sum(dim=1))
        return torch.cat(found)

    def _scales(self, norm: float | None) -> dict[int, dict[str, Scale]]:
        """Return the scales for each fold, from the ranges of the others, with no headroom."""
        found = {}
        for fold in self._samples:
            peaks = {}
            for name, by_fold in self._observed.peaks.items():
                others = [other for other in range(len(by_fold)) if other != fold]
                peaks[name] = by_fold[others].amax(dim=0)
            by_group = {}
            if norm is not None:
                by_group = factors(self._network, self._observed, peaks, self._groups, norm)
            found[fold] = {n: self._scale(n, peaks[n], by_group) for n in self._network.tensors}
        return found

    def _scale(self, name: str, peak: Tensor, by_group: Mapping[str, Tensor]) -> Scale:
        """Return a tensor's scale, by channel: x / s in steps of Δ is x in steps of Δ · s."""
        divisor = by_group.get(self._groups.of(name) or "")
        if divisor is None:
            return float(peak.max()) / HIGH
        shape = (-1, *[1] * (len(self._observed.shapes[name]) - 2))
        step = float((peak / divisor).max()) / HIGH
        return (step * divisor).reshape(shape)
