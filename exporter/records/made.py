"""What was made: files, graphs, and what became of each BatchNorm."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from exporter.records.asked import BatchRange, TensorSpec
from exporter.records.base import Found


class File(Found, frozen=True):
    """A file of the bundle, pinned by its content; ``name`` is relative to the bundle."""

    name: str
    sha256: str
    size: int

    @classmethod
    def of(cls, path: Path, folder: Path) -> File:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(path.relative_to(folder).as_posix(), digest, path.stat().st_size)


class OnnxModel(NamedTuple):
    """A graph on disk. Its precision lives in the graph, and nowhere else.

    ``output`` is its first; ``more_inputs`` are those behind ``input``.
    """

    path: Path
    precision: str
    input: TensorSpec
    output: TensorSpec
    batch: BatchRange
    more_inputs: tuple[TensorSpec, ...] = ()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (self.input, *self.more_inputs)


class Fate(Found, frozen=True):
    """What became of one BatchNorm.

    ``error`` is how far folding it moved the network's values in float64, as relative L2; None if
    that was not measured.
    """

    name: str
    pattern: str
    folded: bool
    detail: str
    error: float | None = None

    def __str__(self) -> str:
        measured = "" if self.error is None else f" (error {self.error:.1e})"
        kept = "" if self.folded else "kept: "
        return f"{self.name}: {self.pattern}: {kept}{self.detail}{measured}"
