"""What a network returns, as named tensors: one, or several in a tuple, a dict or a nest of those.

They are taken in the order of `torch.export`, which is that of the graph's outputs. A tensor alone
is ``output``; in a structure it is called by the way to it, keys and attributes as they are and
positions as ``output_0``, ``output_1``, …, joined with dots:

    {"logits": y, "maps": (a, b)}      logits, maps.output_0, maps.output_1

A dataclass is such a structure once `torch.export.register_dataclass` knows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import is_dataclass
from typing import Any

from exporter.errors import InputRefused
from exporter.records import TensorSpec

ALONE = "output"


def flatten(found: object) -> dict[str, Any]:
    """Return what is in a structure, by name, in order. Raises `InputRefused` for a name twice."""
    from torch.utils import _pytree as pytree

    leaves = pytree.tree_flatten_with_path(found)[0]
    names = [".".join(map(_key, path)) if path else ALONE for path, _ in leaves]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputRefused(f"two outputs are called {twice[0]!r}")
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def _key(key: Any) -> str:
    from torch.utils import _pytree as pytree

    if isinstance(key, pytree.SequenceKey):
        return f"output_{key.idx}"
    return str(key.name if isinstance(key, pytree.GetAttrKey) else key.key)


def check_outputs(
    found: object, *, name: str, batch: int, taken: Collection[str]
) -> tuple[TensorSpec, ...]:
    """Return the tensors that a network gives, their shapes without the batch axis.

    ``taken`` are the inputs' names. Raises `InputRefused` unless all are float32, (batch, …), not
    empty, and with names of their own.
    """
    tensors = flatten(found)
    if not tensors:
        raise InputRefused(f"{name} gives nothing: an empty {type(found).__name__}")
    for own, tensor in tensors.items():
        if not own or own in taken:
            raise InputRefused(
                f"{name} gives an output called {own!r}, "
                + ("as an input is" if own else "and a graph needs a name"),
                hint="give it another key",
            )
        if (odd := _unfit(tensor, batch)) is not None:
            said, hint = odd
            where = "" if tensor is found else f" as {own!r}"
            raise InputRefused(
                f"{name} gives {said}{where}; only float32 tensors, (N, …), can be judged so far",
                hint=hint or "export a module of your own that calls it and returns such tensors",
            )
    return tuple(TensorSpec(own, tuple(tensor.shape[1:])) for own, tensor in tensors.items())


def _unfit(found: Any, batch: int) -> tuple[str, str | None] | None:
    """Return what is wrong with one output, and what would help if that is known."""
    import torch

    if not isinstance(found, torch.Tensor):
        kind = type(found).__name__
        known = f"torch.export.register_dataclass({kind}) makes its fields outputs"
        return f"an object of type {kind}", known if is_dataclass(found) else None
    if found.dtype != torch.float32:
        return f"a tensor of {str(found.dtype).removeprefix('torch.')}", None
    if not found.ndim or found.shape[0] != batch or not found.numel():
        shape = " × ".join(map(str, found.shape)) or "one value"
        return f"a tensor of {shape} for a batch of {batch}", None
    return None
