"""Where a search stands, in its folder, so that an interrupted one goes on.

``tune-state.json`` has every sensitivity and every candidate's figures on the validation samples,
and what they depend on: weights, graph, profile, samples, machine and versions. It is written
beside its name and renamed after each step, so it is always whole. Latencies are not in it:
those of different runs cannot be compared. ``candidates/`` has the graphs until the search is over.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from exporter.errors import InputRefused, OutputError
from exporter.files import write_text
from exporter.records import Candidate, File, Found, Sensitivity

STATE, GRAPHS = "tune-state.json", "candidates"
_RESULTS = ("tune.json", "tune.md", "tuned.toml", "pareto.svg")
_PARTIAL = ".tune-partial"  # what a killed run may leave
_SCHEMA = 2  # 1, the first; 2, the parity of every output


class _Saved(Found, frozen=True):
    schema: int
    made_with: dict[str, str]
    layers: tuple[str, ...] = ()
    sensitivities: tuple[Sensitivity, ...] = ()
    candidates: tuple[Candidate, ...] = ()


def check_folder(folder: Path) -> None:
    """Raise `OutputError` unless the folder is not there, empty, or that of a search."""
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise OutputError(f"{str(folder)!r} is not a folder, where the search would be kept")
        every = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(folder, error) from error
    found = [name for name in every if not name.endswith(_PARTIAL)]
    if found and STATE not in found:
        raise OutputError(
            f"{str(folder)!r} holds files that are not of a search, say {found[0]!r}",
            hint="name another folder with --out, or move them away",
        )


@dataclass(slots=True)
class State:
    """What a search has found so far; every change is on the disk at once."""

    folder: Path
    saved: _Saved

    @classmethod
    def open(cls, folder: Path, made_with: Mapping[str, str], *, restart: bool) -> State:
        """Return what the folder holds, or a new state in it; ``restart`` clears what was there.

        Raises `InputRefused` if a search in it was made with something else, or cannot be read.
        """
        check_folder(folder)
        path = folder / STATE
        try:
            if restart:
                _clear(folder)
            if path.exists():
                return cls(folder, _read(path, made_with))
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error
        state = cls(folder, _Saved(_SCHEMA, dict(made_with)))
        state._write(state.saved)
        return state

    def set_layers(self, layers: list[str]) -> list[str]:
        """Keep which layers are searched, and return them."""
        self._write(msgspec.structs.replace(self.saved, layers=tuple(layers)))
        return layers

    def sensitivity(self, layer: str) -> Sensitivity | None:
        return next((found for found in self.saved.sensitivities if found.layer == layer), None)

    def candidate(self, precision: str, keep: tuple[str, ...] | None) -> Candidate | None:
        """Return what is known of a candidate."""
        same = (c for c in self.saved.candidates if (c.precision, c.keep) == (precision, keep))
        return next(same, None)

    def has_graph(self, candidate: Candidate) -> bool:
        """Return whether the candidate's graph is still there, and what it was."""
        if candidate.file is None:
            return False
        path = self.folder / candidate.file.name
        return path.is_file() and File.of(path, self.folder) == candidate.file

    def add(self, found: Sensitivity | Candidate) -> None:
        """Keep what was found. Raises `OutputError` if the disk refuses."""
        if isinstance(found, Sensitivity):
            every = (*self.saved.sensitivities, found)
            self._write(msgspec.structs.replace(self.saved, sensitivities=every))
        else:
            others = (
                c
                for c in self.saved.candidates
                if (c.precision, c.keep) != (found.precision, found.keep)
            )
            self._write(msgspec.structs.replace(self.saved, candidates=(*others, found)))

    def graphs(self) -> Path:
        """Return the folder of the candidates' graphs. Raises `OutputError`."""
        path = self.folder / GRAPHS
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        return path

    def remove(self, name: str) -> None:
        """Remove a result of an earlier search, if there is one."""
        (self.folder / name).unlink(missing_ok=True)

    def finish(self) -> None:
        """Remove the graphs: the profile that is written makes the chosen one again."""
        shutil.rmtree(self.folder / GRAPHS, ignore_errors=True)

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder in one step. Raises `OutputError` if the disk refuses."""
        write_text(self.folder / name, text, partial=_PARTIAL)

    def _write(self, saved: _Saved) -> None:
        text = msgspec.json.format(msgspec.json.encode(saved), indent=2).decode()
        self.write(STATE, text + "\n")
        self.saved = saved


def _read(path: Path, made_with: Mapping[str, str]) -> _Saved:
    where = f"{path.parent.name}/{path.name}"
    again = "--restart begins anew, another --out keeps both"
    try:
        saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputRefused(f"{where}: not the state of a search: {error}", hint=again) from error
    if saved.schema != _SCHEMA:
        raise InputRefused(f"{where}: of schema {saved.schema}, not {_SCHEMA}", hint=again)
    names = dict.fromkeys((*made_with, *saved.made_with))
    other = [name for name in names if saved.made_with.get(name) != made_with.get(name)]
    if other:
        raise InputRefused(
            f"the search in {path.parent.name!r} was made with another "
            f"{' and another '.join(other)}",
            hint=again,
        )
    return saved


def _clear(folder: Path) -> None:
    for name in (STATE, *_RESULTS):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / GRAPHS, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {str(folder)!r}: {error.strerror or error}")
