"""Doctor: what each runtime did on a small network, and what is said of one that did not do it."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import contextmanager

import numpy as np
import onnx
import pytest
import torch
from conftest import refused
from torch import nn

from exporter import doctor, environment, plugins
from exporter.contracts import Identity, Plugin
from exporter.errors import BuildError, RuntimeMissing, UnknownName
from exporter.records import Checkup, Diagnosis, Executed, Execution, Trial
from exporter.renderers import checkup
from exporter.runtimes.ort_cpu import OrtCpu
from exporter.samples import noise


def test_the_small_network_is_what_it_says(tmp_path):
    """The same layers as a PyTorch module, of the graph's weights, give the same outputs."""
    model = doctor.network()
    onnx.checker.check_model(model, full_check=True)
    weights = {
        t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy())
        for t in model.graph.initializer
    }
    layers = {
        "conv1": nn.Conv2d(4, 4, 3, padding=1),
        "conv2": nn.Conv2d(4, 4, 3, padding=1),
        "linear": nn.Linear(4, 4),
    }
    for name, layer in layers.items():
        layer.load_state_dict({part: weights[f"{name}.{part}"] for part in ("weight", "bias")})
    x = torch.from_numpy(noise((4, 16, 16), count=3, seed=0))
    with torch.no_grad():
        first = layers["conv1"](x).relu()
        want = layers["linear"]((layers["conv2"](first) + first).relu().mean(dim=(2, 3)))
    onnx.save(model, tmp_path / "small.onnx")
    with plugins.load_runtime("ort-cpu", {}).open(tmp_path / "small.onnx") as session:
        got = session({"input": x.numpy()})["logits"]
    assert np.allclose(got, want.numpy(), atol=1e-5)


@pytest.fixture(scope="module")
def ort() -> Checkup:
    return doctor.examine(["ort-cpu"]).runtimes[0]


def test_a_runtime_that_works_says_what_it_got_and_in_which_types_it_ran(ort):
    import onnxruntime

    assert ort.ready
    assert (ort.version, ort.device, ort.remedy) == (onnxruntime.__version__, "CPU", None)
    assert 0 < ort.error < 1e-6
    trials = {trial.precision: trial for trial in ort.trials}
    assert {name.partition(" ")[0] for name in trials} == set(plugins.names("precisions"))
    assert trials["fp32"] == Trial("fp32")
    integer = trials["int8 (form = onnxruntime)"]
    assert (integer.asked, integer.ran, integer.reason) == (2, 2, None)
    assert (trials["fp16"].ran, trials["fp16"].asked) == (0, 3)
    assert "no FP16 kernel" in trials["fp16"].reason
    assert "NOT_IMPLEMENTED" in trials["bf16"].refused


# ── A runtime that is not what it seems ─────────────────────────────────────────────


class Pretender(Plugin, frozen=True):
    """A runtime of which nothing is missing."""

    fault: str | None = None

    def missing(self, action):
        return "no NVIDIA GPU (no driver)" if self.fault == "missing" else None

    def identify(self):
        return Identity("1.0", None if self.fault == "missing" else "a card")

    def build(self, model, folder):
        return model.path

    @contextmanager
    def open(self, path):
        if self.fault == "falls back":
            raise BuildError("it gave the CPU where a card was asked for")
        with OrtCpu().open(path) as session:
            yield (
                (lambda feed: {"logits": session(feed)["logits"] * 1.001})
                if self.fault == "loose"
                else session
            )

    def executed(self, model, path):
        if model.precision == "fp32":
            return None
        if model.precision == "fp16":
            return Execution("profile", unknown="nobody knows")
        if model.precision == "bf16":
            raise BuildError("no such thing")
        told = (
            Executed("conv1", "Conv", "int8", "int8"),
            Executed("conv2", "Conv", "int8", None, "not told"),
        )
        return Execution("profile", told)


def examined(monkeypatch, fault: str | None) -> Checkup:
    monkeypatch.setattr(
        plugins, "load_runtime", _with(plugins.load_runtime, Pretender(fault=fault))
    )
    monkeypatch.setattr(plugins, "names", _with(plugins.names, ("pretender",), of="runtimes"))
    return doctor.examine(["pretender"]).runtimes[0]


def _with(real, pretended, of="pretender"):
    return lambda name, *rest: pretended if name == of else real(name, *rest)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("falls back", "it gave the CPU where a card was asked for"),
        ("loose", "its answer in FP32 is off by 1.0e-03 of it, where 1e-05 is allowed"),
    ],
)
def test_a_runtime_of_which_nothing_is_missing_is_not_ready_until_it_has_answered(
    monkeypatch, fault, said
):
    found = examined(monkeypatch, fault)
    assert (found.run, found.ready, found.failed, found.trials) == (None, False, said, ())
    assert found.device == (None if fault == "falls back" else "a card")
    diagnosis = Diagnosis("tool", "a CPU", 2, {}, (found,))
    assert f"  run    {said}" in checkup.render(diagnosis)
    with refused(RuntimeMissing, "the runtime 'pretender' cannot run here", said):
        doctor.require(diagnosis)


def test_what_is_missing_is_tried_no_further_and_has_its_remedy(monkeypatch):
    found = examined(monkeypatch, "missing")
    assert (found.ready, found.device, found.error, found.trials) == (False, None, None, ())
    assert found.run == "no NVIDIA GPU (no driver)"
    assert "a machine with that GPU" in found.remedy


def test_layers_that_are_not_told_of_are_not_counted_and_refusals_are_kept(monkeypatch):
    found = examined(monkeypatch, None)
    trials = {trial.precision: trial for trial in found.trials}
    assert found.ready
    assert trials["int8"] == Trial("int8", asked=2, ran=1, reason="not told")
    assert trials["fp16"] == Trial("fp16", refused="nobody knows")
    assert trials["bf16"] == Trial("bf16", refused="no such thing")


def test_an_unknown_runtime_is_refused_before_anything_is_tried():
    with refused(UnknownName, "no runtime named 'openvinno'", hint=("'openvino'",)):
        doctor.examine(["openvinno"])


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("no NVIDIA GPU (no driver)", "a machine with that GPU"),
        ("torch.compile needs a C++ compiler, and found none", "install g++"),
        ("OpenVINO has no device 'NPU' here, but CPU", "choose a device that is there"),
        ("OpenVINO has no device 'GPU' here, but CPU", "choose a device that is there"),
        ("No module named 'openvino'", "pip install 'resnet-export[openvino]'"),
        ("PyTorch 2.13.0+cpu cannot use the NVIDIA GPU here", "built with CUDA"),
        ("torch.compile needs Triton on CUDA (none)", "built with CUDA"),
    ],
)
def test_the_remedy_is_one_for_what_is_missing(reason, said):
    assert said in plugins.remedy("openvino", reason)


# ── The machine, and how it is all said ─────────────────────────────────────────────


@pytest.mark.parametrize(
    ("lines", "native"),
    [
        (
            "flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16",
            {"fp32": ("AVX2", "AVX-512"), "bf16": ("AVX512-BF16",), "int8": ("AVX512-VNNI",)},
        ),
        (
            "flags : fpu avx2 avx_vnni amx_tile amx_int8 amx_bf16 amx_fp16",
            {
                "fp32": ("AVX2",),
                "fp16": ("AMX-FP16",),
                "bf16": ("AMX-BF16",),
                "int8": ("AVX-VNNI", "AMX-INT8"),
            },
        ),
        (
            "Features : fp asimd asimdhp asimddp",
            {"fp32": ("NEON",), "fp16": ("NEON-FP16",), "int8": ("NEON-DOT",)},
        ),
        ("flags : fpu sse2", {}),
    ],
)
def test_what_a_cpu_runs_natively_is_read_from_what_linux_says_of_it(
    monkeypatch, tmp_path, lines, native
):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\n{lines}\nprocessor : 1\n")
    monkeypatch.setattr(environment, "_CPUINFO", info)
    assert environment.native_precisions() == native


def test_a_machine_that_does_not_tell_has_no_instructions_claimed_for_it(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "none")
    assert environment.native_precisions() == {}


def test_precisions_of_which_the_same_is_said_share_a_line(ort):
    trials = (
        Trial("fp32"),
        Trial("fp16", 3, 0, "no kernels"),
        Trial("fp8", 2, 0, "no kernels"),
        Trial("int8", 4, 3, "one is read in float"),
        Trial("bf16", refused="no such operator"),
        Trial("int4", 2, 2),
    )
    found = Checkup("some", "1.0", "CPU", None, None, 1e-7, None, trials)
    assert checkup.render(Diagnosis("tool", "a CPU", 1, {"int8": ("VNNI",)}, (found,))) == (
        "a CPU, 1 core\n"
        "  FP32  no instructions of its own\n"
        "  FP16  no instructions of its own\n"
        "  BF16  no instructions of its own\n"
        "  INT8  VNNI\n"
        "\n"
        "some                version 1.0, on CPU\n"
        "  build  ready\n"
        "  run    ready\n"
        "    fp32: runs\n"
        "    fp16, fp8: no layer runs in it; no kernels\n"
        "    int8: 3 of 4 layers run in it; one is read in float\n"
        "    bf16: refused: no such operator\n"
        "    int4: every layer runs in it\n"
    )


def test_the_json_has_every_field_and_whether_it_is_ready(ort):
    diagnosis = Diagnosis("tool", "a CPU", 1, {}, (ort,))
    table = json.loads(checkup.to_json(diagnosis))
    (entry,) = table["runtimes"]
    assert entry["ready"] is True
    assert {*Checkup.__struct_fields__, "ready"} == set(entry)
    assert Counter(trial["precision"] for trial in entry["trials"]) == Counter(
        t.precision for t in ort.trials
    )
