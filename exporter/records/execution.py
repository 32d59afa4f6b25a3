"""Execution: the layers that were asked for fewer bits, and the type each really ran in."""

from __future__ import annotations

from typing import Literal, TypeAlias

from exporter.records.base import Found

Source: TypeAlias = Literal["profile", "runtime", "engine inspector", "engine text"]


class Executed(Found, frozen=True):
    """One layer whose graph asks for fewer bits than 32, and what the runtime made of it.

    Types are int8, fp8, fp16 and bf16, or "int8 weights" where only the weights are stored so.
    ``ran`` is None where the runtime does not tell. ``fused`` has what runs in the same kernel
    (bias, ReLU, sum), None where that is not told.
    """

    layer: str
    op: str
    asked: str
    ran: str | None
    reason: str | None = None
    fused: tuple[str, ...] | None = None

    @property
    def happened(self) -> bool:
        return self.ran == self.asked


class Execution(Found, frozen=True):
    """What a runtime says it executes: after a run, or, as a hint, of the file it was built into.

    The source "runtime" is how it was written: it has kernels of one type alone.

    ``unknown`` says why nothing could be asked; then no layer is in it, and none is taken to have
    run as asked.
    """

    source: Source
    layers: tuple[Executed, ...] = ()
    unknown: str | None = None

    @property
    def hint(self) -> bool:
        """Return whether this was read from an engine's undocumented text, and not executed."""
        return self.source == "engine text"

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Return, by the type asked for, how many layers ran in it, and how many there are."""
        kinds = dict.fromkeys(layer.asked for layer in self.layers)
        return {
            kind: (
                sum(layer.happened for layer in self.layers if layer.asked == kind),
                sum(layer.asked == kind for layer in self.layers),
            )
            for kind in kinds
        }

    @property
    def missed(self) -> tuple[Executed, ...]:
        """Return the layers that ran in another type than was asked for."""
        return tuple(one for one in self.layers if one.ran is not None and not one.happened)

    @property
    def untold(self) -> tuple[Executed, ...]:
        """Return the layers of which the runtime does not tell."""
        return tuple(one for one in self.layers if one.ran is None)
