"""Fidelity of runtimes that read integers in a sum, or keep halves in 32 bits: right is right."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from exporter.emulation import Emulator
from exporter.fidelity import LIMIT, compare_layers, unreadable
from exporter.precisions._floats import BF16, FP16
from exporter.precisions._half import to_half

F, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
SCALES, ZEROS = (np.float32(0.0371), np.float32(0.0113)), (np.uint8(131), np.uint8(7))
RNG = np.random.default_rng(0)
Q = [RNG.integers(0, 256, (4, 6, 5, 5)).astype(np.uint8) for _ in range(2)]
Q[0][:, 0], Q[1][:, 0] = ZEROS  # a channel in which everything cancels


def summed() -> onnx.ModelProto:
    """Two dequantised tensors, each with a zero point, and their sum."""
    value = helper.make_tensor_value_info
    constants = {"s0": SCALES[0], "s1": SCALES[1], "z0": ZEROS[0], "z1": ZEROS[1]}
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["q0", "s0", "z0"], ["a"], "a/DQ"),
            helper.make_node("DequantizeLinear", ["q1", "s1", "z1"], ["b"], "b/DQ"),
            helper.make_node("Add", ["a", "b"], ["y"], "sum"),
        ],
        "g",
        [value(f"q{i}", onnx.TensorProto.UINT8, ["n", 6, 5, 5]) for i in (0, 1)],
        [value("y", F, ["n", 6, 5, 5])],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def of_the_sum(y: np.ndarray) -> float:
    """Return the sum's error in multiples of its rounding, for exact terms."""
    a, b = ((q.astype(np.float32) - z) * s for q, z, s in zip(Q, ZEROS, SCALES, strict=True))
    given = {"q0": Q[0], "q1": Q[1], "a": a, "b": b, "y": y}
    asked = Emulator.of(summed())
    return max(e.size for e in compare_layers(asked, given) if e.tensor == "y")


def test_a_sum_that_reads_its_terms_integers_is_right_even_where_all_cancels():
    """q·s − z·s in float32, as in the kernels that fuse what dequantises into what reads it."""
    scaled = [q.astype(np.float32) * s for q, s in zip(Q, SCALES, strict=True)]
    shifts = [np.float32(z) * s for z, s in zip(ZEROS, SCALES, strict=True)]
    y = (scaled[0] - shifts[0]) + (scaled[1] - shifts[1])
    assert of_the_sum(y) <= LIMIT
    assert of_the_sum(y + np.float32(4e-7)) <= LIMIT  # a few roundings of z·s, which is 4.9


@pytest.mark.parametrize("off", [1e-5, -1e-5])
def test_a_sum_that_is_off_by_more_than_its_terms_rounding_is_found(off):
    a, b = ((q.astype(np.float64) - z) * s for q, z, s in zip(Q, ZEROS, SCALES, strict=True))
    assert of_the_sum((a + b).astype(np.float32)) <= LIMIT
    assert of_the_sum((a + b + off).astype(np.float32)) > LIMIT


def cast() -> onnx.ModelProto:
    """A half tensor, and what it is as a float, which is the output."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["h"], "relu"),
            helper.make_node("Cast", ["h"], ["y"], "widen", to=F),
        ],
        "g",
        [value("x", HALF, ["n", 3])],
        [value("y", F, ["n", 3])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_half_that_is_kept_wider_until_it_is_cast_is_right_and_more_is_not():
    wide = RNG.uniform(1, 2, (64, 3)).astype(np.float32)
    read = wide.astype(np.float16)
    asked = Emulator.of(cast())
    for factor, right in ((1.0, True), (1.01, False)):
        given = {"x": read, "h": read, "y": wide * np.float32(factor)}
        found = {error.tensor: error for error in compare_layers(asked, given)}
        assert (found["y"].size <= LIMIT) == right


def test_a_graph_with_tensors_that_are_not_read_out_is_not_compared_by_layers(tiny_onnx):
    graph = onnx.load(tiny_onnx.path)
    assert unreadable(graph) is None
    assert unreadable(to_half(graph, half_io=False, half=FP16).model) is None
    raised = onnx.version_converter.convert_version(graph, 22)
    low = to_half(raised, half_io=False, half=BF16).model
    assert unreadable(low) == "tensors in BFLOAT16 cannot be read out"
