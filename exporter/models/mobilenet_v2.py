"""MobileNetV2 as torchvision has it: M. Sandler et al., "Inverted Residuals" (2018).

    features.0        3×3 convolution (stride 2) to 32 channels
    features.1 …      17 inverted residuals, to 16, 24, 32, 64, 96, 160 and 320 channels: 1×1 to six
                      times as many, 3×3 of each channel alone, 1×1 back with no activation, and
                      the sum with the input where the shapes allow it
    features.18       1×1 convolution to 1280 channels
    classifier        global average pool → dropout → linear

A BatchNorm follows every convolution, and a ReLU6 every one but those that end a residual.

No weights ship. torchvision's fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.models._asked import Untrained

if TYPE_CHECKING:
    from torch import nn


class MobileNetV2(Untrained, frozen=True):
    """MobileNetV2: 3.5 M parameters, 0.3 G multiply-accumulates at 3×224×224; without weights."""

    def module(self) -> nn.Module:
        from exporter.models._mobilenet import mobilenet_v2_network

        return mobilenet_v2_network(channels=self.channels, classes=self.classes)


PLUGIN = MobileNetV2
