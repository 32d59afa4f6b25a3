"""A run on data of one's own: what it judges on, what it refuses, and what the report says."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import HASTE, TinyModel, refused
from PIL import Image
from sklearn.datasets import load_digits

import exporter
from exporter.bench import bench_bundles
from exporter.cli import main
from exporter.contracts import silent
from exporter.errors import InputRefused, OutOfMemory
from exporter.job import Job
from exporter.profile import load_profile
from exporter.recheck import check_bundle
from exporter.records import BenchAsked
from exporter.renderers import markdown, record
from exporter.samples import MEAN, STD, digits

QUICK = {
    **HASTE,
    "preprocess.mean": [MEAN],
    "preprocess.std": [STD],
    "preprocess.resize": 32,
    "data.workers": 2,
}
PRECISIONS = {"fp32": {"rel_l2": 1e-3}, "fp16": {"sqnr_db": 10.0}}


def profile(**more):
    """A profile of ONNX Runtime alone, with FP32 and FP16, which is calibrated."""
    wanted = {
        f"precision.{name}.tolerance": {**gates, "accuracy_drop": 0.05}
        for name, gates in PRECISIONS.items()
    }
    free = {f"precision.{name}.random_tolerance": {} for name in PRECISIONS}
    found = load_profile("cpu", {**QUICK, **wanted, **free, **more})
    return found.only(tuple(PRECISIONS))


def scans(folder: Path, numbers: range, *, flat: bool = False) -> Path:
    """Write digits as 8×8 PNGs, in folders of their classes unless ``flat``."""
    bunch = load_digits()
    for number in numbers:
        where = folder if flat else folder / f"digit {bunch.target[number]}"
        where.mkdir(parents=True, exist_ok=True)
        levels = np.round(bunch.images[number] * 255 / 16).astype(np.uint8)
        Image.fromarray(levels).save(where / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return scans(tmp_path_factory.mktemp("data") / "scans", range(120))


@pytest.fixture(scope="module")
def bundle(tiny_model, folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("own") / "bundle"
    exporter.run(tiny_model, profile(), out, data=folder)
    return out


@pytest.fixture(scope="module")
def report(bundle) -> exporter.Report:
    return record.parse((bundle / "report.json").read_bytes())


def test_the_report_says_what_was_used_and_names_no_folder_of_this_machine(bundle, report, folder):
    data = report.data
    assert (data.kind, data.name, data.classes, data.samples) == ("class folders", "scans", 10, 120)
    assert data.held_out + data.for_calibration == 120
    assert data.preprocessing == (
        "shorter side resized to 32 (bilinear), middle cut out, 32×32 grey, "
        f"(p/255 − {MEAN}) / {STD}"
    )
    assert report.calibration.startswith(f"16 of the {data.for_calibration} train samples of scans")
    for name in ("report.json", "report.md", "profile.toml"):
        assert str(folder.parent) not in (bundle / name).read_text("utf-8")
    said = (bundle / "report.md").read_text("utf-8")
    assert (
        f"data: scans, class folders: 120 samples, labels of 10 classes; {data.held_out} judged"
        in said
    )
    assert data.sha256 in said


def test_the_accuracy_is_that_of_the_held_out_images(report, folder, tiny_module):
    """Recomputed with nothing of the exporter's but the rule of the split."""
    pairs = []
    for path in sorted(folder.rglob("*.png")):
        image = Image.open(path)
        digest = hashlib.sha256(b"L 8 8 " + image.tobytes()).hexdigest()
        if int(digest, 16) < 1 << 255:  # the lower half of all digests
            large = image.resize((32, 32), Image.Resampling.BILINEAR)
            pairs.append((np.asarray(large), int(path.parent.name[-1])))
    inputs = torch.tensor(np.stack([pixels for pixels, _ in pairs]))[:, None].double()
    with torch.inference_mode():
        outputs = tiny_module.double()((inputs / 255 - MEAN) / STD)
    tiny_module.float()
    right = (outputs.argmax(dim=1) == torch.tensor([label for _, label in pairs])).sum()
    parity = report.pytorch[0]
    assert (parity.samples, parity.reference_correct) == (len(pairs), int(right))
    assert report.data.held_out == len(pairs)


def test_a_bundle_is_checked_again_on_the_same_data_and_no_other(
    bundle, report, folder, tiny_model, tmp_path
):
    again = check_bundle(bundle, model=tiny_model, data=folder)
    assert again.data == report.data
    assert again.artefacts[0].parity[0].samples == report.data.held_out
    with refused(InputRefused, "'scans', SHA-256", "the network's own samples", hint=("--data",)):
        check_bundle(bundle, model=tiny_model)
    fewer = scans(tmp_path / "scans", range(119))
    with refused(InputRefused, "of the 120 samples", "of the 119 samples", hint=("--data",)):
        check_bundle(bundle, model=tiny_model, data=fewer)


def test_a_bench_runs_on_the_data_that_a_bundle_was_judged_on_and_no_other(
    bundle, report, folder, tiny_model
):
    few = BenchAsked(batches=(1,), runs=4, loads=1)
    timed = partial(bench_bundles, [bundle], few, models=[tiny_model])
    found = timed(data=folder)
    assert found.samples == (report.pytorch[0].inputs,)
    assert {one.checked.samples for one in found.timed} == {report.data.held_out}
    assert {one.checked.accuracy for one in found.timed} == {"pass"}
    assert not any("--data" in doubt for doubt in found.doubts)
    without = timed()
    assert {one.checked.accuracy for one in without.timed} == {"not checked"}
    assert any("'scans' and runs on 360 held-out digits" in doubt for doubt in without.doubts)
    with refused(InputRefused, "'scans', SHA-256", "the network's own samples", hint=("--data",)):
        timed(data="digits")


def test_samples_that_are_made_anew_each_time_give_the_same_figures(
    bundle, report, folder, tiny_model, monkeypatch
):
    from exporter.data import lazy
    from exporter.worst_case import Search

    monkeypatch.setattr(lazy, "IN_MEMORY", 0)
    again = check_bundle(bundle, model=tiny_model, data=folder, search=Search(steps=1, radius=0.1))
    assert again.pytorch == report.pytorch
    assert [a.parity for a in again.artefacts] == [a.parity for a in report.artefacts]
    assert len(again.worst_cases) == len(report.artefacts)


def resolved(model, *, overrides=None, **request) -> Job:
    plain = {"weights": None, "input_shape": None, "calibration": None, "progress": silent}
    return Job.resolve(model, profile(**(overrides or {})), **{**plain, **request})


def test_only_samples_that_are_all_in_memory_must_fit_there(tiny_model, folder, monkeypatch):
    monkeypatch.setattr("exporter.environment.memory_bytes", lambda: 2_000_000)
    assert len(resolved(tiny_model, data=folder).held_out.inputs) > 1
    with refused(OutOfMemory, "samples of 1 × 32 × 32"):
        resolved(tiny_model)


def test_without_labels_accuracy_is_not_checked_and_the_other_gates_are(tiny_model, tmp_path):
    flat = scans(tmp_path / "heap", range(40), flat=True)
    only = profile().only(("fp32",))
    report = exporter.run(tiny_model, only, tmp_path / "out", data=flat)
    (artefact,) = report.artefacts
    assert report.data.classes is None
    assert artefact.parity[0].accuracy is None
    assert artefact.parity[0].tolerance.bounds() == {"rel_l2": 1e-3}
    assert not any("accuracy" in phrase for phrase in report.unproven)
    (doubt,) = [doubt for doubt in report.doubts if "labels" in doubt]
    assert doubt.startswith("accuracy is not checked, and no gate on it")
    assert report.profile["precision"]["fp32"]["tolerance"]["accuracy_drop"] == 0.05
    assert "no labels" in markdown.render(report)


def test_images_that_are_judged_on_are_not_calibrated_on(tiny_model, folder, tmp_path):
    other = scans(tmp_path / "other", range(119, 139))
    Image.open(next(folder.glob("*/119.png"))).save(
        next(other.glob("*/119.png")).with_suffix(".bmp")
    )
    request = {"data": folder, "calibration": other, "overrides": {"calibration.images": 21}}
    said = ("2 of the 21 calibration samples", "120 held-out samples of scans")
    with refused(InputRefused, *said, hint=("--allow-overlap",)):
        resolved(tiny_model, **request)
    job = resolved(tiny_model, **request, allow_overlap=True)
    assert len(job.overlap) == 2
    shutil.rmtree(other)
    clean = scans(other, range(120, 141))
    assert resolved(tiny_model, **{**request, "calibration": clean}).overlap == ()


def test_an_image_among_the_built_in_samples_is_found_by_its_input(tiny_model, tmp_path):
    inputs = digits((1, 32, 32), "held-out").inputs[:9]
    np.savez(tmp_path / "a.npz", inputs=inputs)
    request = {"calibration": tmp_path / "a.npz", "overrides": {"calibration.images": 9}}
    with refused(InputRefused, "9 of the 9 calibration samples", "360 held-out digits"):
        resolved(tiny_model, **request)


def test_calibration_data_on_another_scale_are_refused_whatever_they_come_in(tiny_model, tmp_path):
    far = digits((1, 32, 32), "train").inputs[:20] * np.float32(50)
    np.savez(tmp_path / "a.npz", inputs=far)
    with refused(InputRefused, "a.npz", "another scale"):
        resolved(tiny_model, calibration=tmp_path / "a.npz")


@pytest.mark.parametrize("extra", ["digit ten", "digit 0"])
def test_another_number_of_classes_than_outputs_is_refused(tiny_model, tmp_path, extra):
    where = scans(tmp_path / "scans", range(30))
    if (where / extra).exists():
        shutil.rmtree(where / extra)
    else:
        shutil.copytree(where / "digit 0", where / extra)
    count = 9 if extra == "digit 0" else 11
    with refused(InputRefused, f"scans: {count} class folders, and the network has 10 outputs"):
        resolved(tiny_model, data=where)


def test_a_network_of_the_package_is_judged_on_a_folder_from_the_command_line(folder, tmp_path):
    """The whole path of the words, up to the first thing that is wrong."""
    run = CliRunner().invoke(
        main,
        ["--data", str(folder), "--out", str(tmp_path / "out"), "--set", "preprocess.mean=0.5"],
    )
    assert run.exit_code == 2
    assert "preprocess" in run.output
    run = CliRunner().invoke(main, ["--data", str(folder), "--out", str(tmp_path / "out")])
    assert run.exit_code == 3
    assert "preprocess.mean and preprocess.std are missing" in run.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [[], ["parity"], ["tune"]])
def test_the_commands_that_judge_take_data(command):
    assert "--data" in CliRunner().invoke(main, [*command, "--help"]).output


def test_the_settings_of_the_data_are_read_back_from_the_profile(bundle):
    again = load_profile(bundle / "profile.toml")
    assert again.preprocess.resize == 32
    assert again.preprocess.mean == (MEAN,)
    assert again.data.workers == 2
    assert (
        json.loads((bundle / "report.json").read_bytes())["profile"]["preprocess"]["resize"] == 32
    )


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("preprocess.std", [0.0], "std must be above 0"),
        ("preprocess.mean", [], "mean must be finite numbers"),
        ("preprocess.resize", 0, "resize must be 1 or more"),
        ("preprocess.background", [256], "background must be one or three values of 0 to 255"),
        ("preprocess.orientation", "maybe", "'maybe' is not allowed"),
        ("data.held_out", 1.0, "held_out must lie between 0 and 1"),
        ("data.max_bad", 2.0, "max_bad is a share from 0 to 1"),
        ("data.max_pixels", 0, "max_pixels must be from 1"),
        ("data.seconds", 0.0, "seconds must be above 0"),
        ("data.workers", -1, "workers must be from 0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_its_key(key, value, said):
    from exporter.errors import ProfileError

    with refused(
        ProfileError, key.partition(".")[0], said, hint=None if "allowed" not in said else ()
    ):
        profile(**{key: value})


def test_a_mean_without_a_deviation_is_refused():
    from exporter.errors import ProfileError

    with refused(ProfileError, "mean and std belong together", hint=None):
        load_profile("cpu", {"preprocess.mean": [0.5]})


def test_a_search_validates_on_data_of_ones_own(tiny_model, folder):
    from exporter.tune import _validation

    job = resolved(tiny_model, data=folder)
    seen = _validation(job, 16)
    assert seen.origin.startswith(
        f"16 of the {job.data.record.for_calibration} train samples of scans"
    )
    taken = {x.tobytes() for x in job.calibration.inputs} | {
        x.tobytes() for x in job.held_out.inputs
    }
    assert not taken & {x.tobytes() for x in seen.inputs}
    assert TinyModel.input.shape == seen.inputs.shape[1:]
