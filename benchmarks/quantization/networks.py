"""Trained networks for the benchmark, made once and kept in ``benchmarks/.cache``.

They are trained as `exporter.train` trains the built-in one, for fewer pixels: the same digits,
seed, optimiser and schedule. What is kept of each is the folded FP32 graph, the calibration images,
and the float64 logits of the network as it was before the fold, which every figure is against.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import exporter
from exporter.models._residual import Residual
from exporter.records import Array, BatchRange, TensorSpec
from exporter.samples import draw, feeds, load_split
from quantization.architectures import mobile, preactivation

CACHE = Path(__file__).parents[1] / ".cache"
SEED = 0
BATCH = 32
LEARNING_RATE = 0.05
THREADS = 2
CALIBRATION = 256
LEAST_ACCURACY = 0.97
BUILT_IN = "built-in"

_MOBILE_SMALL = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 2, 2), (6, 96, 2, 1))
_MOBILE_HALF = (  # MobileNetV2's own table, at half its width
    *((1, 8, 1, 1), (6, 16, 2, 2), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1)),
    *((6, 80, 3, 1), (6, 160, 1, 1)),  # stride 1 instead of 2, for 64 pixels
)


def resnet18() -> nn.Module:
    return exporter.load_model("resnet18").module()


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network comes to be: trained for ``epochs``, from another's weights if one is named."""

    module: Callable[[], nn.Module]
    pixels: int
    epochs: int
    start: str | None = None
    spoil: bool = False
    bfloat16: bool = True


RECIPES = {
    "r64": Recipe(resnet18, 64, 5),
    "mb64": Recipe(lambda: mobile(_MOBILE_SMALL, stem=32, stem_stride=2, head=256), 64, 8),
    "bad64": Recipe(resnet18, 64, 0, start="r64", spoil=True),
    "r224": Recipe(resnet18, 224, 4, start="r64"),
    "preact64": Recipe(lambda: preactivation((64, 128, 256, 512), 2), 64, 5),
    "mobilenetv2": Recipe(
        lambda: mobile(_MOBILE_HALF, stem=16, stem_stride=2, head=1280), 64, 10, bfloat16=False
    ),
    BUILT_IN: Recipe(resnet18, 224, 0),
}


class Network(NamedTuple):
    """A trained network: its FP32 graph, what INT8 is calibrated on, and the truth."""

    name: str
    graph: Path
    input: TensorSpec
    calibration: Array
    held_out: Array
    labels: Array
    logits: Array


def load(name: str, cache: Path = CACHE) -> Network:
    """Return a network from the cache, trained first if it is not there."""
    folder = cache / "networks" / name
    if not (folder / "data.npz").exists():
        _make(name, folder, cache)
    data = np.load(folder / "data.npz")
    spec = TensorSpec("input", data["held_out"].shape[1:])
    keys = ("calibration", "held_out", "labels", "logits")
    return Network(name, folder / "fp32.onnx", spec, *(data[key] for key in keys))


def _make(name: str, folder: Path, cache: Path) -> None:
    recipe = RECIPES[name]
    began = perf_counter()
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    module = recipe.module()
    if name == BUILT_IN:
        module.load_state_dict(load_file(exporter.load_model("resnet18").weights))
    if recipe.start is not None:
        load(recipe.start, cache)
        module.load_state_dict(load_file(cache / "networks" / recipe.start / "model.safetensors"))
    shape = (1, recipe.pixels, recipe.pixels)
    training, held_out = (load_split("digits", shape, split) for split in ("train", "held-out"))
    _train(module, torch.from_numpy(training.inputs), torch.from_numpy(training.labels), recipe)
    if recipe.spoil:
        spoil(module)
    module = module.float().eval().to(memory_format=torch.contiguous_format)
    spec, output = TensorSpec("input", shape), TensorSpec("logits", (10,))
    truth = exporter.TorchSession.of(module, output.name, double=True)
    logits = np.concatenate(
        [truth(feed)[output.name] for feed in feeds(held_out.inputs, spec.name, size=8)]
    )
    accuracy = float((logits.argmax(axis=1) == held_out.labels).mean())
    print(f"{name}: {accuracy:.1%} in {perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    if accuracy < LEAST_ACCURACY:
        raise SystemExit(f"{name} learned only {accuracy:.1%}: not a network to measure INT8 on")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(module.state_dict(), folder / "model.safetensors")
    folded = exporter.fold_batchnorm(module, torch.from_numpy(held_out.inputs[:2]))
    exporter.export_onnx(
        folded.module,
        folder / "fp32.onnx",
        input=spec,
        output=output,
        batch=BatchRange(1, 8, 32),
    )
    np.savez(
        folder / "data.npz",
        calibration=draw(training, count=CALIBRATION, seed=SEED).inputs,
        held_out=held_out.inputs,
        labels=held_out.labels,
        logits=logits,
    )


def _train(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, recipe: Recipe) -> None:
    if not recipe.epochs:
        return
    module.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # is missing in torch's stubs
    steps = len(inputs) // BATCH
    total = recipe.epochs * steps
    optimiser = torch.optim.SGD(
        module.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=total)
    for _ in range(recipe.epochs):
        for chosen in torch.randperm(len(inputs))[: steps * BATCH].view(steps, BATCH):
            batch = inputs[chosen].to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                out = module(batch)
            loss = functional.cross_entropy(out.float(), labels[chosen])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own is unannotated
            optimiser.step()
            schedule.step()


@torch.no_grad()
def spoil(module: nn.Module) -> None:
    """Scale the channels between each block's two convolutions by 10^U(−1, 1).

    ReLU(s·x) = s·ReLU(x) for s > 0, so the function stays and one scale per tensor fits it badly.
    """
    for block in module.modules():
        if isinstance(block, Residual):
            scale = 10 ** (2 * torch.rand(block.bn1.num_features) - 1)
            block.bn1.weight *= scale
            block.bn1.bias *= scale
            block.conv2.weight /= scale[:, None, None]
