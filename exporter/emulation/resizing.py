"""Resize, along one axis after another: https://onnx.ai/onnx/operators/onnx__Resize.html.

Where PyTorch has the same it computes it. All else is a sum of few taps,

    y[i] = Σₖ w[i, k] · x[n(i, k)]        1 for nearest, 2 for linear, 4 for cubic

with n held inside of the axis, at the place in x that ``coordinate_transformation_mode`` gives i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

Attributes: TypeAlias = Mapping[str, Any]

_KINDS = {3: "linear", 4: "bilinear", 5: "trilinear"}
_ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda x: (x - 0.5).ceil(),
    "round_prefer_ceil": lambda x: (x + 0.5).floor(),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def resize(
    a: Attributes,
    x: Tensor,
    _: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """Return x in another size. Raises `NotImplementedError` for what is not known exactly."""
    mode = a.get("mode", b"nearest").decode()
    where = a.get("coordinate_transformation_mode", b"half_pixel").decode()
    others = [key for key in ("antialias", "axes") if a.get(key)]
    if a.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        others.append("keep_aspect_ratio_policy")
    if others:
        raise NotImplementedError(", ".join(others))
    if sizes is not None and sizes.numel():
        to, by = sizes.tolist(), [n / m for n, m in zip(sizes.tolist(), x.shape, strict=True)]
    else:
        assert scales is not None
        by = scales.tolist()
        to = [int(n * scale) for n, scale in zip(x.shape, by, strict=True)]
    if to[:2] != list(x.shape[:2]):
        raise NotImplementedError("a change of batch or channels")
    nearest = a.get("nearest_mode", b"round_prefer_floor").decode()
    if (mode, where, nearest) == ("nearest", "asymmetric", "floor"):
        return functional.interpolate(x, mode="nearest", **_as_said(sizes, to, by))
    if mode == "linear" and where in ("half_pixel", "align_corners") and x.ndim in _KINDS:
        corners = where == "align_corners"
        how = _as_said(sizes, to, by)
        return functional.interpolate(x, mode=_KINDS[x.ndim], align_corners=corners, **how)
    for axis in range(2, x.ndim):
        if to[axis] != x.shape[axis] or by[axis] != 1:
            place = _places(where, x.shape[axis], to[axis], by[axis])
            x = _along(x, axis, _taps(a, mode, nearest, place, x.shape[axis]))
    return x


def _as_said(sizes: Tensor | None, to: Sequence[int], by: Sequence[float]) -> dict[str, Any]:
    return {"size": to[2:]} if sizes is not None and sizes.numel() else {"scale_factor": by[2:]}


def _places(where: str, count: int, to: int, by: float) -> Tensor:
    """Return where in an axis of ``count`` each of its ``to`` new places lies."""
    i = torch.arange(to, dtype=torch.float64)
    if where == "asymmetric":
        return i / by
    if where == "align_corners":
        return i * ((count - 1) / (to - 1)) if to > 1 else i
    if where == "pytorch_half_pixel" and to <= 1:
        return torch.zeros_like(i)
    if where in ("half_pixel", "pytorch_half_pixel"):
        return (i + 0.5) / by - 0.5
    if where == "half_pixel_symmetric":
        return count / 2 * (1 - to / (by * count)) + (i + 0.5) / by - 0.5
    raise NotImplementedError(where)


def _taps(
    a: Attributes, mode: str, nearest: str, place: Tensor, count: int
) -> list[tuple[Tensor, Tensor]]:
    """Return the numbers n and weights w of each tap, (to,) both."""
    if mode == "nearest" and nearest in _ROUNDED:
        taps = [(_ROUNDED[nearest](place), torch.ones_like(place))]
    elif mode == "linear":
        low = place.floor()
        taps = [(low, 1 - (place - low)), (low + 1, place - low)]
    elif mode == "cubic":
        low, sharp = place.floor(), float(a.get("cubic_coeff_a", -0.75))
        taps = [(low + k, _cubic((place - low - k).abs(), sharp)) for k in (-1, 0, 1, 2)]
    else:
        raise NotImplementedError(f"mode {mode} and {nearest}")
    if a.get("exclude_outside"):
        taps = [(n, w * ((n >= 0) & (n < count))) for n, w in taps]
        total = sum((w for _, w in taps), torch.zeros_like(place))
        taps = [(n, w / total) for n, w in taps]
    return [(n.clamp(0, count - 1).long(), w) for n, w in taps]


def _cubic(away: Tensor, a: float) -> Tensor:
    """Return the weight at a distance of 0 to 2 (R. Keys, IEEE Trans. ASSP 29 (1981))."""
    near = ((a + 2) * away - (a + 3)) * away * away + 1
    far = ((a * away - 5 * a) * away + 8 * a) * away - 4 * a
    return torch.where(away <= 1, near, torch.where(away < 2, far, 0.0))


def _along(x: Tensor, axis: int, taps: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    shape = [-1 if other == axis else 1 for other in range(x.ndim)]
    parts = [x.index_select(axis, n) * w.to(x.dtype).reshape(shape) for n, w in taps]
    return sum(parts[1:], parts[0])
