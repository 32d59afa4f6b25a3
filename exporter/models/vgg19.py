"""VGG-19, configuration E of its paper: 16 convolutions and 3 linear layers.

No weights ship. The published ones, of torchvision, fit once saved as safetensors.
"""

from __future__ import annotations

from typing import ClassVar

from exporter.models._vgg import Vgg


class Vgg19(Vgg, frozen=True):
    """VGG-19: 144 M parameters, 19.6 G multiply-accumulates at 3×224×224; without weights."""

    stages: ClassVar[tuple[int, ...]] = (2, 2, 4, 4, 4)


PLUGIN = Vgg19
