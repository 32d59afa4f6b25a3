"""The layer of torch.nn that computes the very same as an ONNX node with weights.

None where there is none, or where what must be known for it follows from the input.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from exporter.emulation import Step
from exporter.start.between import BETWEEN
from exporter.start.known import Family, Known, Made, Padded, spatial, zero_pad

_CONVS: Family = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED: Family = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}
_BATCHNORMS: Family = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _conv(known: Known, step: Step) -> Made:
    weight = known.constant(step, 1) if known.is_unary(step) else None
    if weight is None or known.rank(step) != weight.ndim or weight.ndim not in _CONVS:
        return None
    kernel = list(weight.shape[2:])
    pads = known.padding(step, kernel)
    if pads is None:
        return None
    begins, ends = pads[: len(kernel)], pads[len(kernel) :]
    groups = step.attributes.get("group", 1)
    layer = _CONVS[weight.ndim](
        *(weight.shape[1] * groups, weight.shape[0], kernel),
        stride=spatial(step, "strides", kernel),
        padding=begins if begins == ends else 0,
        dilation=spatial(step, "dilations", kernel),
        groups=groups,
        bias=False,
        device="meta",
    )
    _give(layer, weight=known.parameter(step, 1), bias=known.parameter(step, 2))
    return layer if begins == ends else Padded(zero_pad(begins, ends), layer)


def _conv_transpose(known: Known, step: Step) -> Made:
    weight = known.constant(step, 1) if known.is_unary(step) else None
    a = step.attributes
    if weight is None or known.rank(step) != weight.ndim or weight.ndim not in _TRANSPOSED:
        return None
    kernel = list(weight.shape[2:])
    pads = list(a.get("pads", [0] * 2 * len(kernel)))
    if a.get("auto_pad", b"NOTSET") != b"NOTSET" or "output_shape" in a:
        return None
    if pads[: len(kernel)] != pads[len(kernel) :]:
        return None
    groups = a.get("group", 1)
    layer = _TRANSPOSED[weight.ndim](
        *(weight.shape[0], weight.shape[1] * groups, kernel),
        stride=spatial(step, "strides", kernel),
        padding=pads[: len(kernel)],
        output_padding=list(a.get("output_padding", [0] * len(kernel))),
        dilation=spatial(step, "dilations", kernel),
        groups=groups,
        bias=False,
        device="meta",
    )
    _give(layer, weight=known.parameter(step, 1), bias=known.parameter(step, 2))
    return layer


def _give(layer: nn.Module, **tensors: Tensor | None) -> None:
    """Let a layer hold these tensors, which others may hold too."""
    for name, value in tensors.items():
        setattr(layer, name, value)


def _linear(known: Known, step: Step) -> Made:
    a = step.attributes
    weight = known.constant(step, 1) if known.is_unary(step) else None
    bias = known.constant(step, 2)
    plain = not a.get("transA") and a.get("alpha", 1.0) == a.get("beta", 1.0) == 1.0
    if weight is None or weight.ndim != 2 or not plain:
        return None
    turned = not a.get("transB")
    outputs, inputs = reversed(weight.shape) if turned else weight.shape
    if bias is not None and bias.shape != (outputs,):
        return None
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    weights = known.parameter(step, 1, turned=turned)
    _give(layer, weight=weights, bias=known.parameter(step, 2))
    return layer


def _batch_norm(known: Known, step: Step) -> Made:
    kind = _BATCHNORMS.get(known.rank(step))
    if kind is None or not known.is_unary(step) or len(step.writes) > 1:
        return None
    mean, variance = known.constant(step, 3), known.constant(step, 4)
    assert mean is not None  # none of the five may be left out
    layer = kind(len(mean), eps=float(step.attributes.get("epsilon", 1e-5)))
    _give(layer, weight=known.parameter(step, 1), bias=known.parameter(step, 2))
    _give(layer, running_mean=mean, running_var=variance)
    return layer


MAKERS: dict[str, Callable[[Known, Step], Made]] = {
    **BETWEEN,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _linear,
    "MatMul": _linear,
}
