"""The whole recipe through its Python face, on a tiny network and real digits."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from time import perf_counter

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import TinyModel, disturb, refused
from safetensors.torch import save_file

import exporter
from exporter.bundle import read_manifest
from exporter.contracts import silent
from exporter.errors import ExportError, GraphError, InputRefused, ParityError, RuntimeMissing
from exporter.job import Job
from exporter.profile import load_profile
from exporter.quantisation.folds import HEADROOM
from exporter.records import Convergence
from exporter.renderers import plots, record
from exporter.samples import digits


@pytest.fixture(scope="module")
def bundle(tiny_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pipeline") / "bundle"
    profile = load_profile(
        "default",
        {
            "batch.max": 8,
            "timing.runs": 5,
            "timing.batches": [1, 4],
            "calibration.images": 16,
            "precision.int8.tolerance": {"sqnr_db": 10.0},
            "precision.int8.random_tolerance": {},
        },
    )
    exporter.run(tiny_model, profile, out)
    return out


@pytest.fixture(scope="module")
def report(bundle) -> exporter.Report:
    return record.parse((bundle / "report.json").read_bytes())


def test_the_bundle_holds_every_artefact_and_the_reports(bundle):
    assert {path.name for path in bundle.iterdir()} >= {
        "manifest.json",
        "profile.toml",
        "report.json",
        "report.md",
        *(f"tinymodel.{precision}.onnx" for precision in ("fp32", "fp16", "int8")),
    }
    assert not list(bundle.parent.glob(".*"))


def test_the_manifest_has_every_file_with_its_digest(bundle):
    manifest = read_manifest(bundle)
    assert manifest is not None
    found = {p.name for p in bundle.iterdir()} - {"manifest.json"}
    assert {file.name for file in manifest.files} == found
    for file in manifest.files:
        data = (bundle / file.name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (file.sha256, file.size)


def test_the_profile_in_the_bundle_is_the_one_that_was_used(bundle, report):
    again = load_profile(bundle / "profile.toml")
    assert json.loads(msgspec.json.encode(again)) == report.profile
    assert again.timing.batches == (1, 4)


def test_every_artefact_that_ran_passed_and_no_other_did(report):
    ran = {artefact.name: artefact for artefact in report.artefacts if not artefact.not_run}
    assert {"fp32 on ort-cpu", "fp16 on ort-cpu", "int8 on ort-cpu"} <= ran.keys()
    for artefact in report.artefacts:
        assert artefact.verdict == ("pass" if artefact.name in ran else "not checked")
    assert report.verdict == "pass"
    report.raise_for_parity()


def test_the_figures_in_the_report_follow_from_the_files_in_the_bundle(bundle, report, tiny_module):
    """Recomputed from the ONNX file and the module, with nothing of the exporter's."""
    inputs, labels, _ = digits((1, 32, 32), "held-out")
    with torch.inference_mode():
        want = tiny_module.double()(torch.from_numpy(inputs).double()).numpy()
        single = tiny_module.float()(torch.from_numpy(inputs)).double().numpy()
    for precision in ("fp32", "fp16", "int8"):
        session = ort.InferenceSession(
            bundle / f"tinymodel.{precision}.onnx", providers=["CPUExecutionProvider"]
        )
        got = session.run(None, {"input": inputs})[0].astype(np.float64)
        parity = next(a for a in report.artefacts if a.name == f"{precision} on ort-cpu").parity[0]
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert parity.samples == 360
        # Batches differ, and with them the order of sums: float32 noise, and for INT8 a step.
        assert parity.rel_l2 == pytest.approx(error, rel=0.5 if precision == "fp32" else 0.05)
        assert parity.sqnr_db == pytest.approx(-20 * np.log10(parity.rel_l2))
        assert parity.agreement == pytest.approx(
            (got.argmax(1) == want.argmax(1)).mean(), abs=0.006
        )
        assert parity.accuracy == pytest.approx((got.argmax(1) == labels).mean(), abs=0.006)
    floor = np.linalg.norm(single - want) / np.linalg.norm(want)
    assert report.pytorch[0].rel_l2 == pytest.approx(floor, rel=0.5)


def test_the_fold_is_exact_and_each_batchnorm_has_its_fate(report):
    assert report.fold.folded == len(report.fold.fates) == 5
    assert report.fold.float64_rel_l2 is not None
    assert report.fold.float64_rel_l2 < 1e-12


def test_every_candidate_was_timed_as_often_at_each_batch_size(report):
    names = {latency.name for latency in report.latency}
    assert "PyTorch eager, fp32" in names
    assert names >= {a.name for a in report.artefacts if not a.not_run}
    for latency in report.latency:
        assert len(latency.samples_ms) == 5
        assert latency.threads >= 1
    assert {latency.batch for latency in report.latency} == {1, 4}


def test_the_markdown_never_says_pass_for_what_was_not_run(bundle, report):
    page = (bundle / "report.md").read_text("utf-8")
    for artefact in report.artefacts:
        row = next(line for line in page.splitlines() if line.startswith(f"| {artefact.name} |"))
        assert ("built, not run: no NVIDIA GPU" in row) == bool(artefact.not_run)
        assert ("| pass |" in row) == (not artefact.not_run)


def test_nothing_in_the_bundle_names_a_folder_of_this_machine(bundle):
    for path in bundle.iterdir():
        assert str(bundle.parent).encode() not in path.read_bytes(), path.name
        assert str(Path.home()).encode() + b"/" not in path.read_bytes(), path.name


def test_two_runs_write_the_same_onnx_bytes(bundle, tiny_model, quick_profile, tmp_path):
    exporter.run(tiny_model, quick_profile, tmp_path / "again")
    for precision in ("fp32", "fp16", "int8"):
        name = f"tinymodel.{precision}.onnx"
        assert (tmp_path / "again" / name).read_bytes() == (bundle / name).read_bytes()


def test_one_precision_alone_leaves_no_other_behind(tiny_model, quick_profile, tmp_path):
    report = exporter.run(tiny_model, quick_profile.only(("fp16",)), tmp_path / "out")
    assert [variant.precision for variant in report.variants] == ["fp16"]
    assert [path.name for path in (tmp_path / "out").glob("*.onnx")] == ["tinymodel.fp16.onnx"]


def test_the_stages_take_the_time_of_the_run_and_the_table_shows_each(
    tiny_model, quick_profile, tmp_path
):
    start = perf_counter()
    report = exporter.run(tiny_model, quick_profile.only(("int8",)), tmp_path / "out")
    wall = perf_counter() - start
    assert 0.8 * wall < report.seconds <= wall  # all but the writing of the report
    assert sum(report.seconds_by_part.values()) == pytest.approx(report.seconds)
    names = {stage.name: stage.part for stage in report.stages}
    assert names["fold BatchNorm"] == names["int8: convert"] == "conversion"
    assert names["int8 on ort-cpu: compare with PyTorch"] == "evidence"
    assert names["time 2 candidates at batch 1"] == "latency"
    assert all(stage.peak_bytes > 100e6 for stage in report.stages)  # PyTorch alone takes that
    text = (tmp_path / "out/report.md").read_text("utf-8")
    assert all(f"| {name} |" in text for name in names)


def test_calibration_uses_the_given_samples(tiny_model, quick_profile, tmp_path):
    inputs = 0.5 * digits((1, 32, 32), "train").inputs[:8]
    profile = quick_profile.only(("int8",))
    report = exporter.run(tiny_model, profile, tmp_path / "out", calibration=inputs)
    digest = hashlib.sha256(inputs.tobytes()).hexdigest()[:12]
    assert report.calibration == f"8 samples of the given array, SHA-256 {digest}…"
    graph = onnx.load(tmp_path / "out/tinymodel.int8.onnx").graph
    scale = next(t for t in graph.initializer if t.name == "input_scale")
    headroom = onnx.numpy_helper.to_array(scale) / (np.abs(inputs).max() / 127)
    assert any(headroom == pytest.approx(tried, rel=4e-3) for tried in HEADROOM)


def test_the_bundle_shows_how_the_scales_settled(bundle, report):
    found = report.calibrated
    assert found.counts == (1, 2, 4, 8, 16)
    assert [curve.calibrator for curve in found.curves] == ["max", "percentile 99.999"]
    assert all(curve.largest[-1] == 0 < curve.largest[0] for curve in found.curves)
    assert (bundle / "calibration.svg").read_text("utf-8") == plots.calibration(found)
    assert "calibration.svg" in {file.name for file in read_manifest(bundle).files}


def test_few_calibration_samples_put_the_scales_in_doubt(report):
    (said,) = [doubt for doubt in report.doubts if "calibrated on" in doubt]
    assert said.startswith("the scales were calibrated on 16 samples, and below 32 ")


def test_samples_that_it_is_judged_on_calibrate_only_where_that_is_allowed_and_said(tiny_model):
    train, held_out = (digits((1, 32, 32), split).inputs for split in ("train", "held-out"))
    given = np.concatenate([train[:30], held_out[5:8]])
    request = {
        "weights": None,
        "input_shape": None,
        "calibration": given,
        "progress": silent,
        "builds": False,
    }
    profile = load_profile("default").only(("int8",))
    said = "3 of the 33 calibration samples are among the 360 held-out digits that "
    with refused(InputRefused, said, "the first of them sample 30", hint=("--allow-overlap",)):
        Job.resolve(tiny_model, profile, **request)
    job = Job.resolve(tiny_model, profile, **request, allow_overlap=True)
    assert job.doubts() == ()  # nothing was calibrated yet
    job.calibrated = Convergence(1, (1,), ())
    (doubt,) = job.doubts()
    assert doubt.startswith(said)


# ── A gate that is missed, and a precision that cannot be made ──────────────────────


def test_a_missed_gate_is_data_until_someone_asks_for_an_exception(
    tiny_model, quick_profile, tmp_path
):
    strict = msgspec.structs.replace(
        quick_profile.precision["int8"], tolerance=exporter.Tolerance(sqnr_db=99.0)
    )
    profile = msgspec.structs.replace(quick_profile, precision={"int8": strict})
    report = exporter.run(tiny_model, profile, tmp_path / "out")
    assert report.verdict == "fail"
    with pytest.raises(
        ParityError, match=r"^int8 on ort-cpu: sqnr_db [\d.]+ < 99 on the 360 held-"
    ):
        report.raise_for_parity()
    written = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert written["verdict"] == "fail"
    assert "sqnr_db" in written["failures"][0]


def test_a_layer_that_leaves_halfs_range_stays_in_fp32_and_the_report_says_why(
    tiny_module, quick_profile, tmp_path
):
    state = {key: value.clone() for key, value in tiny_module.state_dict().items()}
    state["block2.0.bn1.weight"][0] = 1e8  # folded, this weight leaves half precision's range
    save_file(state, tmp_path / "huge.safetensors")
    report = exporter.run(
        TinyModel(),
        quick_profile.only(("fp16",)),
        tmp_path / "out",
        weights=tmp_path / "huge.safetensors",
    )
    (variant,) = report.variants
    (note,) = [note for note in variant.notes if "'block2.0.conv1.weight'" in note]
    assert note.startswith("in FP32: block2.0.conv1: ")
    assert "values are beyond 65504, up to " in note
    (artefact,) = [a for a in report.artefacts if a.name == "fp16 on ort-cpu"]
    assert artefact.rung.fidelity.verdict == "pass"


def test_a_precision_that_cannot_be_made_fails_and_costs_the_others_nothing(
    tiny_model, quick_profile, tmp_path, monkeypatch
):
    def refuse(*given, **options):
        raise GraphError("no half today", hint="leave it out")

    monkeypatch.setattr("exporter.precisions.fp16.to_half", refuse)
    report = exporter.run(tiny_model, quick_profile.only(("fp32", "fp16")), tmp_path / "out")
    verdicts = {a.name: a.verdict for a in report.artefacts}
    assert verdicts["fp32 on ort-cpu"] == "pass"
    assert "fp16 on ort-cpu" not in verdicts
    assert report.verdict == "fail"
    assert report.failures == ("fp16: no half today (leave it out)",)
    assert not (tmp_path / "out/tinymodel.fp16.onnx").exists()


def test_a_network_that_overflows_float32_is_reported_as_that_and_fails(
    tiny_module, quick_profile, tmp_path
):
    state = {key: value.clone() for key, value in tiny_module.state_dict().items()}
    for layer in ("block2.0.bn1", "block2.0.bn2", "block3.0.bn1", "block3.0.bn2"):
        state[f"{layer}.weight"] *= 1e12
    save_file(state, tmp_path / "huge.safetensors")
    report = exporter.run(
        TinyModel(),
        quick_profile.only(("fp32", "int8")),
        tmp_path / "out",
        weights=tmp_path / "huge.safetensors",
    )
    assert report.verdict == "fail"
    assert any("outputs of the candidate are NaN or infinite" in said for said in report.failures)
    assert any(re.search("^int8: in float32 the network's 'block", f) for f in report.failures)


def test_a_precision_without_gates_is_not_checked(tiny_model, quick_profile, tmp_path):
    free = msgspec.structs.replace(
        quick_profile.precision["fp32"],
        tolerance=exporter.Tolerance(),
        random_tolerance=exporter.Tolerance(),
    )
    profile = msgspec.structs.replace(quick_profile, precision={"fp32": free})
    assert exporter.run(tiny_model, profile, tmp_path / "out").verdict == "not checked"


# ── Refused before any work ─────────────────────────────────────────────────────────

GOOD = digits((1, 32, 32), "train").inputs[:8]


def with_value(value: float) -> np.ndarray:
    changed = GOOD.copy()
    changed[3, 0, 0, 0] = value
    return changed


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"input_shape": (3, 32, 32)}, InputRefused, "cannot take an input of 3 × 32 × 32"),
        ({"input_shape": (1, 0, 32)}, InputRefused, "every size must be 1 or more"),
        ({"input_shape": (1, 32)}, InputRefused, "cannot take an input of 1 × 32"),
        ({"weights": Path("nowhere.safetensors")}, InputRefused, "nowhere.safetensors: no such"),
        ({"calibration": GOOD[:0]}, InputRefused, "calibration data is empty"),
        ({"calibration": GOOD * 0 + 3}, InputRefused, "is constant: every value is 3"),
        ({"calibration": with_value(np.nan)}, InputRefused, "1 values that are NaN or infinite, the first in sample 3"),  # noqa: E501
        ({"calibration": with_value(np.inf)}, InputRefused, "1 values that are NaN or infinite"),
        ({"calibration": GOOD[:, :, :16]}, InputRefused, "must be (N, 1, 32, 32) float32, found"),
        ({"calibration": GOOD.astype(np.float64)}, InputRefused, "found (8, 1, 32, 32) float64"),
    ],
)  # fmt: skip
def test_a_mistake_costs_no_work_and_leaves_nothing(
    tiny_model, quick_profile, tmp_path, options, error, said
):
    with pytest.raises(error) as refusal:
        exporter.run(tiny_model, quick_profile, tmp_path / "out", **options)
    assert said in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_that_needs_a_gpu_is_refused_where_there_is_none(tiny_model, tmp_path):
    profile = load_profile("default", {"runtime.tensorrt-rtx.targets": ["current"]})
    from exporter.runtimes._cuda import missing_gpu

    if not missing_gpu():
        pytest.skip("this machine has an NVIDIA GPU")
    with pytest.raises(RuntimeMissing, match="'tensorrt-rtx' cannot be used here: no NVIDIA GPU"):
        exporter.run(tiny_model, profile, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_refused_with_what_to_install(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(RuntimeMissing, match="'tensorrt-rtx' cannot be used here: ") as refusal:
        exporter.run(tiny_model, load_profile("default"), tmp_path / "out")
    assert (refusal.value.hint or "").startswith("pip install 'resnet-export[tensorrt-rtx]'")
    assert list(tmp_path.iterdir()) == []


def test_an_error_halfway_leaves_nothing_behind(tiny_model, quick_profile, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise GraphError("no")

    monkeypatch.setattr("exporter.pipeline.measure_latency", fail)
    with pytest.raises(ExportError, match=r"^no$"):
        exporter.run(tiny_model, quick_profile.only(("fp32",)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_training_writes_weights_that_load_and_say_how_good_they_are(tmp_path, monkeypatch):
    """One epoch of a tiny network: far from good, and the same twice."""
    from safetensors import safe_open

    from exporter import train
    from exporter.weights import load_weights

    monkeypatch.setattr(train, "EPOCHS", 1)
    first = train.train(TinyModel(), tmp_path / "a.safetensors")
    second = train.train(TinyModel(), tmp_path / "b.safetensors")
    assert first.sha256 == second.sha256
    module = TinyModel().module()
    assert load_weights(module, first.path).sha256 == first.sha256
    inputs, labels, _ = digits((1, 32, 32), "held-out")
    with torch.inference_mode():
        hits = module(torch.from_numpy(inputs)).argmax(1).numpy() == labels
    assert first.accuracy == pytest.approx(hits.mean(), abs=0.003)
    with safe_open(first.path, framework="pt") as header:
        trained = json.loads(header.metadata()["trained"])
    assert trained["held-out accuracy"] == pytest.approx(first.accuracy, abs=1e-4)


def test_disturbed_batchnorms_really_do_something():
    """Were they identities, every test of a fold would pass without one."""
    module = TinyModel().module()
    x = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        before = module(x)
        assert not torch.allclose(disturb(module)(x), before, rtol=0.1)
