"""What a zip archive must be before PyTorch may open it.

`torch.save` stores its entries as they are, once each, under one folder, and ends the file with its
directory. PyTorch's reader takes much more than that: compressed entries of any size, entries that
overlap, a second directory, data whose CRC is wrong. What is not as `torch.save` writes it is
refused here, so that the file's size bounds what can come out of it, and so that it can be read in
one way only.

    ends in its directory          no comment, nothing before, between or behind its parts
    every entry stored             not compressed, not encrypted
    sizes inside the file          no two entries overlap, the local header says the same
    names once                     also in other letter case, which PyTorch's reader ignores
    CRC-32 of every entry          PyTorch does not look at it; one flipped bit is found
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from exporter.checkpoints.kinds import CHECKPOINT, ENCRYPTED, FETCH, SAVE, archive_kind
from exporter.checkpoints.pickles import LARGEST_PICKLE
from exporter.errors import InputRefused
from exporter.words import quoted

MOST_ENTRIES = 50_000  # no network has so many tensors
_LARGEST_DIRECTORY = 32 << 20
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_IN_64 = 0xFFFFFFFF  # the number is in a field of 64 bits
_UNSET = (*(0xFFFF,) * 4, *(_IN_64,) * 2)
_CENTRAL = struct.Struct("<4s24x3H12x")  # only what tells where the next one is
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 1
_DESCRIBED_BEHIND = 8  # sizes and CRC may follow the data instead


class _Directory(NamedTuple):
    entries: int
    offset: int
    size: int


def read_names(stream: BinaryIO, size: int) -> list[zipfile.ZipInfo]:
    """Return the entries that the archive's directory lists.

    Raises `InputRefused` unless the directory is where it must be, and has so many entries as it
    says, and no more than a network's weights can have.
    """
    directory = _directory(stream, size)
    if directory.entries > MOST_ENTRIES or directory.size > _LARGEST_DIRECTORY:
        raise InputRefused(
            f"a zip archive of {directory.entries:,} entries, where weights have {MOST_ENTRIES:,} "
            "at the most",
            hint=SAVE,
        )
    stream.seek(directory.offset)
    listing, at = stream.read(directory.size), 0
    for _ in range(directory.entries):
        if at + _CENTRAL.size > len(listing) or not listing.startswith(b"PK\1\2", at):
            raise _broken("its directory has fewer entries than it says")
        _, name, extra, comment = _CENTRAL.unpack_from(listing, at)
        at += _CENTRAL.size + name + extra + comment
    if at != len(listing):
        raise _broken("its directory is longer than its entries")
    try:
        with zipfile.ZipFile(stream) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise _broken(f"{error}") from error


def check_archive(stream: BinaryIO, size: int) -> bytes:
    """Return the pickle of a checkpoint that is as `torch.save` writes it.

    Raises `InputRefused` saying what the archive is instead, or which entry is not as it must be.
    """
    entries = read_names(stream, size)
    kind = archive_kind([entry.filename for entry in entries])
    if any(entry.flag_bits & _ENCRYPTED for entry in entries):
        kind = ENCRYPTED
    if kind is not CHECKPOINT:
        raise InputRefused(kind.what, hint=kind.hint)
    pickle = f"{_one_folder(entries)}/data.pkl"
    for entry in entries:
        if entry.filename == pickle and entry.file_size > LARGEST_PICKLE:
            raise InputRefused(
                f"its entry {quoted(pickle)} has {entry.file_size:,} bytes, where that of a "
                f"network's weights has {LARGEST_PICKLE:,} at the most",
                hint=SAVE,
            )
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise InputRefused(
                f"its entry {quoted(entry.filename)} is compressed, to {entry.compress_size:,} of "
                f"{entry.file_size:,} bytes, and torch.save compresses nothing",
                hint=f"unpack and save it again, or {SAVE}",
            )
    _check_places(stream, size, entries)
    with zipfile.ZipFile(stream) as archive:
        try:
            wrong = archive.testzip()
        except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError) as error:
            raise _broken(f"{error}") from error
        if wrong is not None:
            raise InputRefused(
                f"damaged: the CRC-32 of its entry {quoted(wrong)} is wrong", hint=FETCH
            )
        return archive.read(pickle)


def _directory(stream: BinaryIO, size: int) -> _Directory:
    """Return where the directory is, which must end where the archive's last record begins."""
    trailer = _read(stream, size - _END.size, _END.size)
    if len(trailer) < _END.size or trailer[:4] != b"PK\5\6":
        raise InputRefused(
            "a zip archive that is cut short, or has something behind its end", hint=FETCH
        )
    _, disk, first, here, entries, length, offset, comment = _END.unpack(trailer)
    end = size - _END.size
    locator = _read(stream, end - _LOCATOR.size, _LOCATOR.size)
    if len(locator) == _LOCATOR.size and locator[:4] == b"PK\6\7":
        _, _, place, disks = _LOCATOR.unpack(locator)
        end -= _LOCATOR.size + _END_64.size
        record = _read(stream, end, _END_64.size)
        if place != end or disks > 1 or len(record) < _END_64.size or record[:4] != b"PK\6\6":
            raise _broken("its end of more than 4 GB is not where it says")
        _, _, _, _, disk_64, first_64, *numbers = _END_64.unpack(record)
        short = (disk, first, here, entries, length, offset)
        long = (disk_64, first_64, *numbers)
        if any(one not in (other, no) for one, other, no in zip(short, long, _UNSET, strict=True)):
            raise _broken("it has two ends, which do not say the same")
        disk, first, here, entries, length, offset = long
    if disk or first or here != entries or comment:
        raise _broken("it is in several parts, or has a comment")
    if offset + length != end:
        raise _broken("its directory is not in front of its end, or there is a second one")
    return _Directory(entries, offset, length)


def _one_folder(entries: list[zipfile.ZipInfo]) -> str:
    """Return the folder that all entries are in. Raises `InputRefused` if names are not unique."""
    names = [entry.filename for entry in entries]
    folders = {name.partition("/")[0] for name in names}
    if len(folders) != 1:
        raise _broken("its entries are in several folders")
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen:
            raise _broken(f"it has two entries {quoted(name)}")
        seen.add(name.lower())
        if "\\" in name or "\0" in name or ".." in PurePosixPath(name).parts:
            raise _broken(f"its entry {quoted(name)} is named like no entry of torch.save")
    return folders.pop()


def _check_places(stream: BinaryIO, size: int, entries: list[zipfile.ZipInfo]) -> None:
    """Raise `InputRefused` unless each entry has its own bytes, and both its headers agree."""
    free = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        header = _read(stream, entry.header_offset, _LOCAL.size)
        if entry.header_offset < free or len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
            raise _broken(f"its entry {quoted(entry.filename)} overlaps another or is not there")
        _, _, flags, method, _, _, crc, packed, whole, name, extra = _LOCAL.unpack(header)
        free = entry.header_offset + _LOCAL.size + name + extra + entry.file_size
        if free > size:
            raise _broken(f"its entry {quoted(entry.filename)} is larger than the file")
        behind = {0} if flags & _DESCRIBED_BEHIND else set()
        sizes = {entry.file_size, *behind, *({_IN_64} if extra else ())}
        if (
            (method, flags) != (entry.compress_type, entry.flag_bits)
            or crc not in {entry.CRC, *behind}
            or not {packed, whole} <= sizes
        ):
            raise _broken(f"the two headers of its entry {quoted(entry.filename)} differ")


def _read(stream: BinaryIO, offset: int, count: int) -> bytes:
    if offset < 0:
        return b""
    stream.seek(offset)
    return stream.read(count)


def _broken(why: str) -> InputRefused:
    return InputRefused(
        f"not a zip archive as torch.save writes it: {why}", hint=f"{FETCH}; or {SAVE}"
    )
