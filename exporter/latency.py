"""How long does one batch take? One clock and one loop, for every runtime.

All candidates are timed in turn, each round in a new random order from a seed, so that a drift of
the machine's speed hits all alike, and so does what a candidate does to the next; timed one after
the other, two equal candidates look different most of the time. In turn they get into each other's
way, though: PyTorch's OpenMP threads spin for some ten milliseconds after a run, and whoever comes
next has a processor less (measured: 1.9 times the time on two cores). So each candidate first runs
untimed until that is over, and each time is that of a warm candidate that has the machine for
itself. Inputs are bound before the clock starts, another batch in each round and the same one for
all, and nothing is allocated inside it.

Warm-up is over, for a candidate, when its times have stopped falling and rising: between two
successive windows of rounds the median has moved by 2 % at most, or lies within what the other
window saw. It ends when that was so for each, or after 12 windows, and then that is said. Nothing
that is timed after it is left out.

A file may be loaded several times, and its loads take turns: two loads of one file were measured to
differ by up to 9 % for good (a network of 20 µs), so that one of each says little of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from statistics import median
from time import perf_counter_ns
from typing import Any, NamedTuple, TypeAlias

from exporter.contracts import Advance, Progress, Session, silent
from exporter.intervals import FEWEST_PAIRS
from exporter.records import Feed, Latency, Timing

_MOST_WINDOWS = 12
_STEADY = 0.02  # what a median may move by from one window to the next

Seen: TypeAlias = Callable[[str, int, Callable[[], Any]], object]


def wall_clock(step: Callable[[], Any]) -> float:
    """Run once, and return the milliseconds from handing over to having the outputs."""
    start = perf_counter_ns()
    step()
    return (perf_counter_ns() - start) / 1e6


class Entrant(NamedTuple):
    """A candidate, the batches that it takes in turn, a round each, and by which clock.

    ``others`` are more loads of the same file, which take turns with the first: where a load's
    memory happens to lie makes it faster or slower for good, and is not the candidate's doing.
    """

    session: Session
    feeds: Sequence[Feed]
    clock: Callable[[Callable[[], Any]], float] = wall_clock
    others: Sequence[Session] = ()

    def bind(self, turn: int) -> Callable[[], Any]:
        sessions = (self.session, *self.others)
        return sessions[turn % len(sessions)].bind(self.feeds[turn % len(self.feeds)])


def measure_latency(
    sessions: Mapping[str, Session],
    feeds: Mapping[int, Feed | Sequence[Feed]],
    timing: Timing,
    *,
    progress: Progress = silent,
) -> tuple[Latency, ...]:
    """Time every session on every batch, ``timing.runs`` times in turn after the warm-up rounds.

    ``feeds`` has one batch or several for each size of ``timing.batches``. Times are wall-clock
    milliseconds from handing over to having the outputs.
    """
    found: list[Latency] = []
    for size in timing.batches:
        given = feeds[size]
        inputs = (given,) if isinstance(given, Mapping) else given
        entrants = {name: Entrant(session, inputs) for name, session in sessions.items()}
        with progress(f"time {len(entrants)} candidates at batch {size}", timing.runs) as advance:
            found += time_in_turn(entrants, size, timing, advance=advance)
    return tuple(found)


def time_in_turn(
    entrants: Mapping[str, Entrant],
    size: int,
    timing: Timing,
    *,
    seconds: float | None = None,
    seen: Seen | None = None,
    advance: Advance = lambda: None,
) -> list[Latency]:
    """Time each entrant at one batch size, in turn.

    With ``seconds`` there are as many rounds as that takes, and `FEWEST_PAIRS` at least, in place
    of ``timing.runs``. ``seen`` is handed each run that was timed, outside the clock.
    """
    warmup, steady = _warm_up(entrants, timing)
    samples: dict[str, list[float]] = {name: [] for name in entrants}
    rounds = count() if seconds is not None else iter(range(timing.runs))
    end = perf_counter_ns() + (seconds or 0.0) * 1e9
    for turn, order in zip(rounds, orders(tuple(entrants), size, timing.seed), strict=False):
        if seconds is not None and turn >= FEWEST_PAIRS and perf_counter_ns() >= end:
            break
        for name in order:
            step = entrants[name].bind(turn)
            samples[name].append(_run(entrants[name], step, timing.settle_ms))
            if seen is not None:
                seen(name, turn, step)
        advance()
    return [
        Latency(
            name=name,
            batch=size,
            threads=entrants[name].session.threads,
            warmup=warmup,
            samples_ms=tuple(times),
            steady=steady.get(name),
            loads=1 + len(entrants[name].others),
        )
        for name, times in samples.items()
    ]


def orders(names: Sequence[str], size: int, seed: int) -> Iterator[list[str]]:
    """Yield the order of one round after another, without end; it follows from the arguments."""
    import numpy as np

    draws = np.random.RandomState((seed, size))  # a stream numpy never changes
    while True:
        yield [names[place] for place in draws.permutation(len(names))]


def is_steady(earlier: Sequence[float], later: Sequence[float]) -> bool:
    """Return whether times have stopped falling and rising from one window to the next."""
    before, after = median(earlier), median(later)
    near = abs(after - before) <= _STEADY * before
    within = min(earlier) <= after <= max(earlier) and min(later) <= before <= max(later)
    return near or within


def _warm_up(entrants: Mapping[str, Entrant], timing: Timing) -> tuple[int, dict[str, bool]]:
    """Return how many rounds were run until every entrant was steady, and which are."""
    window, rounds = timing.warmup, 0
    times: dict[str, list[float]] = {name: [] for name in entrants}
    steady: dict[str, bool] = dict.fromkeys(entrants, False) if window else {}
    while rounds < _MOST_WINDOWS * window and not all(steady.values()):
        for name, entrant in entrants.items():
            times[name].append(_run(entrant, entrant.bind(rounds), timing.settle_ms))
        rounds += 1
        if rounds % window == 0 and rounds > window:
            for name, own in times.items():
                steady[name] |= is_steady(own[-2 * window : -window], own[-window:])
    return rounds, steady


def _run(entrant: Entrant, step: Callable[[], Any], settle_ms: float) -> float:
    """Run untimed until that long has passed, then once by the clock, in ms."""
    end = perf_counter_ns() + settle_ms * 1e6
    while perf_counter_ns() < end:
        step()
    return entrant.clock(step)
