"""Shuffles, views, slices and the like: those that keep channels whole let a map pass."""

from __future__ import annotations

import pytest
import torch
from conftest import disturb
from folding import PICTURE, check, compare
from torch import nn
from torch.nn import functional

from exporter.fold import fold_batchnorm


def shuffled(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


WHOLE = {
    "shuffled": shuffled,
    "ChannelShuffle": nn.ChannelShuffle(2),
    "channel_shuffle": lambda x: torch.channel_shuffle(x, 2),
    "channels last and back": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "flipped": lambda x: x.flip(1),
    "transposed pictures": lambda x: x.transpose(2, 3),
    "flattened and back": lambda x: x.flatten(2).unflatten(2, (x.size(2), x.size(3))),
    "grouped and back": lambda x: x.reshape(x.size(0), 2, -1, x.size(3)).reshape(x.shape),
    "an axis more and less": lambda x: x.unsqueeze(-1).squeeze(-1),
}
MIXED = {
    "pictures for channels": lambda x: x.transpose(1, 2),
    "values in turns": lambda x: x.reshape(x.size(0), 4, -1).transpose(1, 2).reshape(x.shape),
    "samples for channels": lambda x: x.transpose(0, 1).reshape(x.size(0), 8, x.size(2), -1),
}


class InFront(nn.Module):
    """A rearrangement between a convolution and its BatchNorm, all at 8 channels of 8 × 8."""

    def __init__(self, change):
        super().__init__()
        self.conv, self.bn, self.change = nn.Conv2d(4, 8, 2), nn.BatchNorm2d(8), change

    def forward(self, x):
        return self.bn(self.change(self.conv(x)))


class Behind(nn.Module):
    """A rearrangement between a BatchNorm and the padded convolution that reads it."""

    def __init__(self, change, activation):
        super().__init__()
        self.bn, self.change, self.activation = nn.BatchNorm2d(8), change, activation
        self.conv = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.activation(self.change(self.bn(x))))


@pytest.mark.parametrize("change", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("samples", [1, 3])
def test_what_keeps_channels_whole_lets_a_map_pass_backwards(change, samples):
    x = PICTURE[:samples]
    (said,) = check(InFront(change), x, example=x)
    assert "scale and shift into conv" in said


@pytest.mark.parametrize("change", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(inplace=True)], ids=repr)
def test_what_keeps_channels_whole_lets_a_map_pass_forwards(change, activation):
    x = torch.randn(1, 8, 9, 9)
    (said,) = check(Behind(change, activation), x, example=x)
    assert "scale forwards into conv" in said


@pytest.mark.parametrize("change", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("samples", [1, 3, 8])
def test_what_mixes_channels_lets_nothing_pass_though_all_sizes_agree(change, samples):
    x = torch.randn(samples, 4, 9, 9)
    (said,) = check(InFront(change), x, folded=False, example=x)
    assert "does not keep channels whole" in said
    y = torch.randn(samples, 8, 8, 8)
    (said,) = check(Behind(change, nn.Identity()), y, folded=False, example=y)
    assert "does not keep channels whole" in said


def test_without_an_example_a_shuffle_is_in_the_way():
    (said,) = check(InFront(shuffled), PICTURE, folded=False)
    assert "an example input would tell" in said


class Parted(nn.Module):
    """Two parts of one convolution's channels, each with a BatchNorm of its own."""

    def __init__(self, part):
        super().__init__()
        self.conv, self.last, self.part = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 3, 1), part
        self.one, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        one, other = self.part(self.conv(x))
        both = torch.cat([functional.silu(self.one(one)), functional.silu(self.other(other))], 1)
        return self.last(both)


@pytest.mark.parametrize(
    "part",
    [
        lambda y: y.chunk(2, 1),
        lambda y: torch.chunk(y, 2, dim=1),
        lambda y: y.split(4, dim=1),
        lambda y: torch.split(y, [4, 4], dim=1),
        lambda y: torch.tensor_split(y, 2, dim=1),
        lambda y: (y[:, :4], y[:, 4:]),
        lambda y: (y[:, ::2], y[:, 1::2]),
        lambda y: (y.narrow(1, 0, 4), y.narrow(1, 4, 4)),
    ],
)
def test_parts_of_a_layers_channels_each_take_their_own(part):
    for said in check(Parted(part), PICTURE, example=PICTURE):
        assert "scale and shift into conv" in said


def test_parts_that_overlap_do_not():
    module = Parted(lambda y: (y[:, :4], y[:, 3:7]))
    for said in check(module, PICTURE, folded=False, example=PICTURE):
        assert "conv is also read by getitem" in said


class PartlyRead(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y[:, :4]).sum() + y


def test_a_part_that_others_read_with_the_rest_stays():
    (said,) = check(PartlyRead(), PICTURE, folded=False, example=PICTURE)
    assert "conv is also read by add" in said


class ShuffledUnit(nn.Module):
    """Chunks that change places behind a BatchNorm: one reader, reached by two ways."""

    def __init__(self, activation):
        super().__init__()
        self.bn, self.conv, self.activation = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), activation

    def forward(self, x):
        one, other = self.bn(x).chunk(2, dim=1)
        return self.conv(self.activation(torch.cat([other, one], dim=1)))


def test_a_layer_that_is_reached_by_two_ways_takes_both():
    x = torch.randn(2, 8, 5, 5)
    check(ShuffledUnit(nn.ReLU()), x, example=x)
    (said,) = check(ShuffledUnit(nn.ReLU6()), x, folded=False, example=x)
    assert "activation is reached by two ways" in said


class PartsMeet(nn.Module):
    """Both parts of a chunk lead back to one layer, by way of one activation."""

    def __init__(self, activation, norm):
        super().__init__()
        self.conv, self.activation, self.norm = nn.Conv2d(4, 8, 3), activation, norm
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        one, other = self.norm(self.activation(self.conv(x))).chunk(2, dim=1)
        return self.bn(torch.cat([other, functional.relu(one)], dim=1))


def test_parts_that_meet_again_take_their_own_from_one_layer():
    check(PartsMeet(nn.Identity(), nn.Identity()), PICTURE, example=PICTURE)
    check(PartsMeet(nn.LeakyReLU(), nn.Identity()), PICTURE, example=PICTURE)
    (said,) = check(PartsMeet(nn.ReLU6(), nn.Identity()), PICTURE, folded=False, example=PICTURE)
    assert "activation is reached by two ways" in said


def test_what_an_earlier_fold_left_is_not_taken_up_twice():
    module = disturb(PartsMeet(nn.ReLU(), nn.BatchNorm2d(8))).eval()
    first, second = compare(module, PICTURE, example=PICTURE).fates
    assert first.folded
    assert "norm_sign is reached by two ways" in second.detail


def test_a_picture_that_becomes_features_goes_forwards_only():
    x = torch.randn(2, 4, 3, 3)
    forwards = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    check(forwards, x, example=x)
    check(forwards, x)
    backwards = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.BatchNorm1d(36))
    (said,) = check(backwards, x, folded=False, example=x)
    assert "does not keep channels whole" in said


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("axes", [(2, 3), [-1, -2], 3])
def test_a_mean_over_pictures_is_a_pool(axes, keepdim):
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)
            self.bn = nn.BatchNorm2d(8) if keepdim else nn.BatchNorm1d(8)

        def forward(self, x):
            return self.bn(self.conv(x).mean(axes, keepdim=keepdim))

    check(Averaged(), PICTURE)
    check(Averaged(), PICTURE, example=PICTURE)


def test_a_mean_over_channels_is_none():
    """Of 8 channels of 8 rows, which take the channels' place."""

    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 8, 2), nn.BatchNorm1d(8)

        def forward(self, x):
            return self.bn(self.conv(x).mean(1))

    for options in ({}, {"example": PICTURE}):
        (said,) = check(Averaged(), PICTURE, folded=False, **options)
        assert "mean is a mean over more than a channel's values" in said


def test_an_unbatched_picture_is_not_taken_for_a_batch():
    """Samples are missing, so that BatchNorm1d is over the rows, of which there are 8 too."""

    class Unbatched(nn.Module):
        def __init__(self, pool):
            super().__init__()
            self.conv, self.pool, self.bn = nn.Conv2d(4, 8, 2), pool, nn.BatchNorm1d(8)

        def forward(self, x):
            return self.bn(self.pool(self.conv(x)))

    x = PICTURE[0]
    for pool in (nn.Identity(), nn.AvgPool2d(1), nn.MaxPool2d(1), nn.AdaptiveAvgPool2d(8)):
        check(Unbatched(pool), x, folded=False)
        check(Unbatched(pool), x, folded=False, example=x)
    rows = disturb(nn.Sequential(nn.Conv1d(4, 8, 2), nn.BatchNorm1d(8))).eval()
    found = compare(rows, PICTURE[0, 0, :4, :9], example=PICTURE[0, 0, :4, :9])
    assert "has no axis of samples in front of its channels" in found.fates[0].detail


def test_an_example_of_one_sample_does_not_hide_that_samples_are_mixed():
    """For one sample alone, the two axes may change places."""

    class Mixed(InFront):
        def forward(self, x):
            y = self.conv(x)
            return self.bn(y.reshape(8, -1, 8, 8).transpose(0, 1).reshape(y.shape))

    module = disturb(Mixed(None)).eval()
    assert not fold_batchnorm(module, PICTURE[:1]).fates[0].folded
