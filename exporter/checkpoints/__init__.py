"""A file of weights that a stranger made, read: its tensors by name, or what it is instead.

    file ─ kinds ─┬─ safetensors ───────────────────────────────┐
                  ├─ zip ──── archive ─┐                        ├─ tensors by name
                  ├─ legacy ───────────┴ pickles ─ isolated ────┘
                  └─ anything else: named for what it is, with the way out

safetensors holds no code and is read as it is. A PyTorch checkpoint is a pickle, a program, so it
passes three walls: a zip archive must be as `torch.save` writes it (`archive`), its pickle must
import nothing but what a state dict needs (`pickles`), and only then does
``torch.load(weights_only=True)`` open it, in a process of its own with a limit on memory and time
(`isolated`). Nothing turns one of them off.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from exporter.checkpoints.archive import check_archive
from exporter.checkpoints.isolated import Named, load_isolated
from exporter.checkpoints.kinds import FETCH, PICKLE, SAVE, Format, kind_of
from exporter.checkpoints.pickles import check_legacy, check_pickle, refuse_pickle
from exporter.errors import ExportError, InputRefused
from exporter.words import plain, quoted

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "plain", "quoted", "read_checkpoint"]

_LONGEST_PATH = 4096
LARGEST_HEADER = 16 << 20  # of a safetensors file: a hundred thousand tensors need less
_FORMATS = {
    "safetensors": "safetensors, which has no checksum",
    "zip": "PyTorch checkpoint, CRC-32 checked",
    "legacy": "PyTorch checkpoint of before 1.6, which has no checksum",
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a file, each by the keys of the dicts that it is in, outermost first.

    ``name`` is the file's own, without its folder, fit to be shown. ``format`` says in words what
    the file is, and whether a changed bit would have been seen.
    """

    name: str
    sha256: str
    format: str
    tensors: dict[tuple[str, ...], torch.Tensor]


def read_checkpoint(path: Path) -> Checkpoint:
    """Return what a file of weights holds. No code from it runs.

    Raises `InputRefused` saying what the file is instead, or what in it is not as it must be, and
    `OutOfMemory` if loading it takes more than a file of its size can need.
    """
    name = plain(path.name)
    with _open(path) as stream:
        try:
            before = os.fstat(stream.fileno())
            kind = kind_of(stream)
            if kind is PICKLE:
                raise refuse_pickle(stream)
            if kind.format is None:
                raise InputRefused(kind.what, hint=kind.hint)
            tensors = _tensors(kind.format, path, stream, before.st_size)
            digest = _digest(stream)
            if {_version(os.fstat(stream.fileno())), _version(_now(path))} != {_version(before)}:
                raise InputRefused("it was changed while it was read", hint="try again")
        except ExportError as error:
            raise type(error)(f"{name}: {error}", hint=error.hint) from error
    return Checkpoint(name, digest, _FORMATS[kind.format], tensors)


def _tensors(held: Format, path: Path, stream: BinaryIO, size: int) -> Named:
    if held == "safetensors":
        return _safetensors(path, stream, size)
    if held == "zip":
        check_pickle(check_archive(stream, size))
    else:
        check_legacy(stream)
    return load_isolated(stream, size)


def _open(path: Path) -> BufferedReader:
    """Open a regular file, and nothing that reading would wait for or act on."""
    shown = plain(path, most=_LONGEST_PATH)
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.open("rb")
    except FileNotFoundError as error:
        raise InputRefused(f"{shown}: no such weights file") from error
    except ValueError as error:  # a NUL in it
        raise InputRefused(f"{shown}: no file can be named so") from error
    except OSError as error:
        raise InputRefused(f"{shown}: cannot be read: {error.strerror or error}") from error
    what = next((words for test, words in _SPECIAL if test(mode)), "a special file")
    raise InputRefused(f"{shown}: {what}, not a file, so it holds no weights")


_SPECIAL = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _digest(stream: BinaryIO) -> str:
    """Return the file's SHA-256, wherever a process that shares it has left its position."""
    with open(stream.fileno(), "rb", buffering=0, closefd=False) as unbuffered:
        unbuffered.seek(0)
        return hashlib.file_digest(unbuffered, "sha256").hexdigest()


def _now(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _version(found: os.stat_result | None) -> tuple[int, ...]:
    """Return what tells a file, as it is, from another and from what it was."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) if found else ()


def _safetensors(path: Path, stream: BinaryIO, size: int) -> Named:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_header(stream, size)
    try:
        return {(key,): value for key, value in load_file(path).items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise InputRefused(
            f"a safetensors file that is truncated or damaged: {plain(error)}", hint=FETCH
        ) from error


def _check_header(stream: BinaryIO, size: int) -> None:
    """Raise `InputRefused` for a header of many megabytes, or that has one name twice.

    The format forbids the latter, and its reader takes the last of them.
    """
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if length > size - 8:
        raise InputRefused(
            f"a safetensors file that is cut short: its header has {length:,} bytes, and "
            f"{max(0, size - 8):,} are there",
            hint=FETCH,
        )
    if length > LARGEST_HEADER:
        raise InputRefused(
            f"its header has {length:,} bytes, where {LARGEST_HEADER:,} suffice for any network",
            hint=SAVE,
        )
    try:
        json.loads(stream.read(length), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InputRefused("a safetensors file whose header is damaged", hint=FETCH) from error


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputRefused(f"its header has the name {quoted(twice)} twice", hint=SAVE)
    return table
