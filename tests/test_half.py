"""What leaves half's range is found, named and kept in FP32; the truth is PyTorch in float64."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import refused
from onnx import TensorProto, numpy_helper
from quantisation import PLAIN, reached
from torch import nn

from exporter import plugins
from exporter.emulation import Emulator
from exporter.errors import BuildError, GraphError, ProfileError, UnknownName
from exporter.fidelity import compare_layers, expose, first_deviation
from exporter.precisions._floats import BF16, FP16
from exporter.precisions._half import to_half
from exporter.precisions._range import channels
from exporter.records import BatchRange, OnnxModel, TensorSpec
from exporter.to_onnx import export_onnx

INPUT, OUTPUT, BATCH = TensorSpec("input", (3, 12, 12)), TensorSpec("y", (5,)), BatchRange(1, 2, 16)
X = np.random.default_rng(0).standard_normal((16, *INPUT.shape)).astype(np.float32)
TARGETS = ("sm80", "sm86", "sm89", "sm120")
HAS_RTX = plugins.load_runtime("tensorrt-rtx", {}).missing("build") is None
rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt-rtx is not installed")
node = onnx.helper.make_node


class Seen(NamedTuple):
    amax: float


class Scaled(nn.Module):
    """x · w, one number for every channel."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values).reshape(1, -1, 1, 1))

    def forward(self, x):
        return x * self.weight


class Normed(nn.Module):
    """x / √(mean x² + 1e-12), of each pixel over its channels."""

    def forward(self, x):
        return x / torch.sqrt((x * x).mean(1, keepdim=True) + 1e-12)


def plain() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ]


def times(layer: nn.Module, factor: float, *, bias: bool = True) -> None:
    with torch.no_grad():
        layer.weight *= factor
        if bias:
            layer.bias *= factor


def activation() -> list[nn.Module]:
    """1e6 in the middle, which the next layer takes back; every weight fits half."""
    layers = plain()
    times(layers[0], 1e3)
    times(layers[2], 1e3)
    times(layers[6], 1e-3, bias=False)
    return layers


def weight() -> list[nn.Module]:
    """One filter of 1e6, whose inputs are as small."""
    layers = [Scaled(1e-4, 1e-4, 1e-4), *plain()]
    times(layers[1], 1e6)
    times(layers[3], 1e-2, bias=False)
    return layers


def pool() -> list[nn.Module]:
    """A mean of 144 values of some 5,000, which fits, after a sum of 700,000, which does not."""
    layers = plain()
    times(layers[0], 30)
    times(layers[2], 300)
    times(layers[6], 1e-3, bias=False)
    return layers


def subnormal() -> list[nn.Module]:
    """Filters of 1e-8 on inputs of 1e4, behind which everything is of ordinary size."""
    layers = [Scaled(8e3, 8e3, 8e3), *plain()]
    times(layers[1], 1e-7)
    times(layers[3], 1e3)
    return layers


def affine() -> list[nn.Module]:
    """A scale of 1e6 in the middle, as a BatchNorm that could not be folded leaves it."""
    layers = plain()
    layers[1:1] = [Scaled(*[1e6] * 8)]
    times(layers[3], 1e-6, bias=False)
    return layers


def output() -> list[nn.Module]:
    layers = plain()
    times(layers[2], 10)
    times(layers[6], 1e5)
    return layers


def softmax() -> list[nn.Module]:
    """Logits of 1e4 that differ by a few: half's steps there are 8."""
    layers = plain()
    with torch.no_grad():
        layers[6].weight *= 5
        layers[6].bias.fill_(1e4)
    return [*layers, nn.Softmax(-1)]


def norm() -> list[nn.Module]:
    """Squares of 1e-8, of which half would make 0."""
    layers = plain()
    layers[2:2] = [Scaled(*[1e-3] * 8), Normed()]
    return layers


def dead() -> list[nn.Module]:
    """A channel of 1e-9, as training leaves them."""
    layers = plain()
    with torch.no_grad():
        layers[0].weight[3] *= 1e-9
        layers[0].bias[3] *= 1e-9
    return layers


@cache
def exported(make) -> tuple[onnx.ModelProto, np.ndarray]:
    """A network's FP32 graph, and its outputs in float64."""
    module = nn.Sequential(*make()).eval()
    with TemporaryDirectory() as folder:
        path = Path(folder, "net.onnx")
        export_onnx(module, path, input=INPUT, output=OUTPUT, batch=BATCH)
        graph = onnx.load(path)
    with torch.inference_mode():
        return graph, module.double()(torch.from_numpy(X).double()).numpy()


def run(model: onnx.ModelProto, x: np.ndarray = X) -> dict[str, np.ndarray]:
    """Every tensor of a graph, as ONNX Runtime computes it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(
        expose(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    given = x.astype(np.float16) if "16" in session.get_inputs()[0].type else x
    names = [output.name for output in session.get_outputs()]
    return {name: given, **dict(zip(names, session.run(names, {name: given}), strict=True))}


def ranges(model: onnx.ModelProto, x: np.ndarray = X) -> dict[str, Seen]:
    found = {n: v for n, v in run(model, x).items() if v.dtype == np.float32}
    return {name: Seen(float(np.abs(value).max())) for name, value in found.items()}


def convert(name: str, model: onnx.ModelProto, statistics=None, samples=X, **options):
    statistics = ranges(model) if statistics is None else statistics
    converted = plugins.load_precision(name, options).convert(model, statistics, samples)
    onnx.checker.check_model(converted.model, full_check=True)
    return converted


def off(got: np.ndarray, want: np.ndarray) -> float:
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def in_single(model: onnx.ModelProto) -> set[str]:
    """The nodes, Casts apart, that read or write FLOAT."""
    types = {t.name: t.data_type for t in model.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    return {
        n.name
        for n in model.graph.node
        if n.op_type != "Cast"
        and TensorProto.FLOAT in {types.get(name) for name in (*n.input, *n.output)}
    }


def casts(model: onnx.ModelProto) -> int:
    return sum(n.op_type == "Cast" for n in model.graph.node)


# ── What leaves the range ───────────────────────────────────────────────────────────

# Each network, the nodes that must stay, the number of casts, and what the notes must say.
PLANTED = [
    (activation, {"2", "3/Relu", "4/ReduceMean"}, 2, ["'conv2d_1' reaches", "beyond 65504"]),
    (weight, {"1", "2/Relu"}, 3, ["of '1.weight''s values are beyond 65504, up to "]),
    (pool, {"4/ReduceMean"}, 4, ["its sum of 144 values may reach", "beyond 65504"]),
    (subnormal, {"1"}, 3, ["1: a channel loses bits", "moves the outputs by "]),
    (affine, {"1/Mul", "2/Relu", "3"}, 4, ["8 of '1.weight''s values are beyond 65504, up to 1e+"]),
    (output, {"6"}, 2, ["'y' reaches", "beyond 65504"]),
    (
        softmax,
        {"6", "7/Softmax"},
        2,
        ["where half is off by 4.9, and Softmax by a factor of exp 4.9"],
    ),
    (norm, {"3/Mul", "3/Sqrt", "3/Div"}, 4, ["below FP16's normal range", "and Div needs it"]),
]


@pytest.mark.parametrize(("make", "stays", "few", "said"), PLANTED)
def test_what_leaves_halfs_range_is_found_named_and_kept_in_fp32(make, stays, few, said):
    graph, want = exported(make)
    made = convert("fp16", graph)
    notes = " | ".join(made.notes)
    assert stays <= in_single(made.model), notes
    assert all(f"{name}" in notes for name in stays)
    assert all(part in notes for part in said), notes
    assert casts(made.model) <= few
    assert off(run(made.model)["y"], want) < 2e-3  # half loses some 3e-4 in these networks


@pytest.mark.parametrize("make", [make for make, *_ in PLANTED])
def test_every_node_that_is_fp32_is_named_and_no_other(make):
    made = convert("fp16", exported(make)[0])
    said = {
        name
        for note in made.notes
        if note.startswith("in FP32")
        for name in note.removeprefix("in FP32 with them").removeprefix("in FP32")
        .removeprefix(": ").partition(": ")[0].split(", ")
    }  # fmt: skip
    assert said == in_single(made.model)


@pytest.mark.parametrize("make", [plain, *(make for make, *_ in PLANTED)])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_graph_of_two_types_is_emulated_and_comes_near_to_float64(precision, make):
    graph, want = exported(make)
    made = convert(precision, graph)
    emulator = Emulator.of(made.model)
    with torch.inference_mode():
        got = emulator.run({"input": torch.from_numpy(X).double()}, "rounded")["y"].numpy()
    assert off(got, want) < (2e-3 if precision == "fp16" else 2e-2)


@pytest.mark.parametrize("make", [plain, *(make for make, *_ in PLANTED)])
def test_onnx_runtime_computes_a_graph_of_two_types_faithfully(make):
    made = convert("fp16", exported(make)[0])
    assert first_deviation(list(compare_layers(Emulator.of(made.model), run(made.model)))) is None


@rtx
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("make", [plain, *(make for make, *_ in PLANTED)])
def test_tensorrt_rtx_takes_a_graph_of_two_types_for_every_card(precision, make, tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(convert(precision, exported(make)[0]).model, path)
    runtime = plugins.load_runtime("tensorrt-rtx", {"targets": TARGETS})
    built = runtime.build(OnnxModel(path, precision, INPUT, OUTPUT, BATCH), tmp_path)
    assert built.stat().st_size > 10_000


def test_the_converter_of_onnx_runtime_clamps_what_is_kept_here():
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    graph, want = exported(affine)
    given = onnx.ModelProto()
    given.CopyFrom(graph)
    clamped = float16.convert_float_to_float16(given, keep_io_types=True)
    scale = next(t for t in clamped.graph.initializer if t.name == "1.weight")
    assert set(numpy_helper.to_array(scale).ravel().tolist()) == {65504.0}
    model = convert("fp16", graph).model
    kept = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}["1.weight"]
    assert kept.dtype == np.float32
    assert set(kept.ravel().tolist()) == {1e6}
    assert off(run(model)["y"], want) < 2e-3


def test_a_network_within_the_range_is_half_throughout_and_nothing_is_said_of_fp32():
    made = convert("fp16", exported(plain)[0])
    assert in_single(made.model) == set()
    assert casts(made.model) == 2
    assert not any("FP32" in note or "not checked" in note for note in made.notes)


def test_the_same_graph_gives_the_same_bytes():
    graph, _ = exported(weight)
    twice = [convert("fp16", graph).model.SerializeToString() for _ in range(2)]
    assert twice[0] == twice[1]


def between() -> list[nn.Module]:
    """Two nodes without weights between two layers, neither of which a layer could fuse with."""
    layers = plain()
    return [layers[0], Scaled(*[2.0] * 8), nn.MaxPool2d(2), *layers[2:]]


def test_what_stands_between_layers_in_fp32_joins_them_where_that_saves_casts():
    graph, want = exported(between)
    made = convert("fp16", graph, keep=["0", "3"])
    assert in_single(made.model) == {"0", "1/Mul", "2/MaxPool", "3", "4/Relu"}
    assert "in FP32 with them: 1/Mul, 2/MaxPool, 4/Relu: that saves casts" in made.notes
    assert casts(made.model) == 2
    assert off(run(made.model)["y"], want) < 2e-3
    apart = convert("fp16", graph, keep=["0", "7"])
    assert in_single(apart.model) == {"0", "7"}
    assert casts(apart.model) == 2


# ── Where the limit lies ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("amax", "margin", "kept"),
    [(65504, 1, False), (65505, 1, True), (32752, 2, False), (32753, 2, True), (6600, 10, True)],
)
def test_an_activation_stays_from_where_the_margin_leaves_the_range(amax, margin, kept):
    graph, _ = exported(plain)
    statistics = {**ranges(graph), "conv2d": Seen(float(amax))}
    made = convert("fp16", graph, statistics, margin=margin)
    assert ("0" in in_single(made.model)) is kept
    assert any("'conv2d' reaches" in note for note in made.notes) is kept


@pytest.mark.parametrize(("amax", "kept"), [(2.0**-14, False), (6e-5, True), (0.0, False)])
def test_an_activation_stays_that_lies_below_the_normal_range_altogether(amax, kept):
    graph, _ = exported(plain)
    made = convert("fp16", graph, {**ranges(graph), "conv2d": Seen(amax)})
    assert ("0" in in_single(made.model)) is kept


@pytest.mark.parametrize("amax", [float("nan")])
def test_a_range_that_is_nan_is_refused(amax):
    graph, _ = exported(plain)
    with refused(GraphError, "'conv2d'", "NaN", hint=None):
        convert("fp16", graph, {**ranges(graph), "conv2d": Seen(amax)})


@pytest.mark.parametrize("margin", [0.99, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_margin_below_1_is_refused(precision, margin):
    with pytest.raises(ProfileError, match="margin must be 1 or more"):
        plugins.load_precision(precision, {"margin": margin})


def test_tensors_without_a_range_are_named_and_not_taken_for_checked():
    graph, _ = exported(plain)
    statistics = {n: seen for n, seen in ranges(graph).items() if n not in ("conv2d", "relu")}
    (note,) = [n for n in convert("fp16", graph, statistics).notes if "not checked" in n]
    assert note.endswith("calibration gave no range: conv2d, relu")
    unknown = to_half(graph, half_io=False)
    assert "the range of activations is not known, and was not checked" in unknown.notes


def test_a_range_that_calibration_left_out_follows_from_what_the_tensor_is_made_of():
    graph, _ = exported(activation)
    statistics = {n: seen for n, seen in ranges(graph).items() if not n.startswith("relu")}
    made = convert("fp16", graph, statistics)
    assert not any("not checked" in note for note in made.notes)
    assert {"3/Relu", "4/ReduceMean"} <= in_single(made.model)


# ── Sums ────────────────────────────────────────────────────────────────────────────


def one(op: str, *more: str, shape=(4, 16, 16), relu: bool = False, constants=(), **attributes):
    """A graph of one node, behind a Relu or not."""
    value = onnx.helper.make_tensor_value_info
    first = [node("Relu", ["x"], ["r"], "act/Relu")] if relu else []
    graph = onnx.helper.make_graph(
        [*first, node(op, ["r" if relu else "x", *more], ["y"], f"one/{op}", **attributes)],
        "main",
        [value("x", TensorProto.FLOAT, ["n", *shape])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in dict(constants).items()],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    return onnx.shape_inference.infer_shapes(model)


AXES = {"axes": np.array([2, 3], np.int64)}


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (one("GlobalAveragePool"), 256),
        (one("AveragePool", kernel_shape=[4, 8], strides=[4, 4]), 32),
        (one("ReduceMean", "axes", constants=AXES), 256),
        (one("ReduceSum", "axes", constants=AXES), 256),
        (one("ReduceL1", "axes", constants=AXES), 256),
    ],
    ids=lambda value: value.graph.node[0].op_type if hasattr(value, "graph") else "",
)
def test_a_sum_stays_from_where_it_may_leave_the_range_on_its_way(model, count):
    for share, kept in ((0.99, False), (1.01, True)):
        x = Seen(65504 / count * share)
        made = convert("fp16", model, {"x": x, "y": Seen(1.0)}, margin=1.0)
        assert in_single(made.model) == ({model.graph.node[0].name} if kept else set())
        assert any(f"sum of {count} values may reach" in note for note in made.notes) is kept


@pytest.mark.parametrize("relu", [False, True])
def test_a_sum_of_what_is_never_below_0_reaches_no_further_than_its_result(relu):
    """At a mean of 10, Σ|x| is 2,560 where no x is below 0, and up to 256,000 where some may be."""
    model = one("GlobalAveragePool", relu=relu)
    seen = {"x": Seen(1000.0), "r": Seen(1000.0), "y": Seen(10.0)}
    made = convert("fp16", model, seen)
    assert ("one/GlobalAveragePool" in in_single(made.model)) is not relu


def test_a_sum_over_an_axis_that_is_open_stays():
    model = one("ReduceMean", "axes", constants={"axes": np.array([0], np.int64)})
    made = convert("fp16", model, {"x": Seen(1.0), "y": Seen(1.0)})
    assert "in FP32: one/ReduceMean: it adds up a number of values that is not known" in made.notes


def test_layers_whose_sums_must_be_kept_in_float32_are_named():
    graph, _ = exported(plain)
    weights = next(t for t in graph.graph.initializer if t.name == "2.weight")
    l1 = np.abs(numpy_helper.to_array(weights)).reshape(8, -1).sum(axis=1).max()
    for reach, said in ((65000, False), (66000, True)):
        seen = {**ranges(graph), "relu": Seen(reach / float(l1))}
        notes = convert("fp16", graph, seen, margin=1.0).notes
        assert any("the sums of 2 may reach 6.6e+04 on the way" in n for n in notes) is said


# ── Constants ───────────────────────────────────────────────────────────────────────


def test_a_dead_channel_keeps_nothing_in_fp32_and_the_note_has_the_measured_effect():
    graph, want = exported(dead)
    made = convert("fp16", graph)
    assert in_single(made.model) == set()
    (note,) = [note for note in made.notes if "moves the outputs of 8 samples" in note]
    assert note.startswith("channels of 0 lose bits below FP16's normal range")
    assert off(run(made.model)["y"], want) < 2e-3


def test_without_samples_a_channel_that_loses_bits_keeps_its_layer():
    made = convert("fp16", exported(dead)[0], samples=X[:0])
    assert "0" in in_single(made.model)
    assert made.notes[0].startswith("in FP32: 0: a channel loses more bits below")


def test_a_bias_of_1e_9_keeps_nothing_in_fp32_and_is_counted():
    graph = onnx.ModelProto()
    graph.CopyFrom(exported(plain)[0])
    bias = next(t for t in graph.graph.initializer if t.name == "0.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(8, 1e-9, np.float32), "0.bias"))
    made = convert("fp16", graph)
    assert in_single(made.model) == set()
    small = sum(
        int(((np.abs(v) < 2.0**-14) & (v != 0)).sum())
        for v in map(numpy_helper.to_array, graph.graph.initializer)
        if v.dtype == np.float32
    )
    assert small >= 8
    assert any(note.startswith(f"{small} of 853 constants lie below") for note in made.notes)


def test_a_nan_among_the_weights_is_refused_by_name():
    graph = onnx.ModelProto()
    graph.CopyFrom(exported(plain)[0])
    weights = next(t for t in graph.graph.initializer if t.name == "2.weight")
    values = numpy_helper.to_array(weights).copy()
    values[0, 0, 0, 0] = np.nan
    weights.CopyFrom(numpy_helper.from_array(values, "2.weight"))
    with refused(GraphError, "'2.weight' holds NaN", hint=None):
        convert("fp16", graph, {})


def test_a_batchnorm_whose_scale_leaves_the_range_stays_though_its_constants_fit():
    """γ = 1000 over √(0 + 1e-5) is 316,000."""
    numbers = {"g": 1000.0, "b": 0.0, "m": 0.0, "v": 0.0}
    held = {name: np.full(4, value, np.float32) for name, value in numbers.items()}
    model = one("BatchNormalization", *held, constants=held)
    made = convert("fp16", model, {"x": Seen(1e-3), "y": Seen(316.0)})
    assert in_single(made.model) == {"one/BatchNormalization"}
    assert "its scale or shift reaches 3.162e+05, beyond 65504" in made.notes[0]


def test_a_constant_that_both_types_read_is_stored_in_both():
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            node("Conv", ["x", "k"], ["c"], "before"),
            node("Mul", ["c", "w"], ["a"], "first/Mul"),
            node("Mul", ["a", "w"], ["b"], "second/Mul"),
            node("Conv", ["b", "k"], ["y"], "last"),
        ],
        "main",
        [value("x", TensorProto.FLOAT, ["n", 1, 4, 4])],
        [value("y", TensorProto.FLOAT, ["n", 1, 4, 4])],
        [
            numpy_helper.from_array(np.full((1, 1, 1, 1), v, np.float32), n)
            for n, v in (("w", 300.3), ("k", 1.0))
        ],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    x = np.ones((2, 1, 4, 4), np.float32)
    made = convert("fp16", model, {**ranges(model, x), "x": Seen(1.0)})
    stored = {t.name: numpy_helper.to_array(t) for t in made.model.graph.initializer}
    assert {"second/Mul", "last"} <= in_single(made.model)
    assert stored["w"].dtype == np.float32
    assert stored["w_half"].dtype == np.float16
    assert np.allclose(run(made.model, x)["y"], 300.3**2, rtol=1e-3)


@pytest.mark.parametrize(("half", "numpy"), [(FP16, "float16"), (BF16, "bfloat16")])
def test_halves_are_rounded_to_nearest_even_as_pytorch_does(half, numpy):
    values = np.random.default_rng(1).standard_normal(10_000).astype(np.float32)
    values = np.concatenate(
        [
            values,
            values * 1e-6,
            values * 1e4,
            np.float32([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 0, -0.0]),
        ]
    )
    want = torch.from_numpy(values).to(getattr(torch, numpy))
    assert np.array_equal(half.rounded(values), want.float().numpy())
    assert np.array_equal(half.bits(values), want.view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize(
    ("op", "at", "attributes", "rows"),
    [
        ("Gemm", 1, {"transB": 1}, [[0, 1, 2], [3, 4, 5]]),
        ("Gemm", 1, {}, [[0, 3], [1, 4], [2, 5]]),
        ("Gemm", 0, {}, [[0, 1, 2], [3, 4, 5]]),
        ("MatMul", 1, {}, [[0, 3], [1, 4], [2, 5]]),
        ("MatMul", 0, {}, [[0, 1, 2], [3, 4, 5]]),
        ("Conv", 1, {}, [[0, 1, 2], [3, 4, 5]]),
        ("ConvTranspose", 1, {}, [[0, 3], [1, 4], [2, 5]]),
        ("Mul", 1, {}, [[0], [1], [2], [3], [4], [5]]),
    ],
)
def test_a_factors_rows_are_what_one_output_channel_is_made_of(op, at, attributes, rows):
    made = node(op, ["a", "b"], ["y"], **attributes)
    assert channels(np.arange(6).reshape(2, 3), made, at).tolist() == rows


# ── Operators ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("op", "amax", "kept"),
    [
        ("Softmax", 256, False),
        ("Softmax", 257, True),
        ("LogSoftmax", 300, True),
        ("Exp", 10, False),
        ("Softplus", 5.5, False),
        ("Softplus", 5.6, True),
        ("Log", 1, True),
        ("Sqrt", 1, True),
        ("Reciprocal", 1, True),
        ("Sigmoid", 1e4, False),
    ],
)
def test_what_an_operator_does_may_keep_it_in_fp32(op, amax, kept):
    made = convert("fp16", one(op), {"x": Seen(amax), "y": Seen(1.0)})
    assert in_single(made.model) == ({f"one/{op}"} if kept else set())
    assert casts(made.model) == (0 if kept else 2)


def test_what_an_operator_takes_in_fp32_alone_is_computed_in_fp32():
    model = one("Resize", "", "s", constants={"two": np.float32([1, 1, 1, 1])}, mode="nearest")
    model.graph.node.insert(0, node("Add", ["two", "z"], ["s"], "scales/Add"))
    model.graph.node.insert(0, node("Cast", ["k"], ["z"], "scales/Cast", to=TensorProto.FLOAT))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 1, 1]), "k"))
    x = np.random.default_rng(0).standard_normal((2, 4, 16, 16)).astype(np.float32)
    made = convert("fp16", model, {"x": Seen(4.0), "y": Seen(4.0)})
    assert {"scales/Add"} == in_single(made.model) - {"one/Resize"}
    got = run(made.model, x)["y"]
    assert np.array_equal(got, x.astype(np.float16).repeat(2, axis=2).repeat(2, axis=3))


def test_casts_of_the_graph_itself_are_kept_and_only_those_to_float_become_half():
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            node("Cast", ["x"], ["h"], "a/Cast", to=TensorProto.FLOAT16),
            node("Cast", ["h"], ["f"], "b/Cast", to=TensorProto.FLOAT),
            node("Cast", ["f"], ["d"], "c/Cast", to=TensorProto.DOUBLE),
            node("Cast", ["d"], ["g"], "d/Cast", to=TensorProto.FLOAT),
            node("Relu", ["g"], ["y"], "e/Relu"),
        ],
        "main",
        [value("x", TensorProto.FLOAT, ["n", 4])],
        [value("y", TensorProto.FLOAT, ["n", 4])],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    x = np.array([[1.0, -1.0, 1 + 2.0**-12, 3.0]], np.float32)
    seen = {name: Seen(3.0) for name in "xfgy"}
    made = convert("fp16", model, seen)
    to = {n.name: n.attribute[0].i for n in made.model.graph.node if n.op_type == "Cast"}
    half, double = TensorProto.FLOAT16, TensorProto.DOUBLE
    assert [to[f"{name}/Cast"] for name in "abcd"] == [half, half, double, half]
    assert run(made.model, x)["y"].tolist() == [[1.0, 0.0, 1.0, 3.0]]


def test_an_operator_with_a_graph_of_its_own_is_refused_by_name():
    value = onnx.helper.make_tensor_value_info
    branch = onnx.helper.make_graph(
        [node("Identity", ["x"], ["z"])], "g", [], [value("z", TensorProto.FLOAT, None)]
    )
    model = one("Identity")
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    del model.graph.node[:]
    model.graph.node.append(
        node("If", ["c"], ["y"], "one/If", then_branch=branch, else_branch=branch)
    )
    with refused(GraphError, "'one/If'", "graph of its own", hint=None):
        convert("fp16", model, {})


# ── What is asked for ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_layer_to_keep_stays_and_an_unknown_one_names_the_nearest(precision):
    graph, want = exported(plain)
    made = convert(precision, graph, keep=["2", "3/Relu"])
    assert in_single(made.model) == {"2", "3/Relu"}
    assert "in FP32: 2, 3/Relu: as asked for" in made.notes
    assert casts(made.model) == 4
    if precision == "fp16":
        assert off(run(made.model)["y"], want) < 2e-3
    with pytest.raises(UnknownName, match="no layer to keep named '3/Rel'") as refusal:
        convert(precision, graph, keep=["3/Rel"])
    assert "'3/Relu'" in (refusal.value.hint or "")


def test_half_io_is_refused_where_the_output_leaves_the_range_and_float_is_not():
    graph, want = exported(output)
    with refused(GraphError, "the output cannot be FP16", "'y' reaches", hint=("half_io",)):
        convert("fp16", graph, half_io=True)
    made = convert("fp16", graph)
    assert made.model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert np.abs(want).max() > 65504
    assert off(run(made.model)["y"], want) < 2e-3


def test_half_io_is_refused_where_the_input_leaves_the_range():
    graph, _ = exported(plain)
    with refused(GraphError, "the input cannot be FP16", "'input' reaches", hint=("half_io",)):
        convert("fp16", graph, {**ranges(graph), "input": Seen(1e5)}, half_io=True)


def test_half_io_and_an_fp32_region_go_together():
    graph, want = exported(activation)
    made = convert("fp16", graph, half_io=True)
    types = {
        v.type.tensor_type.elem_type for v in (*made.model.graph.input, *made.model.graph.output)
    }
    assert types == {TensorProto.FLOAT16}
    assert casts(made.model) == 2
    assert off(run(made.model)["y"], want) < 2e-3


# ── Around INT8 ─────────────────────────────────────────────────────────────────────


@cache
def with_a_small_scale() -> onnx.ModelProto:
    """The plain network with a filter of 1e-4, whose scale will be 1e-6."""
    small = onnx.ModelProto()
    small.CopyFrom(exported(plain)[0])
    for tensor in small.graph.initializer:
        if tensor.name == "2.weight":
            values = numpy_helper.to_array(tensor).copy()
            values[0] *= 1e-3
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return small


def around_int8():
    small = with_a_small_scale()
    seen = {name: reached(found.amax) for name, found in ranges(small).items()}
    return convert("int8", small, seen, **PLAIN, around="fp16")


def test_a_layer_with_a_scale_below_halfs_range_stays_fp32_with_its_pairs_around_int8():
    made = around_int8()
    stays = in_single(made.model)
    assert {"2", "2.weight/DequantizeLinear", "relu/DequantizeLinear"} <= stays
    assert "0" not in stays
    note = next(n for n in made.notes if "the quantisation scale '2.weight_scale'" in n)
    assert note.startswith("in FP32: 2.weight/DequantizeLinear, 2: ")
    assert "below FP16's normal range (6.1e-05)" in note
    types = {t.name: t.data_type for t in made.model.graph.initializer}
    assert types["2.weight_scale"] == types["relu_scale"] == TensorProto.FLOAT
    assert types["0.weight_scale"] == TensorProto.FLOAT16
    got = run(made.model)
    assert first_deviation(list(compare_layers(Emulator.of(made.model), got))) is None
    assert off(got["y"], run(with_a_small_scale())["y"].astype(np.float64)) < 0.05


@rtx
def test_tensorrt_rtx_takes_int8_with_fp32_and_half_around_it(tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(around_int8().model, path)
    runtime = plugins.load_runtime("tensorrt-rtx", {"targets": TARGETS})
    built = runtime.build(OnnxModel(path, "int8", INPUT, OUTPUT, BATCH), tmp_path)
    assert built.stat().st_size > 10_000


def test_an_activation_beyond_halfs_range_keeps_its_layers_in_fp32_around_int8_too():
    graph, want = exported(activation)
    seen = {name: reached(found.amax) for name, found in ranges(graph).items()}
    quantised = plugins.load_precision("int8", PLAIN).convert(graph, seen, X).model
    made = to_half(quantised, half_io=False, statistics=seen, samples=X)
    onnx.checker.check_model(made.model, full_check=True)
    assert {"2", "3/Relu", "relu/DequantizeLinear", "2.weight/DequantizeLinear"} <= in_single(
        made.model
    )
    assert any("'conv2d_1' reaches" in note for note in made.notes)
    assert off(run(made.model)["y"], want) < 0.05


# ── BF16 ────────────────────────────────────────────────────────────────────────────


def test_bf16_leaves_no_float32_inside_at_an_opset_that_has_such_convolutions():
    graph, _ = exported(activation)
    made = convert("bf16", graph)
    assert in_single(made.model) == set()
    assert {t.data_type for t in made.model.graph.initializer} <= {
        TensorProto.BFLOAT16, TensorProto.INT64
    }  # fmt: skip
    assert made.model.opset_import[0].version == 22
    assert graph.opset_import[0].version == 20
    (note,) = [note for note in made.notes if "8 bits" in note]
    assert "off by 0.1" in note or "off by 0.2" in note  # 2⁻⁹ at most, evenly spread


def test_bf16_weights_are_those_that_pytorch_rounds_to():
    graph, _ = exported(plain)
    stored = {t.name: t for t in convert("bf16", graph).model.graph.initializer}
    for tensor in graph.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            want = torch.from_numpy(numpy_helper.to_array(tensor).copy()).bfloat16()
            assert stored[tensor.name].raw_data == want.view(torch.int16).numpy().tobytes()


def test_onnx_runtimes_cpu_provider_says_that_it_has_no_bf16(tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(convert("bf16", exported(plain)[0]).model, path)
    runtime = plugins.load_runtime("ort-cpu", {})
    with refused(BuildError, "net.onnx", "Could not find an implementation", hint=None), runtime.open(path):  # fmt: skip  # noqa: E501
        pass
