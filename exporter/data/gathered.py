"""What every kind of data comes to: samples in some order, what tells them apart, and labels."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from exporter.data.lazy import Lazy
from exporter.records import Array, Unfit

By = Literal["pixels", "inputs"]


@dataclass(frozen=True, slots=True)
class Gathered:
    """Samples that are fit, before they are split.

    ``digests`` are SHA-256, ``by`` the decoded pixels of an image or the bytes of an input.
    ``labels`` (N,) int64 and ``classes`` are None where there are none.
    """

    kind: str
    name: str
    samples: Lazy
    digests: tuple[str, ...]
    by: By
    labels: Array | None
    classes: int | None
    preprocessing: str
    unfit: tuple[Unfit, ...] = ()
    notes: dict[str, int] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()

    def sha256(self) -> str:
        """Return the digest of all samples with their labels, whatever order they are in."""
        labels = ["-"] * len(self.digests) if self.labels is None else self.labels.tolist()
        lines = sorted(f"{d} {label}\n" for d, label in zip(self.digests, labels, strict=True))
        return hashlib.sha256("".join(lines).encode("ascii")).hexdigest()

    def repeated(self) -> tuple[str, ...]:
        """Return what to think of samples that are there more than once."""
        again = sum(count - 1 for count in Counter(self.digests).values())
        if not again:
            return ()
        said = [
            f"{again} of the {len(self.digests)} samples of {self.name} are there already: figures "
            "prove less than their number says"
        ]
        if self.labels is not None:
            labels: dict[str, set[int]] = {}
            for digest, label in zip(self.digests, self.labels.tolist(), strict=True):
                labels.setdefault(digest, set()).add(label)
            if twice := sum(len(found) > 1 for found in labels.values()):
                said.append(f"{twice} samples of {self.name} are there under different labels")
        return tuple(said)
