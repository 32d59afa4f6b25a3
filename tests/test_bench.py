"""Bundles timed by one command: what is timed, whether it was real, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from conftest import HASTE, refused
from matplotlib.collections import PathCollection

import exporter
from exporter import environment
from exporter.bench import bench_bundles, candidates, real
from exporter.bundle import write_manifest
from exporter.cli import main
from exporter.cores import usable_cores
from exporter.errors import InputRefused, OutOfMemory, ProfileError, RuntimeMissing, UnknownName
from exporter.plugins import load_runtime
from exporter.profile import load_profile
from exporter.records import (
    BenchAsked,
    BenchReport,
    Checked,
    Fit,
    Gpu,
    Latency,
    Noise,
    Timed,
    Timing,
)
from exporter.renderers import benching, record, throughput
from exporter.runtimes import _ort
from exporter.runtimes._cuda import missing_gpu
from exporter.runtimes.tensorrt_rtx import TensorRtRtx
from exporter.samples import digits, varied
from exporter.strict import read

FREE = {"sqnr_db": 5.0}
ASKED = BenchAsked(runtimes=("ort-cpu",), batches=(1, 2), runs=4)


@pytest.fixture(scope="module")
def bundle(tiny_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "made"
    profile = load_profile(
        "default",
        {
            **HASTE,
            "runtime.tensorrt-rtx.targets": ["sm86"],
            **{
                f"precision.{name}.{key}": FREE
                for name in ("fp32", "fp16")
                for key in ("tolerance", "random_tolerance")
            },
        },
    )
    exporter.run(tiny_model, profile.only(("fp32", "fp16")), out)
    return out


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


@pytest.fixture
def bench(tiny_model, monkeypatch):
    """Time bundles of the tiny network, settled at once."""
    monkeypatch.setattr("exporter.bench.Timing", lambda **how: Timing(**how, settle_ms=0, warmup=1))

    def run(*folders: Path, asked: BenchAsked = ASKED) -> BenchReport:
        return bench_bundles(folders, asked, models=[tiny_model] * len(folders))

    return run


def rewrite(folder: Path, change) -> Path:
    """Change the record of a bundle, and vouch for it anew."""
    path = folder / "report.json"
    path.write_text(record.render(change(record.parse(path.read_bytes()))), "utf-8")
    return vouched(folder)


def vouched(folder: Path) -> Path:
    (folder / "manifest.json").unlink()
    write_manifest(folder, tool="test", environment={})
    return folder


# ── What is timed, and whether it was real ──────────────────────────────────────────


def test_every_artefact_is_timed_at_every_batch_and_held_against_the_record(bundle, bench):
    report = bench(bundle)
    assert [one.name for one in report.timed] == ["fp32 on ort-cpu", "fp16 on ort-cpu"]
    assert [(one.name, one.batch, len(one.samples_ms)) for one in report.latency] == [
        (name, batch, 4) for batch in (1, 2) for name in ("fp32 on ort-cpu", "fp16 on ort-cpu")
    ]
    held_out = digits((1, 32, 32), "held-out")
    for one in report.timed:
        session = ort.InferenceSession(bundle / one.file, providers=["CPUExecutionProvider"])
        (given,), (found,) = session.get_inputs(), session.run(None, {"input": held_out.inputs})
        assert given.name == "input"
        assert one.checked.correct == int((found.argmax(axis=1) == held_out.labels).sum())
        assert (one.checked.outputs, one.checked.accuracy) == ("pass", "pass")
        assert one.checked.timed >= 2
        assert one.load_ms > 0 < one.first_ms
        assert one.threads == 1
    assert {one.loads for one in report.latency} == {5}
    assert report.verdict == "pass"
    assert report.noise.turns == sum(len(x.samples_ms) + x.warmup for x in report.latency)


def test_batch_sizes_are_the_profiles_if_none_is_asked_for(bundle, bench):
    report = bench(bundle, asked=msgspec.structs.replace(ASKED, batches=()))
    assert report.batches == (1,)
    assert report.knees == ()


def test_seconds_in_place_of_runs_give_as_many_rounds_as_an_interval_needs(bundle, bench):
    report = bench(bundle, asked=msgspec.structs.replace(ASKED, runs=None, seconds=0.001))
    assert {len(one.samples_ms) for one in report.latency} == {20}


def test_what_cannot_run_here_is_listed_with_the_reason(bundle, bench, monkeypatch):
    monkeypatch.setattr(TensorRtRtx, "missing", lambda self, action: "no GPU")
    report = bench(bundle, asked=msgspec.structs.replace(ASKED, runtimes=()))
    assert [(one.name, one.reason) for one in report.not_timed] == [
        ("fp32 on tensorrt-rtx", "no GPU"),
        ("fp16 on tensorrt-rtx", "no GPU"),
    ]
    assert "not timed: fp32 on tensorrt-rtx: no GPU" in list(benching.said(report))


def test_bundles_are_timed_in_turn_with_each_other_even_one_with_itself(bundle, bench):
    report = bench(bundle, bundle, asked=msgspec.structs.replace(ASKED, batches=(1,), runs=20))
    names = [one.name for one in report.timed]
    assert names[0] == "made: fp32 on ort-cpu"
    assert names[2] == "made (2): fp32 on ort-cpu"
    assert [(c.artefact, c.baseline) for c in report.comparisons] == [
        (name, names[0]) for name in names[1:]
    ]
    assert all(c.interval[0] <= c.ratio <= c.interval[1] for c in report.comparisons)


def test_each_count_of_threads_is_a_candidate_that_computes_with_so_many(bundle, bench):
    report = bench(bundle, asked=msgspec.structs.replace(ASKED, threads=(1, 2)))
    assert [(one.name, one.threads) for one in report.timed[:2]] == [
        ("fp32 on ort-cpu, 1 thread", 1),
        ("fp32 on ort-cpu, 2 threads", 2),
    ]


def test_more_threads_than_processors_are_a_doubt(bundle, bench, monkeypatch):
    monkeypatch.setattr("exporter.bench.usable_cores", lambda: 2)
    report = bench(bundle, asked=msgspec.structs.replace(ASKED, threads=(3,)))
    assert "3 threads share 2 processors" in report.doubts


def test_a_timed_run_that_computes_something_else_is_caught(bundle, bench, monkeypatch):
    """As if inputs stayed where they were: each run gives the first batch's outputs."""
    first = {}

    def outputs(self):
        found = _ort._named(self.session, self.binding.copy_outputs_to_cpu())
        return first.setdefault((id(self.session), len(found["logits"])), found)

    monkeypatch.setattr(_ort.OrtBound, "outputs", outputs)
    report = bench(bundle, asked=msgspec.structs.replace(ASKED, runs=40))
    assert report.verdict == "fail"
    assert all(one.checked.outputs == "fail" for one in report.timed)
    assert report.failures[0].startswith("fp32 on ort-cpu: a timed run's outputs are ")


def test_an_accuracy_that_is_not_the_recorded_one_is_caught(copied, bench):
    def one_more_lost(report):
        (first, *others) = report.variants
        (artefact, *more) = first.artefacts
        held_out, *rest = artefact.parity
        worse = msgspec.structs.replace(held_out, lost=held_out.lost + 1)
        changed = msgspec.structs.replace(artefact, parity=(worse, *rest))
        variant = msgspec.structs.replace(first, artefacts=(changed, *more))
        return msgspec.structs.replace(report, variants=(variant, *others))

    report = bench(rewrite(copied, one_more_lost))
    checked = report.timed[0].checked
    assert checked.recorded == checked.correct - 1
    assert (checked.accuracy, report.timed[1].checked.accuracy) == ("fail", "pass")
    assert report.verdict == "fail"
    assert f"and the bundle's record says {checked.recorded}" in report.failures[0]


def test_what_a_runtime_does_not_hand_over_is_not_checked_and_never_a_pass(
    bundle, bench, monkeypatch
):
    bind = _ort.OrtSession.bind
    monkeypatch.setattr(_ort.OrtSession, "bind", lambda self, feed: bind(self, feed).__call__)
    report = bench(bundle)
    assert {one.checked.outputs for one in report.timed} == {"not checked"}
    assert {one.checked.accuracy for one in report.timed} == {"pass"}
    assert report.verdict == "not checked"
    assert benching.checked(report.timed[0])[3] == "not checked"


def test_a_runtime_that_the_bundle_was_not_made_for_builds_from_its_graph(
    bundle, bench, monkeypatch
):
    class Elsewhere(_ort.OnnxRuntime, frozen=True):
        provider = "CPUExecutionProvider"
        device = "cpu"

        def build(self, model, folder):
            return shutil.copy(model.path, folder / f"{model.path.stem}.elsewhere.onnx")

    monkeypatch.setattr(candidates, "load_runtime", lambda name, options: Elsewhere(threads=1))
    monkeypatch.setattr(candidates, "options_of", lambda axis, name: ("threads",))
    report = bench(bundle, asked=msgspec.structs.replace(ASKED, runtimes=("elsewhere",)))
    assert report.timed[0].file == "tinymodel.fp32.elsewhere.onnx"
    assert report.timed[0].checked.accuracy == "not checked"
    assert not list(bundle.glob("*elsewhere*"))


def test_batches_of_held_out_samples_differ_and_go_round():
    inputs = np.arange(10.0)
    found = [feed["x"].tolist() for feed in varied(inputs, "x", size=3, count=4)]
    assert found == [[0, 1, 2], [2, 3, 4], [5, 6, 7], [7, 8, 9]]
    assert varied(inputs, "x", size=12, count=2)[1]["x"].tolist() == [*range(5, 10), *range(7)]


def test_the_distance_of_outputs_is_relative_and_infinite_where_there_is_none():
    want = np.array([[3.0, 4.0]])
    assert real.distance(want, np.array([[3.0, 4.5]])) == pytest.approx(0.1)
    assert real.distance(want, want) == 0.0
    for wrong in (np.array([3.0, 4.0]), np.array([[3.0, np.nan]])):
        assert real.distance(want, wrong) == float("inf")


# ── What follows ────────────────────────────────────────────────────────────────────


def simulated(p50s: dict[int, float], *, runs: int = 100, budget: float | None = None, high=1.0):
    """A bench of one candidate whose times are a median, and ``high`` times it for one in eight."""
    fast = runs - runs // 8
    return BenchReport(
        schema=2,
        tool="test",
        environment={"cpu": "A CPU"},
        asked=BenchAsked(batches=tuple(p50s), budget_ms=budget),
        timing=Timing(batches=tuple(p50s)),
        samples=("360 digits",),
        timed=(Timed("A", "made", "fp32", "ort-cpu", 1, "a.onnx", "0" * 64, 1.0, 2.0),),
        not_timed=(),
        latency=tuple(
            Latency("A", batch, 1, 5, (p50,) * fast + (p50 * high,) * (runs // 8))
            for batch, p50 in p50s.items()
        ),
        noise=Noise(2, 0.1, 0.01, 3, 100),
        doubts=(),
    )


def test_the_knee_is_the_smallest_batch_with_nine_tenths_of_the_most():
    """Images/s 100, 380, 395, 400: 380 are 95 % of 400."""
    (knee,) = simulated({1: 10.0, 4: 4000 / 380, 8: 8000 / 395, 16: 40.0}).knees
    assert (knee.batch, knee.most_batch) == (4, 16)
    assert (knee.per_second, knee.most) == (pytest.approx(380), pytest.approx(400))


def test_throughput_that_still_rises_has_no_knee():
    report = simulated({1: 10.0, 4: 20.0})
    assert report.knees[0].batch is None
    assert "A: no knee: images/s still rise at batch 4" in "\n".join(benching.said(report))


def test_the_budget_is_kept_by_the_upper_end_of_the_p90():
    """One in eight takes twice as long, so that is where the p90 is."""
    times = {1: 2.0, 4: 5.0, 8: 11.0}
    assert simulated(times, budget=10.0).fits == (Fit("A", 4, 0),)
    assert simulated(times, budget=10.0, high=2.0).fits == (Fit("A", 4, 0),)
    assert simulated(times, budget=9.9, high=2.0).fits == (Fit("A", 1, 0),)
    assert simulated(times, budget=1.0).fits == (Fit("A", None, 0),)


def test_a_budget_is_not_answered_with_fewer_samples_than_a_p90_needs():
    report = simulated({1: 2.0}, runs=60, budget=10.0)
    assert report.fits == (Fit("A", None, 4),)
    assert "takes 4 samples more, as a p90 needs 64" in "\n".join(benching.said(report))


# ── The picture ─────────────────────────────────────────────────────────────────────


def curves(axes) -> list[list[tuple[float, float]]]:
    return [list(zip(*line[0].get_data(), strict=True)) for line in axes.containers]


def marks(axes) -> list[list[tuple[float, float]]]:
    """Return the points of every set of empty marks, in the order that they are drawn in."""
    found = [one for one in axes.collections if isinstance(one, PathCollection)]
    return [[tuple(map(float, point)) for point in one.get_offsets()] for one in found]


def test_throughput_is_drawn_with_the_knee_and_the_budget():
    """Images/s 100, 200, 200 at 10, 20 and 40 ms; one in eight of the times is a tenth more."""
    report = simulated({1: 10.0, 4: 20.0, 8: 40.0}, budget=30.0, high=1.1)
    rates, p90s = throughput.draw(report).axes
    assert curves(rates) == [[(1, 100), (4, 200), (8, 200)]]
    assert marks(rates) == [[(4, 200)], [(4, 200)]]
    assert curves(p90s) == [[(1, 11), (4, 22), (8, 44)]]
    assert marks(p90s) == [[(4, 22)]]
    (limit,) = (line for line in p90s.lines if line.get_label() == "budget: 30 ms")
    assert list(limit.get_ydata()) == [30, 30]
    texts = throughput.render(report)
    assert all(word in texts for word in ("knee", "largest batch within the budget", ">A<"))


def test_without_a_budget_there_is_no_line_of_one():
    (rates,) = throughput.draw(simulated({1: 10.0, 4: 20.0})).axes
    assert curves(rates) == [[(1, 100), (4, 200)]]
    assert marks(rates) == []  # it still rises: no knee


def test_bars_of_the_picture_are_intervals_of_the_figures():
    times = tuple(10.0 + at % 5 for at in range(100))
    report = simulated({1: 10.0, 4: 20.0})
    own = (Latency("A", 1, 1, 5, times), Latency("A", 4, 1, 5, (20.0,) * 100))
    first, second = throughput.rates(msgspec.structs.replace(report, latency=own), "A")
    fast, slow = own[0].figure(50.0).interval
    assert (first.value, first.low, first.high) == (1e3 / 12, 1e3 / slow, 1e3 / fast)
    assert first.low < first.value < first.high
    assert (second.value, second.low, second.high) == (200, 200, 200)


def test_a_p90_that_the_samples_do_not_support_is_not_drawn():
    report = simulated({1: 10.0, 4: 20.0}, runs=60, budget=30.0)
    assert throughput.p90s(report, "A") == []
    assert throughput.render(report) == throughput.render(report)


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (Noise(2, 2.1, 0.0, 0, 100), ["a load average of 2.1 on 2 processors"]),
        (Noise(2, 2.0, 0.0, 50, 100), []),
        (Noise(2, 0.0, 0.0, 51, 100), ["51 involuntary context switches in 100 turns"]),
        (Noise(2, None, None, None, 100), []),
    ],
)
def test_a_noisy_machine_is_called_noisy(noise, words):
    assert [doubt.startswith("the machine is noisy: ") for doubt in noise.doubts] == [True] * len(
        words
    )
    assert all(word in doubt for word, doubt in zip(words, noise.doubts, strict=True))


def test_each_figure_stands_beside_what_it_is():
    page = benching.to_markdown(simulated({1: 2.0, 4: 4.0}, budget=3.0, runs=700))
    for word in ("p50, p90, p99 and p99.9:", "far outside:", "images/s:", "load:", "knee:"):
        assert word in page
    for word in ("within the budget:", "timed outputs:", "governor not told", "A CPU"):
        assert word in page
    assert "needs 5,936 more" in page


def test_the_devices_own_times_stand_apart_and_are_compared_with_nothing():
    gpu = Gpu("A GPU", 3, (1500, 1700), (5000, 5000), (40, 60), (70.0, 210.0))
    own = Latency("A, CUDA events", 1, 1, 5, (1.0,) * 100)
    report = msgspec.structs.replace(simulated({1: 2.0}), on_device=(own,), gpu=gpu)
    page = benching.to_markdown(report)
    assert "## By the device's own clock" in page
    assert "A GPU: SM clock 1500 to 1700 MHz, memory clock 5000 to 5000 MHz" in page
    assert "by CUDA events:" in page
    assert report.comparisons == ()
    assert report.level == {1: ("A",)}
    found = json.loads(benching.to_json(report))
    assert found["on_device"][0]["p90_ms"] == 1.0
    assert found["gpu"]["sm_mhz"] == [1500, 1700]


def test_checks_that_were_not_made_are_no_verdict():
    assert (Checked().outputs, Checked().accuracy) == ("not checked", "not checked")
    assert Checked(timed=3, farthest=2e-3).outputs == "fail"
    assert simulated({1: 2.0}).verdict == "not checked"


# ── The command ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def command(tiny_model, monkeypatch):
    monkeypatch.setattr(candidates, "load_model", lambda name, **_: tiny_model)
    monkeypatch.setattr("exporter.bench.Timing", lambda **how: Timing(**how, settle_ms=0, warmup=1))

    def run(*args: str | Path):
        return CliRunner().invoke(main, ["bench", *map(str, args)])

    return run


def test_the_command_prints_json_and_writes_what_it_prints(bundle, command, tmp_path):
    out = tmp_path / "found"
    done = command(bundle, "--runtime", "ort-cpu", "--runs", "20", "--json", "--out", out)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((out / "bench.json").read_text("utf-8"))
    assert found["verdict"] == "pass"
    assert found["latency"][0]["intervals_ms"]["p50"][0] <= found["latency"][0]["p50_ms"]
    assert found["latency"][0]["missing"] == {"p90": 44, "p99": 642, "p99.9": 6616}
    assert found["comparisons"][0]["baseline"] == "fp32 on ort-cpu"
    assert (out / "bench.md").read_text("utf-8").startswith("# Bench: PASS\n")
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md"]


def test_several_batch_sizes_are_drawn_and_no_picture_of_other_figures_stays(
    bundle, command, tmp_path
):
    asked = (bundle, "--runtime", "ort-cpu", "--runs", "2", "--out", tmp_path)
    assert command(*asked, "--batch", "1,2", "--budget", "5").exit_code == 0
    assert "<svg" in (tmp_path / "throughput.svg").read_text("utf-8")
    assert "is in throughput.svg" in (tmp_path / "bench.md").read_text("utf-8")
    assert command(*asked, "--batch", "1").exit_code == 0
    assert not (tmp_path / "throughput.svg").exists()
    assert "throughput.svg" not in (tmp_path / "bench.md").read_text("utf-8")


def test_the_command_shows_the_tables_and_ends_with_one_where_it_was_not_real(
    bundle, command, monkeypatch
):
    done = command(bundle, "--runtime", "ort-cpu", "--runs", "2", "--budget", "5")
    assert done.exit_code == 0, done.stderr
    assert "fp16 on ort-cpu" in done.stdout
    assert done.stdout.rstrip().endswith("pass")
    monkeypatch.setattr(real, "distance", lambda want, got: 1.0)
    done = command(bundle, "--runtime", "ort-cpu", "--runs", "2")
    assert done.exit_code == 1
    assert "not real: fp32 on ort-cpu: a timed run's outputs are 1 from" in done.stdout


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ("--runtime ortcpu", 2, "no runtime named 'ortcpu'"),
        ("--threads 0", 2, "bench: threads must be 1 or more, found 0"),
        ("--threads=-2,1", 2, "bench: threads must be 1 or more, found -2"),
        ("--threads 1000", 2, "bench: threads may be 256 at most, found 1000"),
        ("--threads two", 2, "'two' is not a list of numbers"),
        ("--runs 0", 2, "bench: runs must be 2 or more, found 0"),
        ("--runs=-5", 2, "bench: runs must be 2 or more, found -5"),
        ("--seconds 0", 2, "bench: seconds must be above 0 and below 1e6, found 0"),
        ("--runs 5 --seconds 2", 2, "bench: need runs or seconds, found both"),
        ("--batch 0", 2, "bench: batch must be 1 or more, found 0"),
        ("--batch 1,1", 2, "bench: batch has a value twice: 1, 1"),
        ("--budget=-1", 2, "bench: budget must be above 0 and below 1e6, found -1"),
        ("--loads 0", 2, "bench: loads must be from 1 to 20, found 0"),
        ("--seed=-1", 2, "seed must be from 0"),
        ("--batch 4000000000", 5, "more than this machine's"),
        ("--out {bundle}", 5, "made is a bundle, and holds its own files alone"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(args, code, words, bundle, command):
    done = command(bundle, *args.format(bundle=bundle).split())
    assert done.exit_code == code, done.output
    assert words in done.stderr
    assert "Traceback" not in done.output


def test_what_is_no_bundle_is_refused(tmp_path, bench):
    with refused(InputRefused, "is not a bundle", hint=("--out",)):
        bench(tmp_path)


def test_a_bundle_that_lacks_a_file_is_refused(copied, bench):
    (copied / "tinymodel.fp16.onnx").unlink()
    with refused(InputRefused, "copy/tinymodel.fp16.onnx: the bundle lacks this file"):
        bench(copied)


@pytest.mark.parametrize("name", ["tinymodel.fp32.onnx", "report.json", "profile.toml"])
def test_a_bundle_with_an_altered_file_is_refused(name, copied, bench):
    with (copied / name).open("ab") as stream:
        stream.write(b"\n" if name != "tinymodel.fp32.onnx" else b"\0")
    with refused(InputRefused, f"copy/{name} is not the file that the manifest", hint=("anew",)):
        bench(copied)


def test_a_batch_that_a_graph_does_not_take_is_refused(copied, bench):
    path = copied / "tinymodel.fp32.onnx"
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, path)
    vouched(copied)
    with refused(InputRefused, "fp32 on ort-cpu does not take a batch of 1: "):
        bench(copied)


def test_a_batch_that_an_engine_was_not_built_for_is_refused(bundle, bench, monkeypatch):
    monkeypatch.setattr(TensorRtRtx, "missing", lambda self, action: None)
    asked = msgspec.structs.replace(ASKED, runtimes=("tensorrt-rtx",), batches=(1, 64))
    with refused(
        InputRefused,
        "fp32 on tensorrt-rtx takes batches of 1 to 8, and 64 was asked for",
        hint=("[batch]",),
    ):
        bench(bundle, asked=asked)


@pytest.mark.skipif(missing_gpu() is None, reason="there is a GPU")
def test_a_runtime_that_was_asked_for_and_cannot_run_is_refused(bundle, bench):
    asked = msgspec.structs.replace(ASKED, runtimes=("tensorrt-rtx",))
    with refused(RuntimeMissing, "the runtime 'tensorrt-rtx' cannot run here: ", hint=()):
        bench(bundle, asked=asked)


def test_threads_of_a_runtime_that_has_none_are_refused(bundle, bench, monkeypatch):
    monkeypatch.setattr("exporter.bench.options_of", lambda axis, name: ())
    with refused(ProfileError, "the runtime 'ort-cpu' has no threads to set", hint=None):
        bench(bundle, asked=msgspec.structs.replace(ASKED, threads=(1,)))


def test_an_unknown_runtime_names_the_nearest(bundle, bench):
    with refused(UnknownName, "no runtime named 'ort-cup'", hint=("ort-cpu",)):
        bench(bundle, asked=msgspec.structs.replace(ASKED, runtimes=("ort-cup",)))


def test_batches_beyond_the_memory_are_refused_before_anything_is_loaded(bundle, bench):
    with refused(OutOfMemory, "more than this machine's", hint=("--batch",)):
        bench(bundle, asked=msgspec.structs.replace(ASKED, batches=(10**10,)))


def test_loads_beyond_the_memory_are_refused(bundle, bench, monkeypatch):
    size = sum((bundle / f"tinymodel.{name}.onnx").stat().st_size for name in ("fp32", "fp16"))
    monkeypatch.setattr(environment, "memory_bytes", lambda: 2 * size)
    with refused(OutOfMemory, "5 loads of 2 files are", hint=("--loads",)):
        bench(bundle)


def test_a_request_reads_as_it_is_written():
    asked = read(BenchAsked, {"batches": [1, 8], "runs": 5}, where="bench")
    assert (asked.batches, asked.runs, asked.seconds) == ((1, 8), 5, None)


# ── The machine ─────────────────────────────────────────────────────────────────────


def test_instruction_sets_are_those_that_inference_uses():
    intel = "model name\t: A CPU\nflags\t\t: fpu sse2 sse4_2 avx2 avx512_vnni amx_int8 smep fma\n"
    arm = "Features\t: fp asimd asimddp crc32 i8mm sve bf16 sme\n"
    assert environment.instructions(intel) == "amx_int8 avx2 avx512_vnni fma sse4_2"
    assert environment.instructions(arm) == "asimd asimddp bf16 i8mm sme sve"
    assert environment.instructions("") == "not told"


def test_the_governor_is_each_that_a_processor_has(tmp_path):
    assert environment.governor(tmp_path) == "not told"
    for cpu, governor in (("cpu0", "powersave"), ("cpu1", "performance"), ("cpufreq", "no")):
        path = tmp_path / cpu / "cpufreq"
        path.mkdir(parents=True)
        (path / "scaling_governor").write_text(f"{governor}\n")
    assert environment.governor(tmp_path) == "performance, powersave"


def test_this_machine_says_what_it_is():
    found = environment.capture()
    assert found["instructions"]
    assert found["governor"]
    assert usable_cores() >= 1
    assert load_runtime("ort-cpu", {}).threads == 0


@pytest.mark.skipif(environment._processor_seconds() is None, reason="this system tells no times")
def test_what_a_child_took_is_no_other_process_load():
    before = environment._processor_seconds()
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert environment._processor_seconds()[2] - before[2] >= 0.4
