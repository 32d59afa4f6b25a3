"""Samples that somebody's own code makes: ``package.module:factory`` or ``file.py:factory``.

The factory is called with nothing, and returns the inputs; or (inputs, labels); or anything with a
length whose items are an input or (input, label), as a dataset of PyTorch is. Its words come from a
command line or from a program, and never from a profile.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, util
from pathlib import Path
from typing import Any

from exporter.data.arrays import Asked, Stored, gather
from exporter.data.gathered import Gathered
from exporter.errors import ExportError, InputRefused, UnknownName
from exporter.records import Array

_WORDS = "write package.module:factory, or file.py:factory"


def is_code(words: str) -> bool:
    """Return whether the words name a factory, and no file that is there."""
    return ":" in words and not Path(words).exists()


def gather_made(words: str, asked: Asked) -> Gathered:
    """Return what a factory makes as samples. Raises `InputRefused`, `UnknownName`."""
    where, _, attribute = words.rpartition(":")
    if not where or not attribute.isidentifier():
        raise InputRefused(f"{words!r} names no factory", hint=_WORDS)
    said = f"{Path(where).name if where.endswith('.py') else where}:{attribute}"
    module = _import(where)
    if not callable(getattr(module, attribute, None)):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UnknownName(f"factory in {said.rpartition(':')[0]}", attribute, known)
    with _refusing(f"{said} raised"):
        made = getattr(module, attribute)()
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


def _import(where: str) -> Any:
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise InputRefused(f"{path.name}: no such file")
        name = f"_data_{path.stem}"
        spec = util.spec_from_file_location(name, path)
        assert spec is not None  # it ends in .py
        assert spec.loader is not None
        module = util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses look for it
        with _refusing(f"importing {path.name} raised"):
            spec.loader.exec_module(module)
        return module
    if not all(part.isidentifier() for part in where.split(".")):
        raise InputRefused(f"{where!r} is neither a module's name nor a .py file", hint=_WORDS)
    with _refusing(f"importing {where} raised"):
        return import_module(where)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn whatever code of others raises into `InputRefused`, in one line."""
    try:
        yield
    except (ExportError, KeyboardInterrupt):
        raise
    except BaseException as error:  # code of others may also try to end the process
        reason = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        raise InputRefused(
            f"{what} {type(error).__name__}{': ' if reason else ''}{reason}",
            hint="--debug shows where",
        ) from error
