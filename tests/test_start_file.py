"""A run that starts from an ONNX file: what is made of it, what is said, and what is refused."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from conftest import HASTE, HASTY, TinyModel, refused
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info
from test_start_layers import (
    POOL,
    SHAPE,
    apart,
    bn,
    exported,
    noise,
    norm,
    run,
    started,
    values,
    written,
)

import exporter
from exporter.bench.candidates import Bundle
from exporter.cli import main
from exporter.errors import InputRefused
from exporter.profile import Profile, load_profile
from exporter.recheck import check_bundle
from exporter.start.file import OnnxFile
from exporter.worst_case import Search


def profile(*precisions: str, **more) -> Profile:
    found = load_profile("default", {**HASTE, **more}).only(precisions)
    return msgspec.structs.replace(found, runtime={"ort-cpu": found.runtime["ort-cpu"]})


@pytest.fixture(scope="module")
def tiny_file(tiny_module, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    module = TinyModel().module()  # of its own, which no other test has run in inference mode
    module.load_state_dict(tiny_module.state_dict())
    return exported(module.eval(), folder / "tiny net.onnx", shape=(1, 32, 32))


@pytest.fixture(scope="module")
def bundle(tiny_file, tmp_path_factory) -> tuple[Path, exporter.Report]:
    out = tmp_path_factory.mktemp("out") / "bundle"
    return out, exporter.run(tiny_file, profile("fp32", "fp16", "int8"), out)


# ── What is made ────────────────────────────────────────────────────────────────────


def test_every_precision_is_made_and_faithful(bundle, tiny_file):
    out, report = bundle
    assert [(a.name, a.fidelity) for a in report.artefacts] == [
        ("fp32 on ort-cpu", "pass"),
        ("fp16 on ort-cpu", "pass"),
        ("int8 on ort-cpu", "pass"),
    ]
    inputs = noise((1, 32, 32))
    want = run(onnx.load(tiny_file), inputs)
    for precision, bound in (("fp32", 3e-6), ("fp16", 3e-3), ("int8", 0.3)):
        assert apart(run(onnx.load(out / f"tiny_net.{precision}.onnx"), inputs), want) < bound


def test_the_truth_is_what_the_network_was(bundle, tiny_file, tiny_module):
    inputs = noise((1, 32, 32))
    (got,) = started(tiny_file).double()({"image": inputs}).values()
    with torch.inference_mode():
        want = tiny_module.double()(torch.from_numpy(inputs).double()).numpy()
        tiny_module.float()
    assert apart(got, want) < 1e-9


def test_the_record_says_where_it_started(bundle, tiny_file):
    source = bundle[1].source
    assert (source.model, source.file, source.weights) == ("tiny_net", *["tiny net.onnx"] * 2)
    assert source.weights_sha256 == hashlib.sha256(tiny_file.read_bytes()).hexdigest()
    assert source.weights_format == "ONNX, opset 13"
    assert source.weights_changes == ("opset 13 converted to 20",)
    assert (source.input.name, source.output.name) == ("image", "scores")
    assert source.factory is None


def test_every_batchnorm_has_its_fate(bundle):
    fold = bundle[1].fold
    assert fold.folded == len(fold.fates) == 5
    assert 0 < fold.float64_rel_l2 < 1e-12


def test_rungs_are_named_after_the_file_and_pytorch_is_not_named(bundle):
    out, report = bundle
    assert [(r.name, r.above) for r in report.ladder][:2] == [
        ("tiny net.onnx float32", "tiny net.onnx float64"),
        ("folded", "tiny net.onnx float32"),
    ]
    assert report.latency[0].name == "tiny net.onnx in ONNX Runtime, fp32"
    text = (out / "report.md").read_text()
    assert "| tiny net.onnx float64 |" in text
    assert "vs tiny net.onnx" in text
    record = (out / "report.json").read_text()
    for said in (text.partition("## Environment")[0], re.sub('"environment": {[^}]*}', "", record)):
        assert "PyTorch eager" not in said
        assert "PyTorch float" not in said
        assert not re.search("(with|beside|float64|vs|run) PyTorch", said)


def test_a_file_without_batchnorms_is_kept_as_it_is(tmp_path):
    nodes = [make_node("Conv", ["x", "w"], ["z"], "conv"), *POOL]
    path = written(tmp_path / "n.onnx", nodes, [("w", values(4, 3, 3, 3))])
    start = started(path)
    made = start.fold((torch.from_numpy(noise(SHAPE)[:2]),))
    assert made.fates == ()
    assert [(n.name, *n.output) for n in made.model.graph.node] == [
        ("conv", "z"),
        ("pool/GlobalAveragePool", "p"),
        ("flat/Flatten", "y"),
    ]


# ── What is made normal ─────────────────────────────────────────────────────────────


def conv_file(path: Path, **more) -> Path:
    nodes = [make_node("Conv", ["x", "w"], ["c"], "conv"), bn("c", "z"), *POOL]
    return written(path, nodes, [("w", values(4, 3, 3, 3)), *norm(4)], **more)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_fixed_batch_axis_is_freed(tmp_path, batch):
    path = conv_file(tmp_path / "n.onnx", batch=batch)
    start = started(path)
    assert start.origin[1].changes == (f"its batch axis of {batch} freed",)
    inputs = noise(SHAPE, 7)
    (got,) = start.double()({"x": inputs}).values()
    assert apart(run(onnx.load(path), inputs[:batch]), got[:batch]) < 1e-6


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_axis_that_a_reshape_has_written_into_it_is_freed(tmp_path, batch):
    nodes = [
        make_node("GlobalAveragePool", ["x"], ["p"], "pool"),
        make_node("Reshape", ["p", "shape"], ["y"], "flat"),
    ]
    tensors = [("shape", np.array([batch, -1]))]
    path = written(tmp_path / "n.onnx", nodes, tensors, batch=batch, gives=3)
    (got,) = started(path).double()({"x": noise(SHAPE)}).values()
    assert np.allclose(got, noise(SHAPE).mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize(
    ("op", "shape"), [("Expand", [1, 3, 1, 1]), ("Reshape", [3, 1]), ("Reshape", [1, 1, 3])]
)
def test_a_batch_axis_that_is_written_into_the_graph_otherwise_cannot_be_freed(tmp_path, op, shape):
    flat = make_node("Reshape", ["q", "flat"], ["y"], "flat")
    nodes = [
        make_node("ReduceSum", ["x", "axes"], ["s"], "sum", keepdims=1),
        make_node(op, ["s", "shape"], ["q"], "other"),
        flat,
    ]
    axes = np.array([0, 2, 3])
    tensors = [("axes", axes), ("shape", np.array(shape)), ("flat", np.array([1, 3]))]
    path = written(tmp_path / "n.onnx", nodes, tensors, batch=1, gives=3)
    with refused(InputRefused, "n.onnx: its batch axis is fixed at 1", hint=("dynamic_axes",)):
        started(path)


def test_samples_that_are_not_independent_are_refused(tmp_path):
    nodes = [
        make_node("ReduceMean", ["x", "first"], ["m"], "mean", keepdims=1),
        make_node("Sub", ["x", "m"], ["z"], "sub"),
        *POOL,
    ]
    path = written(tmp_path / "n.onnx", nodes, [("first", np.array([0]))], gives=3)
    with refused(InputRefused, "n.onnx: its samples are not independent of one another"):
        started(path)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 19, 21, 22])
def test_another_opset_is_converted_where_onnx_can(tmp_path, opset):
    path = conv_file(tmp_path / "n.onnx", opset=opset)
    start = started(path)
    assert start.model.opset_import[0].version == 20
    assert start.origin[1].changes == (f"opset {opset} converted to 20",)
    (got,) = start.double()({"x": noise(SHAPE)}).values()
    assert apart(run(onnx.load(path), noise(SHAPE)), got) < 1e-6


def test_an_opset_that_cannot_be_converted_is_refused_with_the_way_out(tmp_path, monkeypatch):
    def convert(*_):
        raise RuntimeError("No Adapter From Version $9 for Upsample")

    monkeypatch.setattr(onnx.version_converter, "convert_version", convert)
    path = conv_file(tmp_path / "n.onnx", opset=19)
    with refused(InputRefused, "opset 19", "No Adapter", hint=("--set opset=19",)):
        started(path)


def test_external_data_is_brought_in_and_pinned(tmp_path):
    path = conv_file(tmp_path / "n.onnx")
    want = run(onnx.load(path), noise(SHAPE))
    onnx.save(
        onnx.load(path),
        path,
        save_as_external_data=True,
        location="n.data",
        size_threshold=0,
    )
    start = started(path)
    assert start.origin[1].changes == ("its external data brought in",)
    (got,) = start.double()({"x": noise(SHAPE)}).values()
    assert apart(want, got) < 1e-6
    before = start.origin[1].sha256
    data = bytearray((tmp_path / "n.data").read_bytes())
    data[2] ^= 1  # of a float32's last bits
    (tmp_path / "n.data").write_bytes(data)
    assert started(path).origin[1].sha256 != before


def test_constants_are_computed_and_those_listed_as_inputs_are_none(tmp_path):
    nodes = [
        make_node("Constant", [], ["t"], "t", value=numpy_helper.from_array(values(3, 4).T.copy())),
        make_node("Transpose", ["t"], ["w"], "turn"),
        make_node("GlobalAveragePool", ["x"], ["p"], "pool"),
        make_node("Flatten", ["p"], ["f"], "flat"),
        make_node("Gemm", ["f", "w", "b"], ["y"], "fc"),
    ]
    path = written(tmp_path / "n.onnx", nodes, [("b", values(4, seed=3))])
    model = onnx.load(path)
    model.graph.input.append(make_tensor_value_info("b", TensorProto.FLOAT, [4]))
    path.write_bytes(model.SerializeToString())
    start = started(path)
    assert [n.op_type for n in start.model.graph.node] == ["GlobalAveragePool", "Flatten", "Gemm"]
    assert [v.name for v in start.model.graph.input] == ["x"]
    assert start.origin[1].changes == ("what reads constants alone computed, nodes: 1",)


def test_sizes_that_are_left_open_are_said(tmp_path):
    path = conv_file(tmp_path / "n.onnx", shape=(3, "h", "w"))
    with refused(InputRefused, "'x' is free × 3 × free × free", hint=("--input",)):
        started(path)
    assert started(path, shape=SHAPE).double()({"x": noise(SHAPE)})["y"].shape == (5, 4)
    with refused(InputRefused, "'x' is free × 3 × free × free, and cannot be 1 × 12 × 12"):
        started(path, shape=(1, 12, 12))


# ── What is refused ─────────────────────────────────────────────────────────────────


def edited(path: Path, change) -> Path:
    model = onnx.load(conv_file(path))
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def int64_input(model):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    model.graph.node.insert(0, make_node("Cast", ["x"], ["xf"], "cast", to=TensorProto.FLOAT))
    model.graph.node[1].input[0] = "xf"


def half_inside(model):
    model.graph.node.insert(0, make_node("Cast", ["x"], ["h"], "down", to=TensorProto.FLOAT16))
    model.graph.node.insert(1, make_node("Cast", ["h"], ["f"], "up", to=TensorProto.FLOAT))
    model.graph.node[2].input[0] = "f"


def half_throughout(model):
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))


def quantised(model):
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "s"))
    model.graph.initializer.append(numpy_helper.from_array(np.int8(0), "o"))
    model.graph.node.insert(0, make_node("QuantizeLinear", ["x", "s", "o"], ["q"], "q"))
    model.graph.node.insert(1, make_node("DequantizeLinear", ["q", "s", "o"], ["d"], "d"))
    model.graph.node[2].input[0] = "d"


def custom(model):
    model.graph.node[0].domain = "acme"
    model.opset_import.append(helper.make_opsetid("acme", 1))


def optimised(model):
    model.graph.node[0].op_type = "FusedConv"
    model.graph.node[0].domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def training(model):
    node = model.graph.node[1]
    node.attribute.append(helper.make_attribute("training_mode", 1))
    node.output.extend(["m", "v"])


def broken(model):
    tensor = next(t for t in model.graph.initializer if t.name == "w")
    value = numpy_helper.to_array(tensor).copy()
    value[0, 0, 0, 0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(value, "w"))


def unknown(model):
    model.graph.node.insert(1, make_node("Hardmax", ["c"], ["c2"], "hard"))
    model.graph.node[2].input[0] = "c2"


def matrix(model):
    del model.graph.node[:]
    model.graph.node.append(make_node("Relu", ["x"], ["y"], "relu"))
    for value in (model.graph.input[0], model.graph.output[0]):
        del value.type.tensor_type.shape.dim[2:]


REFUSED = {
    int64_input: ("it takes 'x' as INT64, where FLOAT is needed", ""),
    half_inside: ("its tensor 'h' is FLOAT16", "--precision fp16"),
    half_throughout: ("it takes 'x' as FLOAT16", "--precision fp16"),
    quantised: ("quantised already: it has DequantizeLinear, QuantizeLinear", "--precision int8"),
    custom: ("operators that are not ONNX's own: acme::Conv", "as it was exported"),
    optimised: ("not ONNX's own: com.microsoft::FusedConv", "before a runtime optimised it"),
    training: ("the BatchNormalization 'bn' is in training mode", "module.eval()"),
    broken: ("its tensor 'w' holds 1 values that are NaN or infinite", ""),
    unknown: ("the float64 reference does not know what it has: Hardmax 'hard'", "extract_model"),
    matrix: ("its input 'x' is free × 3, where N × C × H × W is needed", ""),
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_cannot_be_started_from_is_refused_by_name(change, tmp_path):
    words, hint = REFUSED[change]
    path = edited(tmp_path / "n.onnx", change)
    with refused(InputRefused, "n.onnx: ", words, hint=(hint,)):
        started(path)


def test_what_onnx_runtime_refuses_is_refused_without_saying_where_a_copy_lies(tmp_path):
    def same_names(model):
        model.graph.node[1].name = model.graph.node[0].name

    with refused(InputRefused, "n.onnx: ONNX Runtime refuses it: ", "same node name"):
        started(edited(tmp_path / "n.onnx", same_names))


def test_what_another_runtime_computes_otherwise_is_refused(tmp_path, monkeypatch):
    """Say that the emulation had an operator wrong: nothing would be started."""
    from exporter.emulation import OPERATORS

    monkeypatch.setitem(OPERATORS, "GlobalAveragePool", lambda _, x: x.sum((2, 3), keepdim=True))
    with refused(InputRefused, "n.onnx: ONNX Runtime does not compute what its operators mean"):
        started(conv_file(tmp_path / "n.onnx"))


def test_a_file_that_is_none_or_hostile_is_refused_before_it_is_opened(tmp_path):
    path = conv_file(tmp_path / "n.onnx")
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:-40])
    for name, words in (("none.onnx", "no such file"), ("cut.onnx", "cut.onnx: ")):
        with refused(InputRefused, words):
            OnnxFile.choose(tmp_path / name, profile("fp32"), None, None)
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    path.write_bytes(model.SerializeToString())
    with refused(InputRefused, "n.onnx: the external data of 'w'", "straight down"):
        started(path)


def test_weights_classes_and_arguments_do_not_go_with_a_file(tmp_path):
    path, out = conv_file(tmp_path / "n.onnx"), tmp_path / "out"
    with refused(InputRefused, "n.onnx has its own weights", hint=("--weights",)):
        exporter.run(path, profile("fp32"), out, weights=Path("w.pth"))
    with refused(InputRefused, "n.onnx gives 4 values, not 7"):
        exporter.run(path, profile("fp32"), out, classes=7)
    with refused(InputRefused, "n.onnx is not built with the profile's model.args"):
        exporter.run(path, load_profile("default", {"model.args.depth": 3}), out)
    assert not out.exists()


# ── The command, and the bundle once more ───────────────────────────────────────────


def invoke(*words: object):
    return CliRunner().invoke(main, list(map(str, words)))


def test_the_command_takes_a_file_in_place_of_a_model(tmp_path):
    path = conv_file(tmp_path / "n.onnx")
    for option, value in (("--model", "resnet18"), ("-w", "random"), ("--classes", 4)):
        result = invoke("--onnx", path, option, value)
        assert result.exit_code == 2
        assert "--onnx is the network and its weights in one" in result.output
    result = invoke("--onnx", path, "--input", "a=3x8x8")
    assert (result.exit_code, "it has no input 'a', and takes 'x'" in result.output) == (3, True)
    result = invoke("--onnx", tmp_path / "none.onnx")
    assert (result.exit_code, "none.onnx: no such file" in result.output) == (3, True)


def test_the_command_exports_a_file_and_checks_the_bundle(tmp_path):
    path, out = conv_file(tmp_path / "n.onnx", batch=1), tmp_path / "out"
    data = tmp_path / "data.npy"
    np.save(data, noise(SHAPE, 40))
    words = ["--onnx", path, "-p", "int8", "--data", data, "-o", out, *HASTY]
    result = invoke(*words, "-t", "sm86", "--set", "precision.int8.tolerance={}")
    assert "n.onnx in ONNX Runtime, fp32" in result.output, result.output
    result = invoke("parity", out, "--onnx", path, "--data", data)
    assert "n.onnx float64" in result.output, result.output
    for words, said in (
        (("--data", data), "the ONNX file 'n.onnx', which is not in it"),
        (("--onnx", path, "-m", "resnet18"), "give it alone"),
    ):
        assert said in invoke("parity", out, *words).output


def test_a_bundle_is_checked_with_its_file_again(bundle, tiny_file):
    report = check_bundle(bundle[0], model=tiny_file)
    assert [a.fidelity for a in report.artefacts] == ["pass"] * 3
    assert report.rungs[0].name == "tiny net.onnx float32"


def test_the_worst_case_is_searched_against_the_file(bundle, tiny_file, tmp_path):
    out = shutil.copytree(bundle[0], tmp_path / "bundle")
    report = check_bundle(out, model=tiny_file, search=Search(steps=2))
    assert [case.artefact for case in report.worst_cases] == [a.name for a in report.artefacts]


def test_what_a_profile_fuses_is_refused_in_front_of_a_file_and_behind_it(tmp_path):
    path = conv_file(tmp_path / "n.onnx")
    means = {"preprocess.mean": [0.5], "preprocess.std": [0.2]}
    for key, value in (("preprocess.fuse", "nchw"), ("postprocess.softmax", True)):
        profile = load_profile("default", {**means, key: value})
        with refused(InputRefused, "n.onnx is taken as it is", key, hint=("leave it out",)):
            started(path, profile)


def test_a_bundle_of_a_file_is_timed_on_samples_that_fit_its_input(bundle):
    held_out = Bundle.read(bundle[0], "a", None, None).held_out
    assert held_out.inputs.shape == (360, 1, 32, 32)


def test_a_bundle_is_not_checked_without_its_file_or_with_another(bundle, tiny_file, tmp_path):
    out, _ = bundle
    with refused(InputRefused, "the ONNX file 'tiny net.onnx'", hint=("--onnx",)):
        check_bundle(out)
    other = shutil.copy(tiny_file, tmp_path / "tiny net.onnx")
    model = onnx.load(other)
    model.producer_version = "another"
    onnx.save(model, other)
    with refused(InputRefused, "SHA-256", "'tiny net.onnx' has", hint=("--onnx",)):
        check_bundle(out, model=Path(other))


def test_a_network_s_bundle_is_not_checked_with_a_file(tiny_model, tiny_file, tmp_path):
    out = tmp_path / "bundle"
    exporter.run(tiny_model, profile("fp32"), out)
    with refused(InputRefused, "made from the network 'tinymodel'", hint=("leave out --onnx",)):
        check_bundle(out, model=tiny_file)


def test_a_file_and_the_network_that_it_was_made_from_agree(tiny_model, bundle, tmp_path):
    own = exporter.run(tiny_model, profile("fp32"), tmp_path / "bundle")
    inputs = noise((1, 32, 32))
    graphs = (tmp_path / "bundle" / "tinymodel.fp32.onnx", bundle[0] / "tiny_net.fp32.onnx")
    one, other = (run(onnx.load(path), inputs) for path in graphs)
    assert apart(one, other) < 1e-6
    assert own.source.file is None
    assert TinyModel.input.shape == bundle[1].source.input.shape
