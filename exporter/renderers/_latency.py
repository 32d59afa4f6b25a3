"""Latencies as words, the same on every page, and what each figure is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.intervals import FEWEST_PAIRS, SUPPORT
from exporter.records import Figure, Latency

HEADS = (
    *("candidate", "batch", "threads", "samples"),
    *(f"p{percent:g} ms" for percent in SUPPORT),
    *("far outside", "images/s"),
)
SUPPORTED = (
    "p50, p90, p99 and p99.9: the smallest sample that so many per cent do not exceed, warm-up "
    "excluded and nothing else, in brackets the 95 % interval (by ranks, as few samples counted as "
    "their correlation leaves); shown from "
    + ", ".join(f"{count:,}" for percent, count in SUPPORT.items() if percent > 50)
    + f" samples on for the last three, and an interval from {FEWEST_PAIRS} on"
)
FAR = (
    "far outside: samples below Q1 − 1.5 (Q3 − Q1) or above Q3 + 1.5 (Q3 − Q1), counted and in "
    "every figure"
)
RATE = "images/s: the batch over its p50"


def row(latency: Latency) -> tuple[str, ...]:
    """Return one line of the table."""
    outside = latency.outliers
    return (
        latency.name,
        str(latency.batch),
        str(latency.threads),
        str(len(latency.samples_ms)),
        *(cell(latency, figure) for figure in latency.figures),
        str(outside.low + outside.high),
        f"{latency.per_second:.1f}",
    )


def cell(latency: Latency, figure: Figure) -> str:
    """Return a percentile, or how many samples it lacks; a median is shown of any number."""
    if figure.ms is None:
        lacks = f"needs {figure.missing:,} more"
        return f"{latency.p50_ms:.2f} ({lacks})" if figure.percent == 50 else lacks
    if figure.interval is None:
        return f"{figure.ms:.2f}"
    low, high = figure.interval
    return f"{figure.ms:.2f} ({low:.2f} to {high:.2f})"


def method(timing: Mapping[str, Any], rounds: int) -> str:
    """Return how latencies were taken; ``timing`` is the record's, ``rounds`` the warm-up's."""
    warm = "without a warm-up"
    if timing["warmup"]:
        warm = (
            f"after a warm-up of up to {rounds} rounds, until the medians of two windows of "
            f"{timing['warmup']} agreed"
        )
    return (
        f"Wall-clock time of one batch on this machine, {warm}; all candidates in turn, in an "
        f"order that is drawn anew each round (seed {timing.get('seed', 0)}), so that drift hits "
        f"all alike, each after untimed runs of {timing['settle_ms']:g} ms or longer, until the "
        "threads of the one before it are asleep; other held-out samples each round, in place "
        "before the clock starts."
    )


def to_builtins(latency: Latency) -> dict[str, Any]:
    """Return the figures that follow from the samples, for JSON; None where not supported."""
    return {
        "samples": len(latency.samples_ms),
        "p50_ms": latency.p50_ms,
        **{f"p{f.percent:g}_ms": f.ms for f in latency.figures if f.percent != 50},
        "intervals_ms": {f"p{f.percent:g}": f.interval for f in latency.figures},
        "missing": {f"p{f.percent:g}": f.missing for f in latency.figures if f.missing},
        "outliers": latency.outliers._asdict(),
        "per_second": latency.per_second,
    }
