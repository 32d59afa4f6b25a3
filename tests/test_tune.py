"""The search for a mixture: on a network whose one layer is planted to be ruined by quantising."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import matplotlib as mpl
import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from conftest import HASTE, TinyModel, refused
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

import exporter
from exporter import network, plugins
from exporter.cli import main
from exporter.contracts import Converted, Plugin
from exporter.errors import (
    GraphError,
    InputRefused,
    OutputError,
    ProfileError,
    RuntimeMissing,
    UnknownName,
)
from exporter.fold import fold_batchnorm
from exporter.parity import compare_outputs
from exporter.profile import Profile, load_profile
from exporter.records import Budget, Candidate, Latency, TuneReport
from exporter.renderers import pareto
from exporter.runtimes.ort_cpu import OrtCpu
from exporter.samples import digits
from exporter.tune import loop, tune_model
from exporter.tune.bench import FEW, Bench
from exporter.tune.state import State

PLANTED = "block3.0.conv2"
LEVELS = {PLANTED: 1}  # of magnitude; all other layers have 127
QUICK = {**HASTE, "timing.runs": 5, "timing.warmup": 1, "parity.random": 4}


class Planted(Plugin, frozen=True):
    """Weights rounded to so many levels, the planted layer's to almost none."""

    keep: tuple[str, ...] = ()

    needs_calibration: ClassVar[bool] = True

    def convert(self, model: Any, statistics: Any, samples: Any, **more: Any) -> Converted:
        made = onnx.ModelProto()
        made.CopyFrom(model)
        weights = {tensor.name: tensor for tensor in made.graph.initializer}
        pairs = []
        for node in made.graph.node:
            if node.op_type == "Conv" and node.name not in self.keep:
                name = node.input[1]
                values, scale = rounded(numpy_helper.to_array(weights[name]), node.name)
                made.graph.initializer.remove(weights[name])
                made.graph.initializer.extend(
                    numpy_helper.from_array(part, f"{name}_{suffix}")
                    for part, suffix in ((values, "q"), (scale, "s"))
                )
                pairs.append(
                    helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s"], [f"{name}_d"])
                )
                node.input[1] = f"{name}_d"
        nodes = [
            *pairs,
            *(onnx.NodeProto.FromString(n.SerializeToString()) for n in made.graph.node),
        ]
        del made.graph.node[:]
        made.graph.node.extend(nodes)
        return Converted(made)


def rounded(weights: np.ndarray, layer: str) -> tuple[np.ndarray, np.ndarray]:
    scale = np.float32(np.abs(weights).max() / LEVELS.get(layer, 127))
    return np.rint(weights / scale).astype(np.int8), np.array(scale)


def plant(patch: pytest.MonkeyPatch) -> None:
    """Let int8 be `Planted`."""
    real = plugins._plugin
    patch.setattr(
        plugins,
        "_plugin",
        lambda axis, name: Planted if (axis, name) == ("precisions", "int8") else real(axis, name),
    )


@pytest.fixture
def planted(monkeypatch) -> None:
    plant(monkeypatch)


@pytest.fixture
def profile() -> Profile:
    return load_profile("default", QUICK)


@pytest.fixture(scope="module")
def weights(tiny_module, tmp_path_factory) -> Path:
    """The tiny network's, with logits around zero, so that it tells the digits apart."""
    state = {key: value.clone() for key, value in tiny_module.float().state_dict().items()}
    with torch.inference_mode():
        inputs = torch.from_numpy(digits(TinyModel.input.shape, "train").inputs[:64])
        state["block4.2.bias"] -= tiny_module(inputs).mean(dim=0)
    path = tmp_path_factory.mktemp("tune") / "centred.safetensors"
    save_file(state, path)
    return path


@pytest.fixture
def search(tiny_model, weights, profile, tmp_path):
    """Search in a folder with a budget."""

    def searched(folder: str = "tune", *, profile=profile, **asked: Any) -> TuneReport:
        limits = {k: asked.pop(k) for k in tuple(asked) if k in Budget.__struct_fields__}
        options = {"weights": weights, "validation": 40, **asked}
        return tune_model(tiny_model, profile, tmp_path / folder, Budget(**limits), **options)

    return searched


class Searched(NamedTuple):
    """A search that ended, its bench, the graphs it made, and its folder."""

    report: TuneReport
    bench: Bench
    graphs: dict[str, bytes]
    folder: Path


@pytest.fixture(scope="module")
def found(tiny_model, weights, tmp_path_factory) -> Searched:
    folder = tmp_path_factory.mktemp("found") / "tune"
    benches: list[Bench] = []
    graphs: dict[str, bytes] = {}
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        patch.setattr(Bench, "layers", spied(Bench.layers, benches.append))
        patch.setattr(
            State,
            "finish",
            spied(
                State.finish,
                lambda state: graphs.update(
                    {f"candidates/{p.name}": p.read_bytes() for p in state.graphs().iterdir()}
                ),
            ),
        )
        report = tune_model(
            tiny_model,
            load_profile("default", QUICK),
            folder,
            Budget(objective="size", min_sqnr=1.0),
            weights=weights,
            validation=40,
        )
    return Searched(report, *benches, graphs, folder)


def spied(function: Any, tell: Any) -> Any:
    def call(self: Any, *args: Any, **more: Any) -> Any:
        tell(self)
        return function(self, *args, **more)

    return call


def sqnr(report: TuneReport, name: str) -> float:
    return next(c.sqnr_db for c in report.candidates if c.name == name)


# ── What it finds ───────────────────────────────────────────────────────────────────


def test_a_layer_that_quantising_ruins_is_found_and_kept(planted, search):
    two = only("fp32", "int8")
    first = search(objective="size", min_sqnr=1.0, profile=two)
    worst, second = sorted(first.sensitivities, key=lambda s: s.sqnr_db)[:2]
    assert worst.layer == PLANTED
    assert worst.sqnr_db < second.sqnr_db - 10
    floor = sqnr(first, "int8 keeping 1 light") - 1
    assert sqnr(first, "int8 keeping none") < floor - 10
    report = search(objective="size", min_sqnr=floor, profile=two)
    assert report.choice == "int8 keeping 1 light"
    assert report.chosen.keep == (PLANTED,)
    assert report.verdict == "pass"


def test_a_sensitivity_is_what_pytorch_gives_with_that_layers_weights_rounded(
    found, tiny_model, weights
):
    inputs = torch.from_numpy(validation_inputs(calibrated=16)[:FEW]).double()
    module = tiny_model.module()
    module.load_state_dict(load_file(weights))
    for sensitivity in found.report.sensitivities:
        folded = fold_batchnorm(module).module.double()
        with torch.inference_mode():
            want = folded(inputs)
            layer = folded.get_submodule(sensitivity.layer)
            values, scale = rounded(layer.weight.numpy().astype(np.float32), sensitivity.layer)
            layer.weight.data = torch.from_numpy(values).double() * float(scale)
            got = folded(inputs)
        error = float((got - want).norm() / want.norm())
        assert sensitivity.rel_l2 == pytest.approx(error, rel=0.01), sensitivity.layer


def test_of_several_outputs_the_one_that_loses_most_decides(planted, monkeypatch, tmp_path):
    monkeypatch.setitem(LEVELS, "lateral", 1)  # of the map p1 alone
    model = exporter.load_factory("several:make", {"name": "Pyramid"}, input_shape=(1, 16, 16))
    asked = load_profile("default", {**QUICK, "model.args.name": "Pyramid"}).only(("fp32", "int8"))

    def searched(min_sqnr: float) -> TuneReport:
        budget = Budget(objective="size", min_sqnr=min_sqnr)
        options = {"weights": "factory", "validation": 40}
        return tune_model(model, asked, tmp_path / "tune", budget, **options)

    first = searched(1.0)
    training = digits((1, 16, 16), "train").inputs
    order = np.random.RandomState(0).permutation(len(training))
    inputs = torch.from_numpy(training[order[16:][:FEW]]).double()
    for sensitivity in first.sensitivities:
        folded = fold_batchnorm(model.module()).module.double()
        with torch.inference_mode():
            want = folded(inputs)
            layer = folded.get_submodule(sensitivity.layer)
            values, scale = rounded(layer.weight.numpy().astype(np.float32), sensitivity.layer)
            layer.weight.data = torch.from_numpy(values).double() * float(scale)
            got = folded(inputs)
        errors = {key: float((got[key] - want[key]).norm() / want[key].norm()) for key in want}
        assert sensitivity.rel_l2 == pytest.approx(max(errors.values()), rel=0.01)
        assert sensitivity.output == max(errors, key=errors.__getitem__)
    floor = sqnr(first, "int8 keeping 1 light") - 0.5
    none = next(c for c in first.candidates if c.name == "int8 keeping none")
    by_output = {parity.output: parity.sqnr_db for parity in none.parity}
    assert none.sqnr_db == by_output["p1"] < floor < by_output["p2"]
    report = searched(floor)
    assert report.chosen.keep == ("lateral",)
    assert [parity.output for parity in report.confirmation] == ["p1", "p2"]
    assert all(parity.tolerance.sqnr_db == floor for parity in report.confirmation)
    assert report.verdict == "pass"
    page = (tmp_path / "tune/tune.md").read_text("utf-8")
    assert "the budget speaks of 'p1' and 'p2' alike" in page
    assert f"| {none.name} | {none.sqnr_db:.1f} dB, p1 |" in page
    assert load_profile(tmp_path / "tune/tuned.toml").precision["int8"].options["keep"] == [
        "lateral"
    ]


def test_one_output_beyond_the_budget_misses_it_on_the_evaluation_samples_too():
    good, bad = (
        compare_outputs(np.eye(4), np.eye(4) * (1 + error), inputs="samples", output=name)
        for name, error in (("near", 1e-3), ("far", 1e-1))
    )
    found = Candidate("one", "int8", (), parity=(good, bad))
    assert (found.worst.output, round(found.sqnr_db)) == ("far", 20)
    assert found.is_good_enough(Budget(min_sqnr=19.0))
    assert not found.is_good_enough(Budget(min_sqnr=21.0))
    lost = msgspec.structs.replace(good, output="gone", rel_l2=None, nonfinite_candidate=1)
    found = Candidate("two", "int8", (), parity=(bad, lost))
    assert (found.worst.output, found.sqnr_db) == ("gone", None)
    assert not found.is_good_enough(Budget(min_sqnr=0.1))


def validation_inputs(*, calibrated: int) -> np.ndarray:
    """The training digits behind those that calibration draws."""
    training = digits(TinyModel.input.shape, "train").inputs
    return training[np.random.RandomState(0).permutation(len(training))[calibrated:]]


def test_candidates_are_validated_on_training_images_that_are_not_calibrated_on(found):
    bench = found.bench
    known = {sample.tobytes() for sample in bench.job.calibration.inputs}
    known |= {sample.tobytes() for sample in bench.job.held_out.inputs}
    training = digits(TinyModel.input.shape, "train")
    labelled = {x.tobytes(): y for x, y in zip(training.inputs, training.labels, strict=True)}
    assert len(bench.validation.inputs) == 40
    for sample, label in zip(bench.validation.inputs, bench.validation.labels, strict=True):
        assert sample.tobytes() not in known
        assert labelled[sample.tobytes()] == label


def test_what_a_candidate_shows_is_recomputed_from_its_graph(found, weights):
    module = TinyModel().module()
    module.load_state_dict(load_file(weights))
    inputs = validation_inputs(calibrated=16)[:40]
    with torch.inference_mode():
        want = module.double()(torch.from_numpy(inputs).double()).numpy()
    for candidate in found.report.candidates:
        data = found.graphs[candidate.file.name]
        assert len(data) == candidate.file.size
        run = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
        got = run.run(None, {"input": inputs})[0].astype(np.float64)
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert [parity.samples for parity in candidate.parity] == [40]
        assert candidate.sqnr_db == pytest.approx(-20 * np.log10(error), abs=0.5)


def test_keeping_every_layer_of_a_mixture_around_fp32_is_fp32_and_is_not_timed_twice(found):
    report = found.report
    every = next(c for c in report.candidates if c.name == "int8 keeping all")
    assert (every.same_as, every.latency) == ("fp32", None)
    assert sum(c.latency is not None for c in report.candidates) == len(report.candidates) - 1


def test_a_budget_that_nothing_keeps_is_said_with_the_nearest_and_no_profile_is_left(
    planted, search, tmp_path
):
    assert search(objective="size", min_sqnr=1.0).choice
    assert (tmp_path / "tune/tuned.toml").is_file()
    report = search(objective="size", min_sqnr=300.0)
    assert (report.verdict, report.choice, report.nearest) == ("fail", None, "fp32")
    assert report.confirmation == ()
    assert not (tmp_path / "tune/tuned.toml").exists()
    page = (tmp_path / "tune/tune.md").read_text("utf-8")
    assert page.startswith("# tinymodel, tuned: FAIL\n")
    assert "no candidate keeps the budget" in page
    assert "the nearest is fp32: 1" in page


def test_a_drop_that_the_samples_are_too_few_for_says_how_many_would_do(planted, search):
    report = search(objective="size", max_drop=0.002, profile=only("fp32", "int8"))
    chosen, (found,) = report.chosen, report.confirmation
    assert chosen.accuracy_drop <= 0.002
    assert found.samples == 360
    if not (found.lost or found.gained):
        assert report.verdict == "not enough evidence"
        assert "0.2% would need 1,497 samples without one lost" in found.unproven[0]
    else:
        assert report.verdict in ("fail", "not enough evidence")


def only(*precisions: str) -> Profile:
    return load_profile("default", QUICK).only(precisions)


def test_latencies_are_of_one_run_in_which_all_candidates_take_turns(planted, search, monkeypatch):
    rounds = []
    real = loop.measure_latency
    monkeypatch.setattr(
        loop,
        "measure_latency",
        lambda sessions, *args, **more: (
            rounds.append(list(sessions)) or real(sessions, *args, **more)
        ),
    )
    report = search(objective="latency", min_sqnr=1.0)
    assert len(rounds) == 1
    assert rounds[0] == [c.name for c in report.candidates if c.latency]
    assert all(len(c.latency.samples_ms) == 5 for c in report.candidates if c.latency)


def test_latencies_that_never_became_steady_are_in_doubt():
    a, b = (Latency(n, 1, 1, 48, (1.0,) * 20, steady=n == "B") for n in "AB")
    (said,) = loop._unsteady((a, b))
    assert said == (
        "the latency of 1 of 2 candidates was still changing after 48 warm-up rounds, say that of A"
    )


# ── It goes on where it stopped ─────────────────────────────────────────────────────


def stopping(function: Any, calls: list[Any], after: int) -> Any:
    def call(self: Any, *args: Any) -> Any:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args[0])
        return function(self, *args)

    return call


def figures_of(report: TuneReport) -> Any:
    """All of a report that does not depend on the clock."""
    return (
        report.sensitivities,
        tuple(msgspec.structs.replace(c, latency=None) for c in report.candidates),
        report.choice,
        report.confirmation,
    )


@pytest.mark.parametrize(
    ("method", "after"), [("sensitivity", 0), ("sensitivity", 2), ("_compared", 3)]
)
def test_an_interrupted_search_goes_on_and_computes_nothing_twice(
    planted, search, found, monkeypatch, method, after
):
    whole = found.report
    done: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(Bench, method, stopping(getattr(Bench, method), done, after))
        with pytest.raises(KeyboardInterrupt):
            search("tune", objective="size", min_sqnr=1.0)
    again: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(Bench, method, stopping(getattr(Bench, method), again, -1))
        report = search("tune", objective="size", min_sqnr=1.0)
    assert len(done) == after
    total = len(whole.sensitivities)
    if method == "_compared":
        total = sum(c.same_as is None for c in whole.candidates)
    assert len(again) == total - after
    assert figures_of(report) == figures_of(whole)


def test_another_budget_uses_what_was_measured(planted, search, monkeypatch):
    first = search(objective="size", min_sqnr=1.0)
    calls: list[Any] = []
    with monkeypatch.context() as patch:
        for name in ("sensitivity", "_compared"):
            patch.setattr(Bench, name, stopping(getattr(Bench, name), calls, -1))
        report = search(objective="size", min_sqnr=2.0)
    assert calls == []
    assert figures_of(report)[:3] == figures_of(first)[:3]
    assert all(c.latency for c in report.candidates if not c.same_as)


def test_candidates_of_another_order_are_told_apart(planted, search):
    search(objective="size", min_sqnr=1.0)
    report = search(objective="latency", min_sqnr=1.0)
    assert len({c.name for c in report.candidates}) == len(report.candidates)
    assert len({(c.precision, c.keep) for c in report.candidates}) == len(report.candidates)
    fresh = search("fresh", objective="latency", min_sqnr=1.0)
    assert [(c.name, c.keep, c.parity) for c in report.candidates] == [
        (c.name, c.keep, c.parity) for c in fresh.candidates
    ]


def test_a_search_made_with_something_else_is_refused_by_name_and_can_begin_anew(
    planted, search, tmp_path, tiny_model
):
    search(objective="size", min_sqnr=1.0)
    before = (tmp_path / "tune/tune-state.json").read_bytes()
    with refused(InputRefused, "'tune'", "another weights and another graph", hint=("--restart",)):
        search(objective="size", min_sqnr=1.0, weights=TinyModel.weights)
    with refused(InputRefused, "another calibration data", hint=("--restart",)):
        images = validation_inputs(calibrated=100)[:16]
        search(objective="size", min_sqnr=1.0, calibration=images)
    with refused(InputRefused, "another profile", hint=("--restart",)):
        more = {**QUICK, "runtime.ort-cpu.threads": 2}
        search(objective="size", min_sqnr=1.0, profile=load_profile("default", more))
    assert (tmp_path / "tune/tune-state.json").read_bytes() == before
    report = search(objective="size", min_sqnr=1.0, weights=TinyModel.weights, restart=True)
    assert report.source.weights == TinyModel.weights.name
    assert (tmp_path / "tune/tune-state.json").read_bytes() != before


@pytest.mark.parametrize("text", ["", "{", '{"schema": 99, "made_with": {}}', "[]"])
def test_a_state_that_cannot_be_read_is_refused(planted, search, tmp_path, text):
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune/tune-state.json").write_text(text, "utf-8")
    with refused(InputRefused, "tune/tune-state.json", hint=("--restart",)):
        search(objective="size", min_sqnr=1.0)


def test_a_graph_that_comes_out_otherwise_than_before_is_refused(planted, search, tmp_path):
    search(objective="size", min_sqnr=1.0)
    path = tmp_path / "tune/tune-state.json"
    state = json.loads(path.read_text("utf-8"))
    for candidate in state["candidates"]:
        candidate["file"]["sha256"] = "0" * 64
    path.write_text(json.dumps(state), "utf-8")
    with refused(GraphError, "did not come out as it did before", hint=("--restart",)):
        search(objective="size", min_sqnr=1.0)


# ── The profile ─────────────────────────────────────────────────────────────────────


def test_the_profile_that_is_written_makes_the_chosen_graph_byte_for_byte(
    search, tiny_model, weights, tmp_path
):
    two = only("fp32", "int8")
    floor = sqnr(search(objective="size", min_sqnr=1.0, profile=two), "int8 keeping none")
    report = search(objective="size", min_sqnr=floor + 1e-9, profile=two)
    assert report.chosen.precision == "int8"
    assert len(report.chosen.keep) >= 1
    profile = load_profile(tmp_path / "tune/tuned.toml")
    assert profile.precision["int8"].options["keep"] == list(report.chosen.keep)
    assert profile.only(("fp32",)) == only("fp32")
    exporter.run(tiny_model, profile.only(("int8",)), tmp_path / "bundle", weights=weights)
    made = (tmp_path / "bundle/tinymodel.int8.onnx").read_bytes()
    assert (hashlib.sha256(made).hexdigest(), len(made)) == (
        report.chosen.file.sha256,
        report.chosen.file.size,
    )


def test_the_profile_of_a_float_choice_has_that_precision_alone(planted, search, tmp_path):
    floor = sqnr(search(min_sqnr=1.0), "fp32") - 1
    report = search(min_sqnr=floor)
    assert report.choice == "fp32"
    again = load_profile(tmp_path / "tune/tuned.toml")
    assert again == only("fp32")


def test_a_search_is_by_the_scores_with_a_top_k_or_without(planted, search, tmp_path):
    ranked = load_profile("default", {**QUICK, "postprocess.top_k": 3}).only(("fp32", "int8"))
    with_it = search("ranked", profile=ranked, objective="size", min_sqnr=1.0)
    without = search(profile=only("fp32", "int8"), objective="size", min_sqnr=1.0)
    assert [(c.name, c.parity) for c in with_it.candidates] == [
        (c.name, c.parity) for c in without.candidates
    ]
    assert load_profile(tmp_path / "ranked/tuned.toml").postprocess.top_k == 3


def test_layers_that_the_profile_keeps_stay_kept_and_are_not_searched(planted, search):
    kept = load_profile("default", {**QUICK, "precision.int8.options.keep": ["block2.0.conv1"]})
    report = search(objective="size", min_sqnr=1.0, profile=kept)
    assert "block2.0.conv1" not in {s.layer for s in report.sensitivities}
    assert all("block2.0.conv1" in c.keep for c in report.candidates if c.keep is not None)


def test_only_the_results_are_left_and_the_picture_is_the_same_each_time(found):
    report = found.report
    left = {path.name for path in found.folder.iterdir()}
    assert left == {"tune-state.json", "tune.json", "tune.md", "tuned.toml", "pareto.svg"}
    drawn = (found.folder / "pareto.svg").read_text("utf-8")
    assert drawn == pareto.render(report)
    assert drawn == pareto.render(msgspec.json.decode(msgspec.json.encode(report), type=TuneReport))
    with mpl.rc_context({"svg.hashsalt": "mine", "font.size": 30, "axes.grid": True}):
        assert drawn == pareto.render(report)  # whatever a user has set
    assert "dc:date" not in drawn
    for label in (">fp32<", ">none<", "SQNR on validation samples, dB"):
        assert label in drawn


def test_the_record_reads_back_and_has_the_figures_that_follow(found):
    report = found.report
    text = (found.folder / "tune.json").read_text("utf-8")
    assert msgspec.json.decode(text, type=TuneReport) == report
    table = json.loads(text)
    assert table["verdict"] == report.verdict
    for candidate, entry in zip(report.candidates, table["candidates"], strict=True):
        assert entry["sqnr_db"] == pytest.approx(candidate.sqnr_db)


# ── What is refused ─────────────────────────────────────────────────────────────────


def test_a_profile_without_the_precision_or_one_that_keeps_nothing_is_refused(search):
    with refused(ProfileError, "[precision.int8]", hint=("fp16",)):
        search(min_sqnr=1.0, profile=only("fp32", "fp16"))
    with refused(ProfileError, "fp32 has no option 'keep'", hint=None):
        search(min_sqnr=1.0, precision="fp32")


def test_a_runtime_that_is_unknown_or_cannot_run_here_is_refused(search, monkeypatch):
    with refused(UnknownName, "no runtime in the profile named 'ort-gpu'", hint=("ort-cpu",)):
        search(min_sqnr=1.0, runtime="ort-gpu")
    monkeypatch.setattr(OrtCpu, "missing", lambda self, action: "no such thing")
    with refused(RuntimeMissing, "ort-cpu: no such thing", hint=("doctor",)):
        search(min_sqnr=1.0, runtime="ort-cpu")


def test_too_few_training_images_are_refused(search):
    greedy = load_profile("default", {**QUICK, "calibration.images": 1430})
    with refused(InputRefused, "7 of the 1437 train digits are left", hint=("calibration.images",)):
        search(min_sqnr=1.0, profile=greedy)


@pytest.mark.parametrize("name", ["x" * 300, "file/below"])
def test_a_folder_that_cannot_be_is_refused_before_any_work(search, tmp_path, name):
    (tmp_path / "file").write_text("", "utf-8")
    with refused(OutputError, "cannot write"):
        search(name, min_sqnr=1.0)


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(search, tmp_path):
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune/thesis.tex").write_text("years of work", "utf-8")
    for restart in (False, True):
        with refused(OutputError, "tune' holds files", "'thesis.tex'", hint=("--out",)):
            search(min_sqnr=1.0, restart=restart)
    assert [path.name for path in (tmp_path / "tune").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("", "utf-8")
    with refused(OutputError, "file' is not a folder"):
        search("file", min_sqnr=1.0)


# ── The command ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def command(planted, tiny_model, weights, monkeypatch):
    """Call the command on the tiny network, under the built-in's name."""
    monkeypatch.setattr(network, "load_model", lambda name, **_: tiny_model)

    def called(*args: str) -> Any:
        settings = [part for k, v in QUICK.items() for part in ("--set", f"{k}={v}")]
        options = ("--weights", str(weights), "--validation", "40", *settings)
        return CliRunner().invoke(main, ["tune", "resnet18", *options, *args])

    return called


def test_the_command_shows_the_candidates_the_choice_and_where_the_profile_is(command, tmp_path):
    out = tmp_path / "out"
    done = command("--min-sqnr", "30", "--objective", "size", "-o", str(out))
    report = msgspec.json.decode((out / "tune.json").read_bytes(), type=TuneReport)
    assert done.exit_code == (0 if report.verdict == "pass" else 1), done.output
    assert f"most sensitive by themselves: {PLANTED}" in done.stdout
    assert f"{report.choice} (the choice)" in done.stdout
    assert f"profile: {out / 'tuned.toml'}" in done.stdout.replace("\n", "")
    assert "quantise each of" in done.stderr
    assert f"resnet-export {exporter.__version__} tune" in (out / "tuned.toml").read_text("utf-8")


def test_the_command_exits_1_where_nothing_keeps_the_budget(command, tmp_path):
    done = command("--min-sqnr", "300", "-o", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert "no candidate keeps the budget: the least latency with an SQNR of at least 300 dB" in (
        done.stdout
    )
    assert "the nearest is fp32" in done.stdout


def test_an_interrupted_command_exits_130_and_says_that_it_goes_on(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop = spied(Bench.sensitivity, lambda bench: os.kill(os.getpid(), signal.SIGINT))
        patch.setattr(Bench, "sensitivity", stop)
        done = command("--min-sqnr", "1", "-o", str(tmp_path / "out"))
    assert done.exit_code == 130
    assert "Interrupted: the same command goes on where it stopped." in done.stderr
    assert (tmp_path / "out/tune-state.json").is_file()
    assert command("--min-sqnr", "1", "-o", str(tmp_path / "out")).exit_code in (0, 1)
    assert (tmp_path / "out/tuned.toml").is_file()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--max-drop 0.2", "'0.2' is not a percentage such as 0.2%"),
        ("--max-drop -1%", "'-1%' is not a percentage such as 0.2%"),
        ("--max-drop 0%", "max_drop must be above 0 and finite, found 0"),
        ("--max-drop 200%", "max_drop is a share from 0 to 1, found 2"),
        ("--min-sqnr=-3", "min_sqnr must be above 0 and finite, found -3"),
        ("--min-sqnr nan", "min_sqnr must be above 0 and finite, found nan"),
        ("--max-drop 1% --min-sqnr 40", "two budgets for one thing: choose one"),
        ("", "the objective latency needs a budget: max_drop or min_sqnr"),
        ("--objective sqnr", "the objective sqnr needs max_latency or max_size"),
        ("--objective sped --min-sqnr 4", "objective: 'sped' is not allowed"),
        ("--min-sqnr 40 --runtime ort-gpu", "no runtime in the profile named 'ort-gpu'"),
        ("--min-sqnr 40 --precision int4", "the profile has no table [precision.int4]"),
        ("--min-sqnr 40 --precision fp32", "fp32 has no option 'keep'"),
        ("--min-sqnr 40 --minutes nan", "minutes must be 0 or more and finite, found nan"),
    ],
)
def test_a_bad_budget_gets_one_sentence_and_exit_code_2(tmp_path, args, said):
    done = CliRunner().invoke(main, ["tune", *args.split(), "-o", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()
