"""What ONNX operators mean, in PyTorch on float64 tensors: https://onnx.ai/onnx/operators.

Written down a second time, apart from every runtime, since a runtime cannot be its own witness.
Each function takes a node's attributes and its inputs (None where one is left out) and returns its
output, or a tuple of them. All are differentiable where the operator is; rounding passes gradients
straight through (Y. Bengio et al., 2013).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from exporter.emulation.grids import FLOAT8, LIMITS, nearest
from exporter.emulation.norms import (
    log_of_sum,
    lrn,
    normalisation,
    product,
    root_of_squares,
    sum_of_magnitudes,
    sum_of_squares,
)
from exporter.emulation.resizing import resize

Attributes: TypeAlias = Mapping[str, Any]
Operator: TypeAlias = Callable[..., "Tensor | tuple[Tensor, ...]"]


# ── Layers ──────────────────────────────────────────────────────────────────────────


def _conv(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    run: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[w.ndim - 3]
    strides, dilations = _spatial(a, "strides", w), _spatial(a, "dilations", w)
    x, padding = _padded(a, x, w.shape[2:], strides, dilations)
    y: Tensor = run(x, w, b, strides, padding, dilations, a.get("group", 1))
    return y


def _conv_transpose(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    runs = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
    if a.get("auto_pad", b"NOTSET") != b"NOTSET" or "output_shape" in a:
        raise NotImplementedError("auto_pad or output_shape")
    spatial = w.ndim - 2
    pads = a.get("pads", [0] * 2 * spatial)
    extra = _spatial(a, "output_padding", w, 0)
    strides, dilations = _spatial(a, "strides", w), _spatial(a, "dilations", w)
    whole = runs[spatial - 1](x, w, None, strides, 0, 0, a.get("group", 1), dilations)
    # What is cut off at the ends is the padding; output_padding adds what no input reaches.
    sides = [(-pads[i], extra[i] - pads[spatial + i]) for i in range(spatial)]
    cut = functional.pad(whole, [n for side in reversed(sides) for n in side])
    return cut if b is None else cut + b.view(-1, *[1] * spatial)


def _spatial(a: Attributes, key: str, w: Tensor, default: int = 1) -> list[int]:
    return list(a.get(key, [default] * (w.ndim - 2)))


def pads_of(
    a: Attributes,
    size: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[int]:
    """Return how much is padded: the begins of all axes, then the ends."""
    kind = a.get("auto_pad", b"NOTSET")
    if kind == b"NOTSET":
        return list(a.get("pads", [0] * 2 * len(kernel)))
    if kind == b"VALID":
        return [0] * 2 * len(kernel)
    begins, ends = [], []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max(0, (math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n)
        small, large = total // 2, total - total // 2
        begins.append(small if kind == b"SAME_UPPER" else large)
        ends.append(large if kind == b"SAME_UPPER" else small)
    return [*begins, *ends]


def _padded(
    a: Attributes,
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    value: float = 0.0,
) -> tuple[Tensor, Any]:
    """Return x with what must be padded by hand, and the padding that is left to the layer."""
    pads = pads_of(a, x.shape[2:], kernel, strides, dilations)
    begins, ends = pads[: len(kernel)], pads[len(kernel) :]
    if begins == ends and value == 0.0:
        return x, begins
    sides = [n for side in zip(reversed(begins), reversed(ends), strict=True) for n in side]
    return functional.pad(x, sides, value=value), [0] * len(kernel)


def _gemm(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    x = x.T if a.get("transA") else x
    w = w.T if a.get("transB") else w
    y = float(a.get("alpha", 1.0)) * (x @ w)
    return y if b is None else y + float(a.get("beta", 1.0)) * b


def _batch_norm(a: Attributes, x: Tensor, *of: Tensor) -> Tensor:
    along = (-1, *[1] * (x.ndim - 2))
    if a.get("training_mode"):
        raise NotImplementedError("training_mode")
    gamma, beta, mean, variance = (part.view(along) for part in of)
    return (x - mean) * (gamma / torch.sqrt(variance + a.get("epsilon", 1e-5))) + beta


# ── Pools ───────────────────────────────────────────────────────────────────────────


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    kernel = a["kernel_shape"]
    strides, dilations = a.get("strides", [1] * len(kernel)), a.get("dilations", [1] * len(kernel))
    padded, _ = _padded(a, x, kernel, strides, dilations, -math.inf)
    run = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(kernel) - 1]
    if len(kernel) == 2:  # with the channels last, PyTorch takes a quarter of the time
        padded = padded.contiguous(memory_format=torch.channels_last)
    y: Tensor = run(padded, kernel, strides, 0, dilations, bool(a.get("ceil_mode", 0)))
    return y.contiguous()[_windows(x, strides, pads_of(a, x.shape[2:], kernel, strides, dilations))]


def _windows(x: Tensor, strides: Sequence[int], pads: Sequence[int]) -> tuple[Any, ...]:
    """Return which windows count: with ceil_mode, none that starts in the padding at the end."""
    begins = pads[: len(strides)]
    axes = zip(x.shape[2:], begins, strides, strict=True)
    return (..., *(slice(math.ceil((n + begin) / s)) for n, begin, s in axes))


def average_windows(a: Attributes, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of each window and how many elements it averages over."""
    kernel = a["kernel_shape"]
    strides = a.get("strides", [1] * len(kernel))
    if any(d != 1 for d in a.get("dilations", ())):
        raise NotImplementedError("dilations")
    pads = pads_of(a, x.shape[2:], kernel, strides, [1] * len(kernel))
    begins, ends = pads[: len(kernel)], pads[len(kernel) :]
    sides = [n for side in zip(reversed(begins), reversed(ends), strict=True) for n in side]
    counted = torch.ones_like(x[:1, :1])
    padded = functional.pad(counted, sides, value=float(a.get("count_include_pad", 0)))

    def summed(values: Tensor) -> Tensor:
        values = values if len(kernel) > 1 else values.unsqueeze(-2)
        run: Any = functional.avg_pool3d if len(kernel) == 3 else functional.avg_pool2d
        wide = (kernel, strides) if len(kernel) > 1 else ([1, *kernel], [1, *strides])
        ceil = bool(a.get("ceil_mode", 0))
        got: Tensor = run(values, *wide, 0, ceil_mode=ceil, divisor_override=1)
        return got if len(kernel) > 1 else got.squeeze(-2)

    windows = _windows(x, strides, pads)
    return summed(functional.pad(x, sides))[windows], summed(padded)[windows]


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    total, count = average_windows(a, x)
    return total / count


def _global(reduce_axes: Callable[..., Tensor], _: Attributes, x: Tensor) -> Tensor:
    return reduce_axes(x, dim=tuple(range(2, x.ndim)), keepdim=True)


def _reduce(run: Callable[..., Tensor], a: Attributes, x: Tensor, *given: Tensor | None) -> Tensor:
    axes = axes_of(a, x, *given)
    return run(x, dim=axes, keepdim=bool(a.get("keepdims", 1))) if axes else x


def axes_of(a: Attributes, x: Tensor, given: Tensor | None = None) -> tuple[int, ...]:
    """Return the axes that a reduction goes over: an attribute once, an input since opset 18."""
    axes = given.tolist() if given is not None else a.get("axes")
    every = () if a.get("noop_with_empty_axes") else range(x.ndim)
    return tuple(axes or every)


# ── Element by element ──────────────────────────────────────────────────────────────


def _clip(
    a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    low = low if low is not None else a.get("min")
    high = high if high is not None else a.get("max")
    if low is not None:
        x = torch.maximum(x, torch.as_tensor(low, dtype=x.dtype))
    if high is not None:
        x = torch.minimum(x, torch.as_tensor(high, dtype=x.dtype))
    return x


def _prelu(_: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


def _hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    alpha, beta = float(a.get("alpha", 0.2)), float(a.get("beta", 0.5))
    return (alpha * x + beta).clamp(0, 1)


def _selu(a: Attributes, x: Tensor) -> Tensor:
    alpha, gamma = a.get("alpha", 1.6732632423543773), a.get("gamma", 1.0507009873554805)
    return functional.elu(x, alpha) * float(gamma)


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))  # torch's own is cut off at 20


def _gelu(a: Attributes, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=a.get("approximate", b"none").decode())


def _softmax(run: Callable[..., Tensor], a: Attributes, x: Tensor) -> Tensor:
    return run(x, dim=a.get("axis", -1))


def _cast(a: Attributes, x: Tensor) -> Tensor:
    whole = {6: torch.int32, 7: torch.int64, 9: torch.bool}
    if a["to"] in whole:
        return x.to(whole[a["to"]])
    if a["to"] not in (1, 10, 11, 16):  # FLOAT, FLOAT16, DOUBLE, BFLOAT16
        raise NotImplementedError(f"to={a['to']}")
    return x if x.is_floating_point() else x.double()


def straight(x: Tensor, rounded: Tensor) -> Tensor:
    """Return what x was rounded to; gradients pass straight through."""
    return x + (rounded - x).detach() if x.requires_grad else rounded


def along(part: Tensor, x: Tensor, axis: int) -> Tensor:
    """Return a scale or zero point, one number or one per slice of an axis, to broadcast with x."""
    if part.numel() == 1:
        return part.reshape(())
    shape = [1] * x.ndim
    shape[axis] = -1
    return part.reshape(shape)


def _quantize(a: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    kind = a["to"]
    if kind not in LIMITS or a.get("block_size"):
        raise NotImplementedError("block_size" if a.get("block_size") else f"type {kind}")
    if kind == FLOAT8 and not (a.get("saturate", 1) and (zero is None or not zero.any())):
        raise NotImplementedError("saturate=0 or a zero point other than 0")
    low, high = LIMITS[kind]
    scale = along(scale, x, a.get("axis", 1))
    zero = torch.zeros((), dtype=x.dtype) if zero is None else along(zero, x, a.get("axis", 1))
    steps = x / scale
    return (straight(steps, nearest(steps, kind)) + zero).clamp(low, high)


def _dequantize(a: Attributes, q: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    if a.get("block_size"):
        raise NotImplementedError("block_size")
    q = q.to(scale.dtype)
    shifted = q if zero is None else q - along(zero.to(scale.dtype), q, a.get("axis", 1))
    return shifted * along(scale, q, a.get("axis", 1))


# ── Moves ───────────────────────────────────────────────────────────────────────────


def _reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    wanted = shape.tolist()
    if not a.get("allowzero"):
        wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    return x.reshape(wanted)


def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _transpose(a: Attributes, x: Tensor) -> Tensor:
    return x.permute(a.get("perm", tuple(reversed(range(x.ndim)))))


def _split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    if sizes is not None or "split" in a:
        parts = sizes.tolist() if sizes is not None else a["split"]
        return torch.split(x, parts, dim=axis)
    each = math.ceil(x.shape[axis] / a["num_outputs"])
    return torch.split(x, each, dim=axis)


def _top_k(a: Attributes, x: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Return the k largest or smallest in order, of equal ones the first; sorted in any case."""
    axis, (count,) = a.get("axis", -1), k.tolist()
    values, indices = x.sort(dim=axis, descending=bool(a.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def _slice(
    _: Attributes,
    x: Tensor,
    first: Tensor,
    last: Tensor,
    along: Tensor | None = None,
    by: Tensor | None = None,
) -> Tensor:
    starts, ends = first.tolist(), last.tolist()
    axes = along.tolist() if along is not None else range(len(starts))
    steps = by.tolist() if by is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        chosen = range(x.shape[axis])[start:end:step]
        x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64))
    return x


def _gather(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    chosen = x.index_select(axis, indices.flatten() % x.shape[axis])
    return chosen.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _gather_nd(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    shared = a.get("batch_dims", 0)
    batch, each = x.shape[:shared], indices.reshape(-1, *indices.shape[shared:])
    rows = torch.arange(len(each)).reshape(-1, *[1] * (each.ndim - 2))
    chosen = x.reshape(len(each), *x.shape[shared:])[(rows, *each.unbind(-1))]
    return chosen.reshape(*batch, *chosen.shape[1:])


def _squeeze(a: Attributes, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = given.tolist() if given is not None else a.get("axes")
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(a: Attributes, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = given.tolist() if given is not None else a["axes"]
    for axis in sorted(n % (x.ndim + len(axes)) for n in axes):
        x = x.unsqueeze(axis)
    return x


def _pad(
    a: Attributes,
    x: Tensor,
    given: Tensor | None = None,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    pads = given.tolist() if given is not None else a["pads"]
    chosen = axes.tolist() if axes is not None else list(range(x.ndim))
    sides = [(0, 0)] * x.ndim
    for i, axis in enumerate(chosen):
        sides[axis] = (pads[i], pads[len(chosen) + i])
    mode = a.get("mode", b"constant").decode()
    if mode == "constant":
        flat = [n for side in reversed(sides) for n in side]
        filled = float(value) if value is not None else a.get("value", 0.0)
        return functional.pad(x, flat, value=filled)
    if any(n for side in sides[:2] for n in side):
        raise NotImplementedError(f"{mode} padding of channels")
    flat = [n for side in reversed(sides[2:]) for n in side]
    modes = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    return functional.pad(x, flat, mode=modes[mode])


def _depth_to_space(a: Attributes, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = a["blocksize"]
    if a.get("mode", b"DCR") == b"CRD":
        return functional.pixel_shuffle(x, b)
    x = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // b**2, h * b, w * b)


def _space_to_depth(a: Attributes, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = a["blocksize"]
    x = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * b**2, h // b, w // b)


def _range(_: Attributes, start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    first, last, by = (float(one) for one in (start, end, step))
    count = max(math.ceil((last - first) / by), 0)
    return start.reshape(()) + step.reshape(()) * torch.arange(count)


def _einsum(a: Attributes, *parts: Tensor) -> Tensor:
    return torch.einsum(a["equation"].decode().replace(" ", ""), *parts)


def _celu(a: Attributes, x: Tensor) -> Tensor:
    return functional.celu(x, a.get("alpha", 1.0))


def _threshold(a: Attributes, x: Tensor) -> Tensor:
    return torch.where(x > a.get("alpha", 1.0), x, torch.zeros_like(x))


def _constant(a: Attributes) -> Tensor:
    for key in ("value_float", "value_floats"):
        if key in a:
            return torch.tensor(a[key], dtype=torch.float64)
    for key in ("value_int", "value_ints"):
        if key in a:
            return torch.tensor(a[key], dtype=torch.int64)
    if "value" not in a:
        raise NotImplementedError(" and ".join(a))
    value: Tensor = a["value"]
    return value


def _filled(a: Attributes, shape: Tensor) -> Tensor:
    value = a["value"] if "value" in a else torch.zeros(1, dtype=torch.float64)
    return value.reshape(()).expand(shape.tolist()).clone()


def _shape(a: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[a.get("start", 0) : a.get("end", x.ndim)], dtype=torch.int64)


def _plain(run: Callable[..., Tensor]) -> Operator:
    """Return an operator with no attributes that matter."""
    return lambda _, *inputs: run(*inputs)


def _all(run: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Return an operator over any number of inputs."""
    return lambda _, *inputs: reduce(run, inputs)


def _divide(x: Tensor, y: Tensor) -> Tensor:
    whole = not (x.is_floating_point() or y.is_floating_point())
    return torch.div(x, y, rounding_mode="trunc" if whole else None)


OPERATORS: dict[str, Operator] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Ceil": _plain(torch.ceil),
    "Celu": _celu,
    "Clip": _clip,
    "Concat": lambda a, *parts: torch.cat(parts, dim=a["axis"]),
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Cos": _plain(torch.cos),
    "DepthToSpace": _depth_to_space,
    "DequantizeLinear": _dequantize,
    "Div": _plain(_divide),
    "Dropout": lambda _, x, *__: x,
    "Einsum": _einsum,
    "Elu": lambda a, x: functional.elu(x, a.get("alpha", 1.0)),
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": lambda _, x, shape: x * torch.ones(shape.tolist(), dtype=x.dtype),
    "Flatten": _flatten,
    "Floor": _plain(torch.floor),
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": partial(_global, torch.mean),
    "GlobalMaxPool": partial(_global, torch.amax),
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "GroupNormalization": normalisation("GroupNormalization"),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda _, x: x * (x / 6 + 0.5).clamp(0, 1),
    "Identity": lambda _, x: x,
    "InstanceNormalization": normalisation("InstanceNormalization"),
    "LRN": lrn,
    "LayerNormalization": normalisation("LayerNormalization"),
    "LeakyRelu": lambda a, x: torch.where(x < 0, a.get("alpha", 0.01) * x, x),
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Log": _plain(torch.log),
    "LogSoftmax": partial(_softmax, torch.log_softmax),
    "MatMul": _plain(torch.matmul),
    "Max": _all(torch.maximum),
    "MaxPool": _max_pool,
    "Mean": lambda _, *terms: sum(terms[1:], terms[0]) / len(terms),
    "Min": _all(torch.minimum),
    "Mish": lambda _, x: x * torch.tanh(_softplus(x)),
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _plain(torch.logical_or),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _plain(torch.pow),
    "QuantizeLinear": _quantize,
    "Range": _range,
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceL1": partial(_reduce, sum_of_magnitudes),
    "ReduceL2": partial(_reduce, root_of_squares),
    "ReduceLogSum": partial(_reduce, log_of_sum),
    "ReduceLogSumExp": partial(_reduce, torch.logsumexp),
    "ReduceMax": partial(_reduce, torch.amax),
    "ReduceMean": partial(_reduce, torch.mean),
    "ReduceMin": partial(_reduce, torch.amin),
    "ReduceProd": partial(_reduce, product),
    "ReduceSum": partial(_reduce, torch.sum),
    "ReduceSumSquare": partial(_reduce, sum_of_squares),
    "Relu": lambda _, x: torch.relu(x),
    "Reshape": _reshape,
    "Resize": resize,
    "Round": _plain(torch.round),
    "Selu": _selu,
    "Shape": _shape,
    "Sigmoid": _plain(torch.sigmoid),
    "Sign": _plain(torch.sign),
    "Sin": _plain(torch.sin),
    "Size": lambda _, x: torch.tensor(x.numel()),
    "Slice": _slice,
    "Softmax": partial(_softmax, torch.softmax),
    "Softplus": _plain(_softplus),
    "Softsign": lambda _, x: x / (1 + x.abs()),
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _plain(torch.sub),
    "Sum": _all(torch.add),
    "Tanh": _plain(torch.tanh),
    "ThresholdedRelu": _threshold,
    "Tile": lambda _, x, counts: x.repeat(counts.tolist()),
    "TopK": _top_k,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _plain(torch.where),
}
