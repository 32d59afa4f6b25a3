"""Values that a network is built with, from a seed, where it is to have no trained ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

from exporter.errors import InputRefused

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")

Initial: TypeAlias = Literal["random", "factory"]
INITIAL: tuple[Initial, ...] = ("random", "factory")
SEED = 0


def from_seed(build: Callable[[], T]) -> T:
    """Return what ``build`` makes with PyTorch's generator at `SEED`, and leave that as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build()


def digest(module: nn.Module, *, name: str) -> str:
    """Return the SHA-256 of a state dict's names, types, shapes and bytes, in its own order.

    Raises `InputRefused` for a value that is NaN or infinite; ``name`` is the network's.
    """
    import torch

    found = hashlib.sha256()
    for key, tensor in module.state_dict().items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise InputRefused(
                f"{name}: tensor {key!r} holds {bad} values that are NaN or infinite"
            )
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
