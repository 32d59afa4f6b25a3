"""The plain networks' layers, as torchvision builds and names them."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from exporter.models.vgg import Head

WIDTHS = (64, 128, 256, 512, 512)
HIDDEN = 4096
GRID = 7  # height and width behind the last pool, at 224×224


def vgg_network(
    stages: tuple[int, ...],
    *,
    channels: int,
    classes: int,
    batchnorm: bool = False,
    head: Head = "linear",
    grid: int = GRID,
) -> nn.Module:
    """Return the network, freshly initialised and in eval mode.

    ``stages`` are how many convolutions each stage has; ``grid`` is the height and width that the
    linear layers take, and any other is averaged to.
    """
    layers: list[nn.Module] = []
    previous = channels
    for depth, width in zip(stages, WIDTHS, strict=True):
        for _ in range(depth):
            layers.append(nn.Conv2d(previous, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if batchnorm else [nn.ReLU()]
            previous = width
        layers.append(nn.MaxPool2d(2))
    parts: OrderedDict[str, nn.Module] = OrderedDict(features=nn.Sequential(*layers))
    if head == "average":
        parts["average"] = nn.AdaptiveAvgPool2d(1)
        parts["flatten"] = nn.Flatten()
        parts["classifier"] = nn.Linear(previous, classes)
    else:
        parts["avgpool"] = nn.AdaptiveAvgPool2d(grid)
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
