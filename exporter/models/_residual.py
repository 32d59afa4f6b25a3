"""The residual network that the ResNets here share, written the way its document draws it."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


class Residual(nn.Module):
    """Two 3×3 convolutions beside a shortcut: y = ReLU(F(x) + x), or F(x) + P(x) with P 1×1.

    Takes (N, in_channels, H, W); gives (N, out_channels, ⌈H / stride⌉, ⌈W / stride⌉).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv3: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.conv3 = nn.Conv2d(in_channels, out_channels, 1, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: torch.Tensor = self.relu(y + self.conv3(x))
        return out


def residual_network(
    *, in_channels: int, widths: tuple[int, ...], depth: int, classes: int
) -> nn.Module:
    """Return the network, freshly initialised and in eval mode.

    ``widths`` are the stages' channels; each stage has ``depth`` residual blocks, and every stage
    but the first halves the picture. The blocks are named ``block1`` (stem) to ``block<n>`` (head).
    """
    stem = nn.Sequential(
        nn.Conv2d(in_channels, widths[0], 7, stride=3, padding=3),
        nn.ReLU(),
        nn.BatchNorm2d(widths[0]),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    stages = []
    previous = widths[0]
    for stage, width in enumerate(widths):
        blocks = [Residual(previous, width, stride=2 if stage else 1)]
        blocks += [Residual(width, width) for _ in range(depth - 1)]
        stages.append(nn.Sequential(*blocks))
        previous = width
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(previous, classes))
    parts: list[nn.Module] = [stem, *stages, head]
    return nn.Sequential(OrderedDict((f"block{i}", part) for i, part in enumerate(parts, 1))).eval()
