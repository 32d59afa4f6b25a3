"""The benchmark against the peers: what it compares must be the same, and what it says true."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from quantization.compare import Few, Peer, Race, Versus
from quantization.measure import Score, run, score
from quantization.networks import RECIPES, Network, spoil
from quantization.sites import placement, problems, reduced
from quantization.table import Result, as_markdown

WEIGHTS = np.array([[0.3, -1.0], [0.25, 0.6]], dtype=np.float32)
LINEAR = np.array([[0.11, 0.5]], dtype=np.float32)


def constant(value: object, dtype: str, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, dtype=dtype), name)


def float32() -> onnx.ModelProto:
    """x → 1×1 convolution → + x → mean → linear layer."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], "conv"),
        helper.make_node("Add", ["y", "x"], ["z"], "sum"),
        helper.make_node("GlobalAveragePool", ["z"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "v"], ["logits"], "linear", transB=1),
    ]
    constants = [
        numpy_helper.from_array(WEIGHTS[:, :, None, None], "w"),
        numpy_helper.from_array(LINEAR, "v"),
    ]
    return model_of(nodes, constants)


def model_of(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 1])],
        constants,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def pair(name: str, scale: str = "s", zero: str = "zero") -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}_q"]),
        helper.make_node("DequantizeLinear", [f"{name}_q", scale, zero], [f"{name}_dq"]),
    ]


def quantised(*, zero: int = 0, dtype: str = "int8") -> onnx.ModelProto:
    """The same with pairs on the convolution's input, both of the sum's, and the linear layer's."""
    nodes = [
        *pair("x"),
        helper.make_node("DequantizeLinear", ["w_q", "s"], ["w_dq"]),
        helper.make_node("DequantizeLinear", ["v_q", "s"], ["v_dq"]),
        helper.make_node("Conv", ["x_dq", "w_dq"], ["y"], "conv"),
        *pair("y"),
        helper.make_node("Add", ["y_dq", "x_dq"], ["z"], "sum"),
        helper.make_node("GlobalAveragePool", ["z"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        *pair("f"),
        helper.make_node("Gemm", ["f_dq", "v_dq"], ["logits"], "linear", transB=1),
    ]
    constants = [
        constant(0.5, "float32", "s"),
        constant(zero, dtype, "zero"),
        constant(np.rint(WEIGHTS[:, :, None, None] / 0.5), "int8", "w_q"),
        constant(np.rint(LINEAR / 0.5), "int8", "v_q"),
    ]
    return model_of(nodes, constants)


def test_places_are_found_by_layer_and_input() -> None:
    found = placement(quantised())
    assert found.convolutions == {("conv", 0)}
    assert found.linear == {("linear", 0)}
    assert found.sums == {("sum", 0), ("sum", 1)}
    assert found.others == frozenset()
    assert str(found) == "1 convolutions, 1 linear, 2 sums"


def test_weights_are_no_places_and_a_float_graph_has_none() -> None:
    assert placement(float32()).places == frozenset()


def rounded(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values / 0.5), -128, 127) * 0.5


def test_a_reduced_graph_computes_what_the_wanted_pairs_alone_do() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 2, 2)).astype(np.float32)
    got = run(reduced(quantised(), frozenset({("conv", 0)}), float32()), x)
    y = np.einsum("oi,nihw->nohw", rounded(WEIGHTS), rounded(x))
    wanted = (y + x).mean(axis=(2, 3)) @ LINEAR.T  # the linear layer has its float weights again
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_a_graph_reduced_to_all_its_places_computes_as_it_did() -> None:
    x = np.random.default_rng(1).standard_normal((3, 2, 2, 2)).astype(np.float32)
    whole = quantised()
    np.testing.assert_array_equal(
        run(reduced(whole, placement(whole).places, float32()), x), run(whole, x)
    )


def test_a_pair_that_nobody_reads_any_more_is_gone() -> None:
    left = reduced(quantised(), frozenset({("conv", 0)}), float32())
    assert [node.op_type for node in left.graph.node].count("QuantizeLinear") == 1
    onnx.checker.check_model(left, full_check=True)


def test_an_output_that_was_quantised_is_given_as_it_was_before() -> None:
    model = quantised()
    model.graph.node[-1].output[0] = "t"
    model.graph.node.extend(pair("t"))
    model.graph.node[-1].output[0] = "logits"
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(2).standard_normal((3, 2, 2, 2)).astype(np.float32)
    assert placement(model).others == {("output of the graph", 0)}
    back = reduced(model, placement(quantised()).places, float32())
    np.testing.assert_array_equal(run(back, x), run(quantised(), x))


@pytest.mark.parametrize(
    ("zero", "dtype", "said"),
    [
        (0, "int8", ()),
        (3, "int8", ("a zero point is not 0",)),
        (0, "uint8", ("UINT8 instead of INT8",)),
        (128, "uint8", ("UINT8 instead of INT8", "a zero point is not 0")),
    ],
)
def test_what_tensorrt_would_misread_is_named(zero: int, dtype: str, said: tuple[str, ...]) -> None:
    assert problems(quantised(zero=zero, dtype=dtype)) == said


def test_a_bias_in_int32_is_named() -> None:
    model = quantised()
    model.graph.initializer.append(constant([1, 2], "int32", "b_q"))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["b_q", "s"], ["b"]))
    assert problems(model) == ("a bias is dequantised from INT32",)


def network(logits: np.ndarray) -> Network:
    nothing = np.zeros(0)
    return Network("n", None, None, nothing, nothing, nothing, logits)  # type: ignore[arg-type]  # a score looks at the logits alone


def test_the_score_is_the_ratio_of_signal_to_error() -> None:
    truth = np.array([[3.0, 4.0], [0.0, 0.0]])
    found = score(np.array([[3.0, 3.5], [0.0, 0.0]]), network(truth))
    assert found.sqnr == pytest.approx(20.0)  # 25 / 0.25 = 100
    assert found.agreement == 1.0


def test_agreement_is_with_the_float64_network() -> None:
    found = score(np.array([[1.0, 2.0], [2.0, 1.0]]), network(np.array([[1.0, 2.0], [1.0, 2.0]])))
    assert found.agreement == 0.5


def test_gain_and_ratio_are_ours_against_theirs() -> None:
    row = Versus("n", "int8", "", 1.0, Score(40.0, 1.0), "")
    assert row.gain is None
    assert row._replace(peer="p", peer_score=Score(37.5, 1.0)).gain == 2.5
    assert Race("n", "int8", "p", (1.0, 2.0, 9.0), (2.0, 2.0, 3.0)).ratio == 1.0


def test_the_report_never_shows_what_was_not_measured_as_a_figure() -> None:
    text = as_markdown(
        Result(
            "2026-01-01",
            {"cpu": "any"},
            {"onnxruntime": "1"},
            {"int8": {"linear": True}},
            (Versus("n", "int8", "1 convolutions", 1.0, Score(40.0, 1.0), ""),),
            (Peer("n", "broken", refused="it is | broken"),),
            (Few("n", "int8", 1, Score(30.0, 1.0), Score(31.5, 1.0)),),
            (),
        )
    )
    assert (
        "| n | int8 | 1 convolutions | 40.00 / 1.0000 | – | none quantises all of these | – |"
        in text
    )
    assert "| n | broken | refused: it is / broken | – | – | – |" in text
    assert "| n | int8 | 1 | 30.00 (worst 30.00) | 31.50 (worst 31.50) | -1.50 |" in text
    assert "Time of a whole" not in text


def test_every_network_starts_from_one_that_is_made_before_it() -> None:
    names = list(RECIPES)
    for name, recipe in RECIPES.items():
        assert recipe.start is None or names.index(recipe.start) < names.index(name)


def test_spoiling_moves_the_channels_and_not_the_function() -> None:
    torch.manual_seed(0)
    module = RECIPES["bad64"].module().double()
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    before, gamma = module(x), module.block2[0].bn1.weight.clone()
    spoil(module)
    torch.testing.assert_close(module(x), before, rtol=1e-10, atol=1e-10)
    moved = (module.block2[0].bn1.weight / gamma).log10()
    assert 0.9 < moved.max() <= 1
    assert -1 <= moved.min() < -0.9
