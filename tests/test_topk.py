"""The largest scores and their labels at the end of a graph: made, judged, wrong ones caught."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from conftest import HASTE, disturb, refused
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import exporter
from exporter.cli import main
from exporter.contracts import silent
from exporter.errors import GraphError, InputRefused, ProfileError
from exporter.graphs import as_shipped, export_source
from exporter.job import Job
from exporter.ladder import Asked, Ladder, Truth
from exporter.live import live_model
from exporter.parity import Firsts, compare_outputs
from exporter.plugins import load_runtime
from exporter.profile import load_profile
from exporter.records import Artefact, BenchAsked, Postprocess, TensorSpec, TopK
from exporter.runtimes.ort_cpu import OrtCpu
from exporter.topk import REACH, choose_top_k, see, with_top_k
from exporter.worst_case import Search

SHAPE, CLASSES, K = (1, 10, 10), 8, 3
TOP = TopK(TensorSpec("output", (CLASSES,)), K)
RNG = np.random.default_rng(0)


class Net(nn.Module):
    """Two convolutions with BatchNorm and eight classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.again, self.fc = nn.Conv2d(6, 12, 3, stride=2), nn.Linear(12, CLASSES)

    def forward(self, x):
        y = torch.relu(self.again(torch.relu(self.bn(self.conv(x)))))
        return self.fc(y.mean((2, 3)))


def inputs(count: int) -> np.ndarray:
    level = np.random.default_rng(1).normal(0, 1.5, (count, 1, 1, 10))
    noisy = level + np.random.default_rng(2).normal(0, 1, (count, *SHAPE))
    return noisy.astype(np.float32)


def make(*, near: bool = False) -> Net:
    """Return it with scores around zero, and with two classes that are nearly one if asked."""
    torch.manual_seed(3)
    net = disturb(Net()).eval()
    with torch.no_grad():
        x = torch.from_numpy(inputs(64))
        net.fc.weight *= 2 / net(x).std(dim=0)[:, None]
        net.fc.bias -= net(x).mean(dim=0)
        if near:
            net.fc.weight[7] = net.fc.weight[6]
            net.fc.bias[7] = net.fc.bias[6] * (1 + 2.0**-22)
    return net


def settings(**more):
    said = {
        "postprocess.top_k": K,
        "precision.fp32.tolerance": {"sqnr_db": 100, "agreement": 0.8},
        "precision.fp16.tolerance": {"sqnr_db": 45},
        "precision.int8.tolerance": {"sqnr_db": 15},
        "runtime.tensorrt-rtx.targets": ["sm86"],
    }
    quick = {**HASTE, "calibration.images": 32, "parity.random": 4}
    return load_profile("default", {**said, **quick, **more})


DATA = (inputs(160), np.arange(160) % CLASSES)


def scores(net: nn.Module, x: np.ndarray) -> np.ndarray:
    """Return what a network gives in float64."""
    with torch.no_grad():
        found = net.double()(torch.from_numpy(x).double()).numpy()
    net.float()
    return found


# ── How places are judged ───────────────────────────────────────────────────────────

SCORES = np.array([[0.0, 3.0, 1.0, 2.0], [5.0, 5.0, -1.0, 4.0]])
FOUR = TopK(TensorSpec("y", (4,)), 3)
RIGHT = {"y_values": [[3.0, 2.0, 1.0], [5.0, 5.0, 4.0]], "y_labels": [[1, 3, 2], [0, 1, 3]]}


def judged(**found):
    given = {name: np.array(value, np.float64) for name, value in {**RIGHT, **found}.items()}
    return see(FOUR, SCORES, given)


def test_places_have_what_is_farther_off_their_value_or_the_score_of_their_label():
    right = judged()
    assert right.want.tolist() == right.got.tolist() == RIGHT["y_values"]
    assert right.first_want.tolist() == right.first_got.tolist() == [1, 0]
    assert right.undecided.tolist() == [False, True]
    off = judged(y_values=[[3.5, 2.0, 1.0], [5.0, 5.0, 4.0]], y_labels=[[1, 2, 3], [1, 0, 2]])
    assert off.got.tolist() == [[3.5, 1.0, 2.0], [5.0, 5.0, -1.0]]
    assert off.first_got.tolist() == [1, 1]
    ranked = see(FOUR, SCORES, {"y": SCORES[:, ::-1]})
    assert ranked.got.tolist() == [[1.0, 0.0, 3.0], [-1.0, 4.0, 5.0]]


@pytest.mark.parametrize("k", [1, 3, 20])
def test_nothing_is_farther_off_than_the_scores_reach_however_many_are_nearly_equal(k):
    top = TopK(TensorSpec("y", (20,)), k)
    for seed in range(200):
        generator = np.random.default_rng(seed)
        r = generator.integers(0, 5, (6, 20)) + 1e-3 * generator.standard_normal((6, 20))
        y = r + 10.0 ** generator.uniform(-6, 0) * generator.standard_normal((6, 20))
        labels = np.argsort(-y, axis=1)[:, :k]
        values = np.take_along_axis(y, labels, axis=1)
        seen = see(top, r, {"y_values": values, "y_labels": labels.astype(float)})
        reach = np.linalg.norm(y - r) * (1 + 1e-12)
        assert np.linalg.norm(values - seen.want) <= reach
        assert np.linalg.norm(seen.got - seen.want) <= REACH * reach


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            [[1, 3, 4], [0, 1, 3]],
            "'y_labels' has the label 4 for sample 0, and there are 4 classes",
        ),
        ([[1, 3, 2], [0, -1, 3]], "'y_labels' has the label -1 for sample 1"),
        ([[1, 3, 2], [0, 1.5, 3]], "'y_labels' has the label 1.5 for sample 1"),
        ([[1, 3, 2], [0, 1, np.nan]], "'y_labels' has the label nan for sample 1"),
        ([[1, 3, 1], [0, 1, 3]], "'y_labels' has the label 1 twice for sample 0"),
        ([[1, 3], [0, 1]], "top-k of shape"),
    ],
)
def test_labels_that_are_no_classes_or_there_twice_are_refused(labels, said):
    with refused(GraphError, said, hint=None):
        judged(y_labels=labels)


def test_agreement_is_of_the_labels_and_not_of_the_first_place():
    want, got = (
        np.array([[3.0, 2.0], [5.0, 4.0], [2.0, 2.0]]),
        np.array([[3.0, 1.0], [1.0, 5.0]] * 2),
    )
    firsts = Firsts(np.array([4, 1, 0]), np.array([4, 2, 9]), np.array([False, False, True]))
    found = compare_outputs(
        want, got[:3], inputs="", labels=np.array([4, 1, 9]), has_classes=True, firsts=firsts
    )
    assert (found.agreeing, found.undecided, found.classes) == (1, 1, 3)
    assert (found.reference_correct, found.lost, found.gained) == (2, 1, 1)
    assert found.margin_used is None


# ── In a graph ──────────────────────────────────────────────────────────────────────


def graph(names: dict[str, str] | None = None) -> onnx.ModelProto:
    """Return y = x · w, of eight classes, with tensors called otherwise if asked."""
    name = {key: key for key in ("h", "w")} | (names or {})
    weights = np.random.default_rng(4).standard_normal((5, CLASSES)).astype(np.float32)
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Relu", ["x"], [name["h"]], "TopK"),
                helper.make_node("MatMul", [name["h"], name["w"]], ["output"], "m"),
            ],
            "main",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", CLASSES])],
            [numpy_helper.from_array(weights, name["w"])],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


@pytest.mark.parametrize(
    "names", [{}, {"h": "output_values", "w": "top_k"}, {"h": "top_k", "w": "output_labels"}]
)
def test_the_graph_gives_what_pytorch_gives_and_is_left_as_it_was(names):
    given = graph(names)
    before = given.SerializeToString()
    made = with_top_k(given, TOP)
    assert given.SerializeToString() == before
    onnx.checker.check_model(made, full_check=True)
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [(o.name, o.type, o.shape) for o in session.get_outputs()] == [
        ("output_values", "tensor(float)", ["batch", K]),
        ("output_labels", "tensor(int64)", ["batch", K]),
    ]
    x = RNG.standard_normal((7, 5)).astype(np.float32)
    values, labels = session.run(None, {"x": x})
    w = numpy_helper.to_array(given.graph.initializer[0])
    want = torch.from_numpy(np.maximum(x, 0).astype(np.float64) @ w).topk(K, dim=1)
    assert np.abs(values - want.values.numpy()).max() < 1e-5
    assert np.array_equal(labels, want.indices.numpy())


# ── What is judged through it ───────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return exporter.export(
        make(),
        torch.zeros(1, *SHAPE),
        out=tmp_path_factory.mktemp("topk") / "build",
        profile=settings(**{"postprocess.softmax": True}),
        data=DATA,
    )


def test_everything_is_judged_through_it(made):
    assert made.verdict == "pass"
    ran = [a for a in made.report.artefacts if not a.not_run]
    assert [a.name for a in ran] == [f"{p} on ort-cpu" for p in ("fp32", "fp16", "int8")]
    assert {(a.fidelity, a.quality) for a in ran} == {("pass", "pass")}
    assert {a.name for a in made.report.artefacts if a.refused} == set()
    samples = resolve().held_out
    want = torch.from_numpy(scores(make(), samples.inputs)).softmax(1)
    for artefact in ran:
        session = ort.InferenceSession(
            made.folder / f"net.{artefact.precision}.onnx", providers=["CPUExecutionProvider"]
        )
        assert [(o.name, o.type) for o in session.get_outputs()] == [
            ("output_values", "tensor(float)"),
            ("output_labels", "tensor(int64)"),
        ]
        values, labels = session.run(None, {session.get_inputs()[0].name: samples.inputs})
        assert labels.shape == (len(samples.inputs), K)
        parity = artefact.parity[0]
        assert parity.agreeing == int((labels[:, 0] == want.argmax(1).numpy()).sum())
        correct = parity.reference_correct - parity.lost + parity.gained
        assert correct == int((labels[:, 0] == samples.labels).sum())
        error = np.linalg.norm(values - want.topk(K).values.numpy())
        loss = np.linalg.norm(
            np.take_along_axis(want.numpy(), labels, 1) - want.topk(K).values.numpy()
        )
        size = float(want.topk(K).values.norm())
        assert max(error, loss) / size <= parity.rel_l2 * (1 + 1e-6)
        assert parity.rel_l2 <= np.hypot(error, loss) / size * (1 + 1e-6)


def test_precisions_leave_it_alone(made):
    for precision in ("fp32", "fp16", "int8"):
        nodes = onnx.load(made.folder / f"net.{precision}.onnx").graph.node
        (ranking,) = (node for node in nodes if node.op_type == "TopK")
        assert ranking is nodes[-1] or ranking == nodes[-1]
        assert list(ranking.output) == ["output_values", "output_labels"]
        assert {a.name: a.i for a in ranking.attribute} == {"axis": 1}


def test_the_record_says_what_is_given_in_place_of_what(made):
    source = made.report.source
    assert source.outputs == (TOP.scores,)
    assert source.top_k == TOP
    assert source.graph_outputs == (
        TensorSpec("output_values", (K,)),
        TensorSpec("output_labels", (K,), "int64"),
    )
    page = (made.folder / "report.md").read_text("utf-8")
    gives = (
        "outputs output\\_values N×3, output\\_labels N×3 (the 3 largest of 8 of output, labels "
    )
    assert gives in page
    assert "PyTorch eager, fp32" in {latency.name for latency in made.report.latency}


def test_engines_are_built_with_it(made):
    if load_runtime("tensorrt-rtx", {}).missing("build"):
        pytest.skip("TensorRT-RTX is not there to build")
    built = [a for a in made.report.artefacts if a.runtime == "tensorrt-rtx"]
    assert [a.refused for a in built] == [None] * 3
    assert all((made.folder / a.file.name).stat().st_size > 0 for a in built)


def test_a_bundle_is_compared_again_and_timed(made):
    again = exporter.check_bundle(made.folder, model=make(), data=DATA)
    assert again.verdict == "pass"
    assert [a.parity for a in again.artefacts] == [a.parity for a in made.report.artefacts]
    asked = BenchAsked(runtimes=("ort-cpu",), batches=(2,), runs=4, loads=1)
    report = exporter.bench_bundles([made.folder], asked, data=DATA)
    assert {(t.checked.outputs, t.checked.accuracy) for t in report.timed} == {("pass", "pass")}
    before = {a.name: a.parity[0] for a in made.report.artefacts if a.parity}
    for one in report.timed:
        was = before[one.name]
        assert one.checked.correct == was.reference_correct - was.lost + was.gained


def test_worst_cases_are_refused(made):
    again = exporter.check_bundle(made.folder, model=make(), data=DATA, search=Search(steps=1))
    said = [a.refused for a in again.artefacts if not a.not_run]
    assert all("found by gradients, and labels have none" in (reason or "") for reason in said)


def judged_on_top_k(folder: Path, runtime: str) -> None:
    """Export for a runtime, which must compute the graph, labels in INT64 and all."""
    profile = msgspec.structs.replace(settings(), runtime={runtime: {}})
    made = exporter.export(
        make(),
        torch.zeros(1, *SHAPE),
        out=folder / "b",
        profile=profile.only(("fp32",)),
        data=DATA,
    )
    (artefact,) = made.report.artefacts
    assert (artefact.refused, artefact.fidelity, artefact.quality) == (None, "pass", "pass")
    with load_runtime(runtime, {}).open(made.folder / artefact.file.name) as session:
        x = inputs(3)
        bound = session.bind({"input": x})
        bound()
        for found in (session({"input": x}), bound.outputs()):
            want = torch.from_numpy(scores(make(), x)).topk(K, dim=1)
            assert found["output_labels"].shape == (3, K)
            assert found["output_labels"].dtype.kind == "i"
            assert np.abs(found["output_values"] - want.values.numpy()).max() < 1e-5


@pytest.mark.parametrize("runtime", ["torch-eager", "torch-compile"])
def test_pytorch_as_a_runtime_ranks_too(runtime, tmp_path):
    if reason := load_runtime(runtime, {}).missing("run"):
        pytest.skip(reason)
    judged_on_top_k(tmp_path, runtime)


def test_an_onnx_file_is_started_from(tmp_path):
    path = tmp_path / "net.onnx"
    torch.onnx.export(
        make(), (torch.zeros(2, *SHAPE),), path, dynamo=True, input_names=["x"],
        output_names=["y"], dynamic_shapes=({0: "batch"},), opset_version=20,
    )  # fmt: skip
    report = exporter.run(path, settings().only(("fp32", "int8")), tmp_path / "out", data=DATA)
    assert [spec.name for spec in report.source.graph_outputs] == ["y_values", "y_labels"]
    assert {a.fidelity for a in report.artefacts if not a.not_run} == {"pass"}
    again = exporter.check_bundle(tmp_path / "out", model=path, data=DATA)
    assert [a.parity for a in again.artefacts] == [a.parity for a in report.artefacts]


class WithMap(Net):
    """It gives the map before its classes as well."""

    def forward(self, x):
        y = torch.relu(self.again(torch.relu(self.bn(self.conv(x)))))
        return {"label": self.fc(y.mean((2, 3))), "map": y}


def test_a_map_beside_a_classification_is_given_as_it_is(tmp_path):
    net = WithMap().eval()
    net.load_state_dict(make().state_dict())
    made = exporter.export(
        net,
        torch.zeros(1, *SHAPE),
        out=tmp_path / "b",
        profile=settings().only(("fp32", "int8")),
        data=DATA,
    )
    given = made.report.source.graph_outputs
    assert [spec.name for spec in given] == ["label_values", "label_labels", "map"]
    ran = [a for a in made.report.artefacts if not a.not_run]
    assert {a.fidelity for a in ran} == {"pass"}
    assert [p.output for p in ran[0].parity] == ["label", "map"] * 2
    assert ran[0].parity[0].agreement > 0.9
    assert ran[0].parity[1].agreement is None


# ── Wrong ones are caught, and near ties are not ────────────────────────────────────


def resolve(*, near: bool = False) -> Job:
    return Job.resolve(
        live_model(make(near=near), SHAPE, name="net"),
        settings(),
        weights=None,
        input_shape=None,
        calibration=None,
        data=DATA,
        progress=silent,
        builds=False,
    )


@pytest.fixture(scope="module")
def ladder(tmp_path_factory) -> Ladder:
    job = resolve(near=True)
    folded = job.start.fold(job.example())
    path = export_source(job, folded, tmp_path_factory.mktemp("ladder") / "a.onnx").path
    graph = as_shipped(job, onnx.load(path))
    return Ladder(job, Truth.compute(job, folded), Asked.of(job, graph, "fp32"))


class Altered:
    """A session whose outputs are changed."""

    def __init__(self, session, change) -> None:
        self.session, self.change = session, change
        self.threads = session.threads

    def __call__(self, feed):
        found = {name: value.copy() for name, value in self.session(feed).items()}
        self.change(found)
        return found


def judge(ladder: Ladder, folder: Path, change=lambda found: None, edit=lambda graph: None):
    model = onnx.ModelProto()
    model.CopyFrom(ladder.source.model)
    edit(model.graph)
    path = folder / "model.onnx"
    onnx.save(model, path)
    runtime = OrtCpu(threads=1)
    with runtime.open(path) as session:
        artefact = Artefact("fp32", "ort-cpu", None)
        return ladder.judge(artefact, runtime, path, Altered(session, change), ladder.source)


def swapped(one: int, other: int):
    """Take one class for another wherever it is among the first."""

    def change(found):
        labels = found["output_labels"]
        found["output_labels"] = np.select([labels == one, labels == other], [other, one], labels)

    return change


def test_the_rungs_above_are_faithful(ladder):
    single, folded = ladder.first_rungs()
    assert folded.fidelity.verdict == "pass"
    assert (single.flips_top, folded.flips_top) == (0, 0)
    assert 0 < folded.error_top < 1e-5


def test_labels_of_scores_that_are_nearly_equal_may_stand_either_way(ladder, tmp_path):
    truth = ladder.truth.held_out["output"]
    near = np.abs(truth[:, 6] - truth[:, 7])
    assert 0 < near.min() <= near.max() < 1e-6
    assert (np.argsort(-truth, axis=1)[:, :K] == 7).any()
    for change in (lambda found: None, swapped(6, 7)):
        found = judge(ladder, tmp_path, change)
        assert (found.fidelity, found.parity[0].failures) == ("pass", ())


def rolled(found) -> None:
    found["output_labels"] = (found["output_labels"] + 1) % CLASSES


def reversed_labels(found) -> None:
    found["output_labels"] = found["output_labels"][:, ::-1].copy()


def reversed_both(found) -> None:
    for name in ("output_values", "output_labels"):
        found[name] = found[name][:, ::-1].copy()


def one_label(found) -> None:
    labels = found["output_labels"]
    labels[0, 2] = next(c for c in range(CLASSES - 1, -1, -1) if c not in labels[0])


def of_next_sample(found) -> None:
    found["output_labels"] = np.roll(found["output_labels"], 1, axis=0)


def scaled_values(found) -> None:
    found["output_values"] *= np.float32(1 + 1e-3)


@pytest.mark.parametrize(
    "change",
    [
        rolled,
        reversed_labels,
        reversed_both,
        one_label,
        of_next_sample,
        scaled_values,
        swapped(0, 1),
    ],
)
def test_wrong_labels_and_values_are_not_the_graph_that_was_asked_for(change, ladder, tmp_path):
    found = judge(ladder, tmp_path, change)
    assert found.fidelity == "fail"
    assert found.rung.fidelity.error > 10 * 4 * found.rung.fidelity.floor


def test_labels_that_are_none_fail_their_artefact_with_what_they_are(ladder, tmp_path):
    def beyond(found) -> None:
        found["output_labels"] += 1

    with refused(GraphError, "'output_labels' has the label 8 for sample ", hint=None):
        judge(ladder, tmp_path, beyond)


def ranking(graph) -> onnx.NodeProto:
    return next(node for node in graph.node if node.op_type == "TopK")


def smallest(graph) -> None:
    ranking(graph).attribute.append(helper.make_attribute("largest", 0))


def negated(graph) -> None:
    node = ranking(graph)
    graph.node.insert(len(graph.node) - 1, helper.make_node("Neg", [node.input[0]], ["n"], "neg"))
    ranking(graph).input[0] = "n"


def rounded(graph) -> None:
    """Rank the scores as halves."""
    node = ranking(graph)
    for name, source, kind in (("half", node.input[0], 10), ("single", "half", 1)):
        cast = helper.make_node("Cast", [source], [name], name, to=kind)
        graph.node.insert(len(graph.node) - 1, cast)
    ranking(graph).input[0] = "single"


@pytest.mark.parametrize("edit", [smallest, negated, rounded])
def test_a_graph_that_ranks_otherwise_is_caught(edit, ladder, tmp_path):
    assert judge(ladder, tmp_path, edit=edit).fidelity == "fail"


# ── What is refused ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", [0, -1, 3841])
def test_a_k_that_no_runtime_takes_is_refused_with_the_range(k):
    with refused(ProfileError, f"top_k must be from 1 to 3840, found {k}", hint=None):
        load_profile("default", {"postprocess.top_k": k})


@pytest.mark.parametrize(
    ("inputs", "outputs", "k", "said", "hint"),
    [
        ((), (("y", (4,)),), 5, "postprocess.top_k is 5, and 'y' has 4 classes", "at most 4"),
        ((), (("y", (4, 8, 8)),), 2, "(N, classes), and the network gives N × 4 × 8 × 8", "leave"),
        ((), (("a", (4,)), ("b", (9,))), 2, "the network gives N × 4 and N × 9", "leave it out"),
        ((), (("y", (4,)), ("y_labels", (4, 4))), 2, "would give 'y_labels'", "another key"),
        ((("y_values", (1, 8, 8)),), (("y", (4,)),), 2, "would give 'y_values'", "another key"),
    ],
)  # fmt: skip
def test_what_has_no_top_k_is_refused_in_one_sentence(inputs, outputs, k, said, hint):
    takes, gives = ([TensorSpec(*one) for one in side] for side in (inputs, outputs))
    with refused(InputRefused, said, hint=(hint,)):
        choose_top_k(takes, gives, Postprocess(top_k=k))
    assert choose_top_k(takes, gives, Postprocess()) is None


def test_the_command_refuses_before_any_work(tmp_path):
    out = str(tmp_path / "out")
    done = CliRunner().invoke(main, ["--set", "postprocess.top_k=11", "--out", out])
    assert done.exit_code == 3
    assert "postprocess.top_k is 11, and 'logits' has 10 classes\nHint: at most 10" in done.stderr
    assert not (tmp_path / "out").exists()
