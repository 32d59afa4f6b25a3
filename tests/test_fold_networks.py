"""Networks that people export, small, with hostile statistics: every BatchNorm, and both bars."""

from __future__ import annotations

import pytest
import torch
from folding import batchnorms, compare, hostile
from torch import nn
from torch.nn import functional


def unit(inputs: int, outputs: int, kernel: int, act: type[nn.Module] | None, **more):
    layers = [nn.Conv2d(inputs, outputs, kernel, bias=False, **more), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([act()] if act else []))


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int = 4) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        y = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(y)))


class DenseBlock(nn.Module):
    def __init__(self, depth: int, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(channels + 4 * i) for i in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        stem = [*unit(3, 8, 7, nn.ReLU, stride=2, padding=3), nn.MaxPool2d(3, 2, 1)]
        transition = [nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2)]
        blocks = [DenseBlock(3, 8), *transition, DenseBlock(2, 10), nn.BatchNorm2d(18)]
        self.features, self.classifier = nn.Sequential(*stem, *blocks), nn.Linear(18, 5)

    def forward(self, x):
        x = functional.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(functional.adaptive_avg_pool2d(x, (1, 1)), 1))


class PreActivation(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        changes = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if changes else None

    def forward(self, x):
        y = functional.relu(self.bn1(x))
        aside = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(functional.relu(self.bn2(self.conv1(y)))) + aside


def preactivation() -> nn.Module:
    blocks = [PreActivation(8, 8, 1), PreActivation(8, 16, 2), PreActivation(16, 16, 1)]
    end = [nn.BatchNorm2d(16), nn.ReLU(), *head(16)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, *end)


class ShuffleUnit(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        half = channels // 2
        deep = {"stride": stride, "padding": 1}
        inputs = half if stride == 1 else channels
        aside = [
            *unit(inputs, inputs, 3, None, groups=inputs, **deep),
            *unit(inputs, half, 1, nn.ReLU),
        ]
        self.aside = nn.Sequential(*aside) if stride > 1 else nn.Identity()
        self.branch = nn.Sequential(
            *unit(inputs, half, 1, nn.ReLU),
            *unit(half, half, 3, None, groups=half, **deep),
            *unit(half, half, 1, nn.ReLU),
        )
        self.stride = stride

    def forward(self, x):
        one, other = x.chunk(2, dim=1) if self.stride == 1 else (x, x)
        x = torch.cat([self.aside(one), self.branch(other)], dim=1)
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


class ShuffleNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8, 3, nn.ReLU, stride=2, padding=1)
        self.units = nn.Sequential(ShuffleUnit(8, 2), ShuffleUnit(8, 1), ShuffleUnit(8, 1))
        self.conv5, self.fc = unit(8, 16, 1, nn.ReLU), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.conv5(self.units(self.stem(x))).mean([2, 3]))


class ShuffleNetV1Unit(nn.Module):
    """A grouped convolution's BatchNorm behind the shuffle, as some write it."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.shuffle = nn.Conv2d(12, 6, 1, groups=3), nn.ChannelShuffle(3)
        self.bn, self.relu = nn.BatchNorm2d(6), nn.ReLU()
        self.deep = unit(6, 6, 3, None, padding=1, groups=6)
        self.expand = unit(6, 12, 1, None, groups=3)

    def forward(self, x):
        y = self.relu(self.bn(self.shuffle(self.reduce(x))))
        return functional.relu(x + self.expand(self.deep(y)))


class Inverted(nn.Module):
    """MobileNetV2, and with a gate and another activation V3 and EfficientNet."""

    def __init__(self, channels: int, act: type[nn.Module], gate: type[nn.Module] | None) -> None:
        super().__init__()
        wide = 4 * channels
        self.widen = unit(channels, wide, 1, act)
        self.deep = unit(wide, wide, 3, act, padding=1, groups=wide)
        squeezed = [nn.Conv2d(wide, 4, 1), nn.ReLU(), nn.Conv2d(4, wide, 1)]
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), *squeezed, gate()) if gate else None
        self.narrow = unit(wide, channels, 1, None)

    def forward(self, x):
        y = self.deep(self.widen(x))
        y = y if self.gate is None else y * self.gate(y)
        return x + self.narrow(y)


def mobile(act: type[nn.Module], gate: type[nn.Module] | None) -> nn.Module:
    stem, last = unit(3, 8, 3, act, stride=2, padding=1), unit(8, 16, 1, act)
    return nn.Sequential(stem, Inverted(8, act, gate), Inverted(8, act, gate), last, *head(16))


class Inception(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.one = unit(inputs, 4, 1, nn.ReLU)
        self.three = nn.Sequential(unit(inputs, 3, 1, nn.ReLU), unit(3, 6, 3, nn.ReLU, padding=1))
        tall, wide = {"padding": (3, 0)}, {"padding": (0, 3)}
        self.seven = nn.Sequential(
            unit(inputs, 3, (1, 7), nn.ReLU, **wide), unit(3, 4, (7, 1), nn.ReLU, **tall)
        )
        self.pooled = unit(inputs, 2, 1, nn.ReLU)
        self.maxed = nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(inputs, 4, 1, nn.ReLU))

    def forward(self, x):
        pooled = self.pooled(functional.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([self.one(x), self.three(x), self.seven(x), pooled, self.maxed(x)], 1)


def inception() -> nn.Module:
    """With a BatchNorm behind the last concatenation too, which five branches take."""
    stem = [unit(3, 8, 3, nn.ReLU, stride=2), nn.MaxPool2d(3, 2, ceil_mode=True)]
    return nn.Sequential(*stem, Inception(8), Inception(20), nn.BatchNorm2d(20), *head(20))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self._twice(3, 8), self._twice(8, 16)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 2, stride=2), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.joined, self.last = nn.BatchNorm2d(16), nn.Conv2d(8, 2, 1)
        self.end = self._twice(16, 8)

    @staticmethod
    def _twice(inputs: int, outputs: int) -> nn.Module:
        both = (
            unit(inputs, outputs, 3, nn.ReLU, padding=1),
            unit(outputs, outputs, 3, nn.ReLU, padding=1),
        )
        return nn.Sequential(*both)

    def forward(self, x):
        x = self.down1(x)
        y = self.up(self.down2(functional.max_pool2d(x, 2)))
        return self.last(self.end(self.joined(torch.cat([x, y], dim=1))))


class Residual(nn.Module):
    """ResNeXt's block, or with one group ResNet's."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *unit(inputs, 8, 1, nn.ReLU),
            *unit(8, 8, 3, nn.ReLU, padding=1, groups=groups),
            *unit(8, outputs, 1, None),
        )
        self.aside = unit(inputs, outputs, 1, None) if inputs != outputs else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.body(x)
        y += self.aside(x)
        return self.relu(y)


def resnext() -> nn.Module:
    blocks = [Residual(8, 16, 4), Residual(16, 16, 4), Residual(16, 16, 8)]
    return nn.Sequential(*unit(3, 8, 3, nn.ReLU, padding=1), *blocks, *head(16))


def vgg() -> nn.Module:
    layers = [unit(3, 8, 3, nn.ReLU, padding=1), nn.MaxPool2d(2), unit(8, 8, 3, nn.ReLU, padding=1)]
    features = [nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 5)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *features)


NETWORKS = {
    "DenseNet": DenseNet,
    "pre-activation ResNet": preactivation,
    "ShuffleNetV2": ShuffleNetV2,
    "ShuffleNetV1": lambda: nn.Sequential(nn.Conv2d(3, 12, 1), ShuffleNetV1Unit(), *head(12)),
    "MobileNetV2": lambda: mobile(nn.ReLU6, None),
    "MobileNetV3": lambda: mobile(nn.Hardswish, nn.Hardsigmoid),
    "EfficientNet": lambda: mobile(nn.SiLU, nn.Sigmoid),
    "Inception": inception,
    "U-Net": UNet,
    "ResNeXt": resnext,
    "VGG": vgg,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("deviations", [0.3, 3, 1000])
def test_every_batchnorm_goes_with_hostile_statistics(name, deviations):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    module = hostile(NETWORKS[name](), deviations=deviations, decades=1)
    folded = compare(module, x, example=x)
    assert [str(fate) for fate in folded.kept] == []
    assert len(folded.fates) == batchnorms(module) > 2


@pytest.mark.parametrize("name", [name for name in NETWORKS if "ShuffleNetV1" not in name])
def test_without_an_example_they_go_as_well(name):
    torch.manual_seed(1)
    module = hostile(NETWORKS[name](), 1, decades=1)
    assert [str(fate) for fate in compare(module, torch.randn(2, 3, 32, 32)).kept] == []
