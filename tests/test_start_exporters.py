"""Files as exporters write them: what is made of their operators and of their shape arithmetic."""

from __future__ import annotations

import warnings
from itertools import cycle
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import disturb, refused
from onnx import numpy_helper
from onnx.helper import make_node
from onnx.reference import ReferenceEvaluator
from test_start_file import profile
from test_start_layers import POOL, SHAPE, apart, bn, noise, norm, run, started, values, written
from torch import nn
from torch.nn import functional

import exporter
from exporter.errors import InputRefused


class Around(nn.Module):
    """A convolution with its BatchNorm, what a test is about, and a classifier."""

    def __init__(self, what, *layers: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.what, self.layers, self.fc = what, nn.ModuleList(layers), nn.Linear(8, 4)

    def forward(self, x):
        y = self.what(self.layers, self.norm(self.conv(x)))
        return self.fc(y.mean((2, 3)) if y.ndim == 4 else y)


def viewed(_, x):
    return x.mean((2, 3), keepdim=True).view(x.size(0), -1)


def shuffled(_, x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)


def resized(_, x):
    small = functional.max_pool2d(x, 2)
    return functional.interpolate(small, size=x.shape[2:], mode="bilinear") + x


def attended(_, x):
    rows = x.flatten(2)
    return (rows @ functional.softmax(rows.transpose(1, 2) @ rows / 3, -1)).view(x.shape)


def standardised(_, x):
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-3)


def by_einsum(layers, x):
    return torch.einsum("nchw,cd->ndhw", x, layers[0].weight)


def over_channels(layers, x):
    return layers[0](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def first(layers, x):
    return layers[0](x)


NETWORKS = {
    "viewed": lambda: Around(viewed),
    "shuffled": lambda: Around(shuffled),
    "resized": lambda: Around(resized),
    "bicubic": lambda: Around(
        lambda _, x: functional.interpolate(x, scale_factor=2, mode="bicubic")
    ),
    "attended": lambda: Around(attended),
    "standardised": lambda: Around(standardised),
    "instance norm": lambda: Around(
        lambda layers, x: torch.tanh(layers[0](x)), nn.InstanceNorm2d(8, affine=True)
    ),
    "group norm": lambda: Around(lambda layers, x: torch.tanh(layers[0](x)), nn.GroupNorm(2, 8)),
    "layer norm": lambda: Around(over_channels, nn.LayerNorm(8)),
    "einsum": lambda: Around(by_einsum, nn.Linear(8, 8)),
    "unit length": lambda: Around(lambda _, x: functional.normalize(x, dim=1)),
    "tiled": lambda: Around(lambda layers, x: layers[0](x.repeat(1, 2, 1, 1)), nn.Conv2d(16, 8, 1)),
    "ramp": lambda: Around(lambda _, x: x + torch.arange(x.shape[3], dtype=x.dtype)),
}
WAYS = {
    "dynamo": {"dynamo": True, "opset_version": 18, "dynamic_shapes": ({0: "n"},)},
    "dynamo, fixed": {"dynamo": True, "opset_version": 20},
    "torchscript": {"dynamo": False, "opset_version": 13, "dynamic_axes": {"x": {0: "n"}}},
    "torchscript, fixed": {"dynamo": False, "opset_version": 12},
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return disturb(NETWORKS[name]()).eval()


def exported(name: str, by: str, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = {"external_data": False, "verbose": False} if "dynamo" in by else {}
        torch.onnx.export(
            network(name), (torch.zeros(2, *SHAPE),), path, input_names=["x"], **WAYS[by], **more
        )
    return path


OTHERS = cycle(list(WAYS)[1:])


@pytest.mark.parametrize(
    ("name", "by"), [pair for name in NETWORKS for pair in ((name, "dynamo"), (name, next(OTHERS)))]
)
def test_what_torch_onnx_writes_is_the_network_and_folds(name, by, tmp_path):
    start = started(exported(name, by, tmp_path / "n.onnx"))
    x = noise(SHAPE)
    with torch.inference_mode():
        want = network(name).double()(torch.from_numpy(x).double()).numpy()
    (got,) = start.double()({"x": x}).values()
    assert apart(got, want) < 2e-6  # constants of half a graph are float32
    made = start.fold((torch.from_numpy(x[:2]),))
    (folded,) = made.session(double=True)({"x": x}).values()
    assert apart(folded, want) < 2e-6
    assert apart(run(made.model, x), want) < 1e-5


@pytest.mark.parametrize("name", ["layer norm", "einsum", "standardised"])
def test_every_precision_of_it_is_faithful(name, tmp_path):
    path = exported(name, "dynamo", tmp_path / "n.onnx")
    np.save(tmp_path / "d.npy", noise(SHAPE, 40))
    report = exporter.run(
        path, profile("fp32", "fp16", "int8"), tmp_path / "out", data=tmp_path / "d.npy"
    )
    assert [(a.name, a.fidelity) for a in report.artefacts] == [
        (f"{precision} on ort-cpu", "pass") for precision in ("fp32", "fp16", "int8")
    ]


# ── Shape arithmetic ────────────────────────────────────────────────────────────────


def flattened(*nodes, first: str = "batch") -> list:
    """Return a pool and a Reshape of it to what nodes make of the shape ``s`` of x, as ``to``."""
    return [
        make_node("GlobalAveragePool", ["x"], ["p"], "pool"),
        make_node("Shape", ["x"], ["s"], "shape"),
        *nodes,
        make_node("Reshape", ["p", "to"], ["y"], "reshape"),
    ]


COUNT = [
    make_node("Gather", ["s", "zero"], ["n"], "n"),
    make_node("Unsqueeze", ["n", "axis"], ["n1"], "n1"),
]
ARITHMETIC = {
    "the batch and what is left": [
        *COUNT,
        make_node("Concat", ["n1", "left"], ["to"], "to", axis=0),
    ],
    "what is left and the channels": [
        make_node("Slice", ["s", "one", "two"], ["c"], "c"),
        make_node("Concat", ["left", "c"], ["to"], "to", axis=0),
    ],
    "the batch and a product": [
        *COUNT,
        make_node("Slice", ["s", "one", "two"], ["c"], "c"),
        make_node("Mul", ["c", "axis1"], ["c1"], "c1"),
        make_node("Concat", ["n1", "c1"], ["to"], "to", axis=0),
    ],
}
STORED = [
    ("zero", np.array(0)),
    ("axis", np.array([0])),
    ("axis1", np.array([1])),
    ("left", np.array([-1])),
    ("one", np.array([1])),
    ("two", np.array([2])),
]


@pytest.mark.parametrize("batch", ["N", 2])
@pytest.mark.parametrize("said", ARITHMETIC)
def test_a_shape_that_is_computed_becomes_a_constant(said, batch, tmp_path):
    path = written(tmp_path / "n.onnx", flattened(*ARITHMETIC[said]), STORED, batch=batch, gives=3)
    start = started(path)
    assert [n.op_type for n in start.model.graph.node] == ["GlobalAveragePool", "Reshape"]
    assert any("what follows from shapes alone computed" in c for c in start.origin[1].changes)
    x = noise(SHAPE, 6)
    (got,) = start.double()({"x": x}).values()
    assert np.allclose(got, x.mean((2, 3)), atol=1e-6)


def test_what_the_batch_decides_otherwise_stays_arithmetic(tmp_path):
    """(1, N) is no (N, …), and is asked for on the way alone."""
    nodes = flattened(
        *COUNT,
        make_node("Concat", ["axis1", "n1", "left"], ["over"], "over", axis=0),
        make_node("Reshape", ["x", "over"], ["t"], "turned"),
        make_node("ReduceSum", ["t", "axis"], ["u"], "sum", keepdims=0),
        make_node("ReduceMean", ["u", "axis1"], ["v"], "mean", keepdims=1),
        make_node("Concat", ["n1", "left"], ["to"], "to", axis=0),
    )
    nodes += [make_node("Add", ["q", "v"], ["y"], "add")]
    nodes[-2].output[0] = "q"
    start = started(written(tmp_path / "n.onnx", nodes, STORED, gives=3))
    assert "Shape" in [n.op_type for n in start.model.graph.node]
    x = noise(SHAPE, 4)
    (got,) = start.double()({"x": x}).values()
    assert np.allclose(got, x.mean((2, 3)) + x.mean((1, 2, 3))[:, None], atol=1e-6)


# ── Graphs written by hand ──────────────────────────────────────────────────────────


def nodes_of(op: str, reads=(), **attributes) -> list:
    return [
        make_node("Conv", ["x", "w"], ["c"], "conv"),
        bn("c", "n"),
        make_node(op, ["n", *reads], ["z"], "what", **attributes),
        *POOL,
    ]


BY_HAND = {
    "resize with an empty region": (11, "Resize", ("none", "scales"), {"mode": "linear"}),
    "clip, bounds as attributes": (7, "Clip", (), {"min": -0.5, "max": 0.7}),
    "clip, one bound": (13, "Clip", ("low",), {}),
    "clip, the other bound": (13, "Clip", ("", "high"), {}),
    "pad as attributes": (10, "Pad", (), {"pads": [0, 0, 1, 0, 0, 0, 0, 2], "value": 0.5}),
    "pad of some axes": (18, "Pad", ("pads", "", "axes"), {"mode": "reflect"}),
    "upsample": (9, "Upsample", ("uneven",), {"mode": "nearest"}),
    "upsample, linear": (9, "Upsample", ("scales",), {"mode": "linear"}),
    "resize of opset 10": (10, "Resize", ("uneven",), {"mode": "nearest"}),
    "resize of opset 10, linear": (10, "Resize", ("scales",), {"mode": "linear"}),
    "resize, cubic": (13, "Resize", ("", "scales"), {"mode": "cubic"}),
    "slice as attributes": (9, "Slice", (), {"starts": [1], "ends": [9], "axes": [2]}),
    "dropout with a ratio": (10, "Dropout", (), {"ratio": 0.3}),
    "a mean by attributes": (11, "ReduceMean", (), {"axes": [2], "keepdims": 1}),
    "a mean by an input": (18, "ReduceMean", ("axes",), {"keepdims": 1}),
    "local response": (13, "LRN", (), {"size": 3, "alpha": 0.1}),
    "prelu": (16, "PRelu", ("slope",), {}),
}
HELD = [
    ("none", np.array([], np.float32)),
    ("low", np.float32(-0.25)),
    ("high", np.float32(0.5)),
    ("pads", np.array([1, 2, 1, 0])),
    ("axes", np.array([2, 3])),
    ("scales", np.array([1, 1, 2, 2], np.float32)),
    ("uneven", np.array([1, 1, 1.5, 3], np.float32)),
    ("slope", values(4, 1, 1, seed=3)),
]


@pytest.mark.parametrize("what", BY_HAND)
def test_each_form_of_an_operator_is_what_onnx_says(what, tmp_path):
    opset, op, reads, attributes = BY_HAND[what]
    held = [(name, value) for name, value in HELD if name in reads]
    path = written(
        tmp_path / "n.onnx",
        nodes_of(op, reads, **attributes),
        [("w", values(4, 3, 3, 3)), *norm(4), *held],
        opset=opset,
    )
    start = started(path)
    x = noise(SHAPE)
    (got,) = start.double()({"x": x}).values()
    assert apart(got, run(onnx.load(path), x)) < 1e-6
    made = start.fold((torch.from_numpy(x[:2]),))
    assert apart(run(made.model, x), got) < 1e-6


def test_chains_of_identities_and_constant_nodes_are_seen_through(tmp_path):
    nodes = [
        make_node("Constant", [], ["w0"], "w0", value=numpy_helper.from_array(values(4, 3, 3, 3))),
        make_node("Identity", ["w0"], ["w1"], "i0"),
        make_node("Identity", ["w1"], ["w"], "i1"),
        make_node("Identity", ["x"], ["x1"], "i2"),
        make_node("Conv", ["x1", "w"], ["c0"], "conv"),
        make_node("Identity", ["c0"], ["c"], "i3"),
        bn("c", "z"),
        *POOL,
    ]
    path = written(tmp_path / "n.onnx", nodes, norm(4))
    start = started(path)
    x = noise(SHAPE)
    made = start.fold((torch.from_numpy(x[:2]),))
    assert [fate.folded for fate in made.fates] == [True]
    reference = ReferenceEvaluator(onnx.load(path)).run(None, {"x": x})[0]
    assert apart(run(made.model, x), reference) < 1e-5


def test_operators_that_are_not_known_are_named_together_with_the_way_out(tmp_path):
    nodes = nodes_of("Hardmax")
    nodes[1:1] = [make_node("CumSum", ["c", "axis"], ["c2"], "cumulated")]
    nodes[2].input[0] = "c2"
    tensors = [("w", values(4, 3, 3, 3)), ("axis", np.array(2)), *norm(4)]
    path = written(tmp_path / "n.onnx", nodes, tensors)
    with refused(
        InputRefused,
        "n.onnx: the float64 reference does not know what it has: CumSum 'cumulated' and",
        "Hardmax 'what'",
        hint=("extract_model",),
    ):
        started(path)
