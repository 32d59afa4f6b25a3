"""Verdicts, from figures."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal

from exporter.records import Standing


def rounds_to(found: float, said: str) -> bool:
    """Return whether a figure is what was said, to the digits that were said: 15.47 is 15.5."""
    digits = Decimal(said).as_tuple().exponent
    assert isinstance(digits, int)  # a number that was said is finite
    return abs(Decimal(found) - Decimal(said)) <= Decimal(5).scaleb(digits - 1)


def of_parts(parts: Iterable[bool]) -> Standing:
    """Return the verdict on a claim, from whether it is true of each of its parts."""
    true = list(parts)
    if all(true):
        return "holds"
    return "holds in part" if any(true) else "does not hold"
