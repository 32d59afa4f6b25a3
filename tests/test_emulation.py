"""Every operator, against ONNX's own reference in numpy, and ONNX Runtime where that is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from exporter.emulation import Emulator, emulate
from exporter.emulation.operators import OPERATORS
from exporter.errors import GraphError
from exporter.fold import fold_batchnorm
from exporter.precisions._half import to_half
from exporter.samples import feeds

EXACT = 1e-12
FEW = settings(max_examples=25, deadline=None, derandomize=True)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def whole(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def model_of(
    op: str, inputs, *, opset: int = 20, outputs: int = 1, domain: str = "", **attributes
) -> onnx.ModelProto:
    """One node; its first input is the graph's if it is of floats, and the rest are constants."""
    names = ["" if value is None else f"in{i}" for i, value in enumerate(inputs)]
    taken = [i for i, value in enumerate(inputs) if i == 0 and value.dtype.kind == "f"]
    written = [f"out{i}" for i in range(outputs)]
    node = onnx.helper.make_node(op, names, written, name="the.node", domain=domain, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "main",
        [
            onnx.helper.make_tensor_value_info(
                names[i], onnx.helper.np_dtype_to_tensor_dtype(inputs[i].dtype), inputs[i].shape
            )
            for i in taken
        ],
        [onnx.helper.make_empty_tensor_value_info(name) for name in written],
        [
            onnx.numpy_helper.from_array(np.asarray(value), names[i])
            for i, value in enumerate(inputs)
            if value is not None and i not in taken
        ],
    )
    imports = [onnx.helper.make_opsetid("", opset)]
    imports += [onnx.helper.make_opsetid(domain, 1)] if domain else []
    model = onnx.helper.make_model(graph, opset_imports=imports)
    model.ir_version = 10
    return model


def emulated(model: onnx.ModelProto, *inputs: np.ndarray, arithmetic="exact") -> list[np.ndarray]:
    emulator = Emulator.of(model)
    feed = dict(zip(emulator.inputs, map(torch.from_numpy, inputs), strict=False))
    with torch.inference_mode():
        found = emulator.run(feed, arithmetic)
    return [found[name].numpy() for name in emulator.outputs]


def by_reference(model: onnx.ModelProto, *inputs: np.ndarray) -> list[np.ndarray]:
    names = [value.name for value in model.graph.input]
    return ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=False)))


def by_runtime(op: str, inputs, **more) -> list[np.ndarray]:
    """ONNX Runtime's answer in float32, which has kernels that float64 has not."""
    single = [
        value.astype(np.float32) if value is not None and value.dtype.kind == "f" else value
        for value in inputs
    ]
    model = model_of(op, single, **more)
    del model.graph.output[:]
    inferred = onnx.shape_inference.infer_shapes(model_of(op, single, **more)).graph
    model.graph.output.extend(inferred.output)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, single, strict=False)))


def check(op: str, *inputs, near: float = EXACT, **more) -> None:
    """Emulate one node and compare with the reference, to the last digits of float64."""
    model = model_of(op, inputs, **more)
    given_ = [inputs[0]] if model.graph.input else []
    compare(emulated(model, *given_), by_reference(model, *given_), near)


def check_runtime(op: str, *inputs, near: float = 2e-5, **more) -> None:
    """The same beside ONNX Runtime, to the last digits of float32."""
    rounded = [
        value.astype(np.float32).astype(np.float64)
        if value is not None and value.dtype.kind == "f"
        else value
        for value in inputs
    ]
    model = model_of(op, rounded, **more)
    given_ = [rounded[0]] if model.graph.input else []
    compare(emulated(model, *given_), by_runtime(op, inputs, **more), near)


def compare(got, want, near: float) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        other = np.asarray(other)
        assert one.shape == other.shape
        assert (one.dtype.kind == "b") == (other.dtype.kind == "b")
        np.testing.assert_allclose(
            one.astype(np.float64), other.astype(np.float64), rtol=near, atol=near
        )


# ── Layers and pools, of every shape ────────────────────────────────────────────────

X = draw(2, 6, 7, 8)
SIZES = st.integers(1, 3)


def pairs(sizes=SIZES, count: int = 2):
    return st.lists(sizes, min_size=count, max_size=count)


def per_axis(sizes, dims: int):
    return st.lists(sizes, min_size=dims, max_size=dims)


@FEW
@given(data=st.data(), dims=st.integers(1, 3), group=st.sampled_from([1, 2, 3]), bias=st.booleans())
def test_a_convolution_with_any_strides_dilations_groups_and_padding(data, dims, group, bias):
    kernel, strides = data.draw(per_axis(SIZES, dims)), data.draw(per_axis(SIZES, dims))
    x, w = draw(2, 6, *(7, 8, 6)[:dims]), draw(12, 6 // group, *kernel, seed=1)
    options = {"group": group, "strides": strides}
    options["dilations"] = data.draw(per_axis(st.integers(1, 2), dims))
    if data.draw(st.booleans()):
        options["auto_pad"] = data.draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]))
    else:
        options["pads"] = data.draw(per_axis(st.integers(0, 2), 2 * dims))
    check("Conv", x, w, *[draw(12, seed=2)] * bias, **options)


@FEW
@given(data=st.data(), dims=st.integers(1, 2), group=st.sampled_from([1, 3]), bias=st.booleans())
def test_a_transposed_convolution_with_any_strides_dilations_and_output_padding(
    data, dims, group, bias
):
    """Beside ONNX Runtime: the reference cannot reshape what groups and dilations leave."""
    kernel, strides = data.draw(per_axis(SIZES, dims)), data.draw(per_axis(SIZES, dims))
    dilations = data.draw(per_axis(st.integers(1, 2), dims))
    check_runtime(
        "ConvTranspose",
        draw(2, 6, *(5, 4)[:dims]),
        draw(6, 4, *kernel, seed=1),
        *[draw(4 * group, seed=2)] * bias,
        group=group,
        strides=strides,
        dilations=dilations,
        pads=data.draw(per_axis(st.integers(0, 1), 2 * dims)),
        output_padding=[data.draw(st.integers(0, stride - 1)) for stride in strides],
    )


@FEW
@given(data=st.data(), opset=st.sampled_from([13, 19, 22]), dims=st.integers(1, 3))
def test_pools_with_any_strides_and_padding(data, opset, dims):
    kernel, strides = data.draw(per_axis(st.integers(2, 3), dims)), data.draw(per_axis(SIZES, dims))
    x = draw(2, 3, *(7, 8, 6)[:dims])
    pads = [data.draw(st.integers(0, size - 1)) for size in kernel * 2]
    options = {"kernel_shape": kernel, "strides": strides, "pads": pads, "opset": opset}
    counted = {"count_include_pad": data.draw(st.integers(0, 1))}
    check("AveragePool", x, **options, **counted)
    dilations = data.draw(per_axis(st.integers(1, 2), dims))
    check_runtime("MaxPool", x, **options, dilations=dilations)


@FEW
@given(
    pads=pairs(st.integers(0, 1), 4),
    kernel=pairs(st.integers(2, 3)),
    strides=pairs(),
    include=st.integers(0, 1),
)
def test_with_ceil_mode_no_window_starts_in_the_padding_at_the_end(pads, kernel, strides, include):
    """Beside ONNX Runtime: the reference averages over windows that are not there."""
    options = {"kernel_shape": kernel, "strides": strides, "pads": pads, "ceil_mode": 1}
    check_runtime("AveragePool", X, **options, count_include_pad=include)
    check_runtime("MaxPool", X, **options)


@FEW
@given(
    kernel=pairs(st.integers(2, 3)),
    strides=pairs(st.integers(1, 2)),
    kind=st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]),
)
def test_pools_that_pad_by_themselves(kernel, strides, kind):
    options = {"kernel_shape": kernel, "strides": strides, "auto_pad": kind}
    check_runtime("AveragePool", X, **options)
    check_runtime("MaxPool", X, **options)


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 4, 5), (2, 3, 2, 3, 4)])
def test_a_global_pool_of_any_number_of_axes(op, shape):
    judge = check if len(shape) == 4 or op == "GlobalAveragePool" else check_runtime
    judge(op, draw(*shape))  # the reference takes maxima over two axes alone


@FEW
@given(
    left=st.booleans(),
    right=st.booleans(),
    alpha=st.sampled_from([1.0, 0.5]),
    beta=st.sampled_from([1.0, 2.0, 0.0]),
    bias=st.sampled_from([None, (3,), (4, 1), (4, 3), (1,)]),
)
def test_a_gemm_with_any_transposes_and_factors(left, right, alpha, beta, bias):
    x, w = draw(*((5, 4) if left else (4, 5))), draw(*((3, 5) if right else (5, 3)), seed=1)
    more = [draw(*bias, seed=2)] if bias else []
    check("Gemm", x, w, *more, transA=int(left), transB=int(right), alpha=alpha, beta=beta)


@pytest.mark.parametrize(
    "shapes", [((2, 4, 5), (5, 3)), ((5,), (5, 3)), ((2, 3, 4, 5), (3, 5, 2)), ((4, 5), (5,))]
)
def test_a_matrix_product_broadcasts(shapes):
    check("MatMul", draw(*shapes[0]), draw(*shapes[1], seed=1))


@pytest.mark.parametrize("opset", [13, 15, 20])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 3, 4, 5)])
def test_a_batchnorm(shape, opset):
    of = [*(draw(3, seed=seed) for seed in (1, 2, 3)), draw(3, seed=4) ** 2]
    judge = check if opset > 13 else check_runtime  # the reference trains before opset 14
    judge("BatchNormalization", draw(*shape), *of, epsilon=0.25, opset=opset)


# ── Element by element ──────────────────────────────────────────────────────────────

PLAIN = ["Abs", "Ceil", "Dropout", "Exp", "Floor", "Identity", "Mish", "Neg", "Reciprocal"]
PLAIN += ["Relu", "Sigmoid", "Softplus", "Tanh"]
WITH = {
    "Elu": {"alpha": 0.5},
    "HardSigmoid": {"alpha": 0.25, "beta": 0.375},
    "LeakyRelu": {"alpha": 0.25},
    "Selu": {"alpha": 1.5, "gamma": 2.0},
}
# The reference computes these in float32, or with constants rounded to it.
SINGLE = [*WITH, "Erf", "Gelu", "HardSwish"]


@pytest.mark.parametrize("op", [*PLAIN, *WITH])
def test_a_function_of_one_number(op):
    x = np.concatenate([draw(50) * 3, draw(50) * 30, [0.0, -0.5, 0.5, 1.0]])
    check(op, x + (x == 0) if op == "Reciprocal" else x, opset=22, **WITH.get(op, {}))


@pytest.mark.parametrize("op", SINGLE)
def test_a_function_whose_constants_are_single_precision(op):
    check(op, np.concatenate([draw(50) * 3, [0.0, -3.0, 3.0]]), near=2e-7, opset=22)


@pytest.mark.parametrize("op", ["Log", "Sqrt"])
def test_a_function_of_a_positive_number(op):
    check(op, draw(50) ** 2 + 1e-6)


def test_gelu_in_both_forms():
    check("Gelu", draw(50) * 3, approximate="tanh", near=1e-7)
    check_runtime("Gelu", draw(50) * 3, approximate="none")


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_softmax_along_any_axis(op, axis):
    check(op, draw(4, 5, 3) * 10, axis=axis)
    check(op, draw(4, 5, 3))


@pytest.mark.parametrize(
    "op", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum", "Equal", "Greater", "Less"]
)
@pytest.mark.parametrize("shapes", [((2, 3, 4), (3, 1)), ((4,), (2, 3, 1)), ((2, 1), (2, 1))])
def test_two_tensors_broadcast(op, shapes):
    x, y = np.round(draw(*shapes[0])) + 0.5, np.round(draw(*shapes[1], seed=1)) + 0.5
    judge = check if op != "Mean" else check_runtime  # the reference adds in place
    judge(op, x, y)


@pytest.mark.parametrize("op", ["Max", "Min", "Mean", "Sum"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_any_number_of_tensors(op, count):
    check(op, *(draw(2, 3, seed=seed) for seed in range(count)))


def test_powers_and_whole_divisions():
    check("Pow", draw(20) ** 2, np.array(1.5))
    check("Pow", draw(20), np.array(3.0))
    check("Div", whole(7, -7, 9, -9), whole(2, 2, -4, -4))


@pytest.mark.parametrize("op", ["And", "Or"])
def test_conditions(op):
    check(op, np.array([True, True, False, False]), np.array([True, False, True, False]))
    check("Not", np.array([True, False]))


def test_where_takes_one_or_the_other():
    check("Where", np.array([[True], [False]]), draw(2, 3), draw(3, seed=1))


@pytest.mark.parametrize("low", [None, -0.5, 0.4])
@pytest.mark.parametrize("high", [None, 0.3])
def test_a_clip_with_bounds_that_are_missing_or_crossed(low, high):
    bounds = [None if bound is None else np.array(bound) for bound in (low, high)]
    check("Clip", draw(40), *bounds)


@pytest.mark.parametrize("shape", [(3, 1, 1), (1,), (5,), (4, 1), (3, 4, 5)])
def test_a_prelu_broadcasts_its_slope(shape):
    check("PRelu", draw(2, 3, 4, 5), draw(*shape, seed=1))


# ── Reductions ──────────────────────────────────────────────────────────────────────

REDUCTIONS = ["ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"]


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("axes", [None, (2, 3), (-1, 1), (0,), ()])
def test_a_reduction_over_axes_given_as_an_input(op, keep, axes):
    more = [] if axes is None else [whole(*axes)]
    check(op, draw(2, 3, 4, 5), *more, keepdims=keep, opset=18)


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("more", [(), (whole(),)])
def test_a_reduction_over_no_axes_where_none_means_none(op, more):
    check(op, draw(2, 3), *more, noop_with_empty_axes=1, opset=18)


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMean", "ReduceMin"])
@pytest.mark.parametrize("axes", [{}, {"axes": [2, 3]}, {"axes": [-1, 1]}])
def test_a_reduction_over_axes_given_as_an_attribute(op, axes):
    check(op, draw(2, 3, 4, 5), keepdims=0, opset=13, **axes)


# ── Moves ───────────────────────────────────────────────────────────────────────────

P = draw(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("mode", "opset"),
    [(mode, opset) for mode in ("constant", "edge", "reflect") for opset in (13, 18, 19, 21)]
    + [("wrap", 19), ("wrap", 21)],  # which came with 19, and axes with 18
)
def test_every_way_to_pad(mode, opset):
    check("Pad", P, whole(0, 0, 1, 2, 0, 0, 2, 1), mode=mode, opset=opset)
    if opset >= 18:
        check("Pad", P, whole(1, 2, 2, 1), None, whole(-1, 2), mode=mode, opset=opset)


def test_padding_with_a_value_in_any_axis_and_cropping():
    check("Pad", P, whole(0, 1, 1, 2, 1, 0, 2, 1), np.array(2.5))
    check_runtime("Pad", P, whole(-1, 0, 0, 1), np.array(2.5), whole(-1, 2))


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [
        (whole(1, 0), whole(3, 100), None, None),
        (whole(1, 0), whole(3, 100), None, whole(2, 1)),
        (whole(1), whole(-1), whole(2), None),
        (whole(-1), whole(-(10**9)), whole(-1), whole(-2)),
        (whole(3), whole(-(2**63)), whole(3), whole(-1)),
        (whole(3), whole(2**31 - 1), whole(3), whole(1)),
        (whole(2), whole(2), whole(3), None),
        (whole(-100, 4), whole(100, 0), whole(1, 3), whole(2, -3)),
    ],
)
def test_a_slice_whose_ends_lie_anywhere(starts, ends, axes, steps):
    check("Slice", P, starts, ends, *([axes, steps] if steps is not None else [axes])[:2])


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ([whole(1, 2)], {"axis": 1, "outputs": 2}),
        ([], {"axis": -1, "num_outputs": 2, "outputs": 2}),
        ([], {"axis": 3, "num_outputs": 3, "outputs": 3}),
        ([], {"axis": 2, "outputs": 2, "opset": 13}),
        ([whole(3, 1, 1)], {"axis": -1, "outputs": 3, "opset": 13}),
    ],
)
def test_a_split_into_equal_parts_or_uneven_ones(more, options):
    check("Split", P, *more, **options)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("largest", [0, 1])
def test_the_largest_come_in_order_with_their_places_and_equal_ones_in_theirs(axis, largest):
    ties = np.random.default_rng(7).integers(0, 4, (9, 9)).astype(np.float64)
    for x in (ties, draw(9, 9)):
        check_runtime("TopK", x, whole(4), axis=axis, largest=largest, outputs=2)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("indices", [whole(-1, 0), np.array(1), np.array([[0, -1], [1, 1]])])
def test_a_gather_counts_from_either_end(axis, indices):
    check("Gather", P, indices, axis=axis)


def test_a_gather_of_one_number_gives_a_number():
    """As exporters write ``x.shape[0]``."""
    check("Gather", np.array([4, 5, 6]), np.array(1))


@pytest.mark.parametrize(
    ("indices", "shared"),
    [
        (np.array([[0, -1], [1, 1]]), 0),
        (np.array([[[0, 1, -1]], [[1, 0, 2]]]), 0),
        (np.array([[1], [-1]]), 1),
        (np.array([[[0, 1]], [[2, -1]]]), 1),
    ],
)
def test_a_gather_of_places_counts_from_either_end(indices, shared):
    check("GatherND", P, indices, batch_dims=shared)


@pytest.mark.parametrize("shape", [(0, -1), (0, 0, 20), (-1,), (5, 0, -1), (2, 60)])
def test_a_reshape_keeps_and_infers_sizes(shape):
    check("Reshape", P, whole(*shape))


@pytest.mark.parametrize("axis", [0, 1, 3, 4, -1])
def test_a_flatten_at_any_axis(axis):
    check("Flatten", P, axis=axis)


def test_axes_come_go_and_change_places():
    check("Transpose", P)
    check("Transpose", P, perm=[0, 2, 3, 1])
    check("Squeeze", draw(2, 1, 3, 1))
    check("Squeeze", draw(2, 1, 3, 1), whole(-1))
    check("Unsqueeze", P, whole(0, -1))
    check("Unsqueeze", P, whole(-2, 1))
    check("Expand", draw(3, 1), whole(2, 1, 4))
    check("Expand", draw(3, 4), whole(1))
    check("Concat", P, P + 1, axis=-1)
    check("Concat", P, P + 1, P, axis=1)
    check("DepthToSpace", draw(2, 8, 2, 3), blocksize=2)
    check("DepthToSpace", draw(2, 8, 2, 3), blocksize=2, mode="CRD")


def test_shapes_and_constants():
    check("Shape", P)
    check("Shape", P, start=-2)
    check("Shape", P, start=1, end=-1)
    check("ConstantOfShape", whole(2, 3))
    seven = onnx.numpy_helper.from_array(np.array([7], dtype=np.int64))
    check("ConstantOfShape", whole(2, 3), value=seven)
    for value in ({"value_float": 2.5}, {"value_floats": [1.0, 2.0]}, {"value_int": 3}):
        model = model_of("Constant", [], **value)
        compare(emulated(model), by_reference(model), 0)
    model = model_of("Constant", [], value=onnx.numpy_helper.from_array(draw(2, 3)))
    compare(emulated(model), by_reference(model), 0)


@pytest.mark.parametrize("to", [6, 7, 9, 11])
def test_a_cast_to_whole_numbers_cuts_off(to):
    check("Cast", np.array([-1.7, 0.0, 2.5, 3.5]), to=to)


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("asymmetric", {"mode": "nearest", "nearest_mode": "floor"}),
        ("half_pixel", {"mode": "linear"}),
        ("pytorch_half_pixel", {"mode": "linear"}),
        ("align_corners", {"mode": "linear"}),
    ],
)
def test_a_resize_by_scales_or_to_sizes(where, options):
    options = {**options, "coordinate_transformation_mode": where}
    for scale in (2.0, 1.5, 0.6):
        scales = np.array([1, 1, scale, scale], dtype=np.float32)
        check_runtime("Resize", P, None, scales, **options)
    check_runtime("Resize", P, None, None, whole(2, 3, 9, 3), **options)


# ── Integers ────────────────────────────────────────────────────────────────────────

TIES = np.array([-0.25, 0.25, 0.75, 1.25, -0.75, 1e6, -1e6, 0.26, 3.2, 63.25, -64.25, 0.0])


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint16])
def test_quantisation_rounds_ties_to_even_and_saturates(kind):
    check("QuantizeLinear", TIES, np.array(0.5), np.array(3, dtype=kind), opset=21)


def test_quantisation_to_the_type_that_is_said_or_else_to_uint8():
    check("QuantizeLinear", TIES, np.array(0.5))
    check("QuantizeLinear", TIES, np.array(0.5), opset=21, output_dtype=3)
    expected = np.clip(np.rint(TIES / 0.5), 0, 255)
    assert np.array_equal(
        emulated(model_of("QuantizeLinear", [TIES, np.array(0.5)]), TIES)[0], expected
    )


def test_what_is_infinite_saturates_too():
    x = np.array([np.inf, -np.inf, 1e300])
    (got,) = emulated(model_of("QuantizeLinear", [x, np.array(0.5), np.int8(3)]), x)
    assert got.tolist() == [127.0, -128.0, 127.0]


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_quantisation_along_an_axis(kind, axis):
    size = (2, 3, 5)[axis]
    x, scale = draw(2, 3, 5) * 9, draw(size, seed=1) ** 2 + 0.1
    check("QuantizeLinear", x, scale, np.arange(size, dtype=kind), axis=axis)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32])
@pytest.mark.parametrize("axis", [0, 1])
def test_dequantisation_along_an_axis_and_of_a_tensor(kind, axis):
    q = np.arange(24).reshape(2, 3, 4).astype(kind) * 5
    zero = np.zeros(q.shape[axis], dtype=kind) + np.array(4 * (kind != np.int32), dtype=kind)
    check("DequantizeLinear", q, draw(q.shape[axis]) ** 2, zero, axis=axis)
    check("DequantizeLinear", q, np.array(0.1))
    check("DequantizeLinear", q, np.array(0.1), zero[0])


@pytest.mark.parametrize("opset", range(13, 25))
def test_every_opset_that_can_be_exported_is_read(opset):
    check("Conv", P, draw(4, 3, 2, 2), draw(4, seed=1), opset=opset)
    check("AveragePool", P, kernel_shape=[2, 2], pads=[1, 0, 0, 1], opset=opset)
    check("Reshape", P, whole(0, -1), opset=opset)
    check("Relu", P, opset=opset)
    check("Flatten", P, opset=opset)
    check("ReduceSum", P, whole(-1), opset=opset)
    check("Split", P, whole(1, 2), axis=1, outputs=2, opset=opset)
    judge = check if opset >= 19 else check_runtime  # the reference has none before
    judge("DequantizeLinear", np.array([3], np.int8), np.array(0.5), opset=opset)


# ── What cannot be emulated ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("op", "inputs", "options", "said"),
    [
        ("Tan", [P], {}, "the operator Tan"),
        ("Thing", [P], {"domain": "com.example"}, "the operator com.example::Thing"),
        (
            "AveragePool",
            [P],
            {"kernel_shape": [2, 2], "dilations": [2, 2]},
            "AveragePool with dilations",
        ),
        (
            "ConvTranspose",
            [P, draw(3, 2, 2, 2)],
            {"auto_pad": "SAME_UPPER"},
            "ConvTranspose with auto_pad",
        ),
        (
            "Pad",
            [draw(2, 6), whole(0, 2, 0, 2)],
            {"mode": "reflect"},
            "Pad with reflect padding of channels",
        ),
        ("Cast", [P], {"to": 3}, "Cast with to=3"),
        (
            "QuantizeLinear",
            [draw(2, 4), np.ones((2, 2)), np.zeros((2, 2), np.int8)],
            {"block_size": 2, "opset": 21},
            "QuantizeLinear with block_size",
        ),
        (
            "DequantizeLinear",
            [np.zeros((2, 4), np.int8), np.ones((2, 2))],
            {"block_size": 2, "opset": 21},
            "DequantizeLinear with block_size",
        ),
        (
            "QuantizeLinear",
            [P, np.array(0.5)],
            {"output_dtype": 19, "opset": 21},
            "QuantizeLinear with type 19",
        ),
        (
            "Resize",
            [P, np.ones(8), np.array([1, 1, 2, 2], np.float32)],
            {"mode": "cubic", "coordinate_transformation_mode": "tf_crop_and_resize"},
            "Resize with tf_crop_and_resize",
        ),
        (
            "Resize",
            [P, None, None, whole(9, 9)],
            {"mode": "linear", "axes": [2, 3]},
            "Resize with axes",
        ),
        (
            "Resize",
            [P, None, None, whole(2, 3, 2, 2)],
            {"mode": "linear", "antialias": 1},
            "Resize with antialias",
        ),
        (
            "Resize",
            [P, None, None, whole(2, 6, 2, 2)],
            {"mode": "linear"},
            "Resize with a change of batch or channels",
        ),
        ("MaxPool", [P], {"kernel_shape": [2, 2], "outputs": 2}, "MaxPool that gives 'out1'"),
        ("Dropout", [P], {"outputs": 2}, "Dropout that gives 'out1'"),
        (
            "BatchNormalization",
            [P, *[draw(3) ** 2] * 4],
            {"training_mode": 1},
            "BatchNormalization with training_mode",
        ),
    ],
)
def test_what_has_no_emulation_is_refused_by_node_and_operator(op, inputs, options, said):
    with refused(GraphError, "'the.node': ", said, "has no emulation"):
        emulated(model_of(op, inputs, **options), P if inputs[0] is P else inputs[0])


def test_a_graph_that_does_not_work_is_refused_too():
    with refused(
        GraphError, "'the.node': Reshape cannot be emulated: ", "invalid for input of size"
    ):
        emulated(model_of("Reshape", [P, whole(7, 7)]), P)


# ── Norms, reductions, and what else files have ─────────────────────────────────────


@pytest.mark.parametrize("shape", [(3, 4, 7), (3, 4, 5, 6), (2, 4, 2, 3, 5)])
def test_an_instance_norm_is_of_each_channel_of_each_sample(shape):
    of = (draw(4, seed=1), draw(4, seed=2))
    check("InstanceNormalization", draw(*shape) + 3, *of, epsilon=0.25)


@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize("biased", [True, False])
def test_a_layer_norm_is_over_the_last_axes(axis, biased):
    x = draw(3, 4, 5) + 3
    scale = draw(*x.shape[axis:], seed=1)
    more = [draw(*scale.shape, seed=2)] * biased
    check("LayerNormalization", x, scale, *more, axis=axis, epsilon=0.25, near=1e-6)


@pytest.mark.parametrize(("opset", "factors"), [(18, 2), (21, 4)])
def test_a_group_norm_has_factors_for_groups_and_later_for_channels(opset, factors):
    """Beside PyTorch: the reference has the function of one opset alone."""
    x, scale, bias = draw(3, 4, 5, 6) + 3, draw(factors, seed=1), draw(factors, seed=2)
    model = model_of("GroupNormalization", (x, scale, bias), opset=opset, num_groups=2, epsilon=0.5)
    each = [torch.from_numpy(np.repeat(part, 4 // factors)) for part in (scale, bias)]
    want = torch.nn.functional.group_norm(torch.from_numpy(x), 2, *each, eps=0.5)
    compare(emulated(model, x), [want.numpy()], EXACT)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_local_response_norm_goes_by_the_channels_around(size):
    """Beside ONNX Runtime: the reference knows five channels alone."""
    check_runtime("LRN", draw(2, 6, 3, 4) * 3, size=size, alpha=0.5, beta=0.5, bias=2.0)


@pytest.mark.parametrize(
    "op",
    ["ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "ReduceSumSquare"],
)
@pytest.mark.parametrize("axes", [None, (1,), (-1, 0)])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_other_reductions(op, axes, keepdims):
    x = np.abs(draw(3, 4, 5)) + 0.5 if op == "ReduceLogSum" else draw(3, 4, 5)
    check(op, x, *([] if axes is None else [whole(*axes)]), keepdims=keepdims)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("nchw,cd->ndhw", [(2, 3, 4, 5), (3, 6)]),
        ("bij, bjk -> bik", [(2, 3, 4), (2, 4, 5)]),
        ("...i,ij->...j", [(2, 3, 4), (4, 5)]),
        ("ij,jk", [(3, 4), (4, 5)]),
        ("ij->", [(3, 4)]),
    ],
)
def test_an_einsum(equation, shapes):
    check("Einsum", *(draw(*s, seed=i) for i, s in enumerate(shapes)), equation=equation)


def test_functions_and_comparisons_that_are_rare():
    x = np.concatenate([draw(50) * 3, [0.0, -0.5, 0.5, 1.5, 2.5]])
    for op in ("Cos", "Round", "Sign", "Sin", "Softsign"):
        check(op, x)
    check("Celu", x, alpha=0.5)
    check("ThresholdedRelu", x, alpha=0.5)
    for op in ("GreaterOrEqual", "LessOrEqual"):
        check(op, np.round(draw(4, 3)), np.round(draw(4, 3, seed=1)))


def test_moves_that_are_rare():
    check("Tile", draw(2, 3), whole(2, 1))
    check("SpaceToDepth", draw(2, 3, 4, 6), blocksize=2)
    check("Size", draw(2, 3))
    check("Range", whole(1)[0], whole(9)[0], whole(3)[0])
    check("Range", whole(5)[0], whole(-2)[0], whole(-2)[0])


RESIZED = [
    {"mode": mode, "coordinate_transformation_mode": where, **more}
    for where in (
        *("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"),
        "half_pixel_symmetric",
    )
    for mode, more in (
        ("linear", {}),
        ("cubic", {}),
        ("cubic", {"cubic_coeff_a": -0.5, "exclude_outside": 1}),
        *(
            ("nearest", {"nearest_mode": kind})
            for kind in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
        ),
    )
]


@pytest.mark.parametrize("said", RESIZED, ids=lambda said: " ".join(map(str, said.values())))
def test_a_resize_by_any_place_and_any_taps(said):
    """Beside the reference, and ONNX Runtime where that has a place of its own for one value."""
    x = draw(2, 3, 5, 6)
    two, eleven = np.array([1, 1, 2, 1.5], np.float32), whole(2, 3, 11, 4)
    for scales in (two, np.array([1, 1, 0.75, 3], np.float32)):
        check_runtime("Resize", x, None, scales, **said)
    for sizes in (eleven, whole(2, 3, 1, 6)):
        check_runtime("Resize", x, None, None, sizes, **said)
    check("Resize", x, None, two, **said, near=1e-5)
    check("Resize", x, None, None, eleven, **said, near=1e-5)


def test_every_operator_was_compared():
    """So that none is added without a test: each name is in this file, in quotes."""
    said = Path(__file__).read_text("utf-8")
    assert [op for op in OPERATORS if f'"{op}"' not in said] == []


# ── Whole networks ──────────────────────────────────────────────────────────────────

IMAGES = draw(5, 1, 32, 32, seed=7).astype(np.float32)


@pytest.fixture(scope="module")
def tiny(tiny_onnx) -> onnx.ModelProto:
    return onnx.load(tiny_onnx.path)


def outputs(model: onnx.ModelProto, kind: str, images=IMAGES, size: int = 4, **more) -> np.ndarray:
    emulator = Emulator.of(model)
    count = -(-len(images) // size)
    found = emulate(emulator, feeds(images, "input", size=size), kind, **more)["logits"]
    assert len(found) == count * size
    return found[: len(images)]


def test_the_exact_run_is_the_folded_network_in_float64(tiny, tiny_module):
    folded = fold_batchnorm(tiny_module).module
    with torch.inference_mode():
        want = folded.double()(torch.from_numpy(IMAGES).double()).numpy()
    got = outputs(tiny, "exact")
    assert got.dtype == np.float64
    assert np.linalg.norm(got - want) <= EXACT * np.linalg.norm(want)


@pytest.mark.parametrize("kind", ["exact", "rounded"])
def test_a_batch_is_its_samples_one_by_one(tiny, kind):
    half = to_half(tiny, half_io=False).model
    alone, together = outputs(half, kind, size=1), outputs(half, kind, size=5)
    # In half, a sum in another order may fall to the other side of a tie, but hardly ever.
    np.testing.assert_allclose(alone, together, rtol=1e-12 if kind == "exact" else 2e-3)


@pytest.mark.parametrize("half_io", [False, True])
def test_the_rounded_run_is_half_arithmetic_node_by_node(tiny, half_io):
    """Each node in float64 by the reference, and numpy's own rounding to float16 behind it."""
    half = to_half(tiny, half_io=half_io).model
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in half.graph.initializer}
    values = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in values.items()}
    values["input"] = IMAGES.astype(np.float16 if half_io else np.float32).astype(np.float64)
    for node in half.graph.node:
        written = values[node.input[0]]
        if node.op_type != "Cast":
            alone = model_of("Identity", [np.zeros(1)])
            alone.graph.node[0].CopyFrom(node)
            del alone.graph.input[:], alone.graph.output[:]
            empty = onnx.helper.make_empty_tensor_value_info
            alone.graph.input.extend(empty(name) for name in node.input)
            alone.graph.output.extend(empty(name) for name in node.output)
            feed = {name: values[name] for name in node.input}
            (written,) = ReferenceEvaluator(alone).run(None, feed)
        values[node.output[0]] = written.astype(np.float16).astype(np.float64)
    want = values["logits"]
    got = outputs(half, "rounded")
    assert np.array_equal(got, got.astype(np.float16))
    # Sums in another order may fall to the other side of a tie; nothing else may differ.
    assert (got != want).mean() < 0.05
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    exact = outputs(half, "exact")
    assert np.linalg.norm(exact - want) >= 1e-4 * np.linalg.norm(want)


def test_noise_is_the_same_for_a_seed_and_another_for_another(tiny):
    one, again = (outputs(tiny, "noisy", seed=3) for _ in range(2))
    other = outputs(tiny, "noisy", seed=4)
    exact = outputs(tiny, "exact")
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    off = np.linalg.norm(one - exact) / np.linalg.norm(exact)
    assert 2.0**-26 < off < 2.0**-18


def test_what_is_watched_comes_beside_the_outputs(tiny):
    emulator = Emulator.of(tiny)
    feed = {"input": torch.from_numpy(IMAGES)}
    found = emulator.run(feed, watch=("input", "relu", "view"))
    assert found.keys() == {"input", "relu", "view", "logits"}
    assert found["relu"].dtype == torch.float64
    assert float(found["relu"].min()) == 0.0


def test_what_a_graph_declares_is_told(tiny):
    assert not Emulator.of(tiny).rounds_to_half
    assert not Emulator.of(tiny).quantises
    assert Emulator.of(to_half(tiny, half_io=False).model).rounds_to_half
    assert Emulator.of(model_of("QuantizeLinear", [TIES, np.array(0.5)])).quantises


def test_a_gradient_passes_straight_through_rounding():
    emulator = Emulator.of(model_of("QuantizeLinear", [TIES, np.array(0.5), np.int8(0)]))
    x = torch.tensor([0.3, 1.1, 500.0], dtype=torch.float64, requires_grad=True)
    emulator.run({"in0": x})["out0"].sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 0.0]  # 1 / scale, and nothing beyond the last step
