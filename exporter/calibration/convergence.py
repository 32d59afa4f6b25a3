"""From how many samples on the scales stand still."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING

from exporter.calibration.statistics import SHOWN, Magnitudes, Range
from exporter.records import Convergence, Curve

if TYPE_CHECKING:
    from collections.abc import Iterable


def convergence(found: Mapping[str, Magnitudes | Range]) -> Convergence:
    """Return how far the scales of all counted tensors were from the final ones, and when."""
    histories = [seen.history for seen in found.values() if isinstance(seen, Magnitudes)]
    counts = tuple(count for count, *_ in histories[0]) if histories else ()
    names = ("max", f"percentile {SHOWN:g}")
    curves = []
    for which, name in enumerate(names, 1):
        scales = [[mark[which] for mark in history] for history in histories]
        apart = [_distances(part) for part in scales]
        steps = list(zip(*apart, strict=True))
        largest, middle = tuple(map(max, steps)), tuple(map(median, steps))
        curves.append(Curve(name, largest, middle))
    return Convergence(len(histories), counts, tuple(curves))


def _distances(scales: Iterable[float]) -> list[float]:
    """Return each scale's relative distance to the last; of a tensor that was 0 throughout, 0."""
    scales = list(scales)
    final = scales[-1]
    return [abs(scale - final) / final if final else 0.0 for scale in scales]
