"""ONNX graphs with BatchNorms in them, folded as graphs of layers and written back."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import TinyModel, disturb
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info
from torch import nn

from exporter.profile import load_profile
from exporter.start.file import FoldedFile, OnnxFile

PROFILE = load_profile("default", {"runtime.ort-cpu.threads": 1})
SHAPE = (3, 12, 12)


def by_dynamo(module: nn.Module, path: Path, shape: tuple[int, ...]) -> None:
    torch.onnx.export(
        module,
        (torch.zeros(2, *shape),),
        path,
        dynamo=True,
        dynamic_shapes=({0: "n"},),
        input_names=["image"],
        output_names=["scores"],
        external_data=False,
        optimize=False,
        opset_version=18,
        verbose=False,
    )


def by_torchscript(module: nn.Module, path: Path, shape: tuple[int, ...]) -> None:
    torch.onnx.export(
        module,
        (torch.zeros(1, *shape),),
        path,
        dynamo=False,
        dynamic_axes={"image": {0: "n"}},
        input_names=["image"],
        output_names=["scores"],
        opset_version=13,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
    )


EXPORTERS = {"dynamo": by_dynamo, "torchscript": by_torchscript}


def exported(module: nn.Module, path: Path, by: str = "torchscript", shape=SHAPE) -> Path:
    """Write a network with its BatchNorms left in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        EXPORTERS[by](module.eval(), path, shape)
    ops = [node.op_type for node in onnx.load(path).graph.node]
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
    assert ops.count("BatchNormalization") == norms > 0
    return path


def started(path: Path, profile=PROFILE, shape=None):
    chosen = OnnxFile.choose(path, profile, shape, None)
    return chosen.start(None, (chosen.model.input,), profile)


def noise(shape: tuple[int, ...], count: int = 5) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, *shape), dtype=np.float32)


def run(model: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    """Return what ONNX Runtime makes of a model as it is, with nothing optimised."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def folded(path: Path) -> FoldedFile:
    """Fold a file; what is left computes what the file does, in float64 and in ONNX Runtime."""
    start = started(path)
    inputs = noise(
        tuple(start.model.graph.input[0].type.tensor_type.shape.dim[i].dim_value for i in (1, 2, 3))
    )
    example = torch.from_numpy(inputs[:2])
    feed = {start.model.graph.input[0].name: inputs}
    (want,) = start.double()(feed).values()
    (exact,) = start.fold((example,), double=True).session(double=True)(feed).values()
    assert apart(exact, want) < 1e-12
    made = start.fold((example,))
    onnx.checker.check_model(made.model, full_check=True)
    original = onnx.load(path)
    assert apart(run(made.model, inputs), run(original, inputs)) < 3e-6
    assert apart(run(made.model, inputs), want) < 3e-6
    left = [n.name for n in made.model.graph.node if n.op_type == "BatchNormalization"]
    assert sorted(left) == sorted(fate.name for fate in made.fates if not fate.folded)
    return made


# ── Networks that torch.onnx wrote ──────────────────────────────────────────────────


class Body(nn.Module):
    """A body and a classifier."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        self.classifier = nn.Linear(channels, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(x).mean((2, 3)))


class Dense(nn.Module):
    """BatchNorm, ReLU and a padded convolution, joined with what it read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


class Shuffled(nn.Module):
    """Two convolutions, whose channels are shuffled; and a BatchNorm behind that."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, bias=False)
        self.other = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.one(x), self.other(x)], 1)
        n, c, h, w = both.shape
        mixed = both.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return torch.relu(self.norm(mixed))


def heads() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.Flatten(),
        nn.Linear(600, 7, bias=False),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Linear(7, 4),
    )


NETWORKS = {
    "plain": lambda: Body(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)), 6),
    "behind a relu": lambda: Body(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.MaxPool2d(2)), 6
    ),
    "behind a relu6": lambda: Body(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU6(), nn.BatchNorm2d(6)), 6
    ),
    "behind a leaky relu": lambda: Body(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.LeakyReLU(0.1), nn.BatchNorm2d(6)), 6
    ),
    "behind a prelu": lambda: Body(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.PReLU(6), nn.BatchNorm2d(6)), 6
    ),
    "behind a pool": lambda: Body(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.AvgPool2d(2), nn.BatchNorm2d(6)), 6
    ),
    "transposed": lambda: Body(
        nn.Sequential(nn.ConvTranspose2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)), 6
    ),
    "dense": lambda: Body(Dense(), 8),
    "shuffled": lambda: Body(Shuffled(), 8),
    "linear": heads,
}


@pytest.mark.parametrize("by", EXPORTERS)
@pytest.mark.parametrize("net", NETWORKS)
def test_every_batchnorm_of_an_exported_network_folds(net, by, tmp_path):
    torch.manual_seed(0)
    module = disturb(NETWORKS[net]())
    path = exported(module, tmp_path / "net.onnx", by)
    made = folded(path)
    assert made.fates
    assert all(fate.folded for fate in made.fates)
    assert all(fate.error < 1e-12 for fate in made.fates)
    inputs = noise(SHAPE)
    with torch.inference_mode():
        want = module.double()(torch.from_numpy(inputs).double()).numpy()
    (got,) = started(path).double()({"image": inputs}).values()
    assert apart(got, want) < 1e-9  # ONNX stores ε in float32


@pytest.mark.parametrize("by", EXPORTERS)
def test_layers_are_named_as_in_the_network(by, tmp_path):
    path = exported(disturb(TinyModel().module()), tmp_path / "n.onnx", by, (1, 32, 32))
    made = folded(path)
    names = {node.name for node in made.model.graph.node}
    assert {"block1.0", "block2.0.conv1", "block3.0.conv3", "block4.2"} <= names
    assert [fate.name for fate in made.fates][:2] == ["block1.2", "block2.0.bn1"]
    assert made.fates[0].pattern == "Conv → ReLU → BatchNorm"


def test_a_folded_file_is_the_network_folded_in_pytorch(tmp_path):
    from exporter.fold import fold_batchnorm

    module = disturb(TinyModel().module()).eval()
    made = folded(exported(module, tmp_path / "n.onnx", shape=(1, 32, 32)))
    inputs = noise((1, 32, 32))
    own = fold_batchnorm(module, torch.from_numpy(inputs[:2]))
    assert [f.detail for f in made.fates] == [
        f.detail.replace("block1.3", "block1.3/MaxPool") for f in own.fates
    ]
    weights = {t.name: numpy_helper.to_array(t) for t in made.model.graph.initializer}
    for name in ("block1.0", "block2.0.conv2", "block3.0.conv1"):
        want = own.module.get_submodule(name).weight.detach().numpy()
        assert np.allclose(weights[f"{name}.weight"], want, rtol=1e-6, atol=0)


# ── Graphs written by hand ──────────────────────────────────────────────────────────


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def norm(channels: int, prefix: str = "bn") -> list[TensorProto]:
    gamma = values(channels, seed=1)
    parts = (
        gamma,
        values(channels, seed=2),
        values(channels, seed=3),
        np.abs(values(channels, seed=4)) + 0.2,
    )
    return [numpy_helper.from_array(v, f"{prefix}.{i}") for i, v in enumerate(parts)]


def bn(reads: str, gives: str, prefix: str = "bn") -> onnx.NodeProto:
    return make_node(
        "BatchNormalization", [reads, *(f"{prefix}.{i}" for i in range(4))], [gives], prefix
    )


def written(
    path: Path, nodes, tensors, *, opset=20, shape=SHAPE, gives=4, batch="N", **more
) -> Path:
    """Write y, (N, gives), as these nodes make it of x, (N, *shape)."""
    constants = [
        t if isinstance(t, TensorProto) else numpy_helper.from_array(t[1], t[0]) for t in tensors
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])],
        [make_tensor_value_info("y", TensorProto.FLOAT, [batch, gives])],
        constants,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **more
    )
    path.write_bytes(model.SerializeToString())
    return path


POOL = (
    make_node("GlobalAveragePool", ["z"], ["p"], "pool"),
    make_node("Flatten", ["p"], ["y"], "flat"),
)


def test_a_batchnorm_that_gives_the_output_leaves_it_its_name(tmp_path):
    nodes = [
        make_node("GlobalAveragePool", ["x"], ["p"], "pool"),
        make_node("Flatten", ["p"], ["f"], "flat"),
        make_node("Gemm", ["f", "w"], ["g"], "fc"),
        bn("g", "y"),
    ]
    made = folded(written(tmp_path / "n.onnx", nodes, [("w", values(3, 4)), *norm(4)]))
    assert [fate.folded for fate in made.fates] == [True]
    assert [n.op_type for n in made.model.graph.node][-1] == "Gemm"
    assert made.model.graph.node[-1].output[0] == "y"
    (weight,) = [t for t in made.model.graph.initializer if t.name == "w"]
    assert tuple(weight.dims) == (3, 4)  # as it stood


@pytest.mark.parametrize("biased", [False, True])
def test_a_product_gets_the_bias_that_it_has_not(tmp_path, biased):
    nodes = [
        make_node("GlobalAveragePool", ["x"], ["p"], "pool"),
        make_node("Flatten", ["p"], ["f"], "flat"),
        make_node("MatMul", ["f", "w"], ["m" if biased else "g"], "fc"),
        *([make_node("Add", ["b", "m"], ["g"], "bias")] if biased else []),
        bn("g", "y"),
    ]
    tensors = [("w", values(3, 4)), ("b", values(4, seed=9)), *norm(4)]
    made = folded(written(tmp_path / "n.onnx", nodes, tensors))
    assert [n.op_type for n in made.model.graph.node][-2:] == ["MatMul", "Add"]
    assert [fate.folded for fate in made.fates] == [True]


@pytest.mark.parametrize(
    "window",
    [
        {"pads": [1, 0, 2, 1]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [1, 2]},
        {"auto_pad": "VALID", "dilations": [2, 1]},
        {"pads": [1, 1, 1, 1], "strides": [2, 1]},
    ],
)
@pytest.mark.parametrize("first", ["Conv", "BatchNormalization"])
def test_a_convolution_keeps_its_window(tmp_path, window, first):
    convolved = ("x", "c") if first == "Conv" else ("c", "z")
    conv = make_node("Conv", [convolved[0], "w"], [convolved[1]], "conv", **window)
    channels = 4 if first == "Conv" else 3
    nodes = [conv, bn("c", "z")] if first == "Conv" else [bn("x", "c"), conv]
    path = written(
        tmp_path / "n.onnx", [*nodes, *POOL], [("w", values(4, 3, 3, 3)), *norm(channels)]
    )
    made = folded(path)
    assert [fate.folded for fate in made.fates] == [True]
    (node,) = [n for n in made.model.graph.node if n.op_type == "Conv"]
    assert not any(n.op_type == "Pad" for n in made.model.graph.node)
    assert {a.name for a in node.attribute} >= set(window)


def test_weights_that_two_layers_share_are_left_alone(tmp_path):
    nodes = [
        make_node("Conv", ["x", "w"], ["a"], "one", pads=[1, 1, 1, 1]),
        bn("a", "b"),
        make_node("Conv", ["b", "w"], ["z"], "two"),
        *POOL,
    ]
    made = folded(
        written(tmp_path / "n.onnx", nodes, [("w", values(3, 3, 3, 3)), *norm(3)], gives=3)
    )
    assert [fate.folded for fate in made.fates] == [False]
    assert "one shares its weights with another module" in made.fates[0].detail


def test_a_constant_that_another_operator_reads_keeps_its_value(tmp_path):
    nodes = [
        make_node("Conv", ["x", "w", "b"], ["c"], "conv"),
        bn("c", "n"),
        make_node("Reshape", ["b", "four"], ["r"], "r"),
        make_node("Exp", ["r"], ["s"], "exp"),
        make_node("Mul", ["n", "s"], ["z"], "mul"),
        *POOL,
    ]
    tensors = [
        ("w", values(4, 3, 3, 3)),
        ("b", values(4, seed=5)),
        ("four", np.array([1, 4, 1, 1])),
        *norm(4),
    ]
    made = folded(written(tmp_path / "n.onnx", nodes, tensors))
    assert [fate.folded for fate in made.fates] == [True]


def test_what_stands_between_is_named_and_the_batchnorm_stays(tmp_path):
    nodes = [
        make_node("Conv", ["x", "w"], ["c"], "conv"),
        make_node("Sigmoid", ["c"], ["s"], "gate"),
        bn("s", "n"),
        make_node("Tanh", ["n"], ["z"], "tanh"),
        *POOL,
    ]
    (fate,) = folded(
        written(tmp_path / "n.onnx", nodes, [("w", values(4, 3, 3, 3)), *norm(4)])
    ).fates
    assert not fate.folded
    assert fate.pattern == "Conv → Sigmoid → BatchNorm"
    assert "no layer in front of it can take it: Sigmoid stands between" in fate.detail


def test_a_batchnorm_whose_scale_is_computed_stays_and_says_so(tmp_path):
    nodes = [
        make_node("Conv", ["x", "w"], ["c"], "conv"),
        make_node("Exp", ["e"], ["bn.0"], "exp"),
        bn("c", "z"),
        *POOL,
    ]
    tensors = [("w", values(4, 3, 3, 3)), ("e", values(4, seed=7)), *norm(4)[1:]]
    (fate,) = folded(written(tmp_path / "n.onnx", nodes, tensors)).fates
    assert (fate.name, fate.folded) == ("bn", False)
    assert fate.detail.startswith("its parameters are computed")


def test_an_output_that_is_left_out_is_read_by_nothing(tmp_path):
    nodes = [
        make_node("Conv", ["x", "w"], ["c"], "conv"),
        make_node("MaxPool", ["c"], ["m", ""], "most", kernel_shape=[2, 2]),
        make_node("Clip", ["m", "", "six"], ["k"], "clip"),
        bn("k", "z"),
        *POOL,
    ]
    tensors = [("w", values(4, 3, 3, 3)), ("six", np.float32(6)), *norm(4)]
    (fate,) = folded(written(tmp_path / "n.onnx", nodes, tensors)).fates
    assert not fate.folded


def test_a_split_is_followed(tmp_path):
    nodes = [
        make_node("Conv", ["x", "w"], ["c0"], "conv"),
        make_node("Split", ["c0"], ["c1"], "whole", axis=1, num_outputs=1),
        make_node("Conv", ["c1", "v"], ["c"], "second"),
        make_node("Split", ["c"], ["a", "b"], "split", axis=1, num_outputs=2),
        bn("a", "n"),
        make_node("Concat", ["n", "b"], ["z"], "cat", axis=1),
        *POOL,
    ]
    made = folded(
        written(
            tmp_path / "n.onnx",
            nodes,
            [("w", values(4, 3, 3, 3)), ("v", values(4, 4, 1, 1)), *norm(2)],
        )
    )
    assert [fate.folded for fate in made.fates] == [True]


HOSTILE = [
    'x", __import__("os").system("touch pwned"), "',
    "a..b",
    ".",
    "weight",
    "forward.x",
    "é\u202e",
    "a" * 4000,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_a_name_and_never_code(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    nodes = [
        make_node("Conv", ["x", "w"], ["c"], name),
        make_node("Relu", ["c"], ["r"], f"{name}.weight"),
        bn("r", "z"),
        *POOL,
    ]
    nodes[2].name = f"{name}.bn"
    made = folded(written(tmp_path / "n.onnx", nodes, [("w", values(4, 3, 3, 3)), *norm(4)]))
    assert [fate.folded for fate in made.fates] == [True]
    assert not (tmp_path / "pwned").exists()
    assert all(n.name.isascii() for n in made.model.graph.node)
