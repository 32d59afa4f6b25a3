"""Timing, on a clock that does what it is told; percentiles, by hand."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from scipy.stats import chisquare

from exporter import latency
from exporter.latency import Entrant, measure_latency, orders, time_in_turn
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
        self.bind_ns = 5_000_000_000  # outside the clocked part

    def __call__(self, feed):
        raise AssertionError("a session is timed through bind, its inputs in place")

    def bind(self, feed):
        self.bound.append(feed)
        self.clock.now += self.bind_ns
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


def rounds_of(diary: list[str], size: int) -> list[list[str]]:
    """Return who ran in each round, binding left out."""
    ran = [entry for entry in diary if not entry.startswith("bind")]
    return [ran[start : start + size] for start in range(0, len(ran), size)]


def test_all_candidates_run_once_in_each_round_bound_right_before(clock):
    sessions = {name: Fake(clock, name, [1.0] * 9) for name in "ABC"}
    measure_latency(sessions, {1: {}}, at_once((1,), warmup=0, runs=2))
    assert clock.diary[0::2] == [f"bind {name}" for name in clock.diary[1::2]]
    assert [sorted(turn) for turn in rounds_of(clock.diary, 3)] == [["A", "B", "C"]] * 2


def test_the_order_is_random_and_follows_from_the_seed_and_the_batch_size(clock):
    def order(size: int, seed: int) -> list[list[str]]:
        clock.diary.clear()
        sessions = {name: Fake(clock, name, [1.0] * 600) for name in "ABC"}
        timing = Timing((size,), 0, 600, settle_ms=0, seed=seed)
        measure_latency(sessions, {size: {}}, timing)
        return rounds_of(clock.diary, 3)

    found = order(1, seed=0)
    assert found == list(islice(orders("ABC", 1, 0), 600)) == order(1, seed=0)
    assert found != order(1, seed=1)
    assert found != order(8, seed=0)
    counts = Counter(map("".join, found))
    assert len(counts) == 6
    assert chisquare(list(counts.values())).pvalue > 0.001


def test_the_warm_up_is_run_and_is_in_no_figure(clock):
    took = [900.0, 800.0, 100.0, 100.0, 100.0, 100.0, 3.0, 1.0, 2.0]
    (found,) = measure_latency({"A": Fake(clock, "A", took)}, {1: {}}, at_once((1,), 2, 3))
    assert found == Latency("A", 1, 1, 6, (3.0, 1.0, 2.0), steady=True)


def test_a_warm_up_lasts_until_each_candidate_was_steady_once(clock):
    """A is from the start, and B once what it began with has died down to 2 %."""
    dying = [1 + 10 * math.exp(-turn / 6) for turn in range(99)]
    sessions = {"A": Fake(clock, "A", [1.0] * 99), "B": Fake(clock, "B", dying)}
    a, b = measure_latency(sessions, {1: {}}, at_once((1,), warmup=5, runs=3))
    assert (a.steady, b.steady) == (True, True)
    assert a.warmup == b.warmup == 45
    assert dying[32] / dying[37] > 1.02 > dying[37] / dying[42]
    assert b.samples_ms == pytest.approx(tuple(dying[45:48]), abs=1e-5)


def test_what_never_becomes_steady_is_timed_all_the_same_and_said(clock):
    rising = [1.1**turn for turn in range(99)]
    sessions = {"A": Fake(clock, "A", [1.0] * 99), "B": Fake(clock, "B", rising)}
    a, b = measure_latency(sessions, {1: {}}, at_once((1,), warmup=4, runs=3))
    assert (a.steady, b.steady, b.warmup) == (True, False, 48)
    assert b.doubts[-1] == "the latency of B at batch 1 was still changing after 48 warm-up rounds"
    assert not any("still changing" in doubt for doubt in a.doubts)


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
def test_noise_alone_does_not_keep_a_warm_up_going(noise, clock):
    """The rounds it takes, of a hundred runs: two windows mostly, and the bound for almost none."""
    rng = np.random.default_rng(0)
    lasted = []
    for _ in range(100):
        took = np.exp(rng.normal(0, noise, 99)).tolist()
        (found,) = measure_latency({"A": Fake(clock, "A", took)}, {1: {}}, at_once((1,), 5, 2))
        lasted.append(found.warmup)
        assert found.steady
    assert np.mean(lasted) < 15


def test_without_a_warm_up_every_run_counts(clock):
    (found,) = measure_latency({"A": Fake(clock, "A", [7.0, 5.0])}, {1: {}}, at_once((1,), 0, 2))
    assert found.samples_ms == (7.0, 5.0)


def test_each_candidate_gets_its_own_times_name_and_threads(clock):
    sessions = {
        "slow": Fake(clock, "slow", [10.0, 20.0, 30.0], threads=2),
        "fast": Fake(clock, "fast", [0.001, 0.002, 0.003], threads=8),
    }
    found = measure_latency(sessions, {4: {}}, at_once((4,), 0, 2))
    assert found == (
        Latency("slow", 4, 2, 0, (10.0, 20.0)),
        Latency("fast", 4, 8, 0, (0.001, 0.002)),
    )


def test_a_candidate_runs_untimed_until_the_one_before_it_has_settled(clock):
    """4 ms at a time it takes three runs to fill 10 ms; the fourth is the one that counts."""
    took = [4.0, 4.0, 4.0, 1.0, 4.0, 4.0, 4.0, 2.0]
    sessions = {"A": Fake(clock, "A", took), "B": Fake(clock, "B", [20.0, 3.0, 20.0, 5.0])}
    a, b = measure_latency(sessions, {1: {}}, Timing((1,), 0, 2, settle_ms=10))
    assert (a.samples_ms, b.samples_ms) == ((1.0, 2.0), (3.0, 5.0))
    assert Counter(clock.diary) == {"bind A": 2, "bind B": 2, "A": 8, "B": 4}


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
    bound = [id(feed) for feed in sessions["A"].bound]
    assert bound == [id(feeds[8])] * 3 + [id(feeds[1])] * 3


def test_inputs_change_from_round_to_round_and_are_the_same_for_all_candidates(clock):
    sessions = {name: Fake(clock, name, [1.0] * 99) for name in "AB"}
    feeds = [{"x": np.zeros(1)} for _ in range(3)]
    measure_latency(sessions, {1: feeds}, at_once((1,), 0, 7))
    for session in sessions.values():
        assert [id(feed) for feed in session.bound] == [id(feeds[n % 3]) for n in range(7)]


def test_loads_of_one_file_take_turns(clock):
    first, second = (Fake(clock, name, [took] * 99) for name, took in (("A", 1.0), ("A'", 3.0)))
    entrants = {"A": Entrant(first, [{}], others=[second])}
    (found,) = time_in_turn(entrants, 1, at_once((1,), 0, 4))
    assert found.samples_ms == (1.0, 3.0, 1.0, 3.0)


def test_each_timed_run_is_handed_over_outside_the_clock_and_no_other(clock):
    seen = []

    def look(name, turn, step):
        seen.append((turn, name))
        clock.now += 10**9

    entrants = {"A": Entrant(Fake(clock, "A", [2.0] * 99), [{}])}
    (found,) = time_in_turn(entrants, 1, Timing((1,), 2, 3, settle_ms=4), seen=look)
    assert seen == [(0, "A"), (1, "A"), (2, "A")]
    assert found.samples_ms == (2.0,) * 3


@pytest.mark.parametrize(("seconds", "rounds"), [(1.0, 25), (0.5, 20)])
def test_seconds_end_the_rounds_but_not_below_what_an_interval_needs(seconds, rounds, clock):
    """A round takes 40 ms, and 20 pairs are the fewest that have an interval."""
    session = Fake(clock, "A", [40.0] * 99)
    session.bind_ns = 0
    (found,) = time_in_turn({"A": Entrant(session, [{}])}, 1, at_once((1,), 0, 9), seconds=seconds)
    assert len(found.samples_ms) == rounds


def test_what_progress_takes_is_not_the_candidates_time(clock):
    told = []

    @contextmanager
    def slow_progress(what, total=None):
        told.append((what, total))

        def advance():
            told.append("round")
            clock.now += 10**12

        yield advance

    sessions = {"A": Fake(clock, "A", [4.0] * 7), "B": Fake(clock, "B", [6.0] * 7)}
    a, b = measure_latency(sessions, {1: {}}, at_once((1,), 2, 3), progress=slow_progress)
    assert a.samples_ms == (4.0,) * 3
    assert b.samples_ms == (6.0,) * 3
    assert told == [("time 2 candidates at batch 1", 3), *["round"] * 3]


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


def test_a_percentile_that_the_samples_do_not_support_says_how_many_are_missing():
    found = timed(*map(float, range(1, 101)))
    p50, p90, p99, p999 = found.figures
    assert (p50.ms, p90.ms) == (50.0, 90.0)
    assert (p99.ms, p99.interval, p99.missing) == (None, None, 562)
    assert (p999.ms, p999.missing) == (None, 6536)
    assert timed(*[1.0] * 662).figure(99.0).ms == 1.0
    assert timed(*[1.0] * 10).figure(50.0).missing == 1


def test_a_figure_has_an_interval_from_twenty_samples_on():
    assert timed(*[3.0] * 19).figure(50.0) == (50.0, 3.0, None, 0)
    assert timed(*[3.0] * 20).figure(50.0) == (50.0, 3.0, (3.0, 3.0), 0)


def test_outliers_are_counted_and_stay_in_every_figure():
    found = timed(*[1.0, 1.1] * 50, 9.0, 9.0, 0.1)
    assert found.outliers == (1, 2, 3)
    assert max(found.samples_ms) == 9.0
    assert len(found.samples_ms) == 103
