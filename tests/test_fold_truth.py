"""Every fold's error is measured, one that is wrong is undone, and no number leaves its type."""

from __future__ import annotations

import pytest
import torch
from conftest import disturb
from folding import EXACT, PICTURE, batchnorms, compare
from torch import nn
from torch.nn import functional

import exporter.fold.backwards
import exporter.fold.forwards
from exporter.fold import fold_batchnorm


class TwoOfEach(nn.Module):
    """Two BatchNorms that go backwards, one that goes forwards, one that stays."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.bn3, self.conv3 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.bn4 = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        z = self.conv3(torch.relu(self.bn3(y))) + y
        return self.bn4(torch.sigmoid(z))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return disturb(TwoOfEach()).eval()


def test_every_fold_says_how_far_it_moved_the_network_in_float64(network):
    fates = compare(network, PICTURE, example=PICTURE).fates
    assert [fate.folded for fate in fates] == [True, True, True, False]
    assert all(0 <= fate.error <= EXACT for fate in fates[:3])
    assert any(fate.error > 0 for fate in fates[:3])
    assert fates[3].error is None
    assert str(fates[0]).endswith(f" (error {fates[0].error:.1e})")


def test_without_an_example_nothing_is_measured_and_nothing_said(network):
    fates = fold_batchnorm(network).fates
    assert [fate.error for fate in fates] == [None] * 4
    assert not any("error" in str(fate) for fate in fates)


@pytest.mark.parametrize(
    ("module", "rule", "wrong"),
    [
        (exporter.fold.backwards, "scale_outputs", "bn2"),
        (exporter.fold.forwards, "scale_inputs", "bn3"),
    ],
)
@pytest.mark.parametrize("mistake", [1e-7, 1e-2])
def test_a_fold_that_moves_the_network_is_undone_and_the_others_stand(
    network, module, rule, wrong, mistake, monkeypatch
):
    """A rule with a mistake in it, which no test of this package would have found."""
    right = getattr(module, rule)

    def mistaken(layer, affine):
        right(layer, affine)
        if layer.out_channels == 4:
            layer.weight.data[2] *= 1 + mistake

    monkeypatch.setattr(module, rule, mistaken)
    folded = fold_batchnorm(network.double(), PICTURE)
    kept = [fate for fate in folded.fates if fate.detail.startswith("folding it moves")]
    assert [fate.name for fate in kept] == [wrong]
    assert "folding it moves the network's values by " in kept[0].detail
    with torch.inference_mode():
        want, got = network(PICTURE.double()), folded.module(PICTURE.double())
    assert (got - want).norm() <= EXACT * want.norm()
    assert batchnorms(folded.module) == len(folded.kept) == 2


def test_an_example_of_zeros_hides_no_mistake(network, monkeypatch):
    right = exporter.fold.backwards.scale_outputs

    def mistaken(layer, affine):
        right(layer, affine)
        layer.weight.data *= 2

    monkeypatch.setattr(exporter.fold.backwards, "scale_outputs", mistaken)
    folded = fold_batchnorm(network, torch.zeros(1, 4, 9, 9))
    assert [fate.folded for fate in folded.fates] == [False, False, True, False]


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return functional.dropout(self.bn(self.conv(x)), 0.5, training=True)


class Insists(nn.Module):
    """Wants float32 whatever its weights are, so that it cannot run in float64."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x.float()))


@pytest.mark.parametrize("module", [Random(), Insists()], ids=["random", "insists on its type"])
def test_what_cannot_be_measured_is_not_shown_as_measured(module):
    (fate,) = fold_batchnorm(disturb(module).eval(), PICTURE).fates
    assert fate.folded
    assert fate.error is None


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu, self.conv, self.bn = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(self.relu(x)))


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_example_is_left_as_it_was(samples, dtype):
    example = PICTURE[:samples].to(dtype)
    before = example.clone()
    fold_batchnorm(disturb(InPlace()).eval().to(dtype), example)
    assert torch.equal(example, before)


def test_a_network_that_takes_one_batch_size_alone_is_run_as_it_wants():
    class Fixed(InPlace):
        def forward(self, x):
            return self.bn(self.conv(x).view(2, 4, 7, 7))

    (fate,) = compare(disturb(Fixed()).eval(), PICTURE[:2], example=PICTURE[:2]).fates
    assert "Conv → view → BatchNorm" in fate.pattern


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_example_that_is_run_as_it_is_is_left_as_it_was_too(dtype):
    class Fixed(InPlace):
        def forward(self, x):
            return self.bn(self.conv(self.relu(x)).view(1, 4, 7, 7))

    example = PICTURE[:1].to(dtype)
    before = example.clone()
    assert not fold_batchnorm(disturb(Fixed()).eval().to(dtype), example).kept
    assert torch.equal(example, before)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.turn = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))

    def forward(self, x):
        return self.bn(self.conv(x)).mean() * self.turn


@pytest.mark.parametrize("options", [{}, {"example": PICTURE}], ids=["", "example"])
def test_complex_parameters_keep_their_imaginary_parts(options):
    module = disturb(Complex()).eval()
    folded = fold_batchnorm(module, **options)
    assert all(fate.folded for fate in folded.fates)
    assert torch.equal(folded.module.turn, module.turn)
    with torch.inference_mode():
        assert torch.allclose(folded.module(PICTURE), module(PICTURE))


def with_gamma(gamma: float, beta: float, *behind: nn.Module) -> nn.Module:
    module = nn.Sequential(nn.Conv2d(4, 4, 3), *behind, nn.BatchNorm2d(4)).eval()
    module[-1].weight.data[:] = torch.tensor([gamma, 1.0, 1.0, 1.0])
    module[-1].bias.data[:] = beta
    return module


@pytest.mark.parametrize("behind", [[], [nn.ReLU()]], ids=["", "ReLU"])
def test_what_the_networks_type_cannot_hold_stays_with_the_reason(behind):
    for gamma, reason in ((3e38, "overflow float32"), (1e-39, "underflow float32")):
        module = with_gamma(gamma, 0.0, *behind)
        module[0].weight.data *= 10
        (fate,) = fold_batchnorm(module, PICTURE).fates
        assert not fate.folded
        assert f"0 cannot take it: its weights would {reason}" in fate.detail


def test_a_vanishing_scale_under_a_bias_that_outweighs_it_goes():
    """As of channels that weight decay has switched off: nothing is lost beside the bias."""
    module = with_gamma(1e-39, 0.5)
    assert not compare(module, PICTURE).kept


def test_in_half_precision_the_range_is_that_of_half_precision():
    module = with_gamma(6e4, 0.0)
    module[0].weight.data *= 10
    assert not fold_batchnorm(module).kept
    (fate,) = fold_batchnorm(module.half()).fates
    assert "its weights would overflow float16" in fate.detail
