"""Which mixture is tried next, and which is chosen: against plain scans and counts by hand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from exporter.parity import compare_outputs
from exporter.records import Budget, Candidate, File, Latency, Sensitivity
from exporter.tune.loop import does_it_pay, tuned
from exporter.tune.search import choose, front, grid, next_count, ranked


def timed(name: str, *milliseconds: float) -> Latency:
    return Latency(name, 1, 1, 0, milliseconds)


def candidate(
    name: str,
    *,
    sqnr: float = 40.0,
    ms: tuple[float, ...] = (1.0,) * 20,
    mb: float = 1.0,
    keep: tuple[str, ...] | None = None,
    lost: int = 0,
) -> Candidate:
    """Return a candidate of that SQNR on 100 samples of two classes, some of them lost."""
    labels = np.arange(100) % 2
    want = np.eye(2)[labels]
    got = want * (1 + 10 ** (-sqnr / 20))
    got[:lost] = got[:lost, ::-1]
    parity = compare_outputs(want, got, inputs="the samples", labels=labels)
    file = File(f"candidates/{name}.onnx", "0" * 64, round(mb * 1e6))
    return Candidate(name, "int8", keep, file, (), (parity,), timed(name, *ms))


def chosen(candidates: list[Candidate], **budget: float | str) -> str | None:
    found = choose(candidates, Budget(**budget)).chosen
    return found.name if found else None


def test_the_row_doubles_with_one_step_between_and_ends_with_all():
    assert grid(20) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert grid(1) == [0, 1]
    assert grid(3) == [0, 1, 2, 3]


@pytest.mark.parametrize("layers", range(1, 40))
def test_the_fewest_layers_that_do_are_found_with_few_tries(layers):
    for fewest in range(layers + 2):  # the last: not even all of them
        tried: dict[int, bool] = {}
        while (count := next_count(tried, layers)) is not None:
            assert count not in tried
            tried[count] = count >= fewest
        within = [count for count, good in tried.items() if good]
        assert min(within, default=layers + 1) == fewest
        assert len(tried) <= 2 + math.ceil(math.log2(layers + 1)) + 2


def test_the_most_sensitive_layer_is_first_and_what_could_not_be_measured_before_it():
    found = [
        Sensitivity("a", 0.1),
        Sensitivity("b", 0.3),
        Sensitivity("c", None),
        Sensitivity("d", 0.0),
    ]
    assert ranked(found) == ["c", "b", "a", "d"]
    assert found[0].sqnr_db == pytest.approx(20.0)
    assert found[3].sqnr_db == math.inf


def test_by_work_the_kept_layers_cost_least_for_the_error_that_is_left():
    """Against all subsets: what a greedy set costs is at most one layer from the best."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        errors, work = rng.random(8), rng.integers(1, 100, 8)
        names = list("abcdefgh")
        found = [Sensitivity(n, float(e)) for n, e in zip(names, errors, strict=True)]
        order = ranked(found, dict(zip(names, map(int, work), strict=True)))
        chosen_error = {n: e**2 for n, e in zip(names, errors, strict=True)}
        cost = dict(zip(names, work, strict=True))
        for count in range(9):
            kept = order[:count]
            left = sum(chosen_error[n] for n in names if n not in kept)
            best = min(
                sum(cost[n] for n in some)
                for size in range(9)
                for some in combinations(names, size)
                if sum(chosen_error[n] for n in names if n not in some) <= left + 1e-12
            )
            assert sum(cost[n] for n in kept) == best


def test_what_is_not_shown_to_be_slower_counts_as_fast():
    """Half a percent slower in every turn is what two loads of one file may differ by."""
    level, few = (1.005,) * 40, (2.0,) * 19
    fast = candidate("fast", sqnr=30, ms=(1.0,) * 40)
    assert chosen([fast, candidate("level", sqnr=50, ms=level)], min_sqnr=20) == "level"
    assert chosen([fast, candidate("slow", sqnr=50, ms=(1.05,) * 40)], min_sqnr=20) == "fast"
    fast = candidate("fast", sqnr=30, ms=(1.0,) * 19)
    assert chosen([fast, candidate("few", sqnr=50, ms=few)], min_sqnr=20) == "few"


def test_the_fastest_within_the_budget_is_chosen_and_of_those_as_fast_the_most_exact():
    fast, alike, slow = (1.0,) * 20, (1.1, 0.9) * 10, (2.0,) * 20
    candidates = [
        candidate("ruined", sqnr=10, ms=(0.1,) * 20),
        candidate("fast", sqnr=30, ms=fast),
        candidate("alike", sqnr=50, ms=alike),
        candidate("exact", sqnr=90, ms=slow),
    ]
    assert chosen(candidates, min_sqnr=20) == "alike"
    assert chosen(candidates, min_sqnr=60) == "exact"
    assert chosen(candidates, min_sqnr=95) is None
    assert chosen(candidates, min_sqnr=5) == "ruined"


def test_the_smallest_and_the_most_exact_are_chosen_within_the_other_side_of_the_budget():
    candidates = [
        candidate("large", sqnr=90, mb=44, ms=(9.0,) * 20),
        candidate("middle", sqnr=60, mb=22, ms=(5.0,) * 20),
        candidate("small", sqnr=40, mb=11, ms=(7.0,) * 20),
    ]
    assert chosen(candidates, objective="size", min_sqnr=30) == "small"
    assert chosen(candidates, objective="size", min_sqnr=50) == "middle"
    assert chosen(candidates, objective="size", min_sqnr=30, max_latency=6) == "middle"
    assert chosen(candidates, objective="sqnr", max_size=30) == "middle"
    assert chosen(candidates, objective="sqnr", max_latency=8, max_size=12) == "small"
    assert chosen(candidates, objective="sqnr", max_size=3) is None
    assert choose(candidates, Budget(objective="sqnr", max_size=3)).nearest.name == "small"
    found = choose(candidates, Budget(min_sqnr=30, max_latency=1))
    assert (found.chosen, found.nearest.name) == (None, "middle")


def test_a_drop_is_counted_in_samples():
    candidates = [
        candidate("losing", lost=2, ms=(1.0,) * 20),
        candidate("right", lost=0, ms=(2.0,) * 20),
    ]
    assert chosen(candidates, max_drop=0.02) == "losing"
    assert chosen(candidates, max_drop=0.019) == "right"
    assert choose(candidates[:1], Budget(max_drop=0.01)).nearest.name == "losing"


def test_the_front_is_what_none_beats_in_all_three():
    candidates = [
        candidate("exact", sqnr=90, ms=(9.0,) * 20, mb=44),
        candidate("beaten", sqnr=40, ms=(10.0,) * 20, mb=45),
        candidate("slow but small", sqnr=40, ms=(12.0,) * 20, mb=11),
        candidate("as slow", sqnr=39, ms=(12.0,) * 20, mb=11),
        candidate("fast", sqnr=20, ms=(2.0,) * 20, mb=50),
    ]
    assert front(candidates) == ("exact", "slow but small", "fast")


def test_a_difference_in_latency_that_is_not_shown_beats_nobody():
    one, other = candidate("one", ms=(1.0, 2.0) * 10), candidate("other", ms=(1.1, 1.9) * 10)
    assert front([one, other]) == ("one", "other")


def test_a_precision_pays_only_where_a_float_is_shown_to_be_slower():
    layers = {"a", "b"}
    float_, mixed = candidate("fp32", ms=(2.0,) * 20), candidate("mixed", keep=("a",))
    (said,) = does_it_pay([float_, mixed], "int8", layers, "here")
    assert said == (
        "INT8 pays here: on here the fastest candidate with INT8 layers, mixed, takes 1.00 ms, "
        "and fp32 takes 2.00 ms (faster)"
    )
    (said,) = does_it_pay([candidate("fp32"), mixed], "int8", layers, "here")
    assert said.startswith("INT8 does not pay here: ")
    every = candidate("all", keep=("a", "b"), ms=(0.5,) * 20)
    (said,) = does_it_pay([float_, mixed, every], "int8", layers, "here")
    assert said.startswith("INT8 does not pay here: ")
    few = candidate("fp32", ms=(2.0,) * 19), candidate("mixed", keep=("a",), ms=(1.0,) * 19)
    (said,) = does_it_pay([*few], "int8", layers, "here")
    assert said.startswith("INT8 is not shown to pay here: ")
    assert said.endswith(" (too few samples)")
    assert list(does_it_pay([mixed], "int8", layers, "here")) == []


def test_a_tuned_profile_changes_one_option_of_one_precision():
    from exporter.profile import load_profile

    profile = load_profile("default", {"precision.int8.options.percentile": 99.0})
    made = tuned(profile, candidate("mixed", keep=("a", "b")))
    assert made.precision["int8"].options == {"percentile": 99.0, "keep": ["a", "b"]}
    assert made.precision["int8"].tolerance == profile.precision["int8"].tolerance
    assert {n: c for n, c in made.precision.items() if n != "int8"} == {
        n: c for n, c in profile.precision.items() if n != "int8"
    }


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"max_drop": 0.002}, "the least latency with an accuracy drop of at most 0.2%"),
        (
            {"objective": "sqnr", "max_latency": 2.5, "max_size": 10},
            "the best SQNR with a latency of at most 2.5 ms and at most 10 MB",
        ),
        ({"objective": "size", "min_sqnr": 45}, "the least size with an SQNR of at least 45 dB"),
    ],
)
def test_a_budget_says_itself_in_words(budget, said):
    assert str(Budget(**budget)) == said
