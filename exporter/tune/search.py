"""Which mixture to try next, and which to choose: the search, and nothing that runs.

Errors of layers add up nearly as independent noise does,

    ‖error of a set‖² ≈ Σ eᵢ²        eᵢ the error of layer i alone

so that of all sets of k layers, the k with the largest eᵢ are best left in float for accuracy. But
each also costs its work wᵢ, done in float then (multiply-accumulates where latency is wanted,
parameters where size is): for an error allowed, the sum of wᵢ over what is kept is least, nearly,
if those with the largest eᵢ² / wᵢ are kept (G. Dantzig, Operations Research 5, 1957: the knapsack,
relaxed). So there are two orders, and candidates keep the first k of either.

In each, the smallest k within the budget is found by bisection over k = 0, 1, 2, 3, 4, 6, 8, 12, …
and then between. What that rests on is a rule of thumb, so each candidate is judged by its own
figures, never by the prediction. The rest of that row, in the second order, fills the Pareto front.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from exporter.records import Budget, Candidate, Comparison, Latency, Sensitivity


class Choice(NamedTuple):
    """The candidate that is chosen, or none and the one that came nearest."""

    chosen: Candidate | None
    nearest: Candidate | None


def ranked(
    sensitivities: Iterable[Sensitivity], work: Mapping[str, int] | None = None
) -> list[str]:
    """Return the layers in the order in which they are kept, by eᵢ, or by eᵢ² / wᵢ given ``work``.

    What could not be measured comes first, and a layer whose work is not known counts as work 1.
    """

    def rank(found: Sensitivity) -> tuple[bool, float, str]:
        error = found.rel_l2 or 0.0
        size = error if work is None else error**2 / max(1, work.get(found.layer, 1))
        return found.rel_l2 is not None, -size, found.layer

    return [found.layer for found in sorted(sensitivities, key=rank)]


def grid(layers: int) -> list[int]:
    """Return 0, 1, 2, 3, 4, 6, 8, 12, … and the number of layers."""
    counts = {0, layers}
    power = 1
    while power < layers:
        counts |= {power, power + power // 2}
        power *= 2
    return sorted(count for count in counts if count <= layers)


def next_count(tried: Mapping[int, bool], layers: int) -> int | None:
    """Return how many layers to keep next so as to find the fewest that do; None once found.

    ``tried`` says of each number that was tried whether it is within the budget.
    """
    if 0 not in tried:
        return 0
    if tried[0]:
        return None
    if layers not in tried:
        return layers
    within = [count for count, good in tried.items() if good]
    if not within:
        return None
    high = min(within)
    low = max(count for count, good in tried.items() if not good and count < high)
    between = [count for count in grid(layers) if low < count < high]
    if between:
        return between[len(between) // 2]
    return (low + high) // 2 if high - low > 1 else None


def choose(candidates: Sequence[Candidate], budget: Budget) -> Choice:
    """Return the best candidate by the objective, of those within the budget on every side.

    Of candidates that are not shown to be slower than the fastest, the most exact is the best.
    """
    made = [c for c in candidates if c.parity and c.same_as is None]
    good = [c for c in made if c.is_good_enough(budget)]
    within = [c for c in good if c.is_cheap_enough(budget)]
    if not within:
        return Choice(None, _nearest(made, good, budget))
    if budget.objective == "sqnr":
        return Choice(max(within, key=_preference), None)
    if budget.objective == "size":
        return Choice(min(within, key=lambda c: (c.megabytes, -_exactness(c))), None)
    timed = [(c, c.latency) for c in within if c.latency is not None]
    if not timed:
        return Choice(None, _nearest(made, good, budget))
    _, fastest = min(timed, key=lambda pair: pair[1].p50_ms)
    alike = [c for c, latency in timed if not _is_slower(latency, fastest)]
    return Choice(max(alike, key=_preference), None)


def _nearest(
    made: Sequence[Candidate], good: Sequence[Candidate], budget: Budget
) -> Candidate | None:
    """Return what misses the budget least: by quality, or by cost where quality is not at fault."""
    if not good:
        return max(made, key=lambda c: (-_drop(c, budget), _exactness(c)), default=None)
    if budget.max_latency is not None:
        return min(good, key=lambda c: c.latency.p50_ms if c.latency else float("inf"))
    return min(good, key=lambda c: c.megabytes)


def _drop(candidate: Candidate, budget: Budget) -> float:
    drop = candidate.accuracy_drop
    return (1.0 if drop is None else drop) if budget.max_drop is not None else 0.0


def _preference(candidate: Candidate) -> tuple[float, float]:
    return _exactness(candidate), -candidate.megabytes


def _exactness(candidate: Candidate) -> float:
    return float("-inf") if candidate.sqnr_db is None else candidate.sqnr_db


def front(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Return the names of the candidates that none beats in SQNR, latency and size at once.

    To beat is to be as good in all three and better in one; latencies differ where that is shown
    (`Comparison`).
    """
    timed = [(c, c.latency) for c in candidates if c.latency is not None and c.parity]

    def beats(one: tuple[Candidate, Latency], other: tuple[Candidate, Latency]) -> bool:
        (a, ours), (b, theirs) = one, other
        if _exactness(a) < _exactness(b) or a.megabytes > b.megabytes or _is_slower(ours, theirs):
            return False
        is_better = _exactness(a) > _exactness(b) or a.megabytes < b.megabytes
        return is_better or _is_slower(theirs, ours)

    return tuple(c.name for c, t in timed if not any(beats(other, (c, t)) for other in timed))


def _is_slower(latency: Latency, other: Latency) -> bool:
    return Comparison.of(latency, other).speed == "slower"
