"""The plain networks of K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks" (2014).

    features     five stages of 3×3 convolutions (padding 1) → ReLU, of 64, 128, 256, 512 and 512
                 channels, each stage ending in a 2×2 max-pool
    classifier   linear 4096 → ReLU → dropout → linear 4096 → ReLU → dropout → linear
             or  global average pool → one linear layer, which takes any size of picture

Layers are named as in torchvision, so that its weights fit.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from exporter.models._asked import Untrained

if TYPE_CHECKING:
    from torch import nn

Head: TypeAlias = Literal["linear", "average"]

WIDTHS = (64, 128, 256, 512, 512)
HIDDEN = 4096
GRID = 7  # height and width behind the last pool, at 224×224


class Vgg(Untrained, frozen=True):
    """A VGG network; ``head`` is its own three linear layers, or an average in their place."""

    head: Head = "linear"

    stages: ClassVar[tuple[int, ...]]

    def module(self) -> nn.Module:
        return vgg_network(
            self.stages, channels=self.channels, classes=self.classes, head=self.head
        )


def vgg_network(
    stages: tuple[int, ...], *, channels: int, classes: int, head: Head, grid: int = GRID
) -> nn.Module:
    """Return the network, freshly initialised and in eval mode.

    ``stages`` are how many convolutions each stage has; ``grid`` is the height and width that the
    linear layers take, a 32nd of the picture's.
    """
    from torch import nn

    layers: list[nn.Module] = []
    previous = channels
    for depth, width in zip(stages, WIDTHS, strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(previous, width, 3, padding=1), nn.ReLU()]
            previous = width
        layers.append(nn.MaxPool2d(2))
    parts: OrderedDict[str, nn.Module] = OrderedDict(features=nn.Sequential(*layers))
    if head == "average":
        parts["average"] = nn.AdaptiveAvgPool2d(1)
        parts["flatten"] = nn.Flatten()
        parts["classifier"] = nn.Linear(previous, classes)
    else:
        parts["flatten"] = nn.Flatten()
        parts["classifier"] = nn.Sequential(
            nn.Linear(previous * grid**2, HIDDEN),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(HIDDEN, classes),
        )
    return nn.Sequential(parts).eval()
