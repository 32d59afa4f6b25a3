"""Distances, each against the formula written out in plain Python; gates, each at its very edge."""

from __future__ import annotations

import math
from fractions import Fraction

import msgspec
import numpy as np
import pytest
from conftest import refused

from exporter.errors import GraphError, ParityError
from exporter.parity import collect_outputs, compare_outputs
from exporter.records import Artefact, Parity, Tolerance

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


def test_a_better_candidate_has_a_negative_accuracy_drop():
    found = compare([[1, 0], [1, 0]], [[1, 0], [0, 1]], labels=np.array([0, 1]))
    assert (found.reference_accuracy, found.accuracy, found.accuracy_drop) == (0.5, 1.0, -0.5)


def test_without_labels_there_is_no_accuracy():
    found = compare()
    assert (found.accuracy, found.reference_accuracy, found.accuracy_drop) == (None, None, None)


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
    figures = (found.max_abs, found.rel_l2, found.sqnr_db, found.cosine, found.agreement)
    assert figures == (None,) * 5
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


@pytest.mark.parametrize(
    "tolerance", [Tolerance(accuracy_drop=1.0), Tolerance(noise_multiple=1e9)], ids=str
)
def test_a_gate_that_there_is_nothing_to_check_with_is_not_passed(tolerance):
    found = compare(tolerance=tolerance)
    (name,) = tolerance.bounds()
    assert found.verdict == "fail"
    assert found.failures == (f"{name} could not be computed on the scans",)


# ── Gates ───────────────────────────────────────────────────────────────────────────

EXACT = Parity(
    inputs="scans",
    samples=4,
    max_abs=0.75,
    rel_l2=0.1,  # log₁₀ of which is −1
    cosine=0.875,
    agreement=0.5,
    accuracy=0.25,
    reference_accuracy=0.5,
    noise_floor=0.05,
    nonfinite_reference=0,
    nonfinite_candidate=0,
    tolerance=Tolerance(),
)
FIGURES = {
    "max_abs": 0.75,
    "rel_l2": 0.1,
    "noise_multiple": 2.0,
    "accuracy_drop": 0.25,
    "sqnr_db": 20.0,
    "cosine": 0.875,
    "agreement": 0.5,
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
    found = gated(max_abs=0.5, rel_l2=0.2, cosine=0.9, agreement=0.5)
    assert [said.split()[0] for said in found.failures] == ["max_abs", "cosine"]
    assert found.verdict == "fail"


def test_without_gates_nothing_was_checked():
    assert compare().verdict == "not checked"
    assert compare().failures == ()


@pytest.mark.parametrize(
    ("right", "of", "gate"), [(98, 100, 0.01), (342, 360, 0.05), (891, 990, 0.1), (7, 10, 0.3)]
)
def test_an_accuracy_that_drops_by_exactly_the_gate_passes(right, of, gate):
    reference = 99 if of == 100 else of
    assert Fraction(reference - right, of) == Fraction(str(gate))
    want, got = np.zeros((of, 2)), np.zeros((of, 2))
    want[:reference, 0], want[reference:, 1] = 1, 1
    got[:right, 0], got[right:, 1] = 1, 1
    found = compare(want, got, labels=np.zeros(of, int), tolerance=Tolerance(accuracy_drop=gate))
    assert found.failures == ()


@pytest.mark.parametrize(("same", "of", "gate"), [(98, 100, 0.98), (342, 360, 0.95), (7, 10, 0.7)])
def test_an_agreement_of_exactly_the_gate_passes_and_one_sample_less_fails(same, of, gate):
    want = np.tile([1.0, 0.0], (of, 1))
    for count, verdict in ((same, "pass"), (same - 1, "fail")):
        got = want.copy()
        got[count:] = [0.0, 1.0]
        assert compare(want, got, tolerance=Tolerance(agreement=gate)).verdict == verdict


STRICTEST = [
    Tolerance(max_abs=0.0),
    Tolerance(rel_l2=0.0),
    Tolerance(noise_multiple=0.0),
    Tolerance(accuracy_drop=0.0),
    Tolerance(sqnr_db=1e300),
    Tolerance(cosine=1.0),
    Tolerance(agreement=1.0),
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
    assert found.failures == ()


def test_an_exact_candidate_is_not_failed_for_float32_pytorch_being_exact_too():
    tolerance = Tolerance(noise_multiple=10.0)
    assert compare(WANT, WANT, noise_floor=0.0, tolerance=tolerance).verdict == "pass"


def test_any_error_is_too_much_where_float32_pytorch_makes_none():
    assert compare(noise_floor=0.0, tolerance=Tolerance(noise_multiple=1e9)).verdict == "fail"


# ── An artefact's verdict ───────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("parities", "verdict"),
    [
        ((), "not checked"),
        ((gated(),), "not checked"),
        ((gated(max_abs=1.0), gated()), "pass"),
        ((gated(max_abs=1.0), gated(max_abs=0.5)), "fail"),
        ((gated(), gated(max_abs=0.5)), "fail"),
    ],
)
def test_an_artefact_passes_only_if_something_was_checked_and_nothing_failed(parities, verdict):
    assert Artefact("fp32", "ort-cpu", None, parity=parities).verdict == verdict


def test_an_artefact_that_could_not_be_made_fails_with_the_reason():
    artefact = Artefact("int8", "tensorrt", None, refused="no kernel")
    assert (artefact.verdict, artefact.failures) == ("fail", ("no kernel",))


def test_the_error_of_a_missed_gate_names_artefact_figure_and_limit():
    from test_renderers import report

    failing = Artefact("int8", "ort-cpu", None, parity=(gated(max_abs=0.5),))
    with refused(ParityError, "int8 on ort-cpu: max_abs 0.75 > 0.5 on the scans", hint=None):
        report(failing).raise_for_parity()
    report(Artefact("int8", "ort-cpu", None, parity=(gated(max_abs=1.0),))).raise_for_parity()


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


@pytest.mark.parametrize(("agreeing", "samples"), [(0, 5), (1, 1), (3, 4), (360, 360), (353, 360)])
def test_what_the_samples_prove_of_agreement_is_the_exact_binomial_bound(agreeing, samples):
    from scipy.stats import binomtest

    want = np.eye(2)[np.zeros(samples, dtype=int)]
    got = np.eye(2)[np.r_[np.zeros(agreeing, dtype=int), np.ones(samples - agreeing, dtype=int)]]
    exact = binomtest(agreeing, samples, alternative="greater").proportion_ci(0.95, "exact")
    proven = compare_outputs(want, got, inputs="x").agreement_proven
    assert proven == pytest.approx(exact.low, abs=1e-12)


def test_perfect_agreement_proves_less_than_perfection():
    """0 of 299 disagreements prove 99 %, 0 of 2,995 prove 99.9 %: the rule of three, exactly."""
    for samples, proven in ((299, 0.99), (2995, 0.999)):
        same = np.eye(2)[np.zeros(samples, dtype=int)]
        bound = compare_outputs(same, same, inputs="x").agreement_proven
        assert bound is not None
        assert bound >= proven
        fewer = compare_outputs(same[1:], same[1:], inputs="x").agreement_proven
        assert fewer is not None
        assert fewer < proven
