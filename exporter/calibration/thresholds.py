"""Where to clip, from counts of magnitudes: the least squared error, and the least divergence.

    squared error   E(T) = N(0 < |x| ≤ T) · Δ²/12  +  Σ over |x| > T of (|x| − T)²,   Δ = T / levels

is what uniform rounding and clipping cost (W. R. Bennett, "Spectra of quantized signals", 1948);
zeros cost nothing. Between two magnitudes that occur E is a parabola, so its least value is found,
not searched: T = Σ|x| / (N(|x| > T) + N(0 < |x| ≤ T) / (12 levels²)), sums over |x| > T, in the
interval where that T lies.

    divergence      KL(P ‖ Q) = Σ P_i ln(P_i / Q_i)

is S. Migacz's method ("8-bit inference with TensorRT", GTC 2017). P are the magnitudes in linear
bins up to T, what lies above counted into the last; Q are the same without what lies above, each of
the quantiser's levels spread evenly over those of its bins that are occupied. Here zeros are left
out, since every quantiser represents them (after a ReLU they would drown the rest); a level has the
bins that round to it, half as many for zero and for T; and Q gets a share of the uniform
distribution, so that a T below outliers whose own bin is empty is dear but not infinitely so.
"""

from __future__ import annotations

from exporter.records import Array

LINEAR_BINS = 2048
SMOOTHING = 1e-4  # of the uniform distribution in Q
_STEP = 1 / 64  # candidates lie this far apart, relatively; the minimum is flat


def least_squared_error(values: Array, counts: Array, levels: int) -> float:
    """Return the T of least E(T); ``values`` are ascending and above 0, float64."""
    import numpy as np

    weighted = counts * values
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = _after(weighted)
    squares = _after(weighted * values)
    rounding = 1 / (12 * levels**2)
    free = sums / (above + below * rounding)
    best = np.clip(free, values, np.append(values[1:], values[-1]))
    errors = below * rounding * best**2 + squares - 2 * best * sums + above * best**2
    return float(best[int(np.argmin(errors))])


def _after(terms: Array) -> Array:
    """Return the sum of all terms that follow each."""
    import numpy as np

    return np.append(np.cumsum(terms[::-1])[-2::-1], 0.0)


def least_divergence(counts: Array, levels: int) -> int:
    """Return how many of the linear bins, from 0 up, lie within the T of least divergence."""
    import numpy as np

    least, best = np.inf, len(counts)
    for bins in _candidates(levels + 1, len(counts)):
        if (found := divergence(counts, bins, levels)) < least:
            least, best = found, bins
    return best


def _candidates(first: int, last: int) -> list[int]:
    found = [min(first, last)]
    while found[-1] < last:
        found.append(min(last, found[-1] + max(1, int(found[-1] * _STEP))))
    return found


def divergence(counts: Array, bins: int, levels: int) -> float:
    """Return KL(P ‖ Q) of clipping at the upper edge of the first ``bins`` bins."""
    import numpy as np

    kept = counts[:bins]
    if not kept.any():
        return float("inf")
    level = np.floor((np.arange(bins) + 0.5) * levels / bins + 0.5).astype(np.intp)
    totals = np.bincount(level, kept, levels + 1)
    occupied = np.bincount(level, kept > 0, levels + 1)
    spread = np.where(kept > 0, totals[level] / np.maximum(occupied[level], 1), 0.0)
    reference = kept.astype(np.float64)
    reference[-1] += counts[bins:].sum()
    p = reference / reference.sum()
    q = (1 - SMOOTHING) * spread / spread.sum() + SMOOTHING / bins
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / q[seen])).sum())
