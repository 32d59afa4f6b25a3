"""Which nodes of a graph must not be computed in half, and why: ranges, sums, constants, operators.

A tensor is left in FP32, and with it every node that reads or writes it, where

    margin · amax  >  largest    it may overflow: unseen inputs reach further than seen ones
    amax  <  normal              all of it lies where half has lost bits

amax is the largest magnitude that calibration saw. With exponential tails the maximum of a thousand
million images lies (ln 10⁹ + ln d) / (ln 256 + ln d) times above that of 256, 1.9 for d = 10⁵
values an image; hence the margin's default of 2. A node is left in FP32 where

    margin · Σ |x|  >  largest   of a mean, pool or sum: some runtimes accumulate it in half
                                 (ROCm/MIOpen issue 2109, Tencent/ncnn pull request 2698)
    |w|  >  largest              a constant would become infinite, or clamped: another network
    ‖w − half(w)‖ > u · ‖w‖      a channel of factors, u half's roundoff, that no values within the
                                 normal range could lose; unless it is measured not to matter
    `_NEAR_ZERO`, `_SQUARES`, `_EXPONENTIALS`, `_SOFT`      what the operator does demands it

Σ |x| is n · amax, and where no x is below 0 no more than n times the largest mean. Terms (biases)
lose 2⁻²⁵ at most, which storing their sum in half loses as well. Convolutions and matrix products
are taken to accumulate in float32, as `exporter.emulation.rounding` has them; tensor cores could do
otherwise (mma.sync with an f16 accumulator), so layers that would then overflow are named
(`long_sums`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from exporter.precisions._floats import ALWAYS_FLOAT, FP16, MEANS, Floats, Half
from exporter.records import Array

if TYPE_CHECKING:
    import onnx

QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
_SUMS = MEANS | {"ReduceL1", "ReduceSum", "Sum"}

# Operators that turn a small value's relative error into a large result, or 0 into infinity: the
# operand must not have been through half, whose values below 6e-8 are 0.
_NEAR_ZERO = {"Div": 1, "Log": 0, "Reciprocal": 0, "Sqrt": 0}
# Sums of squares, which leave half's range twice as early, at both ends.
_SQUARES = frozenset({
    "GroupNormalization", "InstanceNormalization", "LRN", "LpNormalization", "LpPool",
    "MeanVarianceNormalization", "Pow", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceSumSquare",
})  # fmt: skip
# exp turns x's error, u·|x|, into a relative one; from an eighth on the result says little.
_EXPONENTIALS = frozenset({"Exp", "LogSoftmax", "ReduceLogSumExp", "Softmax"})
_OFF = 0.125
# ln(1 + exp(x)), which overflows on its way if it is computed as it is written.
_SOFT = frozenset({"Mish", "Softplus"})

# Inputs that multiply, whose relative error the result inherits.
_FACTORS = {
    "BatchNormalization": (1, 4), "Conv": (1,), "ConvTranspose": (1,), "Div": (0, 1),
    "Gemm": (0, 1), "GroupNormalization": (1,), "InstanceNormalization": (1,),
    "LayerNormalization": (1,), "MatMul": (0, 1), "Mul": (0, 1), "PRelu": (1,), "Pow": (1,),
}  # fmt: skip
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def unsafe_tensors(floats: Floats, half: Half, margin: float) -> dict[str, str]:
    """Return the activations that must not be half, each with the reason."""
    found = {}
    for name, amax in floats.ranges.items():
        if not floats.activation(name):
            continue
        if amax * margin > half.largest:
            times = f", and {margin:g} times that is beyond" if amax <= half.largest else ", beyond"
            found[name] = f"{name!r} reaches {amax:.4g}{times} {half.largest:.5g}"
        elif 0 < amax < half.normal:
            found[name] = (
                f"{name!r} reaches {amax:.2g}, below {half.name}'s normal range ({half.normal:.2g})"
            )
    for node in floats.graph.node:
        for name, why in _unsafe_operands(floats, node, half):
            found.setdefault(name, why)
    return found


def _unsafe_operands(floats: Floats, node: onnx.NodeProto, half: Half) -> Iterator[tuple[str, str]]:
    """Yield the activations that a node must not be given in half, with the reason."""
    op = node.op_type
    for index in ALWAYS_FLOAT.get(op, ()):
        if index < len(node.input) and floats.activation(node.input[index]):
            name = node.input[index]
            yield name, f"{name!r} is read by {op}, which takes it in FP32 alone"
    if op in _NEAR_ZERO and half.dtype == FP16.dtype:
        name = node.input[_NEAR_ZERO[op]]
        if floats.activation(name):
            yield name, f"{name!r} may be so near 0 that half makes it 0, and {op} needs it"
    if op in _EXPONENTIALS and floats.activation(node.input[0]):
        name = node.input[0]
        amax = floats.ranges.get(name, 0.0)
        if (off := amax * half.roundoff) > _OFF:
            what = f"{name!r} reaches {amax:.4g}, where half is off by {off:.2g}"
            yield name, f"{what}, and {op} by a factor of exp {off:.2g}"


def unsafe_node(floats: Floats, node: onnx.NodeProto, half: Half, margin: float) -> str | None:
    """Return why a node must be FP32 for its own constants, sums or operator; None if it need not.

    Factors that lose bits are `lossy_factors`' matter, since they can be measured.
    """
    if why := _constants_beyond(floats, node, half):
        return why
    if node.op_type in QUANTISERS:
        return _small_scale(floats, node, half)
    if node.op_type in _SQUARES and half.dtype == FP16.dtype:
        return "it may sum up squares, whose range is half as wide"
    amax = floats.ranges.get(node.input[0], 0.0) if node.input else 0.0
    if node.op_type in _SOFT and amax * margin > math.log(half.largest):
        return f"it reads {amax:.4g}, whose exponential may be beyond {half.largest:.5g}"
    return _sum_beyond(floats, node, half, margin) if node.op_type in _SUMS else None


def lossy_factors(floats: Floats, half: Half) -> dict[int, tuple[str, ...]]:
    """Return the constant factors that have a channel which half's range costs bits, by node."""
    import numpy as np

    found = {}
    for index, node in enumerate(floats.graph.node):
        lossy = []
        for at in _FACTORS.get(node.op_type, ()):
            name = node.input[at] if at < len(node.input) else ""
            if not floats.of_float(name) or floats.activation(name):
                continue
            rows = channels(floats.constants[name], node, at).astype(np.float64)
            lost = np.linalg.norm(rows - half.rounded(rows.astype(np.float32)), axis=1)
            if (lost > half.roundoff * (1 + 1e-9) * np.linalg.norm(rows, axis=1)).any():
                lossy.append(name)
        if lossy:
            found[index] = tuple(lossy)
    return found


def long_sums(floats: Floats, half: Half, margin: float) -> dict[str, float]:
    """Return the layers that accumulating in half could overflow, and how far their sums reach."""
    import numpy as np

    found = {}
    for node in floats.graph.node:
        if node.op_type not in _LAYERS or not floats.of_float(node.input[1]):
            continue
        amax, weights = floats.ranges.get(node.input[0]), floats.constants.get(node.input[1])
        if amax is None or weights is None:
            continue
        rows = np.abs(channels(weights, node, 1).astype(np.float64)).sum(axis=1)
        if (most := float(rows.max()) * amax) * margin > half.largest:
            found[node.name] = most
    return found


def channels(values: Array, node: onnx.NodeProto, at: int) -> Array:
    """Return a factor as rows, one per output channel; elements of a vector stand alone."""
    import numpy as np

    if node.op_type not in _LAYERS or values.ndim < 2:
        return values.reshape(-1, 1)
    turned = {a.name for a in node.attribute if a.i == 1}
    axis = {
        "Conv": 0,
        "ConvTranspose": 1,
        "Gemm": int("transB" not in turned if at else "transA" in turned),
        "MatMul": -1 if at else -2,
    }[node.op_type]
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


# ── Constants ───────────────────────────────────────────────────────────────────────


def _constants_beyond(floats: Floats, node: onnx.NodeProto, half: Half) -> str | None:
    import numpy as np

    for name, values in _constants_of(floats, node):
        with np.errstate(over="ignore"):
            over = np.isfinite(values) & ~np.isfinite(half.rounded(values))
        if count := int(over.sum()):
            most = np.abs(values[over]).max()
            return f"{count} of {name!r}'s values are beyond {half.largest:.5g}, up to {most:.4g}"
    if node.op_type == "BatchNormalization":
        parts = [floats.constants.get(name) for name in node.input[1:5]]
        if all(part is not None for part in parts):
            gamma, beta, mean, spread = (np.asarray(p, np.float64) for p in parts)
            epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            slope = gamma / np.sqrt(spread + epsilon)
            most = max(float(np.abs(part).max()) for part in (slope, beta - mean * slope))
            if most > half.largest:
                return f"its scale or shift reaches {most:.4g}, beyond {half.largest:.5g}"
    return None


def _constants_of(floats: Floats, node: onnx.NodeProto) -> Iterator[tuple[str, Array]]:
    import onnx

    for name in node.input:
        if floats.of_float(name) and name in floats.constants:
            yield name, floats.constants[name]
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == 1:
            yield attribute.name, onnx.numpy_helper.to_array(attribute.t)


def _small_scale(floats: Floats, node: onnx.NodeProto, half: Half) -> str | None:
    scale = floats.constants.get(node.input[1])
    if scale is None or not (least := float(scale.min())) < half.normal:
        return None
    return (
        f"the quantisation scale {node.input[1]!r} goes down to {least:.2g}, below {half.name}'s "
        f"normal range ({half.normal:.2g})"
    )


# ── Sums ────────────────────────────────────────────────────────────────────────────


def _sum_beyond(floats: Floats, node: onnx.NodeProto, half: Half, margin: float) -> str | None:
    read = [floats.ranges.get(name) for name in node.input if floats.activation(name)]
    known = [amax for amax in read if amax is not None]
    if not known or len(known) < len(read):
        return None  # `Floats.unknown` names them
    if node.op_type in ("Mean", "Sum"):
        count: int | None = len(node.input)
        most = sum(known)
    else:
        count = _count(floats, node)
        if count is None:
            return "it adds up a number of values that is not known"
        most = count * known[0]
        after = floats.ranges.get(node.output[0])
        if node.input[0] in floats.positive and after is not None:
            most = min(most, after * (count if node.op_type in MEANS else 1))
    if most * margin <= half.largest or count == 1:
        return None
    times = f", and {margin:g} times that is beyond" if most <= half.largest else ", beyond"
    return f"its sum of {count} values may reach {most:.4g}{times} {half.largest:.5g}"


def _count(floats: Floats, node: onnx.NodeProto) -> int | None:
    """Return how many values one sum of a pool or a reduction adds up, None if that is open."""
    attributes = {a.name: a for a in node.attribute}
    if node.op_type == "AveragePool":
        return int(math.prod(attributes["kernel_shape"].ints))
    shape = floats.shapes.get(node.input[0])
    if shape is None:
        return None
    axes = list(range(2, len(shape)))
    if node.op_type != "GlobalAveragePool":
        given = node.input[1] if len(node.input) > 1 else ""
        if given and given not in floats.constants:
            return None
        listed = floats.constants[given].tolist() if given else None
        axes = listed or (list(attributes["axes"].ints) if "axes" in attributes else [])
        noop = "noop_with_empty_axes" in attributes and attributes["noop_with_empty_axes"].i
        axes = axes or ([] if noop else list(range(len(shape))))
    sizes = [shape[axis] for axis in axes]
    known = [size for size in sizes if size is not None]
    return math.prod(known) if len(known) == len(sizes) else None
