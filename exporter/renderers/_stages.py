"""Where a run's time and memory went, the same on every page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from exporter.records import Report, Stage


class Row(NamedTuple):
    """One line of the table."""

    stage: str
    part: str
    time: str
    share: str
    peak: str


HEADS = Row(stage="stage", part="for", time="time", share="share", peak="peak memory")
NOTE = (
    "Wall time, and the largest resident set of this process; both are the stage's own, without "
    "those of stages inside it, and up to the writing of this report. Processes that a runtime "
    "starts, say a compiler, and a device's memory are not in it"
)
SO_FAR = "So far: from the start of the process on, since this system tells no other peak"
_SMALL = 0.01  # of the run: below it a stage is summed up where room is scarce


def rows(stages: Sequence[Stage]) -> list[Row]:
    """Return every stage, in the order of their beginnings."""
    whole = sum(stage.seconds for stage in stages) or 1.0
    return [
        Row(
            stage.name,
            stage.part,
            f"{stage.seconds:.2f} s",
            f"{stage.seconds / whole:.1%}",
            peak(stage),
        )
        for stage in stages
    ]


def summed(stages: Sequence[Stage]) -> list[Row]:
    """Return the same table, with all stages that took less than 1 % of the run in one line."""
    whole = sum(stage.seconds for stage in stages)
    large = [stage for stage in stages if stage.seconds >= _SMALL * whole]
    small = [stage for stage in stages if stage.seconds < _SMALL * whole]
    if len(small) < 2:
        return rows(stages)
    known = [stage for stage in small if stage.peak_bytes is not None]
    largest = max(known, key=lambda stage: stage.peak_bytes or 0, default=small[0])
    rest = Stage(
        f"{len(small)} stages below {_SMALL:.0%}",
        sum(stage.seconds for stage in small),
        "other",
        largest.peak_bytes,
        largest.so_far,
    )
    return [
        row._replace(part="") if row.stage == rest.name else row for row in rows([*large, rest])
    ]


def peak(stage: Stage) -> str:
    """Return a stage's peak of memory, or that there is none."""
    if stage.peak_bytes is None:
        return "not measured"
    return f"{stage.peak_bytes / 1e6:,.0f} MB{' so far' if stage.so_far else ''}"


def whole(report: Report) -> str:
    """Return what the run took, and what for."""
    parts = ", ".join(f"{part} {took:.1f} s" for part, took in report.seconds_by_part.items())
    return f"{report.seconds:.1f} s in all: {parts}"


def notes(stages: Sequence[Stage]) -> list[str]:
    """Return what the figures are, one sentence each."""
    return [NOTE, *([SO_FAR] if any(stage.so_far for stage in stages) else [])]
