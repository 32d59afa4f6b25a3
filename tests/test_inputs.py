"""Networks of several inputs, from end to end."""

from __future__ import annotations

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import several
import torch
from click.testing import CliRunner
from conftest import refused
from safetensors.numpy import save_file

import exporter
from exporter import load_factory
from exporter.bench import bench_bundles
from exporter.bench import candidates as bench_candidates
from exporter.cli import main
from exporter.contracts import inputs_of
from exporter.errors import InputRefused
from exporter.fold import fold_batchnorm
from exporter.packing import pack, unpack
from exporter.plugins import load_runtime
from exporter.profile import load_profile
from exporter.recheck import check_bundle, load_factory_of
from exporter.records import BatchRange, BenchAsked, TensorSpec
from exporter.runtimes._ort import OrtSession
from exporter.to_onnx import export_onnx
from exporter.worst_case import Search

RNG = np.random.default_rng(0)
PAIR = {"flow": (2, 6, 6), "picture": (1, 16, 16)}
TWINS = {"left": (1, 16, 16), "right": (1, 16, 16)}


def drawn(shapes, count: int = 48) -> dict[str, np.ndarray]:
    """Return samples whose scale is another for each input."""
    return {
        name: ((i + 1) * RNG.standard_normal((count, *shape))).astype(np.float32)
        for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    np.savez(folder / "pair.npz", **drawn(PAIR), labels=RNG.integers(0, 5, 48))
    np.savez(folder / "twins.npz", **drawn(TWINS))
    np.save(folder / "one.npy", drawn(PAIR)["picture"])
    return folder


def load(name: str, shapes):
    return load_factory(f"several:made_{name}", input_shape=shapes)


def profile(**more):
    settings = {
        "runtime.ort-cpu.threads": 1,
        "runtime.tensorrt-rtx.targets": ["sm86"],
        "batch": {"min": 1, "opt": 4, "max": 8},
        "timing": {"runs": 2, "warmup": 0, "settle_ms": 0.0, "pytorch_threads": 1},
        "calibration.images": 16,
        "parity.random": 8,
        "precision.fp32.tolerance": {"sqnr_db": 100.0},
        "precision.fp16.tolerance": {"sqnr_db": 40.0},
        "precision.int8.tolerance": {"sqnr_db": 10.0},
        **more,
    }
    return load_profile("default", settings).only(("fp32", "fp16", "int8"))


# ── Side by side ────────────────────────────────────────────────────────────────────


def test_inputs_lie_side_by_side_and_come_apart_again():
    specs = (TensorSpec("a", (2, 3)), TensorSpec("b", (4,)))
    a, b = np.arange(12.0).reshape(2, 2, 3), np.arange(8.0).reshape(2, 4)
    rows = pack([a, b])
    assert rows.tolist()[1] == [6, 7, 8, 9, 10, 11, 4, 5, 6, 7]
    back = unpack(rows, specs)
    assert [np.array_equal(x, y) for x, y in zip(back.values(), (a, b), strict=True)] == [True] * 2
    assert unpack(a, specs[:1])["a"] is pack([a]) is a


def test_inputs_are_in_the_order_of_forward_whatever_order_they_are_said_in():
    model = load("pair", PAIR)
    assert [spec.name for spec in inputs_of(model)] == ["picture", "flow"]
    assert model.output == TensorSpec("output", (5,))


@pytest.mark.parametrize(
    ("shapes", "said", "hint"),
    [
        ({"picture": (1, 16, 16), "mask": (2, 6, 6)}, "its forward() takes picture, flow", "NAME="),
        ({"flow": (2, 6, 6)}, "given the inputs flow, and its forward()", "the first of these"),
        (
            {"picture": (1, 16, 16), "flow": (3, 6, 6)},
            "cannot take 2 inputs of",
            "--input NAME=CxH",
        ),
        ({"picture": (1, 16, 16), "flow": (2, 0, 6)}, "every size must be 1 or more", None),
        ((1, 16, 16), "missing 1 required positional argument: 'flow'", "--input NAME=CxHxW"),
    ],
)
def test_other_inputs_than_forward_takes_are_refused(shapes, said, hint):
    with refused(InputRefused, said, hint=None if hint is None else (hint,)):
        load("pair", shapes)


# ── Fold and graph ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "shapes"), [("pair", PAIR), ("siamese", TWINS)])
def test_the_graph_of_the_folded_network_takes_each_input_by_its_name(name, shapes, tmp_path):
    model = load(name, shapes)
    given = drawn(shapes, 5)
    specs = inputs_of(model)
    example = [torch.from_numpy(given[spec.name][:2]) for spec in specs]
    folded = fold_batchnorm(model.module(), example)
    assert len(folded.fates) >= 2
    if name == "pair":
        assert all(fate.folded and fate.error < 1e-12 for fate in folded.fates)
    export_onnx(
        folded.module,
        tmp_path / "net.onnx",
        input=model.input,
        more_inputs=model.more_inputs,
        output=model.output,
        more_outputs=model.more_outputs,
        batch=BatchRange(),
    )
    session = ort.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == [spec.name for spec in specs]
    _, kernels = load_runtime("ort-cpu", {}).kernels(
        tmp_path / "net.onnx", batch=3, runs=2, warmup=0
    )
    assert kernels
    with torch.inference_mode():
        want = model.module().double()(
            *(torch.from_numpy(given[spec.name]).double() for spec in specs)
        )
    want = list(want.values()) if isinstance(want, dict) else [want]
    for got, right in zip(session.run(None, given), want, strict=True):
        assert np.abs(got - right.numpy()).max() <= 1e-4 * np.abs(right.numpy()).max()


# ── From end to end ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "shapes"), [("pair", PAIR), ("siamese", TWINS)])
def test_a_bundle_is_judged_on_arrays_by_the_inputs_names(name, shapes, data, tmp_path):
    model, out = load(name, shapes), tmp_path / "out"
    kind = "twins" if name == "siamese" else "pair"
    given = {"weights": "factory", "data": data / f"{kind}.npz"}
    report = exporter.run(model, profile(), out, **given)
    assert report.source.inputs == inputs_of(model)
    judged = [artefact for artefact in report.artefacts if artefact.parity]
    assert {a.precision for a in judged} == {"fp32", "fp16", "int8"}
    for artefact in judged:
        assert artefact.failures == (), artefact.name
        assert artefact.fidelity == "pass"
        assert artefact.rung.fidelity.layers > 5
    assert all(artefact.refused is None for artefact in report.artefacts)
    page = (out / "report.md").read_text("utf-8")
    first, second = (spec.name for spec in report.source.inputs)
    assert f"inputs {first} N×1×16×16" in page
    assert f", {second} N×" in page
    again = load_factory_of(out, f"several:made_{name}")
    assert inputs_of(again) == inputs_of(model)
    checked = check_bundle(out, model=again, search=Search(steps=2, lanes=4), **given)
    assert [a.parity for a in checked.artefacts] == [a.parity for a in report.artefacts]
    assert checked.failures == ()
    for case in checked.worst_cases:
        worst = np.load(out / case.file)
        assert {key: worst[key].shape[1:] for key in worst} == shapes


def test_accuracy_is_that_of_pytorch_on_the_labels_beside_the_inputs(data, tmp_path):
    model = load("pair", PAIR)
    given = np.load(data / "pair.npz")
    asked = profile(**{"data.held_out": 0.5}).only(("fp32",))
    report = exporter.run(model, asked, tmp_path / "out", weights="factory", data=data / "pair.npz")
    found = report.pytorch[0]
    assert found.labels is not None
    with torch.inference_mode():
        outputs = model.module()(*(torch.from_numpy(given[s.name]) for s in inputs_of(model)))
    right = (outputs.argmax(1).numpy() == given["labels"]).sum()
    assert 0 <= found.reference_correct <= right
    assert report.data.samples == 48


def test_a_bundle_is_timed_on_the_arrays_that_it_was_judged_on(data, tmp_path, monkeypatch):
    model, out = load("pair", PAIR), tmp_path / "out"
    file = data / "pair.npz"
    asked = profile(**{"data.held_out": 0.5}).only(("fp32", "int8"))
    exporter.run(model, asked, out, weights="factory", data=file)
    given = dict(np.load(file))
    held_out = bench_candidates.read_bundles([out], [None], file)[0].held_out
    fed: list[dict[str, np.ndarray]] = []
    bound = OrtSession.bind
    monkeypatch.setattr(OrtSession, "bind", lambda s, feed: fed.append(feed) or bound(s, feed))
    wanted = BenchAsked(runtimes=("ort-cpu",), batches=(1, 3), runs=4, loads=1)
    report = bench_bundles([out], wanted, data=file)
    assert [one.name for one in report.timed] == ["fp32 on ort-cpu", "int8 on ort-cpu"]
    assert {tuple((k, v.shape[1:]) for k, v in feed.items()) for feed in fed} == {
        (("picture", (1, 16, 16)), ("flow", (2, 6, 6)))
    }
    rows = {row.tobytes() for row in pack([given["picture"], given["flow"]])}
    assert {row.tobytes() for feed in fed for row in pack(list(feed.values()))} <= rows
    parts = unpack(held_out.inputs, inputs_of(model))
    for one in report.timed:
        session = ort.InferenceSession(out / one.file, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, parts)
        assert one.checked.correct == int((found.argmax(axis=1) == held_out.labels).sum())
        assert (one.checked.outputs, one.checked.accuracy) == ("pass", "pass")
    assert {len(one.samples_ms) for one in report.latency} == {4}
    with refused(InputRefused, "samples of one input, and the network takes 2", hint=("--data",)):
        bench_bundles([out], wanted)
    swapped = {**given, "flow": given["flow"][::-1]}
    np.savez(tmp_path / "swapped.npz", **swapped)
    with refused(InputRefused, "the bundle was judged on", hint=("--data",)):
        bench_bundles([out], wanted, data=tmp_path / "swapped.npz")


def test_a_safetensors_file_and_code_give_the_same_samples_as_an_npz(data, tmp_path):
    from exporter.data import open_data

    model = load("pair", PAIR)
    arrays = dict(np.load(data / "pair.npz"))
    save_file(arrays, tmp_path / "pair.safetensors")
    several.MADE = arrays
    asked = (inputs_of(model), model.output, profile())
    found = [
        open_data(words, "", *asked)
        for words in (
            data / "pair.npz",
            tmp_path / "pair.safetensors",
            "several:as_dict",
            "several:as_items",
        )
    ]
    assert len({one.gathered.digests for one in found}) == 1
    assert len({tuple(one.gathered.labels) for one in found}) == 1
    want = pack([arrays["picture"], arrays["flow"]])
    assert all(np.array_equal(one.gathered.samples[:], want) for one in found)


def odd(folder, **arrays):
    np.savez(folder / "odd.npz", **{**drawn(PAIR), **arrays})
    return folder / "odd.npz"


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (lambda *_: None, "built-in digits: samples of one input, and the network takes", ".npz"),
        (lambda *_: "digits", "digits: samples of one input", "an array for each"),
        (lambda d, _: d, "samples of one input, and the network takes 2: picture, flow", "--data"),
        (
            lambda d, _: d / "one.npy",
            "one.npy: one array, and the network takes 'picture' and",
            "each",
        ),
        (
            lambda d, _: d / "twins.npz",
            "arrays named 'left', 'right', and the network takes",
            "picture",
        ),
        (lambda d, t: odd(t, mask=np.zeros(3)), "'picture', 'mask'", "one array for each"),
        (
            lambda d, t: odd(t, flow=np.ones((48, 2, 6, 7), np.float32)),
            "'flow': the samples must be",
            "which size",
        ),
        (lambda d, t: odd(t, flow=np.ones((48, 2, 6, 6))), "'flow' is float64", "astype"),
        (
            lambda d, t: odd(t, flow=drawn(PAIR, 47)["flow"]),
            "47 samples of 'flow', and 48 of 'picture'",
            None,
        ),
    ],
)
def test_data_that_are_not_of_these_inputs_are_refused(words, said, hint, data, tmp_path):
    given = words(data, tmp_path)
    said = said.replace("'picture', 'mask'", "'flow', 'picture', 'mask'")
    with refused(InputRefused, said, hint=None if hint is None else (hint,)):
        exporter.run(load("pair", PAIR), profile(), tmp_path / "out", weights="factory", data=given)
    assert not (tmp_path / "out").exists()


def test_the_command_line_names_inputs(data, tmp_path):
    (tmp_path / "p.toml").write_text(msgspec.structs.replace(profile()).to_toml(), "utf-8")
    base = ["--profile", str(tmp_path / "p.toml"), "-o", str(tmp_path / "out"), "-w", "factory"]
    inputs = ["--input", "picture=1x16x16", "--input", "flow=2x6x6"]
    asked = ["--model", "several:made_pair", *inputs, "--data", str(data / "pair.npz")]
    done = CliRunner().invoke(main, [*base, *asked])
    assert done.exit_code in (0, 1), done.output
    assert (tmp_path / "out/report.json").exists()
    for wrong, code, said in (
        (["--input", "1x16x16", "--input", "flow=2x6x6"], 2, "several inputs need a name each"),
        (["--input", "a=1x16x16", "--input", "a=2x6x6"], 2, "several inputs need a name each"),
        (["--input", "1a=1x16x16"], 3, "resnet18 takes one input, and --input names 1a"),
        (["--input", "=1x16x16"], 2, "'=1x16x16' has no name in front of its ="),
        (["--input", "input=1x32x32"], 3, "resnet18 takes one input, and --input names input"),
    ):
        done = CliRunner().invoke(main, [*base, *wrong])
        assert done.exit_code == code, done.output
        assert said in done.output
