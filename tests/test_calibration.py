"""Magnitudes, against numpy's own maxima and percentiles of the very same values."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import onnx
import pytest
from conftest import refused
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array

from exporter.calibration import Magnitudes, calibrate, watched_tensors
from exporter.errors import GraphError, InputRefused

PERCENTS = (1, 7, 25, 28, 50, 75, 90, 99, 99.9, 99.99, 99.999, 100)


def magnitudes(*parts) -> Magnitudes:
    found = Magnitudes.empty()
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
    return {"x": x, "r1": r1, "c2": c2, "f": f}


def samples(count: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(-50, 51, (count, 2, 4, 4)).astype(np.float32)


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


# ── The pass over the samples ───────────────────────────────────────────────────────


def test_what_convolutions_products_and_sums_read_is_watched_and_nothing_else(residual):
    assert watched_tensors(residual) == ("x", "r1", "c2", "f")


def test_every_watched_tensor_has_its_exact_largest_magnitude(residual):
    x = samples()
    found = calibrate(residual, feeds(x))
    want = by_hand(residual, x.astype(np.float64))
    assert found.keys() == want.keys()
    for name, values in want.items():
        assert found[name].amax == np.abs(values).max(), name
        assert found[name].counts.sum() == values.size


@pytest.mark.parametrize("percent", [50, 90, 99, 99.9])
def test_every_watched_tensor_has_its_percentiles(residual, percent):
    x = samples()
    found = calibrate(residual, feeds(x))
    for name, values in by_hand(residual, x.astype(np.float64)).items():
        true = np.percentile(np.abs(values), percent, method="inverted_cdf")
        assert true <= found[name].percentile(percent) <= true * 1.004 + 1e-37, name


def test_a_tensor_that_is_both_input_and_read_later_is_watched_once():
    nodes = [
        make_node("Conv", ["x", "w"], ["c"], "conv", kernel_shape=[1, 1]),
        make_node("Add", ["c", "x"], ["y"], "sum"),
    ]
    graph = model(nodes, (2, 4, 4), {"w": np.ones((2, 2, 1, 1))})
    found = calibrate(graph, feeds(samples(3)))
    assert list(found) == ["x", "c"]
    assert found["x"].counts.sum() == samples(3).size


def test_a_network_of_one_layer_is_calibrated_on_its_input_alone():
    nodes = [make_node("Conv", ["x", "w"], ["y"], "conv", kernel_shape=[1, 1])]
    graph = model(nodes, (2, 4, 4), {"w": np.ones((2, 2, 1, 1))})
    found = calibrate(graph, feeds(samples(3)))
    assert found["x"].amax == np.abs(samples(3)).max()


def test_the_order_of_the_samples_changes_nothing_at_all(residual):
    x = samples()
    one = calibrate(residual, feeds(x))
    other = calibrate(residual, feeds(np.random.default_rng(3).permutation(x)))
    for name in one:
        assert np.array_equal(one[name].counts, other[name].counts)
        assert one[name].amax == other[name].amax


def test_samples_may_come_from_a_generator_and_each_is_told(residual):
    told = []
    calibrate(residual, (feed for feed in feeds(samples(6))), advance=lambda: told.append(1))
    assert len(told) == 6


def test_the_graph_and_the_samples_are_left_as_they_were(residual):
    before, x = residual.SerializeToString(), samples()
    calibrate(residual, feeds(x))
    assert residual.SerializeToString() == before
    assert np.array_equal(x, samples())


def test_no_samples_are_refused(residual):
    with refused(InputRefused, "no calibration data"):
        calibrate(residual, [])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_not_finite_is_refused_by_its_number(residual, bad):
    x = samples()
    x[4, 1, 2, 3] = bad
    with refused(InputRefused, "calibration sample 4 holds NaN or infinite values"):
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
