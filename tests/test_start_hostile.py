"""ONNX files that are broken, or made to do harm, where a run is asked to start from them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import HASTY, refused
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info
from test_start_file import conv_file, profile
from test_start_layers import noise, run, started

import exporter
from exporter import environment
from exporter.cli import main
from exporter.errors import InputRefused, OutOfMemory


def replace(model: onnx.ModelProto, name: str, value: onnx.TensorProto) -> None:
    next(t for t in model.graph.initializer if t.name == name).CopyFrom(value)


def after_conv(op: str, *held: np.ndarray, skip: int = 0, **attributes):
    """Return a change that puts a node behind the convolution, which reads these constants."""

    def change(model: onnx.ModelProto) -> None:
        names = [f"held{i}" for i in range(len(held))]
        for name, value in zip(names, held, strict=True):
            model.graph.initializer.append(numpy_helper.from_array(value, name))
        reads = ["c", *[""] * skip, *names]
        model.graph.node.insert(1, make_node(op, reads, ["c2"], "evil", **attributes))
        model.graph.node[2].input[0] = "c2"

    return change


def attribute(name: str, value):
    return lambda model: model.graph.node[0].attribute.append(helper.make_attribute(name, value))


def texts(model):
    replace(model, "w", helper.make_tensor("w", TensorProto.STRING, [4, 3, 3, 3], [b"a"] * 108))


def doubles(model):
    replace(model, "w", numpy_helper.from_array(np.ones((4, 3, 3, 3)), "w"))


def spread_below_zero(model):
    replace(model, "bn.3", numpy_helper.from_array(-np.ones(4, np.float32), "bn.3"))


def no_such_type(which: str):
    def change(model):
        getattr(model.graph, which)[0].type.tensor_type.elem_type = 999

    return change


def size(axis: int, value: int):
    def change(model):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = value

    return change


def branches(model):
    branch = helper.make_graph(
        [make_node("Relu", ["c"], ["r"])],
        "branch",
        [],
        [make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "is"))
    node = make_node("If", ["is"], ["c2"], "evil", then_branch=branch, else_branch=branch)
    model.graph.node.insert(1, node)
    model.graph.node[2].input[0] = "c2"


def of_type(make):
    return lambda model: model.graph.input[0].type.CopyFrom(make)


TENSOR = helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", 3, 12, 12])
HALF = np.array(0.5, np.float32)
EVIL = {
    "weights are texts": (texts, "its tensor 'w' is STRING"),
    "weights are doubles": (doubles, "W has inconsistent type"),
    "a spread below 0": (spread_below_zero, "12 of 12 values of its output 'y' are NaN"),
    "an input of no such type": (no_such_type("input"), "takes 'x' as of the unknown type 999"),
    "an output of no such type": (no_such_type("output"), "gives 'y' as of the unknown type 999"),
    "a sequence": (of_type(helper.make_sequence_type_proto(TENSOR)), "'x' as of no tensor type"),
    "optional": (of_type(helper.make_optional_type_proto(TENSOR)), "'x' as of no tensor type"),
    "a size below 0": (size(2, -12), "1 × 3 × -12 × 12, and no size is negative"),
    "a batch of none": (size(0, 0), "a batch of 0 holds no sample"),
    "a batch beyond memory": (size(0, 1 << 40), "'x' of 1099511627776 × 3 × 12 × 12"),
    "a group of none": (attribute("group", 0), "'conv': Conv cannot be emulated"),
    "groups beyond channels": (attribute("group", 1 << 40), "'conv': Conv cannot be emulated"),
    "a stride of 0": (attribute("strides", [0, 0]), "strides must only contain positive values"),
    "padding beyond memory": (attribute("pads", [1 << 30] * 4), "Conv 'conv' makes 'c' of 1 × 4"),
    "a kernel of 2^31": (attribute("kernel_shape", [1 << 31] * 2), "Conv 'conv' makes 'c' of"),
    "branches": (branches, "does not know what it has: If 'evil'"),
    "noise": (after_conv("RandomNormalLike"), "does not know what it has: RandomNormalLike 'evil'"),
    "a dropout that drops": (
        after_conv("Dropout", HALF, np.array(True)),
        "the Dropout 'evil' is in training mode",
    ),
    "nothing left": (
        after_conv("Resize", np.array([1, 1, 0, 0], np.float32), skip=1),
        "its tensor 'c2' of 3 × 4 × 0 × 0 is empty",
    ),
    "as large as NaN": (
        after_conv("Resize", np.array([1, 1, np.nan, 2], np.float32), skip=1),
        "Resize 'evil' makes 'c2' of",
    ),
    "a window of none": (after_conv("LRN", size=0), "'evil/LRN': LRN cannot be emulated"),
    "code": (after_conv("Einsum", equation="abcd,__import__->a"), "Einsum"),
    "a bomb": (after_conv("Tile", np.array([1, 1, 1 << 20, 1 << 20])), "Tile 'evil' makes 'c2'"),
}


@pytest.mark.parametrize("what", EVIL)
def test_what_is_broken_is_refused_by_name_before_anything_is_written(what, tmp_path):
    change, words = EVIL[what]
    path = tmp_path / "n.onnx"
    model = onnx.load(conv_file(path))
    change(model)
    path.write_bytes(model.SerializeToString())
    with refused(InputRefused, "n.onnx: ", words):
        exporter.run(path, profile("fp32"), tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["n.onnx"]


def test_a_file_with_any_bytes_changed_starts_or_is_refused(tmp_path):
    path = conv_file(tmp_path / "n.onnx")
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(12):
        data = bytearray(whole)
        for place in generator.integers(0, len(data), 3):
            data[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(data)
        said = "n.onnx: whole"
        try:
            started(path)
        except InputRefused as error:
            said = str(error)
        assert said.startswith("n.onnx: ")
        assert said.isprintable()


def test_what_takes_more_memory_in_float64_than_there_is_is_refused(tmp_path, monkeypatch):
    path = conv_file(tmp_path / "n.onnx")
    monkeypatch.setattr(environment, "memory_bytes", lambda: 8 * 8 * 3 * 4 * 10 * 10)
    with refused(OutOfMemory, "n.onnx: its tensor 'x' is 3 × 3 × 12 × 12 for 3 samples"):
        started(path)
    monkeypatch.setattr(environment, "memory_bytes", lambda: 8 * 8 * 3 * 4 * 12 * 12)
    started(path)


def test_a_fixed_batch_of_thousands_is_compared_on_a_few_samples(tmp_path):
    start = started(conv_file(tmp_path / "n.onnx", batch=5000))
    assert start.origin[1].changes == ("its batch axis of 5000 freed",)


def test_names_that_no_terminal_should_see_are_written_escaped(tmp_path):
    path, out, name = tmp_path / "n.onnx", tmp_path / "out", "\x1b[2J\n|<b>x"
    model = onnx.load(conv_file(path))
    model.graph.input[0].name = model.graph.node[0].input[0] = name
    path.write_bytes(model.SerializeToString())
    np.save(tmp_path / "d.npy", noise((3, 12, 12), 40))
    base = ["--onnx", str(path), "--data", str(tmp_path / "d.npy"), "-o", str(out), "-p", "fp32"]
    done = CliRunner().invoke(main, [*base, *HASTY, "-t", "sm86"])
    assert done.exit_code in (0, 1), done.output
    assert "\x1b[2J" not in done.output
    assert "\x1b" not in (out / "report.md").read_text()
    x = noise((3, 12, 12))
    assert np.allclose(run(onnx.load(out / "n.fp32.onnx"), x), run(model, x), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "option"), [((3, "h", "w"), "3x100000x100000"), ((3, 12, 12), "3x9x9")]
)
def test_sizes_that_cannot_be_leave_nothing_behind(shape, option, tmp_path):
    path = conv_file(tmp_path / "n.onnx", shape=shape)
    done = CliRunner().invoke(
        main, ["--onnx", str(path), "--input", option, "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 3, done.output
    assert "Error: n.onnx: " in done.output
    assert [file.name for file in tmp_path.iterdir()] == ["n.onnx"]
