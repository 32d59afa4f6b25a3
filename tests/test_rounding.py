"""The model of rounding, against float32 sums carried out one after another."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from exporter.emulation.operators import OPERATORS
from exporter.emulation.rounding import (
    BFLOAT16,
    BOUNDED,
    DOUBLE,
    EXACT,
    FLOAT,
    FLOAT16,
    FUNCTIONS,
    LAYERS,
    NORMS,
    REDUCTIONS,
    SUMS,
    input_variance,
    round_to,
    variance,
)

RNG = np.random.default_rng(0)
COUNTS = [1, 2, 3, 9, 64, 576, 5000]
CASES = {1: 4000, 2: 4000, 3: 4000, 9: 4000, 64: 3000, 576: 1500, 5000: 800}


def double(value: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(value, dtype=np.float64))


def in_turn(terms: np.ndarray) -> np.ndarray:
    """Sum up float32 rows one after another, each partial sum rounded."""
    return np.cumsum(terms, axis=1, dtype=np.float32)[:, -1]


def ratio(got: np.ndarray, exact: np.ndarray, model: torch.Tensor) -> float:
    """The rms of the errors that happened, each in the standard deviation that the model says."""
    error = got.astype(np.float64) - exact
    return float(np.sqrt((error**2 / model.numpy().flatten()).mean()))


def products(kind: str, count: int):
    """Inputs, weights and a bias for many sums, in an order that is random as they are."""
    cases = CASES[count]
    x, w = RNG.standard_normal((2, cases, count))
    bias = np.zeros(cases)
    if kind != "mixed":
        x = np.abs(x)
    if kind in ("positive", "cancelled"):
        w = np.abs(w)
    if kind == "sparse":
        x *= RNG.random(x.shape) < 0.5
    if kind == "spread":
        x *= np.exp(2 * RNG.standard_normal(x.shape))
    if kind == "biased":
        bias = 30 * RNG.standard_normal(cases)
    x, w, bias = (part.astype(np.float32) for part in (x, w, bias))
    if kind == "cancelled":
        bias = -(x.astype(np.float64) * w).sum(axis=1).astype(np.float32)
    return x, w, bias


KINDS = ["mixed", "behind a ReLU", "positive", "sparse", "spread", "biased", "cancelled"]


@pytest.mark.parametrize("op", ["Conv", "Gemm"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", COUNTS)
def test_a_layer_loses_no_more_than_the_model_says_and_not_much_less(op, kind, count):
    x, w, bias = products(kind, count)
    exact = (x.astype(np.float64) * w).sum(axis=1) + bias
    cases = len(x)
    if op == "Conv":  # a group for each case
        inputs = double(x).view(1, -1, 1, 1), double(w).view(cases, count, 1, 1), double(bias)
        model = variance(op, {"group": cases}, inputs, double(exact).view(1, -1, 1, 1), FLOAT)
    else:  # one case at a time, and few
        exact, x, w, bias = (part[:300] for part in (exact, x, w, bias))
        rows = [
            variance(op, {"transB": 1}, [double(a)[None], double(b)[None], double(c)[None]],
                     double(y).view(1, 1), FLOAT)
            for a, b, c, y in zip(x, w, bias, exact, strict=True)
        ]  # fmt: skip
        model = torch.cat(rows)
    terms = x * w
    last = ratio(in_turn(terms) + bias, exact, model)
    first = ratio(in_turn(np.concatenate([bias[:, None], terms], axis=1)), exact, model)
    assert max(last, first) <= 1.05
    if kind in ("mixed", "behind a ReLU", "positive"):
        assert last >= (0.5 if count > 1 else 0.4)  # one product is rounded once, its weight never
    in_pairs = ratio(terms.sum(axis=1, dtype=np.float32) + bias, exact, model)
    assert in_pairs <= 1.05
    if count >= 64 and kind not in ("biased",):
        assert in_pairs < 0.9 * last


@pytest.mark.parametrize("kind", ["mixed", "positive", "behind a ReLU", "near 1"])
@pytest.mark.parametrize("op", ["GlobalAveragePool", "ReduceMean", "ReduceSum", "AveragePool"])
@pytest.mark.parametrize("count", [2, 4, 49, 256, 3136])
def test_a_mean_loses_no_more_than_the_model_says_and_not_much_less(op, kind, count):
    x = RNG.standard_normal((1000, count))
    x = {"positive": np.abs(x), "behind a ReLU": np.maximum(x, 0), "near 1": 1 + 0.01 * x}.get(
        kind, x
    )
    x = x.astype(np.float32)
    by = 1 if op == "ReduceSum" else count
    exact = x.astype(np.float64).sum(axis=1) / by
    found = ratio(in_turn(x) / np.float32(by), exact, model_of_mean(op, x, exact))
    assert found <= 1.05
    # Two terms behind a ReLU are often one or none, and a window does not count its zeros.
    assert found >= (0.5 if count > 4 and op != "AveragePool" else 0.2)


def model_of_mean(op: str, x: np.ndarray, exact: np.ndarray) -> torch.Tensor:
    cases, count = x.shape
    if op.endswith("Pool"):
        options = {"kernel_shape": [1, count]} if op == "AveragePool" else {}
        y = double(exact).view(cases, 1, 1, 1)
        return variance(op, options, [double(x).view(cases, 1, 1, count)], y, FLOAT)
    return variance(op, {"keepdims": 0}, [double(x), torch.tensor([-1])], double(exact), FLOAT)


@pytest.mark.parametrize("op", ["GlobalAveragePool", "ReduceMean"])
@pytest.mark.parametrize("values", [1, 2, 5])
@pytest.mark.parametrize("count", [16, 49, 1024, 3136])
def test_a_mean_over_equal_terms_drifts_and_the_model_knows(op, values, count):
    """The same rounding over and over: the errors add up, they do not average out."""
    levels = np.exp(RNG.standard_normal((500, values)))
    x = np.take_along_axis(levels, RNG.integers(0, values, (500, count)), axis=1).astype(np.float32)
    exact = x.astype(np.float64).mean(axis=1)
    got = in_turn(x) / np.float32(count)
    model = model_of_mean(op, x, exact)
    assert 0.2 <= ratio(got, exact, model) <= 1.05
    if values == 1:  # by √K more than a sum of terms that all differ
        apart = x * (1 + 1e-6 * np.arange(count, dtype=np.float32))
        differing = model_of_mean(op, apart, apart.astype(np.float64).mean(axis=1))
        assert float((model / differing).mean()) > count / 4


def test_equal_terms_are_counted_by_hand():
    x = double([[2.0, 3.0, 2.0, 0.0, 0.0, 3.0, 2.0, 5.0]])  # 3² + 2² + 1² = 14
    y = double([17.0 / 8])
    got = variance("ReduceMean", {"axes": [-1], "keepdims": 0}, [x], y, FLOAT)
    squares = Fraction(3 * 4 + 2 * 9 + 25, 64)
    summed = Fraction(14, 3) * Fraction(17, 8) ** 2 + (Fraction(14, 6) + 1) * squares
    want = (summed + Fraction(17, 8) ** 2) * Fraction(1, 3 * 2**48)
    assert float(got) == pytest.approx(float(want), rel=1e-12)


@pytest.mark.parametrize("axes", [(0,), (1, 3), (-1, 0), (0, 1, 2, 3)])
@pytest.mark.parametrize("keep", [0, 1])
def test_the_model_of_a_reduction_has_the_shape_of_its_result(axes, keep):
    x = double(RNG.standard_normal((2, 3, 4, 5)))
    y = x.mean(dim=axes, keepdim=bool(keep))
    got = variance("ReduceMean", {"keepdims": keep}, [x, torch.tensor(axes)], y, FLOAT)
    assert got.shape == y.shape
    assert bool((got > 0).all())


@pytest.mark.parametrize("op", ["Sum", "Mean"])
def test_a_sum_of_several_tensors_rounds_its_partial_sums(op):
    parts = RNG.standard_normal((4, 5000)).astype(np.float32)
    parts[3] = -parts[:3].astype(np.float64).sum(axis=0)  # which cancel
    exact = parts.astype(np.float64).sum(axis=0)
    got = in_turn(parts.T)
    by = 4 if op == "Mean" else 1
    model = variance(op, {}, [double(part) for part in parts], double(exact / by), FLOAT)
    assert 0.1 <= ratio(got / np.float32(by), exact / by, model) <= 1.05
    assert np.max(np.abs(got / by - exact / by) / model.sqrt().numpy()) <= 4


@pytest.mark.parametrize("form", ["(x − μ)·k + β", "x·k + (β − μ·k)"])
@pytest.mark.parametrize("centre", [0, 100])
def test_a_batchnorm_loses_no_more_in_either_form_whatever_cancels(form, centre):
    x, mean, beta = RNG.standard_normal((3, 4000)).astype(np.float32) * 3
    x, mean = x + np.float32(centre), mean + np.float32(centre)
    gamma, spread = (RNG.random((2, 4000)) + 0.1).astype(np.float32)
    eps = 0.0
    scale = gamma.astype(np.float64) / np.sqrt(spread.astype(np.float64))
    exact = (x.astype(np.float64) - mean) * scale + beta
    k = gamma / np.sqrt(spread)
    got = (x - mean) * k + beta if form[0] == "(" else x * k + (beta - mean * k)
    of = [double(part) for part in (gamma, beta, mean, spread)]
    model = variance(
        "BatchNormalization", {"epsilon": eps}, [double(x)[None], *of], double(exact)[None], FLOAT
    )
    assert (0.3 if form[0] == "x" else 0.005) <= ratio(got, exact, model[0]) <= 1.05


# ── Storing ─────────────────────────────────────────────────────────────────────────


NORMALISED = {
    "InstanceNormalization": {"epsilon": 1e-5},
    "GroupNormalization": {"epsilon": 1e-5, "num_groups": 40},
    "LayerNormalization": {"epsilon": 1e-5, "axis": 2},
}


@pytest.mark.parametrize("op", NORMALISED)
@pytest.mark.parametrize("form", ["mean of (x − μ)²", "mean of x², less μ²"])
@pytest.mark.parametrize("centre", [0, 3])
@pytest.mark.parametrize("count", [4, 49, 3136])
def test_a_norm_loses_no_more_in_either_form(op, form, centre, count):
    """Every sum in float32, one term after another."""
    single = np.float32
    x = (RNG.standard_normal((10, 40, count)) + centre).astype(single)
    along = (count,) if op == "LayerNormalization" else (40,)
    scale, bias = RNG.standard_normal((2, *along)).astype(single)
    shape = (1, 1, -1) if op == "LayerNormalization" else (1, -1, 1)

    def mean(terms: np.ndarray) -> np.ndarray:
        total = np.cumsum(terms, axis=-1, dtype=single)[..., -1:]
        return (total / single(count)).astype(single)

    mu = mean(x)
    spread = mean((x - mu) ** 2) if "(x" in form else np.maximum(mean(x * x) - mu * mu, 0)
    inverse = (1 / np.sqrt(spread + single(1e-5))).astype(single)
    got = (x - mu) * inverse * scale.reshape(shape) + bias.reshape(shape)
    inputs = [double(part) for part in (x, scale, bias)]
    exact = OPERATORS[op](NORMALISED[op], *inputs)
    found = variance(op, NORMALISED[op], inputs, exact, FLOAT)
    assert found.shape == exact.shape
    assert ratio(got.flatten(), exact.numpy().flatten(), found) < 1.0


@pytest.mark.parametrize("op", ["ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceSumSquare"])
@pytest.mark.parametrize("kind", ["spread", "equal"])
@pytest.mark.parametrize("count", [2, 49, 3136])
def test_a_reduction_of_terms_of_one_sign_loses_no_more(op, kind, count):
    x = np.abs(RNG.standard_normal((1000, count))).astype(np.float32) + np.float32(0.1)
    if kind == "equal":
        x = np.repeat(x[:, :1], count, axis=1)
    total = in_turn(x if op in ("ReduceL1", "ReduceLogSum") else x * x)
    got = {"ReduceL2": np.sqrt, "ReduceLogSum": np.log}.get(op, lambda y: y)(total)
    attributes = {"axes": [1], "keepdims": 0}
    exact = OPERATORS[op](attributes, double(x))
    found = variance(op, attributes, [double(x)], exact, FLOAT)
    assert ratio(got, exact.numpy(), found) < 1.0


def test_a_product_of_many_and_an_einsum_lose_no_more():
    x = (1 + RNG.standard_normal((1000, 200)) / 50).astype(np.float32)
    got = np.cumprod(x, axis=1, dtype=np.float32)[:, -1]
    attributes = {"axes": [1], "keepdims": 0}
    exact = OPERATORS["ReduceProd"](attributes, double(x))
    found = variance("ReduceProd", attributes, [double(x)], exact, FLOAT)
    assert 0.3 < ratio(got, exact.numpy(), found) < 1.0
    w = RNG.standard_normal((1000, 200)).astype(np.float32)
    attributes = {"equation": b"nk, nk -> n"}
    given = [double(x), double(w)]
    exact = OPERATORS["Einsum"](attributes, *given)
    found = variance("Einsum", attributes, given, exact, FLOAT)
    assert 0.3 < ratio(in_turn(x * w), exact.numpy(), found) < 1.0


@pytest.mark.parametrize(("dtype", "bits"), [(FLOAT, 24), (FLOAT16, 11), (BFLOAT16, 8)])
def test_a_product_is_rounded_once_to_its_type(dtype, bits):
    """At the start of a binade the error reaches u, and is spread evenly up to it."""
    y = 1 + RNG.random(4000) / 16
    unit = 2.0 ** (1 - bits)
    model = variance("Mul", {}, [double(y), double(np.ones(1))], double(y), dtype)
    assert ratio(np.rint(y / unit) * unit, y, model) == pytest.approx(1, abs=0.05)
    assert float(model[0]) == pytest.approx((2.0**-bits * y[0]) ** 2 / 3, rel=1e-9)


def nearest(value: float, bits: int, least: int) -> float:
    """Round half to even by exact fractions; ``least`` is the smallest step's exponent."""
    exponent = max(math.frexp(value)[1] - bits, least)
    return float(round(Fraction(value) / Fraction(2) ** exponent) * Fraction(2) ** exponent)


@pytest.mark.parametrize(("dtype", "bits", "least"), [(FLOAT16, 11, -24), (BFLOAT16, 8, -133)])
def test_a_value_is_rounded_once_and_half_to_even(dtype, bits, least):
    """Also where float32, on the way to a half, lies on a tie that the value does not."""
    step = 2.0 ** (1 - bits)
    near = [1 + step * (k + 0.5) + off for k in range(4) for off in (0, 2.0**-40, -(2.0**-40))]
    values = [
        *near,
        *(-v for v in near),
        *RNG.standard_normal(2000),
        *RNG.standard_normal(500) * 1e-6,
    ]
    got = round_to(torch.tensor(values, dtype=torch.float64), dtype)
    assert got.tolist() == [nearest(value, bits, least) for value in values]


def test_a_half_has_its_ends():
    ends = [65519.999, 65520.0, -1e30, 1e300, math.inf, -math.inf, 2.0**-26, 0.0]
    got = round_to(torch.tensor(ends, dtype=torch.float64), FLOAT16)
    assert got.tolist() == [65504.0, math.inf, -math.inf, math.inf, math.inf, -math.inf, 0.0, 0.0]
    assert math.isnan(float(round_to(torch.tensor(math.nan).double(), FLOAT16)))


def test_what_is_no_half_is_left_alone():
    value = torch.tensor([1 / 3], dtype=torch.float64)
    assert round_to(value, FLOAT) is value
    assert round_to(value, DOUBLE) is value
    whole = torch.tensor([70000])
    assert round_to(whole, FLOAT16) is whole


def test_rounding_lets_gradients_through():
    value = torch.tensor([1 / 3, 1000.2], dtype=torch.float64, requires_grad=True)
    round_to(value, FLOAT16).sum().backward()
    assert value.grad.tolist() == [1.0, 1.0]


# ── What is in which class, and edges ───────────────────────────────────────────────


def test_every_operator_has_exactly_one_class():
    classes = [LAYERS, SUMS, NORMS, REDUCTIONS, FUNCTIONS, EXACT, {"BatchNormalization"}]
    for one in classes:
        assert one <= OPERATORS.keys()
    assert sum(map(len, classes)) == len(set().union(*classes))
    assert EXACT <= BOUNDED
    rest = BOUNDED - EXACT
    assert not rest & (LAYERS | SUMS | NORMS | REDUCTIONS | FUNCTIONS)


@pytest.mark.parametrize("op", sorted(EXACT))
def test_what_only_moves_or_compares_rounds_nothing(op):
    x = torch.ones(2, 3, dtype=torch.float64)
    assert variance(op, {}, [x, x], x, FLOAT) is None


def test_whole_numbers_and_unknown_types_round_nothing():
    x = torch.ones(2, 3)
    assert variance("Mul", {}, [x, x], torch.ones(2, 3, dtype=torch.int64), FLOAT) is None
    assert variance("Mul", {}, [x, x], x, 7) is None


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e25])
def test_the_model_grows_with_the_weights_and_the_inputs_alone(size):
    """Squares of large or small weights must not leave float32's range."""
    x, w = double(RNG.standard_normal((4, 20))), double(RNG.standard_normal((20, 3)))
    unit = variance("Gemm", {}, [x, w], x @ w, FLOAT)
    for scaled in ([x, w * size], [x * size, w]):
        got = variance("Gemm", {}, scaled, x @ w * size, FLOAT)
        assert torch.allclose(got / size**2, unit, rtol=1e-5)


def test_a_layer_of_zeros_still_has_a_spread():
    zero = torch.zeros(2, 3, dtype=torch.float64)
    got = variance("Gemm", {}, [zero, zero.T], torch.zeros(2, 2, dtype=torch.float64), FLOAT)
    assert bool((got > 0).all())
    assert bool(torch.isfinite(got).all())


def test_a_bias_held_in_whole_steps_is_off_by_a_step_over_the_root_of_12():
    x, w = double(RNG.standard_normal((4, 20))), double(RNG.standard_normal((3, 20)))
    step = double([0.5, 0.25, 0.125])
    inputs, y = [x, w, double([1.0, 2.0, 3.0])], x @ w.T
    plain = variance("Gemm", {"transB": 1}, inputs, y, FLOAT)
    held = variance("Gemm", {"transB": 1}, inputs, y, FLOAT, bias_step=step)
    assert torch.allclose(held - plain, (step**2 / 12).expand(4, 3), rtol=1e-9)


@pytest.mark.parametrize("op", ["Conv", "Add", "Mul", "Sub"])
def test_inputs_kept_wider_than_declared_move_the_output_as_rounding_them_does(op):
    x = RNG.standard_normal((2000, 4)) * 3
    other = RNG.standard_normal((1, 4) if op == "Conv" else (2000, 4)).astype(np.float16)
    other = other.astype(np.float64)
    halved = x.astype(np.float16).astype(np.float64)
    if op == "Conv":
        inputs = [double(halved).view(2000, 4, 1), double(other).view(1, 4, 1)]
        off = ((halved - x) * other).sum(axis=1)
    else:
        inputs = [double(halved), double(other)]
        off = {"Add": halved - x, "Sub": halved - x, "Mul": (halved - x) * other}[op]
    model = input_variance(op, {}, inputs, FLOAT16)
    found = ratio(off.flatten(), 0, model)
    assert 0.3 <= found <= 1.05  # one of two terms is rounded, and the model has both
    assert input_variance(op, {}, inputs, FLOAT) is None
