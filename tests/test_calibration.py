"""What calibration keeps, against numpy's and Python's own figures of the very same values."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from fractions import Fraction

import numpy as np
import onnx
import pytest
from conftest import refused
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array

from exporter.calibration import (
    Magnitudes,
    calibrate,
    convergence,
    divided,
    statistics,
    watched_tensors,
)
from exporter.calibration.thresholds import divergence
from exporter.calibrators import CALIBRATORS, threshold
from exporter.errors import GraphError, InputRefused, UnknownName
from exporter.records import Convergence, Curve

PERCENTS = (1, 7, 25, 28, 50, 75, 90, 99, 99.9, 99.99, 99.999, 100)


def magnitudes(*parts) -> Magnitudes:
    found = Magnitudes()
    for part in parts:
        found.add(np.asarray(part, np.float32))
    return found


def model(nodes, y, weights, x=(2, 4, 4)) -> onnx.ModelProto:
    graph = make_graph(
        nodes,
        "g",
        [make_tensor_value_info("x", TensorProto.FLOAT, ["N", *x])],
        [make_tensor_value_info("y", TensorProto.FLOAT, ["N", *y])],
        [from_array(np.asarray(w, np.float32), name) for name, w in weights.items()],
    )
    made = make_model(graph, opset_imports=[make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


WHOLE = np.arange(-9, 9).reshape(3, 2, 3)  # small whole numbers, so that sums are exact


@pytest.fixture
def residual() -> onnx.ModelProto:
    """conv → relu → pool, conv, conv + constant: tensors that are watched, and that are not."""
    rng = np.random.default_rng(1)
    nodes = [
        make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", kernel_shape=[1, 1]),
        make_node("Relu", ["c1"], ["r1"], "relu1"),
        make_node("Conv", ["r1", "w2"], ["c2"], "conv2", kernel_shape=[1, 1]),
        make_node("Add", ["c2", "r1"], ["s"], "sum"),
        make_node("MaxPool", ["s"], ["p"], "pool", kernel_shape=[4, 4]),
        make_node("Flatten", ["p"], ["f"], "flat"),
        make_node("Gemm", ["f", "w3", "b3"], ["y"], "fc", transB=1),
    ]
    weights = {
        "w1": rng.integers(-4, 5, (3, 2, 1, 1)),
        "b1": rng.integers(-4, 5, 3),
        "w2": rng.integers(-4, 5, (3, 3, 1, 1)),
        "w3": rng.integers(-4, 5, (5, 3)),
        "b3": rng.integers(-4, 5, 5),
    }
    return model(nodes, (5,), weights)


def by_hand(residual: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    w = {
        t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in residual.graph.initializer
    }
    c1 = np.einsum("oi,nihw->nohw", w["w1"][..., 0, 0], x) + w["b1"][:, None, None]
    r1 = np.maximum(c1, 0)
    c2 = np.einsum("oi,nihw->nohw", w["w2"][..., 0, 0], r1)
    f = (c2 + r1).max(axis=(2, 3))
    y = f @ w["w3"].T + w["b3"]
    rest = {"c1": c1, "s": c2 + r1, "p": f[..., None, None], "y": y}
    return {"x": x, "r1": r1, "c2": c2, "f": f, **rest}


WATCHED = ("x", "r1", "c2", "f")


def samples(count: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(-50, 51, (count, 2, 4, 4)).astype(np.float32)


def largest(values: np.ndarray) -> np.ndarray:
    """Return the largest magnitude in each channel, axis 1."""
    return np.abs(values).max(axis=tuple(axis for axis in range(values.ndim) if axis != 1))


def feeds(x: np.ndarray):
    return [{"x": sample[None]} for sample in x]


# ── Magnitudes ──────────────────────────────────────────────────────────────────────

VALUES = {
    "normal": np.random.default_rng(0).standard_normal(50_000),
    "long-tailed": np.random.default_rng(1).standard_cauchy(10_000),
    "behind a relu": np.maximum(np.random.default_rng(2).standard_normal(5_000), 0),
    "hundred": np.arange(1, 101),
    "thousand, negative": -np.arange(1, 1001),
    "powers of two": 2.0 ** np.arange(-100, 100),
    "one": np.array([-3.25]),
    "all the same": np.full(64, 0.1),
    "tiny": np.random.default_rng(3).random(1000) * 1e-30,
    "huge": np.random.default_rng(4).random(1000) * 3e38,
}


@pytest.mark.parametrize("percent", PERCENTS)
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_a_percentile_is_at_most_four_thousandths_above_the_true_one(values, percent):
    exact = np.sort(np.abs(values.astype(np.float32)).astype(np.float64))
    true = exact[math.ceil(Fraction(str(percent)) * len(exact) / 100) - 1]
    found = magnitudes(values).percentile(percent)
    assert true <= found <= true * 1.004 + np.finfo(np.float32).tiny


@pytest.mark.parametrize("percent", [50, 90, 99, 99.9])
def test_numpys_inverted_distribution_function_finds_the_same(percent):
    values = np.random.default_rng(5).standard_normal(33_333).astype(np.float32)
    true = np.percentile(np.abs(values), percent, method="inverted_cdf")
    assert true <= magnitudes(values).percentile(percent) <= true * 1.004


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_largest_magnitude_is_exact_and_is_the_hundredth_percentile(values):
    found = magnitudes(values)
    assert found.amax == float(np.abs(values.astype(np.float32)).max())
    assert found.percentile(100) == found.amax


def test_percentiles_never_exceed_the_largest_and_never_fall():
    found = magnitudes(VALUES["long-tailed"])
    read = [found.percentile(percent) for percent in np.linspace(0.1, 100, 500)]
    assert read == sorted(read)
    assert read[-1] == found.amax


def test_however_values_are_cut_and_ordered_the_counts_are_the_same():
    values = VALUES["normal"].astype(np.float32)
    shuffled = np.random.default_rng(9).permutation(values)
    one = magnitudes(values)
    other = magnitudes(*np.array_split(shuffled, 7))
    assert np.array_equal(one.counts, other.counts)
    assert one.amax == other.amax
    assert one.counts.sum() == len(values)


def test_any_shape_and_layout_will_do():
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    plain = magnitudes(values)
    for same in (values[::-1], np.asfortranarray(values), values.transpose(2, 0, 1), -values):
        assert np.array_equal(magnitudes(same).counts, plain.counts)


def test_the_sign_of_a_zero_is_no_magnitude():
    assert magnitudes([-0.0, 0.0, 1.0]).counts[0] == 2
    assert magnitudes([-0.0]).amax == 0.0
    assert magnitudes([-0.0]).percentile(99) == 0.0


# ── Channels ────────────────────────────────────────────────────────────────────────


def test_each_channel_has_its_largest_magnitude_and_power():
    rng = np.random.default_rng(0)
    values = np.maximum(rng.standard_normal((40, 5, 3, 7)), 0).astype(np.float32)
    values[:, 3] = 0
    values[:, 1] *= np.float32(1e-3)
    found = magnitudes(*(value[None] for value in values))
    assert np.array_equal(found.channel_amax, values.max(axis=(0, 2, 3)))
    power = (values.astype(np.float64) ** 2).mean(axis=(0, 2, 3))
    assert found.channel_power == pytest.approx(power, rel=1e-14)
    assert found.dead_channels == (3,)
    assert found.samples == 40


def test_a_power_is_the_exact_mean_rounded_once():
    rng = np.random.default_rng(1)
    values = np.ldexp(rng.standard_normal((200, 3)), rng.integers(-140, 120, (200, 3)))
    values = values.astype(np.float32)
    exact = [sum(Fraction(float(v)) ** 2 for v in column) / 200 for column in values.T]
    found = magnitudes(*(row[None] for row in values))
    assert found.channel_power.tolist() == [float(mean) for mean in exact]


def test_carrying_changes_no_sum(monkeypatch):
    values = np.abs(np.random.default_rng(2).standard_normal((500, 4))) * 1e30
    plain = statistics.Sums(4)
    monkeypatch.setattr(statistics, "_CARRY_AFTER", 40)
    carried = statistics.Sums(4)
    for row in values:
        carried.add(row)
    monkeypatch.undo()
    for row in values:
        plain.add(row)
    want = [float(sum(map(Fraction, column)) / 7) for column in values.T.tolist()]
    assert carried.over(7).tolist() == plain.over(7).tolist() == want


def test_the_smallest_and_the_largest_float_can_be_squared_and_summed():
    tiny, huge = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    found = magnitudes([[tiny, huge, 0]], [[tiny, huge, 0]])
    assert found.channel_power.tolist() == [float(tiny) ** 2, float(huge) ** 2, 0.0]


def test_each_fold_has_its_own_range_and_nan_stays():
    found = Magnitudes()
    for fold, values in ((0, [3, -9, 8]), (2, [1, 2]), (0, [-7, 5]), (3, [7, 6])):
        found.add(np.array(values, dtype=np.float32), fold)
    assert found.fold_low.tolist() == [[-9], [np.inf], [1], [6]]
    assert found.fold_high.tolist() == [[8], [-np.inf], [2], [7]]
    assert found.channel_amax.tolist() == [9]
    assert (found.channel_low.tolist(), found.channel_high.tolist()) == ([-9], [8])
    assert found.amax == 9
    assert found.finite
    found.add(np.array([np.nan], dtype=np.float32), 1)
    assert not found.finite


def test_a_divided_tensor_is_what_its_samples_would_have_given(residual):
    x = samples()
    divisor = np.array([2.0, 0.5, 8.0])  # powers of two, so that every figure is exact
    whole, few = calibrate(residual, feeds(x)), calibrate(residual, feeds(x[:4]))
    found = divided(whole, few, {"r1": divisor})
    want = by_hand(residual, x.astype(np.float64))["r1"] / divisor[:, None, None]
    assert np.array_equal(found["r1"].channel_amax, np.abs(want).max(axis=(0, 2, 3)))
    assert found["r1"].amax == np.abs(want).max()
    assert np.array_equal(found["r1"].channel_power, (want**2).mean(axis=(0, 2, 3)))
    assert np.array_equal(found["r1"].counts, few["r1"].counts)
    assert found["c1"].amax == whole["c1"].amax


# ── Where to clip ───────────────────────────────────────────────────────────────────

CLIPPED = {
    name: VALUES[name] for name in ("normal", "long-tailed", "behind a relu", "hundred", "tiny")
} | {"laplace": np.random.default_rng(6).laplace(size=40_000)}


def expected_error(values: np.ndarray, limit: float, levels: int) -> float:
    x = np.abs(values.astype(np.float32)).astype(np.float64)
    below = ((x > 0) & (x <= limit)).sum() * (limit / levels) ** 2 / 12
    return below + ((x[x > limit] - limit) ** 2).sum()


@pytest.mark.parametrize("levels", [7, 127])
@pytest.mark.parametrize("values", CLIPPED.values(), ids=CLIPPED)
def test_no_threshold_has_a_smaller_expected_squared_error(values, levels):
    found = magnitudes(values)
    got = expected_error(values, found.mse(levels), levels)
    best = min(expected_error(values, t, levels) for t in found.amax * np.linspace(0.01, 1, 1000))
    assert got <= best * 1.01


def test_for_laplace_values_the_squared_error_asks_for_the_known_threshold():
    # R. Banner et al., "Post training 4-bit quantization", 2019: for Laplace values of scale b and
    # 2^M intervals T solves 2T/(3·4^M) = 2 b exp(−T/b); 14 intervals are 7 levels a side.
    values = np.random.default_rng(8).laplace(size=400_000)
    low, high = 0.0, 20.0
    for _ in range(80):
        t = (low + high) / 2
        low, high = (t, high) if 2 * t / (3 * 14**2) < 2 * math.exp(-t) else (low, t)
    assert magnitudes(values).mse(7) == pytest.approx(t, rel=0.01)


def divergence_by_hand(values: np.ndarray, bins: int, levels: int) -> float:
    """Migacz's divergence, counted one value and summed one bin at a time."""
    x = [abs(float(v)) for v in values.astype(np.float32) if v]
    width = max(x) / 2048
    counts = [0] * 2048
    for v in x:
        counts[min(int(v / width), 2047)] += 1
    kept = counts[:bins]
    groups = [math.floor((i + 0.5) / bins * levels + 0.5) for i in range(bins)]
    spread = [0.0] * bins
    for level in set(groups):
        members = [i for i in range(bins) if groups[i] == level and kept[i]]
        for i in members:
            spread[i] = sum(kept[j] for j in members) / len(members)
    reference = [*kept[:-1], kept[-1] + sum(counts[bins:])]
    total = 0.0
    for p, q in zip(reference, spread, strict=True):
        if p:
            q = (1 - 1e-4) * q / sum(kept) + 1e-4 / bins
            total += p / len(x) * math.log(p / len(x) / q)
    return total


@pytest.mark.parametrize("bins", [128, 300, 1111, 2048])
@pytest.mark.parametrize("name", ["normal", "behind a relu", "laplace"])
def test_the_divergence_is_the_one_counted_by_hand(name, bins):
    values = CLIPPED[name]
    x = np.abs(values.astype(np.float32)).astype(np.float64)
    counts, _ = np.histogram(x[x > 0], 2048, (0, x.max()))
    assert divergence(counts.astype(float), bins, 127) == pytest.approx(
        divergence_by_hand(values, bins, 127), rel=1e-6
    )


@pytest.mark.parametrize("name", ["normal", "laplace", "long-tailed"])
def test_no_threshold_has_a_much_smaller_divergence(name):
    values = CLIPPED[name]
    found = magnitudes(values)
    bins = round(found.entropy() / found.amax * 2048)
    others = [divergence_by_hand(values, i, 127) for i in range(128, 2049, 48)]
    assert divergence_by_hand(values, bins, 127) <= min(others) + 0.01


def test_zeros_move_neither_threshold():
    values = VALUES["normal"].astype(np.float32)
    padded = magnitudes(values, np.zeros(1_000_000))
    assert padded.mse() == magnitudes(values).mse()
    assert padded.entropy() == magnitudes(values).entropy()


def test_a_tensor_of_zeros_has_no_threshold_but_zero():
    zeros = magnitudes(np.zeros((1, 3, 2)))
    assert [threshold(name, zeros) for name in CALIBRATORS] == [0.0] * 4
    assert zeros.dead_channels == (0, 1, 2)


def test_a_calibrator_is_found_by_name_and_an_unknown_one_gets_the_nearest():
    seen = magnitudes(VALUES["long-tailed"])
    found = [threshold(name, seen, 99.0, levels=15) for name in CALIBRATORS]
    assert found == [seen.amax, seen.percentile(99.0), seen.mse(15), seen.entropy(15)]
    assert len(set(found)) == 4
    with refused(UnknownName, "no calibrator named 'entropie'", hint=("'entropy'",)):
        threshold("entropie", seen)


# ── The pass over the samples ───────────────────────────────────────────────────────


def test_what_convolutions_products_and_sums_read_is_watched_and_nothing_else(residual):
    assert watched_tensors(residual) == WATCHED


def test_every_watched_tensor_has_its_exact_largest_magnitude(residual):
    x = samples()
    found = calibrate(residual, feeds(x))
    want = by_hand(residual, x.astype(np.float64))
    assert found.keys() == want.keys()
    for name, values in want.items():
        assert found[name].amax == np.abs(values).max(), name
        if name in WATCHED:
            assert found[name].counts.sum() == values.size
    assert tuple(found)[: len(WATCHED)] == WATCHED


@pytest.mark.parametrize("percent", [50, 90, 99, 99.9])
def test_every_watched_tensor_has_its_percentiles(residual, percent):
    x = samples()
    found = calibrate(residual, feeds(x))
    want = by_hand(residual, x.astype(np.float64))
    for name in WATCHED:
        values = want[name]
        true = np.percentile(np.abs(values), percent, method="inverted_cdf")
        assert true <= found[name].percentile(percent) <= true * 1.004 + 1e-37, name


def test_a_tensor_that_is_both_input_and_read_later_is_watched_once():
    nodes = [
        make_node("Conv", ["x", "w"], ["c"], "conv", kernel_shape=[1, 1]),
        make_node("Add", ["c", "x"], ["y"], "sum"),
    ]
    graph = model(nodes, (2, 4, 4), {"w": np.ones((2, 2, 1, 1))})
    found = calibrate(graph, feeds(samples(3)))
    assert list(found) == ["x", "c", "y"]
    assert found["x"].counts.sum() == samples(3).size


def test_a_network_of_one_layer_is_calibrated_on_its_input_alone():
    nodes = [make_node("Conv", ["x", "w"], ["y"], "conv", kernel_shape=[1, 1])]
    graph = model(nodes, (2, 4, 4), {"w": np.ones((2, 2, 1, 1))})
    found = calibrate(graph, feeds(samples(3)))
    assert found["x"].amax == np.abs(samples(3)).max()


def everything(found) -> dict[str, tuple]:
    """Return every figure of every tensor, to the bit."""
    kept = {}
    for name, seen in found.items():
        sides = (seen.fold_low.tobytes(), seen.fold_high.tobytes())
        kept[name] = (seen.amax, seen.samples, *sides)
        if isinstance(seen, Magnitudes):
            arrays = (seen.counts, seen.channel_amax, seen.channel_power)
            scales = [threshold(calibrator, seen, 99.9) for calibrator in CALIBRATORS]
            kept[name] += (*scales, *(array.tobytes() for array in arrays))
    return kept


@pytest.fixture(scope="module")
def uneven() -> np.ndarray:
    """Samples whose sums of squares do not come out the same in every order."""
    rng = np.random.default_rng(4)
    sizes = 10.0 ** rng.integers(-6, 4, (20, 1, 1, 1))
    return (rng.standard_normal((20, 2, 4, 4)) * sizes).astype(np.float32)


@pytest.mark.parametrize("size", [1, 3, 8, 20])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_neither_batch_size_nor_order_changes_one_bit(residual, uneven, size, seed):
    squares = (uneven.astype(np.float64) ** 2).sum(axis=(2, 3))
    assert (
        len({np.random.default_rng(i).permutation(squares).cumsum(0)[-1, 0] for i in range(9)}) > 1
    )
    order = np.arange(20) if seed is None else np.random.default_rng(seed).permutation(20)
    shuffled = uneven[order]
    batches = [{"x": shuffled[at : at + size]} for at in range(0, 20, size)]
    plain = calibrate(residual, feeds(uneven))
    assert everything(calibrate(residual, batches)) == everything(plain)


def test_the_order_of_the_samples_changes_nothing_at_all(residual):
    x = samples()
    one = calibrate(residual, feeds(x))
    other = calibrate(residual, feeds(np.random.default_rng(3).permutation(x)))
    assert everything(one) == everything(other)


def test_samples_may_come_from_a_generator_and_each_is_told(residual):
    told = []
    calibrate(residual, (feed for feed in feeds(samples(6))), advance=lambda: told.append(1))
    assert len(told) == 6


def test_memory_does_not_grow_with_the_samples(residual):
    image = samples(1)

    def peak(count: int) -> int:
        tracemalloc.start()
        calibrate(residual, ({"x": image} for _ in range(count)))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(4)
    few, many = peak(1024), peak(4096)
    assert many < few + 100_000  # 3072 samples of the tensors hold 2.2 MB


def test_every_other_float_tensor_has_its_range_and_says_that_it_has_no_more(residual):
    x = samples()
    found = calibrate(residual, feeds(x))
    for name, values in by_hand(residual, x.astype(np.float64)).items():
        seen = found[name]
        assert np.array_equal(seen.channel_amax, largest(values)), name
        assert seen.samples == len(x)
    for ask in (lambda t: t.percentile(99), lambda t: t.mse(), lambda t: t.channel_power):
        with refused(GraphError, "no convolution, product, sum or average reads"):
            ask(found["c1"])


def test_tensors_that_are_no_floats_are_left_alone():
    nodes = [
        make_node("Shape", ["x"], ["shape"], "shape"),
        make_node("Add", ["shape", "shape"], ["twice"], "twice"),
        make_node("Conv", ["x", "w"], ["c"], "conv", kernel_shape=[1, 1]),
        make_node("Relu", ["c"], ["y"], "relu"),
    ]
    graph = model(nodes, (2, 4, 4), {"w": np.ones((2, 2, 1, 1))})
    assert list(calibrate(graph, feeds(samples(2)))) == ["x", "c", "y"]


def test_the_graph_and_the_samples_are_left_as_they_were(residual):
    before, x = residual.SerializeToString(), samples()
    calibrate(residual, feeds(x))
    assert residual.SerializeToString() == before
    assert np.array_equal(x, samples())


def test_no_samples_are_refused(residual):
    with refused(InputRefused, "no calibration data"):
        calibrate(residual, [])


@pytest.mark.parametrize("index", [0, 4, 31, 32])  # sums are added up at every 32nd sample
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_not_finite_is_refused_by_its_number(residual, bad, index):
    x = samples(40)
    x[index, 1, 2, 3] = bad
    with refused(InputRefused, f"calibration sample {index} holds NaN or infinite values"):
        calibrate(residual, feeds(x))


def test_a_sample_that_overflows_inside_is_refused_by_its_number_and_layer():
    nodes = [
        make_node("Conv", ["x", "w"], ["c"], "conv1", kernel_shape=[1, 1]),
        make_node("Conv", ["c", "w"], ["y"], "conv2", kernel_shape=[1, 1]),
    ]
    graph = model(nodes, (2, 4, 4), {"w": np.full((2, 2, 1, 1), 1e38)})
    x = np.zeros((3, 2, 4, 4), np.float32)
    x[1] = 10
    with refused(GraphError, "sample 1", "'conv1'", "NaN or infinite"):
        calibrate(graph, feeds(x))


# ── From when on the scales stand still ─────────────────────────────────────────────


def scaled(*factors: float) -> list[dict[str, np.ndarray]]:
    base = samples(1)
    return [{"x": base * np.float32(factor)} for factor in factors]


def test_the_scales_are_noted_at_every_power_of_two_and_at_the_end(residual):
    found = calibrate(residual, scaled(1, 2, 3, 4, 5, 4, 3, 10, 1, 1))
    noted = convergence(found)
    assert noted.counts == (1, 2, 4, 8, 10)
    assert noted.tensors == 4
    amax = float(np.abs(samples(1)).max())
    assert [mark[:2] for mark in found["x"].history] == [
        (count, amax * factor)
        for count, factor in zip(noted.counts, (1, 2, 4, 10, 10), strict=True)
    ]
    assert noted.curves[0].calibrator == "max"
    assert noted.curves[0].largest[-2:] == (0.0, 0.0)
    assert noted.curves[0].largest[0] >= 0.9  # the input is at a tenth of its final scale


def test_the_history_is_in_the_order_given_and_ends_the_same(residual):
    factors = (1, 2, 3, 4)
    up, down = (calibrate(residual, scaled(*order)) for order in (factors, factors[::-1]))
    assert convergence(up).curves[0].largest[0] > 0.5
    assert convergence(down).curves[0].largest == (0.0, 0.0, 0.0)
    assert up["x"].history[-1] == down["x"].history[-1]


@pytest.mark.parametrize(
    ("counts", "apart", "settled"),
    [
        ((1, 2, 4, 8, 16), (0.5, 0.2, 0.05, 0.01, 0), 4),
        ((1, 2, 4, 8, 16), (0.5, 0.2, 0.2, 0.06, 0), None),
        ((1, 2, 4, 8, 16), (0.0, 0.0, 0.06, 0.0, 0), 8),
        ((1, 2, 4, 8, 16), (0.0, 0.0, 0.0, 0.0, 0), 1),
        ((1, 2, 4, 8, 10), (0.9, 0.9, 0.9, 0.0, 0), None),  # 8 of 10 agree with themselves
        ((1, 2, 4, 8, 10), (0.9, 0.9, 0.01, 0.0, 0), 4),
        ((1,), (0.0,), None),
    ],
)
def test_scales_are_settled_from_where_none_is_5_percent_off_within_the_first_half(
    counts, apart, settled
):
    assert all(a < b for a, b in itertools.pairwise(counts))
    found = Convergence(3, counts, (Curve("max", apart, apart),))
    assert found.settled == {"max": settled}
