"""Worth: whether fewer bits were faster on this machine, and what to ship of what passed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from exporter.intervals import FEWEST_PAIRS, between_loads, ratio_interval
from exporter.records.base import Verdict
from exporter.records.latency import Latency

ALIKE = 0.01  # of a ratio: what the same file, loaded twice, may differ by
Speed = Literal["faster", "slower", "no significant difference", "too few samples"]


class Comparison(NamedTuple):
    """One artefact's latency beside another's: ``ratio`` of medians, with its 95 % interval.

    A difference is one if the whole interval is more than 1 % off, which is what two loads of one
    file may differ by. The interval is None with fewer than `FEWEST_PAIRS` samples. Samples were
    taken in turn, so that the n-th of both belong together.
    """

    artefact: str
    baseline: str
    batch: int
    ratio: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, latency: Latency, baseline: Latency) -> Comparison:
        ours, theirs = latency.samples_ms, baseline.samples_ms
        interval = None
        if min(len(ours), len(theirs)) >= FEWEST_PAIRS:
            interval = ratio_interval(ours, theirs)
            if (loads := latency.loads) > 1 and loads == baseline.loads:
                low, high = between_loads(ours, theirs, loads)
                interval = min(low, interval[0]), max(high, interval[1])
        ratio = latency.p50_ms / baseline.p50_ms
        return cls(latency.name, baseline.name, latency.batch, ratio, interval)

    @property
    def speed(self) -> Speed:
        if self.interval is None:
            return "too few samples"
        low, high = self.interval
        if low > 1 + ALIKE:
            return "slower"
        return "faster" if high < 1 / (1 + ALIKE) else "no significant difference"


class Recommendation(NamedTuple):
    """The fastest artefact of those that pass at the first batch size, None if none does.

    ``level`` are those that pass and are not shown to be slower; ``unproven`` the faster ones that
    do not pass, each with its verdict.
    """

    artefact: str | None
    batch: int
    level: tuple[str, ...]
    unproven: tuple[tuple[str, Verdict], ...]


def recommend(timed: Sequence[tuple[Latency, Verdict]]) -> Recommendation | None:
    """Return what to ship of the artefacts timed at one batch size; None if none was."""
    if not timed:
        return None
    in_order = sorted(timed, key=lambda one: one[0].p50_ms)
    passing = [latency for latency, verdict in in_order if verdict == "pass"]
    best = passing[0] if passing else None
    level = tuple(
        other.name for other in passing[1:] if Comparison.of(other, passing[0]).speed != "slower"
    )
    unproven = tuple(
        (latency.name, verdict)
        for latency, verdict in in_order
        if verdict != "pass" and (best is None or latency.p50_ms < best.p50_ms)
    )
    return Recommendation(best.name if best else None, in_order[0][0].batch, level, unproven)
