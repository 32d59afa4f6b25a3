"""How much of the gradient reaches the first layers, before any training.

By the chain rule the gradient at a layer's output h is a product of Jacobians, one for each layer
behind it. ‖∂L/∂h‖₂ is measured at every weighted layer, on one batch of real digits: L is the cross
entropy, BatchNorm is in training mode, dropout is off. VGG-19 is the grey one for ten classes, and
everything is 32×32, where its linear layers take 1×1.

Both usual initialisations are tried:

    as PyTorch initialises    uniform weights of variance 1 / (3 · inputs)
    as He et al. do           normal weights of variance 2 / inputs, no biases ("Delving Deep into
                              Rectifiers", 2015), which keeps norms where ReLU follows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from exporter.claims.verdicts import of_parts
from exporter.contracts import Advance
from exporter.models._residual import Residual
from exporter.models._vgg import vgg_network
from exporter.models.resnet18 import ResNet18
from exporter.models.vgg import FAMILY
from exporter.records import Claim, Gradients
from exporter.samples import load_split

if TYPE_CHECKING:
    import torch
    from torch import nn

SEED = 0
BATCH = 16
SIZE = 32
VANISHED, EXPLODED = 1e-3, 1e3  # of the last layer's gradient, at the first one


def measure_all(advance: Advance = lambda: None) -> tuple[Gradients, ...]:
    """Return the gradients in every network of `NETWORKS`."""
    import torch

    inputs, labels, _ = load_split("digits", (1, SIZE, SIZE), "train")
    batch = torch.from_numpy(inputs[:BATCH]), torch.from_numpy(labels[:BATCH])
    found = []
    for name, build in NETWORKS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            found.append(measure(name, build(), *batch))
        advance()
    return tuple(found)


def measure(name: str, module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> Gradients:
    """Return ‖∂L/∂h‖₂ at the output h of every convolution and linear layer, as they run."""
    from torch import nn

    norms: dict[str, float] = {}
    order: list[str] = []

    def note(layer: str, output: torch.Tensor) -> None:
        order.append(layer)
        output.register_hook(  # type: ignore[no-untyped-call]  # torch's own is unannotated
            lambda grad: norms.update({layer: float(grad.norm())})
        )

    hooks = [
        part.register_forward_hook(lambda _, __, output, path=path: note(path, output))
        for path, part in module.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear)
    ]
    module.train()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.eval()
    nn.functional.cross_entropy(module(inputs), labels).backward()  # type: ignore[no-untyped-call]  # torch's own is unannotated
    for hook in hooks:
        hook.remove()
    return Gradients(name, tuple(order), tuple(norms[layer] for layer in order))


def judge(found: Sequence[Gradients]) -> tuple[Claim, ...]:
    """Return the claims with their verdicts."""
    ratio = {one.network: one.first_to_last for one in found}
    return (
        _claim(
            "in deep plain networks the gradient vanishes towards the first layers",
            ratio,
            {PLAIN: _vanished, PLAIN_HE: _vanished},
        ),
        _claim(
            "with factors below 1, as sigmoids have, it vanishes; above 1 it explodes",
            ratio,
            {SIGMOID: _vanished, DOUBLED: lambda left: left > EXPLODED},
        ),
        _claim(
            "residual networks keep it",
            ratio,
            {RESIDUAL: _kept},
        ),
        _claim(
            "it is the shortcuts that let it through",
            ratio,
            {
                NO_SHORTCUTS: _vanished,
                NO_BATCHNORM: _kept,
                NEITHER: _vanished,
            },
        ),
    )


def _claim(says: str, ratio: dict[str, float], wanted: dict[str, Callable[[float], bool]]) -> Claim:
    figures = {name: ratio[name] for name in wanted}
    said = "; ".join(f"{name}: {left:.1e}, {_fate(left)}" for name, left in figures.items())
    return Claim(
        says,
        f"of the last layer's gradient, at the first: {said}",
        of_parts(test(ratio[name]) for name, test in wanted.items()),
        figures,
    )


def _fate(left: float) -> str:
    return "kept" if _kept(left) else "vanished" if _vanished(left) else "exploded"


def _vanished(left: float) -> bool:
    return left < VANISHED


def _kept(left: float) -> bool:
    return VANISHED <= left <= EXPLODED


# ── The networks ────────────────────────────────────────────────────────────────────


def _vgg19() -> nn.Module:
    stages = FAMILY["vgg19"].stages
    return vgg_network(stages, channels=1, classes=10, grid=SIZE // 32)


def _he(scale: float = 1.0) -> nn.Module:
    from torch import nn

    module = _vgg19()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            layer.weight.data *= scale
            layer.bias.data.zero_()  # type: ignore[union-attr]  # all of VGG's have one
    return module


def _sigmoid() -> nn.Module:
    from torch import nn

    return _exchanged(_vgg19(), nn.ReLU, nn.Sigmoid)


def _residual(*, shortcuts: bool = True, batchnorm: bool = True) -> nn.Module:
    from torch import nn

    module = ResNet18().module()
    if not shortcuts:
        for block in module.modules():
            if isinstance(block, Residual):
                block.conv3 = _nothing()
    return module if batchnorm else _exchanged(module, nn.BatchNorm2d, nn.Identity)


def _exchanged(
    module: nn.Module, kind: type[nn.Module], other: Callable[[], nn.Module]
) -> nn.Module:
    """Return the module with another layer in place of each of one kind."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, other())
    return module


def _nothing() -> nn.Module:
    """Return a shortcut that carries nothing."""
    from torch import nn

    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(())

    return Nothing()


PLAIN = "VGG-19 as PyTorch initialises"
PLAIN_HE = "VGG-19 as He et al. do"
DOUBLED = "the same with its weights doubled"
SIGMOID = "VGG-19 with sigmoids"
RESIDUAL = "ResNet-18"
NO_SHORTCUTS = "ResNet-18 without shortcuts"
NO_BATCHNORM = "ResNet-18 without BatchNorm"
NEITHER = "ResNet-18 without either"

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    PLAIN: _vgg19,
    PLAIN_HE: _he,
    DOUBLED: lambda: _he(2.0),
    SIGMOID: _sigmoid,
    RESIDUAL: _residual,
    NO_SHORTCUTS: lambda: _residual(shortcuts=False),
    NO_BATCHNORM: lambda: _residual(batchnorm=False),
    NEITHER: lambda: _residual(shortcuts=False, batchnorm=False),
}
