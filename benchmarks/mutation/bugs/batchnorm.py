"""Bugs of BatchNorms and of their fold: made by folding a network that was changed first.

BN(x) = a·x + c            a = γ / √(σ² + ε),  c = β − a·μ
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from mutation.bugs.site import DoesNotApply, Site, norms, upstream
from mutation.nets import pictures

_EXACT = ("fp32", "int8")  # of less than half's roundoff: in a half graph they change nothing


def _one(site: Site, change: Callable[[Any], None]) -> None:
    """Change one BatchNorm, which the seed chooses."""
    site.refold(lambda module: change(site.pick(norms(module))))


def _all(site: Site, change: Callable[[Any], None]) -> None:
    site.refold(lambda module: [change(norm) for norm in norms(module)] and None)


@upstream(*_EXACT)
def batchnorm_epsilon_of_another_framework(site: Site) -> None:
    """ε is 1e-3, which is Keras's default, where PyTorch's 1e-5 was trained with."""
    _all(site, lambda norm: setattr(norm, "eps", 1e-3))


@upstream(*_EXACT)
def batchnorm_epsilon_lost(site: Site) -> None:
    """A fold divides by √σ² and forgets ε."""
    _all(site, lambda norm: setattr(norm, "eps", 0.0))


@upstream(*_EXACT)
def batchnorm_epsilon_outside_the_root(site: Site) -> None:
    """A fold divides by √σ² + ε, where √(σ² + ε) was meant."""

    def change(norm: Any) -> None:
        norm.running_var.copy_((norm.running_var.sqrt() + norm.eps) ** 2 - norm.eps)

    _all(site, change)


@upstream()
def running_statistics_swapped(site: Site) -> None:
    """A name-by-name copy of weights puts running_mean where running_var belongs, and back."""

    def change(norm: Any) -> None:
        mean, variance = norm.running_mean.clone(), norm.running_var.clone()
        norm.running_mean.copy_(variance)
        norm.running_var.copy_(mean.abs() + 0.01)

    _one(site, change)


@upstream()
def momentum_read_the_other_way(site: Site) -> None:
    """Momentum weighs the old statistics in one framework, the new ones in another: one update."""

    def change(module: nn.Module) -> None:
        for norm in norms(module):
            norm.momentum = 0.9
        module.train()
        module(torch.from_numpy(pictures(8, seed=7)))
        module.eval()

    site.refold(change)


@upstream()
def exported_in_training_mode(site: Site) -> None:
    """One forward pass in training mode, say of a dry run, moves the statistics by a tenth."""

    def change(module: nn.Module) -> None:
        module.train()
        module(torch.from_numpy(pictures(8, seed=8)))
        module.eval()

    site.refold(change)


@upstream(*_EXACT)
def variance_without_bessels_correction(site: Site) -> None:
    """The running variance is taken with n where n − 1 was, for batches of 32 pictures."""
    _all(site, lambda norm: norm.running_var.mul_(1 - 1 / (32 * 256)))


@upstream()
def deviation_taken_for_variance(site: Site) -> None:
    """A framework stores σ, and the converter takes it for σ²."""
    _one(site, lambda norm: norm.running_var.copy_(norm.running_var.sqrt()))


@upstream()
def gamma_ignored(site: Site) -> None:
    """A BatchNorm is taken for one without affine parameters, and γ is lost."""
    _one(site, lambda norm: norm.weight.fill_(1.0))


@upstream()
def beta_ignored(site: Site) -> None:
    """β is lost."""
    _one(site, lambda norm: norm.bias.zero_())


@upstream()
def running_mean_ignored(site: Site) -> None:
    """The fold adds β, and forgets −a·μ."""
    _one(site, lambda norm: norm.running_mean.zero_())


@upstream()
def sign_of_gamma_lost(site: Site) -> None:
    """A fold takes γ for positive, as for behind a ReLU |γ| is what passes it."""
    _one(site, lambda norm: norm.weight.abs_())


@upstream()
def statistics_of_another_batchnorm(site: Site) -> None:
    """Two BatchNorms of one width have changed places."""

    def change(module: nn.Module) -> None:
        found = norms(module)
        pairs = [
            (one, other)
            for i, one in enumerate(found)
            for other in found[:i]
            if one.num_features == other.num_features
        ]
        one, other = site.pick(pairs)
        mine, theirs = ({k: v.clone() for k, v in n.state_dict().items()} for n in (one, other))
        one.load_state_dict(theirs)
        other.load_state_dict(mine)

    site.refold(change)


def _fed(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield each convolution and the BatchNorm right behind it, as they stand in the network."""
    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)]
    for one, other in pairwise(layers):
        if isinstance(one, nn.Conv2d) and isinstance(other, nn.BatchNorm2d):
            yield one, other


@upstream()
def convolutions_bias_lost_in_the_fold(site: Site) -> None:
    """The fold sets b to c, where a·b + c was meant: right only for convolutions without bias."""

    def change(module: nn.Module) -> None:
        pairs = [convolution for convolution, _ in _fed(module) if convolution.bias is not None]
        site.pick(pairs).bias.zero_()

    site.refold(change)


@upstream()
def batchnorm_folded_twice(site: Site) -> None:
    """A fold runs on a network that is folded already, and scales the weights once more."""

    def change(module: nn.Module) -> None:
        convolution, norm = site.pick(list(_fed(module)))
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        if len(scale) != len(convolution.weight):
            raise DoesNotApply
        convolution.weight.mul_(scale.view(-1, 1, 1, 1))

    site.refold(change)


@upstream("fp32", "int8")
def relu_and_batchnorm_change_places(site: Site) -> None:
    """Conv→ReLU→BatchNorm is taken for Conv→BatchNorm→ReLU, or the other way round."""

    def change(module: nn.Module) -> None:
        places = []
        for parent in module.modules():
            names = [name for name, _ in parent.named_children()]
            for one, other in (
                *pairwise(names),
                ("bn1", "act1"),
                ("bn2", "act2"),
            ):
                pair = getattr(parent, one, None), getattr(parent, other, None)
                kinds = {type(part) for part in pair}
                if nn.BatchNorm2d in kinds and kinds & {nn.ReLU, nn.ReLU6}:
                    places.append((parent, one, other, pair))
        # In a residual block the next child is not the next layer; its activation is shared.
        fitting = [p for p in places if type(p[0]).__name__ != "Residual"]
        parent, one, other, pair = site.pick(fitting)
        setattr(parent, one, pair[1])
        setattr(parent, other, pair[0])

    site.refold(change)
