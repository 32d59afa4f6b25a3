"""The networks that INT8 is measured on, besides the built-in ResNet-18.

mobile          inverted residuals with ReLU6 and depthwise convolutions, 28 or 52 convolutions
                (M. Sandler et al., "MobileNetV2", 2018)
preactivation   BatchNorm → ReLU → convolution, so that the residual stream is never clipped
                (K. He et al., "Identity Mappings in Deep Residual Networks", 2016)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def _convolution(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    padding = kernel // 2
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class InvertedResidual(nn.Module):
    """1×1 up, 3×3 depthwise, 1×1 down without an activation; added to its input where it fits."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [*_convolution(inputs, hidden, 1), nn.ReLU6()]
        layers += [*_convolution(hidden, hidden, 3, stride=stride, groups=hidden), nn.ReLU6()]
        self.body = nn.Sequential(*layers, *_convolution(hidden, outputs, 1))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.body(x) if self.adds else self.body(x)
        return out


def mobile(
    settings: Sequence[tuple[int, int, int, int]], *, stem: int, stem_stride: int, head: int
) -> nn.Module:
    """Return a MobileNetV2; each setting is (expansion, channels, blocks, first block's stride)."""
    layers: list[nn.Module] = [*_convolution(1, stem, 3, stride=stem_stride), nn.ReLU6()]
    inputs = stem
    for expansion, channels, blocks, stride in settings:
        for block in range(blocks):
            layers.append(
                InvertedResidual(
                    inputs, channels, stride=1 if block else stride, expansion=expansion
                )
            )
            inputs = channels
    layers += [*_convolution(inputs, head, 1), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, 10)).eval()


class PreActivation(nn.Module):
    """x + F(x), F = BN → ReLU → 3×3 → BN → ReLU → 3×3; a 1×1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        self.projection: nn.Module = nn.Identity()
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(x))
        shortcut = self.projection(y) if self.projects else x
        y = self.conv2(self.relu(self.bn2(self.conv1(y))))
        out: torch.Tensor = shortcut + y
        return out


def preactivation(widths: Sequence[int], depth: int) -> nn.Module:
    """Return the network; each width is a stage of ``depth`` blocks, all but the first halving."""
    layers: list[nn.Module] = [nn.Conv2d(1, widths[0], 5, 3, 2, bias=False)]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for block in range(depth):
            halves = stage > 0 and block == 0
            layers.append(PreActivation(inputs, width, stride=2 if halves else 1))
            inputs = width
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(inputs, 10)).eval()
