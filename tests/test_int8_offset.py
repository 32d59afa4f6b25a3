"""Tensors without 0 in their middle use all of INT8's steps, at no cost but a pad."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from quantisation import PLAIN, Block, alive, exported, images, inverted, residual, statistics_of
from torch import nn
from torch.nn import functional

from exporter.emulation import Emulator
from exporter.precisions._qdq import layers_to_quantise
from exporter.precisions.int8 import Int8
from exporter.quantisation.judge import nearest_weights
from exporter.quantisation.network import Network

CALIBRATION = images(24, seed=1)
HELD_OUT = images(40, seed=2)


def convert(
    model: onnx.ModelProto, offset: str = "padded", samples: np.ndarray = CALIBRATION, **options
):
    asked = PLAIN | {"offset": offset} | options
    return Int8(**asked).convert(model, statistics_of(model, samples), samples)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def rel(found: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


@pytest.fixture
def export(tmp_path):
    def make(module: nn.Module) -> onnx.ModelProto:
        return exported(module.eval(), tmp_path / "net.onnx")

    return make


class Chain(nn.Module):
    """A 3×3 that pads, a residual sum, a 1×1 and a linear layer, each behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 6, 1, stride=2, bias=False)
        self.linear = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.first(x))
        b = torch.relu(self.second(a) + a)
        c = torch.relu(self.third(b))
        return self.linear(c.mean(dim=(2, 3)))


@pytest.fixture
def chain() -> Chain:
    torch.manual_seed(0)
    return Chain()


def stored(x: torch.Tensor, reach: float) -> torch.Tensor:
    """Return values that are 0 or more in 255 steps up to ``reach``."""
    step = np.float32(reach / 255).astype(np.float64).item()
    return (x / step).round().clamp(0, 255) * step


def weights(layer: nn.Module) -> torch.Tensor:
    w = layer.weight.detach().double()
    scale = (w.flatten(1).abs().amax(dim=1) / 127).float().double()
    scale = scale.reshape(-1, *[1] * (w.ndim - 1))
    return (w / scale).round().clamp(-127, 127) * scale


def by_hand(net: Chain, x: np.ndarray, reach: dict[str, float]) -> np.ndarray:
    """The network in float64, behind its ReLUs in steps from 0 up, and its input in ±127."""
    step = np.float32(reach["input"] / 127).astype(np.float64).item()
    x = (torch.from_numpy(x).double() / step).round().clamp(-128, 127) * step
    bias = [layer.bias.detach().double() for layer in (net.first, net.second, net.linear)]
    a = stored(functional.conv2d(x, weights(net.first), bias[0], padding=1).relu(), reach["a"])
    sum_ = functional.conv2d(a, weights(net.second), bias[1], padding=1) + a
    b = stored(sum_.relu(), reach["b"])
    c = functional.conv2d(b, weights(net.third), stride=2).relu()
    mean = stored(c.mean(dim=(2, 3)), reach["mean"])
    return (mean @ weights(net.linear).T + bias[2]).numpy()


def reaches(model: onnx.ModelProto) -> dict[str, float]:
    seen = statistics_of(model, CALIBRATION)
    node = {n.name: n for n in model.graph.node}
    read = {"input": "first", "a": "second", "b": "third"}
    found = {key: seen[node[name].input[0]].amax for key, name in read.items()}
    return found | {"mean": seen[node["linear"].input[0]].amax}


def test_the_graph_computes_255_steps_from_zero_borders_included(chain, export):
    model = export(chain)
    made = convert(model, linear=True).model
    onnx.checker.check_model(made, full_check=True)
    want = by_hand(chain, HELD_OUT, reaches(model))
    assert rel(run(made, HELD_OUT), want) < 1e-5
    signed = convert(model, "none", linear=True).model
    assert rel(run(signed, HELD_OUT), want) > 1e-3


def test_nothing_is_added_but_the_pads_and_the_relus_are_gone(chain, export):
    model = export(chain)
    plain, made = (ops(convert(model, offset, linear=True).model) for offset in ("none", "padded"))
    assert plain.count("Relu") == 3
    assert made.count("Relu") == 1  # behind the third, whose mean is stored
    assert made.count("Pad") == 1
    added = [op for op in made if op not in ("Pad", "QuantizeLinear", "DequantizeLinear")]
    wanted = [op for op in plain if op not in ("Relu", "QuantizeLinear", "DequantizeLinear")]
    assert sorted(added) == sorted([*wanted, "Relu", "Sub"])  # the mean's offset has no bias


def test_tensorrt_takes_every_pair(chain, export):
    made = convert(export(chain), linear=True).model
    known = constants(made)
    zeros = [known[n.input[2]] for n in made.graph.node if n.op_type.endswith("Linear")]
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert not any(t.data_type == TensorProto.UINT8 for t in made.graph.initializer)


def test_a_pad_holds_what_stands_for_zero(chain, export):
    made = convert(export(chain)).model
    known = constants(made)
    (pad,) = [n for n in made.graph.node if n.op_type == "Pad"]
    (quantise,) = [n for n in made.graph.node if n.input[0] == pad.output[0]]
    assert float(known[pad.input[2]]) == pytest.approx(-128 * float(known[quantise.input[1]]))
    assert known[pad.input[1]].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    convolution = next(n for n in made.graph.node if n.name == "second")
    assert list(next(a.ints for a in convolution.attribute if a.name == "pads")) == [0] * 4


def test_free_adds_no_pad_and_stores_what_is_padded_as_before(chain, export):
    made = convert(export(chain), "free", linear=True).model
    assert "Pad" not in ops(made)
    signed = convert(export(chain), "none", linear=True).model
    known = [constants(model) for model in (signed, made)]
    scale = {
        layer: [
            float(c[n.input[1]])
            for c, model in zip(known, (signed, made), strict=True)
            for n in model.graph.node
            if n.op_type == "QuantizeLinear"
            and any(
                n.output[0] in r.input and r.output[0] in conv.input
                for r in model.graph.node
                for conv in model.graph.node
                if conv.name == layer
            )
        ]
        for layer in ("first", "second", "third")
    }
    assert scale["first"][0] == scale["first"][1]
    assert scale["second"][0] == scale["second"][1]
    assert scale["third"][1] == pytest.approx(scale["third"][0] * 127 / 255)


# ── Other networks ──────────────────────────────────────────────────────────────────


def pooled() -> nn.Module:
    """ReLU → max pool in front of a residual block, as in a published ResNet's stem."""
    stem = [nn.Conv2d(3, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return nn.Sequential(*stem, Block(12, 12), Block(12, 16, 2), *head)


def grouped() -> nn.Module:
    """Convolutions with groups, dilation, uneven pads and no bias; one is read twice."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3, padding=1)
            self.b = nn.Conv2d(8, 8, 3, padding=(2, 1), groups=4, dilation=(2, 1), bias=False)
            self.c = nn.Conv2d(8, 8, 1, bias=False)
            self.d = nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.a(x))
            z = torch.relu(self.b(y)) + torch.relu(self.c(y))
            return self.d((z * y).mean(dim=(2, 3)))

    return Net()


class Linear(nn.Module):
    """Sums and convolutions with no activation between them, as in linear bottlenecks.

    Everything is shifted: to one side for all channels, or each channel to its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)  # does not pad: reads the input channel by channel
        self.grouped = nn.Conv2d(8, 8, 2, groups=4)
        self.plain, self.beside = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 6, 1, stride=2)
        self.padded = nn.Conv2d(6, 6, 3, padding=1)
        self.linear = nn.Linear(6, 10)
        with torch.no_grad():
            for layer in (self.first, self.grouped, self.plain, self.beside):
                layer.bias.copy_(torch.linspace(-6, 9, 8))
            self.last.bias.fill_(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x + torch.tensor([2.0, -5.0, 0.5]).reshape(3, 1, 1))
        y = functional.max_pool2d(self.grouped(x), 2)
        y = self.plain(y) + self.beside(y)
        y = functional.hardswish(self.padded(self.last(y)))
        return self.linear(y.mean(dim=(2, 3)))


NETS = {
    "residual": residual,
    "inverted": inverted,
    "pooled": pooled,
    "grouped": grouped,
    "linear": Linear,
}


@pytest.mark.parametrize("linear", [False, True], ids=["linear in float", "linear too"])
@pytest.mark.parametrize("offset", ["free", "padded"])
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_the_graph_computes_what_was_simulated(net, offset, linear, export):
    torch.manual_seed(0)
    model = export(alive(net()))
    asked = Int8(**PLAIN | {"offset": offset, "linear": linear})
    layers = layers_to_quantise(model.graph, linear=linear, keep=())
    places = asked._places(model, layers)
    seen = statistics_of(model, CALIBRATION)
    network = Network.of(model, places.sites(), list(layers), places.kinds)
    steps = {name: network.steps(name, seen[name]) for name in network.tensors}
    want = network.outputs(HELD_OUT, steps, nearest_weights(network)).numpy()
    made = asked.convert(model, seen, CALIBRATION)
    onnx.checker.check_model(made.model, full_check=True)
    assert places.kinds or offset == "free"
    emulator = Emulator.of(made.model)
    got = emulator.run({emulator.inputs[0]: torch.from_numpy(HELD_OUT).double()})
    close = np.isclose(got[emulator.outputs[0]].numpy(), want, rtol=1e-3, atol=1e-3).all(axis=1)
    assert close.mean() > 0.9  # a value between two steps may fall to either side
    assert rel(run(made.model, HELD_OUT), want) < 5e-3


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_what_is_computed_less_a_constant_is_told(net, export):
    torch.manual_seed(0)
    model = export(alive(net()))
    made = convert(model)
    assert made.offsets
    before, after = Emulator.of(model), Emulator.of(made.model)
    feed = {"input": torch.from_numpy(CALIBRATION).double()}
    written = {name for step in after.steps for name in step.writes}
    assert set(made.offsets) <= written
    old = before.run(feed, watch=[name for name, _ in made.offsets.values()])
    new = after.run(feed, watch=list(made.offsets))
    for name, (was, constant) in made.offsets.items():
        by_channel = torch.from_numpy(constant).reshape(-1, *[1] * (old[was].ndim - 2))
        off = (new[name] + by_channel - old[was]).abs()
        assert float(off.mean()) < 0.05 * float(old[was].abs().max()), name


def test_signed_tensors_are_moved_by_biases_alone(export):
    torch.manual_seed(0)
    model = export(Linear())
    made = convert(model).model
    added = ops(made)
    for op in ops(model):
        added.remove(op)
    assert set(added) <= {"Pad", "QuantizeLinear", "DequantizeLinear", "Sub"}
    assert added.count("Pad") == 1  # in front of the one that pads
    assert added.count("Sub") == 0  # the shift of the input takes it up
    assert rel(run(made, HELD_OUT), run(model, HELD_OUT)) < 0.01


def test_an_input_that_is_not_centred_is_moved_in_front_of_its_quantiser(export):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model, shifted = export(net), images(64, seed=1) + np.float32(3)
    made = convert(model, samples=shifted)
    known = constants(made.model)
    nodes = [node for node in made.model.graph.node if node.op_type != "DequantizeLinear"]
    assert [node.op_type for node in nodes[:3]] == ["Sub", "Pad", "QuantizeLinear"]
    offset, scale = float(known[nodes[0].input[1]]), float(known["input_scale"])
    assert float(known[nodes[1].input[2]]) == -offset  # which stands for 0
    assert offset / scale == pytest.approx(round(offset / scale), abs=1e-4)
    assert rel(run(made.model, shifted), run(model, shifted)) < 0.01


def test_what_a_float_layer_reads_too_keeps_its_name_and_value(chain, export):
    model = export(chain)
    made = convert(model, keep=("second",))
    node = next(n for n in made.model.graph.node if n.name == "second")
    original = next(n for n in model.graph.node if n.name == "second")
    assert node.input[0] == original.input[0]  # the first ReLU's output, in float
    assert rel(run(made.model, HELD_OUT), run(model, HELD_OUT)) < 0.02


def test_a_clip_below_the_last_step_stays(export):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 10, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(functional.relu6(self.a(x))).mean(dim=(2, 3))

    torch.manual_seed(0)
    net = Net()
    net.a.weight.data *= 20
    model = export(net)
    seen = statistics_of(model, CALIBRATION)
    clip = next(n.output[0] for n in model.graph.node if n.op_type == "Clip")
    assert seen[clip].amax == 6
    assert "Clip" not in ops(convert(model).model)  # 255 steps end at 6
    wide = Int8(**PLAIN | {"offset": "padded"})
    seen[clip].fold_high *= 1.5  # as with headroom: the steps end at 9
    made = wide.convert(model, seen, CALIBRATION).model
    assert "Clip" in ops(made)
    assert rel(run(made, HELD_OUT), run(model, HELD_OUT)) < 0.02


def test_in_fp16_around_it_costs_no_accuracy(export):
    torch.manual_seed(0)
    model = export(alive(residual()))
    want = run(model, HELD_OUT)
    wide, half = (convert(model, around=around).model for around in ("fp32", "fp16"))
    assert rel(run(half, HELD_OUT), want) < 1.2 * rel(run(wide, HELD_OUT), want)


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_it_is_closer_to_the_network_than_signed_steps(net, export):
    torch.manual_seed(0)
    model = export(alive(net()))
    want, enough = run(model, HELD_OUT), images(96, seed=1)
    signed, free, padded = (
        rel(run(convert(model, offset, enough).model, HELD_OUT), want)
        for offset in ("none", "free", "padded")
    )
    assert padded < 0.98 * signed
    assert free <= 1.1 * signed
