"""MobileNetV2's inverted residuals, as torchvision builds and names them."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn


class Stage(NamedTuple):
    """``depth`` blocks of ``width`` channels, each ``expansion`` times as wide within."""

    expansion: int
    width: int
    depth: int
    stride: int


STEM, LAST = 32, 1280
STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


def mobilenet_v2_network(*, channels: int, classes: int) -> nn.Module:
    """Return the network, freshly initialised and in eval mode."""
    features: list[nn.Module] = [_convolution(channels, STEM, 3, stride=2)]
    previous = STEM
    for expansion, width, depth, stride in STAGES:
        for block in range(depth):
            features.append(
                Inverted(previous, width, expansion=expansion, stride=1 if block else stride)
            )
            previous = width
    features.append(_convolution(previous, LAST, 1))
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(nn.Dropout(0.2), nn.Linear(LAST, classes)),
        )
    ).eval()


class Inverted(nn.Module):
    """1×1 to more channels, 3×3 of each alone, 1×1 to ``out_channels``; added where shapes allow.

    Takes (N, in_channels, H, W); gives (N, out_channels, ⌈H / stride⌉, ⌈W / stride⌉).
    """

    def __init__(self, in_channels: int, out_channels: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_convolution(in_channels, wide, 1)]
        layers += [
            _convolution(wide, wide, 3, stride=stride, groups=wide),
            nn.Conv2d(wide, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return x + y if self.adds else y


def _convolution(
    in_channels: int, out_channels: int, size: int, *, stride: int = 1, groups: int = 1
) -> nn.Module:
    """Return convolution → BatchNorm → ReLU6."""
    layer = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels), nn.ReLU6())
