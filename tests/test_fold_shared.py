"""Layers that others use too: left in place, or copied where the user allows it."""

from __future__ import annotations

import pytest
import torch
from conftest import disturb
from folding import PICTURE, compare
from torch import nn
from torch.nn import functional

from exporter.fold import fold_batchnorm


class ConvTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.one, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.other(self.conv(functional.silu(self.one(self.conv(x)))))


class BlockTwice(nn.Module):
    """One block of a convolution and a BatchNorm that runs twice, as a weight-shared head does."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        for _ in range(2):
            x = functional.relu(self.bn(self.conv(x)))
        return x


class TiedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.other.weight, self.bn = self.one.weight, nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.one(self.other(x)))


class WeightsRead(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) + functional.conv2d(x, self.conv.weight)


class TwoConsumers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        y = torch.relu(self.conv(x))
        return torch.sigmoid(self.bn(functional.max_pool2d(y, 3, 1, 1))) + y


class ReadForwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.relu(self.bn(x))) + self.conv(x)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (ConvTwice(), "conv is called 2 times"),
        (BlockTwice(), "conv is called 2 times"),
        (TiedWeights(), "one shares its weights with another module"),
        (WeightsRead(), "conv's weights are also read by themselves"),
        (TwoConsumers(), "relu is also read by add"),
        (ReadForwards(), "conv is called 2 times"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_weights_are_copied_only_where_that_is_allowed(module, reason):
    module = disturb(module).eval()
    kept = compare(module, PICTURE).fates
    assert not any(fate.folded for fate in kept)
    assert reason in kept[0].detail
    assert "; copy_weights=True would fold it: " in kept[0].detail
    copied = compare(module, PICTURE, copy_weights=True, example=PICTURE)
    assert not copied.kept
    assert "into a copy of" in copied.fates[0].detail


def test_of_two_calls_the_first_takes_a_copy_and_the_last_the_layer_itself():
    first, last = fold_batchnorm(disturb(BlockTwice()).eval(), copy_weights=True).fates
    assert str(first) == ("bn (call 1 of 2): Conv → BatchNorm: scale and shift into a copy of conv")
    assert str(last) == "bn (call 2 of 2): Conv → BatchNorm: scale and shift into conv"


def test_a_copy_that_makes_a_layer_run_twice_says_so():
    module = disturb(TwoConsumers()).eval()
    folded = fold_batchnorm(module, copy_weights=True)
    assert "scale into a copy of conv, which runs beside conv" in folded.fates[0].detail
    called = [str(n.target) for n in folded.module.graph.nodes if n.op == "call_module"]
    assert called[:2] == ["conv", "conv_copy"]


def test_the_copy_has_weights_of_its_own():
    module = disturb(TwoConsumers()).eval()
    folded = fold_batchnorm(module, copy_weights=True).module
    assert torch.equal(folded.conv.weight, module.conv.weight)
    assert not torch.equal(folded.conv_copy.weight, module.conv.weight)


class ChangedBetween(nn.Module):
    """The BatchNorm reads what the activation in place has made of the convolution's output."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        z = functional.relu(y, inplace=True)
        return torch.sigmoid(self.bn(y)) + z


def test_what_is_changed_in_place_before_it_is_read_is_not_computed_again():
    module = disturb(ChangedBetween()).eval()
    (fate,) = compare(module, PICTURE, copy_weights=True).fates
    assert not fate.folded
    assert "conv is also read by relu" in fate.detail


def test_a_sum_is_not_computed_again_with_all_that_leads_to_it():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.one(x) + self.other(x)
            return torch.sigmoid(self.bn(y)) + y

    module = disturb(Summed()).eval()
    (fate,) = compare(module, PICTURE, copy_weights=True).fates
    assert "add is also read by add_1" in fate.detail
