"""The method on simulated clocks: what is called different, what is found, what intervals hold."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binom, ttest_1samp

from exporter import latency
from exporter.intervals import (
    FEWEST_PAIRS,
    SUPPORT,
    between_loads,
    independent,
    outliers,
    percentile_interval,
    ratio_interval,
    samples_missing,
)
from exporter.latency import Entrant, time_in_turn
from exporter.records import Comparison, Latency, Timing

ROUNDS, TRIALS = 60, 300
DRIFTS = [0.0, 0.01, 0.03, 0.05]


class Machine:
    """A clock whose runs take 1 ms, as noise and a drift of the machine's speed make it.

    The speed goes once from one end of ``drift`` to the other while ``total`` ms pass, in a
    straight line or along a sine, from a random place and in a random direction.
    """

    def __init__(self, seed: int, drift: float, noise: float, total: float) -> None:
        rng = np.random.default_rng(seed)
        self.now, self.noise = 0.0, iter(np.exp(rng.normal(0, noise, round(4 * total))).tolist())
        self.drift, self.total, self.sign = drift, total, rng.choice([-1.0, 1.0])
        self.turns, self.phase = rng.uniform(0.5, 3), rng.uniform(0, 2 * math.pi)
        self.is_sine = bool(rng.random() < 0.5)
        self.threads = 1

    def __call__(self) -> int:
        return round(self.now)

    def speed(self) -> float:
        part = self.now / 1e6 / self.total
        if self.is_sine:
            return 1 + self.drift / 2 * math.sin(2 * math.pi * self.turns * part + self.phase)
        return 1 + self.sign * self.drift * (part - 0.5)

    def entrant(self, took: float) -> Entrant:
        machine = self

        class Session:
            threads = 1

            def bind(self, feed):
                def step():
                    machine.now += 1e6 * took * machine.speed() * next(machine.noise)

                return step

        return Entrant(Session(), [{}])


def trial(monkeypatch, seed: int, *, drift: float, noise: float, ratio: float, in_turn: bool):
    """Return the samples of two candidates, the first of which takes ``ratio`` times as long."""
    machine = Machine(seed, drift, noise, 2 * ROUNDS)
    monkeypatch.setattr(latency, "perf_counter_ns", machine)
    timing = Timing((1,), warmup=0, runs=ROUNDS, settle_ms=0, seed=seed)
    both = {"A": machine.entrant(ratio), "B": machine.entrant(1.0)}
    if in_turn:
        found = time_in_turn(both, 1, timing)
    else:
        found = [time_in_turn({name: one}, 1, timing)[0] for name, one in both.items()]
    return [one.samples_ms for one in found]


def share(monkeypatch, said, **how) -> float:
    """Return of how many of all trials ``said`` holds, asked of the comparison."""
    how = {"noise": 0.02, "ratio": 1.0, "in_turn": True, **how}
    found = 0
    for seed in range(TRIALS):
        a, b = (Latency("", 1, 1, 0, s) for s in trial(monkeypatch, seed, **how))
        found += bool(said(Comparison.of(a, b)))
    return found / TRIALS


def is_told_apart(one: Comparison) -> bool:
    return one.speed != "no significant difference"


def excludes_one(one: Comparison) -> bool:
    return not one.interval[0] <= 1 <= one.interval[1]


@pytest.mark.parametrize("drift", DRIFTS)
def test_two_that_are_equal_are_called_different_in_six_of_a_hundred_runs_at_most(
    drift, monkeypatch
):
    """By the interval alone; what is called a difference must be 1 % off, too."""
    assert share(monkeypatch, excludes_one, drift=drift) <= 0.06
    assert share(monkeypatch, is_told_apart, drift=drift) <= 0.01


def test_timed_one_after_the_other_they_are_called_different_most_of_the_time(monkeypatch):
    assert share(monkeypatch, excludes_one, drift=0.03, in_turn=False) > 0.4
    assert share(monkeypatch, excludes_one, drift=0.05, in_turn=False) > 0.5


@pytest.mark.parametrize("drift", [0.0, 0.03])
def test_three_per_cent_more_under_two_per_cent_of_noise_are_found(drift, monkeypatch):
    assert share(monkeypatch, lambda one: one.speed == "slower", drift=drift, ratio=1.03) >= 0.9
    assert share(monkeypatch, lambda one: one.speed == "faster", drift=drift, ratio=0.97) >= 0.9


@pytest.mark.parametrize("drift", [0.0, 0.05])
def test_the_interval_of_a_ratio_holds_the_true_one(drift, monkeypatch):
    def holds(one):
        return one.interval[0] <= 1.1 <= one.interval[1]

    assert share(monkeypatch, holds, drift=drift, ratio=1.1) >= 0.93


@pytest.mark.parametrize("loads", [2, 3, 5])
def test_loads_that_differ_by_chance_are_not_called_different(loads):
    """Each load of either is faster or slower for good, by 1 % or so, beside 1 % of noise a run."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(TRIALS):
        own = np.tile(rng.normal(0, 0.01, (2, loads)), ROUNDS)[:, :ROUNDS]
        a, b = np.exp(own + rng.normal(0, 0.01, (2, ROUNDS)))
        one, other = (Latency("", 1, 1, 0, tuple(x), loads=loads) for x in (a, b))
        wrong += excludes_one(Comparison.of(one, other))
    assert wrong / TRIALS <= 0.06


def test_between_loads_is_the_t_interval_of_their_median_ratios():
    a, b = np.exp(np.random.default_rng(0).normal(0, 0.1, (2, 40)))
    medians = [np.median(np.log(a / b)[load::4]) for load in range(4)]
    wanted = ttest_1samp(medians, 0).confidence_interval(0.95)
    found = between_loads(tuple(a), tuple(b), 4)
    assert np.log(found) == pytest.approx([wanted.low, wanted.high])
    assert between_loads((2.0,) * 6, (1.0,) * 6, 3) == pytest.approx((2.0, 2.0))
    with pytest.raises(ValueError, match="need two loads or more that were timed, found 1"):
        between_loads((1.0,) * 6, (1.0,) * 6, 1)


def test_what_slows_both_in_the_same_rounds_does_not_widen_it():
    """One load's rounds fell into a time when everything took three times as long."""
    slow = np.where(np.arange(100) % 5 == 2, 3.0, 1.0)
    low, high = between_loads(tuple(1.1 * slow), tuple(slow), 5)
    assert (low, high) == pytest.approx((1.1, 1.1))


def test_loads_do_not_hide_three_per_cent_under_two_per_cent_of_noise():
    rng, told = np.random.default_rng(0), 0
    for _ in range(TRIALS):
        a, b = np.exp(rng.normal(0, 0.02, (2, 100)))
        one, other = (Latency("", 1, 1, 0, tuple(x), loads=5) for x in (1.03 * a, b))
        told += Comparison.of(one, other).speed == "slower"
    assert told / TRIALS >= 0.9


# ── Intervals by themselves ─────────────────────────────────────────────────────────


def correlated(rng: np.random.Generator, shape: tuple[int, int], rho: float) -> np.ndarray:
    """Draw rows of unit-normal values, each with so much of the one before it in it."""
    found = rng.standard_normal(shape)
    for place in range(1, shape[1]):
        found[:, place] = rho * found[:, place - 1] + math.sqrt(1 - rho**2) * found[:, place]
    return found


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.5])
@pytest.mark.parametrize(
    ("percent", "count"), [(50, 40), (50, 100), (90, 64), (90, 150), (99, 662)]
)
def test_the_interval_of_a_percentile_holds_the_true_one(percent, count, rho):
    """The true one by the normal distribution, of times that are its exponential."""
    times = np.exp(0.05 * correlated(np.random.default_rng(0), (600, count), rho))
    true = math.exp(0.05 * NormalDist().inv_cdf(percent / 100))
    ends = [percentile_interval(tuple(row), float(percent)) for row in times]
    assert sum(low <= true <= high for low, high in ends) / len(ends) >= 0.93


def test_it_holds_the_true_one_where_a_tenth_of_all_runs_is_disturbed():
    """A mixture: nine in ten take 1 to 1.1 ms, evenly, and one in ten 2 to 4."""
    rng = np.random.default_rng(0)
    for percent, true in ((50.0, 1 + 0.1 * 5 / 9), (90.0, 1.1)):
        held = 0
        for _ in range(400):
            disturbed = rng.random(120) < 0.1
            times = np.where(disturbed, rng.uniform(2, 4, 120), rng.uniform(1, 1.1, 120))
            low, high = percentile_interval(tuple(times), percent)
            held += low <= true <= high
        assert held >= 0.93 * 400


@pytest.mark.parametrize("rho", [0.3, 0.5])
def test_the_interval_of_a_ratio_holds_it_where_runs_resemble_the_one_before(rho):
    rng = np.random.default_rng(0)
    pairs = np.exp(0.03 * correlated(rng, (2 * TRIALS, 100), rho)).reshape(TRIALS, 2, 100)
    ends = [ratio_interval(tuple(2 * a), tuple(b)) for a, b in pairs]
    assert sum(low <= 2 <= high for low, high in ends) / TRIALS >= 0.93


@pytest.mark.parametrize(("percent", "count"), [(50.0, 21), (90.0, 100), (99.0, 700)])
def test_times_in_no_order_have_the_exact_interval_of_their_ranks(percent, count):
    """The chance that so many of n samples lie below the percentile is a binomial's."""
    rng = np.random.default_rng(0)
    spans = []
    for _ in range(200):
        order = tuple(float(x) for x in rng.permutation(count) + 1)
        low, high = percentile_interval(order, percent)
        chance = binom.cdf(high - 1, count, percent / 100) - binom.cdf(
            low - 1, count, percent / 100
        )
        spans.append((chance, high - low, independent(order)))
    assert all(chance >= 0.95 for chance, _, left in spans if left > 0.99 * count)
    assert min(chance for chance, _, _ in spans) >= 0.93


def test_as_many_independent_samples_as_a_series_of_one_correlation_has():
    rng = np.random.default_rng(0)
    for rho in (0.0, 0.5, 0.8):
        left = [independent(tuple(row)) for row in correlated(rng, (50, 2000), rho)]
        assert np.mean(left) == pytest.approx(2000 * (1 - rho) / (1 + rho), rel=0.12)


def test_equal_times_count_in_full_and_lie_on_a_point():
    assert independent((1.0,) * 30) == 30
    assert percentile_interval((7.0,) * 30, 50.0) == (7.0, 7.0)


def test_too_few_times_have_no_interval():
    with pytest.raises(ValueError, match="need 20 samples or more, found 19"):
        percentile_interval((1.0,) * (FEWEST_PAIRS - 1), 50.0)


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 99.9])
def test_as_many_samples_support_a_percentile_as_binomials_say(percent):
    """The fewest of which one beyond the shown one leaves 99 % confidence in it."""
    need = next(n for n in range(2, 9000) if binom.cdf(1, n, 1 - percent / 100) <= 0.01)
    assert SUPPORT[percent] == need
    assert samples_missing(percent, need - 1) == 1
    assert samples_missing(percent, need + 5) == 0


def test_outliers_are_counted_by_tukeys_fences():
    """Quartiles at 25.75 and 75.25, so fences at −48.5 and 149.5, the far at −122.75 and 223.75."""
    times = tuple(float(x) for x in range(1, 100))
    assert outliers((*times, 149.0)) == (0, 0, 0)
    assert outliers((*times, 150.0)) == (0, 1, 0)
    assert outliers((*times, 223.0)) == (0, 1, 0)
    assert outliers((*times, 1e6)) == (0, 1, 1)
    assert outliers((*times, -50.0)) == (1, 0, 0)
