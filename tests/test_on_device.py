"""A GPU's own clock and sensors, on pretended ones: no device ever ran what is tested here."""

from __future__ import annotations

import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnxruntime as ort
import pytest
import torch
from test_runtimes import Device, FakeEngineRuntime, device  # noqa: F401 - a fixture

from exporter import plugins
from exporter.bench.ways import ways
from exporter.contracts import Bound, OnDevice
from exporter.errors import RuntimeMissing
from exporter.latency import time_in_turn
from exporter.records import Gpu, Timing
from exporter.runtimes import _cuda, _device, _nvml
from exporter.runtimes.ort_cuda import OrtCuda
from exporter.samples import noise

WAYS = [_device.EVENTS, _device.COPIES, _device.GRAPH]


class Stream(Device):
    """A device whose time passes in what is put into its stream, and in nothing else.

    A copy takes 2 ms, a run of the engine 3 and one within a graph 1; what is captured does not
    run.
    """

    cudaStreamCaptureMode = SimpleNamespace(  # noqa: N815 - CUDA's name
        cudaStreamCaptureModeThreadLocal="thread"
    )

    def __init__(self) -> None:
        super().__init__()
        self.now, self.events, self.graphs, self.captured = 0.0, {}, {}, None
        self.captures, self.kept = 0, []

    def cudaMalloc(self, size):  # noqa: N802
        found = super().cudaMalloc(size)
        self.kept.append(self.blocks[found[1]])  # so that no address comes twice
        return found

    def run(self, work, ms):
        if self.captured is not None:
            self.captured.append(work)
            return
        work()
        self.now += ms

    def cudaMemcpyAsync(self, target, source, size, kind, stream):  # noqa: N802
        self.now += 2.0
        return super().cudaMemcpyAsync(target, source, size, kind, stream)

    def cudaEventCreate(self):  # noqa: N802
        self.events[len(self.events)] = None
        return 0, len(self.events) - 1

    def cudaEventRecord(self, event, stream):  # noqa: N802
        self.events[event] = self.now
        return (0,)

    def cudaEventSynchronize(self, event):  # noqa: N802
        return (0,)

    def cudaEventElapsedTime(self, start, stop):  # noqa: N802
        return 0, self.events[stop] - self.events[start]

    def cudaEventDestroy(self, event):  # noqa: N802
        del self.events[event]
        return (0,)

    def cudaStreamBeginCapture(self, stream, mode):  # noqa: N802
        assert mode == "thread"
        self.captured = []
        self.captures += 1
        return (0,)

    def cudaStreamEndCapture(self, stream):  # noqa: N802
        graph, self.captured = self.captured, None
        return 0, graph

    def cudaGraphInstantiate(self, graph, flags):  # noqa: N802
        self.graphs[len(self.graphs)] = graph
        return 0, len(self.graphs) - 1

    def cudaGraphDestroy(self, graph):  # noqa: N802
        return (0,)

    def cudaGraphLaunch(self, graph, stream):  # noqa: N802
        for work in self.graphs[graph]:
            work()
            self.now += 1.0
        return (0,)

    def cudaGraphExecDestroy(self, graph):  # noqa: N802
        del self.graphs[graph]
        return (0,)


@pytest.fixture
def stream(device, monkeypatch, tmp_path):  # noqa: F811 - the fixture
    """Return a pretended stream, and open an engine on it that doubles its input."""
    pretended = Stream()
    monkeypatch.setattr(_cuda, "runtime_api", lambda: pretended)
    doubler = type(sys.modules["pretended_trt"].Runtime(None).deserialize_cuda_engine(b"plan"))
    execute = doubler.execute_async_v3

    def timed(self, handle):
        pretended.run(lambda: execute(self, handle), 3.0)
        return True

    monkeypatch.setattr(doubler, "execute_async_v3", timed)
    path = tmp_path / "x.engine"
    path.write_bytes(b"plan")
    pretended.open = lambda: FakeEngineRuntime().open(path)
    return pretended


def test_events_time_execution_and_what_else_is_between_them(stream):
    """3 ms of execution; with a copy in and one out 2 ms each more; as a graph 1 ms."""
    with stream.open() as session:
        assert isinstance(session, OnDevice)
        steps = session.on_device({"input": noise((3,), count=2, seed=0)})
        assert [(name, step()) for name, step in steps.items()] == [
            (_device.EVENTS, 3.0),
            (_device.COPIES, 7.0),
            (_device.GRAPH, 1.0),
        ]
        assert all(isinstance(step, Bound) for step in steps.values())
    assert (stream.events, stream.graphs, stream.blocks) == ({}, {}, {})


def test_each_way_computes_what_a_plain_run_does(stream):
    with stream.open() as session:
        for size in (1, 4, 2):
            x = noise((3,), count=size, seed=size)
            for step in session.on_device({"input": x}).values():
                step()
                assert np.array_equal(step.outputs()["logits"], 2 * x)


def test_a_graph_is_captured_once_for_a_shape_and_again_where_memory_has_moved(stream):
    with stream.open() as session:
        x = noise((3,), count=2, seed=0)
        for _ in range(3):
            session.on_device({"input": x})[_device.GRAPH]()
        assert stream.captures == 1
        session.on_device({"input": noise((3,), count=4, seed=1)})[_device.GRAPH]()
        assert stream.captures == 2
        step = session.on_device({"input": x})[_device.GRAPH]
        step()
        assert stream.captures == 3  # the larger batch took another place
        assert np.array_equal(step.outputs()["logits"], 2 * x)


def test_tensorrt_rtx_replays_by_itself_in_a_context_of_its_own(stream, monkeypatch):
    """It has a strategy for it; ours captures nothing then."""
    trt = sys.modules["pretended_trt"]
    kernels = SimpleNamespace(EAGER="eager")
    monkeypatch.setattr(trt, "DynamicShapesKernelSpecializationStrategy", kernels, raising=False)
    strategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    monkeypatch.setattr(trt, "CudaGraphStrategy", strategy, raising=False)
    configs, contexts = [], []

    def context(self, config):
        configs.append(vars(config))
        made = type(self)()
        made.shape, made.addresses = (), {}
        contexts.append(made)
        return made

    doubler = type(trt.Runtime(None).deserialize_cuda_engine(b"plan"))
    monkeypatch.setattr(doubler, "create_execution_context", context)
    monkeypatch.setattr(
        doubler, "create_runtime_config", lambda self: SimpleNamespace(), raising=False
    )
    monkeypatch.setattr(doubler, "get_tensor_shape", lambda self, name: self.shape)
    with stream.open() as session:
        for size in (2, 4):
            x = noise((3,), count=size, seed=size)
            for step in session.on_device({"input": x}).values():
                step()
                assert np.array_equal(step.outputs()["logits"], 2 * x)
    plain = {"dynamic_shapes_kernel_specialization_strategy": "eager"}
    assert configs == [plain, plain | {"cuda_graph_strategy": "whole"}]
    assert contexts[1].shape == (4, 3)
    assert stream.captures == 0


def test_a_capture_that_fails_is_ended(stream):
    graphs = _device.Graphs(stream, 7)

    def refuse():
        raise RuntimeMissing("no")

    with pytest.raises(RuntimeMissing):
        graphs.launch("key", refuse)
    assert stream.captured is None


def test_the_devices_clock_is_an_entrant_beside_the_wall_clock(stream):
    feeds = [{"input": noise((3,), count=2, seed=seed)} for seed in (0, 1)]
    with stream.open() as one, stream.open() as other:
        entrants = ways("A", [one, other], feeds)
        assert list(entrants) == ["A", *(f"A, {way}" for way in WAYS)]
        found = time_in_turn(entrants, 2, Timing((2,), 0, 4, settle_ms=0))
        taken = {latency.name: latency.samples_ms for latency in found}
        assert taken[f"A, {_device.EVENTS}"] == (3.0,) * 4
        assert taken[f"A, {_device.GRAPH}"] == (1.0,) * 4
        assert {latency.loads for latency in found} == {2}


def test_a_session_without_a_clock_of_its_own_is_timed_by_the_wall_alone():
    session = SimpleNamespace(threads=1, bind=lambda feed: lambda: None)
    assert list(ways("A", [session], [{}])) == ["A"]


# ── Sensors ─────────────────────────────────────────────────────────────────────────


class Nvml:
    """NVML's calls: clocks that fall, a die that warms up, and a power limit from the second on."""

    def __init__(self) -> None:
        self.reads, self.is_open = 0, False

    def init_v2(self):
        self.is_open = True

    def shutdown(self):
        self.is_open = False

    def device_get_handle_by_index_v2(self, index):
        return 100 + index

    def device_get_name(self, gpu):
        assert gpu == 100
        return "A GPU"

    def device_get_clock_info(self, gpu, kind):
        self.reads += kind == 1
        return 1800 - 100 * self.reads if kind == 1 else 5000

    def device_get_temperature_v(self, gpu, sensor):
        return 40 + self.reads

    def device_get_power_usage(self, gpu):
        return 70_000 * self.reads

    def device_get_current_clocks_event_reasons(self, gpu):
        return 0x1 if self.reads < 2 else 0x5


def test_sensors_say_from_where_to_where_and_what_slowed_the_gpu():
    nvml = Nvml()
    sensors = _nvml.Sensors(nvml, nvml.device_get_handle_by_index_v2(0))
    for _ in range(3):
        sensors.read()
    gpu = sensors.close()
    assert gpu == Gpu(
        name="A GPU",
        readings=3,
        sm_mhz=(1500, 1700),
        memory_mhz=(5000, 5000),
        celsius=(41, 43),
        watts=(70.0, 210.0),
        slowed={"its power limit": 2},
    )
    assert gpu.doubts == (
        "A GPU was slowed by its power limit in 2 of 3 readings",
        "the clock of A GPU went from 1500 to 1700 MHz: it is not locked",
    )
    assert "SM clock 1500 to 1700 MHz" in str(gpu)


def test_a_steady_gpu_is_not_in_doubt():
    assert Gpu("A GPU", 3, (1750, 1800), (5000, 5000), (40, 41), (70.0, 71.0)).doubts == ()


def test_nothing_is_said_of_a_gpu_that_was_not_read():
    nvml = Nvml()
    nvml.init_v2()
    assert _nvml.Sensors(nvml, 100).close() is None
    assert not nvml.is_open


def test_without_a_gpu_or_the_bindings_there_are_no_sensors(monkeypatch):
    monkeypatch.setattr(_nvml, "missing_gpu", lambda: "no NVIDIA GPU")
    assert _nvml.Sensors.open() is None
    monkeypatch.setattr(_nvml, "missing_gpu", lambda: None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert _nvml.Sensors.open() is None
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvml=nvml))
    assert _nvml.Sensors.open() is not None
    assert nvml.is_open


# ── ONNX Runtime ────────────────────────────────────────────────────────────────────


class OrtOnTheCpu(OrtCuda, frozen=True):
    """ONNX Runtime's way on CUDA, on the CPU's provider: the same calls, on real memory."""

    provider: ClassVar[str] = "CPUExecutionProvider"
    device: ClassVar[str] = "cpu"
    provider_options: ClassVar[dict[str, str]] = {}


@pytest.fixture
def asked(monkeypatch):
    """Pretend a stream; return it, what sessions were made with, and how each run was asked for."""
    pretended = Stream()
    monkeypatch.setattr(_cuda, "runtime_api", lambda: pretended)
    pretended.providers, pretended.runs = [], []
    made, run = ort.InferenceSession, ort.InferenceSession.run_with_iobinding

    def load(path, options, *, providers, **more):
        pretended.providers.append(providers)
        return made(path, options, providers=["CPUExecutionProvider"], **more)

    def timed(self, binding, options=None):
        run(self, binding, options)
        pretended.runs.append(dict(configured(options)) if options else {})
        pretended.now += 3.0

    monkeypatch.setattr(ort, "InferenceSession", load)
    monkeypatch.setattr(made, "run_with_iobinding", timed)
    return pretended


def configured(options):
    for key in ("disable_synchronize_execution_providers", "gpu_graph_id"):
        with suppress(RuntimeError):  # it is not there
            yield key, options.get_run_config_entry(key)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_onnxruntime_computes_in_the_stream_that_events_are_recorded_in(
    asked, tiny_onnx, tiny_module, cuda_graph
):
    x = noise((1, 32, 32), count=2, seed=0)
    with torch.inference_mode():
        want = tiny_module(torch.from_numpy(x)).numpy()
    with OrtOnTheCpu(cuda_graph=cuda_graph).open(tiny_onnx.path) as session:
        steps = session.on_device({"input": x})
        assert list(steps) == (WAYS if cuda_graph else WAYS[:2])
        assert steps[_device.EVENTS]() == 3.0
        for step in steps.values():
            step()
            assert np.allclose(step.outputs()["logits"], want, rtol=1e-4, atol=1e-4)
    ((_, options),) = asked.providers[0]
    assert options["user_compute_stream"] == "7"
    assert options.get("enable_cuda_graph") == ("1" if cuda_graph else None)
    waits = [run["disable_synchronize_execution_providers"] for run in asked.runs]
    assert set(waits) == {"1"}
    assert (asked.events, asked.streams) == ({}, 0)


def test_each_shape_has_a_graph_of_its_own_and_one_place_for_all_its_batches(asked, tiny_onnx):
    batches = [noise((1, 32, 32), count=size, seed=seed) for seed, size in enumerate((2, 3, 2))]
    with plugins.load_runtime("ort-cpu", {}).open(tiny_onnx.path) as session:
        want = [session({"input": x})["logits"] for x in batches]
    with OrtOnTheCpu(cuda_graph=True).open(tiny_onnx.path) as session:
        places = []
        for x, logits in zip(batches, want, strict=True):
            step = session.bind({"input": x})
            step()
            assert np.allclose(step.outputs()["logits"], logits, rtol=1e-4, atol=1e-5)
            places.append(step.binding.get_outputs()[0].data_ptr())
            assert np.allclose(session({"input": x})["logits"], logits, rtol=1e-4, atol=1e-5)
    assert [run["gpu_graph_id"] for run in asked.runs] == ["1", "2", "1"]
    assert places[0] == places[2] != places[1]


def test_without_the_bindings_onnxruntime_has_the_wall_clock_alone(asked, monkeypatch, tiny_onnx):
    def lacking():
        raise RuntimeMissing("running an engine needs cuda-python")

    monkeypatch.setattr(_cuda, "runtime_api", lacking)
    with OrtOnTheCpu().open(tiny_onnx.path) as session:
        assert not isinstance(session, OnDevice)
        session.bind({"input": noise((1, 32, 32), count=2, seed=0)})()
    ((_, options),) = asked.providers[0]
    assert options == {}


def test_a_graph_that_is_replayed_is_said_to_be(tiny_onnx):
    assert OrtCuda(cuda_graph=True).describe(tiny_onnx.path) == (
        "runs are replayed as CUDA graphs",
    )
    assert OrtCuda().describe(tiny_onnx.path) == ()
