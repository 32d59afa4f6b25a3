"""Where a run's time goes: each moment belongs to the innermost open stage, or to the rest.

    fold   rest   convert                    convert
    ├────┤        ├───────┬── calibrate ──┬───────┤

So the stages' seconds add up to the run's, whatever lies inside what, and a peak of memory is of
the stage that it was reached in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

from exporter.contracts import Advance, Progress
from exporter.memory import Peak, PeakMemory
from exporter.records import Part, Stage

REST = "between the stages"


@dataclass(slots=True)
class _Share:
    """What has been charged to one stage."""

    name: str
    part: Part
    seconds: float = 0.0
    peak: Peak | None = None

    def charge(self, seconds: float, peak: Peak | None) -> None:
        self.seconds += seconds
        self.peak = max(filter(None, (self.peak, peak)), default=None)

    def record(self) -> Stage:
        size, so_far = self.peak or (None, False)
        return Stage(self.name, self.seconds, self.part, size, so_far)


class Stages:
    """Times a run from now on, and tells its progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._shares: list[_Share] = []
        self._open = [_Share(REST, "other")]
        self._memory = PeakMemory()
        self._since = perf_counter()

    @contextmanager
    def announced(
        self, what: str, total: int | None = None, *, part: Part = "conversion"
    ) -> Iterator[Advance]:
        """Open a stage, and tell of it."""
        with self.quietly(what, part=part), self._progress(what, total) as advance:
            yield advance

    @contextmanager
    def quietly(self, what: str, *, part: Part = "conversion") -> Iterator[None]:
        """Open a stage that is worth no line of its own."""
        self._charge()
        self._shares.append(_Share(what, part))
        self._open.append(self._shares[-1])
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def name_what_was(self, what: str, *, part: Part = "other") -> None:
        """Make a stage of what was in none until now."""
        self._charge()
        rest = self._open[0]
        self._shares.append(replace(rest, name=what, part=part))
        self._open[0] = _Share(rest.name, rest.part)

    @property
    def so_far(self) -> tuple[Stage, ...]:
        """Return every stage in the order of their beginnings, and last what was in none."""
        self._charge()
        return tuple(share.record() for share in (*self._shares, self._open[0]))

    def _charge(self) -> None:
        now = perf_counter()
        self._open[-1].charge(now - self._since, self._memory.look())
        self._since = now
