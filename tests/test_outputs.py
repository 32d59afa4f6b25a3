"""Networks of several outputs, and of outputs that are no classification, from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import several
import torch
from conftest import refused

import exporter
from exporter import load_factory
from exporter.errors import InputRefused
from exporter.fidelity import judge_outputs
from exporter.fold import fold_batchnorm
from exporter.job import Job
from exporter.outputs import flatten
from exporter.parity import collect_all, compare_outputs
from exporter.precisions.fp16 import Fp16
from exporter.profile import load_profile
from exporter.quantisation.network import Network
from exporter.recheck import check_bundle
from exporter.records import Artefact, BatchRange, Tolerance
from exporter.reference import TorchSession
from exporter.renderers import _ladder, record
from exporter.to_onnx import export_onnx
from exporter.tune import tune_model
from exporter.worst_case import Search

SHAPE = (1, 16, 16)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((5, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    """Let PyTorch know the dataclass, as its user has to."""
    torch.export.register_dataclass(several.Found)


def load(name: str, **args):
    return load_factory("several:make", {"name": name, **args}, input_shape=SHAPE)


def specs(model) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in (model.output, *model.more_outputs)}


def profile(name: str, precisions: tuple[str, ...] = ("fp32",), **more):
    settings = {
        "model.args.name": name,
        "runtime.ort-cpu.threads": 1,
        "runtime.tensorrt-rtx.targets": ["sm86"],
        "batch": {"min": 1, "opt": 4, "max": 8},
        "timing": {"runs": 2, "warmup": 0, "settle_ms": 0.0, "pytorch_threads": 1},
        "calibration.images": 16,
        "parity.random": 8,
        **more,
    }
    return load_profile("default", settings).only(precisions)


# ── Names ───────────────────────────────────────────────────────────────────────────


def test_outputs_are_called_by_the_way_to_them():
    assert specs(load("Segments")) == {"output": (3, 16, 16)}
    assert specs(load("InTuple")) == {"output_0": (10,), "output_1": (4,)}
    assert specs(load("InDict")) == {"relu": (10,), "c1": (4,)}
    assert specs(load("Named")) == {"label": (10,), "box": (4,)}
    assert list(specs(load("Nested"))) == ["heads.output_0", "heads.output_1.box", "map"]
    assert list(specs(load("AsDataclass"))) == ["label", "maps.output_0", "maps.output_1"]
    assert list(specs(load("Pyramid"))) == ["p1", "p2"]


@pytest.mark.parametrize(
    ("name", "args", "said", "hint"),
    [
        ("Whole", {}, "gives a tensor of int64 as 'class'; only float32", "a module of your own"),
        ("Odd", {"what": "nothing"}, "gives nothing: an empty dict", None),
        ("Odd", {"what": "none"}, "gives an object of type NoneType as 'aux'", "returns such"),
        ("Odd", {"what": "input"}, "an output called 'input', as an input is", "another key"),
        ("Odd", {"what": "unnamed"}, "an output called ''", "another key"),
        ("Odd", {"what": "alike"}, "two outputs are called 'a.b'", None),
        ("Odd", {"what": "few"}, "gives a tensor of 1 × 10 for a batch of 2 as 'label'", "module"),
        ("Odd", {"what": "flat"}, "gives a tensor of 20 for a batch of 2 as 'label'", "module"),
    ],
)
def test_what_cannot_be_judged_is_refused_by_name(name, args, said, hint):
    with refused(InputRefused, said, hint=None if hint is None else (hint,)):
        load(name, **args)


def test_a_dataclass_that_pytorch_does_not_know_is_refused_with_what_registers_it(monkeypatch):
    class Unknown(several.AsDataclass):
        def forward(self, x):
            return several.dataclass(type("Other", (), {"__annotations__": {"y": object}}))(x)

    monkeypatch.setattr(several, "AsDataclass", Unknown)
    with refused(InputRefused, "an object of type Other", hint=("register_dataclass(Other)",)):
        load("AsDataclass")


# ── The graph ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name", ["InTuple", "InDict", "Named", "Nested", "AsDataclass", "Twice", "Pyramid", "Segments"]
)
def test_the_graph_gives_every_output_by_its_name_as_the_unfolded_network_does(name, tmp_path):
    model = load(name)
    folded = fold_batchnorm(model.module(), torch.from_numpy(X[:2]))
    assert all(fate.folded for fate in folded.fates)
    output, *more = model.output, *model.more_outputs
    path = tmp_path / "net.onnx"
    export_onnx(
        folded.module,
        path,
        input=model.input,
        output=output,
        more_outputs=more,
        batch=BatchRange(),
    )
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == list(specs(model))
    with torch.inference_mode():
        want = flatten(model.module().double()(torch.from_numpy(X).double()))
    for (own, tensor), got in zip(want.items(), session.run(None, {"input": X}), strict=True):
        assert np.abs(got - tensor.numpy()).max() <= 1e-4 * np.abs(tensor.numpy()).max(), own


def test_every_session_gives_each_output_for_as_many_samples_as_were_asked_for():
    model = load("Nested")
    session = TorchSession.of(model.module(), *specs(model), double=True)
    feeds = [{"input": X[:3]}, {"input": X[3:5].repeat(2, axis=0)[:3]}]
    found = collect_all(session, feeds, list(specs(model)), samples=5)
    assert {name: rows.shape for name, rows in found.items()} == {
        "heads.output_0": (5, 10),
        "heads.output_1.box": (5, 4),
        "map": (5, 8 * 8 * 8),
    }


# ── Quality and fidelity ────────────────────────────────────────────────────────────


def test_a_tensor_that_is_no_classification_has_no_figures_of_classes():
    want = RNG.standard_normal((6, 12))
    found = compare_outputs(want, want + 1e-3, inputs="pictures", has_classes=False, output="map")
    assert found.agreement is found.agreement_proven is found.margin_used is found.accuracy is None
    assert (found.classes, found.undecided) == (0, 0)
    assert found.rel_l2 == pytest.approx(1e-3 * 72**0.5 / np.linalg.norm(want))
    missed = compare_outputs(
        *(want, 1.1 * want),
        inputs="pictures",
        output="map",
        has_classes=False,
        tolerance=Tolerance(sqnr_db=30),
    )
    assert missed.failures == ("sqnr_db 20 < 30 for 'map' on the pictures",)


def test_a_network_is_good_enough_where_every_output_is():
    def quality(**gates):
        want = RNG.standard_normal((6, 12))
        return Artefact(
            *("fp32", "ort-cpu", None),
            parity=tuple(
                compare_outputs(want, want, inputs="noise", output=name, tolerance=tolerance)
                for name, tolerance in gates.items()
            ),
        ).quality

    assert quality(a=Tolerance(sqnr_db=3), b=Tolerance(max_abs=1)) == "pass"
    assert quality(a=Tolerance(sqnr_db=3), b=Tolerance()) == "not checked"
    assert quality(a=Tolerance(sqnr_db=3), b=Tolerance(agreement=0.999)) == "not enough evidence"


def test_fidelity_is_that_of_the_output_that_is_worst_off_beside_its_own_floor():
    small, large = RNG.standard_normal((6, 4)), 1e6 * RNG.standard_normal((6, 4))
    exact = {"small": small, "large": large}
    noisy = {name: values * (1 + 1e-6) for name, values in exact.items()}
    off = {"small": small * (1 + 1e-5), "large": large * (1 + 1e-6)}
    found = judge_outputs(exact, off, exact=exact, noisy=noisy, against="the graph")
    assert (found.output, found.verdict) == ("small", "fail")
    assert found.multiple == pytest.approx(10, rel=1e-3)
    assert found.failures[0].startswith("its 'small' is 10 times as far from the graph")
    off["large"] = np.full_like(large, np.nan)
    found = judge_outputs(exact, off, exact=exact, noisy=noisy, against="the graph")
    assert (found.output, found.nonfinite, found.verdict) == ("large", 24, "fail")


def test_gates_on_classes_are_left_out_where_there_are_none_and_the_report_says_so():
    asked = {"precision.fp32.tolerance": {"sqnr_db": 80.0, "agreement": 0.5, "accuracy_drop": 0.1}}
    job = resolve("AsDataclass", **asked)
    label, half, _ = job.output_specs
    assert job.gates("fp32", label).tolerance == job.profile.precision["fp32"].tolerance
    assert job.gates("fp32", half).tolerance == Tolerance(sqnr_db=80.0)
    assert job.labelled == label
    assert any(
        "agreement is not checked" in said and "'maps.output_0'" in said for said in job.doubts()
    )
    two = resolve("InTuple", **asked)
    assert two.gates("fp32", two.output_specs[0]).tolerance == Tolerance(
        sqnr_db=80.0, agreement=0.5
    )
    assert any("which of 'output_0' and 'output_1' the labels are of" in d for d in two.doubts())
    assert any("no output is (N, classes)" in said for said in resolve("Pyramid").doubts())


def resolve(name: str, **asked) -> Job:
    from exporter.contracts import silent

    return Job.resolve(
        load(name),
        profile(name, **asked),
        weights="factory",
        input_shape=None,
        calibration=None,
        progress=silent,
    )


# ── INT8, FP16 ──────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> onnx.ModelProto:
    model = load("InTuple")
    path = tmp_path_factory.mktemp("heads") / "net.onnx"
    export_onnx(
        fold_batchnorm(model.module(), torch.from_numpy(X[:2])).module,
        path,
        input=model.input,
        output=model.output,
        more_outputs=model.more_outputs,
        batch=BatchRange(),
    )
    return onnx.load(path)


def test_each_outputs_error_counts_beside_its_own_power(heads):
    plain = Network.of(heads, {}, [])
    weighed = plain.weighed(X)
    exact = plain.outputs(X)
    assert exact.shape == (5, 14)
    label, box = exact[:, :10], exact[:, 10:]
    assert box.square().sum() > 1e4 * label.square().sum()
    name = "fc.bias"
    moved = {name: plain.emulator.constants[name] + 0.5}
    error = (weighed.outputs(X, weights=moved) - weighed.outputs(X)).square().sum()
    assert float(error / 5) == pytest.approx(float(5 * 10 * 0.25 / label.square().sum()), rel=1e-4)
    assert float(weighed.outputs(X).square().sum() / 5) == pytest.approx(2, rel=1e-4)


def test_half_io_makes_every_output_half(heads):
    made = Fp16(half_io=True).convert(heads, {}, X).model
    kinds = [value.type.tensor_type.elem_type for value in made.graph.output]
    assert kinds == [onnx.TensorProto.FLOAT16] * 2


# ── From end to end ─────────────────────────────────────────────────────────────────

GATES = {
    "precision.fp32.tolerance": {"sqnr_db": 100.0},
    "precision.fp16.tolerance": {"sqnr_db": 40.0},
    "precision.int8.tolerance": {"sqnr_db": 10.0},
}
ALL = ("fp32", "fp16", "int8")


@pytest.mark.parametrize("name", ["InDict", "Nested", "Pyramid", "Segments"])
def test_a_bundle_holds_every_output_to_the_gates_and_parity_finds_the_same(name, tmp_path):
    model, out = load(name), tmp_path / "out"
    report = exporter.run(model, profile(name, ALL, **GATES), out, weights="factory")
    names = list(specs(model)) if model.more_outputs else [None]
    judged = [artefact for artefact in report.artefacts if artefact.parity]
    assert [artefact.precision for artefact in judged] == list(ALL)
    for artefact in judged:
        assert artefact.failures == ()
        assert artefact.verdict == "pass"
        assert [parity.output for parity in artefact.parity] == names * 2
        dense = [p for p in artefact.parity if len(specs(model)[p.output or "output"]) > 1]
        assert all(parity.agreement is None and parity.sqnr_db > 10 for parity in dense)
    assert report.source.outputs == (model.output, *model.more_outputs)
    text = (out / "report.json").read_text("utf-8")
    assert record.parse(text) == report
    assert len(json.loads(text)["pytorch"]) == 2 * len(names)
    page = (out / "report.md").read_text("utf-8")
    for spec in report.source.outputs:
        assert f"{spec.name} N×{'×'.join(map(str, spec.shape))}".replace("_", "\\_") in page
    again = check_bundle(out, model=load(name), weights="factory", search=Search(steps=2, lanes=4))
    assert [a.parity for a in again.artefacts] == [a.parity for a in report.artefacts]
    assert again.failures == ()
    for case in again.worst_cases:
        has_classes = any(len(shape) == 1 for shape in specs(model).values())
        assert case.has_classes == has_classes
        assert ("label flip" in _ladder.worst(case)) == has_classes
        assert case.is_relative == bool(model.more_outputs)
        assert np.load(out / case.file).shape[1:] == SHAPE


def test_a_bundle_of_other_outputs_is_refused(tmp_path):
    one, other = (load_factory(f"several:{n}", input_shape=SHAPE) for n in ("InTuple", "InDict"))
    asked = profile("", **GATES)
    asked = msgspec.structs.replace(asked, model=load_profile("default").model)
    exporter.run(one, asked, tmp_path / "out", weights="factory")
    with refused(InputRefused, "gives 'output_0' N×10 and 'output_1' N×4, and this one 'relu'"):
        check_bundle(tmp_path / "out", model=other, weights="factory")


@pytest.mark.parametrize(
    ("name", "gives"),
    [("Pyramid", "'p1' N×4×8×8, 'p2' N×4×4×4"), ("InTuple", "'output_0' N×10, 'output_1' N×4")],
)
def test_a_budget_of_accuracy_alone_would_leave_an_output_without_a_bound(name, gives, tmp_path):
    out, budget = tmp_path / "out", exporter.Budget(max_drop=0.01)
    said = (f"gives {gives}, and a drop in accuracy is of one output (N, classes) alone",)
    with refused(InputRefused, *said, hint=("--min-sqnr",)):
        tune_model(load(name), profile(name, ALL), out, budget, weights="factory")
    assert not out.exists()


def test_labels_of_data_are_left_alone_where_no_output_has_classes(tmp_path: Path):
    inputs = RNG.standard_normal((40, *SHAPE)).astype(np.float32)
    np.savez(tmp_path / "own.npz", inputs=inputs, labels=RNG.standard_normal((40, 3)))
    report = exporter.run(
        load("Segments"),
        profile("Segments", **GATES),
        tmp_path / "out",
        weights="factory",
        data=tmp_path / "own.npz",
    )
    assert report.data.classes is None
    assert report.pytorch[0].accuracy is None
    assert report.verdict in ("pass", "not checked")
