"""Cost: what one sample costs."""

from __future__ import annotations

from exporter.records.base import Found


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
