"""The plain networks of K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks" (2014).

    features     five stages of 3×3 convolutions (padding 1) → ReLU, of 64, 128, 256, 512 and 512
                 channels, each stage ending in a 2×2 max-pool; with a BatchNorm in front of every
                 ReLU where the name ends in -bn, as torchvision adds it
    avgpool      to 7×7, which at 224×224 it is
    classifier   linear 4096 → ReLU → dropout → linear 4096 → ReLU → dropout → linear

No weights ship. torchvision's fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from exporter.models._asked import Untrained, check_stages

if TYPE_CHECKING:
    from torch import nn

Head: TypeAlias = Literal["linear", "average"]


class Vgg(Untrained, frozen=True):
    """A plain network for pictures, without weights.

    ``stages`` are the convolutions of each; ``head`` is its own three linear layers, or in their
    place a global average and one.
    """

    stages: tuple[int, ...] = (2, 2, 3, 3, 3)
    batchnorm: bool = False
    head: Head = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self.stages, 5)

    def module(self) -> nn.Module:
        from exporter.models._vgg import vgg_network

        return vgg_network(
            self.stages,
            batchnorm=self.batchnorm,
            channels=self.channels,
            classes=self.classes,
            head=self.head,
        )


FAMILY = {
    "vgg11": Vgg(stages=(1, 1, 2, 2, 2)),
    "vgg11-bn": Vgg(stages=(1, 1, 2, 2, 2), batchnorm=True),
    "vgg13": Vgg(stages=(2, 2, 2, 2, 2)),
    "vgg13-bn": Vgg(stages=(2, 2, 2, 2, 2), batchnorm=True),
    "vgg16": Vgg(stages=(2, 2, 3, 3, 3)),
    "vgg16-bn": Vgg(stages=(2, 2, 3, 3, 3), batchnorm=True),
    "vgg19": Vgg(stages=(2, 2, 4, 4, 4)),
    "vgg19-bn": Vgg(stages=(2, 2, 4, 4, 4), batchnorm=True),
}
