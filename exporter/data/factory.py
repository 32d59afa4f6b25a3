"""Samples that somebody's own code makes: ``package.module:factory`` or ``file.py:factory``.

The factory is called with nothing, and returns anything that `exporter.data.held` takes. Its words
come from a command line or from a program, and never from a profile.
"""

from __future__ import annotations

from exporter.data.arrays import Asked, gather
from exporter.data.gathered import Gathered
from exporter.data.held import stored
from exporter.errors import InputRefused
from exporter.given_code import Words, refusing


def gather_made(words: str, asked: Asked) -> Gathered:
    """Return what a factory makes as samples. Raises `InputRefused`, `UnknownName`."""
    named = Words.of(words)
    said, factory = named.said, named.load()
    if not callable(factory):
        raise InputRefused(f"{said} is an object of type {type(factory).__name__}, and no factory")
    with refusing(f"{said} raised"):
        rows, labels = stored(factory(), said, asked)
    return gather(said, "a factory", rows, labels, asked)
