"""Five small networks for 3×32×32 inputs, of the families that are exported most, and their inputs.

Their weights are random, and their BatchNorms do something: the running statistics are those of the
networks' own activations, then disturbed; γ has both signs, and is nearly 0 in one channel, as
training leaves some. So activations stay near 1 throughout, and no error is hidden by a layer that
is far off the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from exporter.models._residual import residual_network
from exporter.records import Array

SHAPE = (3, 32, 32)


def residual() -> nn.Module:
    """Return the document's network: Conv→ReLU→BatchNorm→MaxPool, then residual blocks."""
    return residual_network(in_channels=3, widths=(8, 16), depth=1, classes=10)


def vgg() -> nn.Module:
    """Return convolutions in pairs between max-pools, and a head on the flattened picture."""

    def pair(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()),
        ]

    head = [nn.Flatten(), nn.Linear(16 * 25, 16), nn.ReLU(), nn.Linear(16, 10)]
    pools = [nn.MaxPool2d(2), nn.MaxPool2d(3)]  # of which the second does not come out even
    return nn.Sequential(*pair(3, 8), pools[0], *pair(8, 16), pools[1], *head)


class Inverted(nn.Module):
    """MobileNetV2's block: 1×1 to more channels, 3×3 one by one, 1×1 back without activation."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        wide = 3 * inputs
        self.expand = nn.Conv2d(inputs, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.project = nn.Conv2d(wide, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.act1, self.act2 = nn.ReLU6(), nn.ReLU6()
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act1(self.bn1(self.expand(x)))
        y = self.act2(self.bn2(self.depthwise(y)))
        y = self.bn3(self.project(y))
        return x + y if self.shortcut else y


def mobilenet() -> nn.Module:
    """Return depthwise convolutions, ReLU6, stride 2 and one shortcut."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(Inverted(8, 8, stride=1), Inverted(8, 12, stride=2)),
        *(nn.Conv2d(12, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)),
    )


class Dense(nn.Module):
    """DenseNet's layer: BatchNorm→ReLU→Conv, and what it gives beside what it was given."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.conv(self.relu(self.bn(x)))], dim=1)


def densenet() -> nn.Module:
    """Return two dense blocks, a transition with an average pool between, and a last BatchNorm."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), Dense(8, 8), Dense(16, 8)),
        *(nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 12, 1, bias=False), nn.AvgPool2d(2)),
        *(Dense(12, 8), Dense(20, 8), nn.BatchNorm2d(28), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(28, 10)),
    )


def _unit(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


class Inception(nn.Module):
    """Four branches side by side, one of them behind an average pool, and a gate on the whole.

    The gate is squeeze-and-excite: σ(W₂·ReLU(W₁·mean(x))), one factor per channel.
    """

    def __init__(self, inputs: int, *, count_padding: bool) -> None:
        super().__init__()
        self.one = nn.Sequential(*_unit(inputs, 8, 1))
        self.three = nn.Sequential(*_unit(inputs, 6, 1), *_unit(6, 8, 3))
        self.five = nn.Sequential(*_unit(inputs, 4, 1), *_unit(4, 6, 5))
        pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=count_padding)
        self.pooled = nn.Sequential(pool, *_unit(inputs, 6, 1))
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Conv2d(28, 8, 1), nn.ReLU(), nn.Conv2d(8, 28, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], dim=1)
        return y * self.gate(self.squeeze(y))


def inception() -> nn.Module:
    """Return two blocks of branches, one average pool counting its padding and one not."""
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(Inception(12, count_padding=False), nn.MaxPool2d(3, stride=2, padding=1)),
        *(Inception(28, count_padding=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(28, 10),
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "residual": residual,
    "vgg": vgg,
    "mobilenet": mobilenet,
    "densenet": densenet,
    "inception": inception,
}


@dataclass(frozen=True, slots=True)
class Net:
    """A network in eval mode; ``calibration`` is (N, 3, 32, 32) float32, as all its inputs are."""

    name: str
    module: nn.Module
    calibration: Array

    @classmethod
    def of(cls, name: str, *, seed: int = 0) -> Net:
        """Return a family's network with weights from a seed."""
        torch.manual_seed(seed)
        module = FAMILIES[name]()
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.normal_(layer.bias, std=0.3)
        calibration = pictures(48, seed=1000 + seed)
        _settle(module, torch.from_numpy(calibration), torch.Generator().manual_seed(seed))
        return cls(name, module.eval(), calibration)


def pictures(count: int, *, seed: int) -> Array:
    """Return smooth random fields with unit noise on every third of them, and a little on all."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, SHAPE[0], 5, 5, generator=generator)
    smooth = nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear", align_corners=True)
    loud = torch.full((count, 1, 1, 1), 0.1)
    loud[2::3] = 1.0
    noisy: Array = (smooth + loud * torch.randn(smooth.shape, generator=generator)).numpy()
    return np.ascontiguousarray(noisy)


def _settle(module: nn.Module, inputs: torch.Tensor, generator: torch.Generator) -> None:
    """Give each BatchNorm the statistics of what it reads, one after another, then disturb them."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    module.eval()
    for norm in norms:
        size = norm.num_features
        norm.momentum = 1.0
        norm.train()
        with torch.no_grad():
            module(inputs)
            norm.eval()
            norm.momentum = 0.1
            spread = norm.running_var.sqrt()
            norm.running_mean += 0.2 * spread * torch.randn(size, generator=generator)
            norm.running_var *= 0.5 + torch.rand(size, generator=generator)
            norm.weight.copy_(0.5 + torch.rand(size, generator=generator))
            norm.weight[torch.rand(size, generator=generator) < 0.4] *= -1
            norm.weight[0] = 0.06
            norm.bias.copy_(0.5 * torch.randn(size, generator=generator))
