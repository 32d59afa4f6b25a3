"""What is claimed of the cost of VGG-16, beside ResNet-18 and beside itself without its head.

Networks are counted as they are published: VGG-16 at 3×224×224 with 1,000 classes, ResNet-18 at
1×224×224 with ten. Nothing is computed: shapes do for it.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from exporter.claims.verdicts import of_parts, rounds_to
from exporter.flops import count_module
from exporter.models.resnet18 import ResNet18
from exporter.models.vgg import Vgg
from exporter.records import Claim, Cost

if TYPE_CHECKING:
    import torch
    from torch import nn

    from exporter.contracts import Model

_HUGE = 0.5  # a share from which on a part is what a cost is about


class Network(NamedTuple):
    """A network on the meta device, and what it costs."""

    module: nn.Module
    shape: tuple[int, ...]
    cost: Cost

    @classmethod
    def of(cls, model: Model) -> Network:
        import torch

        with torch.device("meta"):
            module = model.module()
        return cls(module, model.input.shape, count_module(module, model.input.shape))

    @property
    def head(self) -> Cost:
        """Return the part of the linear layers."""
        return Cost(tuple(layer for layer in self.cost.layers if layer.op == "linear"), {})


def check() -> tuple[Claim, ...]:
    """Return the claims with their verdicts."""
    vgg, averaged = Network.of(Vgg()), Network.of(Vgg(head="average"))
    resnet = Network.of(ResNet18())
    return (
        _arithmetic(vgg),
        _formula(vgg, resnet),
        _parameters(vgg),
        _linear_parameters(vgg),
        _linear_share(vgg, resnet),
        _linear_cost(vgg),
        _averaging(vgg, averaged),
    )


def _arithmetic(vgg: Network) -> Claim:
    macs, flops = vgg.cost.macs, vgg.cost.flops
    return Claim(
        "VGG-16 needs 15.5 G FLOPs at 224×224",
        f"{macs / 1e9:.2f} G multiply-accumulates, which are {flops / 1e9:.2f} G FLOPs",
        of_parts((rounds_to(flops / 1e9, "15.5"), rounds_to(macs / 1e9, "15.5"))),
        {"macs": macs, "flops": flops},
    )


def _formula(*networks: Network) -> Claim:
    from torch.utils.flop_counter import FlopCounterMode

    figures: dict[str, float] = {}
    parts, words = [], []
    for name, network in zip(("VGG-16", "ResNet-18"), networks, strict=True):
        with FlopCounterMode(display=False) as counter:
            _run(network.module, network.shape)
        theirs, sums = counter.get_total_flops() / 2, _by_formula(network)
        figures |= {f"{name} by formula": sums, f"{name} by PyTorch": theirs}
        parts.append(sums == theirs)
        words.append(f"{name}: {sums:,} by the formula, {theirs:,.0f} by PyTorch's counter")
    return Claim(
        "the arithmetic is Σ K²·C_in·C_out·H·W over the layers",
        f"{'; '.join(words)} (multiply-accumulates, a linear layer being a 1×1 convolution)",
        of_parts(parts),
        figures,
    )


def _parameters(vgg: Network) -> Claim:
    found = vgg.cost.parameters
    return Claim(
        "VGG-16 has 138 M parameters",
        f"{found:,}",
        of_parts([rounds_to(found / 1e6, "138")]),
        {"parameters": found},
    )


def _linear_parameters(vgg: Network) -> Claim:
    found = vgg.head.parameters
    return Claim(
        "122 M of them are in its three linear layers",
        f"{found:,}, which is {found / 1e6:.0f} M",
        of_parts([rounds_to(found / 1e6, "122")]),
        {"linear parameters": found},
    )


def _linear_share(vgg: Network, resnet: Network) -> Claim:
    share, other = (one.head.parameters / one.cost.parameters for one in (vgg, resnet))
    return Claim(
        "that is over 90 % of them",
        f"{share:.1%}; of ResNet-18's {resnet.cost.parameters:,} parameters, the linear layer has "
        f"{resnet.head.parameters:,}, {other:.2%}",
        of_parts([share > 0.9]),
        {"share": share, "ResNet-18's share": other},
    )


def _linear_cost(vgg: Network) -> Claim:
    arithmetic = vgg.head.macs / vgg.cost.macs
    memory = vgg.head.weight_bytes / vgg.cost.weight_bytes
    return Claim(
        "the three linear layers of VGG-16 cost a huge amount",
        f"{arithmetic:.1%} of its multiply-accumulates and {memory:.1%} of its weight bytes",
        of_parts((arithmetic > _HUGE, memory > _HUGE)),
        {"share of MACs": arithmetic, "share of weight bytes": memory},
    )


def _averaging(vgg: Network, averaged: Network) -> Claim:
    before, after = vgg.cost, averaged.cost
    return Claim(
        "an adaptive average pool in place of the linear layers saves parameters",
        f"VGG-16: {before.parameters:,} → {after.parameters:,} parameters, "
        f"{before.weight_bytes / 1e6:.1f} → {after.weight_bytes / 1e6:.1f} MB of weights, "
        f"{before.macs / 1e9:.2f} → {after.macs / 1e9:.2f} G multiply-accumulates, "
        f"{(before.peak_bytes or 0) / 1e6:.1f} → {(after.peak_bytes or 0) / 1e6:.1f} MB of "
        "activations at the peak",
        of_parts([after.parameters < before.parameters]),
        {
            "parameters before": before.parameters,
            "parameters after": after.parameters,
            "MACs before": before.macs,
            "MACs after": after.macs,
        },
    )


def _by_formula(network: Network) -> int:
    """Return the sum over the layers, from their own attributes and the sizes of their outputs."""
    from torch import nn

    sums = []

    def note(module: nn.Module, _: object, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            kernel = prod(module.kernel_size) * module.in_channels // module.groups
            sums.append(kernel * module.out_channels * prod(output.shape[2:]))
        elif isinstance(module, nn.Linear):
            sums.append(module.in_features * module.out_features)

    hooks = [part.register_forward_hook(note) for part in network.module.modules()]
    _run(network.module, network.shape)
    for hook in hooks:
        hook.remove()
    return sum(sums)


def _run(module: nn.Module, shape: tuple[int, ...]) -> None:
    import torch

    with torch.no_grad():
        module(torch.empty(1, *shape, device="meta"))
