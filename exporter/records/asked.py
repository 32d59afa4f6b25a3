"""What was asked for: shapes, batch sizes, how to time, what to compare, what is good enough."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

from exporter.records.base import MOST_THREADS, Asked, Found, Range, Ranges

LEAST_IMAGES = 8  # to calibrate on
FEW_IMAGES = 32  # from which on a scale is not in doubt for their number
MOST_IMAGES = 1_000_000
LARGEST_BATCH = 65_536
LARGEST_SIDE = 65_536
SIDES = ("height", "width")  # what the free axes of inputs are called
THREADS = Range(0, MOST_THREADS)  # libraries crash on absurd ones
SEED = Range(0, (1 << 32) - 1)  # what seeds every generator alike


class FreeAxis(Found, frozen=True):
    """An axis whose size a graph leaves open: its place in a shape, its name, and its range.

    Sizes within the range are multiples of ``multiple``. An input's are ``height`` and ``width``.
    """

    axis: int
    name: str
    min: int
    max: int
    multiple: int = 1


class TensorSpec(Found, frozen=True):
    """A tensor's name and shape, without the batch axis, which always comes first.

    Where axes are ``free``, the shape is the one that engines are tuned for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    free: tuple[FreeAxis, ...] = ()

    @property
    def has_classes(self) -> bool:
        """Return whether a sample's values may be those of classes: they lie along one axis."""
        return len(self.shape) == 1 and not self.free

    @property
    def smallest(self) -> tuple[int, ...]:
        """Return the shape with every free axis at its smallest."""
        return self._with({axis.axis: axis.min for axis in self.free})

    @property
    def largest(self) -> tuple[int, ...]:
        """Return the shape with every free axis at its largest."""
        return self._with({axis.axis: axis.max for axis in self.free})

    @property
    def said(self) -> tuple[str, ...]:
        """Return each axis in words: its size, or from which to which."""
        ranges = {axis.axis: f"{axis.min}–{axis.max}" for axis in self.free}
        return tuple(ranges.get(i, str(size)) for i, size in enumerate(self.shape))

    @property
    def first_side(self) -> int | None:
        """Return which axis is the height, the next being the width; None where none is free."""
        return next((axis.axis - SIDES.index(axis.name) for axis in self.free), None)

    @property
    def sides(self) -> tuple[int, int] | None:
        """Return the height and width of an input of which one is free."""
        if self.first_side is None:
            return None
        height, width = self.shape[self.first_side : self.first_side + 2]
        return height, width

    def _with(self, sizes: Mapping[int, int]) -> tuple[int, ...]:
        return tuple(sizes.get(i, size) for i, size in enumerate(self.shape))


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


class SizeRange(Asked, frozen=True, omit_defaults=True):
    """The heights and widths that one artefact must serve: ``min`` and ``max`` are [H, W].

    Each side is a multiple of ``multiple``. Without both, the size is that of the input alone, and
    with them that is the size which engines are tuned for.
    """

    min: tuple[int, int] | None = None
    max: tuple[int, int] | None = None
    multiple: int = 1

    RANGES: ClassVar[Ranges] = {name: Range(1, LARGEST_SIDE) for name in ("min", "max", "multiple")}

    def __post_init__(self) -> None:
        Asked.__post_init__(self)
        if self.min is None or self.max is None:
            if (self.min, self.max, self.multiple) != (None, None, 1):
                raise ValueError("min and max, both [H, W], belong together, and one is missing")
            return
        if self.min == self.max:
            raise ValueError(f"min and max must differ, found {list(self.min)} twice")
        for name, low, high in zip(SIDES, self.min, self.max, strict=True):
            if low > high:
                raise ValueError(f"need min <= max in each side, found a {name} of {low} to {high}")
            for side in (low, high):
                if side % self.multiple:
                    raise ValueError(
                        f"min and max must be multiples of {self.multiple}, found {side}"
                    )

    @property
    def is_free(self) -> bool:
        return self.min is not None

    def __str__(self) -> str:
        """Return the range in words, as heights and widths."""
        assert self.min is not None  # asked of a range alone
        assert self.max is not None
        step = f", in multiples of {self.multiple}" if self.multiple > 1 else ""
        return f"{self.min[0]} × {self.min[1]} to {self.max[0]} × {self.max[1]}{step}"


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
