"""What the networks are asked by that ship without weights, and so can have any ends."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from exporter.contracts import Plugin
from exporter.records import TensorSpec
from exporter.samples import fitting


class Untrained(Plugin, frozen=True):
    """A network for pictures of any number of channels and of classes, without weights.

    They are made for 224×224, and take any size at which something is left to pool.
    """

    channels: int = 3
    classes: int = 1000

    weights: ClassVar[Path | None] = None

    def __post_init__(self) -> None:
        for name, value in (("channels", self.channels), ("classes", self.classes)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, found {value}")

    @property
    def input(self) -> TensorSpec:
        return TensorSpec("input", (self.channels, 224, 224))

    @property
    def output(self) -> TensorSpec:
        return TensorSpec("logits", (self.classes,))

    @property
    def data(self) -> str:
        return fitting(self.channels)


def check_stages(stages: tuple[int, ...], count: int) -> None:
    """Raise `ValueError` unless there are so many stages, each of one layer or more."""
    if len(stages) != count or min(stages) < 1:
        raise ValueError(f"stages must be {count} numbers of 1 or more, found {list(stages)}")
