"""Free height and width: every size against PyTorch in float64, and what must be refused."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import sized
import torch
from conftest import refused
from torch import nn
from torch.nn import functional

import exporter
from exporter import recheck
from exporter.axes import Side, at_largest, grows_with_size, sides_of
from exporter.errors import GraphError, InputRefused, OutOfMemory, ProfileError
from exporter.factories import GivenModel
from exporter.fold import fold_batchnorm
from exporter.live import live_model
from exporter.onnx_edits import replace_nodes
from exporter.onnx_files import check_onnx
from exporter.parity import check_same_interface
from exporter.plugins import load_precision, load_runtime
from exporter.profile import load_profile, read_profile
from exporter.records import (
    BatchRange,
    BenchAsked,
    FreeAxis,
    OnnxModel,
    SizeRange,
    TensorSpec,
)
from exporter.renderers import markdown, record, terminal
from exporter.runtimes._graph import shapes_to_run
from exporter.samples import digits
from exporter.sizing import (
    Size,
    at_size,
    checked_sizes,
    free_outputs,
    free_sides,
    resized,
)
from exporter.to_onnx import export_onnx

RANGE = SizeRange(min=(16, 16), max=(64, 72))
INPUT = TensorSpec("input", (1, 32, 32))
SIZES = [(16, 16), (33, 53), (64, 72), (17, 70), (32, 32)]  # the ends, some between, and its own
LOSES = [  # by each precision at most, in relative L2
    ("fp32", {}, 1e-6),
    ("fp16", {}, 5e-3),
    ("int8", {}, 0.1),
    ("int8", {"form": "onnxruntime"}, 0.1),
    ("int8", {"around": "fp16", "linear": True, "offset": "free"}, 0.1),
    ("int8-weights", {}, 0.05),
    ("fp8", {}, 0.25),
]
PROFILE = {
    "about": "Sizes",
    "runtime": {"ort-cpu": {"threads": 1}},
    "batch": {"min": 1, "opt": 2, "max": 4},
    "size": {"min": [16, 16], "max": [64, 72]},
    "timing": {"runs": 2, "warmup": 0},
    "parity": {"random": 4},
    "calibration": {"images": 16},
    "precision": {"fp32": {"tolerance": {"sqnr_db": 100.0}}},
}
INT8 = {"tolerance": {"sqnr_db": 10.0}, "options": {"rounding": False}}


def profile(**more) -> exporter.Profile:
    return read_profile(PROFILE | more, where="sizes")


def module(name: str, **args) -> GivenModel:
    return live_model(sized.make(name, **args), (args.get("channels", 1), 32, 32))


def exported(folder, net: nn.Module, size: SizeRange = RANGE, spec: TensorSpec = INPUT):
    """Return the FP32 graph of a folded network with free sides."""
    inputs = free_sides((spec,), size)
    example = torch.zeros(2, *spec.shape)
    with torch.no_grad():
        found = net(example)
    named = found if isinstance(found, dict) else {"output": found}
    outputs = [TensorSpec(name, tuple(value.shape[1:])) for name, value in named.items()]
    output, *more = free_outputs(net, inputs, outputs, size, name="net")
    folded = fold_batchnorm(net, torch.randn(2, *spec.shape), free=(inputs[0].free,)).module
    return export_onnx(
        folded,
        folder / "net.fp32.onnx",
        input=inputs[0],
        output=output,
        more_outputs=more,
        batch=BatchRange(1, 2, 4),
    )


def pictures(size: tuple[int, int], count: int = 3, seed: int = 0) -> np.ndarray:
    """Return smooth pictures of a size, as the digits are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 8, 8, generator=generator)
    return functional.interpolate(coarse, size=size, mode="bilinear").numpy()


def exact(net: nn.Module, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Return what PyTorch computes in float64."""
    double = sized.make(type(net).__name__).double()
    double.load_state_dict(net.double().state_dict())
    net.float()
    with torch.no_grad():
        found = double(torch.from_numpy(inputs).double())
    named = found if isinstance(found, dict) else {"output": found}
    return {name: value.numpy() for name, value in named.items()}


def off(found: np.ndarray, want: np.ndarray) -> float:
    assert found.shape == want.shape
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> tuple[nn.Module, OnnxModel]:
    net = sized.make("Maps")
    return net, exported(tmp_path_factory.mktemp("maps"), net)


@pytest.fixture(scope="module")
def statistics(maps):
    from exporter.calibration import calibrate

    _, made = maps
    images = np.concatenate([pictures((32, 32), 16, seed) for seed in (1, 2)])
    feeds = [{"input": image[None]} for image in images]
    return images, calibrate(onnx.load(made.path), feeds)


# ── The profile ─────────────────────────────────────────────────────────────────────


def test_a_profile_without_sizes_has_one():
    plain = {key: value for key, value in PROFILE.items() if key != "size"}
    found = read_profile(plain, where="sizes")
    assert not found.size.is_free
    assert checked_sizes(found.size, Size(32, 32)) == ()
    assert found.to_toml().count("[size]") == 1


def test_sizes_are_set_and_come_back_from_toml(tmp_path):
    found = load_profile(
        "default", {"size.min": [32, 64], "size.max": [96, 96], "size.multiple": 32}
    )
    assert found.size == SizeRange(min=(32, 64), max=(96, 96), multiple=32)
    (tmp_path / "again.toml").write_text(found.to_toml())
    assert load_profile(tmp_path / "again.toml") == found


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"min": [16, 16]}, ("min and max", "one is missing")),
        ({"multiple": 2}, ("min and max", "one is missing")),
        ({"min": [16, 16], "max": [16, 16]}, ("must differ", "[16, 16]")),
        ({"min": [64, 16], "max": [32, 32]}, ("a height of 64 to 32",)),
        ({"min": [16, 33], "max": [32, 32]}, ("a width of 33 to 32",)),
        ({"min": [16, 16], "max": [32, 40], "multiple": 16}, ("multiples of 16", "found 40")),
        ({"min": [0, 16], "max": [32, 32]}, ("size: min must be from 1 to 65536", "[0, 16]")),
        ({"min": [16], "max": [32, 32]}, ("size.min", "length 2", "[16]")),
        ({"min": [1, 1], "max": [1, 1 << 20]}, ("max must be from 1 to 65536",)),
        ({"min": [1, 1], "max": [2, 2], "multiple": 0}, ("multiple must be from 1",)),
        ({"low": [1, 1]}, ("size: unknown key 'low'",)),
    ],
)
def test_a_range_that_is_none_is_refused_by_what_is_wrong(given, words):
    with pytest.raises(ProfileError) as caught:
        profile(size=given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("size", "optimum", "between"),
    [
        (RANGE, Size(32, 32), Size(33, 53)),
        (SizeRange(min=(49, 49), max=(97, 97)), Size(65, 65), Size(65, 81)),
        (SizeRange(min=(32, 32), max=(256, 256), multiple=32), Size(96, 96), Size(96, 160)),
        (SizeRange(min=(16, 32), max=(64, 32)), Size(16, 32), Size(33, 32)),
    ],
)
def test_the_ends_and_one_between_are_checked(size, optimum, between):
    found = checked_sizes(size, optimum)
    assert found == tuple(s for s in (Size(*size.min), between, Size(*size.max)) if s != optimum)
    for one in found:
        for side, low, high in zip(one, size.min, size.max, strict=True):
            assert low <= side <= high
            assert side % size.multiple == 0


def test_the_inputs_own_size_is_within_the_range():
    with refused(InputRefused, "height of 80", "16 × 16 to 64 × 72", hint=("--input",)):
        free_sides((TensorSpec("input", (1, 80, 32)),), RANGE)
    by_32 = SizeRange(min=(32, 32), max=(96, 96), multiple=32)
    with refused(InputRefused, "width of 48", "multiples of 32", hint=("--input",)):
        free_sides((TensorSpec("input", (1, 32, 48)),), by_32)


def test_all_pictures_share_the_size_and_other_inputs_keep_theirs():
    pair = (TensorSpec("a", (3, 32, 32)), TensorSpec("b", (1, 32, 32)), TensorSpec("c", (4,)))
    found = free_sides(pair, RANGE)
    axes = (FreeAxis(1, "height", 16, 64), FreeAxis(2, "width", 16, 72))
    assert [spec.free for spec in found] == [axes, axes, ()]
    assert [spec.largest for spec in found] == [(3, 64, 72), (1, 64, 72), (4,)]
    other = (*pair[:1], TensorSpec("b", (1, 32, 16)))
    with refused(InputRefused, "'a' 3 × 32 × 32", "'b' 1 × 32 × 16", hint=("[size]",)):
        free_sides(other, RANGE)
    with refused(InputRefused, "'c' 4", hint=("[size]",)):
        free_sides(pair[2:], RANGE)


def test_one_side_may_be_free_alone():
    (found,) = free_sides((INPUT,), SizeRange(min=(32, 16), max=(32, 72)))
    assert found.free == (FreeAxis(2, "width", 16, 72),)
    assert found.sides == (32, 32)
    assert at_size((found,), Size(32, 70))[0].shape == (1, 32, 70)


# ── Samples of another size ─────────────────────────────────────────────────────────


def test_samples_are_resized_as_pillow_does_it_and_pixels_stay_pixels():
    from PIL import Image

    generator = np.random.default_rng(0)
    rows = generator.integers(0, 256, (2, 40, 48, 3), dtype=np.uint8)
    spec = free_sides((TensorSpec("input", (40, 48, 3), "uint8"),), RANGE, channels_last=True)
    got = resized(rows, spec, Size(17, 30))
    assert got.shape == (2, 17, 30, 3)
    assert got.dtype == np.uint8
    for mine, row in zip(got, rows, strict=True):
        theirs = Image.fromarray(row).resize((30, 17), Image.Resampling.BILINEAR)
        assert np.abs(mine.astype(int) - np.asarray(theirs)).max() <= 1


def test_inputs_side_by_side_are_resized_each_by_itself():
    specs = free_sides(
        (TensorSpec("a", (3, 32, 32)), TensorSpec("c", (4,)), TensorSpec("b", (1, 32, 32))), RANGE
    )
    rows = np.random.default_rng(0).standard_normal((2, 3 * 1024 + 4 + 1024), dtype=np.float32)
    got = resized(rows, specs, Size(16, 20))
    assert got.shape == (2, 3 * 320 + 4 + 320)
    assert np.array_equal(got[:, 960:964], rows[:, 3072:3076])
    alone = functional.interpolate(
        torch.from_numpy(rows[:, 3076:].reshape(2, 1, 32, 32)),
        size=(16, 20),
        mode="bilinear",
        antialias=True,
    )
    assert np.array_equal(got[:, 964:].reshape(2, 1, 16, 20), alone.numpy())


# ── The graph ───────────────────────────────────────────────────────────────────────


def axes_of(model: onnx.ModelProto) -> dict[str, list[object]]:
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }


def test_axes_are_free_by_name_and_the_graph_says_their_range(maps):
    _, made = maps
    model = onnx.load(made.path)
    assert axes_of(model) == {
        "input": ["batch", 1, "height", "width"],
        "label": ["batch", 10],
        "map": ["batch", 3, "height", "width"],
        "small": ["batch", 3, "small_2", "small_3"],
    }
    assert sides_of(model) == {"height": Side(16, 32, 64), "width": Side(16, 32, 72)}
    assert axes_of(at_largest(model))["input"] == ["batch", 1, 64, 72]
    assert axes_of(model)["input"][2] == "height"
    assert all("hook" not in node.name for node in model.graph.node)


def test_a_network_of_one_size_has_no_free_side(tmp_path):
    net = sized.make("Maps")
    named = [TensorSpec(*one) for one in (("label", (10,)), ("map", (3, 32, 32)))]
    small = TensorSpec("small", (3, 8, 8))
    made = export_onnx(
        net,
        tmp_path / "net.onnx",
        input=INPUT,
        output=named[0],
        more_outputs=[named[1], small],
        batch=BatchRange(),
    )
    model = onnx.load(made.path)
    assert axes_of(model)["input"] == ["batch", 1, 32, 32]
    assert sides_of(model) == {}
    assert at_largest(model) is model


@pytest.mark.parametrize(("precision", "options", "most"), LOSES)
def test_every_precision_is_near_float64_at_every_size(
    maps, statistics, precision, options, most, tmp_path
):
    net, made = maps
    images, found = statistics
    graph = onnx.load(made.path)
    converted = load_precision(precision, options).convert(graph, found, images)
    assert sides_of(converted.model) == sides_of(graph)
    onnx.save(converted.model, tmp_path / "it.onnx")
    with load_runtime("ort-cpu", {"threads": 1}).open(tmp_path / "it.onnx") as session:
        for size in SIZES:
            inputs = pictures(size)
            got = session({"input": inputs})
            for name, want in exact(net, inputs).items():
                assert off(got[name], want) < most, (size, name)


@pytest.mark.parametrize("runtime", ["torch-eager", "ort-cpu"])
def test_a_runtime_takes_every_size(maps, runtime):
    net, made = maps
    with load_runtime(runtime, {}).open(made.path) as session:
        for size in SIZES:
            inputs = pictures(size)
            got = session({"input": inputs})
            for name, want in exact(net, inputs).items():
                assert off(got[name], want) < 1e-6, (size, name)


def test_a_network_with_skips_takes_multiples(tmp_path):
    by_4 = SizeRange(min=(16, 16), max=(64, 72), multiple=4)
    net = sized.make("Asserting")
    made = exported(tmp_path, net, by_4)
    assert axes_of(onnx.load(made.path)) == {
        "input": ["batch", 1, "height", "width"],
        "output": ["batch", 2, "height", "width"],
    }
    with load_runtime("ort-cpu", {}).open(made.path) as session:
        for size in [(16, 16), (36, 52), (64, 72)]:
            inputs = pictures(size)
            assert off(session({"input": inputs})["output"], exact(net, inputs)["output"]) < 1e-6


def test_half_counts_what_a_mean_adds_up_at_the_largest_size(tmp_path):
    """What a mean of 48 × 48 values of 5 adds up fits half, and of 512 × 512 it does not."""
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    with torch.no_grad():
        net[0].weight.fill_(0.1)
        net[0].bias.fill_(5.0)
    images = np.random.default_rng(0).standard_normal((4, 1, 32, 32)).astype(np.float32)
    kept = {}
    for side in (48, 512):
        from exporter.calibration import calibrate

        size = SizeRange(min=(16, 16), max=(side, side))
        (tmp_path / str(side)).mkdir()
        made = exported(tmp_path / str(side), net.eval(), size)
        graph = onnx.load(made.path)
        found = calibrate(graph, [{"input": image[None]} for image in images])
        kept[side] = load_precision("fp16", {}).convert(graph, found, images).notes
    assert not any("its sum of" in note for note in kept[48])
    (note,) = [note for note in kept[512] if "its sum of" in note]
    assert f"its sum of {512 * 512} values" in note


def test_tensorrt_rtx_builds_an_engine_for_the_whole_range(maps, tmp_path):
    runtime = load_runtime("tensorrt-rtx", {"targets": ["sm89"]})
    if reason := runtime.missing("build"):
        pytest.skip(reason)
    _, made = maps
    engine = runtime.build(made, tmp_path)
    assert engine.stat().st_size > 10_000


def test_a_profile_of_tensorrt_has_the_ends_of_both_ranges(maps, tmp_path, monkeypatch):
    trt = pytest.importorskip("tensorrt_rtx")
    told, real = [], trt.IOptimizationProfile.set_shape

    def set_shape(self, *given):
        told.append(given)
        return real(self, *given)

    monkeypatch.setattr(trt.IOptimizationProfile, "set_shape", set_shape)
    _, made = maps
    load_runtime("tensorrt-rtx", {"targets": ["sm89"]}).build(made, tmp_path)
    assert told == [("input", (1, 1, 16, 16), (2, 1, 32, 32), (4, 1, 64, 72))]


# ── Networks that fix the size ──────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("net", "words", "hint"),
    [
        (
            "Flat",
            ("16 × 16", "16 × 16 to 64 × 72", "'fc' (Linear)", "cannot be multiplied"),
            "pool",
        ),
        ("Windows", ("'pool'", "4 × 4 windows", "adaptive_avg_pool2d"), "1 × 1"),
        ("Skips", ("33 × 53", "Sizes of tensors must match"), "size.multiple"),
        ("Asserting", ("33 × 53", "sides must be multiples of 4"), "size.multiple"),
    ],
)
def test_a_network_that_fixes_the_size_is_refused_by_its_layer(net, words, hint, tmp_path):
    with refused(InputRefused, net.lower(), *words, hint=(hint,)):
        exporter.run(module(net), profile(), tmp_path / "build")
    assert not list(tmp_path.iterdir())


def test_a_pool_that_is_called_is_found_as_well(tmp_path):
    net = module("Windows", called=True)
    with refused(InputRefused, "its forward()", "4 × 4 windows", hint=("[size]",)):
        exporter.run(net, profile(), tmp_path / "build")


def test_a_network_that_decides_by_the_size_is_refused(tmp_path):
    with refused(GraphError, "Deciding", "a height from 21 on", "16 to 64", hint=("[size]",)):
        exporter.run(module("Deciding"), profile(), tmp_path / "build")
    assert not list(tmp_path.iterdir())


def test_torch_onnx_names_the_sizes_that_it_cannot_leave_free(tmp_path):
    """Where nothing is folded, torch.onnx is the first to see it."""
    inputs = free_sides((INPUT,), RANGE)
    net = sized.make("Deciding")
    words = ("for every size", "height", "16 <= height <= 64")
    with refused(GraphError, *words, hint=("narrow [size]",)):
        export_onnx(
            net,
            tmp_path / "x.onnx",
            input=inputs[0],
            output=TensorSpec("y", (10,)),
            batch=BatchRange(),
        )


def test_an_onnx_file_is_of_one_size_so_far(maps, tmp_path):
    _, made = maps
    with refused(InputRefused, "net.fp32.onnx", "[size]", hint=("--input",)):
        exporter.run(made.path, profile(), tmp_path / "build", input_shape=(1, 32, 32))


def test_ranges_of_one_size_are_not_taken_for_values_that_grow(tmp_path):
    made = exported(tmp_path, sized.make("Adding"))
    assert "ReduceSum" in grows_with_size(onnx.load(made.path))
    asked = {"fp32": {"tolerance": {"sqnr_db": 100.0}}, "int8": INT8}
    report = exporter.run(module("Adding"), profile(precision=asked), tmp_path / "build")
    first, second = report.variants
    assert first.artefacts[0].fidelity == "pass"
    assert "sums over height and width" in second.refused
    assert report.verdict == "fail"


def test_means_do_not_grow_with_the_picture(maps):
    _, made = maps
    assert grows_with_size(onnx.load(made.path)) is None


def test_the_largest_size_counts_where_memory_is_checked(tmp_path):
    huge = {"min": [16, 16], "max": [65536, 65536]}
    with refused(OutOfMemory, "36 of up to 1 × 65536 × 65536", hint=("size.max",)):
        exporter.run("resnet18", profile(size=huge), tmp_path / "build", input_shape=(1, 32, 32))


def test_an_interface_with_another_free_axis_is_another(maps):
    _, made = maps
    model = onnx.load(made.path)
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    fixed.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 32
    inputs = free_sides((INPUT,), RANGE)
    outputs = free_outputs(
        sized.make("Maps"),
        inputs,
        [
            TensorSpec("label", (10,)),
            TensorSpec("map", (3, 32, 32)),
            TensorSpec("small", (3, 8, 8)),
        ],
        RANGE,
        name="net",
    )
    said = {"input": inputs[0], "output": outputs[0], "more_outputs": outputs[1:]}
    check_same_interface(model.graph, "x", **said)
    with refused(GraphError, "N×1×'height'×32", "N×1×'height'×'width'", hint=None):
        check_same_interface(fixed.graph, "x", **said)


# ── The whole run ───────────────────────────────────────────────────────────────────

ASKED = {
    "fp32": {"tolerance": {"sqnr_db": 100.0, "agreement": 0.5}},
    "int8": INT8,
}
RUNTIMES = {"ort-cpu": {"threads": 1}, "tensorrt-rtx": {"targets": ["sm89"]}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "build"
    asked = profile(precision=ASKED, runtime=RUNTIMES)
    return exporter.run(module("Maps"), asked, folder), folder


def test_every_artefact_is_checked_at_every_size(bundle):
    report, _ = bundle
    for artefact in report.artefacts:
        assert [size.name for size in artefact.sizes] == ["16 × 16", "33 × 53", "64 × 72"]
        ran = artefact.runtime == "ort-cpu"
        for size in artefact.sizes:
            assert size.faithful == ("pass" if ran else "not checked")
            assert size.quality == ("pass" if ran else "not checked")
            assert bool(size.parity) == ran
            for parity in size.parity:
                assert parity.agreeing is None
                assert parity.tolerance.agreement is None
        assert artefact.fidelity == ("pass" if ran else "not checked")
    for one in report.sizes:
        assert (one.samples, one.noise) == (8, 4)
        assert one.float64_rel_l2 < 1e-14
        assert one.graph.verdict == "pass"


def test_figures_at_a_size_are_those_of_pytorch_in_float64(bundle):
    report, folder = bundle
    (fp32,) = [a for a in report.artefacts if a.name == "fp32 on ort-cpu"]
    (size,) = [size for size in fp32.sizes if size.name == "64 × 72"]
    held_out = digits((1, 32, 32), "held-out").inputs[:8]
    inputs = functional.interpolate(
        torch.from_numpy(held_out), size=(64, 72), mode="bilinear", antialias=True
    ).numpy()
    session = ort.InferenceSession(folder / "maps.fp32.onnx", providers=["CPUExecutionProvider"])
    want = exact(sized.make("Maps"), inputs)
    got = session.run(["map"], {"input": inputs})[0]
    (parity,) = [p for p in size.parity if p.output == "map" and "held-out" in p.inputs]
    assert parity.max_abs == pytest.approx(np.abs(got - want["map"]).max(), rel=0.3)
    assert parity.rel_l2 == pytest.approx(off(got, want["map"]), rel=0.3)


def test_a_report_has_a_row_for_each_size(bundle):
    report, folder = bundle
    page = (folder / "report.md").read_text()
    for size in ("32 × 32 (tuned for)", "16 × 16", "33 × 53", "64 × 72"):
        assert f"| fp32 on ort-cpu | {size} | pass |" in page
        assert f"| fp32 on tensorrt-rtx | {size} | not checked" in page
    assert "N×1×16–64×16–72 float32" in page
    assert "One sample of 32 × 32" in page
    assert "pictures in another size are not the held-out ones" in page
    assert markdown.render(report) == page
    table = json.loads((folder / "report.json").read_text())
    entry = table["variants"][0]["artefacts"][0]["sizes"][0]
    assert (entry["height"], entry["width"], entry["faithful"]) == (16, 16, "pass")
    assert entry["fidelity"]["multiple"] < 4
    assert record.parse((folder / "report.json").read_text()) == report
    from rich.console import Console

    console = Console(width=500, record=True, file=io.StringIO())
    console.print(terminal.render(report, folder))
    shown = console.export_text()
    assert "fp32 on ort-cpu: at 16 × 16 fidelity pass" in shown
    assert "tensorrt-rtx: at 16" not in shown


def test_cost_is_of_the_size_that_engines_are_tuned_for(bundle):
    report, _ = bundle
    cost = report.variants[0].cost
    first, second, _ = (layer.macs for layer in cost.layers if layer.op == "Conv")
    assert first == 16 * 16 * 8 * 9
    assert second == 8 * 8 * 16 * 8 * 9


def test_a_bundle_is_compared_again_at_the_same_sizes(bundle):
    report, folder = bundle
    again = recheck.check_bundle(folder, model=sized.make("Maps"))
    for before, now in zip(report.artefacts, again.artefacts, strict=True):
        assert [s.name for s in now.sizes] == [s.name for s in before.sizes]
        assert [s.faithful for s in now.sizes] == [s.faithful for s in before.sizes]
    assert [one.name for one in again.sizes] == ["16 × 16", "33 × 53", "64 × 72"]
    assert not again.failures


# ── Conversions that are right at one size ──────────────────────────────────────────


def sliced(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let a graph look at the first 8 rows of its deepest map alone, which are all at 32 × 32."""
    graph = model.graph
    mean = next(node for node in graph.node if node.op_type == "ReduceMean")
    numbers = {"starts": [0], "ends": [8], "axes": [2]}
    for name, value in numbers.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    cut = onnx.helper.make_node("Slice", [mean.input[0], *numbers], ["cut"], name="cut/Slice")
    put_in_front(graph, mean, cut)
    return model


def reshaped(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the deepest map the shape that it has at 32 × 32, as a constant."""
    graph = model.graph
    mean = next(node for node in graph.node if node.op_type == "ReduceMean")
    shape = np.array([-1, 16, 8, 8], np.int64)
    graph.initializer.append(onnx.numpy_helper.from_array(shape, "shape"))
    node = onnx.helper.make_node("Reshape", [mean.input[0], "shape"], ["re"], name="re/Reshape")
    put_in_front(graph, mean, node)
    return model


def put_in_front(graph: onnx.GraphProto, reader: onnx.NodeProto, node: onnx.NodeProto) -> None:
    """Let a node be what another reads first."""
    reader.input[0] = node.output[0]
    at = list(graph.node).index(reader)
    replace_nodes(graph, [*graph.node[:at], node, *graph.node[at:]])


@pytest.mark.parametrize("break_it", [sliced, reshaped])
def test_a_graph_that_is_right_at_one_size_alone_fails_with_the_size(
    break_it, monkeypatch, tmp_path
):
    from exporter import pipeline

    export = pipeline.export_source

    def broken(job, folded, path):
        made = export(job, folded, path)
        onnx.save(break_it(onnx.load(path)), path)
        return made

    monkeypatch.setattr(pipeline, "export_source", broken)
    report = exporter.run(module("Maps"), profile(precision=ASKED), tmp_path / "build")
    assert report.verdict == "fail"
    for artefact in report.artefacts:
        assert artefact.rung.fidelity.verdict == "pass"  # at 32 × 32
        by_name = {size.name: size for size in artefact.sizes}
        assert by_name["64 × 72"].faithful == "fail"
        assert artefact.fidelity == "fail"
    assert any("at 64 × 72: " in failure for failure in report.failures)
    if break_it is sliced:  # in 16 rows there are 4, which are not cut
        assert report.artefacts[0].sizes[0].faithful == "pass"


def test_a_fold_that_is_right_at_one_size_alone_fails_with_the_size(monkeypatch, tmp_path):
    """Traced for 32 × 32 alone, the branch of more than 20 rows is the only one there is."""
    from exporter import network

    monkeypatch.setattr(network, "fold_batchnorm", lambda net, two, free: fold_batchnorm(net, two))
    report = exporter.run(module("Deciding"), profile(), tmp_path / "build")
    (small, between, large) = report.sizes
    assert small.float64_rel_l2 > 0.01
    assert small.failures[0].startswith("at 16 × 16: folding moves the network by")
    assert not between.failures
    assert not large.failures
    (artefact,) = report.artefacts
    assert [size.faithful for size in artefact.sizes] == ["fail", "pass", "pass"]
    assert report.verdict == "fail"


@pytest.mark.parametrize("break_it", [sliced, reshaped])
def test_a_file_of_a_bundle_that_is_right_at_one_size_alone_is_caught(break_it, bundle, tmp_path):
    _, folder = bundle
    copy = shutil.copytree(folder, tmp_path / "build")
    path = copy / "maps.fp32.onnx"
    onnx.save(break_it(onnx.load(path)), path)
    found = recheck.check_bundle(copy, model=sized.make("Maps"))
    (fp32,) = [a for a in found.artefacts if a.name == "fp32 on ort-cpu"]
    assert fp32.verdict == "fail"
    if break_it is reshaped:  # it does not run at all, which a process of its own finds out
        assert "for an input of 1 × 64 × 72" in fp32.refused
        assert "re/Reshape" in fp32.refused
    else:
        assert fp32.rung.fidelity.verdict == "pass"
        large = fp32.sizes[-1]
        assert (large.name, large.faithful) == ("64 × 72", "fail")
        assert large.failures[0].startswith("at 64 × 72: its 'label' is")
        assert large.fidelity.first.op == "ReduceMean"
    (int8,) = [a for a in found.artefacts if a.name == "int8 on ort-cpu"]
    assert int8.fidelity == "pass"


# ── A file by itself ────────────────────────────────────────────────────────────────


def test_flops_of_a_file_say_which_size_to_give(maps):
    from exporter.counting import count_all

    _, made = maps
    with refused(GraphError, "net.fp32.onnx", hint=("--input 1x32x32",)):
        count_all([str(made.path)])
    (counted,) = count_all([str(made.path)], input_shape=(1, 64, 64))
    assert counted.cost.layers[[layer.op for layer in counted.cost.layers].index("Conv")].macs == (
        32 * 32 * 8 * 9
    )


def test_kernels_are_timed_in_the_size_that_the_file_is_tuned_for(maps):
    _, made = maps
    _, kernels = load_runtime("ort-cpu", {"threads": 1}).kernels(
        made.path, batch=2, runs=1, warmup=0
    )
    assert max(kernel.macs for kernel in kernels) == 2 * 8 * 8 * 16 * 8 * 9


def test_a_file_that_says_no_size_is_refused_where_one_is_needed(maps, tmp_path):
    _, made = maps
    model = onnx.load(made.path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "open.onnx")
    assert sides_of(model) == {}
    with refused(InputRefused, "open.onnx", "'height' of 'input'", hint=("[size]",)):
        shapes_to_run(tmp_path / "open.onnx", 1)
    with refused(InputRefused, "open.onnx", "'height'", hint=("[size]",)):
        load_runtime("ort-cpu", {}).kernels(tmp_path / "open.onnx", batch=1, runs=1, warmup=0)


@pytest.mark.parametrize("said", ["16 32", "16 32 x", "-1 2 3", "1 2 99999999999", "", "1 2 3 4"])
def test_metadata_that_is_no_range_says_nothing(maps, said):
    _, made = maps
    model = onnx.load(made.path)
    model.metadata_props[0].value = said
    assert sides_of(model).keys() == {"width"}


def test_a_file_whose_largest_size_is_too_large_is_refused_before_it_runs(maps, tmp_path):
    _, made = maps
    model = onnx.load(made.path)
    for entry in model.metadata_props:
        entry.value = "16 32 900000"
    onnx.save(model, tmp_path / "huge.onnx")
    with refused(InputRefused, "huge.onnx", "900000", "GB", hint=None):
        check_onnx(tmp_path / "huge.onnx", runs=True)


def test_a_bundle_is_timed_in_the_size_that_it_is_tuned_for(bundle):
    _, folder = bundle
    asked = BenchAsked(batches=(1,), runs=2, loads=1, runtimes=("ort-cpu",))
    found = exporter.bench_bundles([folder], asked)
    assert found.samples == ("360 held-out digits at 32 × 32",)
    assert {latency.batch for latency in found.latency} == {1}


# ── What comes with it ──────────────────────────────────────────────────────────────


def test_pixels_are_taken_at_every_size_with_the_channels_last(tmp_path):
    fused = {"mean": [0.3], "std": [0.4], "fuse": "nhwc"}
    asked = {"fp32": {"tolerance": {"sqnr_db": 100.0}}, "int8": INT8}
    folder = tmp_path / "build"
    report = exporter.run(module("Maps"), profile(preprocess=fused, precision=asked), folder)
    assert not report.failures
    model = onnx.load(folder / "maps.fp32.onnx")
    assert axes_of(model)["input"] == ["batch", "height", "width", 1]
    assert axes_of(model)["map"] == ["batch", 3, "height", "width"]
    session = ort.InferenceSession(folder / "maps.fp32.onnx", providers=["CPUExecutionProvider"])
    given = np.random.default_rng(0).integers(0, 256, (2, 1, 50, 21), dtype=np.uint8)
    taken = np.ascontiguousarray(given.transpose(0, 2, 3, 1))
    got = session.run(["map"], {"input": taken})[0]
    want = exact(sized.make("Maps"), ((given / 255.0 - 0.3) / 0.4))["map"]
    assert off(got, want) < 1e-5


def test_the_largest_scores_are_judged_at_every_size(tmp_path):
    asked = {"fp32": {"tolerance": {"sqnr_db": 100.0}}, "int8": INT8}
    folder = tmp_path / "build"
    chosen = profile(postprocess={"top_k": 3}, precision=asked)
    report = exporter.run(module("Labels"), chosen, folder)
    assert not report.failures
    assert {size.faithful for a in report.artefacts for size in a.sizes} == {"pass"}
    inputs = pictures((20, 61))
    want = torch.topk(torch.from_numpy(exact(sized.make("Labels"), inputs)["output"]), 3)
    path = folder / "labels.fp32.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    values, labels = session.run(None, {"input": inputs})
    assert off(values, want.values.numpy()) < 1e-6
    assert np.array_equal(labels, want.indices.numpy())
    model = onnx.load(path)
    (last,) = (node for node in model.graph.node if node.op_type == "TopK")
    last.attribute.append(onnx.helper.make_attribute("largest", 0))
    onnx.save(model, path)
    broken, whole = exporter.check_bundle(folder, model=sized.make("Labels")).artefacts
    assert {size.faithful for size in broken.sizes} == {"fail"}
    assert {size.faithful for size in whole.sizes} == {"pass"}


def test_two_pictures_share_the_size(tmp_path):
    shapes = {"picture": (3, 32, 32), "flow": (2, 32, 32)}
    generator = np.random.default_rng(0)
    data = {
        name: generator.standard_normal((60, *shape), dtype=np.float32)
        for name, shape in shapes.items()
    }
    net = live_model(sized.make("Both"), shapes)
    asked = {
        "fp32": {"tolerance": {"sqnr_db": 100.0}},
        "fp16": {},
        "int8": {"options": INT8["options"]},
    }
    report = exporter.run(net, profile(precision=asked), tmp_path / "build", data=data)
    assert not report.failures
    for artefact in report.artefacts:
        assert artefact.fidelity == "pass"
        assert len(artefact.sizes) == 3


def test_the_documents_network_takes_every_size(tmp_path):
    asked = profile(
        size={"min": [49, 49], "max": [81, 97]},
        precision={"fp32": {"tolerance": {"sqnr_db": 100.0}}},
    )
    folder, held_out = tmp_path / "build", digits((1, 65, 65), "held-out")
    data = (held_out.inputs[:40], held_out.labels[:40])
    report = exporter.run("resnet18", asked, folder, input_shape=(1, 65, 65), data=data)
    assert not report.failures
    assert [size.faithful for size in report.artefacts[0].sizes] == ["pass"] * 3
    net = exporter.load_model("resnet18").module()
    exporter.load_weights(net, exporter.load_model("resnet18").weights)
    session = ort.InferenceSession(
        folder / "resnet18.fp32.onnx", providers=["CPUExecutionProvider"]
    )
    for size in [(49, 97), (81, 49), (70, 60)]:
        inputs = pictures(size, 2)
        with torch.no_grad():
            want = net.eval().double()(torch.from_numpy(inputs).double()).numpy()
        assert off(session.run(None, {"input": inputs})[0], want) < 1e-5


def test_a_module_in_memory_gets_it_through_the_profile(tmp_path):
    found = exporter.export(
        sized.make("Maps"), torch.zeros(1, 1, 32, 32), out=tmp_path / "build", profile=profile()
    )
    assert [size.name for size in found.report.artefacts[0].sizes] == [
        "16 × 16",
        "33 × 53",
        "64 × 72",
    ]
    with found.session() as session:
        assert session({"input": pictures((40, 50))})["map"].shape == (3, 3, 40, 50)
