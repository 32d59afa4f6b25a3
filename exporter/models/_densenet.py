"""DenseNet's layers and blocks, as torchvision builds and names them."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

BOTTLENECK = 4  # how much wider the 1×1 of a layer is than what the layer adds


def densenet_network(
    stages: tuple[int, ...], *, growth: int, channels: int, classes: int
) -> nn.Module:
    """Return the network, freshly initialised and in eval mode."""
    width = 2 * growth
    features: OrderedDict[str, nn.Module] = OrderedDict(
        conv0=nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False),
        norm0=nn.BatchNorm2d(width),
        relu0=nn.ReLU(),
        pool0=nn.MaxPool2d(3, stride=2, padding=1),
    )
    for stage, depth in enumerate(stages, 1):
        layers = {f"denselayer{i + 1}": Dense(width + i * growth, growth) for i in range(depth)}
        features[f"denseblock{stage}"] = nn.Sequential(OrderedDict(layers))
        width += depth * growth
        if stage < len(stages):
            features[f"transition{stage}"] = _transition(width)
            width //= 2
    features[f"norm{len(stages) + 1}"] = nn.BatchNorm2d(width)
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(features),
            relu=nn.ReLU(),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(width, classes),
        )
    ).eval()


class Dense(nn.Module):
    """BatchNorm → ReLU → 1×1 → BatchNorm → ReLU → 3×3, joined to what it was given.

    Takes (N, in_channels, H, W); gives (N, in_channels + growth, H, W).
    """

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, BOTTLENECK * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(BOTTLENECK * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(BOTTLENECK * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(self.relu1(self.norm1(x)))
        y = self.conv2(self.relu2(self.norm2(y)))
        return torch.cat([x, y], 1)


def _transition(channels: int) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        norm=nn.BatchNorm2d(channels),
        relu=nn.ReLU(),
        conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
        pool=nn.AvgPool2d(2),
    )
    return nn.Sequential(parts)
