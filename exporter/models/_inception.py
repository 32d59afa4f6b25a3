"""GoogLeNet's blocks, as torchvision builds and names them."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn


class Widths(NamedTuple):
    """The channels of an inception block's branches; ``before_…`` those of the 1×1 in front."""

    in_channels: int
    one: int
    before_three: int
    three: int
    before_five: int
    five: int
    pooled: int


BLOCKS = {
    "inception3a": Widths(192, 64, 96, 128, 16, 32, 32),
    "inception3b": Widths(256, 128, 128, 192, 32, 96, 64),
    "inception4a": Widths(480, 192, 96, 208, 16, 48, 64),
    "inception4b": Widths(512, 160, 112, 224, 24, 64, 64),
    "inception4c": Widths(512, 128, 128, 256, 24, 64, 64),
    "inception4d": Widths(512, 112, 144, 288, 32, 64, 64),
    "inception4e": Widths(528, 256, 160, 320, 32, 128, 128),
    "inception5a": Widths(832, 256, 160, 320, 32, 128, 128),
    "inception5b": Widths(832, 384, 192, 384, 48, 128, 128),
}


def convolution(
    in_channels: int, out_channels: int, size: int, *, stride: int = 1, padding: int = 0
) -> nn.Module:
    """Return convolution → BatchNorm → ReLU."""
    layer = nn.Conv2d(in_channels, out_channels, size, stride, padding, bias=False)
    parts: dict[str, nn.Module] = {"conv": layer, "bn": nn.BatchNorm2d(out_channels, eps=0.001)}
    return nn.Sequential(OrderedDict(parts | {"relu": nn.ReLU()}))


class Inception(nn.Module):
    """Four branches beside each other, of 1×1, 3×3, 3×3 and a pool, whose channels add up.

    Takes (N, in_channels, H, W); gives (N, one + three + five + pooled, H, W).
    """

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        into, one, before_three, three, before_five, five, pooled = widths
        self.branch1 = convolution(into, one, 1)
        self.branch2 = nn.Sequential(
            convolution(into, before_three, 1), convolution(before_three, three, 3, padding=1)
        )
        self.branch3 = nn.Sequential(
            convolution(into, before_five, 1), convolution(before_five, five, 3, padding=1)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), convolution(into, pooled, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = (self.branch1, self.branch2, self.branch3, self.branch4)
        return torch.cat([branch(x) for branch in branches], 1)


def googlenet_network(*, channels: int, classes: int) -> nn.Module:
    """Return the network, freshly initialised and in eval mode."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=convolution(channels, 64, 7, stride=2, padding=3),
        maxpool1=nn.MaxPool2d(3, stride=2, ceil_mode=True),
        conv2=convolution(64, 64, 1),
        conv3=convolution(64, 192, 3, padding=1),
        maxpool2=nn.MaxPool2d(3, stride=2, ceil_mode=True),
    )
    for name, widths in BLOCKS.items():
        if name == "inception4a":
            parts["maxpool3"] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        if name == "inception5a":
            parts["maxpool4"] = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        parts[name] = Inception(widths)
    parts["avgpool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["dropout"] = nn.Dropout(0.2)
    parts["fc"] = nn.Linear(1024, classes)
    return nn.Sequential(parts).eval()
