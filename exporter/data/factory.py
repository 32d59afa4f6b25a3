"""Samples that somebody's own code makes: ``package.module:factory`` or ``file.py:factory``.

The factory is called with nothing, and returns the inputs; or (inputs, labels); or anything with a
length whose items are an input or (input, label), as a dataset of PyTorch is. Its words come from a
command line or from a program, and never from a profile.
"""

from __future__ import annotations

import hashlib
from typing import Any

from exporter.data.arrays import Asked, Stored, gather
from exporter.data.gathered import Gathered
from exporter.errors import InputRefused
from exporter.given_code import Words, refusing
from exporter.records import Array


def gather_made(words: str, asked: Asked) -> Gathered:
    """Return what a factory makes as samples. Raises `InputRefused`, `UnknownName`."""
    named = Words.of(words)
    said, factory = named.said, named.load()
    if not callable(factory):
        raise InputRefused(f"{said} is an object of type {type(factory).__name__}, and no factory")
    with refusing(f"{said} raised"):
        made = factory()
        stored, labels = _stored(made, said)
    return gather(said, "a factory", stored, labels, asked)


def _stored(made: Any, said: str) -> tuple[Stored, Array | None]:
    if isinstance(made, tuple) and len(made) == 2 and all(hasattr(part, "shape") for part in made):
        inputs, labels = map(_array, made)
        return Stored(inputs.shape, inputs.dtype, lambda chosen: inputs[chosen]), labels
    if hasattr(made, "shape") and hasattr(made, "dtype"):
        inputs = _array(made)
        return Stored(inputs.shape, inputs.dtype, lambda chosen: inputs[chosen]), None
    if not (hasattr(made, "__len__") and hasattr(made, "__getitem__")):
        raise InputRefused(
            f"{said} gives an object of type {type(made).__name__}",
            hint="return inputs, (inputs, labels), or a dataset with a length and items",
        )
    if not len(made):
        raise InputRefused(f"{said}: no samples in it")
    return _dataset(made, said)


def _dataset(made: Any, said: str) -> tuple[Stored, Array | None]:
    """Return a dataset's rows. Its labels are looked up once; items must stay what they are."""
    import numpy as np

    labels: list[int] = []
    digests: list[bytes] = []
    for index in range(len(made)):
        item = made[index]
        if isinstance(item, tuple | list) and len(item) == 2:
            labels.append(int(item[1]))
            item = item[0]
        digests.append(hashlib.sha256(_array(item).tobytes()).digest())
        if index == 0:
            first = _array(item)
    if labels and len(labels) < len(made):
        raise InputRefused(f"{said}: {len(labels)} of {len(made)} samples have a label")

    def rows(chosen: Array) -> Array:
        found = []
        for index in map(int, chosen):
            item = made[index]
            item = _array(item[0] if labels else item)
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
