"""What is said of two graphs that differ: every kind of difference, in one line."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from exporter.difference import describe_difference

F = onnx.TensorProto.FLOAT
W = np.arange(24, dtype=np.float32).reshape(4, 3, 2, 1)
B = np.arange(4, dtype=np.float32)
node = onnx.helper.make_node


def graph(made: onnx.NodeProto, **constants) -> onnx.ModelProto:
    held = {"w": W, "b": B, **constants}
    return onnx.helper.make_model(
        onnx.helper.make_graph(
            [node("Identity", ["x"], ["h"], "before"), made],
            "main",
            [onnx.helper.make_tensor_value_info(name, F, None) for name in ("x", "z")],
            [onnx.helper.make_tensor_value_info("y", F, None)],
            [onnx.numpy_helper.from_array(value, name) for name, value in held.items()],
        )
    )


def conv(
    inputs=("h", "w", "b"), op: str = "Conv", writes: str = "y", **attributes
) -> onnx.NodeProto:
    return node(op, list(inputs), [writes], "layer.conv", **{"strides": [1, 1], **attributes})


ASKED = graph(conv())


def changed(*at: tuple[int, ...], by: float = 1.0) -> np.ndarray:
    value = W.copy()
    for index in at:
        value[index] += by
    return value


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (graph(conv(op="ConvTranspose")), "is ConvTranspose where Conv was asked for"),
        (graph(conv(strides=[2, 1])), "has strides [2, 1] where [1, 1] was asked for"),
        (graph(conv(group=2)), "has group 2 where none was asked for"),
        (graph(conv(auto_pad="VALID")), "has auto_pad VALID where none was asked for"),
        (graph(conv(("h", "w"))), "reads 2 tensors where 3 were asked for"),
        (graph(conv(("x", "w", "b"))), "reads 'x' where 'h' was asked for"),
        (graph(conv(), w=W[:, :, :1]), "has 'w' of shape [4, 3, 1, 1] where [4, 3, 2, 1] was asked for"),
        (graph(conv(), w=W.astype(np.float64)), "has 'w' as DOUBLE where FLOAT was asked for"),
        (graph(conv(), w=changed((2, 1, 0, 0))), "has another 'w' than was asked for (1 of 24 values, in channel 2 of 4 channels)"),
        (graph(conv(), w=changed((2,), (0, 1))), "has another 'w' than was asked for (8 of 24 values, in 2 of 4 channels)"),
        (graph(conv(), b=B * np.float32(np.nan)), "has another 'b' than was asked for (4 of 4 values, in 4 of 4 channels)"),
        (graph(conv(strides=[2, 1]), w=W + 1), "has strides [2, 1] where [1, 1] was asked for, has another 'w' than was asked for (24 of 24 values, in 4 of 4 channels)"),
    ],
)  # fmt: skip
def test_what_is_different_is_said(found, said):
    assert describe_difference(ASKED, found, "y") == f"in the file, 'layer.conv' {said}"


def test_nothing_is_said_of_what_is_the_same():
    same = graph(conv())
    same.graph.node[1].name = "renamed"
    assert describe_difference(ASKED, same, "y") is None
    assert describe_difference(ASKED, ASKED, "h") is None
    assert describe_difference(ASKED, graph(conv(strides=[2, 2])), "h") is None
    assert describe_difference(ASKED, ASKED, "unheard of") is None


def test_values_that_are_not_a_number_on_both_sides_are_the_same():
    none = W * np.float32(np.nan)
    assert describe_difference(graph(conv(), w=none), graph(conv(), w=none), "y") is None


def test_constants_are_the_same_under_another_name():
    file = graph(conv(("h", "weights", "b")), weights=W)
    assert describe_difference(ASKED, file, "y") is None
    file = graph(conv(("h", "weights", "b")), weights=W + 1)
    assert "has another 'w' than was asked for (24 of 24 values" in str(
        describe_difference(ASKED, file, "y")
    )


def test_a_node_that_is_not_there_is_missed():
    said = describe_difference(ASKED, graph(conv(writes="other")), "y")
    assert said == "the file has no node that writes 'y', which 'layer.conv' should"


def test_swapped_inputs_are_both_named():
    asked = graph(node("Sub", ["h", "z"], ["y"], "layer/Sub"))
    found = graph(node("Sub", ["z", "h"], ["y"], "layer/Sub"))
    assert describe_difference(asked, found, "y") == (
        "in the file, 'layer/Sub' reads 'z' where 'h' was asked for, reads 'h' where 'z' was asked for"
    )


def test_a_single_number_has_no_channels():
    asked = graph(node("Mul", ["h", "k"], ["y"], "layer/Mul"), k=np.float32(1))
    for other in (np.float32(2), np.int8(2)):
        said = describe_difference(asked, graph(node("Mul", ["h", "k"], ["y"], "m"), k=other), "y")
        assert str(said).endswith("has another 'k' than was asked for (1 of 1 values)")


def test_a_tensor_in_an_attribute_takes_one_line():
    sides = [
        graph(node("Constant", [], ["y"], "layer/Constant", value=onnx.numpy_helper.from_array(v)))
        for v in (W, W + 1)
    ]
    said = describe_difference(*sides, "y")
    assert said is not None
    assert "\n" not in said
    assert "'layer/Constant' has another value than was asked for" in said


def test_bfloat16_and_4_bits_are_compared_too():
    import ml_dtypes

    for kind in (ml_dtypes.bfloat16, ml_dtypes.int4):
        asked, found = (graph(conv(), w=v.astype(kind)) for v in (W % 7, W * 0))
        assert describe_difference(asked, asked, "y") is None
        assert "has another 'w'" in str(describe_difference(asked, found, "y"))
