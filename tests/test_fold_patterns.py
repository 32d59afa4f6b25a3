"""Every pattern that folds, and whole random networks; all against the unfolded one in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import disturb
from folding import EXACT, PICTURE, batchnorms, check, hostile
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from exporter.errors import GraphError
from exporter.fold import fold_batchnorm

# ── Backwards, into the layer in front ──────────────────────────────────────────────


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_transposed_convolution_takes_it(dims, bias, groups):
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    layer = kinds[dims - 1](4, 8, 3, stride=2, padding=1, groups=groups, bias=bias)
    x = torch.randn(2, 4, *[5] * dims)
    check(nn.Sequential(layer, norms[dims - 1](8)), x)


def test_a_linear_layer_takes_it_where_features_are_known_to_be_all_there_is():
    behind_flatten = nn.Sequential(nn.Flatten(), nn.Linear(324, 6), nn.BatchNorm1d(6))
    check(behind_flatten, PICTURE)
    unknown = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    x = torch.randn(7, 5)
    (said,) = check(unknown, x, folded=False)
    assert "0 may give more than one axis behind the samples" in said
    check(unknown, x, example=x)


def test_a_linear_layer_in_front_of_sequences_does_not():
    """BatchNorm1d of (N, C, L) is over C, and the linear layer's features are L."""
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    x = torch.randn(3, 6, 6)
    (said,) = check(module, x, folded=False, example=x)
    assert "more than one axis" in said


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(),
        nn.LeakyReLU(0.2),
        nn.LeakyReLU(-0.5),
        nn.PReLU(),
        nn.PReLU(8, 0.3),
        nn.ReLU6(),
        nn.Hardtanh(),
        nn.Hardtanh(-0.3, 2.0),
        nn.Hardsigmoid(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("pool", [[], [nn.MaxPool2d(2)], [nn.AvgPool2d(2)]], ids=["", "max", "avg"])
def test_a_batchnorm_behind_an_activation_goes_whatever_the_sign(activation, pool):
    layers = [nn.Conv2d(4, 8, 3), activation, nn.BatchNorm2d(8), *pool]
    check(nn.Sequential(*layers), 3 * PICTURE)
    layers = [nn.Conv2d(4, 8, 3), activation, *pool, nn.BatchNorm2d(8)]
    check(nn.Sequential(*layers), 3 * PICTURE)


@pytest.mark.parametrize(
    "activation",
    [nn.Sigmoid(), nn.GELU(), nn.Tanh(), nn.Hardswish(), nn.ELU(), nn.SiLU(), nn.Softmax(1)],
    ids=repr,
)
def test_a_curved_activation_lets_nothing_pass(activation):
    module = nn.Sequential(nn.Conv2d(4, 8, 3), activation, nn.BatchNorm2d(8))
    (said,) = check(module, PICTURE, folded=False)
    assert f"{type(activation).__name__} stands between" in said


@pytest.mark.parametrize(
    "between",
    [
        [nn.Identity()],
        [nn.Dropout(0.5)],
        [nn.Dropout2d(0.5)],
        [nn.AvgPool2d(3, stride=2)],
        [nn.AvgPool2d(3, padding=1, count_include_pad=False)],
        [nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)],
        [nn.AdaptiveAvgPool2d(2)],
        [nn.MaxPool2d(3, padding=1)],
        [nn.AdaptiveMaxPool2d(3)],
        [nn.ReLU(), nn.MaxPool2d(2), nn.Dropout()],
        [nn.MaxPool2d(2), nn.ReLU6(), nn.AvgPool2d(2)],
    ],
    ids=repr,
)
def test_what_commutes_with_a_map_per_channel_lets_it_pass(between):
    check(nn.Sequential(nn.Conv2d(4, 8, 3), *between, nn.BatchNorm2d(8)), PICTURE)


@pytest.mark.parametrize(
    "between",
    [
        [nn.AvgPool2d(3, padding=1)],
        [nn.AvgPool2d(2, divisor_override=3)],
        [nn.LPPool2d(2, 2)],
        [nn.Softmax2d()],
        [nn.ZeroPad2d(1)],
        [nn.InstanceNorm2d(8)],
    ],
    ids=repr,
)
def test_what_does_not_commute_lets_nothing_pass(between):
    module = nn.Sequential(nn.Conv2d(4, 8, 3), *between, nn.BatchNorm2d(8))
    (said,) = check(module, PICTURE, folded=False)
    assert "stands between" in said


def test_a_flatten_of_single_pixels_lets_it_pass_and_of_pictures_does_not():
    layers = [nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8)]
    check(nn.Sequential(*layers), PICTURE)
    layers = [nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(32)]
    (said,) = check(nn.Sequential(*layers), PICTURE, folded=False)
    assert "makes several features of one channel" in said


class CalledAsFunctions(nn.Module):
    def __init__(self, training):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), training

    def forward(self, x):
        x = functional.dropout(self.conv(x), 0.5, training=self.drop)
        return self.bn(functional.max_pool2d(functional.relu(x), 2))


def test_functions_are_taken_for_what_they_are():
    check(CalledAsFunctions(training=False), PICTURE)
    module = disturb(CalledAsFunctions(training=True)).eval()
    assert "dropout stands between" in fold_batchnorm(module).fates[0].detail


class Reshaped(nn.Module):
    """The way older networks flatten, which asks the tensor for its size first."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1)
        self.bn, self.last = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.pool(self.conv(x))
        return self.last(self.bn(x.view(x.size(0), -1)))


def test_a_view_is_taken_for_a_flatten_where_shapes_are_known():
    (said,) = check(Reshaped(), PICTURE, example=PICTURE)
    assert said == "bn: Conv → AdaptiveAvgPool2d → view → BatchNorm: scale and shift into conv"


class JoinedAt(nn.Module):
    def __init__(self, *args, **names):
        super().__init__()
        self.one, self.other = nn.Conv2d(4, 2, 3), nn.Conv2d(4, 2, 3)
        self.args, self.names, self.bn = args, names, nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(torch.cat([self.one(x), self.other(x)], *self.args, **self.names))


@pytest.mark.parametrize("module", [JoinedAt(1), JoinedAt(-3), JoinedAt(dim=1), JoinedAt(axis=-3)])
def test_channels_are_joined_however_their_axis_is_named(module):
    check(module, PICTURE)


def test_two_batchnorms_in_a_row_both_go():
    clamped = [nn.Conv2d(4, 8, 3), nn.ReLU6(), nn.BatchNorm2d(8), nn.BatchNorm2d(8)]
    check(nn.Sequential(*clamped), PICTURE)
    check(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)), PICTURE)
    behind = [nn.Conv2d(4, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.BatchNorm2d(8)]
    check(nn.Sequential(*behind), PICTURE)
    far = [*behind[:3], nn.MaxPool2d(2), nn.LeakyReLU(), nn.BatchNorm2d(8)]
    check(nn.Sequential(*far[:4], nn.BatchNorm2d(8)), PICTURE)


# ── Where branches meet ─────────────────────────────────────────────────────────────


class Joined(nn.Module):
    """Two branches, one of them behind a ReLU, that meet in front of a BatchNorm."""

    def __init__(self, how):
        super().__init__()
        self.one, self.other = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(8 if how is torch.cat else 4)
        self.how = how

    def forward(self, x):
        branches = self.one(x), torch.relu(self.other(x))
        if self.how is torch.cat:
            return self.bn(torch.cat(branches, 1))
        return self.bn(self.how(*branches))


@pytest.mark.parametrize("how", [torch.add, lambda a, b: a + b, torch.cat], ids=["add", "+", "cat"])
def test_a_batchnorm_behind_a_sum_or_a_concatenation_is_split_over_the_branches(how):
    (said,) = check(Joined(how), PICTURE)
    assert "into one" in said
    assert "into other" in said


class OneBranchCannot(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x) + x)


def test_where_one_branch_cannot_take_it_neither_is_touched():
    module = disturb(OneBranchCannot()).eval()
    weight = module.conv.weight.clone()
    folded = fold_batchnorm(module)
    assert not folded.fates[0].folded
    assert "x is also read by conv" in folded.fates[0].detail
    assert torch.equal(folded.module.conv.weight, weight)
    check(OneBranchCannot(), PICTURE, folded=False)


class AddedToItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y + y)


def test_a_tensor_added_to_itself_would_take_the_shift_twice():
    (said,) = check(AddedToItself(), PICTURE, folded=False)
    assert "adds a tensor to itself" in said


# ── Forwards, into the layers behind ────────────────────────────────────────────────


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_behind_it_takes_it_where_nothing_is_padded(groups, bias):
    layer = nn.Conv2d(4, 8, 3, stride=2, dilation=2, groups=groups, bias=bias)
    (said,) = check(nn.Sequential(nn.BatchNorm2d(4), layer), PICTURE, centred=True)
    assert said == "0: BatchNorm → Conv: scale and shift forwards into 1"


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_that_repeats_the_picture_is_no_obstacle(mode):
    layer = nn.Conv2d(4, 8, 3, padding=1, padding_mode=mode)
    check(nn.Sequential(nn.BatchNorm2d(4), layer), PICTURE, centred=True)


@pytest.mark.parametrize("padding", [1, "same"])
def test_zero_padding_leaves_the_shift_where_it_was_and_says_so(padding):
    layer = nn.Conv2d(4, 8, 3, padding=padding)
    (said,) = check(nn.Sequential(nn.BatchNorm2d(4), layer), PICTURE, centred=True)
    assert said == (
        "0: BatchNorm → Conv: scale forwards into 1, 0 for 1 channels with γ = 0 by one "
        "multiplication, shift left as one addition per channel, since 1 "
        "pads with zeros, which the shift would have to reach"
    )


def test_linear_layers_take_it_through_pools_and_flattened_pictures():
    check(nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(324, 5)), PICTURE, centred=True)
    layers = [
        nn.BatchNorm2d(4),
        nn.Dropout(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    ]
    check(nn.Sequential(*layers), PICTURE, centred=True)
    x = torch.randn(6, 4)
    check(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5)), x, centred=True, example=x)


class ReadByTwo(nn.Module):
    def __init__(self, padding):
        super().__init__()
        self.bn, self.one = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.other = nn.Conv2d(4, 4, 1, padding=padding)

    def forward(self, x):
        y = self.bn(x)
        return self.one(y).mean() + self.other(y).sum(dim=(2, 3))


class AlsoGivenOut(ReadByTwo):
    def forward(self, x):
        y = self.bn(x)
        return self.one(y).mean() + y.sum()


def test_all_readers_must_be_able_to_take_it():
    check(ReadByTwo(0), PICTURE, centred=True)
    (said,) = check(ReadByTwo(1), PICTURE)
    assert "scale forwards into one, scale forwards into other, " in said
    (said,) = check(AlsoGivenOut(0), PICTURE, folded=False)
    assert "no layer behind it can take it: sum comes first" in said


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(4, 8, 3, groups=2)])
def test_means_far_from_zero_stay_in_front_where_float32_would_lose_digits(layer):
    (said,) = check(nn.Sequential(nn.BatchNorm2d(4), layer), PICTURE)
    assert "deviations would cost float32 its digits" in said
    assert "shift left as one addition per channel" in said


class ChangedInPlace(nn.Module):
    """What the BatchNorm read is no longer there when the convolution behind it runs."""

    def __init__(self, change):
        super().__init__()
        self.bn, self.conv, self.relu = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)
        self.change = change

    def forward(self, x):
        x = x + 1
        y = self.bn(x)
        self.change(self, x)
        return self.conv(y) + x


@pytest.mark.parametrize(
    "change",
    [
        lambda net, x: net.relu(x),
        lambda net, x: functional.relu(x, inplace=True),
        lambda net, x: functional.relu(x, True),
        lambda net, x: torch.relu_(x),
        lambda net, x: x.mul_(3),
        lambda net, x: x.view(-1).clamp_(min=0),
        lambda net, x: x[:, 1:].zero_(),
        lambda net, x: x.chunk(2, dim=1)[0].neg_(),
        lambda net, x: x.data.mul_(3),
        lambda net, x: x.ravel().mul_(3),
        lambda net, x: x.diagonal(dim1=2, dim2=3).zero_(),
        lambda net, x: torch.mul(x, 3, out=x),
    ],
)
def test_a_tensor_that_changes_before_the_next_layer_reads_it_is_read_before_that(change):
    (said,) = check(ChangedInPlace(change), PICTURE)
    assert "left as one addition" in said
    (said,) = check(ChangedInPlace(change), PICTURE, centred=True)
    assert "is changed in place by" in said


def test_an_example_the_network_cannot_take_is_refused():
    module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).eval()
    with pytest.raises(GraphError, match="Sequential does not take the example: "):
        fold_batchnorm(module, torch.zeros(1, 3, 9, 9))


# ── What looks like a pattern and is none ───────────────────────────────────────────


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, given, found: found.abs() + 1)
    return layer


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Sequential(nn.Conv1d(4, 8, 3), nn.MaxPool2d(3, 1, 1), nn.BatchNorm1d(8)), (3, 4, 12)),
        (nn.Sequential(nn.Conv2d(4, 8, 3), nn.AvgPool3d(1), nn.BatchNorm2d(8)), (3, 4, 9, 9)),
        (nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.AvgPool1d(1), nn.BatchNorm1d(8)), (5, 6)),
        (nn.Sequential(nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool3d((8, 3, 3)), nn.BatchNorm2d(8)), (3, 4, 9, 9)),
        (nn.Sequential(nn.Conv1d(4, 12, 1), nn.Flatten(0, 1), nn.BatchNorm1d(12)), (3, 4, 12)),
        (nn.Sequential(nn.Conv2d(4, 8, 3), hooked(nn.ReLU()), nn.BatchNorm2d(8)), (3, 4, 9, 9)),
        (nn.Sequential(nn.Conv2d(4, 8, 3), hooked(nn.Identity()), nn.BatchNorm2d(8)), (3, 4, 9, 9)),
        (nn.Sequential(nn.BatchNorm2d(4), hooked(nn.Identity()), nn.Conv2d(4, 8, 3)), (3, 4, 9, 9)),
        (nn.Sequential(nn.Conv2d(4, 8, 3), nn.Hardtanh(0.0, float("inf")), nn.BatchNorm2d(8)), (3, 4, 9, 9)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_example", [False, True])
def test_what_takes_samples_for_channels_or_runs_hooks_lets_nothing_pass(module, x, with_example):
    x = torch.randn(*x)
    check(module, x, folded=False, **({"example": x} if with_example else {}))


@pytest.mark.parametrize("pool", [hooked(nn.MaxPool2d(2)), nn.MaxPool3d((2, 1, 1))])
def test_a_shift_does_not_pass_a_pool_that_is_more_than_one(pool):
    check(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), pool), PICTURE)


class TakenName(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.bn_sign = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x):
        return self.bn(torch.relu(self.conv(x))) * self.bn_sign


def test_a_name_that_is_taken_is_left_to_its_owner():
    check(TakenName(), PICTURE)


def test_a_network_with_hooks_of_its_own_is_refused():
    module = hooked(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).eval())
    with pytest.raises(GraphError, match="Sequential has hooks of its own"):
        fold_batchnorm(module)


def test_one_layer_left_in_training_mode_is_refused_whatever_it_is():
    module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Dropout(0.5), nn.BatchNorm2d(8)).eval()
    module[1].train()
    with pytest.raises(GraphError, match=r"(?m)^1 is in training mode$"):
        fold_batchnorm(module)


class AsksForItsType(nn.Module):
    """What is read while tracing must be the network's own type, not the one it is folded in."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x.to(self.conv.weight.dtype)))


def test_a_network_that_asks_for_its_own_type_keeps_it():
    module = disturb(AsksForItsType()).eval()
    folded = fold_batchnorm(module, PICTURE).module
    with torch.inference_mode():
        assert torch.allclose(folded(PICTURE), module(PICTURE), atol=1e-5)


# ── Blocks of well-known networks ───────────────────────────────────────────────────


def conv_norm(inputs: int, outputs: int, kernel: int, act: type[nn.Module] | None, **more):
    layers = [nn.Conv2d(inputs, outputs, kernel, bias=False, **more), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([act()] if act else []))


class InvertedResidual(nn.Module):
    """MobileNetV2: widen, filter each channel, narrow without an activation, add."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(4, 16, 1, nn.ReLU6),
            conv_norm(16, 16, 3, nn.ReLU6, padding=1, groups=16),
            conv_norm(16, 4, 1, None),
        )

    def forward(self, x):
        return x + self.body(x)


class SqueezeExcite(nn.Module):
    """EfficientNet: a gate per channel between two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv_norm(4, 8, 3, nn.SiLU), conv_norm(8, 4, 1, None)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())

    def forward(self, x):
        x = self.first(x)
        return self.last(x * self.gate(x))


class Shuffle(nn.Module):
    """ShuffleNetV2: half the channels pass by, and the halves are interleaved."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(
            conv_norm(2, 2, 1, nn.ReLU), conv_norm(2, 2, 3, None, padding=1, groups=2)
        )

    def forward(self, x):
        kept, changed = x.chunk(2, dim=1)
        x = torch.cat([kept, self.branch(changed)], dim=1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Inception(nn.Module):
    """Inception: branches side by side, one of them behind a pool."""

    def __init__(self):
        super().__init__()
        self.one = conv_norm(4, 3, 1, nn.ReLU)
        self.two = nn.Sequential(
            conv_norm(4, 2, 1, nn.ReLU), conv_norm(2, 3, 3, nn.ReLU, padding=1)
        )
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_norm(4, 2, 1, nn.ReLU))

    def forward(self, x):
        return torch.cat([self.one(x), self.two(x), self.pool(x)], dim=1)


class Dense(nn.Module):
    """DenseNet: BatchNorm → ReLU → Conv on all that came before, which is read again and again."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3, padding=1, bias=False)
        self.norm3, self.conv3 = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        y = self.conv1(functional.relu(self.norm1(x)))
        x = torch.cat([x, self.conv2(functional.relu(self.norm2(y)))], dim=1)
        return self.conv3(functional.relu(self.norm3(x)))


@pytest.mark.parametrize("block", [InvertedResidual, SqueezeExcite, Shuffle, Inception])
def test_the_blocks_of_well_known_networks_lose_all_their_batchnorms(block):
    check(block(), PICTURE)


def test_a_dense_block_loses_all_its_batchnorms_and_says_where_they_went():
    first, second, third = check(Dense(), PICTURE)
    assert first == (
        "norm1: BatchNorm → ReLU → Conv: scale forwards into conv1, sign of 2 channels with γ < 0 "
        "and 0 for 1 channels with γ = 0 by one multiplication, shift left as one addition per "
        "channel, since a mean of 1.0 deviations would cost float32 its digits"
    )
    assert second == "norm2: Conv → BatchNorm: scale and shift into conv1"
    assert "forwards into conv3" in third


# ── Whole networks ──────────────────────────────────────────────────────────────────

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.PReLU, nn.SiLU)


class RandomNet(nn.Module):
    """Stages of random layers that meet in random ways, at a constant size."""

    def __init__(self, stages: list[tuple[str, list[int]]], channels: int = 4) -> None:
        super().__init__()
        self.plan = []
        shared = nn.BatchNorm2d(channels)
        for i, (kind, picks) in enumerate(stages):
            self.plan.append((kind, i))
            inputs = channels // 2 if kind == "chunk" else channels
            body = nn.Sequential(*(self._layer(pick, inputs) for pick in picks))
            self.add_module(f"stage{i}", body)
            width = 2 * channels if kind == "cat" else channels
            norm = shared if kind == "shared" else nn.BatchNorm2d(width)
            join = nn.Conv2d(width, channels, 3, padding=1)
            self.add_module(f"join{i}", join)
            self.add_module(f"norm{i}", norm)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))
        self.last = nn.BatchNorm1d(5)

    @staticmethod
    def _layer(pick: int, channels: int) -> nn.Module:
        layers = (
            lambda: nn.Conv2d(channels, channels, 3, padding=1),
            lambda: nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False),
            lambda: nn.Conv2d(channels, channels, 1),
            lambda: nn.ConvTranspose2d(channels, channels, 3, padding=1),
            lambda: nn.BatchNorm2d(channels),
            lambda: nn.BatchNorm2d(channels, affine=False),
            lambda: nn.MaxPool2d(3, 1, 1),
            lambda: nn.AvgPool2d(3, 1, 1),
            lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
            lambda: nn.Dropout(0.5),
            lambda: nn.ChannelShuffle(2),
            lambda: nn.ReLU(inplace=True),
            *ACTIVATIONS,
        )
        return layers[pick % len(layers)]()

    def forward(self, x):
        for kind, i in self.plan:
            body, norm = self.get_submodule(f"stage{i}"), self.get_submodule(f"norm{i}")
            join = self.get_submodule(f"join{i}")
            if kind == "chunk":
                one, other = x.chunk(2, dim=1)
                x = join(norm(torch.cat([body(one), other], dim=1)))
            elif kind == "shuffle":
                n, c, h, w = x.shape
                x = body(x).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
                x = join(functional.relu6(norm(x)))
            elif kind == "preactivation":
                y = functional.relu(norm(x))
                x = body(join(y)) + x
            elif kind == "both read":
                y = functional.leaky_relu(norm(body(x)), 0.1)
                x = join(y) + join(functional.max_pool2d(y, 3, 1, 1))
            elif kind == "two readers":
                y = join(body(x))
                x = norm(y) + functional.silu(y)
            elif kind == "shared":
                x = join(norm(torch.relu(body(norm(join(x))))))
            elif kind == "residual":
                x = x + body(x.clone())
            elif kind == "sum":
                y = body(x.clone())
                x = norm(torch.relu(y) + y)
            elif kind == "cat":
                x = join(norm(torch.cat([x, body(x.clone())], dim=1)))
            else:
                x = body(x.clone())
        return self.last(self.head(x))


KNOWN = (
    "is also read by",
    "is read twice by",
    "is called",
    "the network's input is in front of it",
    "stands between",
    "comes first",
    "adds a tensor to itself",
    "lets no sign pass",
    "is reached by two ways",
    "is changed in place by",
    "does not keep channels whole",
    "is read by nothing",
    "leads to no layer alone",
    "an example input would tell",
    "never called",
)
KINDS = (
    *("plain", "plain", "residual", "sum", "cat", "chunk", "shuffle", "preactivation"),
    *("both read", "two readers", "shared"),
)
picks = st.lists(st.one_of(st.integers(0, 18), st.sampled_from([0, 2, 4, 4])), max_size=5)
stages = st.lists(st.tuples(st.sampled_from(KINDS), picks), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    stages, st.integers(0, 99), st.sampled_from([0.3, 3.0, 1000.0]), st.booleans(), st.booleans()
)
def test_random_networks_compute_the_same_and_leave_nothing_unexplained(
    plan, seed, deviations, with_example, copy_weights
):
    torch.manual_seed(seed)
    module = hostile(RandomNet(plan), seed, deviations=deviations, decades=2).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    options = {"copy_weights": copy_weights} | ({"example": x} if with_example else {})
    folded = fold_batchnorm(module, **options)
    with torch.inference_mode():
        want, got = module(x), folded.module(x)
    assert (got - want).norm() <= EXACT * want.norm()
    assert batchnorms(folded.module) <= len(folded.kept)
    for fate in folded.fates:
        reasons = [] if fate.folded else fate.detail.split("; ")
        assert fate.folded or any(known in reason for reason in reasons for known in KNOWN)
        assert not any("moves the network's values" in reason for reason in reasons)
        assert fate.folded is False or (fate.error is not None) is with_example
        if copy_weights:
            assert "copy_weights" not in fate.detail
