"""Artefacts with one thing wrong: the ladder fails them, names the layer, and says what it is."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from conftest import TinyModel, disturb, refused
from quantisation import PLAIN
from safetensors.torch import save_file
from torch import nn

from exporter.calibration import calibrate
from exporter.contracts import Converted, Plugin, silent
from exporter.errors import BuildError, GraphError
from exporter.fold import fold_batchnorm
from exporter.graphs import convert_all, export_source
from exporter.job import Job
from exporter.ladder import FOLDED, Asked, Ladder, Truth
from exporter.plugins import load_precision
from exporter.profile import load_profile
from exporter.records import Artefact, BatchRange, TensorSpec
from exporter.runtimes.ort_cpu import OrtCpu
from exporter.samples import feeds
from exporter.to_onnx import export_onnx

TOP, PYTORCH = "PyTorch float64", "PyTorch float32"
QUICK = {"parity.random": 8, "calibration.images": 16, "batch.max": 8}
GRAPHS = ("fp32", "fp16", "int8", "int8 in fp16", "int8 plain", "int8 plain in fp16")
NAME = {name: name.split()[0] for name in GRAPHS}


def resolve(model, **overrides) -> Job:
    return Job.resolve(
        model,
        load_profile("default", {**QUICK, **overrides}),
        weights=None,
        input_shape=None,
        calibration=None,
        progress=silent,
        builds=False,
    )


def ladder_of(job: Job, folder: Path) -> Ladder:
    folded = job.start.fold(job.example())
    path = export_source(job, folded, folder / "a.onnx").path
    return Ladder(job, Truth.compute(job, folded), Asked.of(job, onnx.load(path), "fp32"))


def test_any_number_of_noise_samples_is_compared(tiny_model, tmp_path):
    job = resolve(tiny_model, **{"parity.random": 1})
    folded = ladder_of(job, tmp_path).first_rungs()[1]
    assert folded.fidelity.samples == 9
    assert folded.fidelity.verdict == "pass"


@pytest.fixture(scope="module")
def ladder(tiny_model, tmp_path_factory) -> Ladder:
    return ladder_of(resolve(tiny_model), tmp_path_factory.mktemp("ladder"))


@pytest.fixture(scope="module")
def made(ladder) -> dict[str, Converted]:
    """The graph in each precision, and in INT8 with halves around it."""
    job, graph = ladder.job, ladder.source.model
    made = dict(convert_all(job, graph))
    statistics = calibrate(graph, feeds(job.calibration.inputs, "input", size=1))
    around = load_precision("int8", {"around": "fp16"})
    plain = load_precision("int8", PLAIN)
    made["int8 plain"] = plain.convert(graph, statistics, job.calibration.inputs)
    made["int8 in fp16"] = around.convert(graph, statistics, job.calibration.inputs)
    both = load_precision("int8", PLAIN | {"around": "fp16"})
    made["int8 plain in fp16"] = both.convert(graph, statistics, job.calibration.inputs)
    return made


@pytest.fixture(scope="module")
def asked(ladder, made) -> dict[str, Asked]:
    """What was asked for, emulated."""
    return {name: ladder.ask(found.model, NAME[name]) for name, found in made.items()}


@pytest.fixture
def judge(ladder, asked, tmp_path):
    """Judge a graph as what was asked for in a precision."""

    def judged(name: str, model: onnx.ModelProto, runtime=OrtCpu(threads=1), by=ladder) -> Artefact:  # noqa: B008 - frozen
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        artefact = Artefact(NAME[name], "ort-cpu", None)
        wanted = asked[name] if by is ladder else by.source
        with runtime.open(path) as session:
            return by.judge(artefact, runtime, path, session, wanted)

    return judged


def copy(asked: Asked) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(asked.model)
    return model


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def tensor_of(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def rewrite(model: onnx.ModelProto, name: str, change) -> None:
    """Replace a constant by what ``change`` makes of it, in the type that it has."""
    tensor = tensor_of(model, name)
    value = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(value.copy()).astype(value.dtype), name))


def set_ints(node: onnx.NodeProto, key: str, values: list[int]) -> None:
    (attribute,) = [a for a in node.attribute if a.name == key]
    attribute.ints[:] = values


def is_wrong(artefact: Artefact, layer: str, *words: str) -> None:
    """It fails, the first layer beyond the limit is this one, and the cause says the words."""
    fidelity = artefact.rung.fidelity
    assert fidelity.verdict == artefact.verdict == "fail"
    assert fidelity.first is not None
    assert fidelity.first.layer == layer
    for word in words:
        assert word in (fidelity.cause or "")
    assert any(f"it leaves the graph at {layer} (" in said for said in artefact.failures)
    assert fidelity.cause in artefact.failures


# ── What is right ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAME)
def test_what_was_asked_for_passes_in_every_layer(judge, asked, name):
    rung = judge(name, asked[name].model).rung
    fidelity = rung.fidelity
    assert fidelity.verdict == "pass"
    assert fidelity.first is fidelity.cause is fidelity.unseen is None
    assert fidelity.layers >= len(asked[name].model.graph.node) - 2  # shapes are no floats
    assert 0 < fidelity.multiple < 2
    assert fidelity.samples == 12
    assert rung.samples == 360


def test_figures_of_a_rung_follow_from_its_outputs(judge, ladder, asked):
    judge("fp32", asked["fp32"].model)
    rung = judge("int8", asked["int8"].model).rung
    rungs = ("int8 on ort-cpu", "fp32 on ort-cpu", TOP)
    got, over, top = (ladder.outputs[name]["logits"] for name in rungs)
    assert rung.above == "fp32 on ort-cpu"
    assert rung.error_above == pytest.approx(np.linalg.norm(got - over) / np.linalg.norm(over))
    assert rung.error_top == pytest.approx(np.linalg.norm(got - top) / np.linalg.norm(top))
    assert rung.flips_top == (got.argmax(1) != top.argmax(1)).sum()


def test_the_rungs_in_pytorch_are_its_own_error_and_the_fold(ladder, tiny_module):
    single, folded = ladder.first_rungs()
    assert (single.name, single.above, single.fidelity) == (PYTORCH, TOP, None)
    assert (folded.name, folded.above, folded.fidelity.verdict) == (FOLDED, PYTORCH, "pass")
    x = torch.from_numpy(ladder.job.held_out.inputs)
    with torch.inference_mode():
        want = tiny_module.double()(x.double()).numpy()
        got = tiny_module.float()(x).numpy()
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert single.error_top == single.error_above == pytest.approx(error, rel=0.5)


def test_a_fold_that_is_wrong_fails_before_anything_is_exported(ladder):
    off = tuple({"logits": part["logits"] * (1 + 1e-4)} for part in ladder.truth.folded)
    truth = dataclasses.replace(ladder.truth, folded=off)
    wrong = Ladder(ladder.job, truth, ladder.source)
    assert wrong.first_rungs()[1].fidelity.verdict == "fail"


def test_addends_may_change_places(judge, asked):
    file = copy(asked["fp32"])
    add = node_of(file, "block3.0/Add")
    add.input[:] = reversed(add.input)
    assert judge("fp32", file).rung.fidelity.verdict == "pass"


def test_each_weighted_layer_has_its_own_loss(ladder, asked, made):
    weighted = [n.name for n in ladder.source.model.graph.node if n.op_type in ("Conv", "Gemm")]
    assert ladder.losses(ladder.source, Converted(ladder.source.model)) == ()
    for name in ("fp16", "int8", "int8 in fp16", "int8 plain"):
        losses = ladder.losses(asked[name], made[name])
        assert [loss.layer for loss in losses] == weighted
        # a corrected bias makes up for errors before its layer, which are not there on their own
        assert all(loss.multiple < (4 if name in ("fp16", "int8 plain") else 8) for loss in losses)
    int8 = ladder.losses(asked["int8"], made["int8"])
    assert max(loss.relative for loss in int8) > 1e-3


def test_a_scale_that_clips_most_values_is_a_loss_in_its_layer(ladder, asked, made):
    file = copy(asked["int8"])
    rewrite(file, "relu_1_scale", lambda scale: scale / 20)
    losses = ladder.losses(Asked.of(ladder.job, file, "int8"), made["int8"])
    beyond = [loss.layer for loss in losses if loss.exceeds(4.0)]
    assert beyond == ["block2.0.conv2"]


def test_a_layer_without_emulation_is_not_checked_and_says_which(ladder, judge):
    file = copy(ladder.source)
    node_of(file, "block2.0.relu/Relu").op_type = "Asinh"
    unseen = Asked.of(ladder.job, file, "fp32")
    said = "'block2.0.relu/Relu': the operator Asinh has no emulation"
    assert (unseen.emulator, unseen.unseen) == (None, said)
    found = judge("fp32", ladder.source.model, by=Ladder(ladder.job, ladder.truth, unseen))
    assert (found.rung.fidelity.verdict, found.rung.fidelity.unseen) == ("not checked", said)
    assert ladder.losses(unseen, Converted(file)) == ()


@pytest.mark.parametrize("sizes", [(1, 1, 2), (9, 10, 12)])
def test_a_batch_range_without_eight_is_kept_to(tiny_model, ladder, asked, tmp_path, sizes):
    batch = dict(zip(("batch.min", "batch.opt", "batch.max"), sizes, strict=True))
    job = resolve(tiny_model, **batch, **{"timing.batches": [sizes[0]]})
    narrow = Ladder(job, ladder.truth, ladder.source)
    seen = []

    class Noting(OrtCpu, frozen=True):
        @contextmanager
        def open(self, path):
            with OrtCpu.open(self, path) as session:
                yield lambda feed: (seen.append(len(feed["input"])), session(feed))[1]

    path = tmp_path / "a.onnx"
    onnx.save(ladder.source.model, path)
    runtime = Noting(threads=1)
    with runtime.open(path) as session:
        found = narrow.judge(
            Artefact("fp32", "ort-cpu", None), runtime, path, session, ladder.source
        )
    assert found.rung.fidelity.verdict == "pass"
    assert found.rung.fidelity.layers > 15
    assert set(seen) <= set(range(sizes[0], sizes[2] + 1))


# ── What is wrong ───────────────────────────────────────────────────────────────────


def scaled(channel: int, factor: float):
    def change(value: np.ndarray) -> np.ndarray:
        value[channel] = value[channel] * factor
        return value

    return change


@pytest.mark.parametrize(
    ("layer", "channel"), [("block2.0.conv1", 3), ("block3.0.conv3", 15), ("block4.2", 9)]
)
def test_the_weights_of_one_channel(judge, asked, layer, channel):
    file = copy(asked["fp32"])
    rewrite(file, f"{layer}.weight", scaled(channel, 1.0001))
    found = judge("fp32", file)
    is_wrong(found, layer, f"{layer!r} has another '{layer}.weight'", f"in channel {channel} of ")
    assert found.rung.fidelity.first.detail.startswith(f"channel {channel} of ")


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_a_bias_that_is_lost(judge, asked, name):
    file = copy(asked[name])
    del node_of(file, "block3.0.conv2").input[2]
    is_wrong(judge(name, file), "block3.0.conv2", "reads 2 tensors where 3 were asked for")


def test_another_stride(judge, asked):
    file = copy(asked["fp32"])
    pool = node_of(file, "block1.3/MaxPool")
    set_ints(pool, "strides", [1, 1])
    found = judge("fp32", file)
    is_wrong(found, "block1.3", "has strides [1, 1] where [2, 2] was asked for")
    assert " where " in found.rung.fidelity.first.detail


def test_a_stride_with_which_the_graph_cannot_run_is_refused_in_a_sentence(judge, asked):
    file = copy(asked["fp32"])
    set_ints(node_of(file, "block3.0.conv3"), "strides", [1, 1])
    with refused(BuildError, "onnxruntime "):
        judge("fp32", file)


def test_a_relu_that_is_gone(judge, asked):
    file = copy(asked["fp32"])
    node_of(file, "block3.0.conv2").input[0] = node_of(file, "block3.0.relu/Relu").input[0]
    is_wrong(judge("fp32", file), "block3.0.conv2", "reads 'conv2d_3' where 'relu_3' was asked for")


def test_a_relu_with_another_function(judge, asked):
    file = copy(asked["fp32"])
    node_of(file, "block3.0.relu/Relu").op_type = "Elu"
    is_wrong(judge("fp32", file), "block3.0.relu", "is Elu where Relu was asked for")


@pytest.mark.parametrize("name", ["input_scale", "relu_1_scale", "block3.0.conv1.weight_scale"])
def test_a_scale_off_by_a_hundredth(judge, asked, name):
    file = copy(asked["int8"])
    rewrite(file, name, lambda scale: scale * np.float32(1.01))
    layer = {"input_scale": "block1.0", "relu_1_scale": "block2.0.conv2"}.get(
        name, "block3.0.conv1"
    )
    is_wrong(judge("int8", file), layer, f"has another {name!r} than was asked for")


def test_a_zero_point_of_1(judge, asked):
    file = copy(asked["int8"])
    rewrite(file, "relu_1_zero", lambda zero: zero + 1)
    is_wrong(judge("int8", file), "block2.0.conv2", "has another 'relu_1_zero'")


def test_a_zero_point_of_1_at_one_end_alone(judge, asked):
    file = copy(asked["int8"])
    file.graph.initializer.append(onnx.numpy_helper.from_array(np.int8(1), "off"))
    node_of(file, "relu_1_padded_1_1_1_1/DequantizeLinear").input[2] = "off"
    is_wrong(judge("int8", file), "block2.0.conv2", "has another 'relu_1_zero'")


def test_half_weights_that_went_through_bfloat16(judge, asked):
    file = copy(asked["fp16"])

    def shortened(value: np.ndarray) -> np.ndarray:
        return torch.from_numpy(value.astype(np.float32)).bfloat16().float().numpy()

    rewrite(file, "block2.0.conv1.weight", shortened)
    is_wrong(judge("fp16", file), "block2.0.conv1", "has another 'block2.0.conv1.weight'")


def test_a_batchnorm_with_another_epsilon(judge, asked, tiny_module, tmp_path):
    module = deepcopy(tiny_module)
    module.get_submodule("block3.0.bn1").eps = 1e-4
    other = export_onnx(
        fold_batchnorm(module).module, tmp_path / "other.onnx",
        input=TinyModel.input, output=TinyModel.output, batch=BatchRange(1, 8, 8),
    )  # fmt: skip
    is_wrong(judge("fp32", onnx.load(other.path)), "block3.0.conv1", "'block3.0.conv1.weight'")


def test_an_output_of_another_length_is_refused_before_it_is_compared(ladder, asked, tmp_path):
    file = copy(asked["fp32"])
    for name in ("block4.2.weight", "block4.2.bias"):
        tensor = tensor_of(file, name)
        value = onnx.numpy_helper.to_array(tensor)[:9]
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    file.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "c"
    path = tmp_path / "a.onnx"
    onnx.save(file, path)
    runtime = OrtCpu(threads=1)
    with runtime.open(path) as session, refused(GraphError, "9", "10"):
        ladder.judge(Artefact("fp32", "ort-cpu", None), runtime, path, session, asked["fp32"])


class Unguarded(OrtCpu, frozen=True):
    """ONNX Runtime with its default optimisations also where a scale is half."""

    def _session_options(self, path):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        return options


def test_a_runtime_that_computes_otherwise_than_the_file_reads(judge, asked):
    """With its pairs optimised, ONNX Runtime is wrong for half scales: see `exporter.runtimes`."""
    name = "int8 plain in fp16"
    right = judge(name, asked[name].model)
    assert right.rung.fidelity.verdict == "pass"
    wrong = judge(name, asked[name].model, Unguarded(threads=1))
    fidelity = wrong.rung.fidelity
    assert (fidelity.verdict, wrong.verdict) == ("fail", "fail")
    assert fidelity.first is not None or "each layer is right" in fidelity.cause


class Fused(OrtCpu, frozen=True):
    """A runtime whose optimisations are wrong where no tensor inside is read out."""

    @contextmanager
    def open(self, path):
        with OrtCpu.open(self, path) as session:

            def run(feed):
                found = dict(session(feed))
                if len(found) == 1:
                    found["logits"] = found["logits"] * np.float32(1.001)
                return found

            yield run


def test_where_each_layer_by_itself_is_right_the_runtime_is_to_blame(judge, asked):
    found = judge("fp32", asked["fp32"].model, Fused(threads=1))
    fidelity = found.rung.fidelity
    assert (fidelity.verdict, fidelity.first) == ("fail", None)
    assert fidelity.layers > 15
    assert fidelity.cause == (
        "with every tensor read out each layer is right, so it is what the runtime makes of the "
        "graph as a whole"
    )
    assert fidelity.cause in found.failures


def test_an_engine_is_judged_by_its_outputs_alone(ladder, asked, tmp_path):
    """Its file is no ONNX; what it computes is ONNX Runtime's here."""
    graph = tmp_path / "graph.onnx"
    onnx.save(asked["fp16"].model, graph)
    runtime = OrtCpu(threads=1)
    plan = tmp_path / "model.fp16.engine"
    ladder.outputs["fp16 on ort-cpu"] = ladder.outputs[TOP]
    with runtime.open(graph) as session:
        found = ladder.judge(
            Artefact("fp16", "tensorrt", None), runtime, plan, session, asked["fp16"]
        )
    fidelity = found.rung.fidelity
    assert (fidelity.verdict, fidelity.layers) == ("pass", 0)
    assert fidelity.unseen == "an engine gives its outputs alone"
    assert found.rung.above == "fp16 on ort-cpu"


# ── A network with differences and joins ────────────────────────────────────────────


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        one, two = self.norm(self.one(x)), self.two(x)
        both = torch.cat([one - two, two], dim=1)
        return self.last(both.relu().mean(dim=(2, 3)))


class BranchesModel(Plugin, frozen=True):
    """Two branches, their difference, and a join."""

    input: ClassVar[TensorSpec] = TensorSpec("input", (1, 8, 8))
    output: ClassVar[TensorSpec] = TensorSpec("logits", (10,))
    data: ClassVar[str] = "digits"
    weights: ClassVar[Path]

    def module(self) -> nn.Module:
        torch.manual_seed(1)
        return Branches().eval()


@pytest.fixture(scope="module")
def branches(tmp_path_factory) -> Ladder:
    folder = tmp_path_factory.mktemp("branches")
    BranchesModel.weights = folder / "branches.safetensors"
    save_file(disturb(BranchesModel().module()).state_dict(), BranchesModel.weights)
    return ladder_of(resolve(BranchesModel()), folder)


@pytest.mark.parametrize("op", ["Sub", "Concat"])
def test_inputs_that_changed_places(judge, branches, op):
    assert judge("fp32", branches.source.model, by=branches).rung.fidelity.verdict == "pass"
    file = copy(branches.source)
    (node,) = [node for node in file.graph.node if node.op_type == op]
    node.input[:] = reversed(node.input)
    found = judge("fp32", file, by=branches)
    is_wrong(found, node.name.partition("/")[0], "reads ", " was asked for")
    assert found.rung.fidelity.first.op == op


# ── Whose fault it is ───────────────────────────────────────────────────────────────


def test_a_layer_that_the_exporter_wrote_wrongly_is_its_fault_and_not_the_runtimes(
    tiny_model, tmp_path
):
    """Then the file is what was asked for, and what was asked for is not the network."""
    job = resolve(tiny_model)
    folded = job.start.fold(job.example())
    path = tmp_path / "a.onnx"
    export_source(job, folded, path)
    graph = onnx.load(path)
    weight = next(t for t in graph.graph.initializer if t.name == "block2.0.conv2.weight")
    flipped = onnx.numpy_helper.to_array(weight)[:, :, ::-1, ::-1].copy()
    weight.CopyFrom(onnx.numpy_helper.from_array(flipped, weight.name))
    onnx.save(graph, path)
    asked = Asked.of(job, graph, "fp32")
    wrong = Ladder(job, Truth.compute(job, folded), asked)
    runtime = OrtCpu(threads=1)
    with runtime.open(path) as session:
        artefact = wrong.judge(Artefact("fp32", "ort-cpu", None), runtime, path, session, asked)
    fidelity = artefact.rung.fidelity
    assert (fidelity.verdict, fidelity.first) == ("fail", None)
    assert fidelity.cause == (
        "torch.onnx wrote 'block2.0.conv2' as something else than the folded network has"
    )
