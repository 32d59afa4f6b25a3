"""What is done to pixels before a network and to its scores behind it, as part of the network.

    uint8 pixels ── channels first ── order ── (p / 255 − mean) / std ── network ── softmax ── top-k

The middle is a BatchNorm of mean 255·mean and variance (255·std)², and is written as one. So
folding treats it as any other (`exporter.fold`): its scale goes into the first layer, exactly, and
so does its shift where that layer pads with no zeros and the mean is small beside std; else the
shift stays as one addition. The top-k is put behind the graph in whatever precision that is
(`exporter.topk`); PyTorch has one where it is timed.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn

from exporter.data import check_scale_said
from exporter.errors import InputRefused
from exporter.outputs import flatten
from exporter.records import Postprocess, Preprocess, TensorSpec

_WHITE = 255.0


class FusedNetwork(nn.Module):
    """A network with what is fused; its layers are called ``network.…`` here."""

    def __init__(
        self, network: nn.Module, channels: int, before: Preprocess, after: Postprocess
    ) -> None:
        super().__init__()
        self.network = network
        self.normalise = _normalising(channels, before) if before.fuse else None
        self.channels_last = before.fuse == "nhwc"
        self.turned = before.fuse is not None and before.is_turned
        self.softmax = after.softmax
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        if self.normalise is not None:
            x = x.to(self.normalise.running_mean.dtype)  # type: ignore[union-attr]  # it has one
            x = x.permute(0, 3, 1, 2) if self.channels_last else x
            x = x.flip(1) if self.turned else x
            x = self.normalise(x)
        scores = self.network(x)
        return scores.softmax(1) if self.softmax else scores


class RankedNetwork(nn.Module):
    """A network with a top-k behind its output of some number: values and labels in its place."""

    def __init__(self, network: nn.Module, place: int, k: int) -> None:
        super().__init__()
        self.network, self.place, self.k = network, place, k
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = list(flatten(self.network(*inputs)).values())
        found[self.place : self.place + 1] = found[self.place].topk(self.k, dim=1)
        return tuple(found)


def fuse(
    network: nn.Module,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    before: Preprocess,
    after: Postprocess,
) -> tuple[nn.Module, tuple[TensorSpec, ...]]:
    """Return the network with what the profile fuses, and the inputs that it then has.

    ``inputs`` are the network's own, float32. Raises `InputRefused` for an input that is no
    picture, or several; for mean and std of another number of channels; for an order of channels
    that are not three; and for a softmax of one class, or of what is no classification.
    """
    if after.softmax and (len(outputs) > 1 or not outputs[0].has_classes):
        found = " and ".join(f"N×{'×'.join(map(str, spec.shape))}" for spec in outputs)
        raise InputRefused(
            f"postprocess.softmax is of one output (N, classes), and the network gives {found}",
            hint="leave it out",
        )
    if after.softmax and prod(outputs[0].shape) < 2:
        raise InputRefused(
            "postprocess.softmax of one class is 1 whatever the input",
            hint="leave it out",
        )
    if before.fuse is None:
        return FusedNetwork(network, 0, before, after) if after.softmax else network, inputs
    if len(inputs) > 1:
        raise InputRefused(
            f"preprocess.fuse is of one picture, and the network takes {len(inputs)} inputs",
            hint="leave it out",
        )
    (spec,) = inputs
    if len(spec.shape) != 3:
        found = " × ".join(map(str, spec.shape))
        raise InputRefused(f"preprocess.fuse is of pictures, and the input is {found}")
    if before.is_turned and spec.shape[0] != 3:
        raise InputRefused(
            f"preprocess.input_order is not preprocess.order, and {spec.shape[0]} channels have no "
            "other way round"
        )
    check_scale_said(spec.shape, before)
    fused = FusedNetwork(network, spec.shape[0], before, after)
    return fused, (TensorSpec(spec.name, before.laid_out(spec.shape), "uint8"),)


def _normalising(channels: int, before: Preprocess) -> nn.BatchNorm2d:
    """Return (p / 255 − mean) / std as a BatchNorm, from the profile's numbers in float64."""
    mean, std = (
        torch.tensor(values, dtype=torch.float64).expand(channels) * _WHITE
        for values in (before.mean, before.std)
    )
    layer = nn.BatchNorm2d(channels, eps=0.0, affine=False)
    layer.running_mean = mean.float()
    layer.running_var = (std**2).float()
    return layer
