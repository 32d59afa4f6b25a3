"""ONNX files from strangers: what is checked before anything opens them."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import refused
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info

from exporter import onnx_files
from exporter.cli import main
from exporter.errors import ExportError, InputRefused, OutOfMemory
from exporter.onnx_files import check_onnx

SECRET = b"SECRET-CANARY-0123456789abcdef--"  # eight float32
W = np.arange(8, dtype=np.float32)


def model(
    nodes=None, tensors=(), *, output=("N", 8), inputs=(), opset=20, **more
) -> onnx.ModelProto:
    """Return y = relu(x), or what these nodes make of x."""
    nodes = nodes or [make_node("Relu", ["x"], ["y"], "relu")]
    given = [make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8]), *inputs]
    gives = [make_tensor_value_info("y", TensorProto.FLOAT, list(output))]
    graph = helper.make_graph(nodes, "g", given, gives, list(tensors))
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, **more)


def outside(**said: str) -> onnx.ModelProto:
    """Return y = x + w, where w's eight floats are said to be elsewhere."""
    tensor = numpy_helper.from_array(W, "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in said.items():
        tensor.external_data.add(key=key, value=value)
    return model([make_node("Add", ["x", "w"], ["y"], "add")], [tensor])


@pytest.fixture
def folder(tmp_path):
    """Return a model's folder, beside one with a secret in it."""
    (tmp_path / "secret.bin").write_bytes(SECRET)
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    (inside / "w.bin").write_bytes(W.tobytes())
    (inside / "sub" / "w.bin").write_bytes(W.tobytes())
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    (inside / "near.bin").symlink_to("w.bin")
    (inside / "dir").symlink_to(tmp_path)
    os.link(tmp_path / "secret.bin", inside / "hard.bin")
    (inside / "caf\u00e9.bin").write_bytes(W.tobytes())
    os.mkfifo(inside / "pipe.bin")
    (inside / "device.bin").symlink_to("/dev/zero")
    (inside / "short.bin").write_bytes(W.tobytes()[:-1])
    return inside


def written(folder: Path, made: onnx.ModelProto) -> Path:
    path = folder / "net.onnx"
    path.write_bytes(made.SerializeToString())
    return path


# ── External data ───────────────────────────────────────────────────────────────────

HOSTILE = {
    "up": ({"location": "../secret.bin"}, "straight down"),
    "up and down": ({"location": "sub/../../secret.bin"}, "straight down"),
    "here": ({"location": "./w.bin"}, "straight down"),
    "double slash": ({"location": "sub//w.bin"}, "straight down"),
    "absolute": ({"location": "/etc/hostname"}, "absolute"),
    "environment": ({"location": "/proc/self/environ"}, "absolute"),
    "device": ({"location": "/dev/zero"}, "absolute"),
    "drive": ({"location": "C:w.bin"}, "absolute"),
    "network share": ({"location": "\\\\host\\share"}, "absolute"),
    "backslash": ({"location": "sub\\w.bin"}, "backslash"),
    "address": ({"location": "file:w.bin"}, "an address"),
    "home": ({"location": "~/w.bin"}, "home folder"),
    "variable": ({"location": "$HOME/w.bin"}, "variable"),
    "nul": ({"location": "w.bin\0.txt"}, "does not print"),
    "newline": ({"location": "w.bin\n"}, "does not print"),
    "bidi": ({"location": "\u202ew.bin"}, "does not print"),
    "decomposed": ({"location": "cafe\u0301.bin"}, "composed form"),
    "trailing dot": ({"location": "w.bin."}, "another system"),
    "reserved": ({"location": "nul"}, "another system"),
    "case": ({"location": "W.bin"}, "no file 'W.bin'"),
    "missing": ({"location": "none.bin"}, "no file 'none.bin'"),
    "empty": ({"location": ""}, "no location"),
    "none": ({}, "no location"),
    "symbolic link": ({"location": "link.bin"}, "symbolic link"),
    "symbolic link inside": ({"location": "near.bin"}, "symbolic link"),
    "linked folder": ({"location": "dir/secret.bin"}, "symbolic link"),
    "link to a device": ({"location": "device.bin"}, "symbolic link"),
    "hard link": ({"location": "hard.bin"}, "hard link"),
    "folder": ({"location": "sub"}, "no regular file"),
    "pipe": ({"location": "pipe.bin"}, "no regular file"),
    "itself": ({"location": "net.onnx"}, "the model itself"),
    "through a file": ({"location": "w.bin/x"}, "no folder"),
    "negative offset": ({"location": "w.bin", "offset": "-4"}, "offset '-4'"),
    "hexadecimal offset": ({"location": "w.bin", "offset": "0x4"}, "offset '0x4'"),
    "offset past the end": ({"location": "w.bin", "offset": "32"}, "ends at byte 64"),
    "huge offset": ({"location": "w.bin", "offset": "9" * 30}, "offset"),
    "negative length": ({"location": "w.bin", "length": "-1"}, "length '-1'"),
    "huge length": ({"location": "w.bin", "length": "4294967296"}, "its length is 4,294,967,296"),
    "short length": ({"location": "w.bin", "length": "4"}, "its shape needs 32"),
    "short file": ({"location": "short.bin"}, "which has 31"),
    "unknown key": ({"location": "w.bin", "__class__": "x"}, "'__class__' is none of ONNX's"),
    "base path": ({"location": "w.bin", "basepath": "/etc"}, "basepath"),
}


@pytest.mark.parametrize(("said", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_location_is_refused_and_nothing_of_it_is_shown(folder, said, words):
    with refused(InputRefused, "net.onnx: the external data of 'w'", words):
        check_onnx(written(folder, outside(**said)), runs=True)


def test_there_are_twenty_hostile_locations_and_more():
    assert len(HOSTILE) >= 20


def test_a_socket_is_not_opened(folder, monkeypatch):
    with socket.socket(socket.AF_UNIX) as end:
        monkeypatch.chdir(folder)  # a socket's own path must be short
        end.bind("sock.bin")
        with refused(InputRefused, "no regular file"):
            check_onnx(written(folder, outside(location="sock.bin")), runs=True)


@pytest.mark.parametrize("location", ["w.bin", "sub/w.bin", "caf\u00e9.bin"])
def test_data_beside_the_model_is_taken(folder, location):
    check_onnx(written(folder, outside(location=location, offset="0", length="32")), runs=True)


def test_a_location_that_is_there_twice_is_refused(folder):
    made = outside(location="w.bin")
    made.graph.initializer[0].external_data.add(key="location", value="sub/w.bin")
    with refused(InputRefused, "a key of it is there twice"):
        check_onnx(written(folder, made), runs=True)


def test_regions_that_overlap_are_refused(folder):
    made = outside(location="w.bin")
    other = made.graph.initializer.add()
    other.CopyFrom(made.graph.initializer[0])
    other.name = "v"
    with refused(InputRefused, "external data of 'v' and of 'w' overlap"):
        check_onnx(written(folder, made), runs=True)


def test_data_in_the_file_and_outside_of_it_is_refused(folder):
    made = outside(location="w.bin")
    made.graph.initializer[0].raw_data = W.tobytes()
    with refused(InputRefused, "in the file and outside of it"):
        check_onnx(written(folder, made), runs=True)


def test_a_location_without_saying_so_is_refused(folder):
    made = outside(location="../secret.bin")
    made.graph.initializer[0].data_location = TensorProto.DEFAULT
    with refused(InputRefused, "says that it has none"):
        check_onnx(written(folder, made), runs=True)


def test_a_constant_in_a_node_has_no_data_outside(folder):
    tensor = outside(location="../secret.bin").graph.initializer[0]
    node = make_node("Constant", [], ["w"], "c", value=tensor)
    made = model([node, make_node("Add", ["x", "w"], ["y"], "add")])
    with refused(InputRefused, "inside a node has external data"):
        check_onnx(written(folder, made), runs=False)


def test_a_field_in_two_parts_is_refused_since_readers_join_them(folder):
    path = written(folder, outside(location="w.bin"))
    more = onnx.ModelProto()
    more.graph.name = "more"
    path.write_bytes(path.read_bytes() + more.SerializeToString())
    with refused(InputRefused, "the field 7 of the model is there twice"):
        check_onnx(path, runs=True)


# ── Graph bombs ─────────────────────────────────────────────────────────────────────


def int64(name: str, *values: int) -> TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def made_of(op: str, *sizes: int) -> onnx.ModelProto:
    """Return y = x + max(op(…)), where the operator makes a tensor of a few hundred GB."""
    first = {"ConstantOfShape": [], "Expand": ["one"], "Tile": ["one"]}[op]
    nodes = [
        make_node(op, [*first, "sizes"], ["huge"], "bomb"),
        make_node("ReduceMax", ["huge"], ["top"], "top", keepdims=0),
        make_node("Add", ["x", "top"], ["y"], "add"),
    ]
    one = helper.make_tensor("one", TensorProto.FLOAT, [1] * len(sizes), [1.0])
    return model(nodes, [int64("sizes", *sizes), one])


def ranged() -> onnx.ModelProto:
    scalars = [
        helper.make_tensor(n, TensorProto.FLOAT, [], [v])
        for n, v in (("start", 0.0), ("stop", 1e11), ("step", 1.0))
    ]
    nodes = [
        make_node("Range", ["start", "stop", "step"], ["huge"], "bomb"),
        make_node("ReduceMax", ["huge"], ["top"], "top", keepdims=0),
        make_node("Add", ["x", "top"], ["y"], "add"),
    ]
    return model(nodes, scalars)


def padded() -> onnx.ModelProto:
    nodes = [
        make_node("Pad", ["x", "pads"], ["huge"], "bomb"),
        make_node("ReduceMax", ["huge"], ["top"], "top", keepdims=0),
        make_node("Add", ["x", "top"], ["y"], "add"),
    ]
    return model(nodes, [int64("pads", 0, 0, 0, 1 << 36)])


def doubled(times: int = 40) -> onnx.ModelProto:
    """Return a chain of concatenations, each twice as long as the one before."""
    nodes = [make_node("Concat", ["x", "x"], ["t0"], "c0", axis=1)]
    nodes += [
        make_node("Concat", [f"t{i - 1}"] * 2, [f"t{i}"], f"c{i}", axis=1) for i in range(1, times)
    ]
    nodes.append(make_node("ReduceMax", [f"t{times - 1}"], ["y"], "top", keepdims=1))
    return model(nodes, output=("N", 1))


def nested(depth: int) -> onnx.ModelProto:
    """Return branches in branches."""
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])

    def branch(left: int, side: str) -> onnx.GraphProto:
        name = f"{side}{left}"
        gives = [make_tensor_value_info(name, TensorProto.FLOAT, None)]
        if not left:
            node = make_node("Identity", ["x"], [name], name)
        else:
            node = make_node(
                "If",
                ["yes"],
                [name],
                name,
                then_branch=branch(left - 1, side),
                else_branch=branch(0, f"e{side}{left}"),
            )
        return helper.make_graph([node], name, [], gives)

    top = make_node(
        "If", ["yes"], ["y"], "top", then_branch=branch(depth, "a"), else_branch=branch(0, "b")
    )
    return model([top], [yes])


def endless() -> onnx.ModelProto:
    """Return a loop of 2^62 rounds."""
    count = helper.make_tensor("count", TensorProto.INT64, [], [1 << 62])
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    flag = [make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("go", "goes")]
    held = [make_tensor_value_info(n, TensorProto.FLOAT, ["N", 8]) for n in ("a", "b")]
    number = make_tensor_value_info("i", TensorProto.INT64, [])
    body = helper.make_graph(
        [make_node("Identity", ["go"], ["goes"], "g"), make_node("Relu", ["a"], ["b"], "r")],
        "body",
        [number, flag[0], held[0]],
        [flag[1], held[1]],
    )
    return model([make_node("Loop", ["count", "yes", "x"], ["y"], "loop", body=body)], [count, yes])


def laughing() -> onnx.ModelProto:
    """Return functions that each call the next one ten times."""
    opset = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
    functions = []
    for i in range(12):
        nodes, last = [], "a"
        for k in range(10):
            kind = (
                make_node(f"f{i + 1}", [last], [f"t{k}"], domain="f")
                if i < 11
                else make_node("Relu", [last], [f"t{k}"])
            )
            nodes.append(kind)
            last = f"t{k}"
        functions.append(helper.make_function("f", f"f{i}", ["a"], [last], nodes, opset))
    made = model([make_node("f0", ["x"], ["y"], "lol", domain="f")], functions=functions)
    made.opset_import.append(helper.make_opsetid("f", 1))
    return made


def cyclic() -> onnx.ModelProto:
    return model(
        [
            make_node("Add", ["x", "b"], ["a"], "one"),
            make_node("Relu", ["a"], ["b"], "two"),
            make_node("Relu", ["b"], ["y"], "three"),
        ]
    )


def from_data(made: float) -> onnx.ModelProto:
    """Return a tensor whose size follows from what the network is given, and from nothing else."""
    size = helper.make_tensor("size", TensorProto.FLOAT, [1], [made])
    nodes = [
        make_node("ReduceMax", ["x"], ["top"], "max", keepdims=0),
        make_node("Add", ["top", "size"], ["wide"], "size_of"),
        make_node("Cast", ["wide"], ["sizes"], "cast", to=TensorProto.INT64),
        make_node("ConstantOfShape", ["sizes"], ["huge"], "bomb"),
        make_node("ReduceMax", ["huge"], ["least"], "least", keepdims=0),
        make_node("Add", ["x", "least"], ["y"], "add"),
    ]
    return model(nodes, [size])


def many(count: int) -> bytes:
    node = make_node("Relu", ["x"], [""]).SerializeToString()
    graph = b"".join((b"\x0a", bytes([len(node)]), node)) * count
    length, header = len(graph), b""
    while True:
        header += bytes([length & 127 | (128 if length > 127 else 0)])
        length >>= 7
        if not length:
            break
    return b"\x08\x0a\x42\x02\x10\x14\x3a" + header + graph


def no_opset() -> onnx.ModelProto:
    made = model()
    del made.opset_import[:]
    return made


def newer(version: int) -> onnx.ModelProto:
    made = model()
    made.ir_version = version
    return made


def claimed() -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 40], float_data=[1.0])
    return model([make_node("Add", ["x", "w"], ["y"], "add")], [tensor])


BOMBS = {
    "ConstantOfShape": (
        lambda: made_of("ConstantOfShape", 1 << 36),
        "'bomb' makes 'huge' of 68719476736",
    ),
    "Expand": (lambda: made_of("Expand", 1 << 20, 1 << 18), "Expand 'bomb' makes 'huge'"),
    "Tile": (lambda: made_of("Tile", 1 << 20, 1 << 18), "Tile 'bomb' makes 'huge'"),
    "Range": (ranged, "Range 'bomb' makes 'huge'"),
    "Pad": (padded, "Pad 'bomb' makes 'huge'"),
    "a chain of Concat": (doubled, "makes 't"),
    "deep nesting": (lambda: nested(12), "more than 8 deep"),
    "functions": (laughing, "functions of its own: f0, f1, f2, f3, f4 and 7 more"),
    "a cycle": (cyclic, "'one' reads 'b' before it is written"),
    "no operator set": (no_opset, "which version of ONNX's operators"),
    "a new version": (lambda: newer(99), "IR version 99"),
    "an unknown operator set": (lambda: model(opset=9999), "operator set 9999"),
    "no such operator": (lambda: model([make_node("Nope", ["x"], ["y"], "n")]), "not a sound ONNX"),
    "a claimed size": (claimed, "has 4 bytes of numbers"),
    "a name of 10 MB": (
        lambda: model([make_node("Relu", ["x"], ["y"], "n" * (10 << 20))]),
        "a name in it has",
    ),
    "an output twice": (
        lambda: model([make_node("Relu", ["x"], ["y"], "a"), make_node("Relu", ["x"], ["y"], "b")]),
        "there already",
    ),
}


@pytest.mark.parametrize(("make", "words"), BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_whether_it_is_to_be_run_or_not(tmp_path, make, words):
    path = written(tmp_path, make())
    for runs in (False, True):
        with refused(InputRefused, "net.onnx: ", words):
            check_onnx(path, runs=runs)


def test_a_million_nodes_are_refused_within_seconds(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(many(1_000_000))
    start = time.perf_counter()
    with refused(InputRefused, "more than 100,000 nodes"):
        check_onnx(path, runs=False)
    assert time.perf_counter() - start < 10


def test_a_size_that_only_a_run_tells_is_met_in_a_run(tmp_path):
    check_onnx(written(tmp_path, from_data(1000.0)), runs=True)
    with refused(OutOfMemory, "net.onnx: checking it takes more than"):
        check_onnx(written(tmp_path, from_data(1e10)), runs=True)


def test_a_loop_without_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("exporter.onnx_files.isolated.SECONDS", 3)
    with refused(InputRefused, "net.onnx: "):
        check_onnx(written(tmp_path, endless()), runs=True)


def test_a_sparse_file_of_gigabytes_is_refused_unread(tmp_path):
    with (tmp_path / "net.onnx").open("wb") as stream:
        stream.truncate(3 << 30)
    with refused(InputRefused, "it has 3,221,225,472 bytes"):
        check_onnx(tmp_path / "net.onnx", runs=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells the peak")
@pytest.mark.parametrize("bomb", ["ConstantOfShape", "a name of 10 MB"])
def test_the_process_that_asks_stays_small(tmp_path, bomb):
    path = written(tmp_path, BOMBS[bomb][0]())
    code = (
        "import sys; from pathlib import Path; from exporter.onnx_files import check_onnx\n"
        "try: check_onnx(Path(sys.argv[1]), runs=True)\n"
        "except Exception: print(Path('/proc/self/status').read_text())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    peak = next(line for line in done.stdout.splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 300_000  # KiB


# ── Operators ───────────────────────────────────────────────────────────────────────


def custom() -> onnx.ModelProto:
    made = model([make_node("Attention", ["x"], ["y"], "a", domain="com.acme")])
    made.opset_import.append(helper.make_opsetid("com.acme", 1))
    return made


def test_custom_operators_are_named_and_not_run(tmp_path):
    path = written(tmp_path, custom())
    check_onnx(path, runs=False)
    with refused(InputRefused, "custom operators", "com.acme::Attention"):
        check_onnx(path, runs=True)


def test_branches_that_are_not_deep_are_taken(tmp_path):
    check_onnx(written(tmp_path, nested(2)), runs=True)


# ── Every command ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", ["flops", "roofline"])
def test_every_command_refuses_before_anything_opens_the_file(folder, command, monkeypatch):
    opened = []
    monkeypatch.setattr(onnx, "load", lambda *given, **more: opened.append(given))
    path = written(folder, outside(location="../secret.bin"))
    done = CliRunner().invoke(main, [command, str(path)])
    assert done.exit_code == 3, done.output
    assert "straight down from the model" in done.output
    assert SECRET.decode() not in done.output
    assert opened == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"x", "not an ONNX model"),
        (b"\x80\x02}q\x00.", "not an ONNX model"),
        (b"PK\x03\x04" + bytes(100), "not an ONNX model"),
        (b"<html></html>", "not an ONNX model"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "not an ONNX model"),
    ],
)
def test_what_is_no_onnx_file_is_said_to_be_none(tmp_path, content, words):
    (tmp_path / "net.onnx").write_bytes(content)
    with refused(InputRefused, "net.onnx: ", words):
        check_onnx(tmp_path / "net.onnx", runs=False)


def test_every_truncation_of_a_file_is_refused_or_sound(tmp_path):
    whole = model().SerializeToString()
    path = tmp_path / "net.onnx"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ExportError):
            check_onnx(path, runs=False)


def test_a_file_changed_at_random_is_taken_or_refused_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "check_isolated", lambda *given, **more: None)
    path = tmp_path / "net.onnx"
    draw = random.Random(0)
    makers = (custom, endless, cyclic, laughing, claimed, lambda: outside(location="w.bin"))
    seeds = [make().SerializeToString() for make in makers]
    said = []
    for number in range(600):
        data = bytearray(draw.choice(seeds))
        for _ in range(draw.choice((1, 2, 5))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            check_onnx(path, runs=bool(number % 2))
        except ExportError as error:
            said.append(str(error))
    assert len(said) > 200
    assert all(one.isprintable() for one in said)
