"""What is kept of each tensor: maxima, counts and exact sums, so that no order can matter.

Magnitudes are counted in bins that are fixed beforehand: the upper 16 bits of |x| as float32, which
is a logarithmic scale with 256 steps an octave. Memory is half a megabyte per tensor, however many
samples there are, and a percentile is read off to within 0.4 %, from above.

A channel's sum of squares is one float64 a sample, which depends on that sample alone; over the
samples they are added without rounding (U. Kulisch's long accumulator, in digits of 16 bits), and
their mean is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import NoReturn, Self

from exporter.calibration.thresholds import LINEAR_BINS, least_divergence, least_squared_error
from exporter.contracts import TensorStatistics
from exporter.errors import GraphError
from exporter.records import Array, rank

FOLDS = 4  # that samples are dealt into by their digests, so that one can be judged by the rest
SHOWN = 99.999  # the percentile whose convergence is kept
_SHIFT = 15  # of the 31 bits below the sign, 16 are left: 8 of exponent, 8 of mantissa
_BINS = 1 << 16
_FINITE = 0x7F80 << 1  # bins; those from here on would hold infinity and NaN
_DIGITS = 42  # of 16 bits, from 2⁻³⁵² on: squares of float32, the smallest and sums of the largest
_LOWEST = -352
_TOGETHER = 32  # samples, since one by one costs more
_AT_ONCE = 1 << 15  # values, since to count a few costs as much as to go through all bins
_CARRY_AFTER = 1 << 20  # additions, below 2⁴² each


def _nothing() -> Array:
    import numpy as np

    return np.zeros((FOLDS, 0), dtype=np.float32)


@dataclass(slots=True)
class Range:
    """The smallest and largest values of one tensor.

    ``fold_low`` and ``fold_high`` (`FOLDS`, C) float32 have each channel's, fold by fold, and are
    infinite in a fold of no sample; channels lie along axis 1, and a tensor of one axis is one.
    ``finite`` says whether every value seen was.
    """

    fold_low: Array = field(default_factory=_nothing)
    fold_high: Array = field(default_factory=_nothing)
    samples: int = 0
    finite: bool = True

    def add(self, values: Array, fold: int = 0) -> None:
        """Look at one sample's values, float32, of any shape. NaN and infinity are kept."""
        self._add_rows(_rows(values), fold)

    def _add_rows(self, rows: Array, fold: int) -> None:
        import numpy as np

        self.samples += 1
        if not rows.size:
            return
        if not self.fold_low.size:
            self.fold_low = np.full((FOLDS, len(rows)), np.inf, dtype=np.float32)
            self.fold_high = -self.fold_low
        low, high = rows.min(axis=1), rows.max(axis=1)
        self.finite &= bool(np.isfinite(low).all() and np.isfinite(high).all())
        np.minimum(self.fold_low[fold], low, out=self.fold_low[fold])
        np.maximum(self.fold_high[fold], high, out=self.fold_high[fold])

    @property
    def amax(self) -> float:
        """Return the largest magnitude seen, 0 where there was no value."""
        return float(self.channel_amax.max(initial=0.0))

    @property
    def channel_low(self) -> Array:
        smallest: Array = self.fold_low.min(axis=0)
        return smallest

    @property
    def channel_high(self) -> Array:
        largest: Array = self.fold_high.max(axis=0)
        return largest

    @property
    def channel_amax(self) -> Array:
        import numpy as np

        largest: Array = np.maximum(self.channel_high, -self.channel_low)
        return np.maximum(largest, np.float32(0)) + np.float32(0)  # which is not −0

    @property
    def dead_channels(self) -> tuple[int, ...]:
        import numpy as np

        return tuple(np.flatnonzero(self.channel_amax == 0).tolist())

    def divided(self, whole: TensorStatistics, divisor: Array | float) -> Self:
        """Return this with the range of another tensor, divided by (C,) numbers."""
        low, high = (side / divisor for side in (whole.fold_low, whole.fold_high))
        return replace(
            self,
            fold_low=low.astype("float32"),
            fold_high=high.astype("float32"),
            samples=whole.samples,
        )

    @property
    def channel_power(self) -> Array:
        self._uncounted()

    def percentile(self, percent: float) -> float:
        self._uncounted()

    def mse(self, levels: int = 127) -> float:
        self._uncounted()

    def entropy(self, levels: int = 127) -> float:
        self._uncounted()

    def _uncounted(self) -> NoReturn:
        raise GraphError(
            "a tensor that no convolution, product, sum or average reads has a range, and no "
            "counts of its values"
        )


def _rows(values: Array) -> Array:
    """Return a row per channel, float32."""
    import numpy as np

    rows = np.asarray(values, dtype=np.float32)
    rows = rows.swapaxes(0, 1) if rows.ndim > 1 else rows.reshape(1, -1)
    return np.ascontiguousarray(rows.reshape(len(rows), -1 if rows.size else 0))


class Sums:
    """A sum per channel of float64 numbers of 0 or more, without rounding."""

    def __init__(self, channels: int) -> None:
        import numpy as np

        self._digits = np.zeros((channels, _DIGITS), dtype=np.int64)
        self._rows = np.arange(channels)
        self._since = 0
        self._waiting: list[Array] = []

    def add(self, values: Array) -> None:
        """Add one number to each channel's sum."""
        self._waiting.append(values)
        if len(self._waiting) == _TOGETHER:
            self._add_waiting()

    def _add_waiting(self) -> None:
        import numpy as np

        if not self._waiting:
            return
        fractions, exponents = np.frexp(np.stack(self._waiting))
        whole = np.ldexp(fractions, 53).astype(np.int64)
        for part, place in (
            (whole >> 27, exponents - 26 - _LOWEST),
            (whole & ((1 << 27) - 1), exponents - 53 - _LOWEST),
        ):
            np.add.at(self._digits, (self._rows, place >> 4), part << (place & 15))
        self._since += len(self._waiting)
        self._waiting.clear()
        if self._since >= _CARRY_AFTER:
            self._carry()

    def _carry(self) -> None:
        for digit in range(_DIGITS - 1):
            self._digits[:, digit + 1] += self._digits[:, digit] >> 16
            self._digits[:, digit] &= (1 << 16) - 1
        self._since = 1

    def over(self, count: int) -> Array:
        """Return each sum over ``count``, rounded once."""
        import numpy as np

        self._add_waiting()
        self._carry()
        wholes = [int.from_bytes(row, "little") for row in self._digits.astype("<u2")]
        return np.array([whole / (count << -_LOWEST) for whole in wholes], dtype=np.float64)


def _no_counts() -> Array:
    import numpy as np

    return np.zeros(_BINS, dtype=np.int64)


def _none_waiting() -> Array:
    import numpy as np

    return np.empty(_AT_ONCE, dtype=np.uint16)


@dataclass(slots=True)
class Magnitudes(Range):
    """How often each magnitude occurred in one tensor, and each channel's mean square.

    ``history`` has the largest magnitude and the percentile `SHOWN` at some numbers of samples, in
    the order that they came in.
    """

    history: list[tuple[int, float, float]] = field(default_factory=list)
    _counts: Array = field(default_factory=_no_counts)
    _waiting: Array = field(default_factory=_none_waiting)  # bins of values to be counted
    _waits: int = 0
    _squares: Sums | None = None
    _elements: int = 0  # of each channel
    _power: Array | None = None

    def add(self, values: Array, fold: int = 0) -> None:
        """Count one sample's values, float32; once a value was not finite, no more is counted."""
        import numpy as np

        rows = _rows(values)
        self._add_rows(rows, fold)
        if not (rows.size and self.finite):
            return
        self._count((rows.ravel().view(np.uint32) << np.uint32(1)) >> np.uint32(_SHIFT + 1))
        self._squares = self._squares or Sums(len(rows))
        self._squares.add(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
        self._elements += rows.shape[1]

    def _count(self, bins: Array) -> None:
        """Count bins, those of small samples when there are enough of them."""
        if self._waits + bins.size > _AT_ONCE:
            self._count_waiting()
        if bins.size > _AT_ONCE:
            self._count_now(bins)
        else:
            self._waiting[self._waits : self._waits + bins.size] = bins
            self._waits += bins.size

    def _count_waiting(self) -> None:
        self._count_now(self._waiting[: self._waits])
        self._waits = 0

    def _count_now(self, bins: Array) -> None:
        import numpy as np

        found = np.bincount(bins)
        self._counts[: len(found)] += found

    @property
    def counts(self) -> Array:
        """Return how many values fell into each bin, int64."""
        self._count_waiting()
        return self._counts

    def divided(self, whole: TensorStatistics, divisor: Array | float) -> Self:
        """Return these counts with the ranges and powers of another tensor, divided likewise."""
        power: Array = whole.channel_power / divisor**2
        found = Range.divided(self, whole, divisor)
        return replace(found, _counts=self.counts, _waits=0, _power=power)

    def mark(self) -> None:
        """Add to the history where the scales are now."""
        self.history.append((self.samples, self.amax, self.percentile(SHOWN)))

    @property
    def channel_power(self) -> Array:
        import numpy as np

        if self._power is not None:
            return self._power
        return np.zeros(0) if self._squares is None else self._squares.over(self._elements)

    def percentile(self, percent: float) -> float:
        """Return a magnitude that at least ``percent`` % of the values do not exceed.

        It is the upper edge of the bin that holds the smallest such one, or the maximum.
        """
        import numpy as np

        wanted = rank(percent, int(self.counts.sum()))
        index = int(np.searchsorted(np.cumsum(self.counts), wanted))
        return min(float(_edges()[index + 1]), self.amax)

    def mse(self, levels: int = 127) -> float:
        import numpy as np

        edges = _edges()
        used = np.flatnonzero(self.counts[1:]) + 1  # the first bin holds zeros
        if not len(used):
            return self.amax
        middles = np.minimum((edges[used] + edges[used + 1]) / 2, self.amax)
        return least_squared_error(middles, self.counts[used], levels)

    def entropy(self, levels: int = 127) -> float:
        import numpy as np

        edges = np.minimum(_edges(), self.amax)
        below = np.concatenate(([0], np.cumsum(self.counts[1:])))  # the first bin holds zeros
        if not below[-1]:
            return self.amax
        linear = np.linspace(0.0, self.amax, LINEAR_BINS + 1)
        within = np.interp(linear, edges[1:], below)
        return float(linear[least_divergence(np.diff(within), levels)])


@cache
def _edges() -> Array:
    """Return the lower edge of each bin, and the upper one of the last, float64."""
    import numpy as np

    bits = np.minimum(np.arange(_BINS + 1, dtype=np.uint32), _FINITE) << np.uint32(_SHIFT)
    edges: Array = bits.view(np.float32).astype(np.float64)
    edges.setflags(write=False)
    return edges
