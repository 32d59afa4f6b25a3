"""Cost: how long a batch takes, and what one sample costs."""

from __future__ import annotations

from exporter.records.base import Found, rank

_UNSTEADY = 1.25  # p90 / p50


class Latency(Found, frozen=True):
    """Every sample that was taken, warm-up excluded. Summaries are derived, never stored."""

    name: str
    batch: int
    threads: int
    warmup: int
    samples_ms: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Return the smallest sample that at least ``percent`` % of all do not exceed, in ms."""
        return sorted(self.samples_ms)[rank(percent, len(self.samples_ms)) - 1]

    @property
    def p50_ms(self) -> float:
        return self.percentile(50)

    @property
    def p90_ms(self) -> float:
        return self.percentile(90)

    @property
    def p99_ms(self) -> float:
        return self.percentile(99)

    @property
    def is_unsteady(self) -> bool:
        """Whether it varies so much that it is in doubt."""
        return self.p90_ms > _UNSTEADY * self.p50_ms

    @property
    def per_second(self) -> float:
        return 1000 * self.batch / self.p50_ms


class LayerCost(Found, frozen=True):
    """One node of a graph, for a batch of one. ``name`` is the layer's name in PyTorch."""

    name: str
    op: str
    output_shape: tuple[int, ...]
    macs: int
    parameters: int
    weight_bytes: int
    activation_bytes: int


class Cost(Found, frozen=True):
    """What one sample costs. One multiply-accumulate (MAC) is two FLOPs, and both are shown.

    ``uncounted`` has the operators with no formula, by type: were it not empty, ``macs`` would
    be a lower bound.
    """

    layers: tuple[LayerCost, ...]
    uncounted: dict[str, int]

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        return sum(layer.activation_bytes for layer in self.layers)
