"""VGG-16, configuration D of its paper: 13 convolutions and 3 linear layers.

No weights ship. The published ones, of torchvision, fit once saved as safetensors.
"""

from __future__ import annotations

from typing import ClassVar

from exporter.models._vgg import Vgg


class Vgg16(Vgg, frozen=True):
    """VGG-16: 138 M parameters, 15.5 G multiply-accumulates at 3×224×224; without weights."""

    stages: ClassVar[tuple[int, ...]] = (2, 2, 3, 3, 3)


PLUGIN = Vgg16
