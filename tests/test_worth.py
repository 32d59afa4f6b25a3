"""Was it worth it? Intervals on simulated times, and what is said and recommended from them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console
from test_renderers import FAILED, NOT_RUN, PASSED, UNSHOWN, report

from exporter.intervals import FEWEST_PAIRS, ratio_interval
from exporter.records import Executed, Execution, Latency
from exporter.renderers import markdown, record, terminal


def times(ratio: float, count: int, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Draw pairs whose medians are so far apart, with a load that hits both of a pair alike."""
    rng = np.random.default_rng(seed)
    load, ours, theirs = np.exp(rng.normal(0, 0.1, (3, count)))
    return tuple(ratio * load * ours), tuple(load * theirs)


@pytest.mark.parametrize("count", [FEWEST_PAIRS, 100])
def test_an_interval_holds_the_true_ratio_as_often_as_it_says(count):
    """95 of 100, less what the bootstrap of few samples and 200 experiments may miss."""
    hits = 0
    for seed in range(200):
        low, high = ratio_interval(*times(1.3, count, seed))
        hits += low <= 1.3 <= high
    assert 180 <= hits <= 200


def test_constant_times_have_their_ratio_and_nothing_around_it():
    assert ratio_interval((3.0,) * 20, (2.0,) * 20) == (1.5, 1.5)


def test_the_same_pairs_and_seed_give_the_same_interval():
    ours, theirs = times(1.0, 40, 0)
    assert ratio_interval(ours, theirs, 1) == ratio_interval.__wrapped__(ours, theirs, 1)


def test_too_few_or_unpaired_times_are_refused():
    with pytest.raises(ValueError, match="need 20 pairs or more, found 19 and 19 times"):
        ratio_interval((1.0,) * 19, (1.0,) * 19)
    with pytest.raises(ValueError, match="found 21 and 20"):
        ratio_interval((1.0,) * 21, (1.0,) * 20)


# ── What follows in the report ──────────────────────────────────────────────────────


def timed(name: str, *samples: float) -> Latency:
    return Latency(name, 1, 1, 10, samples * (40 // len(samples)))


def of(*latencies: Latency):
    return report(
        PASSED, msgspec.structs.replace(FAILED, parity=PASSED.parity), UNSHOWN, latency=latencies
    )


def shown(one) -> str:
    console = Console(file=io.StringIO(), width=400)
    console.print(terminal.render(one, Path("out")))
    return console.file.getvalue()


def test_a_slower_int8_is_said_to_be_and_fp32_recommended():
    one = of(timed("fp32 on ort-cpu", 2.0), timed("int8 on ort-cpu", 3.0))
    (comparison,) = one.comparisons
    assert (comparison.ratio, comparison.interval, comparison.speed) == (1.5, (1.5, 1.5), "slower")
    said = (
        "int8 on ort-cpu is 1.50 times slower (1.50 to 1.50) than fp32 on ort-cpu on this machine "
        "at batch 1: ship fp32 on ort-cpu there"
    )
    assert said in markdown.render(one)
    assert said in shown(one)
    assert one.recommendation.artefact == "fp32 on ort-cpu"
    table = json.loads(record.render(one))
    assert table["comparisons"][0]["speed"] == "slower"
    assert table["recommendation"]["artefact"] == "fp32 on ort-cpu"
    assert record.parse(record.render(one)) == one


def test_a_faster_int8_is_recommended():
    one = of(timed("fp32 on ort-cpu", 4.0), timed("int8 on ort-cpu", 1.0))
    assert "int8 on ort-cpu is 4.00 times faster (4.00 to 4.00) than fp32" in markdown.render(one)
    assert one.recommendation.artefact == "int8 on ort-cpu"
    assert one.recommendation.level == ()


def test_no_difference_is_no_difference():
    one = of(timed("fp32 on ort-cpu", 2.0, 3.0), timed("int8 on ort-cpu", 3.0, 2.0))
    (comparison,) = one.comparisons
    assert comparison.speed == "no significant difference"
    assert "shows no significant difference from fp32 on ort-cpu" in markdown.render(one)
    assert len(one.recommendation.level) == 1


def test_what_two_loads_of_one_file_differ_by_is_no_difference():
    one = of(timed("fp32 on ort-cpu", 1.0), timed("int8 on ort-cpu", 0.991))
    assert one.comparisons[0].interval == pytest.approx((0.991, 0.991))
    assert one.comparisons[0].speed == "no significant difference"
    one = of(timed("fp32 on ort-cpu", 1.0), timed("int8 on ort-cpu", 0.989))
    assert one.comparisons[0].speed == "faster"


def test_few_samples_tell_nothing():
    one = of(
        Latency("fp32 on ort-cpu", 1, 1, 10, (1.0,) * 19),
        Latency("int8 on ort-cpu", 1, 1, 10, (9.0,) * 19),
    )
    (comparison,) = one.comparisons
    assert (comparison.interval, comparison.speed) == (None, "too few samples")
    assert "too few samples to tell (20 or more do)" in markdown.render(one)


def test_what_did_not_pass_is_not_recommended_however_fast():
    one = of(
        timed("fp32 on ort-cpu", 4.0),
        timed("fp16 on ort-cpu", 1.0),
        timed("int8 on ort-cpu", 2.0),
    )
    assert one.recommendation.artefact == "int8 on ort-cpu"
    assert one.recommendation.unproven == (("fp16 on ort-cpu", "not enough evidence"),)
    assert "faster, but not recommended: fp16 on ort-cpu (not enough evidence)" in shown(one)
    pairs = {(c.artefact, c.baseline) for c in one.comparisons}
    assert ("int8 on ort-cpu", "fp16 on ort-cpu") in pairs
    assert ("fp16 on ort-cpu", "fp16 on ort-cpu") not in pairs
    none = report(UNSHOWN, latency=(timed("fp16 on ort-cpu", 1.0),))
    assert none.recommendation.artefact is None
    assert "nothing to recommend" in shown(none)


# ── Did it happen? ──────────────────────────────────────────────────────────────────

RAN = Execution(
    "profile",
    (
        Executed("block1.0", "Conv", "int8", "int8"),
        Executed("block2.0", "Conv", "int8", "fp32", "nobody quantised it"),
        Executed("block3.0", "Conv", "int8", None, "two kernels have its name"),
    ),
)


def test_layers_that_did_not_run_as_asked_are_listed_with_the_reason():
    one = report(msgspec.structs.replace(FAILED, execution=RAN))
    page = markdown.render(one)
    assert "## Did it happen?" in page
    said = "1 of 3 convolutions ran in INT8, 1 not told (by the profile of a run)"
    assert f"int8 on ort-cpu: {said}" in page
    assert said in shown(one)
    assert "INT8 asked for, in FP32: block2.0: nobody quantised it" in page
    assert "INT8 asked for, not told: block3.0: two kernels have its name" in page
    assert record.parse(record.render(one)) == one
    found = json.loads(record.render(one))["variants"][0]["artefacts"][0]["execution"]
    assert (found["hint"], found["counts"]) == (False, {"int8": [1, 3]})
    assert (found["missed"], found["untold"]) == (["block2.0"], ["block3.0"])


def test_a_hint_is_called_one_and_what_is_unknown_is_not_checked():
    fused = Executed("block1.0", "Gemm", "fp16", "fp16", None, ("bias",))
    hinted = msgspec.structs.replace(NOT_RUN, execution=Execution("engine text", (fused,)))
    assert "1 of 1 layers compiled to FP16 (by the text in the engine, a hint" in shown(
        report(hinted)
    )
    assert "fused, of 1: bias in 1, ReLU in 0, sum in 0" in markdown.render(report(hinted))
    unknown = Execution("engine inspector", unknown="no NVIDIA GPU")
    page = shown(report(msgspec.structs.replace(NOT_RUN, execution=unknown)))
    assert "not checked in which type its layers run: no NVIDIA GPU" in page
    assert "ran in" not in page


def test_nothing_is_said_where_nothing_was_asked():
    assert "Did it happen" not in markdown.render(report(PASSED))
