"""Every file in precisions/ keeps its contract, and each does what it says."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper
from quantisation import PLAIN

from exporter import plugins
from exporter.calibration import calibrate
from exporter.errors import ExportError, GraphError, UnknownName
from exporter.samples import digits, feeds


@pytest.fixture(scope="module")
def graph(tiny_onnx) -> onnx.ModelProto:
    return onnx.load(tiny_onnx.path)


NO_SAMPLES = np.empty((0, 1, 32, 32), np.float32)


@pytest.fixture(scope="module")
def images():
    return digits((1, 32, 32), "train").inputs[:32]


@pytest.fixture(scope="module")
def statistics(graph, images):
    return calibrate(graph, feeds(images, "input", size=1))


def convert(name, graph, statistics, samples=NO_SAMPLES, **options):
    plain = {**PLAIN, "calibrator": "percentile"} if name == "int8" else {}
    return plugins.load_precision(name, plain | options).convert(graph, statistics, samples)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = x.astype(np.float16 if "float16" in session.get_inputs()[0].type else np.float32)
    return session.run(None, {"input": x})[0].astype(np.float64)


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def sqnr(got, want) -> float:
    return float(10 * np.log10((want**2).sum() / ((got - want) ** 2).sum()))


@pytest.mark.parametrize("name", plugins.names("precisions"))
def test_a_precision_leaves_its_argument_alone_and_its_result_valid(name, graph, statistics):
    before = graph.SerializeToString(deterministic=True)
    converted = convert(name, graph, statistics)
    assert graph.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(converted.model, full_check=True)
    assert convert(name, graph, statistics).model == converted.model


# ── FP16 ────────────────────────────────────────────────────────────────────────────


def test_fp16_stores_every_weight_as_half_and_keeps_float_at_the_edges(graph, statistics):
    model = convert("fp16", graph, statistics).model
    kinds = {t.data_type for t in model.graph.initializer}
    assert TensorProto.FLOAT not in kinds
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert [node.op_type for node in model.graph.node].count("Cast") == 2


def test_fp16_with_half_io_has_no_casts_at_all(graph, statistics):
    model = convert("fp16", graph, statistics, half_io=True).model
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert "Cast" not in {node.op_type for node in model.graph.node}


def test_fp16_weights_are_the_fp32_ones_rounded_once(graph, statistics):
    halves = constants(convert("fp16", graph, statistics).model)
    for name, value in constants(graph).items():
        if value.dtype == np.float32:
            assert np.array_equal(halves[name], value.astype(np.float16))


@pytest.mark.parametrize("half_io", [False, True])
def test_fp16_computes_the_same_function_to_half_precision(graph, statistics, images, half_io):
    want = run(graph, images)
    got = run(convert("fp16", graph, statistics, half_io=half_io).model, images)
    assert 45 < sqnr(got, want) < 90  # 11 bits are some 66 dB; more would mean it was not rounded


def one_conv(weight: float) -> onnx.ModelProto:
    """Return a 1×1 convolution with two weights, the first of which is given."""
    tensors = {
        "w": np.array([weight, 1.0], np.float32).reshape(2, 1, 1, 1),
        "b": np.array([0.5, -0.5], np.float32),
    }
    node = onnx.helper.make_node("Conv", ["input", "w", "b"], ["logits"], "conv")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value("input", TensorProto.FLOAT, ["batch", 1, 4, 4])],
        [value("logits", TensorProto.FLOAT, ["batch", 2, 4, 4])],
        [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])


class Reached(NamedTuple):
    """A tensor's range."""

    amax: float

    def percentile(self, percent):
        return self.amax


def reached(**amax: float) -> dict[str, Reached]:
    return {name: Reached(value) for name, value in amax.items()}


@pytest.mark.parametrize("weight", [65520.0, -1e6, 3e38])
def test_a_weight_beyond_half_stays_in_fp32_by_name_and_is_never_clamped(weight):
    made = convert("fp16", one_conv(weight), reached(input=1.0, logits=1.0))
    assert made.notes == (
        f"in FP32: conv: 1 of 'w''s values are beyond 65504, up to {abs(weight):.4g}",
    )
    stored = constants(made.model)["w"]
    assert stored.dtype == np.float32
    assert stored.flat[0] == np.float32(weight)


def test_the_largest_half_stays_in_no_fp32():
    made = convert("fp16", one_conv(65504.0), reached(input=0.1, logits=1.0), margin=1.0)
    assert constants(made.model)["w"].dtype == np.float16
    assert constants(made.model)["w"].flat[0] == 65504.0


def test_weights_below_halfs_range_are_counted_in_a_note():
    small = one_conv(1e-3)
    bias = next(tensor for tensor in small.graph.initializer if tensor.name == "b")
    bias.CopyFrom(numpy_helper.from_array(np.array([1e-6, 0.5], np.float32), "b"))
    assert convert("fp16", small, reached(input=1.0, logits=1.0)).notes == (
        "1 of 4 constants lie below half's normal range (6.1e-05) and lose precision",
    )
    assert convert("fp16", one_conv(1e-3), reached(input=1.0, logits=1.0)).notes == ()


# ── INT8 ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def int8(graph, statistics) -> onnx.ModelProto:
    return convert("int8", graph, statistics, calibrator="max").model


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def test_int8_is_symmetric_with_zero_points_0_and_float_biases(int8):
    stored = constants(int8)
    pairs = [n for n in int8.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        assert stored[node.input[2]].dtype == np.int8
        assert not stored[node.input[2]].any()
        assert (stored[node.input[1]] > 0).all()
    for node in int8.graph.node:
        if node.op_type == "Conv":
            assert stored[node.input[2]].dtype == np.float32


def test_int8_scales_are_per_tensor_for_activations_and_per_channel_for_weights(int8):
    stored, made = constants(int8), producers(int8)
    for node in int8.graph.node:
        if node.op_type == "Conv":
            activation, weights = (made[node.input[i]] for i in (0, 1))
            assert stored[activation.input[1]].shape == ()
            assert {a.name: a.i for a in weights.attribute} == {"axis": 0}
            assert stored[weights.input[1]].shape == stored[weights.input[0]].shape[:1]


def test_every_convolution_and_every_identity_branch_reads_quantised_tensors(int8):
    made = producers(int8)
    kinds = {
        op: [
            tuple(made[i].op_type if i in made else "constant" for i in n.input[:2]) for n in nodes
        ]
        for op in ("Conv", "Add")
        for nodes in [[n for n in int8.graph.node if n.op_type == op]]
    }
    assert set(kinds["Conv"]) == {("DequantizeLinear", "DequantizeLinear")}
    assert len(kinds["Conv"]) == 6
    residual = [pair for pair in kinds["Add"] if "constant" not in pair]
    assert [sorted(pair) for pair in residual] == [["Conv", "DequantizeLinear"]] * 2


def test_the_shortcut_is_quantised_and_not_the_main_branch_even_where_both_are_convolutions(int8):
    made = producers(int8)
    add = next(n for n in int8.graph.node if n.name == "block3.0/Add")
    main, shortcut = sorted((made[i] for i in add.input), key=lambda node: node.op_type)
    assert main.name == "block3.0.conv2"
    assert made[made[shortcut.input[0]].input[0]].name == "block3.0.conv3"


def test_int8_weights_are_within_half_a_step_of_the_fp32_ones_and_use_the_full_range(graph, int8):
    stored, original = constants(int8), constants(graph)
    for node in int8.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            weights, scales = (stored[node.input[i]] for i in (0, 1))
            want = original[node.input[0].removesuffix("_q")].astype(np.float64)
            along = (-1, *[1] * (want.ndim - 1))
            got = weights.astype(np.float64) * scales.astype(np.float64).reshape(along)
            step = scales.reshape(along)
            assert (np.abs(got - want) <= step * 0.5 * (1 + 1e-6)).all()
            assert weights.min() >= -127
            full = np.abs(weights).reshape(len(weights), -1).max(axis=1)
            dead = np.abs(want).reshape(len(want), -1).max(axis=1) == 0
            assert (full[~dead] == 127).all()


def test_activation_scales_are_the_calibrated_maximum_over_127(graph, int8, images):
    stored = constants(int8)
    want = np.abs(images).max() / 127
    assert stored["input_scale"] == pytest.approx(want, rel=1e-6)


def test_percentiles_cut_the_range_and_100_percent_does_not(graph, statistics):
    def scales(**options):
        found = constants(convert("int8", graph, statistics, **options).model)
        return {n: float(v) for n, v in found.items() if n.endswith("_scale") and v.shape == ()}

    largest, cut = scales(calibrator="max"), scales(calibrator="percentile", percentile=99.0)
    assert scales(calibrator="percentile", percentile=100.0) == largest
    assert all(cut[name] <= largest[name] for name in cut)
    assert any(cut[name] < 0.9 * largest[name] for name in cut)


def test_int8_computes_nearly_the_same_function(graph, int8, images):
    assert sqnr(run(int8, images), run(graph, images)) > 25


def test_linear_layers_stay_in_float_unless_asked_for_and_the_note_says_so(graph, statistics):
    plain = convert("int8", graph, statistics)
    both = convert("int8", graph, statistics, linear=True)
    gemm = [next(n for n in c.model.graph.node if n.op_type == "Gemm") for c in (plain, both)]
    assert [producers(c.model).get(g.input[1]) is not None for c, g in zip((plain, both), gemm, strict=True)] == [False, True]  # fmt: skip  # noqa: E501
    assert plain.notes == ("6 of 7 weighted layers in INT8; block4.2 in FP32",)
    assert both.notes == ("7 of 7 weighted layers in INT8",)


def test_a_layer_to_keep_stays_in_float_and_an_unknown_one_names_the_nearest(graph, statistics):
    kept = convert("int8", graph, statistics, keep=["block2.0.conv1"])
    conv = next(n for n in kept.model.graph.node if n.name == "block2.0.conv1")
    assert conv.input[0] not in {
        p.output[0] for p in kept.model.graph.node if "Linear" in p.op_type
    }
    assert "block2.0.conv1, block4.2 in FP32" in kept.notes[0]
    with pytest.raises(UnknownName, match=r"no layer to keep named 'block2\.conv1'") as refusal:
        convert("int8", graph, statistics, keep=["block2.conv1"])
    assert "'block2.0.conv1'" in (refusal.value.hint or "")


def test_fp16_around_int8_leaves_no_float32_inside(graph, statistics, images):
    model = convert("int8", graph, statistics, around="fp16").model
    assert TensorProto.FLOAT not in {t.data_type for t in model.graph.initializer}
    assert TensorProto.INT8 in {t.data_type for t in model.graph.initializer}
    assert sqnr(run(model, images), run(graph, images)) > 25


def test_a_scale_below_halfs_normal_range_keeps_its_layer_in_fp32(statistics):
    tiny = one_conv(1.0)
    tiny.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.array([1e-3, 1], np.float32).reshape(2, 1, 1, 1), "w")
    )
    made = convert("int8", tiny, {"input": statistics["input"]}, around="fp16")
    assert constants(made.model)["w_scale"].dtype == np.float32
    (note,) = [note for note in made.notes if "'w_scale'" in note]
    assert note.startswith("in FP32: w/DequantizeLinear, conv: the quantisation scale 'w_scale'")


def test_a_dead_weight_channel_gets_another_ones_scale_for_its_biass_sake(statistics):
    model = convert("int8", one_conv(0.0), {"input": statistics["input"]}).model
    stored = constants(model)
    assert stored["w_scale"].tolist() == pytest.approx([1 / 127, 1 / 127])
    assert stored["w_q"].flatten().tolist() == [0, 127]


@pytest.mark.parametrize("reached", [0.0, 1e-38])  # a scale of 1e-38 / 127 is subnormal
def test_an_activation_that_calibration_hardly_moved_is_refused_by_name(graph, statistics, reached):
    class Dead:
        amax = reached

        def percentile(self, percent):
            return reached

    with pytest.raises(
        GraphError, match=f"'input' cannot be quantised: its magnitude is {reached:g}"
    ):
        convert("int8", graph, {**statistics, "input": Dead()})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calibrator": "maximum"}, "calibrator"),
        ({"percentile": 0}, "percentile must be above 0 and at most 100, found 0"),
        ({"percentile": 101}, "percentile must be above 0 and at most 100, found 101"),
        ({"half_io": True}, 'half_io needs around = "fp16"'),
        ({"arround": "fp16"}, "unknown key 'arround'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ExportError) as refusal:
        plugins.load_precision("int8", options)
    assert said in str(refusal.value)
    assert refusal.value.exit_code == 2
