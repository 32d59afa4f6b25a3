"""Timing, on a clock that does what it is told; percentiles, by hand."""

from __future__ import annotations

import math
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest

from exporter import latency
from exporter.latency import measure_latency
from exporter.records import Latency, Timing


def at_once(batches: tuple[int, ...], warmup: int, runs: int) -> Timing:
    """Return a timing without the untimed runs that let others' threads fall asleep."""
    return Timing(batches, warmup, runs, settle_ms=0)


class Clock:
    """Stands still unless a session runs, and keeps a diary."""

    def __init__(self) -> None:
        self.now = 10**15
        self.diary: list[str] = []

    def __call__(self) -> int:
        return self.now


class Fake:
    """A session that takes as many ms as its list says, run after run."""

    def __init__(self, clock: Clock, name: str, took: list[float], threads: int = 1) -> None:
        self.clock, self.name, self.took, self.threads = clock, name, iter(took), threads
        self.bound: list[object] = []

    def __call__(self, feed):
        raise AssertionError("a session is timed through bind, its inputs in place")

    def bind(self, feed):
        self.bound.append(feed)
        self.clock.now += 5_000_000_000  # outside the clocked part
        self.clock.diary.append(f"bind {self.name}")

        def step():
            self.clock.diary.append(self.name)
            self.clock.now += round(next(self.took) * 1e6)

        return step


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "perf_counter_ns", clock)
    return clock


def test_all_candidates_run_in_turn_with_their_inputs_bound_before(clock):
    sessions = {name: Fake(clock, name, [1.0] * 9) for name in "ABC"}
    measure_latency(sessions, {1: {}}, at_once((1,), warmup=1, runs=2))
    assert clock.diary == ["bind A", "bind B", "bind C", *"ABC" * 3]


def test_the_warm_up_is_run_and_is_in_no_figure(clock):
    took = [900.0, 800.0, 3.0, 1.0, 2.0]
    (found,) = measure_latency({"A": Fake(clock, "A", took)}, {1: {}}, at_once((1,), 2, 3))
    assert found == Latency("A", 1, 1, 2, (3.0, 1.0, 2.0))


def test_without_a_warm_up_every_run_counts(clock):
    (found,) = measure_latency({"A": Fake(clock, "A", [7.0, 5.0])}, {1: {}}, at_once((1,), 0, 2))
    assert found.samples_ms == (7.0, 5.0)


def test_each_candidate_gets_its_own_times_name_and_threads(clock):
    sessions = {
        "slow": Fake(clock, "slow", [10.0, 20.0, 30.0], threads=2),
        "fast": Fake(clock, "fast", [0.001, 0.002, 0.003], threads=8),
    }
    found = measure_latency(sessions, {4: {}}, at_once((4,), 1, 2))
    assert found == (
        Latency("slow", 4, 2, 1, (20.0, 30.0)),
        Latency("fast", 4, 8, 1, (0.002, 0.003)),
    )


def test_a_candidate_runs_untimed_until_the_one_before_it_has_settled(clock):
    """4 ms at a time it takes three runs to fill 10 ms; the fourth is the one that counts."""
    took = [4.0, 4.0, 4.0, 1.0, 4.0, 4.0, 4.0, 2.0]
    sessions = {"A": Fake(clock, "A", took), "B": Fake(clock, "B", [20.0, 3.0, 20.0, 5.0])}
    a, b = measure_latency(sessions, {1: {}}, Timing((1,), 0, 2, settle_ms=10))
    assert (a.samples_ms, b.samples_ms) == ((1.0, 2.0), (3.0, 5.0))
    assert clock.diary == ["bind A", "bind B", *"AAAABB" * 2]


def test_each_batch_size_is_timed_on_its_own_feed(clock):
    sessions = {name: Fake(clock, name, [1.0] * 99) for name in "AB"}
    feeds = {1: {"x": np.zeros(1)}, 8: {"x": np.zeros(8)}}
    found = measure_latency(sessions, feeds, at_once((8, 1), 0, 3))
    assert [(f.name, f.batch, len(f.samples_ms)) for f in found] == [
        ("A", 8, 3),
        ("B", 8, 3),
        ("A", 1, 3),
        ("B", 1, 3),
    ]
    assert [id(feed) for feed in sessions["A"].bound] == [id(feeds[8]), id(feeds[1])]


def test_what_progress_takes_is_not_the_candidates_time(clock):
    told = []

    @contextmanager
    def slow_progress(what, total=None):
        told.append((what, total))

        def advance():
            told.append("round")
            clock.now += 10**12

        yield advance

    sessions = {"A": Fake(clock, "A", [4.0] * 5), "B": Fake(clock, "B", [6.0] * 5)}
    a, b = measure_latency(sessions, {1: {}}, at_once((1,), 2, 3), progress=slow_progress)
    assert a.samples_ms == (4.0,) * 3
    assert b.samples_ms == (6.0,) * 3
    assert told == [("time 2 candidates at batch 1", 5), *["round"] * 5]


def test_real_time_passes_on_a_real_clock():
    from time import sleep

    class Sleeper(Fake):
        def bind(self, feed):
            return lambda: sleep(0.002)

    (found,) = measure_latency({"A": Sleeper(Clock(), "A", [])}, {1: {}}, at_once((1,), 0, 3))
    assert min(found.samples_ms) >= 2.0


# ── Figures ─────────────────────────────────────────────────────────────────────────


def timed(*samples: float, batch: int = 1) -> Latency:
    return Latency("A", batch, 1, 0, tuple(samples))


@pytest.mark.parametrize(
    ("samples", "p50", "p90", "p99"),
    [
        ((7.0,), 7.0, 7.0, 7.0),
        ((2.0, 1.0), 1.0, 2.0, 2.0),
        ((3.0, 1.0, 2.0), 2.0, 3.0, 3.0),
        ((4.0, 1.0, 3.0, 2.0), 2.0, 4.0, 4.0),
        ((10.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0, 5.0), 5.0, 9.0, 10.0),
        ((5.0, 5.0, 5.0, 99.0), 5.0, 99.0, 99.0),
        (tuple(map(float, range(100, 0, -1))), 50.0, 90.0, 99.0),
        (tuple(map(float, range(1, 201))), 100.0, 180.0, 198.0),
        (tuple(map(float, range(1, 102))), 51.0, 91.0, 100.0),
    ],
)
def test_percentiles_are_samples_by_nearest_rank(samples, p50, p90, p99):
    found = timed(*samples)
    assert (found.p50_ms, found.p90_ms, found.p99_ms) == (p50, p90, p99)


@pytest.mark.parametrize("percent", [1, 7, 28, 29, 50, 55, 75, 90, 99, 99.9, 100])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 1000])
def test_a_percentile_is_the_smallest_sample_that_so_many_do_not_exceed(percent, count):
    rank = math.ceil(Fraction(str(percent)) * count / 100)
    assert timed(*map(float, range(count, 0, -1))).percentile(percent) == float(rank)


def test_the_order_of_the_samples_does_not_matter_and_is_kept():
    one, other = timed(3.0, 1.0, 2.0), timed(1.0, 2.0, 3.0)
    assert one.p50_ms == other.p50_ms
    assert one.samples_ms == (3.0, 1.0, 2.0)


@pytest.mark.parametrize(("batch", "ms", "rate"), [(1, 4.0, 250.0), (8, 4.0, 2000.0)])
def test_the_rate_is_images_per_second_at_the_median(batch, ms, rate):
    assert timed(ms, ms, 1000.0, batch=batch).per_second == rate
