"""FP8: what E4M3 holds, the graphs that are written, their emulation, and where they run."""

from __future__ import annotations

from copy import deepcopy
from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from exporter import plugins
from exporter.calibration import calibrate
from exporter.emulation import Emulator
from exporter.emulation.grids import FLOAT8, nearest, spacing
from exporter.emulation.rounding import LAYERS
from exporter.errors import BuildError, ExportError, GraphError
from exporter.fidelity import LIMIT, compare_layers, expose, first_deviation
from exporter.flops import count_flops
from exporter.precisions._qdq import FP8
from exporter.profile import load_profile
from exporter.records import BatchRange, OnnxModel, TensorSpec
from exporter.samples import feeds
from exporter.to_onnx import export_onnx

CODES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
NUMBERS = np.unique(CODES[np.isfinite(CODES)])  # the 253 that there are, in order
RNG = np.random.default_rng(0)
rtx = pytest.mark.skipif(
    bool(plugins.load_runtime("tensorrt-rtx", {}).missing("build")), reason="needs tensorrt-rtx"
)


# ── E4M3 ────────────────────────────────────────────────────────────────────────────


def by_search(x: float) -> float:
    """The nearest of the 253 numbers by exact distances; of two, the one whose code is even."""
    exact = Fraction(x)
    distances = [(abs(Fraction(float(n)) - exact), n) for n in NUMBERS]
    least = min(distances)[0]
    tied = [n for distance, n in distances if distance == least]
    even = [
        n for n in tied if np.float64(n).astype(ml_dtypes.float8_e4m3fn).view(np.uint8) % 2 == 0
    ]
    return float(tied[0] if len(tied) == 1 else even[0])


def points() -> np.ndarray:
    """All numbers, all middles, and what lies a last bit of float64 or of float32 beside them."""
    middles = (NUMBERS[1:] + NUMBERS[:-1]) / 2
    beside = [middles * (1 + side * 2.0**-k) for k in (52, 40, 25, 23) for side in (1, -1)]
    return np.concatenate([NUMBERS, middles, *beside, [449.0, 464.0, 465.0, -1e6, 1e-300]])


def test_a_number_is_rounded_once_to_the_nearest_of_all_or_the_even_of_two():
    x = points()
    want = [by_search(value) for value in x]
    got = nearest(torch.from_numpy(x), FLOAT8).clamp(-448, 448)
    assert got.tolist() == want
    assert FP8.stored(x).astype(np.float64).tolist() == want


def test_float32_is_rounded_as_ml_dtypes_rounds_it_and_saturates_where_that_gives_nan():
    x = (RNG.standard_normal(100_000) * 10 ** RNG.uniform(-4, 2.5, 100_000)).astype(np.float32)
    x = np.concatenate([x, points().astype(np.float32)])
    theirs = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    beyond = np.isnan(theirs)
    assert (np.abs(x[beyond]) > 464).all()
    want = np.where(beyond, np.copysign(448.0, x), theirs)
    for kind in (torch.float32, torch.float64):
        got = nearest(torch.from_numpy(x).to(kind), FLOAT8).clamp(-448, 448)
        assert np.array_equal(got.double().numpy(), want)


def test_steps_are_as_wide_as_the_gap_around_a_number():
    for low, high in pairwise(NUMBERS):
        inside = torch.tensor([low + (high - low) * part for part in (0.01, 0.5, 0.99)])
        assert spacing(inside.double(), FLOAT8).tolist() == [high - low] * 3
    assert spacing(torch.tensor([0.0, 300.5]), 3).tolist() == [1.0, 1.0]


# ── Q and DQ, emulated ──────────────────────────────────────────────────────────────


def pair(scale: float = 1.0, dtype: int = TensorProto.FLOAT, **attributes) -> onnx.ModelProto:
    """QuantizeLinear and DequantizeLinear, opset 20."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            make("QuantizeLinear", ["x", "s", "z"], ["q"], "one/Q", **attributes),
            make("DequantizeLinear", ["q", "s", "z"], ["y"], "one/DQ"),
        ],
        "pair",
        [value("x", dtype, ["n", 4])],
        [value("y", dtype, ["n", 4])],
        [
            numpy_helper.from_array(np.array(scale, kind), "s"),
            numpy_helper.from_array(np.array(0, ml_dtypes.float8_e4m3fn), "z"),
        ],
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )


def run(model: onnx.ModelProto, x: np.ndarray, folder, name: str = "x", every: bool = False):
    """What the runtime ort-cpu gives, every tensor if asked for."""
    path = folder / "run.onnx"
    onnx.save(expose(model) if every else model, path)
    with plugins.load_runtime("ort-cpu", {"threads": 1}).open(path) as session:
        return {name: x, **session({name: x})}


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_the_runtime_and_the_emulation_round_to_the_same_numbers(tmp_path, kind):
    x = np.resize(points()[np.abs(points()) < 6e4], (640, 4)).astype(np.float32)
    x = x.astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    model = pair(0.5, kind)
    onnx.checker.check_model(model, full_check=True)
    want = Emulator.of(model).run({"x": torch.from_numpy(x).double()})["y"].numpy()
    found = run(model, x, tmp_path, every=True)
    assert np.array_equal(found["y"].astype(np.float64), want)
    assert np.array_equal(found["q"].astype(np.float64), want / 0.5)
    assert first_deviation(list(compare_layers(Emulator.of(model), found))) is None


def test_what_does_not_saturate_or_has_a_zero_point_is_not_emulated():
    x = {"x": torch.ones(1, 4).double()}
    with pytest.raises(GraphError, match="saturate=0 or a zero point other than 0 has no emul"):
        Emulator.of(pair(saturate=0)).run(x)
    shifted = pair()
    shifted.graph.initializer[1].CopyFrom(
        numpy_helper.from_array(np.array(2, ml_dtypes.float8_e4m3fn), "z")
    )
    with pytest.raises(GraphError, match="a zero point other than 0"):
        Emulator.of(shifted).run(x)


def test_the_noise_has_the_value_nearest_to_a_middle_in_its_own_steps_fall_to_the_other_side():
    x = torch.tensor([[16.99, 3.1, 1.0, 0.0], [99.0, 1.0624, -5.0, 447.0], [460, 17.3, 2, 0]])
    emulator = Emulator.of(pair())
    exact = emulator.run({"x": x.double()}, "exact")["y"]
    assert exact.tolist() == [[16, 3, 1, 0], [96, 1, -5, 448], [448, 18, 2, 0]]
    moved = (emulator.run({"x": x.double()}, "noisy")["y"] - exact).round(decimals=4)
    assert moved.tolist() == [[2, 0, 0, 0], [0, 0.125, 0, 0], [0, 0, 0, 0]]


# ── A network, quantised a second time in PyTorch ───────────────────────────────────


class Small(nn.Module):
    """Two convolutions beside an identity branch, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.third, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        y = self.third(torch.relu(self.second(x)))
        return self.head(torch.relu(y + x).mean(dim=(2, 3)))


INPUTS = RNG.standard_normal((8, 3, 12, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def source(module, tmp_path_factory) -> OnnxModel:
    return export_onnx(
        module,
        tmp_path_factory.mktemp("fp8") / "small.fp32.onnx",
        input=TensorSpec("input", (3, 12, 12)),
        output=TensorSpec("logits", (5,)),
        batch=BatchRange(1, 2, 8),
    )


@pytest.fixture(scope="module")
def graph(source) -> onnx.ModelProto:
    return onnx.load(source.path)


@pytest.fixture(scope="module")
def statistics(graph):
    return calibrate(graph, feeds(INPUTS, "input", size=1))


@pytest.fixture(scope="module")
def fp8(graph, statistics) -> onnx.ModelProto:
    return convert(graph, statistics).model


def convert(graph, statistics, name: str = "fp8", **options):
    return plugins.load_precision(name, options).convert(graph, statistics, INPUTS)


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def edited(model: onnx.ModelProto, name: str, change) -> onnx.ModelProto:
    """A copy with one constant changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(values)).astype(values.dtype), name))
    return copy


def fake(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantise and dequantise with PyTorch's own FP8."""
    steps = (x / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    return steps.double() * scale


def quantised_in_pytorch(module: Small, x: torch.Tensor) -> torch.Tensor:
    """The FP8 network in float64; scales are those of float32's values on these inputs."""

    def layer(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        scale = (conv.weight.double().abs().amax((1, 2, 3), keepdim=True) / 448).float().double()
        weight = fake(conv.weight.double(), scale)
        return nn.functional.conv2d(x, weight, conv.bias.double(), padding=1)

    def scaled(x: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        return fake(x, (plain.abs().max().double() / 448).float().double())

    given = torch.from_numpy(INPUTS)
    first = torch.relu(module.first(given))
    second = torch.relu(module.second(first))
    x = torch.relu(layer(module.first, scaled(x, given)))
    shared = scaled(x, first)
    y = layer(module.third, scaled(torch.relu(layer(module.second, shared)), second))
    return module.double().head(torch.relu(y + shared).mean(dim=(2, 3)))


def test_the_graph_computes_what_pytorchs_own_float8_does(module, fp8, tmp_path):
    with torch.inference_mode():
        want = quantised_in_pytorch(deepcopy(module), torch.from_numpy(INPUTS).double()).numpy()
        plain = module(torch.from_numpy(INPUTS)).double().numpy()
    feed = {"input": torch.from_numpy(INPUTS).double()}
    emulated = Emulator.of(fp8).run(feed)["logits"].numpy()
    ran = run(fp8, INPUTS, tmp_path, "input")["logits"]
    size = np.abs(want).max()
    assert np.abs(plain - want).max() > 1e-3 * size
    assert np.abs(emulated - want).max() < 1e-6 * size
    assert np.abs(ran - want).max() < 1e-5 * size


def test_the_graph_is_valid_and_the_same_every_time(graph, statistics, fp8):
    onnx.checker.check_model(fp8, full_check=True)
    again = convert(graph, statistics).model
    assert again.SerializeToString(deterministic=True) == fp8.SerializeToString(deterministic=True)


def test_pairs_stand_where_those_of_int8_do(graph, statistics, fp8):
    int8 = convert(graph, statistics, "int8", offset="none").model
    described = [
        [(n.op_type, n.name, tuple(n.input), tuple(n.output)) for n in model.graph.node]
        for model in (fp8, int8)
    ]
    assert described[0] == described[1]


def test_scales_are_amax_over_448_and_weights_the_nearest_number(graph, fp8):
    stored, original = constants(fp8), constants(graph)
    assert stored["input_scale"] == np.float32(np.abs(INPUTS).max() / 448)
    kinds = {t.name: t.data_type for t in fp8.graph.initializer}
    for name in ("first", "second", "third"):
        weights = original[f"{name}.weight"].astype(np.float64)
        scales = stored[f"{name}.weight_scale"]
        amax = np.abs(weights).reshape(len(weights), -1).max(axis=1)
        assert np.array_equal(scales, (amax / 448).astype(np.float32))
        assert kinds[f"{name}.weight_q"] == TensorProto.FLOAT8E4M3FN
        assert kinds[f"{name}.bias"] == TensorProto.FLOAT
        steps = weights / scales.astype(np.float64).reshape(-1, 1, 1, 1)
        want = [by_search(min(max(step, -448.0), 448.0)) for step in steps.flatten()[:200]]
        assert stored[f"{name}.weight_q"].astype(np.float64).flatten()[:200].tolist() == want


def test_numbers_that_are_stored_take_one_byte_each(graph, fp8):
    weights = sum(v.size for n, v in constants(fp8).items() if n.endswith("weight_q"))
    before, after = count_flops(graph), count_flops(fp8)
    assert after.parameters == before.parameters
    scales_and_zeros = sum((4 + 1) * v.size for n, v in constants(fp8).items() if "_scale" in n)
    assert before.weight_bytes - after.weight_bytes == 3 * weights - scales_and_zeros
    assert after.macs == before.macs


def test_linear_layers_layers_to_keep_and_the_calibrator_are_as_asked(graph, statistics):
    assert convert(graph, statistics).notes == ("3 of 4 weighted layers in FP8; head in FP32",)
    assert convert(graph, statistics, linear=True).notes == ("4 of 4 weighted layers in FP8",)
    kept = convert(graph, statistics, keep=["second"])
    assert kept.notes == ("2 of 4 weighted layers in FP8; second, head in FP32",)
    cut = constants(convert(graph, statistics, calibrator="percentile", percentile=90.0).model)
    assert cut["input_scale"] < 0.8 * np.abs(INPUTS).max() / 448


def test_around_half_no_scale_is_below_halfs_range_and_small_weights_survive(graph, statistics):
    small = edited(graph, "first.weight", lambda w: w * 1e-3)
    model = convert(small, statistics, around="fp16").model
    onnx.checker.check_model(model, full_check=True)
    stored = constants(model)
    assert TensorProto.FLOAT not in {t.data_type for t in model.graph.initializer}
    scale = stored["first.weight_scale"].astype(np.float64)
    assert (scale == 2.0**-14).all()
    got = stored["first.weight_q"].astype(np.float64) * scale.reshape(-1, 1, 1, 1)
    want = constants(small)["first.weight"].astype(np.float64)
    assert (np.abs(got - want) <= np.maximum(np.abs(want) / 16, 2.0**-24)).all()


def test_an_activation_that_calibration_never_moved_is_refused(graph, statistics):
    class Dead:
        amax = 0.0

    with pytest.raises(GraphError, match=r"'input' cannot be quantised: its magnitude is 0"):
        convert(graph, {**statistics, "input": Dead()})
    with pytest.raises(GraphError, match=r"'input' cannot be quantised: its magnitude is 0"):
        convert(graph, {**statistics, "input": Dead()}, around="fp16")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calibrator": "entropy"}, "calibrator"),
        ({"percentile": 0}, "percentile must be above 0 and at most 100, found 0"),
        ({"half_io": True}, 'half_io needs around = "fp16"'),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ExportError) as refusal:
        plugins.load_precision("fp8", options)
    assert said in str(refusal.value)


# ── Fidelity ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{}, {"linear": True}, {"around": "fp16"}])
def test_an_honest_run_is_right_in_every_layer(graph, statistics, tmp_path, options):
    model = convert(graph, statistics, **options).model
    errors = list(compare_layers(Emulator.of(model), run(model, INPUTS, tmp_path, "input", True)))
    assert first_deviation(errors) is None
    assert {"QuantizeLinear", "DequantizeLinear", "Conv", "Add"} <= {e.op for e in errors}


def next_number(weights: np.ndarray) -> np.ndarray:
    codes = weights.copy().view(np.uint8)
    codes.flat[100] ^= 1
    return codes.view(weights.dtype)


@pytest.mark.parametrize(
    ("constant", "change", "tensor"),
    [
        ("input_scale", lambda s: s * 1.01, "input_q"),
        ("first.weight_scale", lambda s: s * np.float32(1.01), "first.weight_dq"),
        ("second.weight_q", next_number, "second.weight_dq"),
        ("third.bias", lambda b: b + np.float32(1e-4), None),
    ],
)
def test_what_is_wrong_is_found_where_it_is(fp8, tmp_path, constant, change, tensor):
    found = run(edited(fp8, constant, change), INPUTS, tmp_path, "input", True)
    wrong = first_deviation(list(compare_layers(Emulator.of(fp8), found)))
    assert wrong is not None
    assert wrong.layer == constant.partition(".")[0].replace("input_scale", "first")
    assert tensor in (None, wrong.tensor)


def test_a_quantiser_that_does_not_saturate_is_found_where_values_are_beyond(fp8, tmp_path):
    file = onnx.ModelProto()
    file.CopyFrom(fp8)
    first = next(n for n in file.graph.node if n.op_type == "QuantizeLinear")
    first.attribute.append(onnx.helper.make_attribute("saturate", 0))
    asked = Emulator.of(fp8)
    for factor, tensor in ((1, None), (3, "input_q")):
        found = run(file, factor * INPUTS, tmp_path, "input", True)
        wrong = first_deviation(list(compare_layers(asked, found)))
        assert (wrong.tensor if wrong else None) == tensor
    assert (
        first_deviation(list(compare_layers(asked, run(fp8, 3 * INPUTS, tmp_path, "input", True))))
        is None
    )


def test_a_layers_loss_is_what_its_steps_explain_and_more_is_not(graph, fp8):
    feed = {"input": torch.from_numpy(INPUTS)}
    emulator = Emulator.of(graph)
    every = [name for step in emulator.steps for name in step.writes]
    values = emulator.run(feed, watch=every)
    found = {"input": INPUTS, **{name: value.numpy() for name, value in values.items()}}

    def losses(model):
        errors = compare_layers(Emulator.of(model), found, quantising=True)
        return {e.layer: e.multiple for e in errors if e.op in LAYERS}

    honest = losses(fp8)
    assert all(0.5 < honest[name] < 1.6 for name in ("first", "second", "third"))
    coarse = edited(fp8, "second.weight_q", lambda w: np.trunc(w.astype(np.float64) / 64) * 64)
    assert losses(coarse)["second"] > LIMIT


# ── Where it runs ───────────────────────────────────────────────────────────────────


def clipped() -> tuple[onnx.ModelProto, np.ndarray]:
    """A pair behind a ReLU and one behind a Clip, which onnxruntime would drop or fail on."""
    model = pair()
    make = onnx.helper.make_node
    nodes = [
        make("Relu", ["x"], ["r"], "relu"),
        make("QuantizeLinear", ["r", "s", "z"], ["q1"], "one/Q"),
        make("DequantizeLinear", ["q1", "s", "z"], ["d1"], "one/DQ"),
        make("Clip", ["d1", "low", "high"], ["c"], "clip"),
        make("QuantizeLinear", ["c", "s", "z"], ["q"], "two/Q"),
        make("DequantizeLinear", ["q", "s", "z"], ["y"], "two/DQ"),
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for name, bound in (("low", 0.0), ("high", 6.0)):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(bound), name))
    return model, np.array([[-3.0, 5.0, 9.0, 0.3]], np.float32)


def test_the_runtime_drops_no_relu_in_front_of_fp8_and_takes_a_clip(tmp_path):
    model, x = clipped()
    assert run(model, x, tmp_path)["y"].tolist() == [[0.0, 5.0, 6.0, 0.3125]]


def test_the_report_is_told_how_it_was_run(fp8, tmp_path):
    onnx.save(fp8, tmp_path / "fp8.onnx")
    assert plugins.load_runtime("ort-cpu", {}).describe(tmp_path / "fp8.onnx") == (
        "run with session.disable_quant_qdq=1 and without ReluQuantRewrite and ClipQuantRewrite, "
        "as this graph has FP8",
    )


@rtx
@pytest.mark.parametrize("options", [{}, {"linear": True}, {"around": "fp16"}])
@pytest.mark.parametrize("targets", [["sm89"], ["sm120"], ["sm89", "sm120"]])
def test_an_engine_is_built_for_gpus_with_fp8(
    source, graph, statistics, tmp_path, options, targets
):
    onnx.save(convert(graph, statistics, **options).model, tmp_path / "small.fp8.onnx")
    model = source._replace(path=tmp_path / "small.fp8.onnx", precision="fp8")
    engine = plugins.load_runtime("tensorrt-rtx", {"targets": targets}).build(model, tmp_path)
    assert engine.stat().st_size > 1000


@rtx
@pytest.mark.parametrize(
    ("targets", "named"),
    [(["sm86", "sm89", "sm120"], "sm86"), (["sm80"], "sm80"), (["sm75", "sm86"], "sm75, sm86")],
)
def test_targets_without_fp8_are_named_and_a_way_out_is_said(source, fp8, tmp_path, targets, named):
    onnx.save(fp8, tmp_path / "small.fp8.onnx")
    model = source._replace(path=tmp_path / "small.fp8.onnx", precision="fp8")
    with pytest.raises(BuildError) as refusal:
        plugins.load_runtime("tensorrt-rtx", {"targets": targets}).build(model, tmp_path)
    assert f"FP8 does not exist on {named}, and one engine" in str(refusal.value)
    assert "--target sm89,sm120" in (refusal.value.hint or "")


@rtx
def test_a_quantiser_that_does_not_saturate_never_reaches_tensorrt(source, fp8, tmp_path):
    file = onnx.ModelProto()
    file.CopyFrom(fp8)
    first = next(n for n in file.graph.node if n.op_type == "QuantizeLinear")
    first.attribute.append(onnx.helper.make_attribute("saturate", 0))
    onnx.save(file, tmp_path / "small.fp8.onnx")
    model = source._replace(path=tmp_path / "small.fp8.onnx", precision="fp8")
    with pytest.raises(BuildError, match="does not saturate, and TensorRT always does"):
        plugins.load_runtime("tensorrt-rtx", {"targets": ["sm89"]}).build(model, tmp_path)


@pytest.mark.parametrize(("here", "takes"), [("sm86", False), ("sm89", True), ("sm100", True)])
def test_full_tensorrt_says_which_gpu_lacks_fp8(monkeypatch, graph, fp8, here, takes):
    monkeypatch.setattr("exporter.runtimes.tensorrt.compute_capability", lambda: here)
    runtime = plugins.load_runtime("tensorrt", {})
    runtime.refuse(graph.graph, "small.onnx")
    if takes:
        runtime.refuse(fp8.graph, "small.onnx")
        return
    with pytest.raises(BuildError, match=f"the NVIDIA GPU here is {here}, and FP8 exists from sm"):
        runtime.refuse(fp8.graph, "small.onnx")


def test_the_profile_for_ada_has_fp8_and_targets_that_have_it(request):
    profile = load_profile(request.config.rootpath / "profiles" / "ada.toml")
    assert {"fp16", "fp8", "int8", "int8-weights"} == profile.precision.keys()
    assert profile.runtime["tensorrt-rtx"]["targets"] == ["sm89", "sm120"]
    assert all(choice.tolerance.bounds() for choice in profile.precision.values())
