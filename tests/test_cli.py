"""The command as a subprocess: what a person types, sees, and gets as an exit code."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from exporter.cli import main
from exporter.plugins import load_model, names
from exporter.runtimes._cuda import missing_gpu
from exporter.samples import digits

LITTLE = ["--set", "timing.runs=5", "--set", "calibration.images=32"]
QUICK = ["--input", "1x64x64", *LITTLE]
SMALL = ["--input", "1x32x32", *LITTLE]  # where nothing is read off but what is said


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "exporter", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """The built-in weights, trained at 224, shifted to give two classes at 64, not one alone."""
    model = load_model("resnet18")
    state, module = load_file(model.weights), model.module()
    module.load_state_dict(state)
    held_out = torch.from_numpy(digits((1, 64, 64), "held-out").inputs)
    with torch.inference_mode():
        outputs = torch.cat([module(part) for part in held_out.split(60)])
    first, second = outputs.mean(dim=0).topk(2).indices
    lead = (outputs[:, first] - outputs[:, second]).sort().values
    widest = lead.diff().argmax()
    state["block6.2.bias"][second] += lead[widest : widest + 2].mean()
    path = tmp_path_factory.mktemp("weights") / "shifted.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory, weights) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The main job, end to end on the real digits, at a reduced size."""
    folder = tmp_path_factory.mktemp("cli")
    return command(*QUICK, "--weights", str(weights), cwd=folder), folder


def test_the_main_job_ends_well_and_says_where_the_report_lies(exported):
    done, folder = exported
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("pass: build/report.md")
    assert "in doubt: the network itself labels only" in done.stdout  # trained at 224, not at 64
    assert (folder / "build/report.md").is_file()
    assert "Traceback" not in done.stderr


def test_the_table_has_each_artefact_with_size_verdict_and_latency(exported):
    done, _ = exported
    for precision in ("fp32", "fp16", "int8"):
        line = next(x for x in done.stdout.splitlines() if x.startswith(f"{precision} on ort-cpu "))
        assert re.search(
            r"[\d.]+ MB +pass +pass +[\d.]+ dB +[\d.]+% +[\d.]+% +[\d.]+ ms +[\d.]+ ×", line
        ), line
    assert "17 of 17 BatchNorms folded" in done.stdout
    assert "block1.2: Conv → ReLU → BatchNorm" in done.stdout


def test_what_a_runtime_does_otherwise_than_the_file_reads_is_on_the_terminal(exported):
    done, _ = exported
    assert re.search(
        r"int8 on ort-cpu: \d of 20 convolutions ran in INT8 \(by the profile of a run\)",
        done.stdout,
    )
    assert "fp16 on ort-cpu: 0 of 21 layers ran in FP16 (by the profile of a run)" in done.stdout


@pytest.mark.skipif(missing_gpu() is None, reason="the README's output is of a machine without GPU")
def test_the_readme_shows_what_the_command_prints(exported):
    """Figures differ from run to run and from size to size; every word must not."""
    done, _ = exported

    def words(text: str) -> set[str]:
        lines = (line for line in text.splitlines() if line and "in doubt" not in line)
        return {re.sub(r"[\d.]+|\s+|[┐]", " ", line).strip() for line in lines}

    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")
    shown = readme.partition("<!-- output -->\n```\n")[2].partition("```\n<!-- /output -->")[0]
    said = {re.sub(" +", " ", line) for line in words(done.stdout)}
    missing = {re.sub(" +", " ", line) for line in words(shown)} - said
    assert len(shown) > 500
    assert not missing


def test_progress_goes_to_stderr_and_the_result_to_stdout(exported):
    done, _ = exported
    told = re.compile(r"^ *[\d.]+ s  run PyTorch in float64$", re.MULTILINE)
    assert told.search(done.stderr)
    assert not told.search(done.stdout)


def test_where_the_time_went_is_on_the_terminal(exported):
    done, _ = exported
    assert re.search(r"^stage +for +time +share +peak memory$", done.stdout, re.MULTILINE)
    assert re.search(r"run PyTorch in float64 +evidence +[\d.]+ s +[\d.]+% +[\d,]+ MB", done.stdout)
    assert re.search(r"[\d.]+ s in all: conversion [\d.]+ s, engines [\d.]+ s, ", done.stdout)


def test_the_report_counts_what_the_document_counts(exported):
    _, folder = exported
    report = json.loads((folder / "build/report.json").read_text("utf-8"))
    assert report["schema"] == 2
    assert report["source"]["parameters"] == 11_178_378
    costs = {v["precision"]: v["cost"] for v in report["variants"]}
    assert {cost["macs"] for cost in costs.values()} == {90_668_288}
    assert all(cost["uncounted"] == {} for cost in costs.values())
    assert costs["fp32"]["weight_bytes"] > 1.9 * costs["fp16"]["weight_bytes"]
    assert costs["fp16"]["weight_bytes"] > 1.9 * costs["int8"]["weight_bytes"]


def test_it_can_be_run_again_over_its_own_bundle(exported, weights):
    _, folder = exported
    done = command(*QUICK, "--weights", str(weights), "--precision", "fp16", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (folder / "build").glob("*.onnx")] == ["resnet18.fp16.onnx"]


def test_help_answers_at_once(tmp_path):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert command("--help", cwd=tmp_path).returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_doctor_names_every_runtime_and_claims_nothing(monkeypatch):
    monkeypatch.setattr("torch.compile", lambda module, **options: module)
    said = CliRunner().invoke(main, ["doctor"])
    assert said.exit_code == 0
    for name in names("runtimes"):
        assert len(re.findall(rf"^{name} ", said.output, re.MULTILINE)) == 1
    assert re.search(
        r"^ort-cpu +version \S+, on CPU\n  build  ready\n  run    ready$", said.output, re.MULTILINE
    )


def test_doctor_says_it_all_as_json_too():
    said = CliRunner().invoke(main, ["doctor", "ort-cpu", "--json"])
    assert said.exit_code == 0
    (found,) = json.loads(said.stdout)["runtimes"]
    assert (found["runtime"], found["ready"], found["device"]) == ("ort-cpu", True, "CPU")


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        (
            "ort-cuda",
            4,
            "Error: the runtime 'ort-cuda' cannot run here: no NVIDIA GPU (no driver)\nHint: ",
        ),
        (
            "ort-gpu",
            2,
            "Error: no runtime named 'ort-gpu'\nHint: did you mean 'ort-cpu' or 'ort-cuda'?",
        ),
    ],
)
def test_doctor_fails_for_a_runtime_that_was_named_and_is_not_there(monkeypatch, name, code, said):
    monkeypatch.setattr(
        "exporter.runtimes.ort_cuda.missing_gpu", lambda: "no NVIDIA GPU (no driver)"
    )
    done = CliRunner().invoke(main, ["doctor", name])
    assert done.exit_code == code
    assert said in done.stderr


def test_a_missed_gate_names_artefact_figure_and_limit_and_exits_1(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gate = "precision.fp32.tolerance.sqnr_db=500"
    done = CliRunner().invoke(main, [*SMALL, "-p", "fp32", "--set", gate])
    assert done.exit_code == 1
    assert re.search(r"missed: fp32 on ort-cpu: sqnr_db \d+\.\d* < 500 on the 360", done.stdout)
    assert (tmp_path / "build/report.md").read_text("utf-8").startswith("# resnet18: FAIL")


def test_a_gate_that_the_samples_are_too_few_for_says_how_many_and_exits_1(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gate = "precision.fp32.tolerance.agreement=0.999"
    done = CliRunner().invoke(main, [*SMALL, "-p", "fp32", "--set", gate])
    assert done.exit_code == 1
    assert (
        "not enough evidence: fp32 on ort-cpu: 360 of 360 agree on the 360 held-out digits, which "
        "proves 99.17%; 99.9% would need 2,995 samples without a disagreement"
    ) in done.stdout
    assert done.stdout.rstrip().endswith("not enough evidence: build/report.md")


# ── Bad input: one sentence, the documented exit code, nothing left behind ──────────


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Files that something is wrong with."""
    folder = tmp_path_factory.mktemp("files")
    good = load_model("resnet18").weights
    state = load_file(good)
    (folder / "truncated.safetensors").write_bytes(good.read_bytes()[:100_000])
    (folder / "text.safetensors").write_text("hello", "utf-8")
    save_file({f"backbone.{k}": v for k, v in state.items()}, folder / "other.safetensors")
    bad = {**state, "block2.0.conv1.bias": state["block2.0.conv1.bias"] * float("nan")}
    save_file(bad, folder / "nan.safetensors")
    np.save(folder / "empty.npy", np.zeros((0, 1, 64, 64), np.float32))
    np.save(folder / "constant.npy", np.ones((8, 1, 64, 64), np.float32))
    np.save(folder / "shape.npy", np.ones((8, 3, 64, 64), np.float32))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (folder / "bad.toml").write_text('about = "x"\n[timing]\nwarm_up = 3\n', "utf-8")
    (folder / "broken.toml").write_text("about = ", "utf-8")
    (folder / "gpu.toml").write_text(
        'about = "x"\n[runtime.tensorrt]\n[precision.fp32]\ntolerance = { sqnr_db = 60 }\n', "utf-8"
    )
    (folder / "a-file").write_text("", "utf-8")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 1, 64, 64)).astype(np.float32)
    np.save(folder / "few.npy", pixels[:7] / 255)
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "held-out.npy", digits((1, 64, 64), "held-out").inputs[:16])
    (folder / "full").mkdir()
    (folder / "full/thesis.tex").write_text("years of work", "utf-8")
    return folder


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ("--model resnet81", 2, "no model named 'resnet81'\nHint: did you mean 'resnet18', "),
        ("--model resnet50", 3, "resnet50 ships without weights, and there is nothing to export without\nHint: name a file of weights with --weights; --weights random takes untrained ones"),
        ("--model {files}/none.py:make", 3, "none.py: no such file"),
        ("--weights factory", 3, "resnet18 is built in, so that no factory made weights"),
        ("--classes 5", 3, "resnet18 has 10 outputs, and cannot have 5"),
        ("--set model.factory=net.py:make", 2, "never which or by what code, found 'factory'\nHint: name the network on the command line"),
        ("--set model.args.depth=5", 2, "resnet18: model.args: unknown key 'depth'"),
        ("-p int4", 2, "no table [precision.int4], so nothing says what is good enough for it\nHint: did you mean 'int8'?"),
        ("--profile defualt", 2, "no profile named 'defualt'\nHint: did you mean 'default'?"),
        ("--profile {files}/none.toml", 2, "none.toml: no such file"),
        ("--profile {files}/bad.toml", 2, "bad.toml: timing: unknown key 'warm_up'\nHint: did you mean 'warmup'?"),
        ("--profile {files}/broken.toml", 2, "broken.toml: not valid TOML"),
        ("--target sm90", 2, "no target named 'sm90'"),
        ("--target sm98", 2, "did you mean 'sm89'"),
        ("--batch 4,2,8", 2, "need 1 <= min <= opt <= max, found 4, 2, 8"),
        ("--batch 0,1,2", 2, "need 1 <= min <= opt <= max, found 0, 1, 2"),
        ("--batch 1,2", 2, "--batch 1,2: expected MIN,OPT,MAX"),
        ("--set timing.runs=many", 2, "timing.runs: expected int, got str, found 'many'"),
        ("--set timing.run=5", 2, "unknown key 'run'\nHint: did you mean 'runs'?"),
        ("--set runs", 2, "--set runs: expected KEY=VALUE"),
        ("--set batch.max=64 --set timing.batches=[128]", 2, "timing.batches must lie in batch (1 to 64), found 128"),
        ("--input 224", 2, "'224' is not a shape such as 1x224x224"),
        ("--input ²x64x64", 2, "'²x64x64' is not a shape such as 1x224x224"),
        ("--input 1x100000x100000", 5, "1 × 100000 × 100000 are"),
        ("--set parity.random=1000000 --input 1x2048x2048", 5, "more than this machine's"),
        ("--set parity.seed=9999999999", 2, "seed must be from 0 to 4294967295, found 9999999999"),
        ("--set timing.pytorch_threads=100000", 2, "pytorch_threads must be from 0 to 256"),
        ("--set runtime.ort-cpu.threads=100000", 2, "threads must be from 0 to 256"),
        ("--set precision.int8.options.calibrator=kl", 2, "precision.int8.options: calibrator: 'kl' is not allowed\nHint: "),
        ("--set timing=5", 2, "timing: expected table, got int, found 5"),
        ("-p ,", 2, "no precision was chosen"),
        ("--batch ²,1,1", 2, "--batch ²,1,1: expected MIN,OPT,MAX"),
        ("--batch=", 2, "expected MIN,OPT,MAX"),
        ("--input 3x64x64", 3, "resnet18 cannot take an input of 3 × 64 × 64"),
        ("--input 1x0x64", 3, "every size must be 1 or more"),
        ("--weights {files}/none.safetensors", 3, "none.safetensors: no such weights file"),
        ("--weights {files}", 3, "not a file, so it holds no weights"),
        ("--weights {files}/other.safetensors --weights-key ema", 3, "no weights in it have the key 'ema', only '.'"),
        ("--weights-key ema", 2, "--weights-key is of the weights in a file: name that with --weights"),
        ("--weights random --weights-key ema", 2, "--weights-key is of the weights in a file"),
        ("--onnx {files}/none.onnx --weights-key ema", 2, "network and its weights in one: leave out --weights-key"),
        ("--weights {files}/truncated.safetensors", 3, "truncated.safetensors: a safetensors file that is"),
        ("--weights {files}/text.safetensors", 3, "text.safetensors: a text file"),
        ("--weights {files}/other.safetensors", 3, "not this network's weights: it lacks 'block1.0.weight', 'block1.0.bias',"),
        ("--weights {files}/nan.safetensors", 3, "tensor 'block2.0.conv1.bias' holds 64 values that are NaN or infinite"),
        ("--calibration {files}/none.npy", 3, "none.npy: no such file"),
        ("--calibration {files}/empty.npy", 3, "calibration data is empty"),
        ("--calibration {files}/constant.npy", 3, "calibration data is constant"),
        ("--calibration {files}/shape.npy", 3, "calibration data must be (N, 1, 64, 64) float32, found (8, 3, 64, 64)"),
        ("--calibration {files}/few.npy", 3, "calibration data has 7 samples, and needs 8 that differ"),
        ("--calibration {files}/pixels.npy", 3, "calibration data is on another scale than the network's training samples"),
        ("--calibration {files}/held-out.npy", 3, "16 of the 16 calibration samples are among the 360 held-out digits"),
        ("--set calibration.images=7", 2, "images must be from 8 to 1000000, found 7"),
        ("--calibration {files}/objects.npy", 3, "objects.npy: not a readable .npy array"),
        ("--profile {files}/gpu.toml", 4, "the runtime 'tensorrt' cannot be used here"),
        ("--target current", 4, "the runtime 'tensorrt-rtx' cannot be used here: no NVIDIA GPU"),
        ("--out {files}/a-file", 5, "a-file is a file, where the bundle's folder would go"),
        ("--out {files}/a-file/below", 5, "cannot write"),
        ("--out .", 5, "is the current folder or holds it"),
        ("--out /", 5, "is the current folder or holds it"),
        ("--out " + "x" * 300, 5, "File name too long"),
        ("--out {files}/full", 5, "full holds files that are not of a bundle, say 'thesis.tex'"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence_the_exit_code_and_leaves_nothing(
    files, tmp_path, args, code, said
):
    before = sorted(files.rglob("*"))
    if "--input" not in args:
        args = f"--input 1x64x64 {args}"
    arguments = [arg.replace("{files}", str(files)) for arg in args.split()]
    if "--out" not in args:
        arguments += ["--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == code, done.output
    assert said in done.output
    message = done.stderr[done.stderr.index("Error: ") :].strip().splitlines()
    assert len(message) == 1 or (len(message) == 2 and message[1].startswith("Hint: "))
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ("--set precision.int8.options.keep=[\"block1\"] -p int8", 2, "no layer to keep named 'block1'\nHint: did you mean 'block1.0'"),
    ],
)  # fmt: skip
def test_where_nothing_can_be_made_there_is_no_bundle_and_no_folder_for_it(
    files, tmp_path, monkeypatch, args, code, said
):
    monkeypatch.chdir(tmp_path)
    arguments = [arg.replace("{files}", str(files)) for arg in args.split()]
    done = CliRunner().invoke(main, [*SMALL, *arguments, "--out", "new/sub/out"])
    assert done.exit_code == code, done.output
    assert said in done.output
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback_and_nothing_else_does(files):
    bad = ["--profile", str(files / "bad.toml")]
    assert "Traceback" in CliRunner().invoke(main, ["--debug", *bad]).output
    assert "Traceback" not in CliRunner().invoke(main, bad).output


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_leaves_nothing(tmp_path, signum):
    process = subprocess.Popen(
        [sys.executable, "-m", "exporter", *QUICK, "--out", "new/sub/build"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "float64" in line:
            break
    process.send_signal(signum)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "Traceback" not in rest
    assert "Interrupted: nothing was left behind." in rest
    assert list(tmp_path.iterdir()) == []
