"""PyTorch as a runtime on CUDA, on the CPU's memory and a pretended clock: no device ran it."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from conftest import refused
from test_runtimes import quantised

from exporter import plugins
from exporter.contracts import Bound, OnDevice
from exporter.errors import BuildError
from exporter.runtimes import _device, _torch_cuda
from exporter.runtimes.torch_compile_cuda import TorchCompileCuda
from exporter.runtimes.torch_eager_cuda import TorchEagerCuda
from exporter.samples import noise


class EagerHere(TorchEagerCuda, frozen=True):
    place: ClassVar[str] = "cpu"


class CompiledHere(TorchCompileCuda, frozen=True):
    place: ClassVar[str] = "cpu"


class Clock:
    """A device's clock, by which any work takes 2 ms."""

    def ms(self, work):
        work()
        return 2.0


class Replay:
    """A captured run that computes what was put in place, and refuses anything else."""

    captures = 0

    def __init__(self, run, tensors):
        Replay.captures += 1
        self.run, self.given = run, [tensor.clone() for tensor in tensors]

    def put(self, tensors):
        for place, tensor in zip(self.given, tensors, strict=True):
            place.copy_(tensor)
        return self.given

    def __call__(self, *tensors):
        assert all(a is b for a, b in zip(tensors, self.given, strict=True))
        return tuple(self.run(*self.given))


@pytest.fixture
def clock(monkeypatch):
    Replay.captures, waits = 0, []
    monkeypatch.setattr(_torch_cuda.TorchTimer, "of_cuda", classmethod(lambda cls: Clock()))
    monkeypatch.setattr(_torch_cuda, "_Replay", Replay)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    return waits


def converted(tiny_onnx, folder, name):
    made = plugins.load_precision(name, {}).convert(onnx.load(tiny_onnx.path), {}, np.empty(0))
    onnx.save(made.model, folder / f"{name}.onnx")
    return tiny_onnx._replace(path=folder / f"{name}.onnx", precision=name)


@pytest.fixture
def want(tiny_module):
    def logits(x):
        with torch.inference_mode():
            found = tiny_module.double()(torch.from_numpy(x).double()).numpy()
            tiny_module.float()
        return found

    return logits


@pytest.mark.parametrize("channels_last", [False, True])
def test_eager_answers_in_every_way_that_it_is_timed(clock, tiny_onnx, want, channels_last):
    with EagerHere(channels_last=channels_last).open(tiny_onnx.path) as session:
        assert isinstance(session, OnDevice)
        for size in (2, 3, 2):
            x = noise((1, 32, 32), count=size, seed=size)
            steps = session.on_device({"input": x})
            assert list(steps) == [_device.EVENTS, _device.COPIES, _device.GRAPH]
            for step in (*steps.values(), bound := session.bind({"input": x})):
                assert step() == (None if step is bound else 2.0)
                assert isinstance(step, Bound)
                assert np.allclose(step.outputs()["logits"], want(x), rtol=1e-4, atol=1e-4)
    assert Replay.captures == 2  # one for each shape
    assert len(clock) == 3  # a wall-clock run waits for the device


def test_half_precision_is_computed_in_half_precision(clock, tiny_onnx, want, tmp_path):
    """Of all float32 kernels, none would be 1e-4 off; and BF16 has three bits fewer than FP16."""
    x, errors = noise((1, 32, 32), count=4, seed=0), {}
    for name in ("fp16", "bf16"):
        model, types = converted(tiny_onnx, tmp_path, name), set()
        with EagerHere().open(model.path) as session:
            for node in session.graph.module.children():
                node.register_forward_hook(lambda m, given, out, seen=types: seen.add(out.dtype))
            got = session({"input": x})["logits"]
        assert torch.float64 not in types
        errors[name] = np.linalg.norm(got - want(x)) / np.linalg.norm(want(x))
        execution = EagerHere().executed(model, model.path)
        assert all(ran == total > 0 for ran, total in execution.counts.values())
        assert execution.source == "runtime"
    assert 1e-4 < errors["fp16"] < 1e-2
    assert 3 * errors["fp16"] < errors["bf16"] < 1e-1


def test_float32_is_not_tf32_while_a_session_is_open_and_is_what_it_was_afterwards(tiny_onnx):
    def allowed():
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    before = allowed()
    torch.set_float32_matmul_precision("high")
    try:
        with EagerHere().open(tiny_onnx.path):
            assert allowed() == (False, "highest")
            assert torch.backends.cudnn.benchmark
        assert allowed() == (True, "high")
    finally:
        torch.set_float32_matmul_precision(before[1])
    assert "TF32 off" in EagerHere().describe(tiny_onnx.path)[0]


def test_a_quantised_graph_is_refused_by_name(tiny_onnx, tmp_path):
    model = quantised(tiny_onnx, tmp_path)
    with refused(BuildError, "no integer convolution on CUDA", "tiny.int8.onnx", hint=None):
        EagerHere().build(model, tmp_path)
    assert EagerHere().build(tiny_onnx, tmp_path) == tiny_onnx.path


@pytest.mark.parametrize("name", ["torch-eager-cuda", "torch-compile-cuda"])
def test_a_pytorch_without_cuda_does_not_pass_for_one_with_it(monkeypatch, name):
    runtime = plugins.load_runtime(name, {})
    monkeypatch.setattr(_torch_cuda, "missing_gpu", lambda: "no NVIDIA GPU (no driver)")
    assert runtime.missing("run") == "no NVIDIA GPU (no driver)"
    assert runtime.missing("build") is None
    assert runtime.identify().device is None
    monkeypatch.setattr(_torch_cuda, "missing_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.missing("run") == f"PyTorch {torch.__version__} cannot use the NVIDIA GPU here"


def test_compiling_on_cuda_needs_triton(monkeypatch):
    monkeypatch.setattr(_torch_cuda, "missing_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    assert "needs Triton" in plugins.load_runtime("torch-compile-cuda", {}).missing("run")


# ── Compiled ────────────────────────────────────────────────────────────────────────


def test_it_is_compiled_once_for_each_shape_with_constants_that_a_graph_can_read_in_place(
    clock, tiny_onnx, want, monkeypatch
):
    from torch._inductor import config

    compiled, began = [], []

    def pretend(module, **options):
        assert config.triton.cudagraph_or_error  # it would be left out in silence
        compiled.append((module, options))
        return module

    monkeypatch.setattr(torch, "compile", pretend)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: began.append(1))
    with CompiledHere().open(tiny_onnx.path) as session:
        assert compiled == []
        for size in (2, 3, 2):
            x = noise((1, 32, 32), count=size, seed=size)
            steps = session.on_device({"input": x})
            assert list(steps) == [_device.GRAPH, _device.COPIES]
            for step in steps.values():
                count = len(began)
                assert step() == 2.0
                assert len(began) == count + 1
                assert np.allclose(step.outputs()["logits"], want(x), rtol=1e-4, atol=1e-4)
    assert len(compiled) == 2
    for module, options in compiled:
        assert options == {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
        held = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
        assert held == set(dict(module.named_buffers())) != set()


def test_what_the_compiler_refuses_is_one_sentence(clock, tiny_onnx, monkeypatch):
    def fail(module, **options):
        raise LookupError("no such lowering.\nand a page of generated code")

    monkeypatch.setattr(torch, "compile", fail)
    with (
        CompiledHere().open(tiny_onnx.path) as session,
        refused(BuildError, "torch.compile refused the graph: no such lowering"),
    ):
        session.bind({"input": noise((1, 32, 32), count=2, seed=0)})
