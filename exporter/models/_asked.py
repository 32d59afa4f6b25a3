"""What the networks are asked by that ship without weights, and so can have any ends."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from exporter.contracts import Plugin
from exporter.records import TensorSpec


class Untrained(Plugin, frozen=True):
    """A network for grey or colour pictures and any number of classes, without weights."""

    channels: int = 3
    classes: int = 1000

    weights: ClassVar[Path | None] = None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, found {self.channels}")
        if self.classes < 1:
            raise ValueError(f"classes must be 1 or more, found {self.classes}")

    @property
    def input(self) -> TensorSpec:
        return TensorSpec("input", (self.channels, 224, 224))

    @property
    def output(self) -> TensorSpec:
        return TensorSpec("logits", (self.classes,))

    @property
    def data(self) -> str:
        return "digits" if self.channels == 1 else "rgb-digits"
