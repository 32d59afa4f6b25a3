"""Every file in runtimes/ keeps its contract; what needs a device is tested on a pretended one."""

from __future__ import annotations

import ctypes
import sys
from enum import IntEnum
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from exporter import plugins
from exporter.calibration import calibrate
from exporter.errors import BuildError, ExportError, RuntimeMissing
from exporter.records import BatchRange, OnnxModel
from exporter.runtimes import _cuda, _trt
from exporter.samples import digits, feeds, noise

HAS_RTX = plugins.load_runtime("tensorrt-rtx", {}).missing("build") is None
rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt-rtx is not installed")


@pytest.fixture(params=plugins.names("runtimes"))
def runnable(request):
    runtime = plugins.load_runtime(request.param, {})
    if reason := runtime.missing("run"):
        pytest.skip(f"{request.param}: {reason}")
    return runtime


def test_a_runtime_answers_like_unfolded_pytorch(runnable, tiny_module, tiny_onnx, tmp_path):
    x = noise((1, 32, 32), count=3, seed=0)
    with torch.inference_mode():
        want = tiny_module.double()(torch.from_numpy(x).double()).numpy()
        tiny_module.float()
    with runnable.open(runnable.build(tiny_onnx, tmp_path)) as session:
        got = session({"input": x})["logits"]
        step = session.bind({"input": x})
        step()
        step()
        assert session.threads >= 1
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("name", plugins.names("runtimes"))
def test_what_is_missing_is_said_in_words_and_asking_never_fails(name):
    runtime = plugins.load_runtime(name, {})
    for action in ("build", "run"):
        reason = runtime.missing(action)
        assert reason is None or reason.strip()


# ── ONNX Runtime ────────────────────────────────────────────────────────────────────


def test_onnxruntime_does_not_pass_for_cuda_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr("exporter.runtimes.ort_cuda.missing_gpu", lambda: "no NVIDIA GPU")
    assert plugins.load_runtime("ort-cuda", {}).missing("run")


def test_a_file_that_is_not_onnx_is_refused_in_one_sentence(tmp_path):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"not a model")
    with (
        pytest.raises(BuildError) as refusal,
        plugins.load_runtime("ort-cpu", {}).open(bad),
    ):
        pass
    assert "bad.onnx" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_threads_are_what_was_asked_for(tiny_onnx):
    with plugins.load_runtime("ort-cpu", {"threads": 1}).open(tiny_onnx.path) as session:
        assert session.threads == 1
    with pytest.raises(ExportError, match="threads must be from 0 to 256, found -1"):
        plugins.load_runtime("ort-cpu", {"threads": -1})


def quantised(tiny_onnx, folder, **options) -> OnnxModel:
    graph = onnx.load(tiny_onnx.path)
    images = digits((1, 32, 32), "train").inputs[:16]
    statistics = calibrate(graph, feeds(images, "input", size=1))
    model = plugins.load_precision("int8", options).convert(graph, statistics, images).model
    path = folder / "tiny.int8.onnx"
    onnx.save(model, path)
    return tiny_onnx._replace(path=path, precision="int8")


def test_quantisation_with_half_scales_is_run_as_written_and_the_report_is_told(
    tiny_onnx, tiny_module, tmp_path
):
    """ONNX Runtime's default optimisations compute something else for such graphs."""
    half = quantised(tiny_onnx, tmp_path, around="fp16")
    runtime = plugins.load_runtime("ort-cpu", {})
    assert "disable_quant_qdq" in runtime.describe(half.path)[0]
    assert runtime.describe(tiny_onnx.path) == ()
    x = digits((1, 32, 32), "held-out").inputs[:64]
    with torch.inference_mode():
        want = tiny_module(torch.from_numpy(x)).numpy()
    with runtime.open(half.path) as session:
        got = session({"input": x})["logits"]
    assert 10 * np.log10((want**2).sum() / ((got - want) ** 2).sum()) > 20


def test_a_graph_with_half_input_and_output_is_fed_halves(tiny_onnx, tmp_path):
    graph = onnx.load(tiny_onnx.path)
    model = plugins.load_precision("fp16", {"half_io": True}).convert(graph, {}, np.empty(0)).model
    onnx.save(model, tmp_path / "half.onnx")
    x = noise((1, 32, 32), count=2, seed=0)
    runtime = plugins.load_runtime("ort-cpu", {})
    with runtime.open(tmp_path / "half.onnx") as half, runtime.open(tiny_onnx.path) as single:
        got, want = half({"input": x})["logits"], single({"input": x})["logits"]
        half.bind({"input": x})()
    assert got.dtype == np.float16
    assert np.allclose(got, want, rtol=0.05, atol=0.05)


# ── TensorRT-RTX builds real engines here ───────────────────────────────────────────


@rtx
@pytest.mark.parametrize("targets", [["sm80"], ["sm86", "sm89", "sm120"]])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-in-fp16"])
def test_an_engine_is_built_with_no_gpu(tiny_onnx, tmp_path, precision, targets):
    model = tiny_onnx
    if precision == "fp16":
        half = (
            plugins.load_precision("fp16", {})
            .convert(onnx.load(tiny_onnx.path), {}, np.empty(0))
            .model
        )
        onnx.save(half, tmp_path / "tiny.fp16.onnx")
        model = tiny_onnx._replace(path=tmp_path / "tiny.fp16.onnx")
    elif precision.startswith("int8"):
        around = "fp16" if precision.endswith("fp16") else "fp32"
        model = quantised(tiny_onnx, tmp_path, around=around)
    runtime = plugins.load_runtime("tensorrt-rtx", {"targets": targets})
    engine = runtime.build(model, tmp_path)
    data = engine.read_bytes()
    assert engine.name.endswith(".tensorrt-rtx.engine")
    assert data[:4] == b"vtrt"
    mask = int.from_bytes(data[32:40], "little")
    bits = {"sm80": 2, "sm86": 4, "sm89": 8, "sm120": 16}
    assert mask == sum(bits[target] for target in targets)


@rtx
def test_an_engine_cannot_pass_for_run_where_there_is_no_gpu(tiny_onnx, tmp_path):
    runtime = plugins.load_runtime("tensorrt-rtx", {})
    if not (reason := _cuda.missing_gpu()):
        pytest.skip("this machine has an NVIDIA GPU")
    assert "no NVIDIA GPU" in reason
    assert runtime.missing("build") is None
    assert runtime.missing("run") == reason
    assert plugins.load_runtime("tensorrt-rtx", {"targets": ["current"]}).missing("build") == reason


@rtx
@pytest.mark.parametrize(
    ("here", "reason"),
    [("sm89", None), ("sm90", "the NVIDIA GPU here is sm90, and not a target")],
)
def test_an_engine_for_other_gpus_is_not_run_on_this_one(monkeypatch, here, reason):
    monkeypatch.setattr(_cuda, "missing_gpu", lambda: None)
    monkeypatch.setattr("exporter.runtimes.tensorrt_rtx.missing_gpu", lambda: None)
    monkeypatch.setattr("exporter.runtimes.tensorrt_rtx.compute_capability", lambda: here)
    targeted = plugins.load_runtime("tensorrt-rtx", {"targets": ["sm86", "sm89"]})
    current = plugins.load_runtime("tensorrt-rtx", {"targets": ["current"]})
    assert (targeted.missing("build"), targeted.missing("run")) == (None, reason)
    assert (current.missing("build"), current.missing("run")) == (None, None)


def test_a_gpu_without_the_bindings_to_its_memory_is_not_enough_to_run(monkeypatch):
    monkeypatch.setattr(_cuda, "missing_gpu", lambda: None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert (_cuda.missing_to_run() or "").startswith("running an engine needs cuda-python: ")


def with_zero_points(model: OnnxModel, folder, value: np.ndarray) -> OnnxModel:
    proto = onnx.load(model.path)
    zero = next(t for t in proto.graph.initializer if t.name == "input_zero")
    zero.CopyFrom(numpy_helper.from_array(value, "input_zero"))
    path = folder / "changed.onnx"
    onnx.save(proto, path)
    return model._replace(path=path)


@rtx
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.array(0, np.uint8), "is UINT8, and TensorRT takes INT8 and FLOAT8E4M3FN alone"),
        (np.array(3, np.int8), "is not 0"),
    ],
)
def test_quantisation_that_tensorrt_would_misread_never_reaches_it(
    tiny_onnx, tmp_path, value, said
):
    model = with_zero_points(quantised(tiny_onnx, tmp_path), tmp_path, value)
    with pytest.raises(BuildError) as refusal:
        plugins.load_runtime("tensorrt-rtx", {}).build(model, tmp_path)
    assert said in str(refusal.value)


@rtx
def test_sm75_is_refused_where_it_would_fail_or_turn_int8_off(tiny_onnx, tmp_path):
    both = plugins.load_runtime("tensorrt-rtx", {"targets": ["sm75", "sm89"]})
    with pytest.raises(BuildError, match="no FP32 matrix multiply for sm75"):
        both.build(tiny_onnx, tmp_path)
    with pytest.raises(BuildError, match="turns INT8 activations off for all of them"):
        both.build(quantised(tiny_onnx, tmp_path, around="fp16", linear=True), tmp_path)


@rtx
def test_an_operator_tensorrt_does_not_know_is_named(tmp_path):
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Frobnicate", ["input"], ["logits"], "middle")],
        "g",
        [value("input", TensorProto.FLOAT, ["batch", 1])],
        [value("logits", TensorProto.FLOAT, ["batch", 1])],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "odd.onnx")
    odd = OnnxModel(
        tmp_path / "odd.onnx",
        "fp32",
        SimpleNamespace(name="input", shape=(1,)),
        None,
        BatchRange(),
    )
    with pytest.raises(BuildError) as refusal:
        plugins.load_runtime("tensorrt-rtx", {}).build(odd, tmp_path)
    assert "odd.onnx" in str(refusal.value)
    assert "Frobnicate" in str(refusal.value)
    assert "middle" in str(refusal.value)


@rtx
def test_a_file_that_only_looks_parsed_is_refused(tiny_onnx, tmp_path):
    """TensorRT "parses" an empty file into an empty network."""
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(BuildError, match=r"^empty\.onnx: not an ONNX model with an input"):
        plugins.load_runtime("tensorrt-rtx", {}).build(
            tiny_onnx._replace(path=tmp_path / "empty.onnx"), tmp_path
        )
    assert not list(tmp_path.glob("*.engine"))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["sm90"], "no target named 'sm90'"),
        (["SM89"], "no target named 'SM89'"),
        (["sm89", "sm89"], "targets names one twice"),
        (["current", "sm89"], "stands alone"),
        ([], "targets is empty"),
    ],
)
def test_targets_that_make_no_sense_are_refused(targets, said):
    with pytest.raises(ExportError) as refusal:
        plugins.load_runtime("tensorrt-rtx", {"targets": targets})
    assert said in str(refusal.value)
    assert refusal.value.exit_code == 2


def test_full_tensorrt_is_asked_for_a_gpu_before_it_is_touched():
    reason = plugins.load_runtime("tensorrt", {}).missing("build")
    if reason is None:
        pytest.skip("this machine has TensorRT and an NVIDIA GPU")
    assert "tensorrt" in reason or "GPU" in reason


def test_an_old_tensorrt_is_named_with_its_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__name__="tensorrt"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "10.3.0")
    reason = plugins.load_runtime("tensorrt", {}).missing("build")
    assert reason == "tensorrt 10.3.0 is older than 10.12"


# ── Running an engine, on a pretended device ────────────────────────────────────────


class Device:
    """The CUDA runtime's calls, on host memory that remembers what was asked of it."""

    cudaMemcpyKind = SimpleNamespace(  # noqa: N815 - CUDA's name
        cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out"
    )

    cudaStreamNonBlocking = 1  # noqa: N815

    def __init__(self) -> None:
        self.blocks: dict[int, object] = {}
        self.copied: list[str] = []
        self.streams = 0

    def cudaMalloc(self, size):  # noqa: N802 - CUDA's name
        block = ctypes.create_string_buffer(size)
        self.blocks[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaFree(self, address):  # noqa: N802
        del self.blocks[address]
        return (0,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):  # noqa: N802
        ctypes.memmove(target, source, size)
        self.copied.append(kind)
        return (0,)

    def cudaStreamCreateWithFlags(self, flags):  # noqa: N802
        assert flags == self.cudaStreamNonBlocking
        self.streams += 1
        return 0, 7

    def cudaStreamDestroy(self, stream):  # noqa: N802
        self.streams -= 1
        return (0,)

    def cudaStreamSynchronize(self, stream):  # noqa: N802
        return (0,)


class Mode(IntEnum):
    INPUT = 1
    OUTPUT = 2


class Doubler:
    """An engine of TensorRT's shape that gives twice its input, for batches of 1 to 4."""

    num_io_tensors = 2

    def create_execution_context(self, *config):
        self.shape, self.addresses = (), {}
        return self

    def get_tensor_name(self, i):
        return ("input", "logits")[i]

    def get_tensor_mode(self, name):
        return Mode.INPUT if name == "input" else Mode.OUTPUT

    def get_tensor_dtype(self, name):
        return "float"

    def set_input_shape(self, name, shape):
        self.shape = shape
        return 1 <= shape[0] <= 4

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        count = int(np.prod(self.shape))
        given, found = (
            np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[name]))
            for name in ("input", "logits")
        )
        found[:] = 2 * given
        return True


class FakeEngineRuntime(_trt.TensorRt, frozen=True):
    """TensorRT, pretended."""

    package: ClassVar[str] = "pretended_trt"


@pytest.fixture
def device(monkeypatch):
    class Logger:
        ERROR = 1

        def __init__(self):
            pass

    module = SimpleNamespace(
        __name__="pretended_trt",
        ILogger=Logger,
        TensorIOMode=Mode,
        nptype=lambda kind: np.float32,
        Runtime=lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda data: Doubler() if data == b"plan" else None
        ),
    )
    pretended = Device()
    monkeypatch.setitem(sys.modules, "pretended_trt", module)
    monkeypatch.setattr(_cuda, "runtime_api", lambda: pretended)
    return pretended


def test_an_engine_session_copies_in_runs_copies_out_and_lets_go(device, tmp_path):
    (tmp_path / "x.engine").write_bytes(b"plan")
    with FakeEngineRuntime().open(tmp_path / "x.engine") as session:
        for size in (1, 4, 2):
            x = noise((3,), count=size, seed=size)
            got = session({"input": x})["logits"]
            assert got.shape == (size, 3)
            assert np.array_equal(got, 2 * x)
        assert device.copied == ["in", "out"] * 3
        step = session.bind({"input": x})
        del device.copied[:]
        step()
        assert device.copied == []  # a timed run copies nothing
    assert device.blocks == {}
    assert device.streams == 0


def test_a_batch_outside_the_engines_range_is_refused(device, tmp_path):
    (tmp_path / "x.engine").write_bytes(b"plan")
    with (
        FakeEngineRuntime().open(tmp_path / "x.engine") as session,
        pytest.raises(BuildError, match=r"does not take an input of shape \(5, 3\)"),
    ):
        session({"input": noise((3,), count=5, seed=0)})
    assert device.blocks == {}


def test_an_engine_that_cannot_be_loaded_is_refused_by_name(device, tmp_path):
    (tmp_path / "x.engine").write_bytes(b"other")
    with (
        pytest.raises(BuildError, match=r"pretended_trt refused x\.engine: it gave no reason"),
        FakeEngineRuntime().open(tmp_path / "x.engine"),
    ):
        pass


def test_a_runtime_on_a_gpu_says_its_name_and_none_where_there_is_no_gpu(device, monkeypatch):
    class Driver:
        def cuDeviceGet(self, found, index):  # noqa: N802 - CUDA's name
            return 0

        def cuDeviceGetName(self, name, size, found):  # noqa: N802
            name.value = b"NVIDIA Pretended"[: size - 1]
            return 0

    monkeypatch.setattr(_cuda.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(_cuda, "missing_gpu", lambda: None)
    monkeypatch.setattr(sys.modules["pretended_trt"], "__version__", "11.1", raising=False)
    _cuda.device_name.cache_clear()
    assert FakeEngineRuntime().identify() == ("11.1", "NVIDIA Pretended")
    monkeypatch.setattr(_cuda, "missing_gpu", lambda: "no NVIDIA GPU")
    assert FakeEngineRuntime().identify() == ("11.1", None)
    monkeypatch.setitem(sys.modules, "pretended_trt", None)
    assert FakeEngineRuntime().identify() is None
    _cuda.device_name.cache_clear()


def test_a_failing_cuda_call_is_named():
    class Status(IntEnum):
        cudaErrorMemoryAllocation = 2  # noqa: N815 - CUDA's name

    def cudaMalloc(size):  # noqa: N802 - CUDA's name
        return (Status(2), None)

    with pytest.raises(RuntimeMissing, match="cudaMalloc failed: cudaErrorMemoryAllocation"):
        _cuda.call(cudaMalloc, 1)


@rtx
def test_the_header_of_an_engine_is_judged_without_loading_it(tiny_onnx, tmp_path):
    """A whole header is not called broken, and a broken one is; no GPU makes neither valid."""
    runtime = plugins.load_runtime("tensorrt-rtx", {"targets": ["sm89"]})
    engine = runtime.build(tiny_onnx, tmp_path)
    whole = runtime.validity(engine)
    (tmp_path / "broken.engine").write_bytes(b"x" * 64)
    assert "malformed engine" not in whole.reasons
    assert runtime.validity(tmp_path / "broken.engine") == ("invalid", ("malformed engine",))
    if _cuda.missing_gpu():
        assert whole == ("invalid", ())
