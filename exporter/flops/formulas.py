"""Multiply-accumulates of one operator.

    convolution               out · k₁ · k₂ · … · C_in / groups      with out = |output|
    transposed convolution    in  · k₁ · k₂ · … · C_out / groups     with in = |input|
    product of matrices       |output| · inner dimension

One multiply-accumulate (MAC) is two FLOPs, as in torch.utils.flop_counter; fvcore calls one MAC one
"flop". Biases, activations, poolings and additions are free in this convention. An operator that is
neither counted nor known to be free is reported by name, never as zero in silence.
"""

from __future__ import annotations

from math import prod
from typing import TypeAlias

Shape: TypeAlias = tuple[int, ...]


def convolution(output: Shape, weight: Shape) -> int:
    """Return the MACs of a weight of (C_out, C_in / groups, k₁, k₂, …)."""
    return prod(output) * prod(weight[1:])


def transposed_convolution(input: Shape, weight: Shape) -> int:
    """Return the MACs of a weight of (C_in, C_out / groups, k₁, k₂, …)."""
    return prod(input) * prod(weight[1:])


def product(output: Shape, inner: int) -> int:
    """Return the MACs of a product of matrices, batched or not."""
    return prod(output) * inner
