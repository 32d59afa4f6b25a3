"""ONNX files of several inputs, of several outputs, and of maps, where a run starts."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import several
import torch
from click.testing import CliRunner
from conftest import HASTY, refused
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info
from test_start_file import profile
from test_start_layers import PROFILE, apart, bn, norm, started, values

import exporter
from exporter.cli import main
from exporter.contracts import inputs_of, outputs_of
from exporter.errors import InputRefused
from exporter.outputs import flatten
from exporter.packing import pack
from exporter.recheck import check_bundle
from exporter.start.file import OnnxFile
from exporter.worst_case import Search

NETS = {
    "Nested": {"x": (1, 16, 16)},
    "Pyramid": {"x": (1, 16, 16)},
    "Segments": {"x": (1, 16, 16)},
    "Twice": {"x": (1, 16, 16)},
    "Pair": {"picture": (1, 16, 16), "flow": (2, 6, 6)},
    "Siamese": {"left": (1, 16, 16), "right": (1, 16, 16)},
}
GIVES = {
    "Nested": {"a": (10,), "b": (4,), "map": (8, 8, 8)},
    "Pyramid": {"p1": (4, 8, 8), "p2": (4, 4, 4)},
    "Segments": {"mask": (3, 16, 16)},
    "Twice": {"once": (10,), "twice": (10,), "same": (1, 16, 16)},
    "Pair": {"scores": (5,)},
    "Siamese": {"label": (10,), "apart": (1,)},
}


def exported(name: str, path: Path, *, by: str = "dynamo", free: bool = True) -> Path:
    """Write one of `several`'s networks with its BatchNorms left in."""
    shapes = NETS[name]
    module = several.make(name)
    batch = {"dynamic_axes": {one: {0: "n"} for one in shapes}} if by == "torchscript" else {}
    if by == "dynamo" and free:
        batch = {"dynamic_shapes": tuple({0: "n"} for _ in shapes)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(torch.zeros(2, *shape) for shape in shapes.values()),
            path,
            dynamo=by == "dynamo",
            input_names=list(shapes),
            output_names=list(GIVES[name]),
            opset_version=18 if by == "dynamo" else 14,
            external_data=False,
            verbose=False,
            **({"optimize": False} if by == "dynamo" else {"training": _PRESERVE}),
            **(batch if free else {}),
        )
    return path


_PRESERVE = torch.onnx.TrainingMode.PRESERVE


def drawn(name: str, count: int = 5) -> dict[str, np.ndarray]:
    """Return samples whose scale is another for each input."""
    generator = np.random.default_rng(0)
    return {
        own: ((i + 1) * generator.standard_normal((count, *shape))).astype(np.float32)
        for i, (own, shape) in enumerate(NETS[name].items())
    }


def in_pytorch(name: str, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what the network gives in float64, by the names that its file has."""
    with torch.inference_mode():
        module = several.make(name).double()
        found = flatten(module(*(torch.from_numpy(value).double() for value in feed.values())))
    return dict(zip(GIVES[name], (y.numpy() for y in found.values()), strict=True))


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


# ── What a file is made into ────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "by"),
    [
        *((name, "dynamo") for name in NETS if name != "Twice"),  # which torch.onnx names alike
        *((name, "torchscript") for name in NETS if name != "Pair"),  # whose scale it has as input
    ],
)
def test_the_truth_and_the_folded_graph_are_what_the_network_was(name, by, tmp_path):
    path = exported(name, tmp_path / "n.onnx", by=by)
    chosen = OnnxFile.choose(path, PROFILE, None, None)
    assert {spec.name: spec.shape for spec in inputs_of(chosen.model)} == NETS[name]
    assert {spec.name: spec.shape for spec in outputs_of(chosen.model)} == GIVES[name]
    start = chosen.start(None, inputs_of(chosen.model), PROFILE)
    feed = drawn(name)
    want = in_pytorch(name, feed)
    got = start.double()(feed)
    assert list(got) == list(want)
    made = start.fold(tuple(torch.from_numpy(value[:2]) for value in feed.values()))
    norms = [m for m in several.make(name).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(made.fates) >= len(norms) > 0
    assert all(fate.folded for fate in made.fates) is (name != "Siamese")
    onnx.checker.check_model(made.model, full_check=True)
    ran = run(made.model, feed)
    for own, right in want.items():
        assert apart(got[own], right) < 1e-9, own  # ONNX stores ε in float32
        assert apart(ran[own], right) < 3e-6, own


@pytest.mark.parametrize("name", ["Pyramid", "Pair"])
def test_a_fixed_batch_axis_is_freed_for_every_input_and_output(name, tmp_path):
    path = exported(name, tmp_path / "n.onnx", free=False)
    start = start_at(path)
    assert "its batch axis of 2 freed" in start.origin[1].changes
    feed = drawn(name, 7)
    for own, right in in_pytorch(name, feed).items():
        assert apart(start.double()(feed)[own], right) < 1e-9, own


def start_at(path: Path, shape=None):
    chosen = OnnxFile.choose(path, PROFILE, shape, None)
    return chosen.start(None, inputs_of(chosen.model), PROFILE)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    return exported("Pair", tmp_path_factory.mktemp("pair") / "pair.onnx")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    np.savez(folder / "Pair.npz", **drawn("Pair", 48))
    np.save(folder / "Pyramid.npy", drawn("Pyramid", 48)["x"])
    return {"Pair": folder / "Pair.npz", "Pyramid": folder / "Pyramid.npy"}


LOOSE = {
    "precision.fp32.tolerance": {"sqnr_db": 100.0},
    "precision.fp16.tolerance": {"sqnr_db": 40.0},
    "precision.int8.tolerance": {"sqnr_db": 10.0},
}


@pytest.mark.parametrize("name", ["Pair", "Pyramid"])
def test_a_bundle_is_made_in_every_precision_and_checked_with_its_file_again(name, data, tmp_path):
    path, out = exported(name, tmp_path / "net.onnx"), tmp_path / "out"
    asked = profile("fp32", "fp16", "int8", **LOOSE)
    report = exporter.run(path, asked, out, data=data[name])
    assert {spec.name: spec.shape for spec in report.source.inputs} == NETS[name]
    assert {spec.name: spec.shape for spec in report.source.outputs} == GIVES[name]
    assert [(a.name, a.fidelity) for a in report.artefacts] == [
        (f"{precision} on ort-cpu", "pass") for precision in ("fp32", "fp16", "int8")
    ]
    assert all(artefact.failures == () for artefact in report.artefacts)
    feed = drawn(name)
    want = in_pytorch(name, feed)
    for precision, bound in (("fp32", 3e-6), ("fp16", 3e-3), ("int8", 0.3)):
        got = run(onnx.load(out / f"net.{precision}.onnx"), feed)
        assert all(apart(got[own], right) < bound for own, right in want.items()), precision
    judged = {(p.output or next(iter(want))) for p in report.pytorch}
    assert judged == set(want)
    again = check_bundle(out, model=path, data=data[name], search=Search(steps=1, lanes=2))
    assert [a.parity for a in again.artefacts] == [a.parity for a in report.artefacts]
    assert again.failures == ()
    if name == "Pair":
        worst = np.load(out / again.worst_cases[0].file)
        assert {own: worst[own].shape[1:] for own in worst} == NETS[name]


def test_the_worst_output_of_several_tells_a_file_whose_emulation_is_wrong(tmp_path, monkeypatch):
    from exporter.emulation import OPERATORS

    path = exported("Pyramid", tmp_path / "n.onnx")
    monkeypatch.setitem(OPERATORS, "Resize", lambda _, x, *__: x.repeat(1, 1, 2, 2))
    with refused(InputRefused, "n.onnx: ONNX Runtime does not compute what its operators mean"):
        start_at(path)


# ── Inputs by name ──────────────────────────────────────────────────────────────────


def two_inputs(path: Path, *, batches=("N", "N"), second=(3, "h", "w")) -> Path:
    """Write y = mean of a convolution of ``a`` and of ``b:0`` in it."""
    nodes = [
        make_node("Conv", ["a", "w"], ["c"], "conv"),
        bn("c", "n"),
        make_node("GlobalAveragePool", ["n"], ["p"], "pool"),
        make_node("Flatten", ["p"], ["f"], "flat"),
        make_node("ReduceMean", ["b:0", "axes"], ["m"], "mean", keepdims=0),
        make_node("Add", ["f", "m"], ["y"], "add"),
    ]
    axes = np.array(range(2, 1 + len(second)))
    graph = helper.make_graph(
        nodes,
        "g",
        [
            make_tensor_value_info("a", TensorProto.FLOAT, [batches[0], 3, 12, 12]),
            make_tensor_value_info("b:0", TensorProto.FLOAT, [batches[1], *second]),
        ],
        [make_tensor_value_info("y", TensorProto.FLOAT, [batches[0], 3])],
        [
            numpy_helper.from_array(values(3, 3, 3, 3), "w"),
            *norm(3),
            numpy_helper.from_array(axes, "axes"),
        ],
    )
    if len(second) == 1:
        del graph.node[4], graph.initializer[-1]
        graph.node[4].input[1] = "b:0"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def test_sizes_that_the_file_leaves_open_are_said_by_the_names_of_inputs(tmp_path):
    path = two_inputs(tmp_path / "n.onnx")
    said = "n.onnx: its input 'b:0' is free × 3 × free × free, which leaves sizes open"
    with refused(InputRefused, said, hint=("--input b:0=3x224x224",)):
        start_at(path)
    start = start_at(path, {"b:0": (3, 7, 9)})
    feed = {"a": values(4, 3, 12, 12), "b:0": values(4, 3, 7, 9, seed=1)}
    (got,) = start.double()(feed).values()
    assert apart(run(onnx.load(path), feed)["y"], got) < 1e-6


@pytest.mark.parametrize(
    ("shape", "said", "hint"),
    [
        ((3, 7, 9), "takes 2 inputs, 'a', 'b:0', and one shape without a name", "NAME=CxHxW"),
        ({"b:1": (3, 7, 9)}, "it has no input 'b:1', and takes 'a', 'b:0'", "did you mean"),
        ({"a": (3, 9, 9), "b:0": (3, 7, 9)}, "'a' is free × 3 × 12 × 12, and cannot be 3 ×", None),
        ({"b:0": (4, 7, 9)}, "'b:0' is free × 3 × free × free, and cannot be 4 × 7 × 9", None),
        ({"b:0": (3, 0, 9)}, "'b:0' is free × 3 × free × free, and cannot be 3 × 0 × 9", None),
    ],
)
def test_what_is_said_must_agree_with_the_file(shape, said, hint, tmp_path):
    with refused(InputRefused, said, hint=None if hint is None else (hint,)):
        start_at(two_inputs(tmp_path / "n.onnx"), shape)


def test_one_input_may_be_said_by_its_name_too(tmp_path):
    path = exported("Segments", tmp_path / "n.onnx")
    assert start_at(path, {"x": (1, 16, 16)}).inputs[0].shape == (1, 16, 16)
    with refused(InputRefused, "it has no input 'y', and takes 'x'", hint=("known: x",)):
        start_at(path, {"y": (1, 16, 16)})


def test_a_vector_may_stand_beside_a_picture(tmp_path):
    path = two_inputs(tmp_path / "n.onnx", second=(3,))
    out, feed = tmp_path / "out", {"a": values(48, 3, 12, 12), "b:0": values(48, 3, seed=1)}
    np.savez(tmp_path / "d.npz", **feed)
    asked = profile("fp32", **LOOSE)
    report = exporter.run(path, asked, out, data=tmp_path / "d.npz")
    assert [spec.shape for spec in report.source.inputs] == [(3, 12, 12), (3,)]
    assert report.failures == ()
    got = run(onnx.load(out / "n.fp32.onnx"), feed)["y"]
    assert apart(got, run(onnx.load(path), feed)["y"]) < 1e-6


def test_batch_axes_that_are_fixed_at_different_sizes_are_refused(tmp_path):
    path = two_inputs(tmp_path / "n.onnx", batches=(2, 1), second=(3,))
    with refused(
        InputRefused,
        "the first axes of its inputs are not of one batch: 'a' is of 2 and 'b:0' is of 1",
        hint=("a row for every sample",),
    ):
        start_at(path)


def test_a_batch_axis_that_one_input_alone_has_fixed_is_freed(tmp_path):
    path = two_inputs(tmp_path / "n.onnx", batches=(2, "N"), second=(3,))
    assert "its batch axis of 2 freed" in start_at(path).origin[1].changes


def test_data_of_one_input_are_refused_for_several(pair, data, tmp_path):
    for given, said in (
        (None, "samples of one input, and the network takes 2: picture, flow"),
        (data["Pyramid"], "one array, and the network takes 'picture' and"),
    ):
        with refused(InputRefused, said, hint=("an array for each",) if given is None else ()):
            exporter.run(pair, profile("fp32"), tmp_path / "out", data=given)
    assert not (tmp_path / "out").exists()


def test_the_command_names_inputs_as_the_file_does(tmp_path):
    path, out = two_inputs(tmp_path / "n.onnx"), tmp_path / "out"
    np.savez(tmp_path / "d.npz", **{"a": values(48, 3, 12, 12), "b:0": values(48, 3, 5, 5, seed=1)})
    base = ["--onnx", str(path), "--data", str(tmp_path / "d.npz"), "-o", str(out), "-p", "fp32"]
    base += [*HASTY, "-t", "sm86"]
    for wrong, code, said in (
        ([], 3, "leaves sizes open"),
        (["--input", "b:0=3x5"], 2, "'3x5' is not a shape"),
        (["--input", "=3x5x5"], 2, "has no name in front of its ="),
        (["--input", "c=3x5x5"], 3, "it has no input 'c', and takes 'a', 'b:0'"),
        (["--input", "3x5x5"], 3, "one shape without a name"),
    ):
        done = CliRunner().invoke(main, [*base, *wrong])
        assert (done.exit_code, said in done.output) == (code, True), done.output
        assert not out.exists()
    done = CliRunner().invoke(main, [*base, "--input", "b:0=3x5x5"])
    assert done.exit_code in (0, 1), done.output
    done = CliRunner().invoke(
        main, ["parity", str(out), "--onnx", str(path), "--data", str(tmp_path / "d.npz")]
    )
    assert "n.onnx float64" in done.output, done.output


# ── What is no output ───────────────────────────────────────────────────────────────


def gives(value: onnx.ValueInfoProto, *nodes: onnx.NodeProto):
    def change(model: onnx.ModelProto) -> None:
        model.graph.node.extend(nodes)
        model.graph.output.append(value)

    return change


def floats(name: str, *sizes) -> onnx.ValueInfoProto:
    return make_tensor_value_info(name, TensorProto.FLOAT, sizes)


def shared(name: str) -> list[onnx.NodeProto]:
    """Return nodes that give the mean over all samples, for no sample."""
    return [make_node("ReduceMean", ["f"], [name], "all", keepdims=0)]


NO_OUTPUT = {
    "a class": (
        gives(
            make_tensor_value_info("k", TensorProto.INT64, ["N"]),
            make_node("ArgMax", ["f"], ["k"], "k", axis=1, keepdims=0),
        ),
        "it gives 'k' as INT64, where FLOAT is needed",
        "extract_model",
    ),
    "an input": (gives(floats("b:0", "N", 3)), "'b:0' is its input as it is", "extract_model"),
    "a constant": (
        gives(floats("e", 3), make_node("Exp", ["bn.0"], ["e"], "e")),
        "its output 'e' is a constant: no input leads to it",
        "extract_model",
    ),
    "stored": (gives(floats("w", 3, 3, 3, 3)), "its output 'w' is a constant", "extract_model"),
    "one for all": (
        gives(floats("s"), *shared("s")),
        "it gives 's' as a tensor of one value for a batch of 2",
        "extract_model",
    ),
    "twice": (gives(floats("y", "N", 3)), "it gives two tensors called 'y'", ""),
    "of no name": (gives(floats("", "N", 3)), "", ""),
    "a sequence": (
        gives(
            helper.make_tensor_sequence_value_info("q", TensorProto.FLOAT, None),
            make_node("SequenceConstruct", ["f"], ["q"], "q"),
        ),
        "it gives 'q' as of no tensor type, where FLOAT is needed",
        "extract_model",
    ),
}


@pytest.mark.parametrize("what", NO_OUTPUT)
def test_what_is_no_output_of_samples_is_refused_by_name(what, tmp_path):
    change, said, hint = NO_OUTPUT[what]
    path = two_inputs(tmp_path / "n.onnx", second=(3,))
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    with refused(InputRefused, "n.onnx: ", said, hint=(hint,)):
        start_at(path)


def test_an_output_of_as_many_rows_as_a_batch_by_chance_is_refused(tmp_path):
    """Two rows for any number of samples: a batch of two alone would not show it."""
    path = two_inputs(tmp_path / "n.onnx", second=(3,))
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(values(2, 1), "two"))
    nodes = [*shared("s"), make_node("Mul", ["two", "s"], ["t"], "t")]
    gives(floats("t", 2, 1), *nodes)(model)
    path.write_bytes(model.SerializeToString())
    with refused(InputRefused, "not independent of one another", "'t'"):
        start_at(path)


def test_outputs_that_a_batchnorm_gives_and_others_read_keep_their_names(tmp_path):
    path = tmp_path / "n.onnx"
    nodes = [
        make_node("Conv", ["x", "w"], ["c"], "conv"),
        bn("c", "first"),
        make_node("Relu", ["first"], ["r"], "relu"),
        make_node("Conv", ["r", "v"], ["d"], "second"),
        bn("d", "last", "bn2"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [floats("x", "N", 3, 12, 12)],
        [floats("last", "N", 4, 8, 8), floats("first", "N", 4, 10, 10)],
        [
            numpy_helper.from_array(values(4, 3, 3, 3), "w"),
            numpy_helper.from_array(values(4, 4, 3, 3, seed=5), "v"),
            *norm(4),
            *norm(4, "bn2"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    x = values(3, 3, 12, 12, seed=7)
    made = started(path).fold((torch.from_numpy(x[:2]),))
    assert [fate.folded for fate in made.fates] == [True, True]
    assert [n.op_type for n in made.model.graph.node] == ["Conv", "Relu", "Conv"]
    want, got = run(model, {"x": x}), run(made.model, {"x": x})
    assert list(got) == ["last", "first"]
    assert all(apart(got[own], want[own]) < 1e-6 for own in got)
    assert pack([x]) is x
