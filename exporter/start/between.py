"""What stands between layers: the module or function of torch that computes the same as a node.

None where there is none, or where what must be known for it follows from the input.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn

from exporter.emulation import Step
from exporter.fold import ChannelShift
from exporter.start.known import Call, Family, Known, Made, spatial, zero_pad

_MAXPOOLS: Family = {3: nn.MaxPool1d, 4: nn.MaxPool2d, 5: nn.MaxPool3d}
_AVGPOOLS: Family = {3: nn.AvgPool1d, 4: nn.AvgPool2d, 5: nn.AvgPool3d}
_GLOBAL: dict[str, Family] = {
    "GlobalAveragePool": {
        3: nn.AdaptiveAvgPool1d,
        4: nn.AdaptiveAvgPool2d,
        5: nn.AdaptiveAvgPool3d,
    },
    "GlobalMaxPool": {
        3: nn.AdaptiveMaxPool1d,
        4: nn.AdaptiveMaxPool2d,
        5: nn.AdaptiveMaxPool3d,
    },
}


def _clip(known: Known, step: Step) -> Made:
    if not known.is_unary(step):
        return None
    low, high = known.constant(step, 1), known.constant(step, 2)
    if low is None or (high is None and float(low) != 0):
        return None
    if high is None:
        return nn.ReLU()
    between = -math.inf < float(low) < float(high) < math.inf
    return nn.Hardtanh(float(low), float(high)) if between else None


def _prelu(known: Known, step: Step) -> Made:
    slope = known.constant(step, 1) if known.is_unary(step) else None
    if slope is None or not _is_per_channel(slope, known.rank(step)):
        return None
    layer = nn.PReLU(slope.numel())
    layer.weight = nn.Parameter(slope.flatten(), requires_grad=False)
    return layer


def _is_per_channel(value: Tensor, rank: int) -> bool:
    """Return whether a constant has one value, or one for each of axis 1 of so many axes."""
    shape = [1] * (rank - value.ndim) + list(value.shape)
    return value.numel() == 1 or (len(shape) == rank and shape[1] == value.numel())


def _pool(known: Known, step: Step) -> Made:
    a = step.attributes
    family = _MAXPOOLS if step.op == "MaxPool" else _AVGPOOLS
    kind = family.get(known.rank(step))
    kernel = list(a["kernel_shape"])
    pads = known.padding(step, kernel) if known.is_unary(step) else None
    if kind is None or pads is None or a.get("ceil_mode") or len(step.writes) > 1:
        return None
    begins, dilations = pads[: len(kernel)], spatial(step, "dilations", kernel)
    too_wide = any(2 * pad > size for pad, size in zip(begins, kernel, strict=True))
    if too_wide or begins != pads[len(kernel) :]:
        return None
    if step.op == "MaxPool":
        return kind(kernel, spatial(step, "strides", kernel), begins, dilations)
    if set(dilations) != {1}:
        return None
    padded = {"padding": begins, "count_include_pad": bool(a.get("count_include_pad"))}
    return kind(kernel, spatial(step, "strides", kernel), **padded)


def _global(known: Known, step: Step) -> Made:
    kind = _GLOBAL[step.op].get(known.rank(step))
    return kind(1) if kind else None


def _mean(known: Known, step: Step) -> Made:
    given = known.constant(step, 1) if known.is_unary(step) else None
    axes = step.attributes.get("axes") if given is None else given.tolist()
    if not axes or not known.is_unary(step):
        return None
    keep = bool(step.attributes.get("keepdims", 1))
    return Call(torch.mean, (known.reads(step)[0], [int(axis) for axis in axes]), {"keepdim": keep})


def _sum(known: Known, step: Step) -> Made:
    reads = known.reads(step)
    if len(reads) == len(step.reads) == 2:
        return Call(operator.add, tuple(reads), {})
    if len(reads) != 1 or len(step.reads) != 2 or step.op != "Add":
        return None
    place = 0 if step.reads[0] in known.constants else 1
    value, rank = known.constant(step, place), len(known.sizes.get(step.reads[1 - place], ()))
    if value is None or rank < 2 or value.numel() == 1 or not _is_per_channel(value, rank):
        return None
    return ChannelShift(value.reshape(-1, *[1] * (rank - 2)))


def _concat(known: Known, step: Step) -> Made:
    reads = known.reads(step)
    if len(reads) != len(step.reads):
        return None
    return Call(torch.cat, (reads, int(step.attributes["axis"])), {})


def _reshape(known: Known, step: Step) -> Made:
    """Return a reshape that leaves the axis of samples alone."""
    before, after = (known.sizes.get(name, [])[1:] for name in (step.reads[0], step.writes[0]))
    own, rest = ([size for size in sizes if size is not None] for sizes in (before, after))
    is_told = bool(own and rest) and (len(own), len(rest)) == (len(before), len(after))
    if not known.is_unary(step) or not is_told or math.prod(own) != math.prod(rest):
        return None
    return Call(torch.reshape, (known.reads(step)[0], [-1, *rest]), {})


def _transpose(known: Known, step: Step) -> Made:
    order = step.attributes.get("perm", tuple(reversed(range(known.rank(step)))))
    return Call(torch.permute, (known.reads(step)[0], list(order)), {}) if order else None


def _split(known: Known, step: Step) -> Made:
    axis = int(step.attributes.get("axis", 0))
    parts = [known.sizes.get(name, []) for name in step.writes]
    told = len(parts) > 1 and all(len(part) > abs(axis) for part in parts)
    if not known.is_unary(step) or not told:
        return None
    sizes = [part[axis] for part in parts]
    if None in sizes:
        return None
    return Call(torch.split, (known.reads(step)[0], sizes), {"dim": axis})


def _pad(known: Known, step: Step) -> Made:
    rank = known.rank(step)
    if not known.is_unary(step) or not 3 <= rank <= 5 or len(step.reads) > 3:
        return None
    given, value = known.constant(step, 1), known.constant(step, 2)
    is_constant = step.attributes.get("mode", b"constant") == b"constant"
    if given is None or not is_constant or (value is not None and value.any()):
        return None
    pads = [int(n) for n in given.tolist()]
    begins, ends = pads[:rank], pads[rank:]
    if any((*begins[:2], *ends[:2])) or min(pads) < 0:
        return None
    return zero_pad(begins[2:], ends[2:])


def _depth_to_space(_: Known, step: Step) -> Made:
    crd = step.attributes.get("mode", b"DCR") == b"CRD"
    return nn.PixelShuffle(step.attributes["blocksize"]) if crd else None


BETWEEN: dict[str, Callable[[Known, Step], Made]] = {
    "Add": _sum,
    "AveragePool": _pool,
    "Clip": _clip,
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Dropout": lambda _, step: nn.Identity() if len(step.writes) == 1 else None,
    "Flatten": _reshape,
    "GlobalAveragePool": _global,
    "GlobalMaxPool": _global,
    "Identity": lambda *_: nn.Identity(),
    "LeakyRelu": lambda _, step: nn.LeakyReLU(float(step.attributes.get("alpha", 0.01))),
    "MaxPool": _pool,
    "PRelu": _prelu,
    "Pad": _pad,
    "ReduceMean": _mean,
    "Relu": lambda *_: nn.ReLU(),
    "Reshape": _reshape,
    "Split": _split,
    "Sum": _sum,
    "Transpose": _transpose,
}
