"""Bounds, each against another way to the same number: scipy, enumeration, simulation, by hand."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest, multinomial, norm

from exporter.evidence import (
    at_least,
    at_most,
    drop_bounds,
    judge_agreement,
    judge_drop,
    samples_for_drop,
    samples_for_share,
    share_bounds,
)

# ── Shares ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("hits", "samples"), [(0, 1), (1, 1), (0, 5), (3, 4), (360, 360), (353, 360), (49_000, 50_000)]
)
def test_what_samples_prove_of_a_share_are_the_exact_binomial_bounds(hits, samples):
    def exact(alternative):
        return binomtest(hits, samples, alternative=alternative).proportion_ci(0.95, "exact")

    least, most = share_bounds(hits, samples)
    assert least == pytest.approx(exact("greater").low, abs=1e-12)
    assert most == pytest.approx(exact("less").high, abs=1e-12)


@pytest.mark.parametrize(("wanted", "needed"), [(0.99, 299), (0.999, 2995), (0.9999, 29_956)])
def test_perfect_agreement_proves_less_than_perfection(wanted, needed):
    """The rule of three, exactly: 3/n, whatever was seen."""
    assert samples_for_share(10, 10, wanted) == needed
    assert share_bounds(needed, needed)[0] >= wanted > share_bounds(needed - 1, needed - 1)[0]


@pytest.mark.parametrize(
    ("hits", "samples", "wanted"), [(355, 360, 0.98), (99, 100, 0.98), (3, 4, 0.7)]
)
def test_so_many_samples_that_hit_as_often_prove_the_share_and_a_tenth_fewer_do_not(
    hits, samples, wanted
):
    needed = samples_for_share(hits, samples, wanted)
    assert needed > samples
    assert share_bounds(math.ceil(needed * hits / samples), needed)[0] >= wanted
    fewer = int(0.9 * needed)
    assert share_bounds(int(fewer * hits / samples), fewer)[0] < wanted


def test_no_number_of_samples_proves_a_share_that_they_do_not_have():
    assert samples_for_share(98, 100, 0.98) is None
    assert samples_for_share(0, 100, 0.5) is None


# ── Drops ───────────────────────────────────────────────────────────────────────────


@cache
def score_bound(lost: int, gained: int, samples: int) -> float:
    """Tango's upper bound, its restricted likelihood maximised by search."""
    if lost == samples:
        return 1.0

    def excess(drop):
        def unlikely(gain):
            loss, same = gain + drop, 1 - 2 * gain - drop
            parts = ((lost, loss), (gained, gain), (samples - lost - gained, same))
            return -sum(n * math.log(max(p, 1e-300)) for n, p in parts if n)

        low, high = max(0.0, -drop), (1 - drop) / 2
        best = minimize_scalar(unlikely, bounds=(low, high), options={"xatol": 1e-12}).x
        best = min((low, best, high), key=unlikely)
        variance = samples * (2 * best + drop - drop**2)
        return (lost - gained - samples * drop) / math.sqrt(variance) + norm.ppf(0.95)

    return brentq(excess, (lost - gained) / samples + 1e-9, 1 - 1e-9, xtol=1e-13)


def outcomes(samples: int, most: int | None = None):
    every = range((samples if most is None else most) + 1)
    return [(b, c) for b, c in itertools.product(every, every) if b + c <= samples]


@pytest.mark.parametrize(
    ("lost", "gained", "samples"), [(0, 0, 5), (1, 0, 6), (2, 1, 7), (1, 3, 6), (0, 5, 5)]
)
def test_the_bound_of_a_drop_is_the_largest_that_the_seen_outcomes_rank_does_not_exclude(
    lost, gained, samples
):
    seen = score_bound(lost, gained, samples) + 1e-7
    no_worse = np.array([o for o in outcomes(samples) if score_bound(*o, samples) <= seen])
    counts = np.column_stack([no_worse, samples - no_worse.sum(axis=1)])

    def included(drop):
        gains = np.linspace(max(0.0, -drop), (1 - drop) / 2, 400)
        chances = [
            multinomial.pmf(counts, samples, [g + drop, g, max(1 - drop - 2 * g, 0.0)]).sum()
            for g in gains
        ]
        return max(chances) > 0.05

    _, bound = drop_bounds(lost, gained, samples)
    assert included(bound - 1e-3)
    assert not included(bound + 1e-3)


@pytest.mark.parametrize("samples", [1, 2, 100, 360, 50_000])
def test_samples_of_which_none_is_lost_or_gained_prove_what_the_rule_of_three_says(samples):
    most = 1 - (0.05 - 1e-6) ** (1 / samples)
    assert drop_bounds(0, 0, samples) == (
        pytest.approx(-most, abs=1e-5 / samples),
        pytest.approx(most, abs=1e-5 / samples),
    )


@pytest.mark.parametrize(("lost", "gained", "samples"), [(2, 1, 360), (0, 3, 20), (40, 20, 160)])
def test_what_one_network_loses_the_other_gains(lost, gained, samples):
    least, most = drop_bounds(lost, gained, samples)
    assert drop_bounds(gained, lost, samples) == (-most, -least)
    assert -1 <= least < (lost - gained) / samples < most <= 1


def test_a_sample_more_that_is_lost_never_proves_a_smaller_drop():
    for lost, gained in itertools.product(range(5), range(5)):
        least, most = drop_bounds(lost, gained + 1, 360)
        for worse in ((lost + 1, gained + 1), (lost, gained)):
            assert drop_bounds(*worse, 360)[0] > least
            assert drop_bounds(*worse, 360)[1] > most


def test_samples_that_are_all_lost_prove_no_bound_from_above():
    assert drop_bounds(7, 0, 7)[1] == 1.0
    assert drop_bounds(0, 7, 7)[0] == -1.0


RATES = [(0.0, 0.0), (0.0083, 0.0), (0.003, 0.003), (0.02, 0.007), (0.05, 0.11), (0.31, 0.17)]


@pytest.mark.parametrize(("loss", "gain"), RATES)
@pytest.mark.parametrize("samples", [9, 40])
def test_each_bound_is_right_in_95_of_100_experiments_counted_out(loss, gain, samples):
    rates = [loss, gain, 1 - loss - gain]
    right = np.zeros(2)
    for lost, gained in outcomes(samples):
        chance = multinomial.pmf([lost, gained, samples - lost - gained], samples, rates)
        if chance > 1e-9:
            least, most = drop_bounds(lost, gained, samples)
            right += chance * np.array([least <= loss - gain, loss - gain <= most])
    assert right.min() >= 0.95 - 1e-6


@pytest.mark.parametrize(("loss", "gain"), RATES)
def test_each_bound_is_right_in_94_of_100_simulated_experiments(loss, gain):
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(40, [loss, gain, 1 - loss - gain], size=2000)
    bounds = np.array([drop_bounds(int(b), int(c), 40) for b, c, _ in drawn])
    assert (bounds[:, 0] <= loss - gain).mean() >= 0.94
    assert (loss - gain <= bounds[:, 1]).mean() >= 0.94


def test_the_score_bound_alone_is_right_as_seldom_as_the_module_says():
    loss, gain = 0.002, 0.0083
    right = sum(
        multinomial.pmf([lost, gained, 360 - lost - gained], 360, [loss, gain, 1 - loss - gain])
        for lost, gained in outcomes(360, most=18)
        if score_bound(lost, gained, 360) >= loss - gain
    )
    assert right == pytest.approx(0.907, abs=5e-4)


def test_so_many_samples_prove_the_drop_that_is_wanted():
    needed = samples_for_drop(0, 0, 360, 0.001)
    assert needed == 2995
    assert drop_bounds(0, 0, needed)[1] <= 0.001 < drop_bounds(0, 0, needed - 1)[1]
    needed = samples_for_drop(2, 1, 100, 0.03)
    assert needed > 100
    about = [drop_bounds(round(0.02 * n), round(0.01 * n), n)[1] for n in (needed // 2, 2 * needed)]
    assert about[0] > 0.03 > about[1]


def test_no_number_of_samples_proves_less_than_the_drop_that_was_seen():
    assert samples_for_drop(3, 0, 100, 0.03) is None
    assert samples_for_drop(5, 0, 100, 0.03) is None


# ── In words ────────────────────────────────────────────────────────────────────────

ON = "on the scans"


@pytest.mark.parametrize(
    ("agreeing", "undecided", "samples", "gate", "met", "said"),
    [
        (360, 0, 360, 0.99, True, "360 of 360 agree on the scans"),
        (
            *(360, 0, 360, 0.999, None),
            "360 of 360 agree on the scans, which proves 99.17%; 99.9% would need 2,995 samples "
            "without a disagreement",
        ),
        (
            *(356, 0, 360, 0.99, None),
            "356 of 360 agree on the scans, which proves 97.47%; at that rate no number of samples "
            "shows 99%",
        ),
        (
            *(350, 10, 360, 0.98, None),
            "350 of 360 agree and 10 are undecided on the scans, which proves 95.33%; at that rate "
            "no number of samples shows 98%",
        ),
        (
            324,
            0,
            360,
            0.98,
            False,
            "agreement at most 0.9249 < 0.98: 324 of 360 agree on the scans",
        ),
    ],
)
def test_what_is_shown_of_an_agreement(agreeing, undecided, samples, gate, met, said):
    assert judge_agreement(agreeing, undecided, samples, gate, ON) == (met, said)


def test_an_agreement_that_more_samples_could_prove_says_about_how_many():
    shown = judge_agreement(357, 0, 360, 0.98, ON)
    assert shown.met is None
    start, needed = shown.said.rsplit("about ", 1)
    assert start == (
        "357 of 360 agree on the scans, which proves 97.86%; at that rate 98% would need "
    )
    assert 360 < int(needed.removesuffix(" samples")) < 720


@pytest.mark.parametrize(
    ("lost", "gained", "gate", "met", "said"),
    [
        (0, 0, 0.01, True, "0 lost and 0 gained of 360 on the scans"),
        (
            *(0, 0, 0.005, None),
            "0 lost and 0 gained of 360 on the scans, which proves a drop of 0.83% at most; 0.5% "
            "would need 598 samples without one lost or gained",
        ),
        (
            *(5, 1, 0.01, None),
            "5 lost and 1 gained of 360 on the scans, which proves a drop of 2.58% at most; at "
            "that rate no number of samples shows 1%",
        ),
        (
            *(30, 0, 0.02, False),
            "accuracy_drop at least 0.06062 > 0.02: 30 lost and 0 gained of 360 on the scans",
        ),
    ],
)
def test_what_is_shown_of_a_drop(lost, gained, gate, met, said):
    assert judge_drop(lost, gained, 360, gate, ON) == (met, said)


def test_a_gate_is_met_at_the_bound_itself_and_no_closer():
    least, most = share_bounds(350, 360)
    verdicts = {
        least: True,
        math.nextafter(least, 1): None,
        most: None,
        math.nextafter(most, 1): False,
    }
    for gate, met in verdicts.items():
        assert judge_agreement(350, 0, 360, gate, ON).met is met
    least, most = drop_bounds(30, 2, 360)
    verdicts = {most: True, math.nextafter(most, 0): None, least: None}
    verdicts[math.nextafter(least, 0)] = False
    for gate, met in verdicts.items():
        assert judge_drop(30, 2, 360, gate, ON).met is met


def test_undecided_samples_can_neither_prove_nor_disprove():
    assert judge_agreement(0, 360, 360, 0.5, ON).met is None
    assert judge_agreement(200, 160, 360, 0.99, ON).met is None
    assert judge_agreement(100, 10, 360, 0.99, ON).met is False


@pytest.mark.parametrize(
    ("share", "least", "most"),
    [
        (0.98999, "98.99%", "99.00%"),
        (0.99, "99.00%", "99.00%"),
        (0.0, "0.00%", "0.00%"),
        (-0.008287, "-0.83%", "-0.82%"),
        (1.0, "100.00%", "100.00%"),
    ],
)
def test_a_bound_in_words_still_holds(share, least, most):
    assert (at_least(share), at_most(share)) == (least, most)
