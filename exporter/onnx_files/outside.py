"""Where an ONNX file says that its tensors' numbers are, looked at before anything opens that.

A location is a plain relative path inside the model's own folder, of a regular file that has one
name and is reached through no link; a region of it is inside the file, exactly as long as its
tensor, and no other tensor's. ONNX's own checker lets negative offsets and lengths past the end
through, ONNX Runtime hard links, and all read a location with a NUL in it up to that.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from math import prod
from pathlib import Path

from exporter.errors import InputRefused
from exporter.onnx_files.wire import Tensor
from exporter.words import quoted

_KEYS = {"location", "offset", "length", "checksum", "basepath"}
_NUMBER = re.compile(r"[0-9]{1,18}")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_HINT = "save it again, where it was made: onnx.save(model, path, save_as_external_data=True)"
# fmt: off
BITS = {  # of an element, by TensorProto.DataType; text has none
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64,
    15: 128, 16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}
# fmt: on


def tensor_bytes(tensor: Tensor) -> int:
    """Return how many bytes a tensor's numbers take as ONNX stores them. Raises `InputRefused`."""
    if tensor.kind not in BITS:
        raise InputRefused(f"the tensor {quoted(tensor.name)} is of the unknown type {tensor.kind}")
    if any(size < 0 for size in tensor.dims):
        raise InputRefused(f"the tensor {quoted(tensor.name)} has a negative size: {tensor.dims}")
    return -(-prod(tensor.dims) * BITS[tensor.kind] // 8)


def check_outside(path: Path, tensors: Iterable[Tensor], *, opened: bool) -> int:
    """Check where tensors' numbers are outside of the file at ``path``; return their bytes.

    Where nothing is ``opened``, files may be gone. Raises `InputRefused`.
    """
    regions: dict[Path, list[tuple[int, int, str]]] = {}
    files: dict[str, tuple[Path, int | None]] = {}
    total = 0
    for tensor in tensors:
        try:
            location, start, end = _region(tensor)
            if location not in files:
                files[location] = _file(path, location, opened=opened)
            place, size = files[location]
            if size is not None and end > size:
                raise InputRefused(
                    f"it ends at byte {end:,} of {quoted(location)}, which has {size:,}"
                )
        except InputRefused as error:
            raise InputRefused(
                f"the external data of {quoted(tensor.name)}: {error}", hint=error.hint
            ) from error
        regions.setdefault(place, []).append((start, end, tensor.name))
        total += end - start
    for found in regions.values():
        found.sort()
        for (_, end, one), (start, _, other) in pairwise(found):
            if start < end:
                raise InputRefused(
                    f"the external data of {quoted(one)} and of {quoted(other)} overlap", hint=_HINT
                )
    return total


def _region(tensor: Tensor) -> tuple[str, int, int]:
    """Return the location of a tensor's numbers, where in it they begin and end."""
    said = dict(tensor.external)
    if len(said) < len(tensor.external):
        raise InputRefused("a key of it is there twice")
    if unknown := sorted(set(said) - _KEYS):
        raise InputRefused(f"the key {quoted(unknown[0])} is none of ONNX's")
    if said.get("basepath"):
        raise InputRefused(f"its basepath {quoted(said['basepath'])} leads elsewhere", hint=_HINT)
    start = _number(said, "offset", 0)
    needed = tensor_bytes(tensor)
    length = _number(said, "length", needed)
    if length != needed:
        raise InputRefused(f"its length is {length:,} bytes, where its shape needs {needed:,}")
    return said.get("location", ""), start, start + length


def _parts(location: str) -> list[str]:
    """Return the names that a location goes through. Raises `InputRefused` unless it is plain."""
    if not location:
        raise InputRefused("it has no location")
    shown = quoted(location)
    if not location.isprintable():
        raise InputRefused(f"its location {shown} has a character that does not print")
    if location.startswith("/") or re.match(r"[A-Za-z]:|\\", location):
        raise InputRefused(f"its location {shown} is absolute, and must lie beside the model")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", location):
        raise InputRefused(f"its location {shown} is an address, and not a file beside the model")
    if "\\" in location:
        raise InputRefused(f"its location {shown} has a backslash")
    if location[0] == "~" or "$" in location or "%" in location:
        raise InputRefused(f"its location {shown} names a home folder or a variable")
    if unicodedata.normalize("NFC", location) != location:
        raise InputRefused(f"its location {shown} is not in Unicode's composed form")
    parts = location.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InputRefused(f"its location {shown} does not go straight down from the model")
    if any(part[-1] in ". " or _RESERVED.fullmatch(part) for part in parts):
        raise InputRefused(f"its location {shown} means another file on another system")
    return parts


def _number(said: dict[str, str], key: str, default: int) -> int:
    text = said.get(key, str(default))
    if not _NUMBER.fullmatch(text):
        raise InputRefused(f"its {key} {quoted(text)} is no whole number of bytes")
    return int(text)


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def _file(path: Path, location: str, *, opened: bool) -> tuple[Path, int | None]:
    """Return the file and its size; None where it is gone and nothing is opened."""
    parts = _parts(location)
    place = path.parent
    found: os.stat_result | None = None
    for number, part in enumerate(parts, start=1):
        if not place.is_dir() or part not in _names(place):  # as it is spelt
            if opened:
                raise InputRefused(f"there is no file {quoted(location)} beside the model")
            return path.parent.joinpath(*parts), None
        place = place / part
        found = place.lstat()
        if stat.S_ISLNK(found.st_mode):
            raise InputRefused(f"its location {quoted(location)} goes through a symbolic link")
        if number < len(parts) and not stat.S_ISDIR(found.st_mode):
            raise InputRefused(f"its location {quoted(location)} goes through what is no folder")
    assert found is not None  # there is a part
    if not stat.S_ISREG(found.st_mode):
        raise InputRefused(f"its location {quoted(location)} is no regular file")
    if found.st_nlink > 1:
        raise InputRefused(f"{quoted(location)} has another name elsewhere (a hard link)")
    if os.path.samestat(found, path.stat()):
        raise InputRefused(f"its location {quoted(location)} is the model itself")
    return place, found.st_size
