"""INT8 as ONNX Runtime computes it in integers: its graph, and its numbers, by hand."""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from quantisation import alive, exported, images, inverted, reached, residual, statistics_of
from torch import nn
from torch.nn import functional

import exporter
from exporter import plugins
from exporter.calibration import Range
from exporter.emulation import Emulator
from exporter.errors import BuildError, GraphError, ProfileError
from exporter.fidelity import LIMIT, compare_layers, expose, judge_outputs
from exporter.precisions._qdq import check_sums
from exporter.precisions.int8 import Int8
from exporter.profile import load_profile
from exporter.quantisation.network import Network, fake_quantise
from exporter.runtimes._graph import check_quantisation

CALIBRATION, HELD_OUT = images(32), images(100, seed=9)
HAS_RTX = plugins.load_runtime("tensorrt-rtx", {}).missing("build") is None
rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt-rtx is not installed")
PLAIN = {"calibrator": "max", "equalise": False, "rounding": False, "bias_correction": False}


def convert(model: onnx.ModelProto, **options):
    chosen = Int8(**{"form": "onnxruntime", **PLAIN, **options})
    return chosen.convert(model, statistics_of(model, CALIBRATION), CALIBRATION)


def session(model: onnx.ModelProto, **options) -> ort.InferenceSession:
    chosen = ort.SessionOptions()
    chosen.log_severity_level, chosen.intra_op_num_threads = 3, 1
    for key, value in options.items():
        setattr(chosen, key, value)
    return ort.InferenceSession(
        model.SerializeToString(), chosen, providers=["CPUExecutionProvider"]
    )


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return session(model).run(None, {"input": x})[0].astype(np.float64)


def kernels(model: onnx.ModelProto, folder) -> Counter[str]:
    """Return how often ONNX Runtime runs each kind of operator."""
    path = folder / "optimised.onnx"
    session(model, optimized_model_filepath=str(path))
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def emulated(model: onnx.ModelProto, x: np.ndarray, kind: str = "exact") -> np.ndarray:
    emulator = Emulator.of(model)
    with torch.inference_mode():
        return emulator.run({"input": torch.from_numpy(x).double()}, kind)["logits"].numpy()


def layer_errors(asked: onnx.ModelProto, ran: onnx.ModelProto, x: np.ndarray):
    """Return every node's own error, of one graph beside another that was asked for."""
    exposing = session(expose(ran))
    names = [output.name for output in exposing.get_outputs()]
    found = dict(zip(names, exposing.run(names, {"input": x}), strict=True))
    return tuple(compare_layers(Emulator.of(asked), {"input": x, **found}))


def sqnr(reference: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10((reference**2).sum() / ((found - reference) ** 2).sum()))


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def steps_behind(model: onnx.ModelProto, op: str) -> list[tuple[float, int]]:
    """Return scale and zero point of what each node of a kind writes, where it is quantised."""
    stored = constants(model)
    readers = {n.input[0]: n for n in model.graph.node if n.op_type == "QuantizeLinear"}
    behind = [readers[n.output[0]] for n in model.graph.node if n.op_type == op]
    return [(float(stored[q.input[1]]), int(stored[q.input[2]])) for q in behind]


def export(module: nn.Module, tmp_path_factory) -> onnx.ModelProto:
    return exported(module.eval(), tmp_path_factory.mktemp("net") / "net.onnx")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> onnx.ModelProto:
    torch.manual_seed(0)
    return export(alive(residual()), tmp_path_factory)


@pytest.fixture(scope="module")
def clipped(tmp_path_factory) -> onnx.ModelProto:
    torch.manual_seed(0)
    return export(alive(inverted()), tmp_path_factory)


# ── What ONNX Runtime makes of it ───────────────────────────────────────────────────


def test_of_a_residual_network_every_convolution_and_sum_runs_in_integers(plain, tmp_path):
    ops = Counter(node.op_type for node in plain.graph.node)
    found = kernels(convert(plain).model, tmp_path)
    assert found["QLinearConv"] == ops["Conv"] == 8
    assert found["QLinearAdd"] == ops["Add"] == 4  # three residual sums and the stem's BatchNorm
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 1  # at the edges alone
    assert not found.keys() & {"Conv", "FusedConv", "Add", "Relu", "FusedGemm"}


def test_the_form_for_tensorrt_runs_fewer_of_them_in_integers(plain, tmp_path):
    found = kernels(convert(plain, form="tensorrt").model, tmp_path)
    assert found["QLinearConv"] < 8
    assert found["QLinearAdd"] == 0


def test_relu6_is_dropped_and_depthwise_convolutions_run_in_integers(clipped, tmp_path):
    ops = Counter(node.op_type for node in clipped.graph.node)
    found = kernels(convert(clipped).model, tmp_path)
    assert found["QLinearConv"] == ops["Conv"] == 7
    assert found["QLinearAdd"] == ops["Add"] == 2
    assert ops["Clip"]
    assert not found.keys() & {"Clip", "Conv", "FusedConv"}


@pytest.mark.parametrize("network", ["plain", "clipped"])
def test_with_all_repairs_every_convolution_still_runs_in_integers(network, request, tmp_path):
    model = request.getfixturevalue(network)
    made = Int8(form="onnxruntime").convert(model, statistics_of(model, CALIBRATION), CALIBRATION)
    onnx.checker.check_model(made.model, full_check=True)
    convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    assert kernels(made.model, tmp_path)["QLinearConv"] == convolutions
    want = run(model, HELD_OUT)
    before = sqnr(want, run(convert(model).model, HELD_OUT))
    assert sqnr(want, run(made.model, HELD_OUT)) > before - 0.5


def test_a_linear_layer_runs_in_integers_where_it_is_asked_for(plain, tmp_path):
    assert kernels(convert(plain).model, tmp_path)["QGemm"] == 0
    made = convert(plain, linear=True)
    assert kernels(made.model, tmp_path)["QGemm"] == 1
    assert made.notes[0] == "9 of 9 weighted layers in INT8"


def test_kept_layers_stay_in_float_and_the_others_run_in_integers(plain, tmp_path):
    kept = next(node.name for node in plain.graph.node if node.op_type == "Conv")
    made = convert(plain, keep=(kept,))
    found = kernels(made.model, tmp_path)
    assert found["QLinearConv"] == 7
    assert kept in made.notes[0]


class Gated(nn.Module):
    """Two convolutions beside each other, one gating the other; joined, averaged, read again."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.average, self.last = nn.AvgPool2d(2), nn.Conv2d(8, 6, 3)
        self.leaky, self.linear = nn.LeakyReLU(0.1), nn.Linear(6 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.leaky(self.one(x)), torch.sigmoid(self.two(x))
        joined = torch.cat([one * two, one], dim=1)
        return self.linear(torch.relu(self.last(self.average(joined))).flatten(1))


def test_products_joins_averages_and_slopes_run_in_integers(tmp_path_factory, tmp_path):
    torch.manual_seed(0)
    model = export(Gated(), tmp_path_factory)
    made = convert(model, linear=True).model
    found = kernels(made, tmp_path)
    kinds = ("Conv", "Mul", "Concat", "AveragePool", "LeakyRelu")
    assert [found[f"QLinear{kind}"] for kind in kinds] == [3, 1, 1, 1, 1]
    assert found["QGemm"] == 1
    assert sqnr(run(model, HELD_OUT), run(made, HELD_OUT)) > 25


class Open(nn.Module):
    """A network that ends in a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


def test_a_convolution_that_writes_the_output_stays_in_float_and_is_named(tmp_path_factory):
    made = convert(export(Open(), tmp_path_factory))
    assert made.notes[0] == "1 of 2 weighted layers in INT8; last in FP32"


# ── What it computes ────────────────────────────────────────────────────────────────


class Small(nn.Module):
    """conv → ReLU → pool → conv, beside the pooled; → ReLU → mean → linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = functional.max_pool2d(torch.relu(self.first(x)), 2)
        return self.linear(torch.relu(self.second(pooled) + pooled).mean(dim=(2, 3)))


class InIntegers:
    """`Small`, its tensors as integers, from ranges that are found here."""

    def __init__(self, module: Small, calibration: np.ndarray) -> None:
        self.module = module.double()
        x = torch.from_numpy(calibration).double()
        first = torch.relu(module.first(x))
        pooled = functional.max_pool2d(first, 2)
        second = module.second(pooled)
        tensors = [x, first, second, torch.relu(second + pooled)]
        self.reach = [float(tensor.abs().max()) for tensor in tensors]

    def layer(self, layer: nn.Conv2d, q: torch.Tensor, step: float) -> torch.Tensor:
        scales = layer.weight.abs().amax(dim=(1, 2, 3)) / 127
        weights = (layer.weight / scales.view(-1, 1, 1, 1)).round()
        biases = (layer.bias / (scales * step)).round()
        return functional.conv2d(q, weights, biases, padding=1) * (scales * step).view(-1, 1, 1)

    def __call__(self, x: torch.Tensor) -> np.ndarray:
        s = [r / n for r, n in zip(self.reach, (127, 255, 127, 255), strict=True)]
        q = (x.double() / s[0]).round().clamp(-128, 127)
        first = (self.layer(self.module.first, q, s[0]) / s[1]).round().clamp(0, 255)
        pooled = functional.max_pool2d(first, 2)
        second = (self.layer(self.module.second, pooled, s[1]) / s[2]).round().clamp(-128, 127)
        total = ((second * s[2] + pooled * s[1]) / s[3]).round().clamp(0, 255)
        return self.module.linear((total * s[3]).mean(dim=(2, 3))).numpy()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.manual_seed(3)
    module = Small().eval()
    return module, export(module, tmp_path_factory)


def test_it_computes_what_integers_by_hand_give(small):
    module, model = small
    made = convert(model).model
    with torch.inference_mode():
        want = InIntegers(module, CALIBRATION)(torch.from_numpy(HELD_OUT))
    assert np.allclose(emulated(made, HELD_OUT), want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert sqnr(want, run(made, HELD_OUT)) > 60  # but for values in the middle between two steps


def test_it_is_valid_symmetric_only_where_it_must_be_and_its_argument_is_left_alone(small):
    _, model = small
    before = model.SerializeToString(deterministic=True)
    made = convert(model).model
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(made, full_check=True)
    stored = constants(made)
    zeros = {
        node.input[0]: stored[node.input[2]]
        for node in made.graph.node
        if node.op_type == "QuantizeLinear"
    }
    assert {zero.dtype for zero in zeros.values()} == {np.dtype(np.uint8)}
    assert zeros["input"] == 128
    assert [zero for _, zero in steps_behind(made, "Relu")] == [0, 0]
    assert not {t.name for t in made.graph.initializer if t.name.endswith("conv.bias")}
    biases = [value for name, value in stored.items() if value.dtype == np.int32]
    assert [bias.shape for bias in biases] == [(8,), (8,)]


def test_a_maximum_keeps_the_steps_of_what_it_reads(small):
    made = convert(small[1]).model
    assert steps_behind(made, "MaxPool") == steps_behind(made, "Relu")[:1]


@pytest.mark.parametrize("calibrator", ["percentile", "mse", "entropy"])
def test_every_calibrator_says_how_far_255_steps_reach(small, calibrator):
    model = small[1]
    made = convert(model, calibrator=calibrator, percentile=99.0).model
    behind_relu = [n.output[0] for n in model.graph.node if n.op_type == "Relu"][1]
    seen = statistics_of(model, CALIBRATION)[behind_relu]
    wanted = seen.percentile(99.0) if calibrator == "percentile" else getattr(seen, calibrator)(255)
    assert 0 < wanted <= seen.amax
    assert steps_behind(made, "Relu")[1][0] == pytest.approx(wanted / 255, rel=1e-6)
    assert steps_behind(made, "MaxPool") == steps_behind(made, "Relu")[:1]


@pytest.mark.parametrize("network", ["plain", "clipped"])
@pytest.mark.parametrize("linear", [False, True])
def test_onnx_runtimes_integers_are_what_was_asked_for(network, linear, request):
    made = convert(request.getfixturevalue(network), linear=linear).model
    x = HELD_OUT[:12]
    errors = layer_errors(made, made, x)
    verdict = judge_outputs(
        {"y": emulated(made, x)},
        {"y": run(made, x)},
        exact={"y": emulated(made, x)},
        noisy={"y": emulated(made, x, "noisy")},
        against="the graph in float64",
        layers=errors,
    )
    assert verdict.failures == ()
    assert verdict.multiple < LIMIT
    assert len(errors) > 20


def test_a_zero_point_that_is_off_by_one_is_found_where_it_is(small):
    made = convert(small[1]).model
    wrong = onnx.ModelProto()
    wrong.CopyFrom(made)
    zero = next(t for t in wrong.graph.initializer if t.name == "input_zero")
    zero.CopyFrom(numpy_helper.from_array(np.array(127, np.uint8), "input_zero"))
    errors = layer_errors(made, wrong, HELD_OUT[:12])
    assert next(error for error in errors if error.exceeds(LIMIT)).tensor == "input_q"


def test_what_is_never_negative_is_rounded_to_255_steps_in_the_search_too(small):
    _, model = small
    relu = next(node for node in model.graph.node if node.op_type == "Relu").output[0]
    network = Network.of(model, {}, [], {relu: "unsigned"})
    seen = Range(np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32), 8)
    value = torch.tensor([[0.0, 0.4, 0.6, 100.2, 254.9, 300.0]]) / 255  # reaches as far as 1
    found = fake_quantise(value, network.steps(relu, seen)).double() * 255
    assert torch.allclose(found, torch.tensor([0.0, 0, 1, 100, 255, 255]).double(), atol=1e-4)
    assert network.steps(relu, seen).width == pytest.approx(1 / 255)
    assert network.steps("input", seen).width == pytest.approx(1 / 127)


# ── What could overflow, and what is dead ───────────────────────────────────────────


def two_convolutions(weights: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    """Return a 1×1 convolution with these weights and biases, and another behind it."""
    tensors = {
        "w": weights.astype(np.float32).reshape(*weights.shape, 1, 1),
        "b": bias.astype(np.float32),
        "v": np.ones((1, len(weights), 1, 1), np.float32),
    }
    nodes = [
        onnx.helper.make_node("Conv", ["input", "w", "b"], ["c"], "planted"),
        onnx.helper.make_node("Conv", ["c", "v"], ["d"], "behind"),
        onnx.helper.make_node("GlobalAveragePool", ["d"], ["logits"], "mean"),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("input", TensorProto.FLOAT, ["batch", weights.shape[1], 2, 2])],
        [value("logits", TensorProto.FLOAT, ["batch", 1, 1, 1])],
        [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])


def convert_planted(model: onnx.ModelProto, **options) -> onnx.ModelProto:
    chosen = Int8(**{"form": "onnxruntime", **PLAIN, **options})
    ranges = {name: reached(1.0) for name in ("input", "c", "d")}
    return chosen.convert(model, ranges, CALIBRATION[:0]).model


def test_a_bias_that_would_overflow_int32_is_refused_by_its_layers_name():
    weights = np.array([[0.5, -1.0], [1e-10, 1e-10]])
    planted = two_convolutions(weights, np.array([0.25, 0.1]))
    with pytest.raises(GraphError) as caught:
        convert_planted(planted)
    assert str(caught.value).startswith("'planted' cannot be quantised: its channel 1 may add up")
    assert caught.value.hint == "keep it in float: keep = ['planted']"
    kept = convert_planted(planted, keep=("planted",))
    assert "b" in constants(kept)
    assert convert_planted(planted, form="tensorrt")  # there, biases are float


def test_int32_holds_products_and_bias_to_the_last_step():
    weights = np.full((2, 66311), 127, np.int8)  # 255 · 127 · 66311 = 2³¹ − 1913
    weights[0] = 0
    check_sums("layer", weights, 255, np.array([0.0, 1912.0]))
    with pytest.raises(GraphError, match=r"'layer' .* its channel 1 may add up to 2\.15e\+09"):
        check_sums("layer", weights, 255, np.array([0.0, -1913.0]))


@pytest.mark.parametrize("form", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize(("inputs", "fits"), [(132_000, True), (132_200, False)])
def test_a_layer_of_too_many_products_is_refused_in_either_form(form, inputs, fits):
    planted = two_convolutions(np.ones((1, inputs)), np.array([0.0]))
    if fits:  # 128 · 127 · 132104 is the last below 2³¹
        convert_planted(planted, form=form)
        return
    with pytest.raises(GraphError, match="'planted' cannot be quantised: its channel 0"):
        convert_planted(planted, form=form)


def test_a_dead_channels_bias_is_as_fine_as_its_neighbours():
    weights = np.array([[0.5, -1.0], [0.0, 0.0]])
    made = convert_planted(two_convolutions(weights, np.array([0.25, 0.337])))
    stored = constants(made)
    held = stored["planted/bias_q"][1] * float(stored["planted/bias_scale"][1])
    step = 1 / 127 / 127
    assert abs(held - 0.337) <= step / 2 * 1.0001


# ── Where it does not belong ────────────────────────────────────────────────────────


def test_tensorrt_refuses_it(small):
    with pytest.raises(BuildError, match="is UINT8, and TensorRT takes INT8 and FLOAT8E4M3FN"):
        check_quantisation(convert(small[1]).model.graph, "small.int8.onnx")


@rtx
def test_a_profile_of_both_runtimes_gives_the_file_and_refuses_the_engine(
    tiny_model, quick_profile, tmp_path
):
    options = {"form": "onnxruntime", **PLAIN}
    chosen = msgspec.structs.replace(quick_profile.precision["int8"], options=options)
    profile = msgspec.structs.replace(quick_profile, precision={"int8": chosen})
    report = exporter.run(tiny_model, profile, tmp_path / "out")
    made = {found.runtime: found for variant in report.variants for found in variant.artefacts}
    assert made["ort-cpu"].refused is None
    assert made["ort-cpu"].rung.fidelity.failures == ()
    assert made["ort-cpu"].execution.counts == {"int8": (6, 6)}
    assert "is UINT8, and TensorRT takes INT8 and" in made["tensorrt-rtx"].refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"around": "fp16"}, 'form = "onnxruntime" needs around = "fp32", found \'fp16\''),
        ({"residual": False}, 'form = "onnxruntime" quantises every sum: residual cannot be false'),
    ],
)
def test_what_the_form_has_no_meaning_for_is_refused(options, said):
    with pytest.raises(ProfileError) as caught:
        plugins.load_precision("int8", {"form": "onnxruntime", **options})
    assert said in str(caught.value)


def test_what_cpus_without_vnni_may_do_is_said_of_this_form_alone(small):
    assert "without VNNI" in convert(small[1]).notes[-1]
    assert not any("VNNI" in note for note in convert(small[1], form="tensorrt").notes)


def test_the_profile_for_cpus_has_it_and_gates(request):
    profile = load_profile(request.config.rootpath / "profiles" / "cpu.toml")
    assert profile.runtime.keys() == {"ort-cpu"}
    assert profile.precision["int8"].options["form"] == "onnxruntime"
    assert all(choice.tolerance.bounds() for choice in profile.precision.values())
