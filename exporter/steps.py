"""Which numbers the 256 steps of INT8 stand for, where 0 is stored as 0 or as something else.

    t = width · (q + zero)        q = clip(rint(t / width) − zero, −128, 127)

    signed      width = amax / 127                     zero = 0
    unsigned    width = amax / 255                     zero = 128
    tensor      width = m (high − low) / 255           zero = rint((low + high) / (2 width) + ½)
    channel     width = m max_c (high_c − low_c) / 255 zero_c likewise, from low_c and high_c

``tensor`` is for what must store 0 exactly, since a convolution pads with it: 0 is taken to be
between low and high. ``channel`` is for what nothing pads. Both fill the steps from end to end,
with nothing to spare for what n samples did not show, so that they are given m = 1 + 6 / n; and
they fall back to signed where that would not make the steps narrower by a tenth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from exporter.records import Array

if TYPE_CHECKING:
    from torch import Tensor

Kind: TypeAlias = Literal["signed", "unsigned", "tensor", "channel"]

LOW, HIGH, UNSIGNED = -128, 127, 255
OF_ZEROS = 2.0**-8  # a scale for weights that are all 0, where no other is there to go by
_WORTH = 0.9  # of the width of signed steps
_MARGIN = 6.0  # over the number of samples


class Steps(NamedTuple):
    """``zero`` is a whole number for the tensor, or one per channel; so may ``width`` be."""

    width: float | Tensor
    zero: int | Tensor = 0


class Held(NamedTuple):
    """The same for what is stored: one width, and whole numbers of shape () or (C,)."""

    width: float
    zero: Array


def steps_for(kind: Kind, low: Array, high: Array, samples: int, headroom: float = 1.0) -> Held:
    """Return the steps that hold what lies between ``low`` and ``high``, (C,) of each channel.

    That is what so many samples reached. ``headroom`` makes the steps wider by that factor.
    """
    import numpy as np

    amax = float(reach("signed", low, high).max(initial=0.0))
    signed = Held(headroom * amax / HIGH, np.array(0))
    if kind == "signed" or not amax:
        return signed
    if kind == "unsigned":
        return Held(headroom * float(high.max(initial=0.0)) / UNSIGNED, np.array(-LOW))
    least, most = low.astype(np.float64), high.astype(np.float64)
    if kind == "tensor":
        least, most = np.minimum(least.min(), 0.0), np.maximum(most.max(), 0.0)
    width = headroom * (1 + _MARGIN / samples) * float((most - least).max()) / UNSIGNED
    if not 0 < width < _WORTH * signed.width:
        return signed
    return Held(width, np.rint((least + most) / (2 * width) + 0.5).astype(np.int64))


def levels(kind: Kind) -> int:
    """Return how many steps lie above 0 where magnitudes are cut off at a threshold."""
    return UNSIGNED if kind == "unsigned" else HIGH


def reach(kind: Kind, low: Array, high: Array) -> Array:
    """Return how far each channel goes from the middle of its steps, (C,)."""
    import numpy as np

    found: Array = (high - low) / 2
    if kind != "channel":
        found = np.maximum(np.maximum(high, -low), 0.0)
    return found


def across(values: Array, axes: int) -> Array:
    """Return one number, or one per channel so that it meets a tensor of so many axes."""
    return values.reshape(-1, *[1] * (axes - 2)) if values.ndim else values
