"""How long does one batch take? One clock and one loop, for every runtime.

All candidates are timed in turn, A B C A B C …, so that a drift of the machine's speed hits all
alike; timed one after the other, two equal candidates look different most of the time. In turn they
get into each other's way, though: PyTorch's OpenMP threads spin for some ten milliseconds after a
run, and whoever comes next has a processor less (measured: 1.9 times the time on two cores). So
each candidate first runs untimed until that is over, and each time is that of a warm candidate that
has the machine for itself. Inputs are bound before the clock starts, and nothing is allocated
inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter_ns
from typing import Any

from exporter.contracts import Progress, Session, silent
from exporter.records import Feed, Latency, Timing


def measure_latency(
    sessions: Mapping[str, Session],
    feeds: Mapping[int, Feed],
    timing: Timing,
    *,
    progress: Progress = silent,
) -> tuple[Latency, ...]:
    """Time every session on every batch, ``timing.runs`` times in turn after the warm-up rounds.

    ``feeds`` has one batch per size of ``timing.batches``. Times are wall-clock milliseconds from
    handing over to having the outputs.
    """
    found = []
    for size in timing.batches:
        steps = {name: session.bind(feeds[size]) for name, session in sessions.items()}
        samples: dict[str, list[float]] = {name: [] for name in steps}
        rounds = timing.warmup + timing.runs
        with progress(f"time {len(steps)} candidates at batch {size}", rounds) as advance:
            for turn in range(rounds):
                for name, step in steps.items():
                    _settle(step, timing.settle_ms)
                    start = perf_counter_ns()
                    step()
                    elapsed = perf_counter_ns() - start
                    if turn >= timing.warmup:
                        samples[name].append(elapsed / 1e6)
                advance()
        found += [
            Latency(name, size, sessions[name].threads, timing.warmup, tuple(times))
            for name, times in samples.items()
        ]
    return tuple(found)


def _settle(step: Callable[[], Any], milliseconds: float) -> None:
    """Run untimed until that long has passed."""
    end = perf_counter_ns() + milliseconds * 1e6
    while perf_counter_ns() < end:
        step()
