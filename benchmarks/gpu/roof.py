"""The least time that a batch can take on a card, by its measured ceilings.

    whole    max(FLOPs / peak, bytes / bandwidth), with the bytes that no fusion saves: weights,
             inputs and outputs of the network
    layers   Σ over layers with weights of the same, with the bytes of the layer: what separate
             kernels take at least where their tensors go through the card's memory, everything
             else fused into them (S. Williams, A. Waterman, D. Patterson, CACM 52, 2009)

The peak is that of a large product in the type that the graph asks for. A cache that holds a
layer's tensors from one kernel to the next beats the second, and nothing the first.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from exporter.records import Cost


class Roof(NamedTuple):
    """The least time of a batch in ms: as a whole, and layer by layer."""

    whole_ms: float
    layers_ms: float


def least(
    cost: Cost, batch: int, *, gflops: float, gigabytes: float, shape: tuple[int, ...]
) -> Roof:
    """Return it from 10⁹ FLOPs and bytes per second; ``shape`` is one input's, which is float32."""
    layers = [layer for layer in cost.layers if layer.macs]
    ends = 4 * prod(shape) + (layers[-1].activation_bytes if layers else 0)
    return Roof(
        _ms(cost.flops * batch, cost.weight_bytes + batch * ends, gflops, gigabytes),
        sum(
            _ms(2 * layer.macs * batch, _moved(layer, batch), gflops, gigabytes) for layer in layers
        ),
    )


def _moved(layer: Any, batch: int) -> int:
    """Return a layer's bytes: its weights once, what else it reads and writes for each sample."""
    read = (layer.read_bytes or layer.weight_bytes) - layer.weight_bytes
    moved: int = layer.weight_bytes + batch * (read + layer.activation_bytes)
    return moved


def _ms(flops: int, moved: int, gflops: float, gigabytes: float) -> float:
    return max(flops / gflops, moved / gigabytes) / 1e6
