"""The residual networks' blocks and stages, as torchvision builds and names them."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


def resnet_network(
    stages: tuple[int, ...],
    *,
    bottleneck: bool,
    groups: int,
    width: int,
    channels: int,
    classes: int,
) -> nn.Module:
    """Return the network, freshly initialised and in eval mode."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(),
        maxpool=nn.MaxPool2d(3, stride=2, padding=1),
    )
    previous = 64
    for stage, depth in enumerate(stages):
        size = 64 << stage
        out = 4 * size if bottleneck else size
        blocks: list[nn.Module] = []
        for block in range(depth):
            stride = 2 if stage and not block else 1
            if bottleneck:
                inner = size * width // 64 * groups
                blocks.append(Bottleneck(previous, inner, out, stride=stride, groups=groups))
            else:
                blocks.append(Basic(previous, out, stride=stride))
            previous = out
        parts[f"layer{stage + 1}"] = nn.Sequential(*blocks)
    parts["avgpool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["fc"] = nn.Linear(previous, classes)
    return nn.Sequential(parts).eval()


class Basic(nn.Module):
    """Two 3×3 convolutions beside a shortcut: y = ReLU(F(x) + x), or F(x) + P(x) with P 1×1.

    Takes (N, in_channels, H, W); gives (N, out_channels, ⌈H / stride⌉, ⌈W / stride⌉).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: torch.Tensor = self.relu(y + self.downsample(x))
        return out


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut, the 3×3 with ``channels`` in ``groups``.

    Takes (N, in_channels, H, W); gives (N, out_channels, ⌈H / stride⌉, ⌈W / stride⌉).
    """

    def __init__(
        self, in_channels: int, channels: int, out_channels: int, *, stride: int, groups: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: torch.Tensor = self.relu(y + self.downsample(x))
        return out


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )
