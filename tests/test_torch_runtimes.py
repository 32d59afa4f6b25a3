"""PyTorch as a runtime: the exported graph, in eager mode and compiled."""

from __future__ import annotations

import sysconfig

import numpy as np
import onnx
import pytest
import torch
from conftest import refused
from onnx import TensorProto, helper, numpy_helper

from exporter import plugins
from exporter.errors import BuildError, ProfileError
from exporter.records import Execution
from exporter.samples import noise


def graph_of(nodes, folder, *, constants=(), outputs=("y",)):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["N", 4, 6, 6])],
        [value(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "graph.onnx"
    onnx.save(model, path)
    return path


def test_a_graph_of_several_outputs_and_shapes_in_tensors_gives_what_it_says(tmp_path):
    nodes = [
        helper.make_node("Split", ["x", "parts"], ["a", "b"], "split", axis=1),
        helper.make_node("Sub", ["a", "b"], ["d"], "minus"),
        helper.make_node("Reshape", ["d", "flat"], ["y"], "flatten"),
        helper.make_node("Clip", ["b", "", "most"], ["z"], "clip"),
    ]
    constants = [
        ("parts", np.array([2, 2])),
        ("flat", np.array([0, -1])),
        ("most", np.float32(0.25)),
    ]
    constants = [(name, np.asarray(value)) for name, value in constants]
    path = graph_of(nodes, tmp_path, constants=constants, outputs=("y", "z"))
    x = noise((4, 6, 6), count=3, seed=0)
    with plugins.load_runtime("torch-eager", {}).open(path) as session:
        got = session({"x": x})
    assert np.array_equal(got["y"], (x[:, :2] - x[:, 2:]).reshape(3, -1))
    assert np.array_equal(got["z"], np.minimum(x[:, 2:], np.float32(0.25)))


def test_channels_last_is_how_the_kernels_get_their_tensors_and_changes_no_value(tiny_onnx):
    x = noise((1, 32, 32), count=2, seed=0)
    outputs, layouts = [], []
    for channels_last in (False, True):
        runtime = plugins.load_runtime("torch-eager", {"channels_last": channels_last})
        with runtime.open(tiny_onnx.path) as session:
            outputs.append(session({"input": x})["logits"])
            weights = [b for b in session.module.buffers() if b.ndim == 4 and b.shape[1] > 1]
            layouts.append(
                {
                    b.is_contiguous(memory_format=torch.channels_last)
                    for b in weights
                    if b[0, 0].numel() > 1
                }
            )
    assert layouts == [{False}, {True}]
    assert np.allclose(*outputs, rtol=1e-4, atol=1e-4)


def test_threads_are_its_own_while_it_runs_and_the_process_has_its_own_back(tiny_onnx, monkeypatch):
    before = torch.get_num_threads()
    seen = []
    with plugins.load_runtime("torch-eager", {"threads": before + 1}).open(
        tiny_onnx.path
    ) as session:
        run = session.step(lambda *_: seen.append(torch.get_num_threads()), [])
        assert seen == []
        run()
        assert session.threads == before + 1
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_an_operator_that_pytorch_lacks_is_named(tmp_path):
    path = graph_of([helper.make_node("Frobnicate", ["x"], ["y"], "middle")], tmp_path)
    runtime = plugins.load_runtime("torch-eager", {})
    with (
        refused(BuildError, "PyTorch cannot run graph.onnx", "Frobnicate", "middle"),
        runtime.open(path),
    ):
        pass


def test_an_input_that_does_not_fit_is_refused_in_one_sentence(tiny_onnx):
    with (
        plugins.load_runtime("torch-eager", {}).open(tiny_onnx.path) as session,
        refused(BuildError, "PyTorch cannot run the graph"),
    ):
        session({"input": noise((3, 32, 32), count=1, seed=0)})


def test_fewer_bits_than_32_are_not_claimed(tiny_onnx, tmp_path):
    half = plugins.load_precision("fp16", {}).convert(onnx.load(tiny_onnx.path), {}, np.empty(0))
    onnx.save(half.model, tmp_path / "half.onnx")
    model = tiny_onnx._replace(path=tmp_path / "half.onnx", precision="fp16")
    execution = plugins.load_runtime("torch-eager", {}).executed(model, model.path)
    assert isinstance(execution, Execution)
    assert execution.source == "runtime"
    assert {layer.ran for layer in execution.layers} == {"fp32"}
    assert execution.counts["fp16"][0] == 0
    assert plugins.load_runtime("torch-eager", {}).executed(tiny_onnx, tiny_onnx.path) is None


@pytest.mark.parametrize("name", ["torch-eager", "torch-compile"])
def test_options_that_make_no_sense_are_refused(name):
    with refused(ProfileError, "threads must be from 0 to 256, found -2", hint=None):
        plugins.load_runtime(name, {"threads": -2})


# ── Compiled ────────────────────────────────────────────────────────────────────────


def test_it_is_compiled_for_one_sample_when_loaded_and_once_for_each_other_batch(
    tiny_onnx, monkeypatch
):
    compiled = []

    def pretend(module, **options):
        compiled.append([options, module])
        return module

    monkeypatch.setattr(torch, "compile", pretend)
    x = noise((1, 32, 32), count=3, seed=0)
    with plugins.load_runtime("torch-compile", {}).open(tiny_onnx.path) as session:
        assert len(compiled) == 1
        session.bind({"input": x[:1]})()
        assert len(compiled) == 1
        got = session({"input": x})["logits"]
        session.bind({"input": x})()
        assert len(compiled) == 2
    assert all(options == {"fullgraph": True, "dynamic": False} for options, _ in compiled)
    with plugins.load_runtime("torch-eager", {}).open(tiny_onnx.path) as session:
        want = session({"input": x})["logits"]
    assert np.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("freezing", [True, False])
def test_freezing_is_on_while_it_is_compiled_if_it_was_asked_for(tiny_onnx, monkeypatch, freezing):
    from torch._inductor import config

    seen = []

    def pretend(module, **options):
        seen.append(config.freezing)
        return module

    monkeypatch.setattr(torch, "compile", pretend)
    before = config.freezing
    runtime = plugins.load_runtime("torch-compile", {"freezing": freezing})
    with runtime.open(tiny_onnx.path):
        assert seen == [freezing]
        assert config.freezing == before
    said = "with its weights frozen" if freezing else "with its weights not frozen"
    assert said in runtime.describe(tiny_onnx.path)[0]


def test_what_the_compiler_cannot_do_is_refused_in_one_sentence(tiny_onnx, monkeypatch):
    def fail(module, **options):
        raise LookupError("no such lowering.\nand a page of generated code")

    monkeypatch.setattr(torch, "compile", fail)
    runtime = plugins.load_runtime("torch-compile", {})
    with (
        refused(BuildError, "torch.compile refused the graph: no such lowering"),
        runtime.open(tiny_onnx.path),
    ):
        pass


def test_without_a_compiler_or_headers_it_cannot_run_and_says_which(monkeypatch, tmp_path):
    from torch._inductor import cpp_builder

    runtime = plugins.load_runtime("torch-compile", {})
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in runtime.missing("run")
    (tmp_path / "Python.h").touch()
    assert runtime.missing("run") is None

    def none():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert "needs a C++ compiler" in runtime.missing("run")
    assert runtime.missing("build") is None
