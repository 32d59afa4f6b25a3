"""Which numbers a quantised tensor can hold, in units of its scale.

    integers    every whole number from the type's lowest to its highest
    FP8 E4M3    ±m · 2^(e − 3), m in 8..15 and e in −6..8, but for 480; below 2⁻⁶ steps of 2⁻⁹

E4M3 is "FN": it has no infinity, 448 is its largest number, and what lies beyond is held as 448
(P. Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433; ONNX: ``saturate``).
Around a number p its steps are 2^(⌊log₂ |p|⌋ − 3) wide, and nowhere narrower than 2⁻⁹.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = 17  # onnx.TensorProto.FLOAT8E4M3FN
LIMITS = {
    2: (0, 255),
    3: (-128, 127),
    4: (0, 65535),
    5: (-32768, 32767),
    6: (-(2**31), 2**31 - 1),
    FLOAT8: (-448, 448),
}
_LEAST = -5  # frexp's exponent of FP8's smallest normal number, 2⁻⁶ = ½ · 2⁻⁵


def spacing(position: Tensor, kind: int) -> Tensor:
    """Return how far apart the numbers around each position are, in a type."""
    if kind != FLOAT8:
        return torch.ones_like(position)
    exponent = torch.frexp(position.detach()).exponent.clamp(min=_LEAST)
    return torch.exp2((exponent - 4).to(position.dtype))


def nearest(position: Tensor, kind: int) -> Tensor:
    """Return the nearest number of a type, as if it had no limits; of two, the even one."""
    if kind != FLOAT8:
        return position.round()
    steps = spacing(position, kind)
    return (position / steps).round() * steps
