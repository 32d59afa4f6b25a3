"""Networks beside each other: what each costs, and how long it takes."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from exporter.records.base import Found
from exporter.records.cost import Cost
from exporter.records.latency import Latency

Standing: TypeAlias = Literal["holds", "holds in part", "does not hold", "not checked"]


class Counted(Found, frozen=True):
    """One network in one form, and what a sample costs it; ``input`` where it was asked for."""

    name: str
    input: tuple[int, ...] | None
    cost: Cost
    notes: tuple[str, ...] = ()


class Contender(Found, frozen=True):
    """One network of a comparison, its folded graph counted and timed; or why it was not.

    ``output`` is the shape of its first one.
    """

    name: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    weights: str
    cost: Cost | None = None
    latency: Latency | None = None
    refused: str | None = None

    @property
    def gflops_per_second(self) -> float | None:
        """Return the arithmetic that the measured latency comes to."""
        if self.cost is None or self.latency is None:
            return None
        return self.cost.flops / self.latency.p50_ms / 1e6


class Contest(Found, frozen=True):
    """Networks that were counted and timed side by side, on one runtime."""

    tool: str
    runtime: str
    environment: dict[str, str]
    networks: tuple[Contender, ...]
    doubts: tuple[str, ...] = ()


class Claim(Found, frozen=True):
    """What is said of a network, what was measured, and what that makes of it.

    ``figures`` are what the verdict was computed from, by name.
    """

    says: str
    measured: str
    verdict: Standing
    figures: dict[str, float] = msgspec.field(default_factory=dict)


class Gradients(Found, frozen=True):
    """How strong the gradient is at each weighted layer's output, in the order they run.

    ``norms`` are ‖∂L/∂h‖₂ over the whole batch.
    """

    network: str
    layers: tuple[str, ...]
    norms: tuple[float, ...]

    @property
    def first_to_last(self) -> float:
        """Return how much of the gradient of the last layer is left at the first one."""
        return self.norms[0] / self.norms[-1]


class Claims(Found, frozen=True):
    """A document's claims, checked; and the layer table that it prints."""

    tool: str
    environment: dict[str, str]
    claims: tuple[Claim, ...]
    gradients: tuple[Gradients, ...]
    summary: str
