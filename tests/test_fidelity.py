"""Fidelity on small graphs written by hand: what is wrong is named, and what is right passes."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from quantisation import PLAIN, reached

from exporter.emulation import Emulator
from exporter.fidelity import (
    LIMIT,
    compare_layers,
    distance,
    expose,
    first_deviation,
    judge_outputs,
    layer_name,
)
from exporter.precisions._half import to_half
from exporter.precisions.int8 import Int8

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 3, 6, 6)).astype(np.float32)
W1 = RNG.standard_normal((5, 3, 3, 3)).astype(np.float32)
B1 = RNG.standard_normal(5).astype(np.float32)
W2 = RNG.standard_normal((7, 5)).astype(np.float32)
B2 = RNG.standard_normal(7).astype(np.float32)
F = onnx.TensorProto.FLOAT
node = onnx.helper.make_node


def network(nodes=None, **constants) -> onnx.ModelProto:
    """Convolution, ReLU, mean and a linear layer; constants replace its own."""
    held = {"w1": W1, "b1": B1, "w2": W2, "b2": B2, **constants}
    graph = onnx.helper.make_graph(
        nodes or layers(),
        "main",
        [onnx.helper.make_tensor_value_info("x", F, ["n", 3, 6, 6])],
        [onnx.helper.make_tensor_value_info("y", F, ["n", 7])],
        [onnx.numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )


def layers(**changed) -> list[onnx.NodeProto]:
    """The nodes, in order; None takes one out."""
    found = {
        "conv": node("Conv", ["x", "w1", "b1"], ["c"], "one.conv", pads=[1, 1, 1, 1]),
        "relu": node("Relu", ["c"], ["r"], "one.act/Relu"),
        "mean": node("GlobalAveragePool", ["r"], ["m"], "one.pool/GlobalAveragePool"),
        "flat": node("Flatten", ["m"], ["f"], "two/Flatten"),
        "gemm": node("Gemm", ["f", "w2", "b2"], ["y"], "two.fc", transB=1),
    } | changed
    return [made for made in found.values() if made is not None]


def run(model: onnx.ModelProto, x: np.ndarray = X) -> dict[str, np.ndarray]:
    """Every tensor of a graph, as ONNX Runtime computes it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    data = expose(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {"x": x, **dict(zip(names, session.run(names, {"x": x}), strict=True))}


def errors(asked: onnx.ModelProto, found: dict[str, np.ndarray]):
    return list(compare_layers(Emulator.of(asked), found))


def first(asked: onnx.ModelProto, file: onnx.ModelProto):
    return first_deviation(errors(asked, run(file)))


# ── Honest ──────────────────────────────────────────────────────────────────────────


def test_an_honest_run_is_right_in_every_layer_in_running_order():
    found = errors(network(), run(network()))
    assert [error.layer for error in found] == ["one.conv", "one.act", "one.pool", "two", "two.fc"]
    assert [error.op for error in found] == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    assert first_deviation(found) is None
    assert all(error.size <= 1.5 for error in found)
    assert any(error.size > 0.01 for error in found)


@pytest.mark.parametrize("half_io", [False, True])
def test_an_honest_run_in_half_is_right(half_io):
    half = to_half(network(), half_io=half_io).model
    found = run(half, X.astype(np.float16) if half_io else X)
    assert first_deviation(errors(half, found)) is None
    if half_io:  # the runtime was given halves, and the comparison the floats they came from
        assert first_deviation(errors(half, found | {"x": X})) is None


def quantised(**more) -> onnx.ModelProto:
    return (
        Int8(linear=True, **PLAIN, **more)
        .convert(network(), {"x": reached(3.0), "f": reached(2.0)}, X[:0])
        .model
    )


@pytest.mark.parametrize("around", ["fp32", "fp16"])
def test_an_honest_run_in_int8_is_right(around):
    model = quantised(around=around)
    found = errors(model, run(model))
    assert first_deviation(found) is None
    assert {"QuantizeLinear", "DequantizeLinear", "Conv", "Gemm"} <= {error.op for error in found}


def test_a_network_of_nothing_but_zeros_is_right_and_has_no_relative_error():
    zero = network(w1=W1 * 0, b1=B1 * 0, w2=W2 * 0, b2=B2 * 0)
    found = errors(zero, run(zero))
    assert [error.multiple for error in found] == [0.0] * 5
    assert [error.relative for error in found] == [None] * 5
    wrong = run(zero) | {"y": np.full((4, 7), 1e-30, np.float32)}
    assert first_deviation(errors(zero, wrong)).layer == "two.fc"


def test_a_channel_that_is_constant_is_right():
    weights = W1.copy()
    weights[2] = 0
    model = network(w1=weights, b1=np.abs(B1))
    assert first_deviation(errors(model, run(model))) is None


def test_a_condition_is_no_float_and_chooses_all_the_same():
    nodes = [
        node("Greater", ["x", "zero"], ["positive"], "gate/Greater"),
        node("Where", ["positive", "x", "zero"], ["k"], "gate/Where"),
        node("Conv", ["k", "w1", "b1"], ["c"], "one.conv"),
        *layers()[1:],
    ]
    model = network(nodes, zero=np.float32(0))
    found = errors(model, run(model))
    assert first_deviation(found) is None
    assert [error.op for error in found][:2] == ["Where", "Conv"]


def test_values_on_the_middle_between_two_steps_may_fall_to_either_side():
    asked = quantised()
    scale = next(
        onnx.numpy_helper.to_array(t) for t in asked.graph.initializer if t.name == "x_scale"
    )
    steps = RNG.integers(-100, 100, X.shape)
    tied = ((steps + 0.5) * scale.astype(np.float64)).astype(np.float32)
    found = run(asked, tied)
    for side in (np.floor, np.ceil):
        found["x_q"] = side(steps + 0.5).astype(np.int8)
        found["x_dq"] = (found["x_q"] * scale).astype(np.float32)
        judged = errors(asked, found)
        assert judged[[e.tensor for e in judged].index("x_q")].size <= LIMIT
    found["x_q"] = (steps + 2).astype(np.int8)
    assert first_deviation(errors(asked, found)).tensor == "x_q"


# ── Something is wrong ──────────────────────────────────────────────────────────────


def test_one_weight_off_by_a_hundred_thousandth_is_found_in_its_layer_and_channel():
    for channel, inner in ((0, 0), (3, 4)):
        changed = W2.copy()
        changed[channel, inner] *= 1 + 1e-5
        found = first(network(), network(w2=changed))
        assert (found.layer, found.op, found.tensor) == ("two.fc", "Gemm", "y")
        assert found.detail == f"channel {channel} of 7"
        changed = W1.copy()
        changed[channel, 1, 1, 1] *= 1 + 1e-5
        found = first(network(), network(w1=changed))
        assert (found.layer, found.detail) == ("one.conv", f"channel {channel} of 5")
        assert LIMIT < found.multiple < 1000


def test_only_the_layer_that_is_wrong_is_wrong():
    """What comes behind it is judged on what it was given."""
    changed = W1.copy()
    changed[1] *= 1.01
    found = errors(network(), run(network(w1=changed)))
    assert [error.exceeds(LIMIT) for error in found] == [True, False, False, False, False]


@pytest.mark.parametrize("tensor", ["c", "r", "m", "y"])
def test_a_nan_is_named_where_it_first_is(tensor):
    found = run(network())
    found[tensor] = found[tensor].copy()
    found[tensor][:, 2] = np.nan
    wrong = first_deviation(errors(network(), found))
    assert wrong.tensor == tensor
    assert wrong.multiple is None
    assert wrong.detail == f"has {found[tensor][:, 2].size} values not finite"
    assert wrong.size == math.inf
    assert str(wrong).endswith("values not finite")


def test_a_number_where_infinity_was_asked_for_is_wrong_and_the_same_infinity_is_not():
    nodes = [
        node("Div", ["x", "zero"], ["d"], "gate/Div"),
        *layers(),
    ]
    model = network(nodes, zero=np.float32(0))
    found = run(model)
    assert np.isinf(found["d"]).all()
    assert first_deviation(errors(model, found)) is None
    wrong = first_deviation(errors(model, found | {"d": np.ones_like(X)}))
    assert (wrong.tensor, wrong.detail) == ("d", f"has {X.size} finite values that should not be")


def test_a_relu_that_is_gone_is_named_and_so_is_what_should_read_it():
    file = network(layers(relu=None, mean=node("GlobalAveragePool", ["c"], ["m"], "one.pool")))
    wrong = first(network(), file)
    assert (wrong.layer, wrong.tensor) == ("one.act", "r")
    assert wrong.detail == "is missing, which one.pool should read"


def test_a_relu_that_passes_everything_is_named_itself():
    file = network(layers(relu=node("Identity", ["c"], ["r"], "one.act/Relu")))
    assert first(network(), file).layer == "one.act"


def test_a_node_too_many_shows_where_its_result_goes():
    extra = [
        *layers()[:1],
        node("Mul", ["c", "factor"], ["c2"], "extra"),
        node("Relu", ["c2"], ["r"], "one.act/Relu"),
        *layers()[2:],
    ]
    file = network(extra, factor=np.float32(1 + 1e-5))
    wrong = first(network(), file)
    assert (wrong.layer, wrong.tensor) == ("one.act", "r")
    assert first(network(), network(extra, factor=np.float32(1))) is None


def test_one_value_off_is_found_where_nothing_adds_up():
    """Among the many of its channel it would be lost in the mean."""
    found = run(network())
    found["r"] = found["r"].copy()
    largest = np.unravel_index(found["r"][:, 3].argmax(), found["r"][:, 3].shape)
    found["r"][:, 3][largest] *= np.float32(1 + 5e-7)
    wrong = first_deviation(errors(network(), found))
    assert (wrong.tensor, wrong.detail) == ("r", "channel 3 of 5")
    assert LIMIT < wrong.multiple < 12


def test_a_channel_of_weights_is_counted_along_their_first_axis():
    asked, file = quantised(), quantised()
    for tensor in file.graph.initializer:
        if tensor.name == "w1_scale":
            value = onnx.numpy_helper.to_array(tensor).copy()
            value[4] *= np.float32(1.01)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, "w1_scale"))
    wrong = first(asked, file)
    assert (wrong.tensor, wrong.detail) == ("w1_dq", "channel 4 of 5")


def test_a_tensor_of_another_shape_is_named_and_is_the_last_that_is_compared():
    strided = node("Conv", ["x", "w1", "b1"], ["c"], "one.conv", pads=[1] * 4, strides=[2, 2])
    found = errors(network(), run(network(layers(conv=strided))))
    assert len(found) == 1
    assert found[0].detail == "is 4×5×3×3 where 4×5×6×6 was asked for"
    assert first_deviation(found).layer == "one.conv"


def test_another_size_is_no_crash_where_tensors_meet():
    """Behind the wrong shape is a sum that cannot be carried out."""
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c"], "one.conv", pads=[1] * 4),
        node("Relu", ["c"], ["r0"], "one.act/Relu"),
        node("Add", ["c", "r0"], ["r"], "one/Add"),
        *layers()[2:],
    ]
    found = run(network(nodes))
    found["r0"] = found["r0"][:, :, ::2, ::2]
    judged = errors(network(nodes), found)
    assert [error.tensor for error in judged] == ["c", "r0"]


@pytest.mark.parametrize("name", ["x_scale", "w1_scale", "f_scale"])
def test_a_scale_that_is_off_by_a_hundredth_is_found(name):
    asked, file = quantised(), quantised()
    for tensor in file.graph.initializer:
        if tensor.name == name:
            value = onnx.numpy_helper.to_array(tensor) * np.float32(1.01)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    wrong = first(asked, file)
    assert wrong.layer == ("two.fc" if name == "f_scale" else "one.conv")
    assert wrong.op in ("QuantizeLinear", "DequantizeLinear")
    assert wrong.tensor.startswith(name.removesuffix("_scale"))


def test_a_zero_point_of_1_is_found():
    asked, file = quantised(), quantised()
    for tensor in file.graph.initializer:
        if tensor.name == "x_zero":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.int8(1), "x_zero"))
    assert first(asked, file).layer == "one.conv"


def test_weights_rounded_to_bfloat16_are_found_in_a_graph_in_half():
    asked = to_half(network(), half_io=False).model
    rounded = torch.from_numpy(W1).bfloat16().float().numpy()
    assert first(asked, to_half(network(w1=rounded), half_io=False).model).layer == "one.conv"


def test_a_tensor_that_is_not_given_is_computed_and_not_counted():
    found = run(network())
    del found["r"], found["m"]
    judged = errors(network(), found)
    assert [error.tensor for error in judged] == ["c", "f", "y"]
    assert first_deviation(judged) is None


def test_layers_are_named_as_in_the_module_and_pairs_after_their_reader():
    asked = Emulator.of(quantised())
    named = {step.writes[0]: layer_name(asked, step) for step in asked.steps}
    assert {named[name] for name in ("x_q", "x_dq", "w1_dq", "c")} == {"one.conv"}
    assert {named[name] for name in ("f_q", "f_dq", "w2_dq", "y")} == {"two.fc"}
    assert named["r"] == "one.act"


# ── Reading tensors out ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "make", [network, quantised, lambda: to_half(network(), half_io=False).model]
)
def test_every_tensor_is_read_out_and_the_argument_left_alone(make):
    model = make()
    before = model.SerializeToString(deterministic=True)
    exposed = expose(model)
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(exposed, full_check=True)
    given = [value.name for value in exposed.graph.output]
    assert given[0] == "y"
    assert sorted(given) == sorted(name for made in model.graph.node for name in made.output)
    assert expose(exposed).graph.output == exposed.graph.output


# ── End to end ──────────────────────────────────────────────────────────────────────

Y = RNG.standard_normal((6, 4))


def judged(candidate, floor=1e-6, **more):
    noisy = {"y": Y * (1 + floor)} if floor is not None else None
    exact = {"y": Y} if floor is not None else None
    return judge_outputs({"y": Y}, {"y": candidate}, exact=exact, noisy=noisy, against="it", **more)


@pytest.mark.parametrize(("times", "verdict"), [(0.0, "pass"), (3.99, "pass"), (4.01, "fail")])
def test_outputs_may_be_off_by_four_times_what_the_noise_is(times, verdict):
    found = judged(Y * (1 + times * 1e-6))
    assert found.verdict == verdict
    assert found.multiple == pytest.approx(times, rel=1e-6)
    assert (found.samples, found.limit) == (6, 4.0)


def test_an_error_where_none_is_allowed_fails_and_none_passes():
    assert judged(Y * (1 + 1e-9), floor=0.0).verdict == "fail"
    assert judged(Y, floor=0.0).verdict == "pass"


def test_without_a_floor_nothing_was_checked():
    found = judged(Y * 2, floor=None, unseen="a node has no emulation")
    assert found.verdict == "not checked"
    assert found.unseen == "a node has no emulation"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_output_that_is_not_finite_fails_whatever_the_rest_is(value):
    wrong = Y.copy()
    wrong[2, 3] = value
    for floor in (1e-6, None):
        found = judged(wrong, floor=floor)
        assert found.verdict == "fail"
        assert found.error is None
        assert found.failures == ("1 outputs are NaN or infinite",)


def test_a_layer_that_deviates_fails_whatever_the_outputs_are():
    wrong = errors(network(), run(network()) | {"r": np.zeros((4, 5, 6, 6), np.float32)})
    found = judged(Y, layers=wrong)
    assert found.verdict == "fail"
    assert found.first.layer == "one.act"
    assert found.layers == 5
    assert found.failures[0].startswith("it leaves the graph at one.act (Relu), off by ")


def test_the_worst_of_all_layers_is_not_the_first():
    c = run(network())["c"] * np.float32(1 + 1e-5)
    wrong = errors(network(), run(network()) | {"c": c, "y": np.full((4, 7), np.nan)})
    found = judged(Y, layers=wrong)
    assert (found.first.layer, found.worst.layer) == ("one.conv", "two.fc")


@pytest.mark.parametrize("size", [1e-40, 1e-20, 1.0, 1e20, 1e200, 1e308])
def test_a_distance_is_relative_at_any_size(size):
    one = np.array([[3.0, 4.0], [0.0, 0.0]]) / 4
    other = np.array([[3.0, 4.0], [0.0, 1.0]]) / 4
    assert distance(other * size, one * size) == pytest.approx(1 / 5, rel=1e-12)
    assert distance(one * size, one * size) == 0.0


def test_a_distance_from_zero_is_the_size_itself():
    zero, one = np.zeros((2, 2)), np.array([[3e-20, 4e-20], [0.0, 0.0]])
    assert distance(one, zero) == pytest.approx(5e-20)
    assert distance(zero, zero) == 0.0
    assert distance(zero, one) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_there_is_no_distance_from_what_is_not_finite(value):
    one, other = np.zeros((2, 2)), np.full((2, 2), value)
    assert distance(one, other) is None
    assert distance(other, one) is None
