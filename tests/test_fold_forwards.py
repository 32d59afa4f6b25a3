"""BatchNorms that go forwards, into the layers that read them, and what is left of them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from conftest import disturb
from folding import EXACT, PICTURE, check, compare, hostile, normalisations
from torch import nn
from torch.nn import functional

from exporter.fold import ChannelScale, ChannelShift, fold_batchnorm


def called(module: nn.Module) -> list[str]:
    nodes = [node for node in module.graph.nodes if node.op == "call_module"]
    return [type(module.get_submodule(node.target)).__name__ for node in nodes]


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.LeakyReLU(0.2),
        nn.LeakyReLU(-0.5),
        nn.PReLU(4, 0.3),
        nn.ReLU6(),
        nn.Hardtanh(-0.3, 2.0),
        nn.MaxPool2d(3, 1, 1),
        nn.AdaptiveMaxPool2d(4),
        nn.AvgPool2d(3, 1, 1),
        nn.AvgPool2d(2, divisor_override=3),
        nn.ZeroPad2d(1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3, padding=1), nn.ConvTranspose2d(4, 8, 2)])
@pytest.mark.parametrize("deviations", [0.1, 3, 1000])
def test_a_batchnorm_in_front_of_an_activation_goes_whatever_its_statistics(
    activation, layer, deviations
):
    module = nn.Sequential(nn.BatchNorm2d(4), activation, layer)
    for seed in range(3):
        module = hostile(module, seed, deviations=deviations)
        assert not compare(module, PICTURE).kept
        assert not compare(module, PICTURE, example=PICTURE).kept


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_any_layer_takes_it_whatever_its_groups_and_strides(dims, groups, transposed):
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](4, affine=groups > 1)
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    kind = (kinds if transposed else convolutions)[dims - 1]
    layer = kind(4, 8, 3, stride=2, padding=1, dilation=2, groups=groups, bias=groups == 2)
    x = torch.randn(2, 4, *[7] * dims)
    assert not compare(hostile(nn.Sequential(norm, nn.ReLU(), layer)), x, example=x).kept


@pytest.mark.parametrize(
    "between",
    [nn.Sigmoid(), nn.SiLU(), nn.Hardsigmoid(), nn.Hardswish(), nn.GELU(), nn.InstanceNorm2d(4)],
    ids=repr,
)
def test_a_curved_activation_lets_nothing_pass_forwards(between):
    module = nn.Sequential(nn.BatchNorm2d(4), between, nn.Conv2d(4, 8, 3))
    (said,) = check(module, PICTURE, folded=False, example=PICTURE)
    assert f"no layer behind it can take it: {type(between).__name__} comes first" in said


def norm_with(gamma: list[float], beta: list[float]) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(gamma), eps=0)
    norm.weight.data, norm.bias.data = torch.tensor(gamma), torch.tensor(beta)
    norm.running_mean = torch.ones(len(gamma))
    return norm


def test_what_is_left_is_computed_by_hand():
    """A scale of 2, −4, 0 and a shift of β − a·μ: sign and (β − a·μ) / |a| stay, |a| goes."""
    conv = nn.Conv2d(3, 1, 1, bias=False)
    conv.weight.data = torch.ones(1, 3, 1, 1)
    module = nn.Sequential(norm_with([2.0, -4.0, 0.0], [4.0, 4.0, 5.0]), nn.ReLU(), conv).eval()
    folded = fold_batchnorm(module).module
    assert called(folded) == ["ChannelScale", "ChannelShift", "ReLU", "Conv2d"]
    scale, shift = folded.get_submodule("0_scale"), folded.get_submodule("0")
    assert isinstance(scale, ChannelScale)
    assert isinstance(shift, ChannelShift)
    assert scale.scale.flatten().tolist() == [1.0, -1.0, 0.0]
    assert shift.shift.flatten().tolist() == [1.0, 2.0, 5.0]
    assert folded.get_submodule("2").weight.flatten().tolist() == [2.0, 4.0, 1.0]


def test_where_no_gamma_is_negative_one_addition_is_left():
    module = nn.Sequential(norm_with([2.0], [4.0]), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1)).eval()
    assert called(fold_batchnorm(module).module) == ["ChannelShift", "ReLU", "Conv2d"]


def test_in_front_of_a_layer_alone_negative_scales_go_too():
    module = nn.Sequential(norm_with([2.0, -3.0], [4.0, 4.0]), nn.Conv2d(2, 1, 3, padding=1)).eval()
    assert called(fold_batchnorm(module).module) == ["ChannelShift", "Conv2d"]


@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e30])
def test_a_scale_far_out_of_range_stays_a_factor_of_its_own(scale):
    norm = norm_with([scale, 2.0], [4.0, 4.0])
    norm.running_mean.zero_()
    module = nn.Sequential(norm, nn.ReLU(), nn.Conv2d(2, 3, 3, padding=1)).eval()
    assert not compare(module, PICTURE[:, :2]).kept
    single = fold_batchnorm(module)
    assert "scale of 1 channels out of range" in single.fates[0].detail
    assert all(bool(tensor.isfinite().all()) for tensor in single.module.state_dict().values())


class ChangedBehind(nn.Module):
    """What reads the BatchNorm changes in place what the BatchNorm would have left alone."""

    def __init__(self, relu):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(4, affine=False), relu
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.relu(self.bn(x))) + x


@pytest.mark.parametrize("relu", [nn.ReLU(inplace=True), torch.relu_, lambda x: x.relu_()])
def test_where_nothing_is_left_an_activation_in_place_does_not_reach_what_others_read(relu):
    module = ChangedBehind(relu).eval()
    assert not compare(module, PICTURE).kept
    before = PICTURE.clone()
    fold_batchnorm(module).module(PICTURE)
    assert torch.equal(PICTURE, before)


class PreActivation(nn.Module):
    """The activation feeds both the body and the shortcut; the sum is read twice."""

    def __init__(self, shortcut):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.shortcut = shortcut

    def forward(self, x):
        y = functional.relu(self.bn1(x))
        return self.conv2(functional.relu(self.bn2(self.conv1(y)))) + self.shortcut(y)


def test_all_readers_of_an_activation_take_the_scale_or_none():
    first, second = check(PreActivation(nn.Conv2d(4, 4, 1)), PICTURE)
    assert "forwards into conv1, scale forwards into shortcut" in first
    assert "into conv1" in second
    module = disturb(PreActivation(nn.Sigmoid())).eval()
    kept, gone = compare(module, PICTURE).fates
    assert not kept.folded
    assert "no layer behind it can take it: Sigmoid comes first" in kept.detail
    assert gone.folded


class JoinedBehind(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.bn, self.activation = nn.BatchNorm2d(4), activation
        self.conv = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(self.activation(torch.cat([x, functional.relu(self.bn(x))], dim=1)))


@pytest.mark.parametrize("activation", [nn.Identity(), nn.LeakyReLU(), nn.Hardtanh()], ids=repr)
def test_behind_a_concatenation_a_layer_takes_the_channels_that_are_meant(activation):
    (said,) = check(JoinedBehind(activation), PICTURE, example=PICTURE)
    assert "BatchNorm → ReLU → cat → " in said


def test_the_end_of_a_densenet_goes_forwards_into_its_classifier():
    class End(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.last = nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x):
            y = functional.relu(self.bn(x), inplace=True)
            y = torch.flatten(functional.adaptive_avg_pool2d(y, (1, 1)), 1)
            return self.last(y) + x.mean()

    check(End(), PICTURE)
    check(End(), PICTURE, example=PICTURE)


def test_a_batchnorm_over_features_goes_forwards_where_axes_are_known():
    module = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5))
    x = torch.randn(6, 4)
    check(module, x, example=x)
    (said,) = check(module, x, folded=False)
    assert "more than one axis" in said


def test_a_batchnorm_that_had_to_stay_goes_when_the_one_behind_it_has_gone_into_it():
    """The first meets the second, which goes back into it, and then both go forwards as one."""
    module = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
    check(module, PICTURE)


@pytest.mark.parametrize("deviations", [0.4, 10, 1000])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("between", [[], [nn.ReLU()], [nn.ReLU6()]], ids=["", "ReLU", "ReLU6"])
def test_large_means_cost_float32_no_digits_in_any_form(deviations, padding, between):
    """On inputs as the statistics say, so that the mean really is subtracted from them.

    One rounding, of the shift, then decides a channel's error, folded or not; so what is compared
    is the error over twenty networks. Folding the shift into the bias would fail this by far.
    """
    squares = [0.0, 0.0]
    for seed in range(20):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.BatchNorm2d(8), *between, nn.Conv2d(8, 8, 3, padding=padding))
        (norm,) = normalisations(hostile(module, seed, deviations=deviations, decades=1))
        spread, mean = (v.view(-1, 1, 1) for v in (norm.running_var.sqrt(), norm.running_mean))
        x = torch.randn(4, 8, 16, 16) * spread + mean
        with torch.inference_mode():
            want = deepcopy(module).double()(x.double())
            for i, network in enumerate((module, fold_batchnorm(module).module)):
                squares[i] += float((network(x) - want).norm() / want.norm()) ** 2 / 20
    own, folded = (square**0.5 for square in squares)
    assert folded <= 1.5 * own + 1e-8


def test_a_float64_network_is_as_exact_at_means_of_a_million_deviations():
    module = hostile(
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)), deviations=1e6
    )
    double = module.double()
    x = PICTURE.double()
    with torch.inference_mode():
        want, got = double(x), fold_batchnorm(double).module(x)
    assert (got - want).norm() <= EXACT * want.norm()
