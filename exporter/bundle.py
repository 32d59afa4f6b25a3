"""The folder that ships: written beside its final name, then put there in one step.

Everything is written into ``.<name>.<process id>.partial`` next to the bundle, forced to the disk,
and given its final name by a rename; an older bundle is exchanged for the new one atomically where
the system can (Linux: renameat2 with RENAME_EXCHANGE). So under the final name there is always the
old bundle or the new one, whole. What a killed run left behind is removed by the next one.

A folder is only ever replaced if it is a bundle, and holds nothing but that bundle's files.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from exporter.errors import ExportError, OutputError
from exporter.records import SCHEMA, File, Found

MANIFEST = "manifest.json"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


class Manifest(Found, frozen=True):
    """Every other file of a bundle with its SHA-256, and the tools that wrote them."""

    schema: int
    tool: str
    environment: dict[str, str]
    files: tuple[File, ...]


def read_manifest(folder: Path) -> Manifest | None:
    """Return a bundle's manifest, or None if the folder is not a bundle."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


@contextmanager
def new_bundle(final: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; publish it as ``final`` if nothing was raised.

    `write_manifest` must have been called by then. Raises `OutputError` up front if ``final``
    cannot be written or holds anything but a bundle, and later if the disk refuses. Folders that
    had to be made for it are removed again if something was raised.
    """
    final = Path(os.path.abspath(final))  # noqa: PTH100 - resolve() would follow a link at the end
    made: list[Path] = []
    try:
        _refuse_foreign(final)
        made = [folder for folder in final.parents if not folder.exists()]
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final)
        partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
        partial.mkdir()
    except OSError as error:
        _remove_empty(made)
        raise _unwritable(final, error) from error
    try:
        yield partial
        _force_to_disk(partial)
        _publish(partial, final)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise _unwritable(final, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(made)


@contextmanager
def extended_bundle(final: Path, part: str) -> Iterator[Path]:
    """Yield a new folder for ``part`` of a bundle; publish them if nothing was raised.

    Everything else is taken over as it is, and so is what the manifest says of it: a file that had
    changed stays one that the manifest does not vouch for. Raises `OutputError` as `new_bundle`.
    """
    manifest = read_manifest(final)
    assert manifest is not None  # who extends a bundle has read it
    with new_bundle(final) as folder:
        shutil.copytree(final, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(part))
        (folder / part).mkdir()
        yield folder / part
        kept = tuple(f for f in manifest.files if not f.name.startswith(f"{part}/"))
        added = (File.of(path, folder) for path in sorted((folder / part).iterdir()))
        _write_manifest(folder, msgspec.structs.replace(manifest, files=(*kept, *added)))


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # the innermost first
        with suppress(OSError):
            folder.rmdir()


def write_manifest(folder: Path, *, tool: str, environment: Mapping[str, str]) -> Manifest:
    """Write ``manifest.json`` for all that is in the folder, and return it."""
    files = tuple(File.of(path, folder) for path in sorted(folder.rglob("*")) if path.is_file())
    manifest = Manifest(SCHEMA, tool, dict(environment), files)
    _write_manifest(folder, manifest)
    return manifest


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (folder / MANIFEST).write_bytes(text + b"\n")


def _refuse_foreign(final: Path) -> None:
    if final.is_symlink():
        raise OutputError(f"{final.name} is a symbolic link", hint="name the folder it points to")
    if final in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(
            f"{str(final)!r} is the current folder or holds it, and a bundle replaces its folder",
            hint="name a folder inside it, say --out build",
        )
    if not final.exists():
        return
    if not final.is_dir():
        raise OutputError(f"{final.name} is a file, where the bundle's folder would go")
    manifest = read_manifest(final)
    ours = {file.name for file in manifest.files} | {MANIFEST} if manifest else set()
    for path in final.rglob("*"):
        name = path.relative_to(final).as_posix()
        if name not in ours and (path.is_symlink() or not path.is_dir()):
            raise OutputError(
                f"{final.name} holds files that are not of a bundle, say {name!r}, so it is not "
                "replaced",
                hint="name another folder with --out, or move them away",
            )


def _remove_leftovers(final: Path) -> None:
    """Clear up after killed runs; a bundle that one had set aside goes back to its place."""
    pattern = re.compile(rf"\.{re.escape(final.name)}\.(\d+)\.partial(\.old)?")
    for leftover in final.parent.iterdir():
        found = pattern.fullmatch(leftover.name)
        if not found or _is_alive(int(found[1])):
            continue
        if found[2] and not final.exists():
            leftover.rename(final)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(process: int) -> bool:
    if process == os.getpid():
        return False  # an older process of the same id left it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _force_to_disk(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(0o666 & ~_umask())  # safetensors and others write 0600
        if path.is_file() or os.name == "posix":
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _publish(partial: Path, final: Path) -> None:
    _refuse_foreign(final)  # it may have been filled while we worked
    if not final.exists():
        partial.rename(final)
    elif not _exchange(partial, final):
        aside = final.with_name(f"{partial.name}.old")
        final.rename(aside)
        try:
            partial.rename(final)
        except OSError:
            aside.rename(final)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    if os.name == "posix":
        descriptor = os.open(final.parent, os.O_RDONLY)
        with suppress(OSError):  # not every file system can
            os.fsync(descriptor)
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; return whether the system could."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    done: int = renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
    return done == 0


def _unwritable(final: Path, error: OSError) -> ExportError:
    return OutputError(f"cannot write {str(final)!r}: {error.strerror or error}")
