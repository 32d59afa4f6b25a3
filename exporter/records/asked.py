"""What was asked for: shapes, batch sizes, how to time, what to compare, what is good enough."""

from __future__ import annotations

import math
from typing import ClassVar

from exporter.records.base import MOST_THREADS, Asked, Found

LEAST_IMAGES = 8  # to calibrate on
FEW_IMAGES = 32  # from which on a scale is not in doubt for their number


class TensorSpec(Found, frozen=True):
    """A tensor's name and shape, without the batch axis, which always comes first."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


class BatchRange(Asked, frozen=True):
    """The batch sizes one engine must serve, and the one it is tuned for."""

    min: int = 1
    opt: int = 1
    max: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            found = f"{self.min}, {self.opt}, {self.max}"
            raise ValueError(f"need 1 <= min <= opt <= max, found {found}")

    def __str__(self) -> str:
        return f"{self.min} to {self.max}, tuned for {self.opt}"


def check_threads(name: str, threads: int) -> None:
    """Raise `ValueError` for a count that no pool takes; libraries crash on absurd ones."""
    if not 0 <= threads <= MOST_THREADS:
        raise ValueError(f"{name} must be from 0 to {MOST_THREADS}, found {threads}")


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

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches must be 1 or more, found {list(self.batches)}")
        if self.warmup < 0 or self.runs < 2:
            raise ValueError(
                f"need warmup >= 0 and runs >= 2, found warmup {self.warmup} and runs {self.runs}"
            )
        if not 0 <= self.settle_ms <= 1000:
            raise ValueError(f"settle_ms must be from 0 to 1000, found {self.settle_ms}")
        check_threads("pytorch_threads", self.pytorch_threads)
        check_seed(self.seed)


def check_seed(seed: int) -> None:
    """Raise `ValueError` for what does not seed every generator alike."""
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed must be from 0 to {(1 << 32) - 1}, found {seed}")


class ParityInputs(Asked, frozen=True):
    """What outputs are compared on, beside the model's held-out samples: seeded unit noise."""

    random: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.random < 1:
            raise ValueError(f"random must be 1 or more, found {self.random}")
        check_seed(self.seed)


class Calibration(Asked, frozen=True):
    """How many training samples set the scales, and which draw of them."""

    images: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < LEAST_IMAGES:
            raise ValueError(f"images must be {LEAST_IMAGES} or more, found {self.images}")
        check_seed(self.seed)


class Tolerance(Asked, frozen=True, omit_defaults=True):
    """How far a candidate may be from float64 PyTorch. A bound left out is not checked.

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
    SHARES: ClassVar[tuple[str, ...]] = ("accuracy_drop", "agreement")

    def __post_init__(self) -> None:
        for name, bound in self.bounds().items():
            if not math.isfinite(bound):
                raise ValueError(f"{name} must be a finite number, found {bound}")
            if name in self.UPPER and bound < 0:
                raise ValueError(f"{name} must be 0 or more, found {bound}")
            if name in self.SHARES and not 0 <= bound <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, found {bound}")
            if name == "cosine" and not -1 <= bound <= 1:
                raise ValueError(f"cosine lies from -1 to 1, found {bound}")
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
