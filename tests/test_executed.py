"""In which type layers ran: on graphs whose kernels are known, and on engines written by hand."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from exporter import plugins
from exporter.calibration import calibrate
from exporter.errors import BuildError
from exporter.records import BatchRange, Executed, Execution, OnnxModel, TensorSpec
from exporter.runtimes import _cuda, _engine, _trt
from exporter.runtimes._asked import asked_layers
from exporter.samples import digits, feeds

HAS_RTX = plugins.load_runtime("tensorrt-rtx", {}).missing("build") is None
rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt-rtx is not installed")


ZERO, LOWEST = np.int8(0), np.int8(-128)


def pair(name: str, scale: float, zero: np.ndarray):
    """Return a Q/DQ pair behind a tensor, and its constants."""
    constants = {f"{name}_s": np.float32(scale), f"{name}_z": zero}
    nodes = [
        helper.make_node("QuantizeLinear", [name, *constants], [f"{name}_q"], f"{name}/Q"),
        helper.make_node("DequantizeLinear", [f"{name}_q", *constants], [f"{name}_d"], f"{name}/D"),
    ]
    return nodes, constants


def convolution(
    folder, *, zero=ZERO, relu=False, quantised=True, activations=True, shared=False
) -> OnnxModel:
    """Write Q → Conv (→ ReLU) (→ Q): what stands behind decides what ONNX Runtime makes of it."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.integers(-127, 128, (8, 4, 3, 3)).astype(np.int8),
        "w_s": np.full(8, 0.01, np.float32),
        "w_z": np.zeros(8, np.int8),
        "b": rng.normal(size=8).astype(np.float32),
    }
    nodes = []
    if activations:
        nodes, more = pair("x", 0.05, np.array(zero))
        constants |= more
    reads = ["x_d" if activations else "x", "w_d", "b"]
    nodes += [
        helper.make_node("DequantizeLinear", ["w", "w_s", "w_z"], ["w_d"], "w/D", axis=0),
        helper.make_node("Conv", reads, ["c"], "layer.conv", kernel_shape=[3, 3]),
    ]
    last = "c"
    if relu:
        nodes.append(helper.make_node("Relu", ["c"], ["r"], "layer.relu/Relu"))
        last = "r"
    if quantised:
        behind, more = pair(last, 0.1, np.array(zero))
        nodes, constants = nodes + behind, constants | more
        last = f"{last}_d"
    nodes.append(helper.make_node("Neg", [last], ["y"], "negate"))
    if shared:
        nodes.append(helper.make_node("Abs", ["x_d"], ["also"], "absolute"))
    shape = ["N", 4, 8, 8]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in ("y", "also")[: 1 + shared]
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "conv.onnx"
    onnx.save(model, path)
    return OnnxModel(
        path, "int8", TensorSpec("x", (4, 8, 8)), TensorSpec("y", (8, 6, 6)), BatchRange(1, 2, 4)
    )


def integer_kernels(model: OnnxModel, folder, kind: str = "QLinearConv") -> int:
    """Count ONNX Runtime's integer layers in the graph that it writes itself."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "seen.onnx")
    onnxruntime.InferenceSession(model.path, options, providers=["CPUExecutionProvider"])
    return sum(n.op_type == kind for n in onnx.load(folder / "seen.onnx").graph.node)


# ── ONNX Runtime ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("form", "ran", "reason"),
    [
        ({}, "int8", None),
        ({"zero": np.uint8(128)}, "int8", None),
        ({"zero": LOWEST, "relu": True}, "int8", None),
        ({"zero": np.uint8(0), "relu": True}, "int8", None),
        ({"quantised": False}, "fp32", "its output is read by Neg in float"),
        ({"quantised": False, "relu": True}, "fp32", "behind the layer or its Relu"),
        ({"relu": True}, "fp32", "zero point is 0: a Relu between"),
        ({"relu": True, "zero": np.uint8(128)}, "fp32", "integer kernel only where that is 0"),
        ({"shared": True}, "fp32", "no integer kernel for two types"),
    ],
)
def test_onnxruntime_says_which_kernel_ran_and_why_it_is_no_integer_one(
    tmp_path, form, ran, reason
):
    model = convolution(tmp_path, **form)
    execution = plugins.load_runtime("ort-cpu", {}).executed(model, model.path)
    assert execution.source == "profile"
    assert not execution.hint
    (layer,) = execution.layers
    assert (layer.layer, layer.op, layer.asked, layer.ran) == ("layer.conv", "Conv", "int8", ran)
    assert reason is None if layer.reason is None else reason in layer.reason
    assert integer_kernels(model, tmp_path) == (ran == "int8")
    assert bool(execution.missed) == (ran != "int8")


def test_pairs_that_an_option_keeps_as_written_are_run_in_float_and_say_so(tmp_path):
    model = convolution(tmp_path, zero=np.uint8(128))
    runtime = plugins.load_runtime("ort-cpu", {"as_written": True})
    (layer,) = runtime.executed(model, model.path).layers
    assert (layer.asked, layer.ran) == ("int8", "fp32")
    assert layer.reason == "the runtime's option as_written keeps its pairs as written"
    assert "as the option as_written asks for" in runtime.describe(model.path)[0]
    x = np.random.default_rng(1).normal(size=(2, 4, 8, 8)).astype(np.float32)
    outputs = []
    for as_written in (False, True):
        options = {"as_written": as_written}
        with plugins.load_runtime("ort-cpu", options).open(model.path) as session:
            outputs.append(session({"x": x})["y"])
    assert np.abs(outputs[0] - outputs[1]).max() <= 0.1001  # one step of the output's scale


def linear(folder, *, bias: bool, relu=False, quantised=False, zero=np.int8(0)) -> OnnxModel:  # noqa: B008 - numpy's scalars are immutable
    """Write Q → Gemm (→ ReLU) (→ Q), and with nothing behind it the output is the graph's."""
    constants = {
        "w": np.random.default_rng(0).integers(-127, 128, (8, 4)).astype(np.int8),
        "w_s": np.full(8, 0.01, np.float32),
        "w_z": np.zeros(8, np.int8),
        "b": np.ones(8, np.float32),
    }
    nodes, more = pair("x", 0.05, np.array(zero))
    constants |= more
    nodes += [
        helper.make_node("DequantizeLinear", ["w", "w_s", "w_z"], ["w_d"], "w/D", axis=0),
        helper.make_node("Gemm", ["x_d", "w_d", "b"][: 2 + bias], ["g"], "layer.linear", transB=1),
    ]
    last = "g"
    if relu:
        nodes.append(helper.make_node("Relu", ["g"], ["r"], "layer.relu/Relu"))
        last = "r"
    if quantised:
        behind, more = pair(last, 0.1, np.array(zero))
        nodes, constants = nodes + behind, constants | more
        last = f"{last}_d"
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "linear.onnx"
    onnx.save(model, path)
    return OnnxModel(
        path, "int8", TensorSpec("x", (4,)), TensorSpec(last, (8,)), BatchRange(1, 2, 4)
    )


@pytest.mark.parametrize(
    ("form", "ran", "reason"),
    [
        ({"bias": False}, "int8", None),
        ({"bias": True}, "fp32", "its bias is in float"),
        ({"bias": True, "quantised": True}, "int8", None),
        ({"bias": True, "relu": True}, "fp32", "the graph's own, in float"),
        ({"bias": True, "relu": True, "quantised": True}, "fp32", "zero point is 0: a Relu"),
        ({"bias": True, "relu": True, "quantised": True, "zero": LOWEST}, "int8", None),
    ],
)
def test_a_linear_layer_needs_no_quantised_output_unless_it_has_a_bias(tmp_path, form, ran, reason):
    model = linear(tmp_path, **form)
    (layer,) = plugins.load_runtime("ort-cpu", {}).executed(model, model.path).layers
    assert (layer.layer, layer.op, layer.asked, layer.ran) == ("layer.linear", "Gemm", "int8", ran)
    assert layer.reason is None if reason is None else reason in layer.reason
    assert integer_kernels(model, tmp_path, "QGemm") == (ran == "int8")


def test_weights_alone_are_dequantised_first(tmp_path):
    model = convolution(tmp_path, activations=False, quantised=False)
    (layer,) = plugins.load_runtime("ort-cpu", {}).executed(model, model.path).layers
    assert (layer.asked, layer.ran) == ("int8 weights", "fp32")
    assert "dequantises first" in layer.reason


def converted(tiny_onnx, folder, name, **options) -> OnnxModel:
    graph = onnx.load(tiny_onnx.path)
    images = digits((1, 32, 32), "train").inputs[:16]
    statistics = calibrate(graph, feeds(images, "input", size=1))
    model = plugins.load_precision(name, options).convert(graph, statistics, images).model
    path = folder / f"tiny.{name}.onnx"
    onnx.save(model, path)
    return tiny_onnx._replace(path=path, precision=name)


def test_every_layer_is_told_by_the_name_it_has_in_pytorch(tiny_module, tiny_onnx, tmp_path):
    """This provider has no half kernels, and fuses one integer one for this placement."""
    runtime = plugins.load_runtime("ort-cpu", {})
    assert runtime.executed(tiny_onnx, tiny_onnx.path) is None
    convolutions = {n for n, m in tiny_module.named_modules() if isinstance(m, nn.Conv2d)}
    linear = {n for n, m in tiny_module.named_modules() if isinstance(m, nn.Linear)}
    int8 = converted(tiny_onnx, tmp_path, "int8")
    found = runtime.executed(int8, int8.path)
    assert {layer.layer for layer in found.layers} == convolutions
    assert found.counts == {"int8": (1, 6)}
    assert all(layer.reason for layer in found.layers if layer.ran != "int8")
    assert not found.untold
    fp16 = converted(tiny_onnx, tmp_path, "fp16")
    found = runtime.executed(fp16, fp16.path)
    assert {layer.layer for layer in found.layers} == convolutions | linear
    assert found.counts == {"fp16": (0, 7)}
    assert {layer.ran for layer in found.layers} == {"fp32"}


def test_pairs_that_are_run_as_written_are_the_reason(tiny_onnx, tmp_path):
    half = converted(tiny_onnx, tmp_path, "int8", around="fp16")
    found = plugins.load_runtime("ort-cpu", {}).executed(half, half.path)
    assert found.counts == {"int8": (0, 6), "fp16": (0, 1)}
    assert all(
        "session.disable_quant_qdq=1" in one.reason for one in found.layers if one.asked == "int8"
    )


def test_what_cannot_be_run_is_not_taken_to_have_happened(tmp_path, monkeypatch):
    monkeypatch.setattr("exporter.runtimes.ort_cuda.missing_gpu", lambda: "no NVIDIA GPU")
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"], raising=True
    )
    model = convolution(tmp_path)
    found = plugins.load_runtime("ort-cuda", {}).executed(model, model.path)
    assert found == Execution("profile", unknown="no NVIDIA GPU")
    assert found.counts == {}


# ── The engine inspector ────────────────────────────────────────────────────────────

WIDE = "Thirty-two wide channel vectorized row major Int8 format"


def network(*names: str, weights=np.int8, activations=True) -> tuple:
    """Return the layers that a chain of 1×1 convolutions asks for."""
    nodes, constants, last = [], {"s": np.float32(0.1), "z": np.int8(0)}, "x"
    for name in names:
        if activations:
            nodes += [
                helper.make_node("QuantizeLinear", [last, "s", "z"], [f"{name}.q"]),
                helper.make_node("DequantizeLinear", [f"{name}.q", "s", "z"], [f"{name}.d"]),
            ]
            last = f"{name}.d"
        constants[f"{name}.w"] = np.ones((4, 4, 1, 1), weights)
        kernel = f"{name}.w"
        if weights is np.int8:
            nodes.append(helper.make_node("DequantizeLinear", [kernel, "s", "z"], [f"{name}.k"]))
            kernel = f"{name}.k"
        nodes.append(helper.make_node("Conv", [last, kernel], [f"{name}.y"], name))
        last = f"{name}.y"
    tensors = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    return asked_layers(helper.make_graph(nodes, "graph", [], [], tensors))


def schema_10(*layers: tuple[str, str, str, str]) -> str:
    """Write the inspector's JSON as TensorRT 10 does, its tensors' types in words."""
    entries = [
        {
            "Name": f"{name} + {name}.relu",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "a", "Dimensions": [1, 4, 8, 8], "Format/Datatype": reads}],
            "Outputs": [{"Name": "b", "Dimensions": [1, 4, 8, 8], "Format/Datatype": writes}],
            "ParameterType": "Convolution",
            "Kernel": [1, 1],
            "Weights": {"Type": weights, "Count": 16},
            "Bias": {"Type": "Float", "Count": 4},
            "HasBias": 1,
            "HasReLU": 1,
            "TacticName": "sm80_xmma_fprop_implicit_gemm",
            "Metadata": f"[ONNX Layer: {name}]\x1e[ONNX Layer: {name}.relu/Relu]",
        }
        for name, reads, weights, writes in layers
    ]
    return json.dumps({"Layers": entries, "Bindings": ["input", "logits"]})


def schema_11(*layers: tuple[str, list[str]]) -> str:
    """Write it as TensorRT 11 does, format and type apart, with weights among the inputs."""
    entries = [
        {
            "Name": f"__myl_{i}",
            "LayerType": "conv",
            "Inputs": [
                {"Name": str(i), "Dimensions": [1], "Format": "Row major", "Datatype": kind}
                for i, kind in enumerate(reads)
            ],
            "Outputs": [
                {"Name": "o", "Dimensions": [1], "Format": "Row major", "Datatype": "Half"}
            ],
            "Metadata": f"[ONNX Layer: {name}]",
        }
        for i, (name, reads) in enumerate(layers)
    ]
    io = {"Name": "input", "IOMode": "Input", "DataType": "Float", "Dimensions": [1, 4, 8, 8]}
    return json.dumps({"Layers": entries, "I/O Tensors": [io]})


def test_the_inspector_of_tensorrt_10_is_read():
    asked = network("a.conv", "b.conv", "c.conv")
    text = schema_10(
        ("a.conv", WIDE, "Int8", WIDE),
        ("b.conv", "Row major linear FP16 format", "Half", "Row major linear FP16 format"),
    )
    a, b, c = _engine.inspected(text, asked)
    assert a == Executed("a.conv", "Conv", "int8", "int8", None, ("bias", "ReLU"))
    assert (b.asked, b.ran, b.happened) == ("int8", "fp16", False)
    assert c.ran is None
    assert c.reason == "no layer of the engine names it"


def test_the_inspector_of_tensorrt_11_is_read():
    text = schema_11(("a.conv", ["Int8", "Int8", "Float"]), ("b.conv", ["Half", "Half"]))
    a, b = _engine.inspected(text, network("a.conv", "b.conv"))
    assert (a.ran, b.ran) == ("int8", "fp16")
    assert a.fused is None
    (only,) = _engine.inspected(
        schema_11(("a.conv", ["Half", "Int8"])), network("a.conv", activations=False)
    )
    assert (only.asked, only.ran) == ("int8 weights", "int8 weights")


def test_a_layer_named_in_metadata_by_a_pointwise_kernel_too_is_the_product():
    told = json.loads(schema_10(("a.conv", WIDE, "Int8", WIDE)))
    told["Layers"].insert(
        0,
        {
            "Name": "__myl_MulAdd",
            "LayerType": "kgen",
            "Inputs": [{"Name": "p", "Format/Datatype": "Float"}],
            "Outputs": [],
            "Metadata": "[ONNX Layer: a.conv]\x1e[ONNX Layer: a.relu/Relu]",
        },
    )
    (layer,) = _engine.inspected(json.dumps(told), network("a.conv"))
    assert layer.ran == "int8"


def test_one_layer_in_two_kernels_of_two_types_is_not_told():
    text = schema_10(("a.conv", WIDE, "Int8", WIDE), ("a.conv", "Float", "Float", "Float"))
    (layer,) = _engine.inspected(text, network("a.conv"))
    assert layer.ran is None
    assert "several types" in layer.reason


@pytest.mark.parametrize(
    "text", ["", "not JSON", "[]", '{"Layers": ["a.conv"], "Bindings": []}', '{"Layers": []}', "7"]
)
def test_an_inspector_that_tells_of_no_types_gives_no_layers(text):
    assert _engine.inspected(text, network("a.conv")) == ()


class Inspected(_trt.TensorRt, frozen=True):
    """TensorRT, pretended."""

    package: ClassVar[str] = "pretended_trt"


@pytest.fixture
def pretended(monkeypatch):
    """Pretend TensorRT and a GPU: an engine that inspects itself, and keeps what it was asked."""
    asked = SimpleNamespace(shape=None, answer="")

    class Engine:
        def create_execution_context(self):
            return self

        def set_input_shape(self, name, shape):
            asked.shape = (name, shape)
            return True

        def create_engine_inspector(self):
            return self

        def get_engine_information(self, form):
            assert form == "json"
            assert self.execution_context is self
            return asked.answer

    class Logger:
        def __init__(self):
            pass

    module = SimpleNamespace(
        __name__="pretended_trt",
        ILogger=Logger,
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        Runtime=lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda data: Engine() if data.startswith(b"plan") else None
        ),
    )
    monkeypatch.setitem(sys.modules, "pretended_trt", module)
    monkeypatch.setattr(_cuda, "missing_to_run", lambda: None)
    return asked


def test_an_engine_is_inspected_at_the_batch_that_it_is_tuned_for(pretended, tmp_path):
    model = convolution(tmp_path)
    pretended.answer = schema_11(("layer.conv", ["Int8", "Int8"]))
    (tmp_path / "x.engine").write_bytes(b"plan")
    found = Inspected().executed(model, tmp_path / "x.engine")
    assert pretended.shape == ("x", (2, 4, 8, 8))
    assert (found.source, found.hint, found.counts) == (
        "engine inspector",
        False,
        {"int8": (1, 1)},
    )


def test_an_engine_whose_inspector_says_nothing_is_unknown(pretended, tmp_path):
    model = convolution(tmp_path)
    (tmp_path / "x.engine").write_bytes(b"plan")
    found = Inspected().executed(model, tmp_path / "x.engine")
    assert (found.layers, found.unknown) == ((), "the engine inspector names no layer's types")
    (tmp_path / "y.engine").write_bytes(b"other")
    with pytest.raises(BuildError, match=r"pretended_trt refused y\.engine"):
        Inspected().executed(model, tmp_path / "y.engine")


# ── The text in an engine: a hint ───────────────────────────────────────────────────

TEXT = """\x00\x01{{ binary
  tensor={ alignment=128 dims={ 1 4 8 8 } name="in" offset=1 strides={ 1 1 } type=READS }
  tensor={ const_payload_size=64 dims={ 4 4 1 1 } name="k" rank0=0 type=WEIGHTS }
  corrltn={ name="a.conv" output={"out" } input={"in" "k" "one" } strides={ 1 1 } relu=RELU \
relu_high=7F bias=true quantize=false accu=false layers="[ONNX Layer: a.conv]" }\xff}"""


def engine(reads: str, weights: str, relu: str = "true") -> bytes:
    text = TEXT.replace("READS", reads).replace("WEIGHTS", weights).replace("RELU", relu)
    return text.encode("latin-1")


@pytest.mark.parametrize(
    ("reads", "weights", "ran"),
    [
        ("int8", "int8", "int8"),
        ("half", "half", "fp16"),
        ("half", "int8", "int8 weights"),
        ("fp8_e4m3", "fp8_e4m3", "fp8"),
        ("half", "fp8_e4m3", "fp8 weights"),
        ("float", "float", "fp32"),
        ("unheard", "int8", None),
    ],
)
def test_an_engines_text_tells_types_and_what_is_fused(reads, weights, ran):
    (layer,) = _engine.read_text(engine(reads, weights), network("a.conv"))
    assert (layer.asked, layer.ran, layer.fused) == ("int8", ran, ("bias", "ReLU"))
    (layer,) = _engine.read_text(engine(reads, weights, "false"), network("a.conv"))
    assert layer.fused == ("bias",)


def test_a_layer_that_the_text_does_not_name_is_not_told():
    asked = network("a.conv", "b.conv")
    a, b = _engine.read_text(engine("int8", "int8"), asked)
    assert a.happened
    assert (b.ran, b.happened) == (None, False)
    twice = engine("int8", "int8") + engine("int8", "int8", "false")
    assert _engine.read_text(twice, asked)[0].ran is None


@pytest.mark.parametrize("data", [b"", b"vtrt\x00\x00", b"corrltn={ name=", b"{" * 100_000])
def test_an_engine_without_text_gives_no_layers(data):
    assert _engine.read_text(data, network("a.conv")) == ()


@rtx
@pytest.mark.parametrize(
    ("name", "options", "counts", "biases"),
    [
        ("int8", {}, {"int8": (6, 6)}, 0),
        ("fp16", {}, {"fp16": (7, 7)}, 6),
        ("int8", {"around": "fp16"}, {"int8": (6, 6), "fp16": (1, 1)}, 0),
        ("int8", {"linear": True}, {"int8": (7, 7)}, 0),
        ("fp8", {}, {"fp8": (5, 6)}, 1),
    ],
)
def test_a_real_engine_gives_a_hint_with_no_gpu(tiny_onnx, tmp_path, name, options, counts, biases):
    """TensorRT-RTX fuses the bias of half convolutions, and of integer ones does not.

    It leaves the first convolution, of one channel, out of FP8.
    """
    if not _cuda.missing_gpu():
        pytest.skip("this machine has an NVIDIA GPU")
    model = converted(tiny_onnx, tmp_path, name, **options)
    runtime = plugins.load_runtime("tensorrt-rtx", {"targets": ["sm89"]})
    found = runtime.executed(model, runtime.build(model, tmp_path))
    assert (found.source, found.hint) == ("engine text", True)
    assert found.counts == counts
    assert sum("bias" in (layer.fused or ()) for layer in found.layers) == biases


@rtx
def test_an_engine_of_which_nothing_can_be_read_says_why(tmp_path):
    if not (reason := _cuda.missing_gpu()):
        pytest.skip("this machine has an NVIDIA GPU")
    model = convolution(tmp_path)
    (tmp_path / "x.engine").write_bytes(b"vtrt")
    found = plugins.load_runtime("tensorrt-rtx", {}).executed(model, tmp_path / "x.engine")
    assert found == Execution("engine inspector", unknown=reason)


def test_weights_that_are_unpacked_before_the_convolution_are_told():
    """So does TensorRT-RTX 1.7 with INT8 weights, beside which it fuses bias and ReLU."""
    unpacking = b"""
  tensor={ const_payload_size=64 dims={ 4 4 1 1 } name="stored" rank0=0 type=int8 }
  function={ name=__myl_CastMulCast fqn=f args={ "stored" "k" } input_args={ "stored" } \
shape_args_count=0 output_args={ "k" } kernel_kind=1 }
"""
    asked = network("a.conv", activations=False)
    (layer,) = _engine.read_text(unpacking + engine("half", "half"), asked)
    assert (layer.asked, layer.ran) == ("int8 weights", "fp16")
    assert layer.reason == "a kernel of its own dequantises the weights first"
    (layer,) = _engine.read_text(engine("half", "half"), asked)
    assert layer.reason is None


@rtx
def test_a_real_engine_unpacks_its_int8_weights_first(tiny_onnx, tmp_path):
    if not _cuda.missing_gpu():
        pytest.skip("this machine has an NVIDIA GPU")
    model = converted(tiny_onnx, tmp_path, "int8-weights", around="fp16")
    runtime = plugins.load_runtime("tensorrt-rtx", {"targets": ["sm89"]})
    found = runtime.executed(model, runtime.build(model, tmp_path))
    assert found.counts == {"int8 weights": (0, 7)}
    assert {layer.ran for layer in found.layers} == {"fp16"}
    assert sum("bias" in (layer.fused or ()) for layer in found.layers) == 6
    assert any("dequantises the weights first" in str(layer.reason) for layer in found.layers)
