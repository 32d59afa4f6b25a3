"""What all records share: what was asked for is strict, and what was found reads newer files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import msgspec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Feed: TypeAlias = "Mapping[str, np.ndarray[Any, Any]]"
Outputs: TypeAlias = "Mapping[str, np.ndarray[Any, Any]]"
Array: TypeAlias = "npt.NDArray[Any]"
Verdict: TypeAlias = Literal["pass", "fail", "not enough evidence", "not checked"]

MOST_THREADS = 256
# Of report.json and manifest.json. History: 1, the first; 2, the ladder, and counts of
# samples in place of shares.
SCHEMA = 2


class Range(NamedTuple):
    """The numbers that a key may have, finite and with both ends; or without the one it is over."""

    low: float
    high: float = math.inf
    over: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return self.low <= value <= self.high and not (self.over and value == self.low)

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "a finite number"
        if self.high == math.inf:
            return f"{self.low} or more"
        if self.over:
            return f"above {self.low} and at most {self.high}"
        return f"from {self.low} to {self.high}"


Ranges: TypeAlias = Mapping[str, Range]


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a user wrote: a key that no field claims is an error, as is a number out of its range.

    ``RANGES`` has the range of each field that is a number or a tuple of numbers.
    """

    RANGES: ClassVar[Ranges] = {}

    def __post_init__(self) -> None:
        for name, allowed in self.RANGES.items():
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            for one in values:
                if one is not None and one not in allowed:
                    found = list(value) if isinstance(value, tuple) else value
                    raise ValueError(f"{name} must be {allowed}, found {found}")


class Found(msgspec.Struct, frozen=True):
    """What a run found. Reading ignores keys of newer versions."""


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on a whole, from those on its parts."""
    order: tuple[Verdict, ...] = ("fail", "not enough evidence", "pass", "not checked")
    return min(verdicts, key=order.index, default="not checked")


def whole(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on a whole that passes only where every part of it does."""
    said = set(verdicts)
    return "not checked" if said == {"pass", "not checked"} else worst(said)


def rank(percent: float, count: int) -> int:
    """Return ⌈percent / 100 · count⌉, at least 1: exact, where 99.9 / 100 · 1000 is not 999."""
    return max(1, math.ceil(Fraction(str(percent)) * count / 100))
