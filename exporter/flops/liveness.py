"""How many bytes are held while each step of a graph runs.

A tensor is alive from the step that writes it to the last one that reads it, both included; one
that nobody reads, while it is written. What the caller gives is alive from the first step on, and
what it gets, to the last. So each step's inputs and outputs exist together: nothing is taken to be
computed in place. Weights are not among them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

T = TypeVar("T", bound=Hashable)


class Step(NamedTuple):
    """What one step of a graph reads and writes, by any names."""

    reads: tuple[Hashable, ...]
    writes: tuple[Hashable, ...]


def alive_bytes(
    steps: Sequence[Step],
    size: Mapping[T, int],
    *,
    given: Iterable[T],
    wanted: Iterable[T],
) -> tuple[int, ...]:
    """Return the bytes alive at each step, in their order; a name without a size has none."""
    if not steps:
        return ()
    first: dict[Hashable, int] = dict.fromkeys(given, 0)
    last = dict(first)
    for at, step in enumerate(steps):
        for name in step.writes:
            first.setdefault(name, at)
        for name in (*step.reads, *step.writes):
            last[name] = at
    last |= dict.fromkeys(wanted, len(steps) - 1)
    change = [0] * (len(steps) + 1)
    for name, held in size.items():
        if name in first:
            change[first[name]] += held
            change[last[name] + 1] -= held
    return tuple(accumulate(change[:-1]))
