"""Samples that somebody's own code makes: ``package.module:factory`` or ``file.py:factory``.

The factory is called with nothing, and returns the inputs; or (inputs, labels); or anything with a
length whose items are an input or (input, label), as a dataset of PyTorch is. Of several inputs it
returns a dict of arrays by their names, or items that are dicts. Its words come from a
command line or from a program, and never from a profile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

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
from exporter.given_code import Words, refusing
from exporter.packing import pack
from exporter.records import Array


def gather_made(words: str, asked: Asked) -> Gathered:
    """Return what a factory makes as samples. Raises `InputRefused`, `UnknownName`."""
    named = Words.of(words)
    said, factory = named.said, named.load()
    if not callable(factory):
        raise InputRefused(f"{said} is an object of type {type(factory).__name__}, and no factory")
    with refusing(f"{said} raised"):
        made = factory()
        stored, labels = _stored(made, said, asked)
    return gather(said, "a factory", stored, labels, asked)


def _stored(made: Any, said: str, asked: Asked) -> tuple[Stored, Array | None]:
    if isinstance(made, tuple) and len(made) == 2 and all(map(_is_whole, made)):
        inputs, labels = made
        return _arrays(inputs, said, asked), _array(labels)
    if _is_whole(made):
        return _arrays(made, said, asked), None
    if not (hasattr(made, "__len__") and hasattr(made, "__getitem__")):
        raise InputRefused(
            f"{said} gives an object of type {type(made).__name__}",
            hint="return inputs, (inputs, labels), or a dataset with a length and items",
        )
    if not len(made):
        raise InputRefused(f"{said}: no samples in it")
    return _dataset(made, said, asked)


def _is_whole(made: Any) -> bool:
    """Return whether it is an array of all samples, or one for each input."""
    return isinstance(made, Mapping) or (hasattr(made, "shape") and hasattr(made, "dtype"))


def _arrays(made: Any, said: str, asked: Asked) -> Stored:
    arrays = _by_input(made, said, asked)
    if len(arrays) > 1:
        check_each(said, [(array.shape, array.dtype) for array in arrays], asked)
    return joined(arrays)


def _by_input(made: Any, said: str, asked: Asked) -> list[Array]:
    """Return one array for each input. Raises `InputRefused` where a dict has others."""
    if isinstance(made, Mapping):
        return [_array(made[name]) for name in check_names(said, made, asked)]
    check_one(said, asked)
    return [_array(made)]


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
        digests.append(hashlib.sha256(row(item).tobytes()).digest())
        if index == 0:
            first = row(item)
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


def _array(value: Any) -> Array:
    import numpy as np

    detached = value.detach().cpu().numpy() if hasattr(value, "detach") else value
    return np.asarray(detached)
