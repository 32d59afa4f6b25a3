"""What was asked for: shapes, batch sizes, how to time, what to compare, what is good enough."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

from exporter.records.base import MOST_THREADS, Asked, Found, Range, Ranges

LEAST_IMAGES = 8  # to calibrate on
FEW_IMAGES = 32  # from which on a scale is not in doubt for their number
MOST_IMAGES = 1_000_000
LARGEST_BATCH = 65_536
THREADS = Range(0, MOST_THREADS)  # libraries crash on absurd ones
SEED = Range(0, (1 << 32) - 1)  # what seeds every generator alike


class TensorSpec(Found, frozen=True):
    """A tensor's name and shape, without the batch axis, which always comes first."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def has_classes(self) -> bool:
        """Return whether a sample's values may be those of classes: they lie along one axis."""
        return len(self.shape) == 1


class TopK(Found, frozen=True):
    """The k largest of a network's scores, (N, classes), in place of which a graph gives them.

    ``values`` are the scores, (N, k), the largest first, and ``labels`` their classes, (N, k).
    """

    scores: TensorSpec
    k: int

    @property
    def values(self) -> TensorSpec:
        return TensorSpec(f"{self.scores.name}_values", (self.k,))

    @property
    def labels(self) -> TensorSpec:
        return TensorSpec(f"{self.scores.name}_labels", (self.k,), "int64")

    def instead(self, outputs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
        """Return what a graph gives where the network gives ``outputs``."""
        own = (self.values, self.labels)
        return tuple(
            found for spec in outputs for found in (own if spec == self.scores else (spec,))
        )


class BatchRange(Asked, frozen=True):
    """The batch sizes one engine must serve, and the one it is tuned for."""

    min: int = 1
    opt: int = 1
    max: int = 1

    RANGES: ClassVar[Ranges] = {name: Range(1, LARGEST_BATCH) for name in ("min", "opt", "max")}

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            found = f"{self.min}, {self.opt}, {self.max}"
            raise ValueError(f"need 1 <= min <= opt <= max, found {found}")
        Asked.__post_init__(self)

    def __str__(self) -> str:
        return f"{self.min} to {self.max}, tuned for {self.opt}"


class Timing(Asked, frozen=True):
    """How latency is sampled: all candidates in turn, ``runs`` times, at each batch size.

    Warm-up goes on until the medians of two windows of ``warmup`` rounds agree, and there is none
    with 0; then ``seed`` sets the order of each round. Before each timed run a candidate runs
    untimed for ``settle_ms`` milliseconds or longer, until the threads that the one before it left
    spinning are asleep. ``pytorch_threads`` are the baseline's, 0 for one per core; a runtime has
    its own option.
    """

    batches: tuple[int, ...] = (1,)
    warmup: int = 5
    runs: int = 100
    pytorch_threads: int = 0
    settle_ms: float = 15.0
    seed: int = 0

    RANGES: ClassVar[Ranges] = {
        "batches": Range(1, LARGEST_BATCH),
        "warmup": Range(0, 100_000),
        "runs": Range(2, 1_000_000),
        "pytorch_threads": THREADS,
        "settle_ms": Range(0, 1000),
        "seed": SEED,
    }

    def __post_init__(self) -> None:
        Asked.__post_init__(self)
        if not self.batches:
            raise ValueError("batches must be one or more sizes, found []")


class ParityInputs(Asked, frozen=True):
    """What outputs are compared on, beside the model's held-out samples: seeded unit noise."""

    random: int = 32
    seed: int = 0

    RANGES: ClassVar[Ranges] = {"random": Range(1, MOST_IMAGES), "seed": SEED}


class Calibration(Asked, frozen=True):
    """How many training samples set the scales, and which draw of them."""

    images: int = 256
    seed: int = 0

    RANGES: ClassVar[Ranges] = {
        "images": Range(LEAST_IMAGES, MOST_IMAGES),
        "seed": SEED,
    }


class Tolerance(Asked, frozen=True, omit_defaults=True):
    """How far a candidate may be from the float64 reference. A bound left out is not checked.

    ``max_abs``, ``rel_l2``, ``noise_multiple`` and ``accuracy_drop`` are upper bounds; ``sqnr_db``,
    ``cosine`` and ``agreement`` are lower ones. `Parity` says what each figure is. ``agreement``
    and ``accuracy_drop`` speak of all inputs there could be, so they are met where the samples
    prove it, and missed where the samples prove that.
    """

    max_abs: float | None = None
    rel_l2: float | None = None
    noise_multiple: float | None = None
    accuracy_drop: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    agreement: float | None = None

    UPPER: ClassVar[tuple[str, ...]] = ("max_abs", "rel_l2", "noise_multiple", "accuracy_drop")
    LOWER: ClassVar[tuple[str, ...]] = ("sqnr_db", "cosine", "agreement")

    RANGES: ClassVar[Ranges] = {
        "max_abs": Range(0),
        "rel_l2": Range(0),
        "noise_multiple": Range(0),
        "accuracy_drop": Range(0, 1),
        "sqnr_db": Range(-math.inf),
        "cosine": Range(-1, 1),
        "agreement": Range(0, 1),
    }

    def __post_init__(self) -> None:
        Asked.__post_init__(self)
        if self.agreement == 1:
            raise ValueError(
                "agreement must be below 1, since no number of samples proves that all agree, "
                f"found {self.agreement}"
            )
        if self.accuracy_drop == 0:
            raise ValueError(
                "accuracy_drop must be above 0, since no number of samples proves that none is "
                f"lost, found {self.accuracy_drop}"
            )

    def bounds(self) -> dict[str, float]:
        """Return the bounds that are set, by name."""
        every = {name: getattr(self, name) for name in (*self.UPPER, *self.LOWER)}
        return {name: bound for name, bound in every.items() if bound is not None}
