"""Data of one's own: how samples become inputs, how many may be unfit, and what was used."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from exporter.records.base import Asked, Found, Range, Ranges

Order = Literal["rgb", "bgr"]
Resampling = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


class Preprocess(Asked, frozen=True, omit_defaults=True):
    """How the pixels p of 0 to 255 become the network's inputs: (p / 255 − mean) / std.

    ``resize`` is the new length of the shorter side, or [height, width]; the middle is then cut
    out. Without it images must have the input's own size. ``interpolation`` and both steps are
    Pillow's, as in torchvision. ``orientation`` says whether EXIF's counts, ``background`` what is
    behind transparent pixels, one value or three. What is left out is not guessed: an image that
    needs it is unfit.

    ``order`` is that of the channels that the network takes. With ``fuse`` the artefact takes the
    pixels themselves, uint8 in that layout and in ``input_order``, and the rest is in its graph.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | tuple[int, int] | None = None
    interpolation: Resampling = "bilinear"
    order: Order = "rgb"
    orientation: Literal["refuse", "apply", "ignore"] = "refuse"
    background: tuple[int, ...] | None = None
    fuse: Literal["nchw", "nhwc"] | None = None
    input_order: Order = "rgb"

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together, and one of them is missing")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and not (values and all(map(math.isfinite, values))):
                raise ValueError(f"{name} must be finite numbers, found {list(values)}")
        if self.std and min(self.std) <= 0:
            raise ValueError(f"std must be above 0, found {list(self.std)}")
        if self.resize is not None and min(self.sides) < 1:
            raise ValueError(f"resize must be 1 or more, found {self.resize}")
        colour = self.background
        if colour is not None and (len(colour) not in (1, 3) or not set(colour) <= set(range(256))):
            raise ValueError(
                f"background must be one or three values of 0 to 255, found {list(colour)}"
            )

        if self.fuse and self.mean is None:
            raise ValueError("fuse puts mean and std into the graph, and they are missing")
        if self.input_order != "rgb" and not self.fuse:
            raise ValueError(
                "input_order is that of pixels that an artefact takes: it needs fuse, and the "
                "network's own is order"
            )

    @property
    def is_turned(self) -> bool:
        """Return whether the network takes the channels the other way round than the artefact."""
        return self.order != self.input_order

    def laid_out(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return a network's (C, H, W) as the artefact takes it."""
        return (*shape[1:], shape[0]) if self.fuse == "nhwc" else shape

    def channels_first(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return what an artefact takes as the network's (C, H, W)."""
        return (shape[-1], *shape[:-1]) if self.fuse == "nhwc" else shape

    @property
    def sides(self) -> tuple[int, ...]:
        """Return what ``resize`` asks for: the shorter side, or height and width."""
        if self.resize is None:
            return ()
        return self.resize if isinstance(self.resize, tuple) else (self.resize,)


class Postprocess(Asked, frozen=True, omit_defaults=True):
    """What is done in the graph to the network's scores, (N, classes).

    ``softmax`` is over classes; ``top_k`` gives the so many largest, behind it, and their labels.
    """

    softmax: bool = False
    top_k: int | None = None

    RANGES: ClassVar[Ranges] = {"top_k": Range(1, 3840)}  # TensorRT's limit


class DataChoice(Asked, frozen=True, omit_defaults=True):
    """How data of one's own are split, and what of them may be unfit.

    ``held_out`` is the share that the result is judged on, the rest is calibrated from. More than
    ``max_bad`` of all images unfit end the run. An image may have ``max_pixels`` pixels and take
    ``seconds`` to decode, in one of ``workers`` processes, 0 for one per core.
    """

    held_out: float = 0.5
    max_bad: float = 0.001
    max_pixels: int = 89_478_485  # Pillow's: a quarter of a GB in three colours
    seconds: float = 20.0
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, found {self.held_out}")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad is a share from 0 to 1, found {self.max_bad}")
        if not 1 <= self.max_pixels <= 1 << 30:
            raise ValueError(f"max_pixels must be from 1 to {1 << 30}, found {self.max_pixels}")
        if not 0 < self.seconds <= 3600:
            raise ValueError(f"seconds must be above 0 and at most 3600, found {self.seconds}")
        if not 0 <= self.workers <= 256:
            raise ValueError(f"workers must be from 0 to 256, found {self.workers}")


class Unfit(Found, frozen=True):
    """One image that was left out, by its path in the data's folder, and why."""

    name: str
    reason: str


class DataRecord(Found, frozen=True):
    """What data the figures come from.

    ``sha256`` is of all samples and their labels in whatever order; ``held_out`` of ``samples`` are
    judged on, and ``for_calibration`` can be calibrated from. ``classes`` is None where there are
    no labels. ``unfit`` were left out; ``notes`` count what was done to how many of the others;
    ``doubts`` are reasons not to trust figures that rest on the data.
    """

    kind: str
    name: str
    samples: int
    held_out: int
    for_calibration: int
    sha256: str
    classes: int | None
    preprocessing: str
    unfit: tuple[Unfit, ...] = ()
    notes: dict[str, int] = {}  # noqa: RUF012 - msgspec copies it
    doubts: tuple[str, ...] = ()
