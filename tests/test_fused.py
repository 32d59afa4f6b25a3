"""Pixels in, probabilities out: what is fused into the graph, against the same in numpy."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from conftest import TinyModel, disturb, refused
from PIL import Image
from torch import nn

import exporter
from exporter.data import open_data
from exporter.errors import GraphError, InputRefused, ProfileError
from exporter.fused import fuse
from exporter.live import live_model
from exporter.profile import load_profile
from exporter.records import BenchAsked, Postprocess, Preprocess, TensorSpec
from exporter.samples import MEAN, STD, load_split, noise
from exporter.worst_case import Search

MEANS, STDS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPEC, OUTPUT = TensorSpec("input", (3, 12, 10)), TensorSpec("output", (4,))
FORMS = [
    (layout, given, taken)
    for layout in ("nchw", "nhwc")
    for given in ("rgb", "bgr")
    for taken in ("rgb", "bgr")
]


class Net(nn.Module):
    def __init__(self, padding: int = 1, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.again = nn.Conv2d(6, 6, 3, stride=2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        y = torch.relu(self.again(torch.relu(self.bn(self.conv(x)))))
        return self.fc(y.mean((2, 3)))


def make(padding: int = 1) -> Net:
    """Return a network of other weights for each channel, whose classes come about as often."""
    torch.manual_seed(5)
    net = disturb(Net(padding)).eval()
    net.conv.weight.data *= torch.tensor([1.0, -2.0, 0.5])[:, None, None]
    x = torch.from_numpy(normalised(pixels(64)).astype(np.float32))
    with torch.no_grad():
        net.fc.weight *= 2 / net(x).std(dim=0)[:, None]
        net.fc.bias -= net(x).mean(dim=0)
    return net


def pixels(count: int, seed: int = 0) -> np.ndarray:
    """Return RGB pixels, (N, C, H, W): a colour of its own for each picture, and some noise."""
    generator = np.random.default_rng(seed)
    colour = generator.uniform(0, 255, (count, 3, 1, 1))
    noisy = colour + generator.normal(0, 40, (count, *SPEC.shape))
    return noisy.round().clip(0, 255).astype(np.uint8)


def normalised(rgb: np.ndarray, *, order: str = "rgb") -> np.ndarray:
    """Return what the network takes of RGB pixels, in float64."""
    rgb = rgb[:, ::-1] if order == "bgr" else rgb
    mean, std = (np.array(values)[:, None, None] for values in (MEANS, STDS))
    return (rgb / 255.0 - mean) / std


def as_given(rgb: np.ndarray, layout: str, order: str) -> np.ndarray:
    """Return RGB pixels as an artefact takes them."""
    turned = rgb[:, ::-1] if order == "bgr" else rgb
    return np.ascontiguousarray(turned.transpose(0, 2, 3, 1) if layout == "nhwc" else turned)


def scores(net: nn.Module, inputs: np.ndarray, *, softmax: bool) -> np.ndarray:
    """Return what the network gives in float64, and its softmax in numpy."""
    net = net.double()
    found = net(torch.from_numpy(inputs)).detach().numpy()
    net.float()
    if not softmax:
        return found
    large = np.exp(found - found.max(axis=1, keepdims=True))
    return large / large.sum(axis=1, keepdims=True)


def settings(layout: str = "nhwc", given: str = "rgb", taken: str = "rgb", **more):
    said = {
        "preprocess.mean": list(MEANS),
        "preprocess.std": list(STDS),
        "preprocess.fuse": layout,
        "preprocess.input_order": given,
        "preprocess.order": taken,
        "postprocess.softmax": True,
        "precision.fp32.tolerance": {"sqnr_db": 100},
        "precision.fp16.tolerance": {"sqnr_db": 45},
        "precision.int8.tolerance": {"sqnr_db": 20},
    }
    quick = {"timing.runs": 3, "timing.warmup": 1, "calibration.images": 32, "parity.random": 4}
    return load_profile("default", {**said, **quick, "batch.max": 8, **more})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return an export that takes BGR, channels last, of a network that takes RGB."""
    labels = np.arange(160) % 4
    return exporter.export(
        make(),
        torch.zeros(1, *SPEC.shape),
        out=tmp_path_factory.mktemp("fused") / "build",
        profile=settings(given="bgr"),
        data=(as_given(pixels(160), "nhwc", "bgr"), labels),
    )


def judged_on_pixels(folder: Path, runtime: str) -> None:
    """Expect a runtime to be faithful where pixels are normalised in the graph."""
    found = exporter.export(
        make(),
        torch.zeros(1, *SPEC.shape),
        out=folder / "b",
        profile=msgspec.structs.replace(settings("nhwc", "bgr"), runtime={runtime: {}}),
        precision=("fp32", "int8"),
        data=as_given(pixels(80), "nhwc", "bgr"),
    )
    assert {a.name: a.fidelity for a in found.report.artefacts} == {
        f"fp32 on {runtime}": "pass",
        f"int8 on {runtime}": "pass",
    }


# ── That it is what numpy makes of it ───────────────────────────────────────────────


@pytest.mark.parametrize(("layout", "given", "taken"), FORMS)
def test_every_layout_and_order_is_what_numpy_makes_of_it(layout, given, taken):
    net, rgb = make(), pixels(5)
    profile = settings(layout, given, taken)
    fused, (spec,) = fuse(net, (SPEC,), (OUTPUT,), profile.preprocess, profile.postprocess)
    assert spec == TensorSpec("input", (12, 10, 3) if layout == "nhwc" else (3, 12, 10), "uint8")
    taking = torch.from_numpy(as_given(rgb, layout, given))
    got = fused.double()(taking).detach().numpy()
    want = scores(net, normalised(rgb, order=taken), softmax=True)
    assert np.abs(got - want).max() < 1e-6  # the BatchNorm's numbers are float32


def test_a_softmax_alone_leaves_the_input_as_it_is():
    net, x = make(), normalised(pixels(5))
    fused, (spec,) = fuse(net, (SPEC,), (OUTPUT,), Preprocess(), Postprocess(softmax=True))
    assert spec is SPEC
    assert np.allclose(
        fused.double()(torch.from_numpy(x)).detach().numpy(), scores(net, x, softmax=True)
    )
    assert fuse(net, (SPEC,), (OUTPUT,), Preprocess(), Postprocess()) == (net, (SPEC,))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_artefacts_take_pixels_and_give_probabilities(made, precision):
    rgb = pixels(40, seed=7)
    want = scores(make(), normalised(rgb), softmax=True)
    with made.session(precision, "ort-cpu") as run:
        got = run({"input": as_given(rgb, "nhwc", "bgr")})["output"]
    most = {"fp32": 1e-6, "fp16": 5e-3, "int8": 5e-2}[precision]
    assert np.linalg.norm(got - want) < most * np.linalg.norm(want)
    assert got.sum(axis=1) == pytest.approx(1, abs=2e-3)


def test_the_graph_has_a_cast_one_addition_and_no_other_arithmetic_in_front(made):
    graph = onnx.load(made.folder / "net.fp32.onnx").graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    ops = [node.op_type for node in graph.node]
    assert ops[: ops.index("Conv")] == ["Cast", "Transpose", "Slice", "Add"]
    assert ops[-1] == "Softmax"
    assert not {"Mul", "Div", "Sub"} & set(ops)
    fate = made.report.fold.fates[0]
    assert (fate.name, fate.folded) == ("normalise", True)
    assert "scale forwards into network.conv, shift left as one addition" in str(fate)


def test_the_shift_goes_too_where_nothing_pads_and_the_mean_is_small(tmp_path):
    small = {"preprocess.mean": [0.01], "preprocess.std": [0.5], "preprocess.input_order": "rgb"}
    made = exporter.export(
        make(padding=0),
        torch.zeros(1, *SPEC.shape),
        out=tmp_path / "b",
        profile=settings("nchw", **small),
        precision="fp32",
        data=pixels(40),
    )
    ops = [node.op_type for node in onnx.load(tmp_path / "b/net.fp32.onnx").graph.node]
    assert ops[:2] == ["Cast", "Conv"]
    assert made.report.artefacts[0].fidelity == "pass"


def test_everything_is_judged_through_it(made):
    assert made.verdict == "pass"
    ran = {a.name: a for a in made.report.artefacts if not a.not_run}
    assert {"fp32 on ort-cpu", "fp16 on ort-cpu", "int8 on ort-cpu"} <= set(ran)
    assert {(a.fidelity, a.quality) for a in ran.values()} == {("pass", "pass")}
    assert {a.name for a in made.report.artefacts if a.refused} == set()
    source = made.report.source
    assert source.input == TensorSpec("input", (12, 10, 3), "uint8")
    assert made.report.fold.float64_rel_l2 < 1e-12
    assert "uint8, (p/255 − (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225) in the graph" in (
        made.folder / "report.md"
    ).read_text("utf-8")


def test_engines_of_other_makers_take_pixels_too(made):
    from exporter.plugins import load_runtime

    if load_runtime("tensorrt-rtx", {}).missing("build"):
        pytest.skip("TensorRT-RTX is not there to build")
    built = [a for a in made.report.artefacts if a.runtime == "tensorrt-rtx"]
    assert [a.refused for a in built] == [None] * 3
    assert all((made.folder / a.file.name).stat().st_size > 0 for a in built)


def test_pytorch_takes_pixels_too(tmp_path):
    judged_on_pixels(tmp_path, "torch-eager")


def test_the_form_that_servers_run_in_integers_takes_pixels_too(tmp_path):
    said = {"preprocess.mean": list(MEANS), "preprocess.std": list(STDS)}
    quick = {"timing.runs": 2, "timing.warmup": 0, "calibration.images": 32, "batch.max": 8}
    gate = {"precision.int8.tolerance": {"sqnr_db": 20}, "parity.random": 4}
    made = exporter.export(
        make(),
        torch.zeros(1, *SPEC.shape),
        out=tmp_path / "b",
        profile=load_profile("cpu", {**said, **quick, **gate, "preprocess.fuse": "nchw"}),
        precision="int8",
        data=pixels(100),
    )
    assert [(a.fidelity, a.quality) for a in made.report.artefacts] == [("pass", "pass")]


# ── What it is judged on ────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, rgb in enumerate(pixels(12).transpose(0, 2, 3, 1)):
        Image.fromarray(rgb).save(folder / f"{number:02}.png")
    return folder


@pytest.mark.parametrize(("layout", "given"), [("nchw", "rgb"), ("nhwc", "rgb"), ("nhwc", "bgr")])
def test_images_are_given_as_they_are_decoded(photos, layout, given):
    profile = settings(layout, given)
    plain = load_profile("default", {"preprocess.mean": list(MEANS), "preprocess.std": list(STDS)})
    shape = profile.preprocess.laid_out(SPEC.shape)
    found = open_data(photos, "digits", [TensorSpec("input", shape, "uint8")], OUTPUT, profile)
    float_found = open_data(photos, "digits", [SPEC], OUTPUT, plain)
    assert found.numbers == float_found.numbers
    inputs = found.load("held-out").inputs
    assert inputs.dtype == np.uint8
    rgb = pixels(12)[found.numbers["held-out"]]
    assert np.array_equal(inputs, as_given(rgb, layout, given))
    words = found.record.preprocessing
    turned = "channels turned round, " if given == "bgr" else ""
    assert f"12×10 {given.upper()}, uint8 as {layout.upper()}; in the graph: {turned}" in words


def test_digits_are_the_pixels_that_they_were_made_from():
    profile = load_profile(
        "default", {"preprocess.mean": [MEAN], "preprocess.std": [STD], "preprocess.fuse": "nhwc"}
    )
    taken = TensorSpec("input", (16, 16, 1), "uint8")
    got = open_data(None, "digits", [taken], TensorSpec("output", (10,)), profile).load("held-out")
    want = load_split("digits", (1, 16, 16), "held-out")
    assert got.inputs.shape == (360, 16, 16, 1)
    again = (got.inputs.transpose(0, 3, 1, 2) / 255 - MEAN) / STD
    assert np.abs(again - want.inputs).max() <= 0.5001 / 255 / STD
    assert np.array_equal(got.labels, want.labels)
    assert got.origin == "360 held-out digits as pixels"


def test_a_built_in_network_takes_the_digits_as_pixels(tiny_model, tmp_path):
    said = {"preprocess.mean": [MEAN], "preprocess.std": [STD], "preprocess.fuse": "nchw"}
    quick = {"timing.runs": 2, "timing.warmup": 0, "parity.random": 4, "batch.max": 8}
    profile = load_profile("default", {**said, **quick}).only(("fp32",))
    report = exporter.run(tiny_model, profile, tmp_path / "b")
    assert report.verdict == "pass"
    assert report.source.input == TensorSpec(TinyModel.input.name, (1, 32, 32), "uint8")
    assert report.pytorch[0].inputs == "360 held-out digits as pixels"


def test_noise_is_of_every_pixel_value_alike():
    found = noise((3, 32, 32), count=16, seed=1, dtype="uint8")
    counts = np.bincount(found.ravel(), minlength=256)
    assert found.dtype == np.uint8
    assert counts.min() > 0.6 * counts.mean()
    assert np.array_equal(found, noise((3, 32, 32), count=16, seed=1, dtype="uint8"))


# ── The bundle afterwards ───────────────────────────────────────────────────────────


def test_a_bundle_is_compared_again_and_timed(made):
    data = (as_given(pixels(160), "nhwc", "bgr"), np.arange(160) % 4)
    again = exporter.check_bundle(made.folder, model=make(), data=data)
    assert again.verdict == "pass"
    asked = BenchAsked(runtimes=("ort-cpu",), batches=(2,), runs=2, loads=1)
    assert {
        len(c.samples_ms) > 0 for c in exporter.bench_bundles([made.folder], asked).latency
    } == {True}


def test_worst_cases_of_pixels_are_refused(made):
    data = (as_given(pixels(160), "nhwc", "bgr"), np.arange(160) % 4)
    again = exporter.check_bundle(made.folder, model=make(), data=data, search=Search(steps=1))
    said = [a.refused for a in again.artefacts if not a.not_run]
    assert all("found by gradients, and pixels have none" in (reason or "") for reason in said)


def test_a_graph_that_takes_floats_is_not_the_one_that_takes_pixels(made):
    from exporter.parity import check_same_interface

    graph = onnx.load(made.folder / "net.fp16.onnx").graph
    wanted = {"input": made.report.source.input, "output": made.report.source.output}
    check_same_interface(graph, "net", **wanted, dtypes=("float32", "float16"))
    graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    with refused(GraphError, "net takes 'input'", "float32", "uint8", hint=None):
        check_same_interface(graph, "net", **wanted, dtypes=("float32", "float16"))


# ── What is refused ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("said", "words", "hint"),
    [
        ({"preprocess.fuse": "nhwc"}, "fuse puts mean and std into the graph, and they are", None),
        ({"preprocess.input_order": "bgr"}, "input_order is that of pixels that an artefact", None),
        ({"preprocess.fuse": "hwc"}, "'hwc' is not allowed", "nhwc"),
        ({"preprocess.input_order": "gbr"}, "'gbr' is not allowed", "bgr"),
        ({"postprocess.softmax": "yes"}, "postprocess.softmax", None),
    ],
)  # fmt: skip
def test_a_profile_says_it_whole(said, words, hint):
    with refused(ProfileError, words, hint=(hint,) if hint else None):
        load_profile("default", said)


def test_a_profile_that_fuses_comes_back_as_it_was_written(tmp_path):
    profile = settings("nchw", "bgr")
    (tmp_path / "again.toml").write_text(profile.to_toml(), "utf-8")
    assert load_profile(tmp_path / "again.toml") == profile


@pytest.mark.parametrize(
    ("given", "said", "hint"),
    [
        (lambda x: normalised(x).astype(np.float32).transpose(0, 2, 3, 1), "must be (N, 12, 10, 3) uint8, found", "the graph normalises"),
        (lambda x: x, "must be (N, 12, 10, 3) uint8, found (8, 3, 12, 10) uint8", "transpose(0, 2, 3, 1)"),
        (lambda x: x[0].transpose(1, 2, 0), "found (12, 10, 3) uint8", "array[None]"),
        (lambda x: x.transpose(0, 2, 3, 1).astype(np.int32), "found (8, 12, 10, 3) int32", "the pixels"),
    ],
)  # fmt: skip
def test_samples_that_are_no_pixels_are_refused(given, said, hint):
    taken = TensorSpec("input", (12, 10, 3), "uint8")
    with refused(InputRefused, said, hint=(hint,)):
        open_data(given(pixels(8)), "digits", [taken], OUTPUT, settings())


def test_calibration_data_must_be_pixels_too(tmp_path):
    with refused(InputRefused, "must be (N, 12, 10, 3) uint8, found", hint=("the pixels",)):
        exporter.export(
            make(),
            torch.zeros(1, *SPEC.shape),
            out=tmp_path / "b",
            profile=settings(),
            data=as_given(pixels(40), "nhwc", "rgb"),
            calibration=normalised(pixels(40)).astype(np.float32).transpose(0, 2, 3, 1),
        )
    assert list(tmp_path.iterdir()) == []


def test_what_makes_no_sense_for_a_network_is_refused():
    two = settings(**{"preprocess.mean": [0.5, 0.5], "preprocess.std": [0.2, 0.2]})
    with refused(
        InputRefused, "preprocess.mean has 2 values, and the input has 3 channels", hint=None
    ):
        fuse(make(), (SPEC,), (OUTPUT,), two.preprocess, Postprocess())
    with refused(InputRefused, "postprocess.softmax of one class is 1", hint=("leave it out",)):
        fuse(
            make(), (SPEC,), (TensorSpec("output", (1,)),), Preprocess(), Postprocess(softmax=True)
        )
    with refused(InputRefused, "preprocess.fuse is of pictures, and the input is 7", hint=None):
        fuse(make(), (TensorSpec("input", (7,)),), (OUTPUT,), settings().preprocess, Postprocess())


def test_channels_that_are_not_three_have_no_other_order():
    grey = settings("nchw", "bgr", **{"preprocess.mean": [0.5], "preprocess.std": [0.2]})
    with refused(InputRefused, "and 1 channels have no other way round", hint=None):
        one = (TensorSpec("input", (1, 8, 8)),)
        fuse(Net(channels=1), one, (OUTPUT,), grey.preprocess, Postprocess())


def test_several_inputs_and_what_is_no_classification_are_not_fused():
    softmax, maps = Postprocess(softmax=True), TensorSpec("maps", (4, 6, 6))
    for outputs, found in (((maps,), "N×4×6×6"), ((OUTPUT, maps), "N×4 and N×4×6×6")):
        with refused(InputRefused, f"and the network gives {found}", hint=("leave it out",)):
            fuse(make(), (SPEC,), outputs, Preprocess(), softmax)
    with refused(InputRefused, "and the network takes 2 inputs", hint=("leave it out",)):
        fuse(make(), (SPEC, SPEC), (OUTPUT,), settings().preprocess, Postprocess())


def test_a_roofline_runs_it_on_pixels(made):
    from exporter.plugins import load_runtime

    runtime = load_runtime("ort-cpu", {"threads": 1})
    _, kernels = runtime.kernels(made.folder / "net.fp32.onnx", batch=2, runs=2, warmup=1)
    assert sum("Conv" in kernel.op for kernel in kernels) == 2


def test_the_network_itself_is_as_it_was():
    net = make()
    model = live_model(net, SPEC.shape)
    fused, _ = fuse(model.module(), (SPEC,), (OUTPUT,), settings().preprocess, Postprocess())
    assert fused.network is not net
    assert list(net.state_dict()) == list(model.network.state_dict())
    assert not fused.training
