"""What so many times show: where a percentile lies, where a ratio does, and what lies far outside.

Times that follow each other resemble each other, so n of them say as much as m independent ones:

    m = n (1 − ρ) / (1 + ρ)        ρ the lag-1 correlation of their ranks, 0 or more

(G. Bayley, J. Hammersley, J. R. Stat. Soc. Suppl. 8, 1946, for a series of one such ρ), where ρ is
raised by (1 + 4ρ) / n, which is what a short series shows too little of it (F. Marriott, J. Pope,
Biometrika 41, 1954).

A percentile p is a sample, by its rank. Were samples drawn anew with replacement without end, the
share of draws whose percentile lies below the sample of rank j is a beta distribution's (A. Hutson,
M. Ernst, J. R. Stat. Soc. B 62, 2000), so the ends of that bootstrap's 95 % interval are the
samples of rank

    ⌈n B⁻¹(0.025; pm, (1 − p)m + 1)⌉        ⌈n B⁻¹(0.975; pm + 1, (1 − p)m)⌉

with the quantile B⁻¹ of the beta distribution. The upper end is that of the lower one in reverse
order; the bootstrap's own is a rank lower, and holds a p90 of 64 samples in 92 of 100 runs alone.

A ratio of two medians of times taken in turn: the percentiles of that ratio over m pairs drawn anew
with replacement (B. Efron, Annals of Statistics 7, 1979; as many as are independent: P. Bickel,
F. Götze, W. van Zwet, Statistica Sinica 7, 1997), two-sided at 95 %, with the ρ of the pairs'
ratios. What slows both of a pair alike is in neither.

Where a file was loaded several times, and the loads took turns, loads differ for good, by where
their memory lies, and the ratio must hold for others than those that were timed: the n-th load of
one was timed in the rounds of the n-th of the other, and d is the median of log(ours / theirs) over
those rounds. The K values of d are a sample, whose mean lies in

    d̄ ± t(0.975; K − 1) s / √K        (W. S. Gosset, Biometrika 6, 1908)

and the interval that is given holds both this one and the bootstrap's.

Far outside: below Q1 − 1.5 (Q3 − Q1) or above Q3 + 1.5 (Q3 − Q1), and far outside that, with 3
(J. Tukey, Exploratory Data Analysis, 1977). They are counted, and stay in every figure.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

FEWEST_PAIRS = 20  # of times, from which an interval holds what it says
# Samples that support a percentile: so many that with one beyond the shown one, 99 % confidence is
# left in it (MLPerf Inference, early stopping).
SUPPORT = {50.0: 11, 90.0: 64, 99.0: 662, 99.9: 6636}
_ENDS = (0.025, 0.975)
_DRAWS = 2000
_AT_ONCE = 2_000_000  # drawn numbers in memory
_MOST_ALIKE = 0.95  # of ρ: beyond it a run is one sample, whatever its length


class Outliers(NamedTuple):
    """How many samples lie far outside, by Tukey's fences, and how many of those beyond the far."""

    low: int
    high: int
    far: int


def samples_missing(percent: float, count: int) -> int:
    """Return how many samples more it takes to support a percentile."""
    return max(0, SUPPORT[percent] - count)


@lru_cache(maxsize=1024)
def percentile_interval(times: tuple[float, ...], percent: float) -> tuple[float, float]:
    """Return from where to where a percentile lies.

    Needs `FEWEST_PAIRS` samples or more, or raises `ValueError`.
    """
    import numpy as np
    from scipy.special import betaincinv

    if len(times) < FEWEST_PAIRS:
        raise ValueError(f"need {FEWEST_PAIRS} samples or more, found {len(times)}")
    ordered = np.sort(np.asarray(times, np.float64))
    count, share = len(times), percent / 100
    below = share * independent(times)
    above = independent(times) - below
    ends = (betaincinv(below, above + 1, _ENDS[0]), betaincinv(below + 1, above, _ENDS[1]))
    ranks = [min(count, max(1, math.ceil(count * end - 1e-9))) for end in ends]
    return float(ordered[ranks[0] - 1]), float(ordered[ranks[1] - 1])


@lru_cache(maxsize=1024)
def ratio_interval(
    ours: tuple[float, ...], theirs: tuple[float, ...], seed: int = 0
) -> tuple[float, float]:
    """Return from where to where ours / theirs of the medians lies, the n-th of both being a pair.

    Needs `FEWEST_PAIRS` or more, or raises `ValueError`.
    """
    import numpy as np

    if len(ours) != len(theirs) or len(ours) < FEWEST_PAIRS:
        raise ValueError(
            f"need {FEWEST_PAIRS} pairs or more, found {len(ours)} and {len(theirs)} times"
        )
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    size = max(2, round(independent(tuple(a / b))))
    draws = np.random.default_rng(seed)
    ratios, left = [], _DRAWS
    while left:
        rows = min(left, max(1, _AT_ONCE // size))
        drawn = draws.integers(len(a), size=(rows, size))
        ratios.append(_medians(a[drawn]) / _medians(b[drawn]))
        left -= rows
    low, high = np.percentile(np.concatenate(ratios), [100 * end for end in _ENDS])
    return float(low), float(high)


def between_loads(
    ours: tuple[float, ...], theirs: tuple[float, ...], loads: int
) -> tuple[float, float]:
    """Return from where to where ours / theirs lies for other loads; the n-th is of load n % loads.

    Needs two loads or more, each timed, or raises `ValueError`.
    """
    import numpy as np
    from scipy.special import stdtrit

    if not 2 <= loads <= len(ours) == len(theirs):
        raise ValueError(f"need two loads or more that were timed, found {loads}")
    logs = np.log(np.asarray(ours) / np.asarray(theirs))
    found = np.array([np.median(logs[load::loads]) for load in range(loads)])
    half = stdtrit(loads - 1, _ENDS[1]) * found.std(ddof=1) / math.sqrt(loads)
    return float(np.exp(found.mean() - half)), float(np.exp(found.mean() + half))


def independent(times: tuple[float, ...]) -> float:
    """Return how many independent samples say as much as these."""
    import numpy as np

    count = len(times)
    _, places, repeats = np.unique(np.asarray(times), return_inverse=True, return_counts=True)
    last = np.cumsum(repeats)
    ranks = (last - (repeats - 1) / 2)[places]  # equal times share their mean rank
    ranks = ranks - ranks.mean()
    spread = float(ranks @ ranks)
    if not spread:
        return float(count)
    alike = float(ranks[1:] @ ranks[:-1]) / spread
    alike = min(_MOST_ALIKE, max(0.0, alike + (1 + 4 * alike) / count))
    return count * (1 - alike) / (1 + alike)


def outliers(times: tuple[float, ...]) -> Outliers:
    """Return how many of the times lie far outside."""
    import numpy as np

    found = np.asarray(times, np.float64)
    low, high = np.percentile(found, [25, 75])
    near, far = 1.5 * (high - low), 3 * (high - low)
    return Outliers(
        low=int((found < low - near).sum()),
        high=int((found > high + near).sum()),
        far=int(((found < low - far) | (found > high + far)).sum()),
    )


def _medians(drawn: Any) -> Any:
    """Return the lower median of each row."""
    import numpy as np

    middle = (drawn.shape[1] + 1) // 2 - 1
    return np.partition(drawn, middle, axis=1)[:, middle]
