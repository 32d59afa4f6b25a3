"""Latency: how long a batch takes, what so many samples show of it, and what they do not."""

from __future__ import annotations

from typing import NamedTuple

from exporter.intervals import (
    FEWEST_PAIRS,
    SUPPORT,
    Outliers,
    outliers,
    percentile_interval,
    samples_missing,
)
from exporter.records.base import Found, rank

_UNSTEADY = 1.25  # p90 / p50


class Figure(NamedTuple):
    """One percentile in ms with its 95 % interval, which is None with fewer samples than it takes.

    With ``missing`` samples more it would be supported; until then ``ms`` is None.
    """

    percent: float
    ms: float | None
    interval: tuple[float, float] | None
    missing: int


class Latency(Found, frozen=True):
    """Every sample that was taken, warm-up excluded. Summaries are derived, never stored.

    ``warmup`` are the rounds that were run before, and ``steady`` whether the times had stopped
    falling or rising by then, None if nobody looked. The n-th sample is of load n % ``loads`` of
    the file.
    """

    name: str
    batch: int
    threads: int
    warmup: int
    samples_ms: tuple[float, ...]
    steady: bool | None = None
    loads: int = 1

    def percentile(self, percent: float) -> float:
        """Return the smallest sample that at least ``percent`` % of all do not exceed, in ms."""
        return sorted(self.samples_ms)[rank(percent, len(self.samples_ms)) - 1]

    def figure(self, percent: float) -> Figure:
        """Return a percentile of `SUPPORT` as far as the samples support it."""
        count = len(self.samples_ms)
        if missing := samples_missing(percent, count):
            return Figure(percent, None, None, missing)
        enough = count >= FEWEST_PAIRS
        interval = percentile_interval(self.samples_ms, percent) if enough else None
        return Figure(percent, self.percentile(percent), interval, 0)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Return p50, p90, p99 and p99.9."""
        return tuple(map(self.figure, SUPPORT))

    @property
    def outliers(self) -> Outliers:
        """Return how many samples lie far outside; they are in every figure all the same."""
        return outliers(self.samples_ms)

    @property
    def p50_ms(self) -> float:
        return self.percentile(50)

    @property
    def p90_ms(self) -> float:
        return self.percentile(90)

    @property
    def p99_ms(self) -> float:
        return self.percentile(99)

    @property
    def is_unsteady(self) -> bool:
        """Whether it varies so much that it is in doubt."""
        return self.p90_ms > _UNSTEADY * self.p50_ms

    @property
    def doubts(self) -> tuple[str, ...]:
        """Return the reasons not to trust it, one sentence each."""
        whose, said = f"the latency of {self.name} at batch {self.batch}", []
        if self.is_unsteady:
            ratio = self.p90_ms / self.p50_ms
            said.append(f"{whose} is unsteady: its p90 is {ratio:.1f} times its p50")
        if self.steady is False:
            said.append(f"{whose} was still changing after {self.warmup} warm-up rounds")
        return tuple(said)

    @property
    def per_second(self) -> float:
        return 1000 * self.batch / self.p50_ms
