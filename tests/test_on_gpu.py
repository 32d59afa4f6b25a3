"""What only an NVIDIA GPU can show; all of it is skipped, with the reason, where there is none."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from test_runtimes import quantised

from exporter import plugins
from exporter.contracts import Bound, OnDevice
from exporter.emulation import Emulator, emulate
from exporter.errors import BuildError
from exporter.runtimes import _cuda, _device
from exporter.runtimes._nvml import Sensors
from exporter.samples import digits, noise

# What a vendor's library warns of is not ours to fix there.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

WAYS = {_device.EVENTS, _device.COPIES, _device.GRAPH}
RUNTIMES = [
    ("ort-cuda", {}),
    ("ort-cuda", {"cuda_graph": True}),
    ("tensorrt", {}),
    ("tensorrt-rtx", {"targets": ["current"]}),
    ("torch-eager-cuda", {}),
    ("torch-eager-cuda", {"channels_last": True}),
    ("torch-compile-cuda", {}),
]


@pytest.fixture(autouse=True)
def _gpu():
    if reason := _cuda.missing_gpu():
        pytest.skip(reason)


@pytest.fixture(params=RUNTIMES, ids=lambda one: " ".join((one[0], *one[1])))
def runtime(request):
    name, options = request.param
    found = plugins.load_runtime(name, options)
    if reason := found.missing("build") or found.missing("run"):
        pytest.skip(f"{name}: {reason}")
    return found


def test_fp32_is_fp32_and_answers_like_pytorch_in_float64(
    runtime, tiny_module, tiny_onnx, tmp_path
):
    """TF32 would be some 3e-4 off."""
    x = noise((1, 32, 32), count=3, seed=0)
    with torch.inference_mode():
        want = tiny_module.double()(torch.from_numpy(x).double()).numpy()
        tiny_module.float()
    with runtime.open(runtime.build(tiny_onnx, tmp_path)) as session:
        got = session({"input": x})["logits"]
        step = session.bind({"input": x})
        step()
        assert isinstance(step, Bound)
        bound = step.outputs()["logits"]
    for found in (got, bound):
        assert np.linalg.norm(found - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 1e-2), ("int8", 5e-2)])
def test_fewer_bits_compute_the_graph_that_asks_for_them(
    runtime, tiny_onnx, tmp_path, precision, limit
):
    if precision == "int8":
        model = quantised(tiny_onnx, tmp_path)
    else:
        graph = onnx.load(tiny_onnx.path)
        made = plugins.load_precision("fp16", {}).convert(graph, {}, np.empty(0)).model
        onnx.save(made, tmp_path / "tiny.fp16.onnx")
        model = tiny_onnx._replace(path=tmp_path / "tiny.fp16.onnx", precision="fp16")
    x = digits((1, 32, 32), "held-out").inputs[:8]
    emulator = Emulator.of(onnx.load(model.path))
    want = emulate(emulator, iter([{"input": x}]), "exact")["logits"]
    try:
        path = runtime.build(model, tmp_path)
    except BuildError as refusal:
        pytest.skip(str(refusal))
    with runtime.open(path) as session:
        got = session({"input": x})["logits"]
    assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)


def test_every_way_of_timing_takes_time_and_computes_the_same(runtime, tiny_onnx, tmp_path):
    with runtime.open(runtime.build(tiny_onnx, tmp_path)) as session:
        if not isinstance(session, OnDevice):
            pytest.skip("without cuda-python there is no clock of the device's own")
        for size in (2, 5, 2):
            x = noise((1, 32, 32), count=size, seed=size)
            want = session({"input": x})["logits"]
            steps = session.on_device({"input": x})
            assert steps.keys() <= WAYS
            for step in steps.values():
                assert 0 < step() < 1e4
                step()
                assert np.allclose(step.outputs()["logits"], want, rtol=1e-3, atol=1e-4)


def test_the_sensors_of_the_card_are_read():
    sensors = Sensors.open()
    if sensors is None:
        pytest.skip("NVML cannot be asked without cuda-python")
    sensors.read()
    gpu = sensors.close()
    assert gpu is not None
    assert gpu.name
    assert 0 < gpu.celsius[0] < 120
    assert gpu.watts[0] > 0
