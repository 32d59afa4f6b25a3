"""What is claimed of layers: tried on some, in float64, with numbers from a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.claims.verdicts import of_parts
from exporter.flops import count_module
from exporter.fold import fold_batchnorm
from exporter.models.resnet18 import ResNet18
from exporter.models.vgg import Vgg
from exporter.records import Claim
from exporter.weights import load_weights

if TYPE_CHECKING:
    import torch
    from torch import nn

SEED = 0
_EXACT = 1e-12  # a relative error in float64 below which two results are one
_SIZES = ((32, 32), (64, 64), (96, 160), (224, 224))
_CHANNELS, _SIDE = 64, 38  # of the document's network, where its first branches meet


def check() -> tuple[Claim, ...]:
    """Return the claims with their verdicts."""
    return (_sizes(), _one_affine_map(), _undone(), _sum(), _concatenation(), _exchange())


def _sizes() -> Claim:
    import torch
    from torch import nn

    resnet = ResNet18().module()
    with torch.no_grad():
        outputs = [tuple(resnet(torch.zeros(1, 1, *size)).shape) for size in _SIZES]
    with torch.device("meta"):
        plain, pooled = Vgg(channels=1).module(), Vgg(channels=1, head="average").module()
        plain.avgpool = nn.Identity()  # which torchvision puts in front of the linear layers
        linear, averaged = ([_takes(m, size) for size in _SIZES] for m in (plain, pooled))
    said = ", ".join("×".join(map(str, size)) for size in _SIZES)
    return Claim(
        "adaptive average pooling gives outputs of one size for inputs of any size",
        f"ResNet-18 gives {' and '.join(str(list(o)) for o in dict.fromkeys(outputs))} for "
        f"{said}; VGG-16 takes {sum(averaged)} of these {len(_SIZES)} with the pool, and "
        f"{sum(linear)} with its linear layers",
        of_parts([len(set(outputs)) == 1, all(averaged)]),
        {"output sizes": len(set(outputs)), "taken with": sum(averaged), "without": sum(linear)},
    )


def _takes(module: nn.Module, size: tuple[int, int]) -> bool:
    import torch

    try:
        with torch.no_grad():
            module(torch.empty(1, 1, *size, device="meta"))
    except RuntimeError:
        return False
    return True


def _one_affine_map() -> Claim:
    import torch

    model = ResNet18()
    module = model.module()
    load_weights(module, model.weights)
    x = _noise(2, 1, 64, 64)
    folded = fold_batchnorm(module.double(), x)
    with torch.no_grad():
        error = _apart(folded.module(x), module(x))
    done = sum(fate.folded for fate in folded.fates)
    return Claim(
        "at inference BatchNorm is one affine map per channel",
        f"{done} of {len(folded.fates)} BatchNorms of ResNet-18 go into its convolutions, and the "
        f"outputs differ by {error:.1e} in float64",
        of_parts([done == len(folded.fates), error < _EXACT]),
        {"folded": done, "of": len(folded.fates), "error": error},
    )


def _undone() -> Claim:
    import torch
    from torch import nn

    x = 3 * _noise(64, _CHANNELS, 8, 8) + 1
    layer = nn.BatchNorm2d(_CHANNELS, dtype=torch.float64).train()
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    with torch.no_grad():
        plain = _apart(layer(x), x)
        layer.bias.copy_(mean)
        layer.weight.copy_((variance + layer.eps).sqrt())
        error = _apart(layer(x), x)
    return Claim(
        "with its γ and β a BatchNorm can undo its normalisation",
        f"with γ = √(σ² + ε) and β = μ it gives its input back within {error:.1e} in float64; with "
        f"γ = 1 and β = 0 it differs by {plain:.2f}",
        of_parts([error < _EXACT]),
        {"error": error, "error before": plain},
    )


def _sum() -> Claim:
    x = _noise(1, _CHANNELS, _SIDE, _SIDE)
    shape = tuple((x + x).shape)
    more = _accepts(x, _noise(1, 2 * _CHANNELS, _SIDE, _SIDE))
    one = _accepts(x, _noise(1, 1, _SIDE, _SIDE))
    said = {True: "taken", False: "refused"}
    return Claim(
        "x + y needs equal shapes, and leaves them as they are",
        f"{_CHANNELS} + {_CHANNELS} channels give {shape[1]}; {_CHANNELS} + {2 * _CHANNELS} are "
        f"{said[more]}, {_CHANNELS} + 1 are {said[one]}{' (repeated in silence)' if one else ''}",
        of_parts([shape == tuple(x.shape), not more, not one]),
        {"channels": shape[1], "takes twice as many": int(more), "takes one": int(one)},
    )


def _accepts(x: torch.Tensor, y: torch.Tensor) -> bool:
    try:
        x + y
    except RuntimeError:
        return False
    return True


def _concatenation() -> Claim:
    import torch

    from exporter.models._inception import BLOCKS, Inception

    x = _noise(1, _CHANNELS, _SIDE, _SIDE)
    both = torch.cat([x, _noise(1, 2 * _CHANNELS, _SIDE, _SIDE)], 1).shape[1]
    widths = BLOCKS["inception3a"]
    with torch.device("meta"):
        block = Inception(widths)(torch.empty(2, widths.in_channels, 28, 28)).shape[1]
    branches = (widths.one, widths.three, widths.five, widths.pooled)
    return Claim(
        "torch.cat adds up the channels",
        f"{_CHANNELS} beside {2 * _CHANNELS} give {both}; GoogLeNet's first block joins "
        f"{' + '.join(map(str, branches))} to {block}",
        of_parts([both == 3 * _CHANNELS, block == sum(branches)]),
        {"channels": both, "GoogLeNet's": block},
    )


def _exchange() -> Claim:
    """Give a 3×3 convolution the one join where it was made for the other."""
    import torch
    from torch import nn

    x, y = (_noise(1, _CHANNELS, _SIDE, _SIDE) for _ in range(2))
    behind_sum, behind_cat = (
        nn.Conv2d(width, _CHANNELS, 3, padding=1, bias=False, dtype=torch.float64)
        for width in (_CHANNELS, 2 * _CHANNELS)
    )
    shape = (_CHANNELS, _SIDE, _SIDE)
    small, large = (count_module(c, (c.in_channels, *shape[1:])) for c in (behind_sum, behind_cat))
    joined = torch.cat([x, y], 1)
    fits = _fits(behind_sum, joined), _fits(behind_cat, x + y)
    with torch.no_grad():
        behind_cat.weight.copy_(torch.cat([behind_sum.weight, behind_sum.weight], 1))
        error = _apart(behind_cat(joined), behind_sum(x + y))
    return Claim(
        "neither join can stand for the other",
        f"the layer behind one takes the other in {sum(fits)} of 2 ways; a 3×3 convolution behind "
        f"the sum has {small.parameters:,} parameters and {small.macs:,} multiply-accumulates, "
        f"behind the concatenation {large.parameters:,} and {large.macs:,}, which with its weights "
        f"repeated computes the sum's within {error:.1e}",
        of_parts([not any(fits), error > _EXACT]),
        {
            "parameters behind the sum": small.parameters,
            "parameters behind the concatenation": large.parameters,
            "MACs behind the sum": small.macs,
            "MACs behind the concatenation": large.macs,
            "error": error,
        },
    )


def _fits(layer: nn.Module, x: torch.Tensor) -> bool:
    import torch

    try:
        with torch.no_grad():
            layer(x)
    except RuntimeError:
        return False
    return True


def _noise(*shape: int) -> torch.Tensor:
    """Return unit-normal float64 numbers, the same ones for the same shape."""
    import torch

    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return ‖found − wanted‖ / ‖wanted‖."""
    return float(((found - wanted).norm() / wanted.norm()).detach())
