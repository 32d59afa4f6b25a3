"""OpenVINO: at the graph's precision, on the device that was asked for, and what it says it ran."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import refused
from onnx import TensorProto, helper, numpy_helper
from test_fused import judged_on_pixels
from test_topk import judged_on_top_k
from torch import nn

from exporter import plugins
from exporter.calibration import calibrate
from exporter.emulation import Emulator
from exporter.errors import BuildError, InputRefused, ProfileError
from exporter.fidelity import compare_layers, expose, first_deviation
from exporter.flops import count_flops
from exporter.records import BatchRange, FreeAxis, OnnxModel, SizeRange, TensorSpec
from exporter.runtimes import _openvino
from exporter.samples import digits, feeds, noise
from exporter.sizing import free_sides
from exporter.to_onnx import export_onnx

MISSING = plugins.load_runtime("openvino", {}).missing("run")
needed = pytest.mark.skipif(MISSING is not None, reason=f"openvino: {MISSING}")


def converted(tiny_onnx: OnnxModel, folder, precision: str, **options) -> OnnxModel:
    graph = onnx.load(tiny_onnx.path)
    images = digits((1, 32, 32), "train").inputs[:16]
    statistics = calibrate(graph, feeds(images, "input", size=1))
    made = plugins.load_precision(precision, options).convert(graph, statistics, images).model
    path = folder / f"tiny.{precision}.onnx"
    onnx.save(made, path)
    return tiny_onnx._replace(path=path, precision=precision)


def kernels(path, **options) -> dict[str, int]:
    """Count the convolution kernels of a run by the type in their name, from OpenVINO's counters.

    They are another account than the compiled model, which the runtime reads.
    """
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"PERF_COUNT": True, **options})
    request = compiled.create_infer_request()
    request.infer({0: np.zeros((1, 1, 32, 32), np.float32)})
    names = [
        entry.exec_type.rpartition("_")[2].lower()
        for entry in request.profiling_info
        if entry.node_type == "Convolution"
    ]
    return {name: names.count(name) for name in names}


def has_bf16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


# ── At the graph's precision ────────────────────────────────────────────────────────


@needed
def test_fp32_is_computed_in_fp32_where_openvino_left_alone_would_take_bf16(tiny_module, tiny_onnx):
    x = noise((1, 32, 32), count=4, seed=0)
    with torch.inference_mode():
        want = tiny_module.double()(torch.from_numpy(x).double()).numpy()
        tiny_module.float()
    with plugins.load_runtime("openvino", {}).open(tiny_onnx.path) as session:
        got = session({"input": x})["logits"]
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
    if has_bf16():
        assert set(kernels(tiny_onnx.path)) == {"bf16"}


@needed
def test_a_file_of_free_sides_runs_at_every_size_and_is_profiled_at_the_one_it_is_tuned_for(
    tmp_path,
):
    net = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, 1, 1)).eval()
    (given,) = free_sides((TensorSpec("x", (1, 32, 32)),), SizeRange(min=(16, 16), max=(64, 72)))
    free = tuple(FreeAxis(axis, f"y_{axis + 1}", 8, 36) for axis in (1, 2))
    output = TensorSpec("y", (2, 16, 16), free=free)
    path = tmp_path / "net.onnx"
    export_onnx(net, path, input=given, output=output, batch=BatchRange(1, 2, 4))
    runtime = plugins.load_runtime("openvino", {})
    with runtime.open(path) as session:
        for size in [(16, 16), (33, 53), (64, 72)]:
            x = noise((1, *size), count=2, seed=0)
            with torch.inference_mode():
                want = net.double()(torch.from_numpy(x).double()).numpy()
                net.float()
            got = session({"x": x})["y"]
            assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
    _, found = runtime.kernels(path, batch=2, runs=1, warmup=0)
    assert sum(kernel.macs for kernel in found) == 2 * 16 * 16 * (4 * 9 + 2 * 4 * 9)


@needed
def test_bf16_is_a_graph_and_no_option(tiny_onnx, tmp_path):
    model = converted(tiny_onnx, tmp_path, "bf16")
    execution = plugins.load_runtime("openvino", {}).executed(model, model.path)
    ran = {layer.ran for layer in execution.layers}
    assert ran == ({"bf16"} if has_bf16() else {"fp32"})
    with refused(ProfileError, "precision", hint=("device", "threads")):
        plugins.load_runtime("openvino", {"precision": "bf16"})


@needed
def test_a_model_that_came_out_in_another_type_than_the_graphs_is_refused(tiny_onnx, monkeypatch):
    import openvino

    monkeypatch.setattr(
        openvino,
        "Core",
        lambda: SimpleNamespace(
            read_model=lambda path: None,
            compile_model=lambda *given: SimpleNamespace(
                get_property=lambda key: (
                    ["CPU"] if key == "EXECUTION_DEVICES" else openvino.Type.bf16
                )
            ),
        ),
    )
    with (
        refused(BuildError, "openvino would run tiny.fp32.onnx in bf16"),
        plugins.load_runtime("openvino", {}).open(tiny_onnx.path),
    ):
        pass


@needed
@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp32", {}),
        ("fp16", {}),
        ("int8", {"form": "tensorrt"}),
        ("int8", {"form": "onnxruntime", "linear": True}),
        ("int8-weights", {}),
    ],
)
def test_every_layer_is_what_the_graph_asked_for_with_all_tensors_read_out(
    tiny_onnx, tmp_path, precision, options
):
    model = converted(tiny_onnx, tmp_path, precision, **options)
    graph = onnx.load(model.path)
    onnx.save(expose(graph), tmp_path / "exposed.onnx")
    x = digits((1, 32, 32), "held-out").inputs[:8]
    with plugins.load_runtime("openvino", {}).open(tmp_path / "exposed.onnx") as session:
        found = {"input": x, **session({"input": x})}
    errors = list(compare_layers(Emulator.of(graph), found))
    assert len(errors) >= len(graph.graph.node) // 2
    assert first_deviation(errors) is None


@needed
def test_what_is_rounded_twice_on_the_way_to_fp8_is_said_and_found(tiny_onnx, tmp_path):
    """OpenVINO's values are those that FP16 gives in between, and not those of the graph."""
    model = converted(tiny_onnx, tmp_path, "fp8")
    graph = onnx.load(model.path)
    onnx.save(expose(graph), tmp_path / "exposed.onnx")
    scale = next(
        numpy_helper.to_array(t) for t in graph.graph.initializer if t.name == "input_scale"
    )
    x = np.random.default_rng(0).uniform(-1, 1, (8, 1, 32, 32)).astype(np.float32)
    runtime = plugins.load_runtime("openvino", {})
    with runtime.open(tmp_path / "exposed.onnx") as session:
        got = session({"input": x})["input_q"]
    steps = np.clip(x / scale, -448, 448)
    assert np.array_equal(got, steps.astype(np.float16).astype(got.dtype))
    assert not np.array_equal(got, steps.astype(got.dtype))
    assert "rounds to FP16 on the way to FP8" in runtime.describe(model.path)[1]
    assert len(runtime.describe(tiny_onnx.path)) == 1


# ── In which type layers ran ────────────────────────────────────────────────────────


@needed
@pytest.mark.parametrize("form", ["tensorrt", "onnxruntime"])
def test_layers_are_said_to_run_in_what_their_kernels_are_called_by(tiny_onnx, tmp_path, form):
    model = converted(tiny_onnx, tmp_path, "int8", form=form)
    runtime = plugins.load_runtime("openvino", {})
    execution = runtime.executed(model, model.path)
    assert execution.source == "profile"
    assert not execution.untold
    found = kernels(model.path, EXECUTION_MODE_HINT="ACCURACY")
    told = [layer.ran for layer in execution.layers]
    assert {"i8": told.count("int8"), "f32": told.count("fp32")} == {"i8": 0, "f32": 0, **found}
    names = [name for name, part in tiny_onnx_layers(tiny_onnx)]
    assert [layer.layer for layer in execution.layers] == names


def tiny_onnx_layers(model: OnnxModel):
    """Yield the convolutions' names, which are the PyTorch module's."""
    for node in onnx.load(model.path).graph.node:
        if node.op_type == "Conv":
            yield node.name, node


@needed
def test_the_form_for_onnxruntime_runs_in_integers_throughout_here_too(tiny_onnx, tmp_path):
    model = converted(tiny_onnx, tmp_path, "int8", form="onnxruntime", linear=True)
    execution = plugins.load_runtime("openvino", {}).executed(model, model.path)
    (count, total) = execution.counts["int8"]
    assert count == total
    assert {layer.op for layer in execution.layers} == {"Conv", "Gemm"}
    assert [layer.reason for layer in execution.layers] == [None] * total


def float_input(folder) -> OnnxModel:
    """Write a convolution whose integer input something else than a quantiser made float."""
    value = helper.make_tensor_value_info
    constants = {
        "s": np.float32(0.1),
        "z": np.int8(0),
        "w": np.ones((4, 4, 1, 1), np.int8),
        "ws": np.full(4, 0.1, np.float32),
        "wz": np.zeros(4, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "x/Q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "x/D"),
        helper.make_node("Sin", ["d"], ["f"], "wave"),
        helper.make_node("QuantizeLinear", ["f", "s", "z"], ["fq"], "f/Q"),
        helper.make_node("DequantizeLinear", ["fq", "s", "z"], ["fd"], "f/D"),
        helper.make_node("Sin", ["fd"], ["g"], "again"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "w/D", axis=0),
        helper.make_node("Conv", ["g", "wd"], ["y"], "layer"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["N", 4, 8, 8])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "float.onnx")
    shape = (4, 8, 8)
    return OnnxModel(
        folder / "float.onnx", "int8", TensorSpec("x", shape), TensorSpec("y", shape), BatchRange()
    )


@needed
def test_what_did_not_run_as_asked_has_its_reason(tmp_path, tiny_onnx):
    weights = float_input(tmp_path)
    runtime = plugins.load_runtime("openvino", {})
    (layer,) = runtime.executed(weights, weights.path).layers
    assert (layer.layer, layer.asked, layer.ran) == ("layer", "int8 weights", "fp32")
    assert "dequantises first" in layer.reason
    half = converted(tiny_onnx, tmp_path, "fp16")
    missed = runtime.executed(half, half.path).missed
    assert all("OpenVINO has no FP16 kernel" in layer.reason for layer in missed)


@needed
def test_a_graph_that_asks_for_nothing_below_fp32_has_nothing_to_say(tiny_onnx):
    runtime = plugins.load_runtime("openvino", {})
    assert runtime.executed(tiny_onnx, tiny_onnx.path) is None


# ── Kernels ─────────────────────────────────────────────────────────────────────────


@needed
@pytest.mark.parametrize(
    ("precision", "options", "kind"),
    [("fp32", {}, "fp32"), ("int8", {"form": "onnxruntime", "linear": True}, "int8")],
)
def test_kernels_compute_what_the_graph_has_and_are_called_as_its_layers(
    tiny_onnx, tmp_path, precision, options, kind
):
    model = converted(tiny_onnx, tmp_path, precision, **options)
    runtime = plugins.load_runtime("openvino", {"threads": 1})
    threads, found = runtime.kernels(model.path, batch=3, runs=2, warmup=1)
    assert threads == 1
    graph = onnx.load(model.path)
    weighted = [n.name for n in graph.graph.node if n.op_type in ("Conv", "Gemm")]
    products = [kernel for kernel in found if kernel.macs]
    assert sorted(kernel.name for kernel in products) == sorted(weighted)
    assert {kernel.type for kernel in products} == {kind}
    wanted = {layer.name: layer.macs for layer in count_flops(graph).layers if layer.macs}
    assert {k.name: k.macs for k in products} == {n: 3 * macs for n, macs in wanted.items()}
    assert all(kernel.milliseconds > 0 for kernel in products)


@needed
def test_a_kernels_bytes_are_those_of_what_it_reads_and_writes(tiny_onnx):
    _, found = plugins.load_runtime("openvino", {}).kernels(
        tiny_onnx.path, batch=3, runs=1, warmup=0
    )
    stem = next(kernel for kernel in found if kernel.op == "Convolution")
    read, written = 3 * 32 * 32, 3 * 8 * 11 * 11  # 7×7 kernels at stride 3, of 8 channels
    assert stem.macs == written * 49
    assert stem.bytes == 4 * (read + written + 8 * 49 + 8)


@needed
def test_kernels_of_a_file_of_another_batch_are_refused(tiny_onnx, tmp_path):
    model = onnx.load(tiny_onnx.path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "two.onnx")
    runtime = plugins.load_runtime("openvino", {})
    with refused(InputRefused, "two.onnx takes a batch of 2, not of 1", hint=None):
        runtime.kernels(tmp_path / "two.onnx", batch=1, runs=1, warmup=0)


@pytest.mark.parametrize(
    ("op", "reads", "written", "macs"),
    [
        ("Convolution", [(2, 6, 9, 9), (4, 6, 3, 3)], (2, 4, 7, 7), 2 * 4 * 7 * 7 * 6 * 9),
        ("Convolution", [(2, 6, 9, 9), (3, 4, 2, 3, 3)], (2, 12, 7, 7), 2 * 12 * 7 * 7 * 2 * 9),
        ("Deconvolution", [(2, 6, 4, 4), (6, 5, 2, 2)], (2, 5, 8, 8), 2 * 6 * 16 * 5 * 4),
        ("FullyConnected", [(3, 7), (10, 7)], (3, 10), 210),
        ("MatMul", [(3, 5, 7), (3, 7, 2)], (3, 5, 2), 210),
        ("Eltwise", [(3, 5), (3, 5)], (3, 5), 0),
    ],
)
def test_multiply_accumulates_are_those_of_the_shapes(op, reads, written, macs):
    assert _openvino._macs(op, reads, written) == macs


# ── Sessions ────────────────────────────────────────────────────────────────────────


@needed
def test_one_session_serves_every_batch_and_a_step_reads_what_was_bound(tiny_onnx):
    x = noise((1, 32, 32), count=5, seed=0)
    with plugins.load_runtime("openvino", {"threads": 1}).open(tiny_onnx.path) as session:
        whole = session({"input": x})["logits"]
        assert whole.shape == (5, 10)
        single = [session({"input": x[i : i + 1]})["logits"] for i in range(5)]
        steps = [session.bind({"input": x[:size]}) for size in (1, 5)]
        for step in steps:
            step()
    assert np.allclose(np.concatenate(single), whole, rtol=1e-4, atol=1e-4)


@needed
def test_threads_are_those_that_openvino_says_it_uses(tiny_onnx):
    for threads in (0, 1):
        with plugins.load_runtime("openvino", {"threads": threads}).open(tiny_onnx.path) as session:
            assert session.threads >= 1
    assert session.threads == 1


@needed
def test_a_graph_with_half_input_and_output_is_fed_halves(tiny_onnx, tmp_path):
    half = converted(tiny_onnx, tmp_path, "fp16", half_io=True)
    x = noise((1, 32, 32), count=2, seed=0)
    runtime = plugins.load_runtime("openvino", {})
    with runtime.open(half.path) as one, runtime.open(tiny_onnx.path) as other:
        got, want = one({"input": x})["logits"], other({"input": x})["logits"]
    assert got.dtype == np.float16
    assert np.allclose(got, want, rtol=0.05, atol=0.05)


@needed
def test_what_openvino_cannot_read_or_run_is_refused_in_one_sentence(tiny_onnx, tmp_path):
    runtime = plugins.load_runtime("openvino", {})
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with refused(BuildError, "bad.onnx"), runtime.open(tmp_path / "bad.onnx"):
        pass
    with (
        refused(BuildError, "openvino cannot run tiny.fp32.onnx"),
        runtime.open(tiny_onnx.path) as session,
    ):
        session({"input": noise((2, 32, 32), count=1, seed=0)})
    odd = onnx.load(tiny_onnx.path)
    next(n for n in odd.graph.node if n.op_type == "Relu").op_type = "Frobnicate"
    onnx.save(odd, tmp_path / "odd.onnx")
    with refused(BuildError, "odd.onnx", "Frobnicate"), runtime.open(tmp_path / "odd.onnx"):
        pass


# ── Devices ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "AUTO"}, "chooses by itself where to run"),
        ({"device": "HETERO:GPU,CPU"}, "chooses by itself where to run"),
        ({"device": "a card"}, "device must be a name such as"),
        ({"threads": -1}, "threads must be from 0 to 256, found -1"),
    ],
)
def test_a_device_that_is_none_or_would_fall_back_is_refused(options, said):
    with refused(ProfileError, said, hint=None):
        plugins.load_runtime("openvino", options)


@needed
def test_a_device_that_is_not_there_is_missing_and_never_another_one():
    runtime = plugins.load_runtime("openvino", {"device": "NPU"})
    for action in ("build", "run"):
        assert "OpenVINO has no device 'NPU' here, but CPU" in (runtime.missing(action) or "")
    assert runtime.identify().device is None


def test_without_the_package_it_is_missing_and_says_so(monkeypatch, tiny_onnx):
    monkeypatch.setitem(sys.modules, "openvino", None)
    runtime = plugins.load_runtime("openvino", {})
    assert "openvino" in runtime.missing("run")
    assert runtime.identify() is None
    assert runtime.describe(tiny_onnx.path) == ()


# ── Networks of other ends ──────────────────────────────────────────────────────────


@needed
def test_pixels_are_normalised_in_the_graph(tmp_path):
    judged_on_pixels(tmp_path, "openvino")


@needed
def test_the_largest_scores_come_with_their_labels(tmp_path):
    judged_on_top_k(tmp_path, "openvino")


@needed
def test_the_kernels_of_a_graph_of_several_inputs_are_timed(tmp_path):
    make = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["left", "w"], ["a"], "conv"),
            onnx.helper.make_node("Add", ["a", "right"], ["y"], "sum"),
        ],
        "main",
        [make("left", 1, ["N", 1, 8, 8]), make("right", 1, ["N", 2, 6, 6])],
        [make("y", 1, ["N", 2, 6, 6])],
        [onnx.numpy_helper.from_array(np.ones((2, 1, 3, 3), np.float32), "w")],
    )
    opset = onnx.helper.make_opsetid("", 20)
    path = tmp_path / "two.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    runtime = plugins.load_runtime("openvino", {})
    _, kernels = runtime.kernels(path, batch=3, runs=2, warmup=0)
    assert any("conv" in kernel.name for kernel in kernels)
