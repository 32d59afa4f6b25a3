"""Cost: what one sample costs."""

from __future__ import annotations

from exporter.records.base import Found


class LayerCost(Found, frozen=True):
    """One node of a graph, for a batch of one. ``name`` is the layer's name in PyTorch.

    ``read_bytes`` are all it reads, weights included, ``activation_bytes`` all it writes, and
    ``alive_bytes`` all activations that are held while it runs; None in records of before they
    were counted.
    """

    name: str
    op: str
    output_shape: tuple[int, ...]
    macs: int
    parameters: int
    weight_bytes: int
    activation_bytes: int
    read_bytes: int | None = None
    alive_bytes: int | None = None

    @property
    def moved_bytes(self) -> int | None:
        return None if self.read_bytes is None else self.read_bytes + self.activation_bytes

    @property
    def intensity(self) -> float | None:
        """Return its FLOPs for each byte that it moves."""
        return 2 * self.macs / self.moved_bytes if self.moved_bytes else None


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

    @property
    def moved_bytes(self) -> int | None:
        """Return the bytes that all layers read and write, each as if it ran alone."""
        moved = [layer.moved_bytes for layer in self.layers if layer.moved_bytes is not None]
        return sum(moved) if len(moved) == len(self.layers) else None

    @property
    def intensity(self) -> float | None:
        """Return the FLOPs for each byte that is moved."""
        return self.flops / self.moved_bytes if self.moved_bytes else None

    @property
    def peak_layer(self) -> str | None:
        """Return the first layer during which the most activations are held."""
        held = [layer.alive_bytes for layer in self.layers if layer.alive_bytes is not None]
        if not held or len(held) < len(self.layers):
            return None
        return self.layers[held.index(max(held))].name

    @property
    def peak_bytes(self) -> int | None:
        """Return the bytes of the activations that are held then, weights not included."""
        held = [layer.alive_bytes for layer in self.layers if layer.alive_bytes is not None]
        return max(held) if held and len(held) == len(self.layers) else None
