"""A bundle checked once more: as made, and with files changed, damaged, gone or another's."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from conftest import HASTE, TinyModel, refused
from safetensors.torch import load_file, save_file

import exporter
from exporter import recheck
from exporter.cli import main
from exporter.errors import GraphError, InputRefused, ProfileError
from exporter.profile import load_profile
from exporter.recheck import check_bundle
from exporter.renderers import record, waterfall
from exporter.runtimes.ort_cpu import OrtCpu
from exporter.runtimes.tensorrt_rtx import TensorRtRtx
from exporter.samples import digits

IMAGES = digits((1, 32, 32), "train").inputs[:32]
ONNX = [f"tinymodel.{precision}.onnx" for precision in ("fp32", "fp16", "int8")]
RAN = ["fp32 on ort-cpu", "fp16 on ort-cpu", "int8 on ort-cpu"]
FREE = {"sqnr_db": 5.0}
QUICK = {
    **HASTE,
    "runtime.tensorrt-rtx.targets": ["sm86"],
}


@pytest.fixture(scope="module")
def weights(tiny_module, tmp_path_factory) -> Path:
    """The tiny network's, with logits around zero, so that it tells the digits apart."""
    state = {key: value.clone() for key, value in tiny_module.float().state_dict().items()}
    with torch.inference_mode():
        state["block4.2.bias"] -= tiny_module(torch.from_numpy(IMAGES)).mean(dim=0)
    path = tmp_path_factory.mktemp("recheck") / "centred.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def bundle(tiny_model, weights) -> Path:
    profile = load_profile(
        "default",
        {
            **QUICK,
            **{
                f"precision.{name}.{key}": FREE
                for name in ("fp32", "fp16", "int8")
                for key in ("tolerance", "random_tolerance")
            },
        },
    )
    out = weights.parent / "bundle"
    exporter.run(tiny_model, profile, out, weights=weights, calibration=IMAGES)
    return out


@pytest.fixture(scope="module")
def honest(bundle, tiny_model, weights):
    """The bundle checked as it is, and what of that check does not depend on its files."""
    kept = {}
    export, compute = recheck.export_source, recheck.Truth.compute

    def exported(job, folded, path):
        kept["made"] = export(job, folded, path)
        kept["graph"] = path.read_bytes()
        return kept["made"]

    def computed(job, folded):
        kept["truth"] = compute(job, folded)
        return kept["truth"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recheck, "export_source", exported)
        patch.setattr(recheck.Truth, "compute", computed)
        before = digests(bundle)
        report = check_bundle(bundle, model=tiny_model, weights=weights, calibration=IMAGES)
        assert digests(bundle) == before
    return report, kept


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    return shutil.copytree(bundle, tmp_path / "bundle")


@pytest.fixture
def check(honest, tiny_model, weights, monkeypatch):
    """Check a folder; the network itself was exported and run once. Nothing may be written."""
    _, kept = honest

    def exported(job, folded, path):
        path.write_bytes(kept["graph"])
        return kept["made"]._replace(path=path)

    monkeypatch.setattr(recheck, "export_source", exported)
    monkeypatch.setattr(recheck.Truth, "compute", lambda job, folded: kept["truth"])

    def checked(folder: Path, **more) -> exporter.Report:
        before = digests(folder)
        options = {"model": tiny_model, "weights": weights, "calibration": IMAGES, **more}
        try:
            return check_bundle(folder, **options)
        finally:
            assert digests(folder) == before

    return checked


def digests(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


def change(path: Path, name: str, by) -> None:
    model = onnx.load(path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    value = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(by(value.copy()).astype(value.dtype), name))
    onnx.save(model, path)


def edit(path: Path, by) -> None:
    table = json.loads(path.read_text("utf-8"))
    by(table)
    path.write_text(json.dumps(table), "utf-8")


def artefacts(report: exporter.Report) -> dict[str, exporter.Artefact]:
    return {artefact.name: artefact for artefact in report.artefacts}


# ── As it was made ──────────────────────────────────────────────────────────────────


def test_a_bundle_as_it_was_made_passes_and_nothing_is_written(honest):
    report, _ = honest
    assert report.verdict == "pass"
    assert report.failures == report.doubts == report.latency == ()
    found = artefacts(report)
    for name in RAN:
        assert found[name].rung.fidelity.verdict == "pass"
        assert found[name].rung.fidelity.layers > 15
        assert found[name].verdict == "pass"
    assert [rung.name for rung in report.ladder][:2] == ["PyTorch float32", "folded"]


def test_what_is_measured_again_is_what_the_export_measured(honest, bundle):
    report, _ = honest
    before = artefacts(record.parse((bundle / "report.json").read_bytes()))
    for name in RAN:
        old, new = before[name].parity[0], artefacts(report)[name].parity[0]
        assert new.rel_l2 == pytest.approx(old.rel_l2, rel=0.2)
        assert (new.samples, new.classes) == (old.samples, old.classes)
        old, new = before[name].rung, artefacts(report)[name].rung
        assert (new.above, new.samples) == (old.above, old.samples)
        assert old.fidelity.verdict == new.fidelity.verdict


def test_an_engine_that_cannot_run_here_is_not_checked(honest):
    if not TensorRtRtx().missing("run"):
        pytest.skip("this machine can run it")
    for artefact in honest[0].artefacts:
        if artefact.runtime == "tensorrt-rtx":
            assert (artefact.verdict, artefact.rung, artefact.parity) == ("not checked", None, ())
            assert artefact.not_run


# ── One thing wrong in each file ────────────────────────────────────────────────────


def test_each_file_is_held_against_its_own_graph_and_the_cause_is_said(check, copied):
    def scaled(value):
        value[3] *= 1.001
        return value

    change(copied / ONNX[0], "block2.0.conv1.weight", scaled)
    model = onnx.load(copied / ONNX[1])
    del next(node for node in model.graph.node if node.name == "block3.0.conv1").input[2]
    onnx.save(model, copied / ONNX[1])
    change(copied / ONNX[2], "relu_1_scale", lambda scale: scale * np.float32(1.01))
    report = check(copied)
    assert report.verdict == "fail"
    wrong = {
        "fp32 on ort-cpu": ("block2.0.conv1", "in channel 3 of 8 channels"),
        "fp16 on ort-cpu": ("block3.0.conv1", "reads 2 tensors where 3 were asked for"),
        "int8 on ort-cpu": ("block2.0.conv2", "has another 'relu_1_scale'"),
    }
    for name, (layer, cause) in wrong.items():
        artefact = artefacts(report)[name]
        assert artefact.verdict == artefact.rung.fidelity.verdict == "fail"
        assert artefact.rung.fidelity.first.layer == layer
        assert cause in artefact.rung.fidelity.cause
    said = [f"{name} is not the file that the manifest lists" for name in sorted(ONNX)]
    assert sorted(report.doubts) == said


def test_a_file_that_reads_otherwise_and_computes_the_same_passes_in_doubt(check, copied):
    model = onnx.load(copied / ONNX[0])
    model.producer_name = "someone else"
    onnx.save(model, copied / ONNX[0])
    report = check(copied)
    assert report.verdict == "pass"
    assert report.doubts == (f"{ONNX[0]} is not the file that the manifest lists",)


def other_input(path: Path) -> None:
    model = onnx.load(path)
    model.graph.input[0].name = "image"
    for node in model.graph.node:
        node.input[:] = ["image" if name == "input" else name for name in node.input]
    onnx.save(model, path)


def other_channels(path: Path) -> None:
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    onnx.save(model, path)


def other_type(path: Path) -> None:
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    onnx.save(model, path)


def cannot_run(path: Path) -> None:
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.name == "block3.0.conv3")
    next(a for a in node.attribute if a.name == "strides").ints[:] = [1, 1]
    onnx.save(model, path)


DAMAGE = [
    (lambda path: path.write_bytes(path.read_bytes()[:5000]), "truncated, damaged or not an ONNX"),
    (lambda path: path.write_bytes(b""), "an empty file"),
    (lambda path: path.write_text("hello"), "truncated, damaged or not an ONNX model"),
    (lambda path: path.unlink(), "the bundle lacks this file"),
    (other_input, "takes 'image' N×1×32×32 float32, and the reference takes 'input'"),
    (other_channels, "takes 'input' N×3×32×32 float32, and the reference takes 'input' N×1×32×32"),
    (other_type, "takes 'input' N×1×32×32 float64, and the reference takes 'input'"),
    (cannot_run, "ONNX Runtime cannot run it ("),
]


@pytest.mark.parametrize("damages", [DAMAGE[:3], DAMAGE[3:6], DAMAGE[6:]])
def test_a_file_that_is_damaged_gone_or_anothers_fails_alone_and_says_why(check, copied, damages):
    for name, (damage, _) in zip(ONNX, damages, strict=False):
        damage(copied / name)
    report = check(copied)
    assert report.verdict == "fail"
    for name, file, damage in zip(RAN, ONNX, [*damages, None, None], strict=False):
        artefact = artefacts(report)[name]
        if damage is None:
            assert artefact.verdict == "pass"
            continue
        assert (artefact.verdict, artefact.rung, artefact.parity) == ("fail", None, ())
        assert damage[1] in artefact.refused
        assert "\n" not in artefact.refused
        assert f"{file} is not the file that the manifest lists" in report.doubts


class Opened(AssertionError):
    """An engine was loaded."""


def engine(folder: Path) -> Path:
    return next(
        path
        for path in sorted(folder.iterdir())
        if ".fp32." in path.name and path.suffix != ".onnx"
    )


@pytest.fixture
def able(monkeypatch):
    """Let the runtime say that it can run here, and tell when an engine is loaded."""

    def opened(self, path):
        raise Opened

    monkeypatch.setattr(TensorRtRtx, "missing", lambda self, action: None)
    monkeypatch.setattr(TensorRtRtx, "open", opened)


def test_an_engine_that_is_what_it_was_is_loaded(check, copied, able):
    with pytest.raises(Opened):
        check(copied)


def only_fp32(table) -> None:
    table["variants"] = [v for v in table["variants"] if v["precision"] == "fp32"]


@pytest.mark.parametrize("runs", [True, False])
def test_an_engine_with_one_byte_changed_is_never_loaded(check, copied, monkeypatch, runs):
    def opened(self, path):
        raise Opened

    monkeypatch.setattr(TensorRtRtx, "missing", lambda self, _: None if runs else "no GPU")
    monkeypatch.setattr(TensorRtRtx, "open", opened)
    path = engine(copied)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    edit(copied / "report.json", only_fp32)
    report = check(copied)
    found = artefacts(report)["fp32 on tensorrt-rtx"]
    assert (report.verdict, found.verdict) == ("fail", "fail")
    assert found.refused == (
        f"{path.name} is not the file that the manifest lists, and an engine is a program, so it "
        "is not loaded"
    )
    assert artefacts(report)["fp32 on ort-cpu"].verdict == "pass"


def test_an_engine_that_the_manifest_does_not_list_is_never_loaded(check, copied, able):
    edit(copied / "report.json", only_fp32)
    foreign = copied / "foreign.engine"
    engine(copied).rename(foreign)

    def named(table) -> None:
        for artefact in table["variants"][0]["artefacts"]:
            if artefact["runtime"] == "tensorrt-rtx":
                artefact["file"]["name"] = foreign.name

    edit(copied / "report.json", named)
    found = artefacts(check(copied))["fp32 on tensorrt-rtx"]
    assert "is not the file that the manifest lists" in found.refused


# ── What cannot be checked at all ───────────────────────────────────────────────────


NO_REPORT = "bundle/report.json: not a report of this tool"


def newer(folder: Path) -> None:
    edit(folder / "report.json", lambda table: table.update(schema=99))


def without_precision(folder: Path) -> None:
    text = (folder / "profile.toml").read_text("utf-8")
    (folder / "profile.toml").write_text(
        re.sub(r"\[precision\.fp16.*?(?=\n\[precision\.int8|\Z)", "", text, flags=re.DOTALL),
        "utf-8",
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "report.json").write_text("hello"), NO_REPORT),
        (lambda f: (f / "report.json").write_bytes(b"\xff\xfe"), NO_REPORT),
        (lambda f: (f / "report.json").write_text("{}"), NO_REPORT),
        (newer, "bundle/report.json: a report of schema 99"),
        (lambda f: (f / "report.json").unlink(), "bundle/report.json: No such file"),
        (lambda f: (f / "manifest.json").unlink(), "is not a bundle"),
        (lambda f: (f / "manifest.json").write_text("{"), "is not a bundle"),
        (lambda f: shutil.rmtree(f), "is not a bundle"),
        (without_precision, "the bundle's report has 'fp16', and its profile lacks it"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_bundle_is_refused(check, copied, spoil, said):
    spoil(copied)
    with refused(InputRefused, said, hint=("--out",) if said == "is not a bundle" else None):
        check(copied)


def test_a_file_is_no_bundle_either(check, copied):
    with refused(InputRefused, "is not a bundle", hint=("--out",)):
        check(copied / "report.json")


def test_a_bundle_without_its_profile_is_refused(check, copied):
    (copied / "profile.toml").unlink()
    with refused(ProfileError, "profile.toml: no such file"):
        check(copied)


def test_other_weights_than_the_bundle_was_made_from_are_refused(check, copied):
    with refused(
        InputRefused,
        "the bundle was made from weights 'centred.safetensors' of SHA-256 ",
        "'tiny.safetensors' has ",
        hint=("--weights",),
    ):
        check(copied, weights=None)


def test_a_bundle_of_averaged_weights_says_which_and_is_checked_against_those_alone(
    tiny_model, tiny_module, weights, tmp_path
):
    trained, averaged = tiny_module.float().state_dict(), load_file(weights)
    file = tmp_path / "last.pth"
    torch.save({"epoch": 9, "state_dict": trained, "state_dict_ema": averaged}, file)
    profile = load_profile("cpu", HASTE).only(("fp32",))
    out = tmp_path / "out"
    with refused(InputRefused, "are in it 2 times", hint=("--weights-key, 'state_dict' or ",)):
        exporter.run(tiny_model, profile, out, weights=file)
    asked = exporter.WeightsFile(file, "state_dict_ema")
    source = exporter.run(tiny_model, profile, out, weights=asked).source
    assert source.weights_key == "state_dict_ema"
    said = "'state_dict_ema' was asked for, and not 'state_dict', which would fit as well"
    assert source.weights_changes[0] == said
    said = said.replace("_", r"\_")
    assert f"- weights: {said}\n" in (out / "report.md").read_text("utf-8")
    graph = onnx.load(out / "tinymodel.fp32.onnx").graph
    held = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    (bias,) = (value for value in held.values() if value.shape == (10,))
    assert np.array_equal(bias, averaged["block4.2.bias"].numpy())
    assert not np.array_equal(bias, trained["block4.2.bias"].numpy())
    assert check_bundle(out, model=tiny_model, weights=asked).rungs[1].fidelity.verdict == "pass"
    with refused(
        InputRefused,
        "from the weights by the key 'state_dict_ema', and this would be from 'state_dict'",
        hint=("give --weights-key 'state_dict_ema'",),
    ):
        check_bundle(out, model=tiny_model, weights=asked._replace(key="state_dict"))


@pytest.mark.parametrize("other", [None, IMAGES * np.float32(0.5), IMAGES[::-1]])
def test_other_calibration_data_than_the_bundle_was_made_with_is_refused(check, copied, other):
    with refused(
        InputRefused,
        "the bundle was calibrated on 32 samples of the given array, SHA-256 ",
        "and this would be on ",
        hint=("give the same file with --calibration",),
    ):
        check(copied, calibration=other)


def test_calibration_data_for_a_bundle_that_had_none_is_refused(check, copied):
    edit(copied / "report.json", lambda table: table.update(calibration=None))
    with refused(
        InputRefused, "the bundle was calibrated on nothing", hint=("leave out --calibration",)
    ):
        check(copied)


def test_a_precision_that_can_no_longer_be_made_shows_no_old_figures(check, copied, monkeypatch):
    from exporter.precisions.fp16 import Fp16

    def fail(self, model, statistics, samples, *, progress):
        raise GraphError("no half today")

    monkeypatch.setattr(Fp16, "convert", fail)
    report = check(copied)
    (variant,) = [v for v in report.variants if v.precision == "fp16"]
    assert (variant.refused, variant.artefacts, variant.losses) == ("no half today", (), ())
    assert report.verdict == "fail"
    assert artefacts(report)["fp32 on ort-cpu"].verdict == "pass"


def test_a_runtime_that_is_not_here_is_not_checked(check, copied, monkeypatch):
    monkeypatch.setattr(OrtCpu, "missing", lambda self, action: "no such package")
    report = check(copied)
    assert report.verdict == "not checked"
    for name in RAN:
        found = artefacts(report)[name]
        assert (found.verdict, found.not_run, found.parity) == (
            "not checked",
            "no such package",
            (),
        )


# ── The command ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def command(check, weights, monkeypatch, tmp_path):
    """``resnet-export parity``, with the tiny network among the built-in ones."""
    monkeypatch.setattr("exporter.network.load_model", lambda name, **_: TinyModel())
    np.save(tmp_path / "mine.npy", IMAGES)

    def run(folder: Path, *more: str):
        edit(folder / "report.json", lambda table: table.update(calibration=as_a_file(table)))
        before = digests(folder)
        arguments = ["parity", str(folder), "--weights", str(weights)]
        arguments += ["--calibration", str(tmp_path / "mine.npy"), *more]
        done = CliRunner().invoke(main, arguments)
        assert digests(folder) == before
        assert "Traceback" not in done.output
        return done

    return run


def as_a_file(table) -> str:
    return table["calibration"].replace("the given array", "mine.npy")


def test_the_waterfall_has_a_line_for_each_rung_and_exits_0(command, copied):
    done = command(copied)
    assert done.exit_code == 0, done.output
    rows = {line[:22].strip(): line for line in done.stdout.splitlines()}
    for rung in ("PyTorch float64", "PyTorch float32", "folded", *RAN):
        assert rung in rows
    for name in RAN:
        assert re.search(r"dB +█+ .* dB .*\(at most 4\) +all \d+, worst [\d.]+ +pass", rows[name])
    if TensorRtRtx().missing("run"):
        assert "not checked" in rows["fp32 on tensorrt-rtx"]
    assert "in doubt: report.json is not the file that the manifest lists" in done.stdout
    assert done.stdout.rstrip().endswith("pass")
    assert "fp32: emulate the graph asked for" in done.stderr


def test_a_failure_is_told_with_layer_and_cause_and_exits_1(command, copied):
    change(copied / ONNX[0], "block3.0.conv1.weight", lambda value: value * 1.01)
    (copied / ONNX[1]).unlink()
    done = command(copied)
    assert done.exit_code == 1, done.output
    rows = {line[:22].strip(): line for line in done.stdout.splitlines()}
    assert re.search(r"not block3\.0\.conv1 +FAIL", rows["fp32 on ort-cpu"])
    assert "FAIL" in rows["fp16 on ort-cpu"]
    for said in (
        "fp32 on ort-cpu: it leaves the graph at block3.0.conv1 (Conv), off by ",
        "'block3.0.conv1' has another 'block3.0.conv1.weight' than was asked for",
        f"fp16 on ort-cpu: {ONNX[1]}: the bundle lacks this file",
    ):
        assert said in done.stdout
    assert done.stdout.rstrip().endswith("fail")


def test_the_record_as_json_is_the_report(command, copied):
    done = command(copied, "--json")
    assert done.exit_code == 0
    table = json.loads(done.stdout)
    assert table["verdict"] == "pass"
    assert {a["name"] for v in table["variants"] for a in v["artefacts"]} >= set(RAN)
    assert record.render(record.parse(done.stdout)) == done.stdout


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        (lambda f: (f / "manifest.json").unlink(), 3, "no readable manifest.json\nHint: name "),
        (newer, 3, "bundle/report.json: a report of schema 99, where 2 can be read"),
        (lambda f: (f / "profile.toml").write_text("about = "), 2, "profile.toml: not valid TOML"),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_gets_one_sentence_and_its_exit_code(
    command, copied, spoil, code, said
):
    spoil(copied)
    done = command(copied)
    assert done.exit_code == code, done.output
    assert "Error: " in done.stderr
    assert said in done.stderr
    message = done.stderr[done.stderr.index("Error: ") :].strip().splitlines()
    assert len(message) == 1 or (len(message) == 2 and message[1].startswith("Hint: "))


def test_a_waterfall_is_drawn_of_a_report_in_which_nothing_ran(check, copied, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(OrtCpu, "missing", lambda self, action: "no such package")
    console = Console(width=180, record=True, file=io.StringIO())
    console.print(waterfall.render(check(copied)))
    said = console.export_text()
    assert "not checked: built, not run: no such package: fp32 on ort-cpu, fp16" in said
    assert said.rstrip().endswith("not checked")


def test_worst_inputs_are_kept_whatever_they_are_called(tmp_path):
    arrays = {"file": np.arange(6.0).reshape(2, 3), "self": np.ones((2, 1), np.uint8)}
    recheck._save_arrays(tmp_path / "worst.npz", arrays)
    with np.load(tmp_path / "worst.npz") as found:
        assert set(found) == set(arrays)
        for name, want in arrays.items():
            assert found[name].dtype == want.dtype
            assert np.array_equal(found[name], want)
