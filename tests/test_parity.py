"""Distances, each against the formula written out in plain Python; gates, each at its very edge.

What samples prove of a share is in test_evidence.py.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import onnx
import pytest
from conftest import refused
from onnx.helper import make_graph, make_tensor, make_tensor_value_info
from scipy.stats import binomtest

from exporter.errors import GraphError, ParityError
from exporter.parity import check_same_interface, collect_outputs, compare_outputs
from exporter.records import Artefact, Fidelity, Parity, Rung, TensorSpec, Tolerance

RNG = np.random.default_rng(0)
WANT = RNG.standard_normal((7, 5)) * 3
GOT = WANT + RNG.standard_normal((7, 5)) * 0.5
LABELS = np.array([0, 1, 2, 3, 4, 0, 1])


def norm(values) -> float:
    return math.sqrt(math.fsum(float(v) ** 2 for v in values))


def compare(want=WANT, got=GOT, **more) -> Parity:
    return compare_outputs(np.asarray(want), np.asarray(got), inputs="scans", **more)


# ── The figures ─────────────────────────────────────────────────────────────────────


def test_every_distance_is_what_its_formula_says():
    found = compare()
    flat_want, flat_got = WANT.ravel().tolist(), GOT.ravel().tolist()
    difference = [y - r for y, r in zip(flat_got, flat_want, strict=True)]
    relative = norm(difference) / norm(flat_want)
    cosines = [
        math.fsum(a * b for a, b in zip(y, r, strict=True)) / (norm(y) * norm(r))
        for y, r in zip(GOT.tolist(), WANT.tolist(), strict=True)
    ]
    assert found.max_abs == max(map(abs, difference))
    assert found.rel_l2 == pytest.approx(relative, rel=1e-14)
    assert found.sqnr_db == pytest.approx(-20 * math.log10(relative), rel=1e-14)
    assert found.cosine == pytest.approx(min(cosines), rel=1e-14)
    assert (found.inputs, found.samples) == ("scans", 7)


def test_agreement_and_accuracy_are_counted_by_hand():
    want = [[3, 1, 2], [1, 3, 2], [1, 2, 3], [3, 2, 1]]  # 0 1 2 0
    got = [[3, 1, 2], [3, 1, 2], [1, 2, 3], [1, 2, 3]]  # 0 0 2 2
    found = compare(want, got, labels=np.array([0, 1, 2, 2]))
    assert found.agreement == 2 / 4
    assert found.reference_accuracy == 3 / 4
    assert found.accuracy == 3 / 4
    assert found.accuracy_drop == 0.0
    assert (found.agreeing, found.lost, found.gained, found.reference_correct) == (2, 1, 1, 3)
    assert (found.classes, found.labels, found.undecided) == (3, 3, 0)


def test_a_better_candidate_has_a_negative_accuracy_drop():
    found = compare([[1, 0], [1, 0]], [[1, 0], [0, 1]], labels=np.array([0, 1]))
    assert (found.reference_accuracy, found.accuracy, found.accuracy_drop) == (0.5, 1.0, -0.5)


def test_without_labels_there_is_no_accuracy():
    found = compare()
    assert (found.accuracy, found.reference_accuracy, found.accuracy_drop) == (None, None, None)
    assert (found.accuracy_drop_bounds, found.labels) == (None, None)


def test_the_margin_used_is_that_of_the_worst_sample_and_the_worst_other_class():
    want = [[5.0, 1.0, 3.0], [2.0, 6.0, 0.0]]  # margins 4 and 2; 4 and 6
    got = [[5.0, 2.0, 3.5], [2.5, 5.5, 0.0]]  # 1/4 and 0.5/2; 1/4 and 0.5/6
    assert compare(want, got).margin_used == 0.25
    assert compare(want, [[5.0, 1.0, 4.5], [2.0, 6.0, 0.0]]).margin_used == 0.75
    assert compare(want, [[4.0, 1.0, 4.5], [2.0, 6.0, 0.0]]).margin_used == 1.25


def test_a_sample_flips_where_all_of_its_margin_is_used_and_not_before():
    rng = np.random.default_rng(3)
    want, noise = rng.standard_normal((40, 6)), rng.standard_normal((40, 6))
    for size in (0.001, 0.01, 0.1, 0.3, 1.0):
        found = compare(want, want + size * noise)
        assert (found.margin_used < 1) == (found.agreement == 1)


def test_what_is_the_same_or_shifted_as_a_whole_has_used_no_margin():
    assert compare(WANT, WANT.copy()).margin_used == 0
    assert compare([[4.0, 1.0], [1.0, 3.0]], [[7.0, 4.0], [9.0, 11.0]]).margin_used == 0
    assert compare([[4.0, 1.0], [1.0, 3.0]], [[8.0, 2.0], [2.0, 6.0]]).margin_used == -1


def test_samples_whose_largest_output_is_there_twice_are_undecided_and_counted_apart():
    want = [[2.0, 2.0, 1.0], [3.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 4.0]]
    found = compare(want, [[2.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 0.0], [5.0, 1.0, 4.0]])
    assert (found.undecided, found.agreeing, found.agreement) == (2, 1, 0.5)
    assert found.margin_used == pytest.approx(4 / 3)
    least = binomtest(1, 4, alternative="greater").proportion_ci(0.95, "exact").low
    most = binomtest(3, 4, alternative="less").proportion_ci(0.95, "exact").high
    assert found.agreement_proven == pytest.approx(least, abs=1e-12)
    assert found.agreement_possible == pytest.approx(most, abs=1e-12)


def test_where_nothing_is_decided_there_is_no_margin_and_no_agreement():
    for want in (np.zeros((3, 4)), np.ones((3, 1)), np.tile([1.0, 2.0, 2.0], (3, 1))):
        assert compare(want, want + 1).margin_used is None
    assert compare(np.zeros((3, 4)), np.zeros((3, 4))).agreement is None


@pytest.mark.parametrize("scale", [1e308, 1e200, 1e-200, 1e-300, 1e-323])
def test_no_scale_takes_the_margin_used_out_of_the_finite(scale):
    want = np.array([[1.0, -1.0], [0.5, 1.5]]) * scale
    for got in (want, -want, want[::-1], np.full((2, 2), 1e308), np.array([[-1e308, 1e308]] * 2)):
        found = compare(want, got)
        assert found.margin_used is None or math.isfinite(found.margin_used)


def test_the_error_is_counted_in_multiples_of_float32s_own():
    found = compare([[3.0, 4.0]], [[3.0, 4.5]], noise_floor=0.025)
    assert found.rel_l2 == pytest.approx(0.1)
    assert found.noise_multiple == pytest.approx(4.0)
    assert compare().noise_multiple is None


def test_cosine_is_the_worst_samples_and_knows_the_sign():
    found = compare([[1, 0], [1, 0], [1, 0]], [[2, 0], [0, 2], [-3, 0]])
    assert found.cosine == pytest.approx(-1)
    assert compare([[1, 0], [2, 2]], [[1, 1], [5, 5]]).cosine == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    ("want", "got", "rel_l2", "max_abs"),
    [
        ([[3.0, 4.0]], [[3.0, 4.0]], 0.0, 0.0),
        ([[3.0, 4.0]], [[0.0, 0.0]], 1.0, 4.0),
        ([[3.0, 4.0]], [[-3.0, -4.0]], 2.0, 8.0),
        ([[0.0, 0.0]], [[0.0, 0.0]], 0.0, 0.0),
        ([[0.0, 0.0]], [[0.0, 1.0]], None, 1.0),
        ([[0.0, 0.0], [0.0, 4.0]], [[3.0, 0.0], [0.0, 4.0]], 0.75, 3.0),
    ],
)
def test_distances_known_by_heart(want, got, rel_l2, max_abs):
    found = compare(want, got)
    assert found.rel_l2 == (None if rel_l2 is None else pytest.approx(rel_l2))
    assert found.max_abs == max_abs


def test_no_difference_at_all_is_infinitely_good():
    assert compare(WANT, WANT.copy()).sqnr_db == math.inf
    assert compare(np.zeros((2, 3)), np.zeros((2, 3))).sqnr_db == math.inf


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e300, 1e-300, 1e-310, 1.0])
def test_the_scale_of_the_outputs_changes_no_relative_figure(scale):
    found = compare([[3 * scale, 4 * scale], [1 * scale, 0.0]], [[3 * scale, 0.0], [0.0, scale]])
    assert found.rel_l2 == pytest.approx(math.sqrt(18 / 26), rel=1e-9)
    assert found.cosine == pytest.approx(0.0, abs=1e-12)
    assert found.max_abs == 4 * scale
    assert not found.failures


def test_outputs_at_the_end_of_the_range_have_an_error_all_the_same():
    found = compare([[1e308, 0.0], [0.0, 1e308]], [[-1e308, 0.0], [0.0, -1e308]])
    assert found.rel_l2 == pytest.approx(2.0)
    assert found.max_abs == np.finfo(float).max
    assert found.verdict == "not checked"


@pytest.mark.parametrize("small", [1e-200, 1e-310])
def test_one_huge_sample_does_not_hide_what_another_ones_cosine_is(small):
    found = compare([[1e200, 0], [small, 0]], [[1e200, 0], [-small, 0]])
    assert found.cosine == pytest.approx(-1)


@pytest.mark.parametrize("huge", [1e100, 1e200, 1e300])
def test_a_candidate_out_of_all_proportion_meets_no_gate(huge):
    found = compare([[1 / huge, 0.0]], [[huge, 0.0]], tolerance=Tolerance(rel_l2=1e90))
    assert found.verdict == "fail"


def test_a_zero_sample_has_no_direction_so_it_is_never_a_perfect_one():
    assert compare([[1.0, 2.0]], [[0.0, 0.0]]).cosine <= 0
    assert compare([[0.0, 0.0]], [[1.0, 2.0]]).cosine is None or (
        compare([[0.0, 0.0]], [[1.0, 2.0]]).cosine <= 0
    )


def test_halves_are_compared_in_float64():
    want, got = np.array([[60000.0, 1.0]], np.float16), np.array([[-60000.0, 1.0]], np.float16)
    found = compare(want, got)
    assert found.max_abs == 120_000.0
    assert found.rel_l2 == pytest.approx(120_000 / math.hypot(60_000, 1))


def test_neither_array_is_changed():
    want, got = WANT.copy(), GOT.copy()
    compare(want, got, labels=LABELS)
    assert np.array_equal(want, WANT)
    assert np.array_equal(got, GOT)


# ── What is not finite ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "candidate", "both"])
def test_a_value_that_is_not_finite_fails_without_any_gate_and_whatever_argmax_says(bad, side):
    want, got = WANT.copy(), WANT.copy()
    if side != "candidate":
        want[3, 2] = bad
    if side != "reference":
        got[3, 2] = bad
    assert (want.argmax(axis=1) == got.argmax(axis=1)).all() or side != "both"
    found = compare(want, got, labels=LABELS, noise_floor=1e-7)
    assert found.verdict == "fail"
    sides = ["reference", "candidate"] if side == "both" else [side]
    assert found.failures == tuple(
        f"1 outputs of the {who} are NaN or infinite on the scans" for who in sides
    )
    figures = (found.max_abs, found.rel_l2, found.sqnr_db, found.cosine, found.margin_used)
    assert figures == (None,) * 5
    assert (found.agreement, found.agreement_proven, found.agreement_possible) == (None,) * 3
    assert (found.accuracy, found.accuracy_drop, found.noise_multiple) == (None, None, None)


def test_every_value_that_is_not_finite_is_counted_on_its_side():
    want, got = WANT.copy(), GOT.copy()
    want[0], got[1:3] = math.inf, math.nan
    found = compare(want, got)
    assert (found.nonfinite_reference, found.nonfinite_candidate) == (5, 10)


def test_a_gate_without_its_figure_fails_too():
    got = GOT.copy()
    got[0, 0] = math.nan
    found = compare(got=got, tolerance=Tolerance(max_abs=1e9, agreement=0.0))
    assert "max_abs could not be computed on the scans" in found.failures
    assert "agreement could not be computed on the scans" in found.failures


def test_values_that_are_not_finite_fail_on_data_that_could_not_pass_either():
    same = np.full((4, 3), math.nan)
    found = compare(same, same, labels=np.zeros(4, int), tolerance=Tolerance(agreement=0.5))
    assert found.verdict == "fail"
    assert "12 outputs of the candidate are NaN or infinite on the scans" in found.failures


def test_a_distance_that_there_is_nothing_to_compute_from_is_not_passed():
    found = compare(tolerance=Tolerance(noise_multiple=1e9))
    assert found.verdict == "fail"
    assert found.failures == ("noise_multiple could not be computed on the scans",)


def test_a_drop_in_accuracy_cannot_be_shown_without_labels():
    found = compare(tolerance=Tolerance(accuracy_drop=1.0))
    assert (found.verdict, found.failures) == ("not enough evidence", ())
    assert found.unproven == ("accuracy_drop needs labels on the scans",)


# ── Gates ───────────────────────────────────────────────────────────────────────────

EXACT = Parity(
    inputs="scans",
    samples=4,
    max_abs=0.75,
    rel_l2=0.1,  # log₁₀ of which is −1
    cosine=0.875,
    margin_used=0.5,
    noise_floor=0.05,
    agreeing=4,
    undecided=0,
    classes=2,
    labels=2,
    reference_correct=2,
    lost=1,
    gained=0,
    constant=(),
    nonfinite_reference=0,
    nonfinite_candidate=0,
    tolerance=Tolerance(),
)
FIGURES = {
    "max_abs": 0.75,
    "rel_l2": 0.1,
    "noise_multiple": 2.0,
    "sqnr_db": 20.0,
    "cosine": 0.875,
}


def gated(**bounds: float) -> Parity:
    return msgspec.structs.replace(EXACT, tolerance=Tolerance(**bounds))


@pytest.mark.parametrize(("name", "figure"), FIGURES.items())
def test_a_figure_exactly_at_its_gate_passes(name, figure):
    found = gated(**{name: figure})
    assert (found.verdict, found.failures) == ("pass", ())


@pytest.mark.parametrize(("name", "figure"), FIGURES.items())
def test_a_figure_just_beyond_its_gate_fails_and_just_inside_passes(name, figure):
    below, above = math.nextafter(figure, -math.inf), math.nextafter(figure, math.inf)
    beyond, inside = (below, above) if name in Tolerance.UPPER else (above, below)
    assert gated(**{name: beyond}).verdict == "fail"
    assert gated(**{name: inside}).verdict == "pass"


@pytest.mark.parametrize(("name", "figure"), FIGURES.items())
def test_a_missed_gate_says_the_figure_the_limit_and_the_inputs(name, figure):
    limit = figure / 2 if name in Tolerance.UPPER else (figure + 1) / 2 if figure < 1 else 30.0
    (said,) = gated(**{name: limit}).failures
    sign = ">" if name in Tolerance.UPPER else "<"
    assert said == f"{name} {figure:g} {sign} {limit:g} on the scans"


@pytest.mark.parametrize(("name", "figure"), FIGURES.items())
def test_a_gate_missed_by_little_does_not_read_as_if_it_were_met(name, figure):
    limit = figure * (1 - 1e-7 if name in Tolerance.UPPER else 1 + 1e-7)
    (said,) = gated(**{name: limit}).failures
    _, shown, _, bound, *_ = said.split()
    assert shown != bound


def test_every_missed_gate_is_said_and_every_met_one_is_not():
    found = gated(max_abs=0.5, rel_l2=0.2, cosine=0.9, agreement=0.25)
    assert [said.split()[0] for said in found.failures] == ["max_abs", "cosine"]
    assert found.verdict == "fail"


def test_without_gates_nothing_was_checked():
    assert compare().verdict == "not checked"
    assert (compare().failures, compare().unproven) == ((), ())


def counted(agreeing: int, samples: int, **more) -> Parity:
    """Compare so many samples of two classes in turn, of which so many agree; right is class 0."""
    want = np.eye(2)[np.arange(samples) % 2]
    got = want.copy()
    got[agreeing:] = want[agreeing:, ::-1]
    return compare(want, got, **more)


@pytest.mark.parametrize(
    ("agreeing", "verdict"), [(360, "pass"), (359, "not enough evidence"), (340, "fail")]
)
def test_an_agreement_is_met_where_the_samples_prove_it_and_missed_where_they_prove_that(
    agreeing, verdict
):
    """Of 360, 360 prove 99.17 % and 359 prove 98.69 %; 340 prove 96.2 % at most."""
    found = counted(agreeing, 360, tolerance=Tolerance(agreement=0.99))
    assert found.verdict == verdict
    assert (len(found.failures), len(found.unproven)) == {
        "pass": (0, 0),
        "not enough evidence": (0, 1),
        "fail": (1, 0),
    }[verdict]


@pytest.mark.parametrize(
    ("lost", "verdict"), [(0, "pass"), (1, "not enough evidence"), (20, "fail")]
)
def test_a_drop_is_met_where_the_samples_prove_it_and_missed_where_they_prove_that(lost, verdict):
    """Of 360 samples, none lost proves a drop of 0.83 % at most, and 20 lost prove 3.7 %."""
    found = counted(
        360 - lost, 360, labels=np.arange(360) % 2, tolerance=Tolerance(accuracy_drop=0.01)
    )
    assert (found.lost, found.gained, found.verdict) == (lost, 0, verdict)


def test_a_gate_that_is_not_shown_says_what_was_seen_what_it_proves_and_what_is_needed():
    found = counted(360, 360, tolerance=Tolerance(agreement=0.999))
    assert found.unproven == (
        "360 of 360 agree on the scans, which proves 99.17%; 99.9% would need 2,995 samples "
        "without a disagreement",
    )


def test_a_missed_distance_outweighs_a_share_that_is_not_shown():
    found = counted(359, 360, tolerance=Tolerance(agreement=0.999, max_abs=0.5))
    assert found.verdict == "fail"
    assert found.failures == ("max_abs 1 > 0.5 on the scans",)
    assert len(found.unproven) == 1


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        ({"agreement": 1.0}, ("agreement", "below 1", "no number of samples", "found 1.0")),
        ({"accuracy_drop": 0.0}, ("accuracy_drop", "above 0", "no number of samples", "found 0.0")),
    ],
)
def test_a_gate_that_no_number_of_samples_can_prove_is_refused(gates, said):
    with pytest.raises(ValueError, match=".*".join(said)):
        Tolerance(**gates)


STRICTEST = [
    Tolerance(max_abs=0.0),
    Tolerance(rel_l2=0.0),
    Tolerance(noise_multiple=0.0),
    Tolerance(sqnr_db=1e300),
    Tolerance(cosine=1.0),
]


@pytest.mark.parametrize("tolerance", STRICTEST, ids=lambda t: next(iter(t.bounds())))
@pytest.mark.parametrize(
    "outputs",
    [WANT, WANT * 1e200, np.concatenate([WANT, np.zeros((1, 5))])],
    ids=["any", "huge", "one sample all zero"],
)
def test_outputs_that_are_the_same_bit_for_bit_meet_the_strictest_gates(outputs, tolerance):
    labels = np.arange(len(outputs)) % 5
    found = compare(outputs, outputs.copy(), labels=labels, noise_floor=1e-7, tolerance=tolerance)
    assert (found.failures, found.verdict) == ((), "pass")


def test_an_exact_candidate_is_not_failed_for_float32_pytorch_being_exact_too():
    tolerance = Tolerance(noise_multiple=10.0)
    assert compare(WANT, WANT, noise_floor=0.0, tolerance=tolerance).verdict == "pass"


def test_any_error_is_too_much_where_float32_pytorch_makes_none():
    assert compare(noise_floor=0.0, tolerance=Tolerance(noise_multiple=1e9)).verdict == "fail"


# ── Data that show nothing ──────────────────────────────────────────────────────────

MET = Tolerance(max_abs=1.0, sqnr_db=-100.0)
TURNS = np.eye(3)[np.arange(6) % 3]  # every class in turn
ONE_CLASS = np.array([[5.0, 1.0, 2.0], [6.0, 1.0, 2.0], [5.0, 3.0, 2.0]])
TIES = np.array([[2.0, 2.0, 1.0], [0.0, 3.0, 3.0], [7.0, 7.0, 7.0]])


@pytest.mark.parametrize(
    ("outputs", "labels", "said"),
    [
        (TURNS[:1], [0], "one sample alone shows nothing on the scans"),
        (TURNS[:1], None, "one sample alone shows nothing on the scans"),
        (
            *(ONE_CLASS, [0, 1, 2]),
            "the reference's largest output is the same for every sample on the scans",
        ),
        (TURNS, [1] * 6, "the labels are of one class alone on the scans"),
        (TIES, [0, 1, 2], "the reference has no one largest output for any sample on the scans"),
        (
            *(np.tile([3.0, 1.0, 2.0], (4, 1)), [0, 1, 2, 0]),
            "the reference's output is the same for every sample on the scans",
        ),
        (
            *(np.zeros((4, 3)), None),
            "the reference's output is the same for every sample on the scans",
        ),
        (
            *(np.full((4, 3), 7.0), [0, 1, 2, 0]),
            "the reference's output is the same for every sample on the scans",
        ),
    ],
)
def test_data_that_show_nothing_never_pass_however_near_the_outputs_are(outputs, labels, said):
    labels = None if labels is None else np.array(labels)
    found = compare(outputs, outputs.copy(), labels=labels, tolerance=MET)
    assert found.failures == ()
    assert found.verdict == "not enough evidence"
    assert said in found.unproven
    assert compare(outputs, outputs.copy(), labels=labels).verdict == "not checked"


def test_a_candidate_that_always_gives_the_same_does_not_pass():
    found = compare(TURNS, np.full((6, 3), 0.5), tolerance=MET)
    assert found.unproven == ("the candidate's output is the same for every sample on the scans",)
    assert found.verdict == "not enough evidence"


def test_a_missed_gate_is_missed_on_data_that_show_nothing_too():
    found = compare(ONE_CLASS, ONE_CLASS + 2, labels=np.array([0, 0, 0]), tolerance=MET)
    assert found.verdict == "fail"


def test_noise_is_judged_by_distances_though_a_network_sees_one_class_in_it():
    assert compare(ONE_CLASS, ONE_CLASS.copy(), tolerance=MET).verdict == "pass"
    both = Tolerance(max_abs=1.0, agreement=0.01)
    assert compare(ONE_CLASS, ONE_CLASS.copy(), tolerance=both).verdict == "not enough evidence"


def test_samples_without_labels_are_judged_by_agreement_and_have_no_accuracy():
    found = counted(360, 360, tolerance=Tolerance(agreement=0.99))
    assert (found.verdict, found.accuracy, found.labels) == ("pass", None, None)


# ── An artefact's verdict ───────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("parities", "verdict"),
    [
        ((), "not checked"),
        ((gated(),), "not checked"),
        ((gated(max_abs=1.0), gated()), "pass"),
        ((gated(max_abs=1.0), gated(max_abs=0.5)), "fail"),
        ((gated(), gated(max_abs=0.5)), "fail"),
        ((gated(agreement=0.999),), "not enough evidence"),
        ((gated(max_abs=1.0), gated(agreement=0.999)), "not enough evidence"),
        ((gated(agreement=0.999), gated(max_abs=0.5)), "fail"),
        ((gated(agreement=0.999), gated()), "not enough evidence"),
    ],
)
def test_quality_passes_only_if_something_was_checked_and_all_was_shown(parities, verdict):
    assert Artefact("fp32", "ort-cpu", None, parity=parities).quality == verdict


def faithful(multiple: float | None) -> Rung:
    fidelity = Fidelity("PyTorch", 12, multiple, None if multiple is None else 1.0, limit=4.0)
    return Rung("fp32 on ort-cpu", "folded", 360, 0.0, 0.0, 0, 0, fidelity)


@pytest.mark.parametrize(
    ("parity", "multiple", "verdict"),
    [
        (gated(max_abs=1.0), 0.5, "pass"),
        (gated(max_abs=1.0), 4.1, "fail"),
        (gated(max_abs=0.5), 0.5, "fail"),
        (gated(agreement=0.999), 0.5, "not enough evidence"),
        (gated(agreement=0.999), 4.1, "fail"),
        (gated(max_abs=1.0), None, "not checked"),
        (gated(), 0.5, "not checked"),
    ],
)
def test_an_artefact_passes_only_if_it_is_both_faithful_and_good_enough(parity, multiple, verdict):
    artefact = Artefact("fp32", "ort-cpu", None, parity=(parity,), rung=faithful(multiple))
    assert artefact.verdict == verdict


def test_an_artefact_that_could_not_be_made_fails_with_the_reason():
    artefact = Artefact("int8", "tensorrt", None, refused="no kernel")
    assert (artefact.verdict, artefact.failures) == ("fail", ("no kernel",))


def test_the_error_of_a_missed_gate_names_artefact_figure_and_limit():
    from test_renderers import report

    failing = Artefact("int8", "ort-cpu", None, parity=(gated(max_abs=0.5),))
    with refused(ParityError, "int8 on ort-cpu: max_abs 0.75 > 0.5 on the scans", hint=None):
        report(failing).raise_for_parity()
    report(Artefact("int8", "ort-cpu", None, parity=(gated(max_abs=1.0),))).raise_for_parity()


def test_a_gate_that_was_not_shown_to_be_met_raises_too_and_says_what_is_missing():
    from test_renderers import report

    unshown = Artefact("int8", "ort-cpu", None, parity=(gated(agreement=0.999),))
    with refused(
        ParityError, "int8 on ort-cpu: 4 of 4 agree on the scans", "2,995 samples", hint=None
    ):
        report(unshown).raise_for_parity()
    assert report(unshown).verdict == "not enough evidence"
    passed = Artefact("fp32", "ort-cpu", None, parity=(gated(max_abs=1.0),))
    failed = Artefact("fp16", "ort-cpu", None, parity=(gated(max_abs=0.5),))
    assert report(passed, unshown).verdict == "not enough evidence"
    assert report(passed, unshown, failed).verdict == "fail"


# ── Shapes ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("want", "got"),
    [
        ((2, 3), (2, 4)),
        ((2, 3), (3, 3)),
        ((2, 3), (1, 3)),
        ((2, 3), (2, 1)),
        ((2, 3), (3,)),
        ((3,), (3,)),
        ((2, 3, 1), (2, 3, 1)),
        ((0, 3), (0, 3)),
        ((2, 0), (2, 0)),
        ((), ()),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused_with_both_shapes(want, got):
    with refused(GraphError, "cannot compare", str(got), str(want)):
        compare(np.ones(want), np.ones(got))


# ── Collecting ──────────────────────────────────────────────────────────────────────


def batches(*sizes: int):
    start = 0
    for size in sizes:
        yield {"x": np.arange(start, start + size, dtype=np.float32)}
        start += size


def doubled(feed):
    two = np.stack([2 * feed["x"], -feed["x"]], axis=1)
    return {"y": two.reshape(len(two), 2, 1, 1), "other": two + 1}


def test_outputs_are_collected_in_order_flat_in_float64_and_without_what_is_over():
    told = []
    found = collect_outputs(doubled, batches(3, 3), "y", samples=5, advance=lambda: told.append(1))
    assert found.dtype == np.float64
    assert found.tolist() == [[0, 0], [2, -1], [4, -2], [6, -3], [8, -4]]
    assert len(told) == 2


def test_an_output_of_another_name_is_refused_with_the_names_there_are():
    with refused(GraphError, "no output named 'logits'", "'y', 'other'"):
        collect_outputs(doubled, batches(2), "logits", samples=2)


def test_an_output_without_a_row_for_each_sample_is_refused():
    feeds = list(batches(3, 3))
    for value, shape in ((np.ones((2, 4)), "(2, 4)"), (np.float32(1), "()"), (np.ones(0), "(0,)")):
        with refused(GraphError, "output 'y' is", shape, "for a batch of 3"):
            collect_outputs(lambda feed, value=value: {"y": value}, feeds, "y", samples=6)


def test_an_output_that_changes_its_size_between_batches_is_refused():
    sizes = iter((4, 5))
    with refused(GraphError, "output 'y' has 5 values a sample, and had 4 before"):
        collect_outputs(
            lambda feed: {"y": np.ones((3, next(sizes)))}, batches(3, 3), "y", samples=6
        )


# ── Interfaces ──────────────────────────────────────────────────────────────────────

INPUT, OUTPUT = TensorSpec("input", (1, 8, 8)), TensorSpec("logits", (10,))
FLOAT, HALF, INT64 = (getattr(onnx.TensorProto, kind) for kind in ("FLOAT", "FLOAT16", "INT64"))


def declaring(
    *inputs: tuple, outputs: tuple = (("logits", FLOAT, ["batch", 10]),), stored: tuple = ()
) -> onnx.GraphProto:
    """Return a graph that says what it takes and gives, and does nothing."""
    given = inputs or (("input", FLOAT, ["batch", 1, 8, 8]),)
    return make_graph(
        [],
        "main",
        [make_tensor_value_info(*value) for value in given],
        [make_tensor_value_info(*value) for value in outputs],
        [make_tensor(name, FLOAT, [1], [1.0]) for name in stored],
    )


def checked(graph: onnx.GraphProto, **more) -> None:
    check_same_interface(graph, "n.onnx", input=INPUT, output=OUTPUT, **more)


@pytest.mark.parametrize("batch", ["batch", None, 1, 32])
def test_the_batch_axis_may_be_free_or_fixed(batch):
    checked(
        declaring(
            ("input", FLOAT, [batch, 1, 8, 8]),
            outputs=(("logits", FLOAT, [batch, 10]),),
        )
    )


def test_a_constant_among_the_inputs_is_none():
    given = (("input", FLOAT, ["batch", 1, 8, 8]), ("w", FLOAT, [1]))
    checked(declaring(*given, stored=("w",)))
    with refused(GraphError, "n.onnx takes 'input' N×1×8×8 float32 and 'w' N float32, and"):
        checked(declaring(*given))


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (("x", FLOAT, ["n", 1, 8, 8]), "'x' N×1×8×8 float32"),
        (("input", FLOAT, ["n", 3, 8, 8]), "'input' N×3×8×8 float32"),
        (("input", FLOAT, ["n", 1, 8]), "'input' N×1×8 float32"),
        (("input", FLOAT, ["n", 1, "height", None]), "'input' N×1×'height'×'' float32"),
        (("input", FLOAT, []), "'input' no axes float32"),
        (("input", FLOAT, None), "'input' of unknown shape"),
        (("input", HALF, ["n", 1, 8, 8]), "'input' N×1×8×8 float16"),
        (("input", INT64, ["n", 1, 8, 8]), "'input' N×1×8×8 int64"),
        (("input", onnx.TensorProto.DOUBLE, ["n", 1, 8, 8]), "'input' N×1×8×8 float64"),
    ],
)
def test_an_input_of_another_name_shape_or_type_is_refused_in_one_sentence(declared, said):
    with refused(
        GraphError,
        f"n.onnx takes {said}, and the reference takes 'input' N×1×8×8 float32",
        hint=None,
    ):
        checked(declaring(declared))


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ((("y", FLOAT, ["n", 10]),), "'y' N×10 float32"),
        ((("logits", FLOAT, ["n", 9]),), "'logits' N×9 float32"),
        ((("logits", HALF, ["n", 10]),), "'logits' N×10 float16"),
        (
            (("logits", FLOAT, ["n", 10]), ("more", FLOAT, ["n", 2])),
            "'logits' N×10 float32 and 'more' N×2 float32",
        ),
        ((), "nothing"),
    ],
)
def test_an_output_of_another_name_shape_or_type_is_refused_in_one_sentence(outputs, said):
    with refused(
        GraphError, f"n.onnx gives {said}, and the reference gives 'logits' N×10 float32", hint=None
    ):
        checked(declaring(outputs=outputs))


def test_halves_are_taken_where_they_are_allowed_and_nowhere_else():
    half = declaring(("input", HALF, ["n", 1, 8, 8]), outputs=(("logits", HALF, ["n", 10]),))
    checked(half, dtypes=("float16",))
    checked(half, dtypes=("float32", "float16"))
    with refused(GraphError, "float16, and the reference takes 'input' N×1×8×8 float32"):
        checked(half)
    with refused(GraphError, "takes 'input' N×1×8×8 float32, and", "N×1×8×8 float16"):
        checked(declaring(), dtypes=("float16",))


def test_what_the_exporter_writes_has_the_interface_it_was_asked_for(tiny_onnx):
    check_same_interface(
        onnx.load(tiny_onnx.path).graph, "tiny", input=tiny_onnx.input, output=tiny_onnx.output
    )
