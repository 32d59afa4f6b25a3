"""ResNet-18 for small grey images, with its stem's BatchNorm behind the ReLU.

    block1   7×7 convolution (stride 3, padding 3) → ReLU → BatchNorm → 3×3 max-pool (stride 2)
    block2   residual  64→ 64, residual  64→ 64
    block3   residual  64→128 (stride 2, projection), residual 128→128
    block4   residual 128→256 (stride 2, projection), residual 256→256
    block5   residual 256→512 (stride 2, projection), residual 512→512
    block6   global average pool → flatten → linear 512→10

It differs from He et al., "Deep Residual Learning for Image Recognition" (2015), in five ways:
one input channel and ten classes; a stem of stride 3; ReLU before BatchNorm in the stem; a bias
on every convolution; no BatchNorm on the projections.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from exporter.contracts import Plugin
from exporter.records import TensorSpec

if TYPE_CHECKING:
    from torch import nn


class ResNet18(Plugin, frozen=True):
    """ResNet-18 on the handwritten digits: 11.2 M parameters, 0.84 G multiply-accumulates."""

    input: ClassVar[TensorSpec] = TensorSpec("input", (1, 224, 224))
    output: ClassVar[TensorSpec] = TensorSpec("logits", (10,))
    data: ClassVar[str] = "digits"
    weights: ClassVar[Path] = Path(__file__).with_suffix(".safetensors")

    def module(self) -> nn.Module:
        from exporter.models._residual import residual_network

        return residual_network(in_channels=1, widths=(64, 128, 256, 512), depth=2, classes=10)


PLUGIN = ResNet18
