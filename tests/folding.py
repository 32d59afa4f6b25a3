"""What the tests of folding share: networks are folded, and compared with float64 unfolded."""

from __future__ import annotations

from copy import deepcopy

import torch
from conftest import disturb
from torch import nn

from exporter.fold import Folded, fold_batchnorm

EXACT = 1e-12
PICTURE = torch.randn(3, 4, 9, 9, generator=torch.Generator().manual_seed(0))


def normalisations(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def batchnorms(module: nn.Module) -> int:
    return len(normalisations(module))


def hostile(
    module: nn.Module, seed: int = 0, *, deviations: float = 3.0, decades: int = 3
) -> nn.Module:
    """Give every BatchNorm statistics over orders of magnitude, of all signs, some γ = 0."""
    generator = torch.Generator().manual_seed(seed)
    for layer in normalisations(module):
        size = layer.num_features

        def spread(low: float, high: float, size=size) -> torch.Tensor:
            return 10 ** (low + (high - low) * torch.rand(size, generator=generator))

        sign = torch.randint(-1, 2, (size,), generator=generator)
        if layer.affine:
            layer.weight.data = sign * spread(-decades, decades)
            layer.bias.data = torch.randn(size, generator=generator) * spread(-1, 1)
        layer.running_var = spread(-decades, decades)
        far = deviations * torch.randn(size, generator=generator)
        layer.running_mean = far * layer.running_var.sqrt()
    return module.eval()


def compare(module: nn.Module, x: torch.Tensor, **options) -> Folded:
    """Fold in float64, and in float32; hold both against float64 unfolded, and return the first."""
    double = deepcopy(module).double()
    result = fold_batchnorm(double, **options)
    with torch.inference_mode():
        want = double(x.double())
        got = result.module(x.double())
        plain = module(x.float())
        single = fold_batchnorm(module, **options).module(x.float())
    size = want.norm() or torch.ones(())
    assert (got - want).norm() <= EXACT * size
    own = (plain - want).norm() / size
    assert (single - want).norm() / size <= 3 * own + 1e-7
    assert batchnorms(result.module) <= len(result.kept)
    assert all(fate.detail for fate in result.fates)
    measured = [fate.error for fate in result.fates if fate.folded]
    if "example" in options:
        assert all(error is not None and error <= EXACT for error in measured)
    else:
        assert measured == [None] * len(measured)
    return result


def check(
    module: nn.Module, x: torch.Tensor, *, folded: bool = True, centred: bool = False, **options
) -> list[str]:
    """Compare, with statistics that matter; all go or none. Return what was said."""
    module = disturb(deepcopy(module)).eval()
    if centred:
        for layer in normalisations(module):
            layer.running_mean *= 0.1 * layer.running_var.sqrt()
    result = compare(module, x, **options)
    assert len(result.fates) == batchnorms(module)
    assert batchnorms(result.module) == (0 if folded else batchnorms(module))
    return [str(fate).partition(" (error")[0] for fate in result.fates]
