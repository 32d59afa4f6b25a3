"""GoogLeNet as torchvision has it, which is what published figures are of, without its side heads.

It differs from C. Szegedy et al., "Going Deeper with Convolutions" (2014), in three ways: a
BatchNorm behind every convolution, in place of its bias and of the local response normalisation;
3×3 convolutions in the third branch, in place of 5×5; and no auxiliary classifiers.

No weights ship. torchvision's fit, and take pictures normalised by 0.5 and 0.5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.models._asked import Untrained

if TYPE_CHECKING:
    from torch import nn


class GoogLeNet(Untrained, frozen=True):
    """GoogLeNet: 6.6 M parameters, 1.5 G multiply-accumulates at 3×224×224; without weights."""

    def module(self) -> nn.Module:
        from exporter.models._inception import googlenet_network

        return googlenet_network(channels=self.channels, classes=self.classes)


PLUGIN = GoogLeNet
