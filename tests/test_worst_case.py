"""The search finds planted disagreements that random inputs miss, and invents none."""

from __future__ import annotations

import json
from functools import cache

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import HASTE, TinyModel
from onnx import helper, numpy_helper

import exporter
from exporter.bundle import MANIFEST, extended_bundle, read_manifest
from exporter.emulation import Emulator
from exporter.emulation.leaky import LEAKY
from exporter.emulation.operators import OPERATORS
from exporter.records import Flip
from exporter.samples import digits
from exporter.worst_case import Search, search_worst_case

PATTERN = np.random.default_rng(7).choice([-1.0, 1.0], 32 * 32).astype(np.float32)


@cache
def samples() -> np.ndarray:
    return digits((1, 32, 32), "held-out").inputs[:64]


def with_nodes(model: onnx.ModelProto, constants, nodes) -> onnx.ModelProto:
    """Add nodes that make ``logits`` of ``plain``, what the last node gave."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.node[-1].output[0] = "plain"
    changed.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value, np.float32), name)
        for name, value in constants.items()
    )
    changed.graph.node.extend(helper.make_node(*node) for node in nodes)
    onnx.checker.check_model(changed)
    return changed


def doctored(model: onnx.ModelProto, threshold: float) -> onnx.ModelProto:
    """Add a branch that is off until a picture is more like the pattern than the threshold."""
    one_class = np.zeros((1, 10))
    one_class[0, 3] = 1
    constants = {
        "pattern": PATTERN[:, None],
        "off": np.array([-threshold]),
        "to_class": one_class,
    }
    nodes = [
        ("Flatten", ["input"], ["pixels"]),
        ("Gemm", ["pixels", "pattern", "off"], ["alike"]),
        ("Relu", ["alike"], ["on"]),
        ("Gemm", ["on", "to_class"], ["extra"]),
        ("Add", ["plain", "extra"], ["logits"]),
    ]
    return with_nodes(model, constants, nodes)


def clamped(model: onnx.ModelProto, largest: float) -> onnx.ModelProto:
    """Cut the logits off where a calibration saw none."""
    bounds = {"low": -largest, "high": largest}
    return with_nodes(model, bounds, [("Clip", ["plain", "low", "high"], ["logits"])])


def runs(model: onnx.ModelProto):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"input": x})[0].astype(np.float64)


@pytest.fixture(scope="module")
def graph(tiny_onnx) -> onnx.ModelProto:
    return onnx.load(tiny_onnx.path)


@pytest.fixture(scope="module")
def network(tiny_module):
    double = exporter.TorchSession.of(tiny_module, "logits", double=True)
    return lambda x: double({"input": x})["logits"]


def named(run):
    """Return what gives the outputs by name."""
    return lambda x: {"logits": run(x)}


def search(graph, model, network, **asked):
    network, artefact = named(network), named(runs(model))
    return search_worst_case(
        "planted",
        reference=Emulator.of(graph),
        surrogate=Emulator.of(model),
        inputs=(TinyModel.input,),
        outputs=(TinyModel.output,),
        samples=samples(),
        on_samples=(network(samples()), artefact(samples())),
        run_reference=network,
        run_artefact=artefact,
        search=Search(**asked),
    )


def test_a_branch_that_ten_thousand_random_inputs_never_reach_is_found(graph, network):
    generator = np.random.default_rng(0)
    low, high = samples().min(), samples().max()
    shape = (10_000, 1, 32, 32)
    moved = samples()[generator.integers(0, 64, len(np.empty(shape[0])))]
    moved = moved + generator.uniform(-0.1, 0.1, shape) * (high - low)
    tried = [generator.uniform(low, high, shape), generator.standard_normal(shape), moved]
    likest = max(float((x.reshape(len(x), -1) @ PATTERN).max()) for x in tried)
    model = doctored(graph, likest + 20)
    for x in tried:
        part = x[:500].astype(np.float32)
        assert np.abs(runs(model)(part) - runs(graph)(part)).max() < 1e-4
    found = search(graph, model, network, steps=40)
    assert found.record.gap_on_samples < 1e-4
    assert found.record.gap > 10
    assert found.record.flips > 0
    assert found.record.first_flip.artefact == 3
    worst = found.inputs[:1]
    assert np.abs(runs(model)(worst) - network(worst)).max() == pytest.approx(found.record.gap)


def test_what_it_finds_lies_near_a_sample_and_inside_the_datas_range(graph, network):
    model = doctored(graph, 170.0)
    found = search(graph, model, network, steps=10, radius=0.05)
    low, high = samples().min(), samples().max()
    assert low - 1e-6 <= found.inputs.min()
    assert found.inputs.max() <= high + 1e-6
    apart = np.abs(found.inputs[:, None] - samples()[None]).max(axis=(2, 3, 4)).min(axis=1)
    assert apart.max() <= 0.05 * (high - low) + 1e-5


def test_a_range_that_only_extreme_inputs_leave_is_found(graph, network):
    seen = np.abs(network(samples())).max()
    found = search(graph, clamped(graph, 1.02 * seen), network, steps=60)
    assert found.record.gap_on_samples < 1e-4
    assert found.record.gap > 0.01 * seen


def test_an_honest_artefact_has_no_gap_but_rounding_and_no_flip(graph, network):
    found = search(graph, graph, network, steps=20)
    assert found.record.gap < 1e-4
    assert (found.record.flips, found.record.first_flip) == (0, None)


def test_the_place_where_the_network_is_undecided_decides_the_artefact(graph, network):
    """Logits off by 1e-4 flip no sample, but it does where two logits are alike."""
    biased = with_nodes(
        graph, {"bias": [1e-4, -1e-4] * 5}, [("Add", ["plain", "bias"], ["logits"])]
    )
    found = search(graph, biased, network, steps=60, lanes=48, radius=0.5)
    assert found.record.flips_on_samples == 0
    assert found.record.gap == pytest.approx(1e-4, rel=0.1)
    assert found.record.flips > 0
    assert 0 < found.record.first_flip.margin <= 2.1e-4


def test_the_same_seed_finds_the_same(graph, network):
    model = doctored(graph, 170.0)
    one, other = (search(graph, model, network, steps=5) for _ in range(2))
    assert one.record == other.record
    assert np.array_equal(one.inputs, other.inputs)


def test_values_that_are_not_finite_are_counted_and_kept_first(graph, network):
    broken = with_nodes(graph, {"zero": [0.0]}, [("Div", ["plain", "zero"], ["logits"])])
    found = search(graph, broken, network, steps=5)
    assert found.record.nonfinite == found.record.tried
    assert np.isfinite(found.inputs).all()


@pytest.mark.parametrize(
    ("op", "attributes", "more"),
    [
        ("Relu", {}, ()),
        ("Clip", {}, (torch.tensor(0.0), torch.tensor(6.0))),
        ("Clip", {"min": -1.0}, ()),
        ("HardSigmoid", {}, ()),
        ("Max", {}, (torch.tensor(0.5),)),
        ("Min", {}, (torch.tensor(0.5),)),
        ("QuantizeLinear", {"to": 3}, (torch.tensor(0.01), torch.tensor(0.0))),
        ("QuantizeLinear", {"to": 17}, (torch.tensor(0.04), torch.tensor(0.0))),
    ],
)
def test_leaky_operators_give_the_value_and_a_gradient_everywhere(op, attributes, more):
    x = torch.linspace(-20, 20, 401, dtype=torch.float64).reshape(1, 1, -1).requires_grad_()
    more = tuple(part.double() for part in more)
    value = LEAKY[op](attributes, x, *more)
    want = OPERATORS[op](attributes, x.detach(), *more)
    assert torch.allclose(value.detach(), want, rtol=0, atol=1e-13)  # of the gradient's neighbour
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert (slope.abs() > 0).all()


# ── In a bundle ─────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def bundle(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("worst") / "build"
    profile = exporter.load_profile("default", HASTE)
    runtime = {name: options for name, options in profile.runtime.items() if name == "ort-cpu"}
    profile = msgspec.structs.replace(profile.only(("fp32", "int8")), runtime=runtime)
    exporter.run(tiny_model, profile, folder)
    return folder


def test_the_inputs_found_go_into_the_bundle_and_nothing_else_changes(bundle, tiny_model):
    before = {file.name: file for file in read_manifest(bundle).files}
    for _ in range(2):  # the second takes the place of the first
        report = exporter.check_bundle(bundle, model=tiny_model, search=Search(steps=3, lanes=4))
    after = {file.name: file for file in read_manifest(bundle).files}
    added = {
        f"worst-case/{name}" for name in ("fp32-ort-cpu.npy", "int8-ort-cpu.npy", "record.json")
    }
    assert after.keys() - before.keys() == added
    assert all(after[name] == file for name, file in before.items())
    assert [case.artefact for case in report.worst_cases] == ["fp32 on ort-cpu", "int8 on ort-cpu"]
    assert json.loads((bundle / "worst-case/record.json").read_text()) == [
        msgspec.to_builtins(case) for case in report.worst_cases
    ]
    for case in report.worst_cases:
        inputs = np.load(bundle / case.file)
        assert (inputs.dtype, inputs.shape[1:]) == (np.float32, (1, 32, 32))


def test_a_bundle_that_is_extended_vouches_for_nothing_that_had_changed(bundle):
    name = next(f.name for f in read_manifest(bundle).files if f.name.endswith(".onnx"))
    whole = (bundle / name).read_bytes()
    recorded = next(f for f in read_manifest(bundle).files if f.name == name)
    (bundle / name).write_bytes(whole + b"\0")
    try:
        with extended_bundle(bundle, "more") as part:
            (part / "one.txt").write_text("one")
        assert recorded in read_manifest(bundle).files
        assert (bundle / name).read_bytes() == whole + b"\0"
        assert (bundle / "more/one.txt").read_text() == "one"
    finally:
        (bundle / name).write_bytes(whole)


def test_an_extension_that_fails_leaves_the_bundle_as_it_was(bundle):
    before = (bundle / MANIFEST).read_bytes()

    def fail() -> None:
        with extended_bundle(bundle, "half") as part:
            (part / "one.txt").write_text("one")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert (bundle / MANIFEST).read_bytes() == before
    assert not (bundle / "half").exists()


def test_a_flip_on_a_sample_itself_is_one_too(graph, network):
    """Step 0 is a sample as it was."""
    to_class = np.zeros((1, 10))
    to_class[0, 5] = 1e3
    wrong = with_nodes(graph, {"always": to_class}, [("Add", ["plain", "always"], ["logits"])])
    found = search(graph, wrong, network, steps=2)
    assert found.record.flips_on_samples > 0
    assert isinstance(found.record.first_flip, Flip)
    assert (found.record.first_flip.step, found.record.first_flip.distance) == (0, 0.0)
