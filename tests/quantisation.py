"""Small networks to quantise, by hand: what the quantiser's tests share."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from torch import nn

from exporter.calibration import Range, calibrate
from exporter.fold import fold_batchnorm
from exporter.precisions._qdq import INT8, Pairs, layers_to_quantise
from exporter.quantisation.network import Network
from exporter.records import BatchRange, TensorSpec
from exporter.samples import feeds
from exporter.to_onnx import export_onnx

SHAPE = (3, 12, 12)
PLAIN = {
    "calibrator": "max",
    "equalise": False,
    "rounding": False,
    "bias_correction": False,
    "offset": "none",
}


class Block(nn.Module):
    """conv → BN → ReLU → conv → BN, and the input or its projection beside it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.conv3 = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(y + self.conv3(x))


def residual() -> nn.Module:
    """A residual network with a stem whose BatchNorm stands behind the ReLU."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.BatchNorm2d(16), nn.MaxPool2d(2)]
    blocks = [Block(16, 16), Block(16, 24, 2), Block(24, 24)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def inverted() -> nn.Module:
    """An inverted residual: 1×1 → ReLU6 → depthwise 3×3 → ReLU6 → 1×1, added to its input."""

    class Inverted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(12, 24, 1),
                nn.ReLU6(),
                nn.Conv2d(24, 24, 3, 1, 1, groups=24),
                nn.ReLU6(),
                nn.Conv2d(24, 12, 1),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.body(x)

    stem = [nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU6()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)]
    return nn.Sequential(*stem, Inverted(), Inverted(), *head)


def alive(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return the module with BatchNorms that do something and channels of different ranges."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                size = layer.weight.shape
                layer.weight.copy_(torch.rand(size, generator=generator) + 0.5)
                layer.bias.copy_(torch.randn(size, generator=generator) / 3)
                layer.running_mean.copy_(torch.randn(size, generator=generator) / 3)
                layer.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
    return module.eval()


def spoilt(module: nn.Module, seed: int = 1) -> nn.Module:
    """Rescale the channels between the layers of each block against each other, by 10^±1.

    The function stays the same, for ReLU is positively homogeneous.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in module.modules():
            if isinstance(block, Block):
                by = 10 ** (2 * torch.rand(len(block.bn1.weight), generator=generator) - 1)
                block.bn1.weight.mul_(by)
                block.bn1.bias.mul_(by)
                block.conv2.weight.div_(by.view(1, -1, 1, 1))
    return module


def images(count: int, seed: int = 3) -> np.ndarray:
    """Return smooth random images, (count, 3, 12, 12) float32, of different contrast."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, 4, 4, generator=generator)
    contrast = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    return (nn.functional.interpolate(small, size=(12, 12), mode="bilinear") * contrast).numpy()


def reached(amax: float) -> Range:
    """Return the range of a tensor that goes as far up as down."""
    sides = np.full((1, 1), -amax, np.float32), np.full((1, 1), amax, np.float32)
    return Range(*sides, samples=8)


def exported(module: nn.Module, path) -> onnx.ModelProto:
    """Return the folded network as FP32 ONNX."""
    folded = fold_batchnorm(module, torch.from_numpy(images(2))).module
    model = export_onnx(
        folded,
        path,
        input=TensorSpec("input", SHAPE),
        output=TensorSpec("logits", (10,)),
        batch=BatchRange(1, 4, 8),
    )
    return onnx.load(model.path)


def network_of(model: onnx.ModelProto, *, residual: bool = True) -> Network:
    """Return the graph with the sites of INT8 in TensorRT's placement."""
    layers = layers_to_quantise(model.graph, linear=False, keep=())
    return Network.of(model, Pairs(model.graph, layers, INT8, residual=residual).sites(), [*layers])


def statistics_of(model: onnx.ModelProto, samples: np.ndarray):
    return calibrate(model, feeds(samples, model.graph.input[0].name, size=1))


def float64(module: nn.Module, samples: np.ndarray) -> np.ndarray:
    """Return the module's outputs in float64."""
    with torch.inference_mode():
        return module.double()(torch.from_numpy(samples).double()).numpy()
