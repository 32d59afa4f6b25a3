"""Residual networks as torchvision has them: ResNet, ResNeXt and Wide ResNet.

    conv1 …  7×7 convolution (stride 2) → BatchNorm → ReLU → 3×3 max-pool (stride 2)
    layer1   stages[0] blocks of  64 channels
    layer2   stages[1] blocks of 128 channels, the first of stride 2
    layer3   stages[2] blocks of 256 channels, the first of stride 2
    layer4   stages[3] blocks of 512 channels, the first of stride 2
    fc       global average pool → linear

A basic block is two 3×3 convolutions; a bottleneck is 1×1, 3×3, 1×1, the last four times as wide,
with the stride in the 3×3, where K. He et al., "Deep Residual Learning for Image Recognition"
(2015), have it in the first 1×1. S. Xie et al., "Aggregated Residual Transformations" (2016), split
the 3×3 into 32 groups of 4 or 8 channels; S. Zagoruyko, N. Komodakis, "Wide Residual Networks"
(2016), make it twice as wide.

No weights ship. torchvision's fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.models._asked import Untrained, check_stages

if TYPE_CHECKING:
    from torch import nn


class ResNet(Untrained, frozen=True):
    """A residual network for pictures, without weights.

    ``stages`` are the blocks of each; a ``bottleneck``'s 3×3 has ``groups`` groups of ``width``
    channels for every 64 of its stage.
    """

    stages: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    groups: int = 1
    width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self.stages, 4)
        if self.groups < 1 or self.width < 1:
            raise ValueError(
                f"groups and width must be 1 or more, found {self.groups} and {self.width}"
            )
        if not self.bottleneck and (self.groups, self.width) != (1, 64):
            raise ValueError("only a bottleneck has groups or another width than 64")

    def module(self) -> nn.Module:
        from exporter.models._resnet import resnet_network

        return resnet_network(
            self.stages,
            bottleneck=self.bottleneck,
            groups=self.groups,
            width=self.width,
            channels=self.channels,
            classes=self.classes,
        )


FAMILY = {
    "resnet18-imagenet": ResNet(),
    "resnet34": ResNet(stages=(3, 4, 6, 3)),
    "resnet50": ResNet(stages=(3, 4, 6, 3), bottleneck=True),
    "resnet101": ResNet(stages=(3, 4, 23, 3), bottleneck=True),
    "resnet152": ResNet(stages=(3, 8, 36, 3), bottleneck=True),
    "resnext50-32x4d": ResNet(stages=(3, 4, 6, 3), bottleneck=True, groups=32, width=4),
    "resnext101-32x8d": ResNet(stages=(3, 4, 23, 3), bottleneck=True, groups=32, width=8),
    "wide-resnet50-2": ResNet(stages=(3, 4, 6, 3), bottleneck=True, width=128),
    "wide-resnet101-2": ResNet(stages=(3, 4, 23, 3), bottleneck=True, width=128),
}
