"""What so many samples prove: bounds, each right with at least 95 % confidence on its own.

A share of which k of n samples were seen (C. Clopper, E. Pearson, Biometrika 26, 1934), with
B⁻¹(p; a, b) the quantile of the beta distribution:

    lower = B⁻¹(0.05; k, n − k + 1)        upper = B⁻¹(0.95; k + 1, n − k)

A drop Δ = p_lost − p_gained of which b samples were lost and c gained of n. Outcomes are ordered by
their score bound (T. Tango, Statistics in Medicine 17, 1998, 891–908), the Δ where T = −1.645:

    T(b, c; Δ) = (b − c − nΔ) / √(n (2q + Δ(1 − Δ)))
    q = (√(B² − 8nC) − B) / 4n,  B = (2n − b + c)Δ − b − c,  C = −c Δ(1 − Δ)

which alone is right too seldom where few samples differ, as good networks have it: of 360 samples,
with 0.2 % lost and 0.83 % gained, in 90.7 % of all experiments. So the bound is the exact one of
that order (R. Buehler, J. Am. Stat. Assoc. 52, 1957; for pairs: C. Lloyd, M. Moldovan, Statistics
in Medicine 26, 2007, 3369–3384):

    upper = max Δ with P(an outcome that ranks no worse than (b, c); Δ, p_gained) > 0.05 − γ

over every p_gained in its own interval of confidence 1 − γ, γ = 10⁻⁶ (R. Berger, D. Boos, J. Am.
Stat. Assoc. 89, 1994). The lower bound is the upper one of the gain, negated.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

DOUBT = 0.05  # the chance that a bound may be wrong
_Z = 1.6448536269514722  # Φ⁻¹(1 − DOUBT)
_WINDOW = 10.0  # standard deviations beyond which a binomial's outcomes weigh nothing
_NEAR = 1e-5  # of one sample: differences between drops below it do not matter
_FAR = 1e-6  # of DOUBT: for rates of gain that what was seen makes implausible
_PASSES, _COARSE, _FINE = 3, 64, 24  # looks for the worst rate: points in the first, in the others


class Shown(NamedTuple):
    """Whether a gate is met, None where the samples show neither, and what they do show."""

    met: bool | None
    said: str


def judge_agreement(agreeing: int, undecided: int, samples: int, gate: float, on: str) -> Shown:
    """Judge a share that must be ``gate`` or more; ``on`` says which samples, in words."""
    least, _ = share_bounds(agreeing, samples)
    _, most = share_bounds(agreeing + undecided, samples)
    seen = f"{agreeing:,} of {samples:,} agree{_undecided(undecided)} {on}"
    if least >= gate:
        return Shown(met=True, said=seen)
    if most < gate:
        return Shown(met=False, said=f"agreement at most {apart(most, '<', gate)}: {seen}")
    need, wanted = samples_for_share(agreeing, samples, gate), f"{100 * gate:.10g}%"
    if need is None:
        more = f"at that rate no number of samples shows {wanted}"
    elif agreeing == samples:
        more = f"{wanted} would need {need:,} samples without a disagreement"
    else:
        more = f"at that rate {wanted} would need about {need:,} samples"
    return Shown(met=None, said=f"{seen}, which proves {at_least(least)}; {more}")


def judge_drop(lost: int, gained: int, samples: int, gate: float, on: str) -> Shown:
    """Judge a drop that must be ``gate`` or less; ``on`` says which samples, in words."""
    least, most = drop_bounds(lost, gained, samples)
    seen = f"{lost:,} lost and {gained:,} gained of {samples:,} {on}"
    if most <= gate:
        return Shown(met=True, said=seen)
    if least > gate:
        return Shown(met=False, said=f"accuracy_drop at least {apart(least, '>', gate)}: {seen}")
    need, wanted = samples_for_drop(lost, gained, samples, gate), f"{100 * gate:.10g}%"
    if need is None:
        more = f"at that rate no number of samples shows {wanted}"
    elif not (lost or gained):
        more = f"{wanted} would need {need:,} samples without one lost or gained"
    else:
        more = f"at that rate {wanted} would need about {need:,} samples"
    return Shown(met=None, said=f"{seen}, which proves a drop of {at_most(most)} at most; {more}")


def _undecided(count: int) -> str:
    return f" and {count:,} are undecided" if count else ""


def at_least(share: float) -> str:
    """Return a lower bound in per cent, rounded so that it holds as it is shown."""
    return f"{math.floor(share * 1e4 + 1e-9) / 1e4:.2%}"


def at_most(share: float) -> str:
    """Return an upper bound in per cent, rounded so that it holds as it is shown."""
    return f"{math.ceil(share * 1e4 - 1e-9) / 1e4:.2%}"


def apart(figure: float, sign: str, bound: float) -> str:
    """Return ``figure sign bound`` with the digits it takes to tell the two apart."""
    for digits in range(4, 18):
        left, right = f"{figure:.{digits}g}", f"{bound:.{digits}g}"
        if left != right:
            break
    return f"{left} {sign} {right}"


def share_bounds(hits: int, samples: int) -> tuple[float, float]:
    """Return what ``hits`` of ``samples`` prove of the share: at least, and at most."""
    return _share_lower(hits, samples), 1.0 - _share_lower(samples - hits, samples)


def drop_bounds(lost: int, gained: int, samples: int) -> tuple[float, float]:
    """Return what samples lost and gained prove of the drop: at least, and at most."""
    return -_largest_drop(gained, lost, samples), _largest_drop(lost, gained, samples)


def samples_for_share(hits: int, samples: int, wanted: float) -> int | None:
    """Return how many samples that hit as often would prove a share of ``wanted`` < 1.

    None if none would. Exact where every sample hits, and else for the mean case.
    """
    if hits == samples:
        return math.ceil(math.log(DOUBT) / math.log(wanted))
    share = hits / samples
    if share <= wanted:
        return None
    enough = samples
    while _share_lower(share * enough, enough) < wanted:
        enough *= 2
    short = enough // 2
    while enough - short > 1:
        middle = (short + enough) // 2
        if _share_lower(share * middle, middle) < wanted:
            short = middle
        else:
            enough = middle
    return enough


def samples_for_drop(lost: int, gained: int, samples: int, wanted: float) -> int | None:
    """Return how many samples with such a drop would prove one of ``wanted`` > 0 at most.

    None if none would. Exact where no sample differs, and else by the score, so about right.
    """
    fewest = samples_for_share(samples, samples, 1.0 - wanted)
    drop = (lost - gained) / samples
    if drop >= wanted:
        return None
    score = float(_score(lost, gained, samples, wanted))
    return max(fewest or 0, math.ceil(samples * (_Z / score) ** 2))


def _share_lower(hits: float, samples: int) -> float:
    from scipy.special import betaincinv

    return float(betaincinv(hits, samples - hits + 1, DOUBT)) if hits else 0.0


def _score(lost: Any, gained: Any, samples: int, drop: float) -> Any:
    """Return Tango's T, elementwise; 0/0 is no evidence either way."""
    import numpy as np

    spread = drop * (1.0 - drop)
    b = (2 * samples - lost + gained) * drop - lost - gained
    q = (np.sqrt(np.maximum(b**2 + 8 * samples * gained * spread, 0.0)) - b) / (4 * samples)
    variance = np.maximum(samples * (2 * q + spread), np.finfo(float).tiny)
    return (lost - gained - samples * drop) / np.sqrt(variance)


@lru_cache(maxsize=4096)
def _largest_drop(lost: int, gained: int, samples: int) -> float:
    """Return the exact upper bound of the drop, over rates of gain whose roots are even."""
    import numpy as np

    if lost == samples:
        return 1.0
    least = _least_gained(lost, gained, samples)
    largest, worst = (lost - gained) / samples, math.sqrt(gained / samples)
    low, high = _plausible(gained, samples)
    roots = np.linspace(math.sqrt(low), math.sqrt(high), _COARSE)
    for _ in range(_PASSES):
        step = float(roots[1] - roots[0])
        for root in roots[(roots >= 0.0) & (roots < 1.0)]:
            found = _drop_at(least, float(root) ** 2, largest, samples)
            if found > largest:
                largest, worst = found, float(root)
        roots = worst + np.linspace(-step, step, _FINE)
    return largest


def _drop_at(least: Array, gain: float, known: float, samples: int) -> float:
    """Return the largest drop that one rate of gain does not exclude, or ``known`` if that is."""
    near = _NEAR / samples
    inside, outside = max(gain + known + near, 0.0), 1.0 - gain
    if inside >= outside or _chance(least, inside, gain, samples) <= DOUBT - _FAR:
        return known
    while outside - inside > near / 10:
        middle = (inside + outside) / 2
        if _chance(least, middle, gain, samples) > DOUBT - _FAR:
            inside = middle
        else:
            outside = middle
    return outside - gain


def _plausible(hits: int, samples: int) -> tuple[float, float]:
    """Return between which rates ``hits`` lie, all but surely."""
    from scipy.special import betaincinv

    low = float(betaincinv(hits, samples - hits + 1, _FAR / 2)) if hits else 0.0
    return low, float(betaincinv(hits + 1, samples - hits, 1 - _FAR / 2)) if hits < samples else 1.0


def _least_gained(lost: int, gained: int, samples: int) -> Array:
    """Return, for every number lost, from how many gained on it ranks no worse than the seen."""
    import numpy as np

    low, high = max((lost - gained) / samples, -1.0 + 1e-12), 1.0
    while high - low > 1e-13:
        middle = (low + high) / 2
        if _score(lost, gained, samples, middle) > -_Z:
            low = middle
        else:
            high = middle
    every = np.arange(samples + 1.0)
    short, enough = np.full(samples + 1, -1.0), samples - every + 1.0
    while (enough - short > 1).any():
        half = np.floor((short + enough) / 2)
        ranks = (_score(every, half, samples, high) <= -_Z + 1e-9) & (half > short)
        short, enough = np.where(ranks, short, half), np.where(ranks, half, enough)
    enough[: lost + 1] = np.minimum(enough[: lost + 1], gained)
    return np.maximum.accumulate(enough)


def _chance(least: Array, loss: float, gain: float, samples: int) -> float:
    """Return P(gained ≥ least[lost]) where samples are lost and gained at these rates."""
    import numpy as np
    from scipy.special import betainc, gammaln, xlog1py, xlogy

    middle, reach = samples * loss, _WINDOW * math.sqrt(samples * loss * (1.0 - loss)) + _WINDOW
    first, last = max(0, math.floor(middle - reach)), min(samples, math.ceil(middle + reach))
    lost = np.arange(first, last + 1.0)
    rest, need = samples - lost, least[first : last + 1]
    ways = gammaln(samples + 1) - gammaln(lost + 1) - gammaln(rest + 1)
    weight = np.exp(ways + xlogy(lost, loss) + xlog1py(rest, -loss))
    share = min(gain / (1.0 - loss), 1.0) if loss < 1.0 else 0.0
    tail = betainc(np.maximum(need, 1.0), np.maximum(rest - need + 1.0, 1.0), share)
    return float(weight @ np.where(need <= 0, 1.0, np.where(need > rest, 0.0, tail)))
