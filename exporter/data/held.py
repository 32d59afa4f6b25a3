"""Samples that a program holds, or that its code has made.

They are an array or a tensor of inputs; or (inputs, labels); or anything with a length whose items
are an input or (input, label), as a dataset of PyTorch is. Of several inputs they are a dict of
arrays by their names, or items that are dicts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

from exporter.data.arrays import (
    Asked,
    Stored,
    check_each,
    check_names,
    check_one,
    gather,
    joined,
)
from exporter.data.gathered import Gathered
from exporter.errors import InputRefused
from exporter.given_code import refusing
from exporter.packing import pack
from exporter.records import Array

_NAME = "the data in memory"


class Items(Protocol):
    """What has a length, and items by their number: an array, a tensor, a tuple, a dataset."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __getitem__(self, index: Any, /) -> Any:
        """Return one of them."""


def gather_held(held: Items, asked: Asked) -> Gathered:
    """Return what a program holds as samples. Raises `InputRefused`."""
    with refusing(f"{_NAME} raised", hint="give float32 or uint8 arrays, (N, C, H, W)"):
        rows, labels = stored(held, _NAME, asked)
    return gather(_NAME, "in memory", rows, labels, asked)


def stored(made: Any, said: str, asked: Asked) -> tuple[Stored, Array | None]:
    """Return the rows of what is held, and their labels where it has some; ``said`` names it.

    Raises `InputRefused` for what is none of the kinds above, or has other inputs, and whatever a
    dataset raises.
    """
    if isinstance(made, tuple) and len(made) == 2 and all(map(_is_whole, made)):
        inputs, labels = made
        return _arrays(inputs, said, asked), as_array(labels)
    if _is_whole(made):
        return _arrays(made, said, asked), None
    if not (hasattr(made, "__len__") and hasattr(made, "__getitem__")):
        raise InputRefused(
            f"{said} gives an object of type {type(made).__name__}",
            hint="inputs, (inputs, labels), or a dataset with a length and items can be samples",
        )
    if not len(made):
        raise InputRefused(f"{said}: no samples in it")
    return _dataset(made, said, asked)


def _is_whole(made: object) -> bool:
    """Return whether it is an array of all samples, or one for each input."""
    return isinstance(made, Mapping) or is_array(made)


def _arrays(made: Any, said: str, asked: Asked) -> Stored:
    arrays = _by_input(made, said, asked)
    if len(arrays) > 1:
        check_each(said, [(array.shape, array.dtype) for array in arrays], asked)
    return joined(arrays)


def _by_input(made: Any, said: str, asked: Asked) -> list[Array]:
    """Return one array for each input. Raises `InputRefused` where a dict has others."""
    if isinstance(made, Mapping):
        return [as_array(made[name]) for name in check_names(said, made, asked)]
    check_one(said, asked)
    return [as_array(made)]


def _dataset(made: Any, said: str, asked: Asked) -> tuple[Stored, Array | None]:
    """Return a dataset's rows. Its labels are looked up once; items must stay what they are."""
    import numpy as np

    def row(item: Any) -> Array:
        parts = _by_input(item, said, asked)
        if len(parts) == 1:
            return parts[0]
        check_each(said, [((1, *part.shape), part.dtype) for part in parts], asked)
        together: Array = pack([part[None] for part in parts])[0]
        return together

    labels: list[int] = []
    digests: list[bytes] = []
    for index in range(len(made)):
        item = made[index]
        if isinstance(item, tuple | list) and len(item) == 2:
            labels.append(int(item[1]))
            item = item[0]
        found = row(item)
        digests.append(hashlib.sha256(found.tobytes()).digest())
        if index == 0:
            first = found
    if labels and len(labels) < len(made):
        raise InputRefused(f"{said}: {len(labels)} of {len(made)} samples have a label")

    def rows(chosen: Array) -> Array:
        found = []
        for index in map(int, chosen):
            item = made[index]
            item = row(item[0] if labels else item)
            if hashlib.sha256(item.tobytes()).digest() != digests[index]:
                raise InputRefused(
                    f"{said}: sample {index} is another each time",
                    hint="switch off what is random in it",
                )
            if item.shape != first.shape or item.dtype != first.dtype:
                raise InputRefused(
                    f"{said}: sample {index} is {item.shape} {item.dtype}, and sample 0 "
                    f"{first.shape} {first.dtype}"
                )
            found.append(item)
        return np.stack(found)

    shape = (len(made), *first.shape)
    return Stored(shape, first.dtype, rows), np.array(labels, np.int64) if labels else None


def is_array(value: object) -> bool:
    """Return whether something is one array or tensor."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def as_array(value: Any) -> Array:
    """Return an array, or a tensor of any device, as an array."""
    import numpy as np

    detached = value.detach().cpu().numpy() if hasattr(value, "detach") else value
    return np.asarray(detached)
