"""DenseNet as torchvision has it: G. Huang et al., "Densely Connected Networks" (2016).

    conv0 …        7×7 convolution (stride 2) → BatchNorm → ReLU → 3×3 max-pool (stride 2)
    denseblock1-4  stages[i] layers, each of which adds ``growth`` channels to all before it:
                   BatchNorm → ReLU → 1×1 to 4 · growth → BatchNorm → ReLU → 3×3
    transition1-3  between them: BatchNorm → ReLU → 1×1 to half the channels → 2×2 average pool
    norm5 …        BatchNorm → ReLU → global average pool → linear

No weights ship. torchvision's fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.models._asked import Untrained, check_stages

if TYPE_CHECKING:
    from torch import nn


class DenseNet(Untrained, frozen=True):
    """A densely connected network for pictures, without weights; ``stages`` are its layers."""

    stages: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self.stages, 4)
        if self.growth < 1:
            raise ValueError(f"growth must be 1 or more, found {self.growth}")

    def module(self) -> nn.Module:
        from exporter.models._densenet import densenet_network

        return densenet_network(
            self.stages, growth=self.growth, channels=self.channels, classes=self.classes
        )


FAMILY = {"densenet121": DenseNet()}
