"""Counts, against arithmetic on paper and against torch's own counter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import refused
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from exporter.errors import GraphError, InputRefused
from exporter.flops import count_flops, input_shape_of, read_file
from exporter.precisions.fp16 import Fp16
from exporter.records import BatchRange, Cost, LayerCost, TensorSpec
from exporter.to_onnx import export_onnx


def graph(nodes, x, y, weights=(), *, kind=TensorProto.FLOAT, domains=()) -> onnx.ModelProto:
    """Return a model from ``x`` to ``y``; weights are name → shape or array."""
    initialisers = [
        from_array(w if isinstance(w, np.ndarray) else np.ones(w, np.float32), name)
        for name, w in dict(weights).items()
    ]
    inputs = [make_tensor_value_info("x", kind, x)]
    outputs = [make_tensor_value_info("y", kind, y)]
    opsets = [make_opsetid("", 20), *(make_opsetid(domain, 1) for domain in domains)]
    graph = make_graph(nodes, "g", inputs, outputs, initialisers)
    return make_model(graph, opset_imports=opsets, ir_version=10)


def one(op, x, y, weights, **attributes) -> LayerCost:
    node = make_node(op, ["x", *weights], ["y"], "layer", **attributes)
    cost = count_flops(graph([node], ["N", *x], ["N", *y], weights))
    assert cost.uncounted == {}
    (layer,) = cost.layers
    assert (layer.name, layer.op, layer.output_shape) == ("layer", op, (1, *y))
    return layer


# ── By hand ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("op", "x", "weight", "y", "attributes", "macs"),
    [
        # out · k₁ · k₂ · in / groups
        ("Conv", (1, 8, 8), (2, 1, 3, 3), (2, 6, 6), {}, 2 * 36 * 9),
        ("Conv", (4, 9, 9), (6, 4, 1, 1), (6, 9, 9), {}, 6 * 81 * 4),
        (
            "Conv",
            (4, 9, 9),
            (6, 2, 3, 3),
            (6, 5, 5),
            {"group": 2, "strides": [2, 2], "pads": [1] * 4},
            6 * 25 * 9 * 2,
        ),
        ("Conv", (8, 7, 5), (8, 1, 3, 3), (8, 5, 3), {"group": 8}, 8 * 15 * 9),
        ("Conv", (8, 7, 5), (16, 1, 3, 3), (16, 5, 3), {"group": 8}, 16 * 15 * 9),
        ("Conv", (2, 9, 9), (3, 2, 3, 3), (3, 5, 5), {"dilations": [2, 2]}, 3 * 25 * 9 * 2),
        ("Conv", (3, 11), (4, 3, 5), (4, 7), {}, 4 * 7 * 5 * 3),
        ("Conv", (2, 5, 6, 7), (4, 2, 3, 3, 3), (4, 3, 4, 5), {}, 4 * 60 * 27 * 2),
        # in · k₁ · k₂ · out / groups
        ("ConvTranspose", (4, 5, 5), (4, 6, 3, 3), (6, 7, 7), {}, 4 * 25 * 9 * 6),
        (
            "ConvTranspose",
            (4, 5, 5),
            (4, 3, 2, 2),
            (6, 10, 10),
            {"group": 2, "strides": [2, 2]},
            4 * 25 * 4 * 3,
        ),
        # |output| · inner dimension
        ("Gemm", (5,), (5, 7), (7,), {}, 7 * 5),
        ("Gemm", (5,), (7, 5), (7,), {"transB": 1}, 7 * 5),
        ("MatMul", (5,), (5, 7), (7,), {}, 7 * 5),
        ("MatMul", (3, 5), (5, 7), (3, 7), {}, 3 * 7 * 5),
        ("MatMul", (2, 3, 5), (2, 5, 7), (2, 3, 7), {}, 2 * 3 * 7 * 5),
    ],
)
def test_a_layers_multiply_accumulates_are_those_on_paper(op, x, weight, y, attributes, macs):
    layer = one(op, x, y, {"w": weight}, **attributes)
    numbers = int(np.prod(weight))
    assert layer.macs == macs
    assert layer.parameters == numbers
    assert layer.weight_bytes == 4 * numbers
    assert layer.activation_bytes == 4 * int(np.prod(y))


def test_a_gemm_that_transposes_its_first_input_counts_the_same():
    nodes = [
        make_node("Transpose", ["x"], ["t"], "turn", perm=[1, 0]),
        make_node("Gemm", ["t", "w"], ["y"], "fc", transA=1),
    ]
    cost = count_flops(graph(nodes, ["N", 5], ["N", 7], {"w": (5, 7)}))
    assert [layer.macs for layer in cost.layers] == [0, 35]


def test_two_activations_multiplied_bring_no_weights():
    nodes = [
        make_node("Transpose", ["x"], ["t"], "turn", perm=[0, 2, 1]),
        make_node("MatMul", ["x", "t"], ["y"], "scores"),
    ]
    cost = count_flops(graph(nodes, ["N", 3, 5], ["N", 3, 3]))
    assert (cost.macs, cost.parameters, cost.weight_bytes) == (3 * 3 * 5, 0, 0)


def test_a_bias_is_a_parameter_and_free():
    layer = one("Conv", (1, 8, 8), (2, 6, 6), {"w": (2, 1, 3, 3), "b": (2,)})
    assert (layer.macs, layer.parameters, layer.weight_bytes) == (648, 20, 80)


def test_totals_are_sums_and_a_flop_is_half_a_mac():
    layers = (
        LayerCost("a", "Conv", (1, 2), 10, 3, 12, 8),
        LayerCost("b", "Relu", (1, 2), 0, 0, 0, 8),
        LayerCost("c", "Gemm", (1, 5), 7, 4, 16, 20),
    )
    cost = Cost(layers, {})
    assert (cost.macs, cost.flops) == (17, 34)
    assert (cost.parameters, cost.weight_bytes, cost.activation_bytes) == (7, 28, 36)


@pytest.mark.parametrize("batch", ["N", 1, 32])
def test_whatever_the_graphs_batch_is_one_sample_is_counted(batch):
    nodes = [make_node("Conv", ["x", "w"], ["h"], "c"), make_node("Relu", ["h"], ["y"], "r")]
    model = graph(nodes, [batch, 1, 8, 8], [batch, 2, 6, 6], {"w": (2, 1, 3, 3)})
    if batch != "N":  # what an earlier inference wrote down
        model = onnx.shape_inference.infer_shapes(model)
    cost = count_flops(model)
    assert cost.macs == 648
    assert [layer.output_shape for layer in cost.layers] == [(1, 2, 6, 6)] * 2
    assert cost.activation_bytes == 2 * 4 * 72


def test_a_weight_that_two_layers_share_is_stored_once_and_computed_with_twice():
    nodes = [
        make_node("MatMul", ["x", "w"], ["h"], "first"),
        make_node("MatMul", ["h", "w"], ["y"], "second"),
    ]
    cost = count_flops(graph(nodes, ["N", 5], ["N", 5], {"w": (5, 5)}))
    assert [layer.macs for layer in cost.layers] == [25, 25]
    assert [layer.parameters for layer in cost.layers] == [25, 0]
    assert cost.weight_bytes == 100


def test_a_number_used_twice_by_one_layer_is_stored_once():
    nodes = [make_node("Clip", ["x", "low", "low"], ["y"], "clip")]
    cost = count_flops(graph(nodes, ["N", 5], ["N", 5], {"low": np.array(1, np.float32)}))
    assert (cost.parameters, cost.weight_bytes) == (1, 4)


def test_shapes_and_axes_are_bytes_but_no_parameters():
    nodes = [make_node("Reshape", ["x", "shape"], ["y"], "flat")]
    weights = {"shape": np.array([-1, 6], np.int64)}
    cost = count_flops(graph(nodes, ["N", 2, 3], ["N", 6], weights))
    assert (cost.parameters, cost.weight_bytes, cost.macs) == (0, 16, 0)


def test_the_graph_is_left_as_it_was():
    nodes = [make_node("Conv", ["x", "w"], ["y"], "c")]
    model = graph(nodes, ["N", 1, 8, 8], ["N", 2, 6, 6], {"w": (2, 1, 3, 3)})
    before = model.SerializeToString()
    count_flops(model)
    assert model.SerializeToString() == before


# ── As they are stored ──────────────────────────────────────────────────────────────


def test_int8_weights_are_one_byte_each_beside_their_scales():
    weights = {
        "x_scale": np.array(0.1, np.float32),
        "x_zero": np.array(0, np.int8),
        "w_q": np.ones((6, 4, 3, 3), np.int8),
        "w_scale": np.ones(6, np.float32),
        "w_zero": np.zeros(6, np.int8),
        "b": np.ones(6, np.float32),
    }
    nodes = [
        make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"], "q"),
        make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"], "dq"),
        make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w"], "w", axis=0),
        make_node("Conv", ["x_dq", "w", "b"], ["y"], "conv"),
    ]
    cost = count_flops(graph(nodes, ["N", 4, 9, 9], ["N", 6, 7, 7], weights))
    assert cost.macs == 6 * 49 * 9 * 4
    assert cost.parameters == 6 * 4 * 9 + 6
    assert cost.weight_bytes == 6 * 4 * 9 * 1 + 6 * 4 + 6 * 1 + 6 * 4 + 4 + 1
    assert cost.uncounted == {}
    by_name = {layer.name: layer for layer in cost.layers}
    assert by_name["q"].activation_bytes == 4 * 81 * 1
    assert by_name["dq"].activation_bytes == 0  # read where it stands
    assert by_name["q"].parameters == by_name["dq"].parameters == 0


@pytest.mark.parametrize(("kind", "dtype"), [(TensorProto.FLOAT16, np.float16)])
def test_half_weights_and_activations_are_two_bytes_each(kind, dtype):
    nodes = [make_node("Conv", ["x", "w"], ["y"], "c")]
    weights = {"w": np.ones((2, 1, 3, 3), dtype)}
    cost = count_flops(graph(nodes, ["N", 1, 8, 8], ["N", 2, 6, 6], weights, kind=kind))
    assert (cost.macs, cost.parameters) == (648, 18)
    assert (cost.weight_bytes, cost.activation_bytes) == (36, 144)


def test_fp16_halves_the_bytes_of_a_real_network_and_leaves_its_arithmetic(tiny_onnx):
    whole = onnx.load(tiny_onnx.path)
    half = Fp16(half_io=True).convert(whole, {}, np.empty(0)).model
    floats = sum(
        int(np.prod(t.dims)) for t in whole.graph.initializer if t.data_type == TensorProto.FLOAT
    )
    rest = sum(
        onnx.numpy_helper.to_array(t).nbytes
        for t in whole.graph.initializer
        if t.data_type != TensorProto.FLOAT
    )
    before, after = count_flops(whole), count_flops(half)
    assert before.macs == after.macs
    assert before.parameters == after.parameters == floats
    assert (before.weight_bytes, after.weight_bytes) == (4 * floats + rest, 2 * floats + rest)
    assert before.activation_bytes == 2 * after.activation_bytes


# ── What cannot be counted ──────────────────────────────────────────────────────────


def test_an_operator_without_a_formula_is_named_and_not_zero_in_silence():
    nodes = [
        make_node("Erf", ["x"], ["a"], "e1"),
        make_node("Erf", ["a"], ["b"], "e2"),
        make_node("Einsum", ["b", "w"], ["c"], "sum", equation="nk,km->nm"),
        make_node("Relu", ["c"], ["y"], "r"),
    ]
    cost = count_flops(graph(nodes, ["N", 5], ["N", 7], {"w": (5, 7)}))
    assert cost.uncounted == {"Erf": 2, "Einsum": 1}
    assert cost.parameters == 35


def test_an_operator_of_another_makers_is_named_too():
    nodes = [make_node("Attention", ["x", "w"], ["y"], "a", domain="com.acme")]
    cost = count_flops(graph(nodes, ["N", 5], ["N", 7], {"w": (5, 7)}, domains=["com.acme"]))
    assert cost.uncounted == {"com.acme::Attention": 1}


def test_another_makers_operator_is_not_taken_for_the_standard_one_of_its_name():
    nodes = [make_node("Relu", ["x", "w"], ["y"], "a", domain="com.acme")]
    cost = count_flops(graph(nodes, ["N", 5], ["N", 7], {"w": (5, 7)}, domains=["com.acme"]))
    assert cost.uncounted == {"com.acme::Relu": 1}


def without_shape(model: onnx.ModelProto) -> onnx.ModelProto:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    return model


CONV = [make_node("Conv", ["x", "w"], ["y"], "c")]
UNKNOWN = [
    make_node("Mystery", ["x"], ["h"], "m", domain="com.acme"),
    make_node("Relu", ["h"], ["y"], "r"),
]
W = {"w": (2, 1, 3, 3)}
UNSHAPED = {
    "the network's input has no shape": without_shape(graph(CONV, [1], [1], W)),
    "height and width are free": graph(CONV, ["N", 1, "H", "W"], ["N", 2, "H2", "W2"], W),
    "an unknown operator's output has no shape": graph(
        UNKNOWN, ["N", 5], ["N", 5], domains=["com.acme"]
    ),
    "the shapes do not fit": graph(
        [make_node("MatMul", ["x", "w"], ["y"], "fc")], ["N", 6], ["N", 7], {"w": (5, 7)}
    ),
    "the declared output is another": graph(CONV, ["N", 1, 8, 8], ["N", 2, 5, 5], W),
}


@pytest.mark.parametrize("model", UNSHAPED.values(), ids=UNSHAPED)
def test_a_graph_whose_shapes_are_unknown_is_refused_and_not_counted_as_nothing(model):
    with refused(GraphError, "infer the shapes"):
        count_flops(model)


# ── Against torch ───────────────────────────────────────────────────────────────────


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)

    def forward(self, x):
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        return torch.softmax(scores, -1)


NETS = {
    "grouped, strided, dilated, depthwise, transposed and linear": (
        nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, groups=2, dilation=2),
            nn.ReLU(),
            nn.Conv2d(8, 8, (3, 1), groups=8, padding=(1, 0), bias=False),
            nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(6 * 7 * 6, 5),
        ),
        (4, 17, 15),
        (5,),
    ),
    "in one dimension": (
        nn.Sequential(nn.Conv1d(3, 4, 5, padding=2), nn.ConvTranspose1d(4, 2, 4)),
        (3, 11),
        (2, 14),
    ),
    "attention": (Attention(), (7, 6), (7, 7)),
}


@pytest.mark.parametrize(("net", "x", "y"), NETS.values(), ids=NETS)
def test_torchs_own_counter_finds_as_many(net, x, y, tmp_path):
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        found = net.eval()(torch.zeros(1, *x))
    assert found.shape == (1, *y)
    exported = export_onnx(
        net,
        Path(tmp_path, "net.onnx"),
        input=TensorSpec("x", x),
        output=TensorSpec("y", y),
        batch=BatchRange(1, 2, 4),
    )
    cost = count_flops(onnx.load(exported.path))
    assert cost.flops == counter.get_total_flops() > 0
    assert cost.parameters == sum(p.numel() for p in net.parameters())
    assert cost.uncounted == {}


def test_torchs_own_counter_finds_as_many_in_a_residual_network(tiny_module, tiny_onnx):
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        tiny_module(torch.zeros(1, 1, 32, 32))
    cost = count_flops(onnx.load(tiny_onnx.path))
    assert cost.flops == counter.get_total_flops()
    assert cost.uncounted == {}


# ── What is read, moved and held ────────────────────────────────────────────────────


def test_a_layer_reads_its_inputs_and_weights_and_writes_its_output():
    layer = one("Conv", (1, 8, 8), (2, 6, 6), {"w": (2, 1, 3, 3), "b": (2,)})
    read, written = 4 * (64 + 18 + 2), 4 * 72
    assert (layer.read_bytes, layer.activation_bytes) == (read, written)
    assert layer.moved_bytes == read + written
    assert layer.intensity == pytest.approx(2 * 648 / (read + written))


def test_a_tensor_that_a_layer_reads_twice_is_moved_once():
    cost = count_flops(graph([make_node("Add", ["x", "x"], ["y"], "a")], ["N", 5], ["N", 5]))
    assert (cost.layers[0].read_bytes, cost.peak_bytes) == (20, 40)


def test_a_weight_that_two_layers_share_is_read_by_both():
    nodes = [
        make_node("MatMul", ["x", "w"], ["h"], "first"),
        make_node("MatMul", ["h", "w"], ["y"], "second"),
    ]
    cost = count_flops(graph(nodes, ["N", 5], ["N", 5], {"w": (5, 5)}))
    assert [layer.read_bytes for layer in cost.layers] == [120, 120]
    assert [layer.weight_bytes for layer in cost.layers] == [100, 0]


def test_the_peak_is_what_exists_at_once_and_no_sum():
    """The shortcut x lives on beside the branch until they meet."""
    nodes = [
        make_node("Conv", ["x", "w"], ["a"], "wide"),  # x 100, a 400
        make_node("Relu", ["a"], ["b"], "relu"),  # x 100, a 400, b 400
        make_node("Conv", ["b", "v"], ["c"], "narrow"),  # x 100, b 400, c 100
        make_node("Add", ["x", "c"], ["y"], "join"),  # x 100, c 100, y 100
    ]
    weights = {"w": (4, 1, 1, 1), "v": (1, 4, 1, 1)}
    cost = count_flops(graph(nodes, ["N", 1, 5, 5], ["N", 1, 5, 5], weights))
    assert [layer.alive_bytes for layer in cost.layers] == [500, 900, 600, 300]
    assert (cost.peak_bytes, cost.peak_layer) == (900, "relu")
    assert cost.activation_bytes == 400 + 400 + 100 + 100


def test_an_early_output_of_the_network_is_held_to_its_end():
    nodes = [
        make_node("Relu", ["x"], ["y"], "first"),
        make_node("Relu", ["y"], ["h"], "second"),
        make_node("Sigmoid", ["h"], ["i"], "third"),
        make_node("Tanh", ["i"], ["j"], "fourth"),
    ]
    cost = count_flops(graph(nodes, ["N", 5], ["N", 5]))
    assert [layer.alive_bytes for layer in cost.layers] == [40, 40, 60, 60]


def test_what_is_dequantised_is_read_and_held_as_it_is_stored():
    weights = {
        "s": np.array(0.1, np.float32),
        "z": np.array(0, np.int8),
        "w_q": np.ones((2, 1, 3, 3), np.int8),
        "w_s": np.ones(2, np.float32),
        "w_z": np.zeros(2, np.int8),
    }
    nodes = [
        make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
        make_node("DequantizeLinear", ["w_q", "w_s", "w_z"], ["w"], "w", axis=0),
        make_node("Conv", ["d", "w"], ["y"], "conv"),
    ]
    cost = count_flops(graph(nodes, ["N", 1, 8, 8], ["N", 2, 6, 6], weights))
    by_name = {layer.name: layer for layer in cost.layers}
    conv = by_name["conv"]
    assert conv.weight_bytes == 18 + 8 + 2
    assert conv.parameters == 18
    assert conv.read_bytes == 64 + 4 + 1 + 18 + 8 + 2
    assert (by_name["d"].moved_bytes, by_name["w"].moved_bytes) == (0, 0)
    assert by_name["q"].alive_bytes == 4 * 64 + 64
    assert conv.alive_bytes == 64 + 4 * 72


def test_two_weights_of_four_bits_are_one_byte():
    weights = {
        "w_q": onnx.helper.make_tensor("w_q", TensorProto.INT4, [5, 7], [1] * 35),
        "s": from_array(np.array(0.1, np.float32), "s"),
    }
    nodes = [
        make_node("DequantizeLinear", ["w_q", "s"], ["w"], "w"),
        make_node("MatMul", ["x", "w"], ["y"], "fc"),
    ]
    model = graph(nodes, ["N", 5], ["N", 7])
    model.opset_import[0].version = 21
    model.graph.initializer.extend(weights.values())
    cost = count_flops(model)
    assert (cost.parameters, cost.weight_bytes) == (35, 18 + 4)


def test_a_constant_that_is_a_node_is_a_weight():
    nodes = [
        make_node("Constant", [], ["w"], "w", value=from_array(np.ones((5, 7), np.float32))),
        make_node("MatMul", ["x", "w"], ["y"], "fc"),
    ]
    cost = count_flops(graph(nodes, ["N", 5], ["N", 7]))
    assert (cost.macs, cost.parameters, cost.weight_bytes) == (35, 35, 140)
    assert cost.activation_bytes == 28


@pytest.mark.parametrize(
    ("op", "inputs", "macs"),
    [
        ("ConvInteger", ["q", "w_q"], 648),
        ("QLinearConv", ["q", "s", "z", "w_q", "s", "z", "s", "z"], 648),
    ],
)
def test_convolutions_in_integers_count_as_those_in_floats(op, inputs, macs):
    weights = {
        "s": np.array(0.1, np.float32),
        "z": np.array(0, np.int8),
        "w_q": np.ones((2, 1, 3, 3), np.int8),
    }
    out = "c" if op == "ConvInteger" else "y_q"
    nodes = [
        make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        make_node(op, inputs, [out], "conv"),
        make_node("Cast", ["c"], ["y"], "cast", to=TensorProto.FLOAT)
        if op == "ConvInteger"
        else make_node("DequantizeLinear", ["y_q", "s", "z"], ["y"], "dq"),
    ]
    cost = count_flops(graph(nodes, ["N", 1, 8, 8], ["N", 2, 6, 6], weights))
    assert cost.macs == macs
    assert cost.uncounted == {}


def test_products_in_integers_count_as_those_in_floats():
    weights = {
        "s": np.array(0.1, np.float32),
        "z": np.array(0, np.int8),
        "w_q": np.ones((5, 7), np.int8),
    }
    nodes = [
        make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        make_node("QLinearMatMul", ["q", "s", "z", "w_q", "s", "z", "s", "z"], ["p"], "fc"),
        make_node("DequantizeLinear", ["p", "s", "z"], ["y"], "dq"),
    ]
    assert count_flops(graph(nodes, ["N", 5], ["N", 7], weights)).macs == 35


# ── A shape that the graph leaves open ──────────────────────────────────────────────


def test_an_open_height_and_width_are_those_that_are_asked_for():
    model = graph(CONV, ["N", 1, "H", "W"], ["N", 2, "H2", "W2"], W)
    assert count_flops(model, (1, 8, 8)).macs == 648
    assert count_flops(model, (1, 10, 8)).macs == 2 * 8 * 6 * 9


@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 8, 8), (1, 8), (1, 8, 8, 8), (1, 0, 8)])
def test_a_shape_that_the_graph_does_not_take_is_refused(shape):
    with refused(InputRefused, "N×1×8×8", "×".join(map(str, shape))):
        count_flops(graph(CONV, ["N", 1, 8, 8], ["N", 2, 6, 6], W), shape)


def test_a_graph_of_two_inputs_has_no_one_shape():
    model = graph([make_node("Add", ["x", "z"], ["y"], "a")], ["N", 5], ["N", 5])
    model.graph.input.append(make_tensor_value_info("z", TensorProto.FLOAT, ["N", 5]))
    with refused(InputRefused, "2 inputs", "x, z"):
        count_flops(model, (5,))


def test_the_shape_of_a_file_is_read_where_it_is_fixed(tmp_path):
    onnx.save(graph(CONV, ["N", 1, 8, 8], ["N", 2, 6, 6], W), tmp_path / "fixed.onnx")
    onnx.save(graph(CONV, ["N", 1, "H", 8], ["N", 2, "H2", 6], W), tmp_path / "open.onnx")
    assert input_shape_of(read_file(tmp_path / "fixed.onnx")) == (1, 8, 8)
    assert input_shape_of(read_file(tmp_path / "open.onnx")) is None


def test_weights_that_lie_outside_of_the_file_are_counted_and_not_read(tmp_path):
    model = graph(CONV, ["N", 1, 8, 8], ["N", 2, 6, 6], W)
    onnx.save(
        model,
        tmp_path / "net.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    (tmp_path / "w.bin").unlink()
    assert count_flops(read_file(tmp_path / "net.onnx")).weight_bytes == 72


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such file"), (b"", "input and an output"), (b"x", "damaged")]
)
def test_what_is_no_onnx_file_is_refused(content, words, tmp_path):
    path = tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    with refused(InputRefused, "net.onnx", words):
        read_file(path)


def test_a_record_of_before_the_peak_was_counted_has_none():
    layer = LayerCost("a", "Conv", (1,), 3, 1, 4, 4)
    cost = Cost((layer,), {})
    assert (layer.moved_bytes, layer.intensity) == (None, None)
    assert (cost.moved_bytes, cost.intensity, cost.peak_bytes, cost.peak_layer) == (None,) * 4
