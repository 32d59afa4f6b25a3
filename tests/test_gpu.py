"""`make gpu` without a GPU: how steps end, what they write, and the page; no device ran any of it.

Steps that compute are given the CPU's runtimes under the GPU's names, so that every line of theirs
runs, on a small network; what a page says of a card is a made-up record's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from gpu import __main__ as command
from gpu import candidates, ceilings, engines, graphs, latency, marked, page, parity, roof, steps
from gpu.steps import Here, Outcome, Skip, Step, in_process, run_steps
from test_on_device import Nvml

import exporter
from exporter.errors import BuildError
from exporter.flops import count_flops
from exporter.plugins import load_runtime
from exporter.records import BatchRange, TensorSpec
from exporter.runtimes import _cuda
from exporter.runtimes._device import COPIES
from exporter.runtimes._nvml import Sensors

ROOT = Path(__file__).parents[1]


# ── How steps end ───────────────────────────────────────────────────────────────────


def plan(*names, needs=(), seconds=10.0):
    return [Step(name, "", "", seconds, needs=needs) for name in names]


def ended(step, budget):
    return Outcome(step.name, step.about, "done", None, budget)


def test_without_a_gpu_every_step_is_skipped_by_name_with_the_reason():
    found = run_steps(plan("a", "b"), None, seconds=60, lacking="no NVIDIA GPU")
    assert [str(one) for one in found] == ["a: skipped: no NVIDIA GPU", "b: skipped: no NVIDIA GPU"]


def test_a_step_that_needs_another_is_skipped_unless_that_is_done():
    def run(step, budget):
        return Outcome(step.name, "", "failed" if step.name == "a" else "done", "it broke")

    found = run_steps([*plan("a", "b"), *plan("c", needs=("a",))], run, seconds=60)
    assert [one.state for one in found] == ["failed", "done", "skipped"]
    assert found[2].reason == "it needs 'a', which was failed"


def test_no_step_gets_more_than_is_left_and_none_is_begun_when_time_is_over():
    now = [0.0]

    def run(step, budget):
        now[0] += budget
        return ended(step, budget)

    found = run_steps(plan("a", "b", "c", "d"), run, seconds=27, clock=lambda: now[0])
    assert [one.seconds for one in found] == [10, 10, 7, 0]
    assert found[3].reason == "the 27 s that all steps may take are over"


STEPS = """
import os, signal, time
from gpu.steps import Skip

def answer(here):
    return {"argument": here.argument, "setting": here.settings["pixels"]}

def lacks(here):
    raise Skip("no such package")

def imports(here):
    here.keep(["before"])
    import no_such_package_at_all

def errs(here):
    here.keep([1])
    raise ValueError("too few\\nand more")

def judged(here):
    return here.keep([2], failed="it is wrong")

def crashes(here):
    here.keep([3])
    print("about to break", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

def leaves(here):
    os._exit(0)

def hangs(here):
    here.keep([4])
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return what runs a function of the module above in a process of its own."""
    (tmp_path / "pretended_steps.py").write_text(STEPS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = in_process(tmp_path, {"pixels": 8})

    def go(function, seconds=20.0, argument=None):
        step = Step(function, "", f"pretended_steps:{function}", seconds, argument=argument)
        return start(step, seconds)

    go.folder = tmp_path
    return go


@pytest.mark.parametrize(
    ("function", "state", "reason", "found"),
    [
        ("answer", "done", None, {"argument": "x", "setting": 8}),
        ("lacks", "skipped", "no such package", None),
        ("imports", "skipped", "No module named 'no_such_package_at_all'", ["before"]),
        ("errs", "failed", "ValueError: too few", [1]),
        ("judged", "failed", "it is wrong", [2]),
        ("crashes", "failed", "its process ended with SIGSEGV: about to break", [3]),
    ],
)
def test_however_a_step_ends_its_reason_and_what_it_found_are_kept(
    run, function, state, reason, found
):
    got = run(function, argument="x")
    assert (got.state, got.reason, got.found) == (state, reason, found)


def test_a_process_that_leaves_without_a_word_has_failed(run):
    assert run("leaves").state == "failed"


def test_a_step_that_hangs_is_ended_when_its_time_is_over(run):
    got = run("hangs", seconds=1.0)
    assert (got.state, got.reason, got.found) == ("failed", "it took longer than its 1 s", [4])
    assert got.seconds < 10


def test_what_a_broken_process_found_is_not_relied_upon_later(run):
    run("crashes")
    run("judged")
    run("hangs", seconds=1.0)
    here = Here(run.folder, None, {}, 1.0, run.folder / "x.json")
    assert here.earlier("crashes")["broken"]
    assert "found" not in here.earlier("crashes")
    assert here.earlier("judged")["found"] == [2]
    assert here.earlier("hangs")["found"] == [4]  # it was ended, and did not break
    assert here.earlier("never ran") == {}


def test_what_a_failed_step_printed_is_shown_under_it(run, capsys):
    for function in ("crashes", "answer"):
        command._say(run(function), run.folder)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("crashes: failed: its process ended with SIGSEGV")
    assert told[1] == "    about to break"
    assert told[2].startswith("answer: done (")


# ── The command ─────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(_cuda.missing_gpu() is None, reason="this machine has an NVIDIA GPU")
def test_the_command_skips_everything_here_and_writes_nothing(tmp_path):
    results = tmp_path / "results"
    told = subprocess.run(
        [sys.executable, "-S", "-m", "gpu", "--results", results],  # -S: and no package at all
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (told.returncode, told.stderr) == (0, "")
    lines = told.stdout.splitlines()
    reason = _cuda.missing_gpu()
    assert lines[:-1] == [f"{step.name}: skipped: {reason} (0 s)" for step in command.STEPS]
    assert lines[-1].startswith("no results are kept")
    assert not results.exists()


def test_a_step_that_does_not_exist_is_refused_with_those_that_do():
    told = subprocess.run(
        [sys.executable, "-m", "gpu", "--only", "ceiling"],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert told.returncode == 2
    assert "no step named 'ceiling', but card, " in told.stderr


def test_all_steps_fit_into_ten_minutes_and_name_what_exists():
    assert command.SECONDS < 600
    assert max(step.seconds for step in command.STEPS) < command.SECONDS
    names = [step.name for step in command.STEPS]
    assert [parity.step(name) for name in candidates.RUNTIMES] == [
        name for name in names if name.startswith("parity")
    ]
    for step in command.STEPS:
        module, _, function = step.call.partition(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))
        assert set(step.needs) <= set(names[: names.index(step.name)])


@pytest.mark.skipif(_cuda.missing_gpu() is None, reason="this machine has an NVIDIA GPU")
@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_gpu_installs_nothing_where_there_is_no_gpu_and_ends_well(tmp_path):
    told = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}", f"GPU=--results {tmp_path / 'results'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert told.returncode == 0, told.stderr
    assert "latency: skipped: no NVIDIA GPU" in told.stdout
    assert not (tmp_path / "results").exists()


# ── What steps compute ──────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """Make the graphs of a small network in a folder; return the folder and what was said."""
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "load_model", lambda name: tiny_model, raising=False)
        patch.setattr(graphs, "BATCH", BatchRange(1, 8, 16))
        said = graphs.make(here(folder, "graphs"))
    return folder, said


def here(folder, step, argument=None, seconds=30.0):
    settings = {"pixels": 32, "images": 16, "batches": [1, 3]}
    return Here(folder, argument, settings, seconds, folder / f"{steps._slug(step)}.json")


@pytest.fixture(scope="module")
def on_the_cpu():
    """Put the CPU's ONNX Runtime in every runtime's place: one lacks, one refuses, one lies."""

    class Odd:
        def __init__(self, name):
            self.name, self.cpu = name, load_runtime("ort-cpu", {})

        def __getattr__(self, name):
            return getattr(self.cpu, name)

        def missing(self, action):
            return "no tensorrt" if self.name == "tensorrt" else None

        def build(self, model, folder):
            if self.name == "torch-compile-cuda" or (
                self.name == "torch-eager-cuda" and model.precision == "int8"
            ):
                raise BuildError("no kernel for it", hint="another")
            if self.name == "tensorrt-rtx":
                return folder / "resnet18.fp32.onnx" if model.precision != "fp16" else wrong(folder)
            return model.path

    def wrong(folder):
        import onnx
        from onnx import numpy_helper

        graph = onnx.load(folder / "resnet18.fp32.onnx")
        for tensor in graph.graph.initializer:
            value = numpy_helper.to_array(tensor)
            if value.ndim == 2:
                tensor.CopyFrom(numpy_helper.from_array(-value, tensor.name))
        onnx.save(graph, folder / "wrong.onnx")
        return folder / "wrong.onnx"

    def of(name):
        for precision in candidates.PRECISIONS:
            yield candidates.Candidate(precision, name, (Odd(name),))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "candidates", of)
        patch.setattr(latency, "candidates", of)
        patch.setattr(latency, "SETTLE_MS", 0.0)
        patch.setattr(latency, "ROUNDS", 1)
        yield


def test_the_graphs_are_the_network_in_each_precision_and_its_logits_in_float64(made, tiny_module):
    folder, said = made
    x = exporter.samples.load_split("digits", (1, 32, 32), "held-out").inputs
    with torch.inference_mode():
        want = tiny_module.double()(torch.from_numpy(x).double()).numpy()
        tiny_module.float()
    assert np.allclose(np.load(folder / "truth.npy"), want, rtol=1e-12)
    sizes = [said["bytes"][name] for name in candidates.PRECISIONS]
    assert sizes == sorted(sizes, reverse=True)
    for name in candidates.PRECISIONS:
        model = candidates.graph(folder, name, 32)
        assert model.input == TensorSpec("input", (1, 32, 32))
        with load_runtime("ort-cpu", {}).open(model.path) as session:
            assert session({"input": x[:2]})["logits"].shape == (2, 10)


def test_a_runtime_is_judged_on_the_digits_in_each_precision(made, on_the_cpu):
    folder, _ = made
    rows = parity.judge(at := here(folder, "parity on ort-cuda", "ort-cuda"))
    assert [row["precision"] for row in rows] == ["fp32", "fp16", "int8"]
    assert rows[0]["verdict"] == "pass"
    assert rows[0]["sqnr_db"] > 100 > rows[1]["sqnr_db"] > rows[2]["sqnr_db"] > 10
    assert rows[0]["samples"] == rows[0]["agreeing"] == 360
    assert "of 7 layers in FP16" in rows[1]["executed"]
    assert parity.unfit(rows[0]) is None
    assert steps.read(at.path)["state"] == "done"


def test_a_wrong_answer_fails_its_step_and_the_other_rows_are_kept(made, on_the_cpu):
    folder, _ = made
    rows = parity.judge(at := here(folder, "parity on tensorrt-rtx", "tensorrt-rtx"))
    said = steps.read(at.path)
    assert [row["verdict"] for row in rows][:2] == ["pass", "fail"]
    assert said["state"] == "failed"
    assert said["reason"].startswith("fp16: ")
    assert parity.unfit(rows[1]).startswith("it failed: ")


def test_what_is_lacking_skips_and_what_is_refused_is_named(made, on_the_cpu):
    folder, _ = made
    with pytest.raises(Skip, match="no tensorrt"):
        parity.judge(here(folder, "parity on tensorrt", "tensorrt"))
    rows = parity.judge(here(folder, "parity on torch-eager-cuda", "torch-eager-cuda"))
    assert [row.get("refused") for row in rows] == [None, None, "no kernel for it (another)"]
    at = here(folder, "parity on torch-compile-cuda", "torch-compile-cuda")
    parity.judge(at)
    assert steps.read(at.path)["reason"] == "fp32: no kernel for it (another)"


@pytest.fixture(scope="module")
def timed(made, on_the_cpu):
    """Time what answers of the small network: the CPU's clock, and a pretended card's sensors."""
    folder, _ = made
    for name in candidates.RUNTIMES:
        at = here(folder, parity.step(name), name)
        steps.write(at.path, {"state": "skipped", "reason": f"{name} is not there"})
    parity.judge(here(folder, parity.step("ort-cuda"), "ort-cuda"))
    parity.judge(here(folder, parity.step("tensorrt-rtx"), "tensorrt-rtx"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency.Sensors, "open", lambda: Sensors(Nvml(), 100))
        return latency.measure(here(folder, "latency", seconds=120.0))


def test_what_answered_is_timed_in_turn_and_the_rest_is_named_with_its_reason(timed):
    names = {"fp32 on ort-cuda", "fp16 on ort-cuda", "int8 on ort-cuda", "fp32 on tensorrt-rtx"}
    assert [at["batch"] for at in timed["at"]] == [1, 3]
    for at in timed["at"]:
        assert names <= {one["name"] for one in at["latency"]}
        assert {len(one["samples_ms"]) >= 20 for one in at["latency"]} == {True}
        assert all(apart <= 1e-3 for apart in at["farthest"].values())
        assert at["farthest"].keys() >= names
        assert at["gpu"]["name"] == "A GPU"
    assert timed["not timed"]["fp32 on tensorrt"] == "tensorrt is not there"
    assert timed["not timed"]["fp16 on tensorrt-rtx"].startswith("it failed: ")


def test_a_batch_that_does_not_fit_into_the_time_is_not_timed_and_said_to_be_so(made, on_the_cpu):
    folder, _ = made
    parity.judge(here(folder, parity.step("ort-cuda"), "ort-cuda"))
    found = latency.measure(here(folder, "latency", seconds=0.0))
    assert [one["latency"] for one in found["at"]] == [[], []]
    assert found["at"][0]["why"].endswith("do not fit into the 0 s left")


class OwnClock:
    """A session with a clock of its own, by which one way of timing does not work, or none does."""

    threads = 1

    def __init__(self, *, works):
        self.works = works

    def __call__(self, feed):
        return {"logits": feed["input"].reshape(len(feed["input"]), -1)[:, :10]}

    def bind(self, feed):
        return lambda: None

    def on_device(self, feed):
        if not self.works:
            raise RuntimeError("no clock")

        def refuse():
            raise BuildError("it cannot be captured")

        return {"events": lambda: 1.0, "graph": refuse}


@pytest.mark.parametrize(
    ("works", "timed", "refused"),
    [
        (True, {"A", "A, events"}, {"A, graph": "it cannot be captured"}),
        (False, {"A"}, {"A, by CUDA events": "RuntimeError: no clock"}),
    ],
)
def test_a_way_of_timing_that_does_not_work_costs_no_other(on_the_cpu, works, timed, refused):
    found = latency._Time(32, 2, {"A": (None, OwnClock(works=works))}).within(60.0)
    assert {one.name for one in found["latency"]} == timed
    assert found["not timed"] == refused


def test_a_card_whose_sensors_do_not_answer_is_timed_all_the_same(on_the_cpu, monkeypatch):
    class Mute(Nvml):
        def device_get_power_usage(self, gpu):
            raise OSError("Not Supported")

    monkeypatch.setattr(latency.Sensors, "open", lambda: Sensors(Mute(), 100))
    found = latency._Time(32, 2, {"A": (None, OwnClock(works=True))}).within(60.0)
    assert found["latency"]
    assert found["gpu"] is None
    assert "the GPU's sensors did not answer: OSError: Not Supported" in found["doubts"]


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (1000.0, ["A", "A, events", f"A, {COPIES}", "B"]),
        (latency.FEWEST * 3.5, ["A", "A, events", "B"]),
        (latency.FEWEST * 2.5, ["A, events", "B"]),
        (latency.FEWEST * 0.5, ["A, events", "B"]),
    ],
)
def test_where_time_is_short_the_device_s_own_clock_is_kept_and_what_has_no_other(left, kept):
    batch = latency._Time(32, 2, {})
    names = ["A", "A, events", f"A, {COPIES}", "B"]
    batch.entrants = dict.fromkeys(names)
    costs = dict.fromkeys(names, 1.0)
    batch._leave_out(costs, left)
    assert list(batch.entrants) == list(costs) == kept
    assert set(batch.refused) == set(names) - set(kept)


def test_onnxruntime_is_tried_without_graphs_where_it_refuses_them(made, monkeypatch):
    class Refuses:
        def __getattr__(self, name):
            return getattr(load_runtime("ort-cpu", {}), name)

        def open(self, path):
            raise BuildError("a node stays on the CPU")

    found = list(candidates.candidates("ort-cuda"))
    assert [[one.cuda_graph for one in each.tries] for each in found] == [[True, False]] * 3
    here_twice = (Refuses(), load_runtime("ort-cpu", {}))
    one = candidates.Candidate("fp32", "ort-cuda", here_twice)
    monkeypatch.setattr(parity, "candidates", lambda name: iter([one]))
    (row,) = parity.judge(here(made[0], "parity on ort-cuda", "ort-cuda"))
    assert (row["verdict"], row["try"]) == ("pass", 1)
    assert "with other options it was refused: a node stays on the CPU" in row["notes"]


def test_where_nothing_answers_there_is_nothing_to_time(tmp_path):
    with pytest.raises(Skip, match="nothing can be timed: it was not reached"):
        latency.measure(here(tmp_path, "latency"))


@pytest.mark.skipif(
    load_runtime("tensorrt-rtx", {}).missing("build") is not None, reason="no tensorrt-rtx"
)
@pytest.mark.skipif(_cuda.missing_gpu() is None, reason="this machine has an NVIDIA GPU")
def test_engines_are_built_for_each_target_and_none_passes_for_run(made, monkeypatch):
    folder, _ = made
    with pytest.raises(Skip, match="no NVIDIA GPU"):
        engines.build_for_targets(here(folder, "engines"))
    monkeypatch.setattr(engines, "targets", lambda: ("sm89", "sm75"))
    rows = engines.build_for_targets(here(folder, "engines"))
    built = {(row["target"], row["precision"]): row for row in rows}
    assert list(built) == [(t, p) for t in ("sm89", "sm75") for p in candidates.PRECISIONS]
    assert built["sm89", "fp32"]["bytes"] > built["sm89", "fp16"]["bytes"] > 0
    assert built["sm89", "fp32"]["validity"] == "invalid"
    assert built["sm89", "fp32"]["ran"].startswith("no: ")
    assert "no FP32 matrix multiply" in built["sm75", "fp32"]["refused"]


# ── The ceilings ────────────────────────────────────────────────────────────────────


def test_each_product_is_of_the_type_that_it_is_named_for_and_right():
    for name, make in ceilings.products(torch, "cpu", 64).items():
        run = make()
        a, b = run.args
        got, want = run().double(), a.double() @ b.double()
        assert torch.allclose(got, want, rtol=2e-2, atol=0.5), name
        assert got.abs().max() > 1
    assert torch.get_float32_matmul_precision() == "highest"


def test_ceilings_are_work_over_the_least_time(monkeypatch):
    class Clock:
        def ms(self, work):
            work()
            return next(times)

    times = iter([3.0, 2.0, 4.0, *[2.0] * 1000])
    monkeypatch.setattr(ceilings, "PLACE", "cpu")
    monkeypatch.setattr(ceilings, "SIZE", 32)
    monkeypatch.setattr(ceilings, "SETS", (1 << 10, 1 << 20))
    monkeypatch.setattr(ceilings, "HOST", 1 << 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 20))
    from exporter.runtimes._torch_cuda import TorchTimer

    monkeypatch.setattr(TorchTimer, "of_cuda", classmethod(lambda cls: Clock()))
    kept = []
    found = ceilings.measure(SimpleNamespace(keep=kept.append))
    flops = pytest.approx(2 * 32**3 / 2e-3 / 1e9)
    assert found["peaks"] == dict.fromkeys(("fp32", "tf32", "fp16", "bf16", "int8"), flops)
    assert found["bandwidths"] == {"1024": pytest.approx(1024 / 2e-3 / 1e9)}
    assert "bytes free" in found["refused"][f"copies of {1 << 20} bytes"]
    assert found["host"]["in, pageable"] == pytest.approx(1024 / 2e-3 / 1e9)
    assert kept


def test_the_least_time_of_a_batch_is_what_arithmetic_and_bytes_take(tmp_path):
    """One 1×1 convolution of 3 to 5 channels at 2×2: 60 MACs; 12 values in, 20 out, 15 weights."""
    from onnx import helper, numpy_helper

    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", kernel_shape=[1, 1])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [value("x", 1, ["N", 3, 2, 2])],
        [value("y", 1, ["N", 5, 2, 2])],
        [numpy_helper.from_array(np.ones((5, 3, 1, 1), np.float32), "w")],
    )
    cost = count_flops(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    for batch in (1, 4):
        busy = roof.least(cost, batch, gflops=1e-3, gigabytes=1e9, shape=(3, 2, 2))
        assert busy == pytest.approx((120 * batch / 1e6 * 1e3,) * 2)
        starved = roof.least(cost, batch, gflops=1e9, gigabytes=1e-3, shape=(3, 2, 2))
        assert starved == pytest.approx(((60 + 128 * batch) / 1e6 * 1e3,) * 2)


# ── Tests that are marked ───────────────────────────────────────────────────────────

REPORT = """<testsuites><testsuite>
<testcase name="good"/>
<testcase name="bad"><failure message="assert 1 == 2&#10;more">...</failure></testcase>
<testcase name="broken"><error message="fixture">...</error></testcase>
<testcase name="lacks"><skipped message="no NVIDIA GPU">...</skipped></testcase>
</testsuite></testsuites>"""


def test_a_report_of_tests_is_counted_and_each_other_ending_named(tmp_path):
    (tmp_path / "marked.xml").write_text(REPORT)
    assert marked.read_report(tmp_path / "marked.xml") == {
        "passed": 1,
        "failed": {"bad": "assert 1 == 2", "broken": "fixture"},
        "skipped": {"lacks": "no NVIDIA GPU"},
    }


@pytest.mark.parametrize(("passing", "state"), [(1, "failed"), (0, "skipped")])
def test_marked_tests_end_their_step_as_they_ended(tmp_path, monkeypatch, passing, state):
    text = REPORT if passing else REPORT.replace('name="good"/', 'name="good"><skipped/></testcase')
    if not passing:
        lines = [line for line in text.splitlines() if 'name="good"' not in line]
        text = "\n".join(line for line in lines if "failure" not in line and "<error" not in line)

    def pretend(asked, **options):
        assert asked[asked.index("-m", 2) + 1 :][:2] == ["pytest", "-q"] or "gpu" in asked
        assert any(str(part).endswith("test_on_gpu.py") for part in asked)
        (tmp_path / "marked.xml").write_text(text)
        return SimpleNamespace(returncode=passing)

    monkeypatch.setattr(marked.subprocess, "run", pretend)
    at = here(tmp_path, "tests")
    if state == "skipped":
        with pytest.raises(Skip, match="no NVIDIA GPU"):
            marked.run_tests(at)
    else:
        marked.run_tests(at)
        assert steps.read(at.path)["reason"] == "2 failed, the first of them bad"


# ── The record and the page ─────────────────────────────────────────────────────────


@pytest.fixture
def record(made, on_the_cpu, timed):
    """A record of a card that never was: real figures of the CPU under a name that says so."""
    folder, said = made
    rows = parity.judge(here(folder, parity.step("ort-cuda"), "ort-cuda"))
    built = {"target": "current", "precision": "fp32", "bytes": 45_000_000, "seconds": 0.5}
    outcomes = [
        Outcome("card", "", "done", None, 1.0, {"name": "no card (a test)", "environment": {}}),
        Outcome("tests", "", "done", None, 9.0, {"passed": 3, "failed": {}, "skipped": {}}),
        Outcome("graphs", "", "done", None, 9.0, said),
        Outcome(
            *("engines", "", "done", None, 3.0),
            [
                built | {"validity": "valid", "ran": "yes"},
                {"target": "sm75", "precision": "fp32", "refused": "no | such product"},
            ],
        ),
        Outcome(parity.step("ort-cuda"), "", "done", None, 5.0, rows),
        Outcome(parity.step("tensorrt"), "", "skipped", "No module named 'tensorrt'"),
        Outcome(
            *("ceilings", "", "done", None, 4.0),
            {
                "peaks": {"fp32": 50e3, "fp16": 800e3, "int8": 1600e3},
                "bandwidths": {"16777216": 9000.0, "4294967296": 4300.0},
                "host": {"in, pageable": 8.0},
                "refused": {"bf16": "an old card"},
            },
        ),
        Outcome("latency", "", "done", None, 60.0, timed),
    ]
    settings = {"pixels": 32, "images": 16, "batches": [1, 3]}
    card = outcomes[0].found
    made_up = command._record(outcomes, card, settings, folder)
    return json.loads(json.dumps(made_up))  # as a file has it


def test_the_page_says_what_each_step_came_to_and_what_each_figure_is(record):
    text = page.render(record)
    assert text.startswith("# no card (a test): ")
    assert "at 1x32x32, INT8 calibrated on 16 of the 1437 train digits" in text
    assert "| parity on tensorrt | skipped | 0 | No module named 'tensorrt' |" in text
    assert "| current | fp32 | 45.0 MB, 0.5 s | valid | yes |" in text
    assert "no \\| such product" in text
    assert "| fp16 product | 800.0 TFLOP/s |" in text
    assert "4096 MiB read and written | 4,300 GB/s" in text
    assert "an old card" in text
    assert "## Latency at batch 1" in text
    assert "## Latency at batch 3" in text
    assert (
        "fp32 on tensorrt: No module" in text or "fp32 on tensorrt: tensorrt is not there" in text
    )
    for definition in page.DEFINITIONS:
        assert page.escape(definition) in text
    assert "3 passed." in text


def test_shares_are_the_least_time_over_the_median(record):
    at = record["steps"][-1]["found"]["at"][1]
    one = next(
        x
        for x in msgspec.convert(at["latency"], list[page.Latency])
        if x.name == "fp16 on ort-cuda"
    )
    cost = msgspec.convert(record["costs"]["fp16"], page.Cost)
    ends = 3 * (4 * 32 * 32 + cost.layers[-1].activation_bytes)
    arithmetic = 3 * cost.flops / 800e12
    moving = (cost.weight_bytes + ends) / 4300e9
    want = max(arithmetic, moving) * 1e3 / one.p50_ms
    ceilings_found = record["steps"][6]["found"]
    whole, layers = page.shares(one, record["costs"], ceilings_found, 32)
    assert whole == f"{want:.1%}"
    assert float(layers.rstrip("%")) >= float(whole.rstrip("%"))
    assert page.shares(one, record["costs"], None, 32) == ("not known", "not known")


def test_a_ratio_is_of_two_that_were_timed_in_the_same_way():
    def taken(name, ms):
        return page.Latency(name, 1, 1, 6, tuple(ms * (1 + i % 3 / 100) for i in range(30)))

    names = {page.EAGER: 4.0, f"{page.EAGER}, a way": 6.0, "x": 2.0, "x, a way": 1.0, "y, b": 1.0}
    by_name = {name: taken(name, ms) for name, ms in names.items()}
    said = {name: page.beside_eager(one, by_name) for name, one in by_name.items()}
    assert said["x"].startswith("2.00 (")
    assert said["x, a way"].startswith("6.00 (")
    assert said["y, b"] == said[page.EAGER] == "—"
    assert page._figure(by_name["x"], 90.0) == "needs 34 more"
    assert page._figure(by_name["x"], 50.0).startswith("2.020 (2.0")


def test_what_is_kept_is_named_by_the_date_and_the_card(record, tmp_path, capsys):
    record["card"]["name"] = "NVIDIA Pretended (test) 1"
    command._keep(record, tmp_path / "results")
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    stem = f"{record['date']}-gpu-nvidia-pretended-test-1"
    assert names == [f"{stem}.json", f"{stem}.md"]
    kept = json.loads((tmp_path / "results" / f"{stem}.json").read_text("utf-8"))
    assert kept["steps"][-1]["found"]["at"][0]["latency"][0]["samples_ms"]
