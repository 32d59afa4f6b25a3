"""INT8 for weights alone: what is stored, what is lost, and where it runs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from exporter import plugins
from exporter.emulation import Emulator
from exporter.emulation.rounding import LAYERS
from exporter.errors import ExportError, UnknownName
from exporter.fidelity import LIMIT, compare_layers, expose, first_deviation
from exporter.flops import count_flops
from exporter.samples import digits

rtx = pytest.mark.skipif(
    bool(plugins.load_runtime("tensorrt-rtx", {}).missing("build")), reason="needs tensorrt-rtx"
)


@pytest.fixture(scope="module")
def graph(tiny_onnx) -> onnx.ModelProto:
    return onnx.load(tiny_onnx.path)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return digits((1, 32, 32), "held-out").inputs[:8]


def convert(graph, **options):
    return plugins.load_precision("int8-weights", options).convert(graph, {}, np.empty(0))


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def run(model: onnx.ModelProto, x: np.ndarray, folder) -> dict[str, np.ndarray]:
    """Every tensor that the runtime ort-cpu gives."""
    onnx.save(expose(model), folder / "run.onnx")
    with plugins.load_runtime("ort-cpu", {"threads": 1}).open(folder / "run.onnx") as session:
        return {"input": x, **session({"input": x})}


def test_weights_alone_are_quantised(graph):
    model = convert(graph).model
    onnx.checker.check_model(model, full_check=True)
    stored = constants(model)
    ops = [node.op_type for node in model.graph.node]
    assert "QuantizeLinear" not in ops
    assert ops.count("DequantizeLinear") == 7
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            assert stored[node.input[0]].dtype == np.int8
            assert np.abs(stored[node.input[0]].astype(int)).max() == 127
            assert not stored[node.input[2]].any()


def test_the_graph_is_the_fp32_one_with_its_weights_rounded(graph, images):
    """Rounded here by hand, per output channel, and put back as floats."""
    rounded = onnx.ModelProto()
    rounded.CopyFrom(graph)
    tensors = {tensor.name: tensor for tensor in rounded.graph.initializer}
    for node in rounded.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weights = numpy_helper.to_array(tensors[node.input[1]]).astype(np.float64)
            axes = tuple(range(1, weights.ndim))
            scale = np.abs(weights).max(axis=axes, keepdims=True) / 127
            scale = np.where(scale > 0, scale, 1).astype(np.float32).astype(np.float64)
            got = (np.rint(weights / scale) * scale).astype(np.float32)
            tensors[node.input[1]].CopyFrom(numpy_helper.from_array(got, node.input[1]))
    feed = {"input": torch.from_numpy(images).double()}
    want = Emulator.of(rounded).run(feed)["logits"]
    got = Emulator.of(convert(graph).model).run(feed)["logits"]
    plain = Emulator.of(graph).run(feed)["logits"]
    size = want.abs().max()
    assert (got - want).abs().max() < 1e-6 * size
    assert (got - plain).abs().max() > 1e-4 * size


def test_a_file_holds_a_byte_for_each_weight(graph):
    model = convert(graph).model
    weights = sum(v.size for n, v in constants(model).items() if n.endswith("_q"))
    scales = sum(v.size for n, v in constants(model).items() if n.endswith("_scale"))
    saved = count_flops(graph).weight_bytes - count_flops(model).weight_bytes
    assert saved == 3 * weights - 5 * scales


def test_linear_layers_can_be_left_and_layers_kept(graph):
    assert convert(graph).notes == ("7 of 7 weighted layers in INT8 (weights alone)",)
    left = convert(graph, linear=False)
    assert left.notes == ("6 of 7 weighted layers in INT8 (weights alone); block4.2 in FP32",)
    kept = convert(graph, keep=["block2.0.conv1"]).model
    conv = next(n for n in kept.graph.node if n.name == "block2.0.conv1")
    assert constants(kept)[conv.input[1]].dtype == np.float32
    with pytest.raises(UnknownName, match="no layer to keep named 'conv1'"):
        convert(graph, keep=["conv1"])


def test_around_half_leaves_no_float32_but_a_layer_with_a_scale_below_halfs_range(graph):
    model = convert(graph, around="fp16").model
    onnx.checker.check_model(model, full_check=True)
    kinds = {t.data_type for t in model.graph.initializer}
    assert TensorProto.FLOAT not in kinds
    assert {TensorProto.FLOAT16, TensorProto.INT8} <= kinds
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    inside = convert(graph, around="fp16", half_io=True).model
    assert inside.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    small = onnx.ModelProto()
    small.CopyFrom(graph)
    name = next(n.input[1] for n in small.graph.node if n.op_type == "Conv")
    tensor = next(t for t in small.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e-4), name))
    made = convert(small, around="fp16")
    scales = [t for t in made.model.graph.initializer if t.name.endswith("_scale")]
    assert {t.name for t in scales if t.data_type == TensorProto.FLOAT} == {f"{name}_scale"}
    assert any(f"the quantisation scale '{name}_scale' goes down to" in n for n in made.notes)


def test_half_input_and_output_need_half_around():
    with pytest.raises(ExportError, match='half_io needs around = "fp16"'):
        plugins.load_precision("int8-weights", {"half_io": True})


@pytest.mark.parametrize("around", ["fp32", "fp16"])
def test_an_honest_run_is_right_and_one_integer_off_by_one_is_found(
    graph, images, tmp_path, around
):
    model = convert(graph, around=around).model
    asked = Emulator.of(model)
    assert first_deviation(list(compare_layers(asked, run(model, images, tmp_path)))) is None
    file = onnx.ModelProto()
    file.CopyFrom(model)
    conv = next(n for n in file.graph.node if n.name == "block3.0.conv2")
    name = f"{conv.input[1].removesuffix('_dq')}_q"
    tensor = next(t for t in file.graph.initializer if t.name == name)
    integers = numpy_helper.to_array(tensor).copy()
    integers.flat[17] += 1 if integers.flat[17] < 127 else -1
    tensor.CopyFrom(numpy_helper.from_array(integers, name))
    wrong = first_deviation(list(compare_layers(asked, run(file, images, tmp_path))))
    assert wrong is not None
    assert (wrong.layer, wrong.tensor) == ("block3.0.conv2", conv.input[1])


def test_a_layers_loss_is_what_the_steps_of_its_weights_explain(graph, images):
    emulator = Emulator.of(graph)
    every = [name for step in emulator.steps for name in step.writes]
    values = emulator.run({"input": torch.from_numpy(images)}, watch=every)
    found = {"input": images, **{name: value.numpy() for name, value in values.items()}}
    errors = list(compare_layers(Emulator.of(convert(graph).model), found, quantising=True))
    layers = [error for error in errors if error.op in LAYERS]
    assert len(layers) == 7
    assert all(0.3 < error.multiple < LIMIT for error in layers)


def test_the_runtime_dequantises_once_and_says_so(tiny_onnx, graph, tmp_path):
    onnx.save(convert(graph).model, tmp_path / "weights.onnx")
    runtime = plugins.load_runtime("ort-cpu", {})
    assert runtime.describe(tmp_path / "weights.onnx") == (
        "weights are dequantised once, when the file is loaded: the file is smaller, and expect no "
        "gain beside that",
    )
    optimised, _ = runtime._profile(tiny_onnx, tmp_path / "weights.onnx")
    assert "DequantizeLinear" not in {node.op_type for node in optimised.node}


@rtx
@pytest.mark.parametrize("around", ["fp32", "fp16"])
@pytest.mark.parametrize("targets", [["sm80"], ["sm86", "sm89", "sm120"]])
def test_an_engine_is_built_for_every_target(tiny_onnx, graph, tmp_path, around, targets):
    onnx.save(convert(graph, around=around).model, tmp_path / "tiny.onnx")
    model = tiny_onnx._replace(path=tmp_path / "tiny.onnx", precision="int8-weights")
    engine = plugins.load_runtime("tensorrt-rtx", {"targets": targets}).build(model, tmp_path)
    assert engine.stat().st_size > 1000
