"""What all records share: what was asked for is strict, and what was found reads newer files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

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


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a user wrote: a key that no field claims is an error."""


class Found(msgspec.Struct, frozen=True):
    """What a run found. Reading ignores keys of newer versions."""


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on a whole, from those on its parts."""
    order: tuple[Verdict, ...] = ("fail", "not enough evidence", "pass", "not checked")
    return min(verdicts, key=order.index, default="not checked")


def rank(percent: float, count: int) -> int:
    """Return ⌈percent / 100 · count⌉, at least 1: exact, where 99.9 / 100 · 1000 is not 999."""
    return max(1, math.ceil(Fraction(str(percent)) * count / 100))
