"""A profile says where a model will run and what 'good' means there. One TOML file each.

It says everything about the target and nothing about the model. Profiles that ship with the
package are found by name, a user's own by its path; options on the command line override keys.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PureWindowsPath
from typing import Any, ClassVar

import msgspec

from exporter.errors import ProfileError, UnknownName, nearest
from exporter.plugins import load_precision, load_runtime
from exporter.records import (
    Asked,
    BatchRange,
    Calibration,
    DataChoice,
    ParityInputs,
    Postprocess,
    Preprocess,
    Range,
    Ranges,
    SizeRange,
    Timing,
    Tolerance,
)
from exporter.strict import read
from exporter.words import plain, shown

OPSETS = range(19, 25)  # 19: Q/DQ with half scales; 24: the newest that torch 2.13 writes
_LARGEST = 1 << 20  # bytes; a profile is a page


class PrecisionChoice(Asked, frozen=True):
    """What a precision must achieve on the model's held-out samples and on noise; its options.

    A gate left out is not checked, and a precision without gates is reported as not checked.
    """

    tolerance: Tolerance = Tolerance()
    random_tolerance: Tolerance = Tolerance()
    options: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it


class ModelChoice(Asked, frozen=True, omit_defaults=True):
    """How the network is built that is named elsewhere: keyword arguments, and nothing else."""

    args: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it


class Profile(Asked, frozen=True):
    """Where a model will run, and what is good enough there. Read one with `load_profile`."""

    about: str
    runtime: dict[str, dict[str, Any]]
    precision: dict[str, PrecisionChoice]
    batch: BatchRange = BatchRange()
    size: SizeRange = SizeRange()
    timing: Timing = Timing()
    parity: ParityInputs = ParityInputs()
    calibration: Calibration = Calibration()
    data: DataChoice = DataChoice()
    preprocess: Preprocess = Preprocess()
    postprocess: Postprocess = Postprocess()
    opset: int = 20
    model: ModelChoice = ModelChoice()

    RANGES: ClassVar[Ranges] = {"opset": Range(OPSETS[0], OPSETS[-1])}

    def __post_init__(self) -> None:
        Asked.__post_init__(self)
        if not self.runtime:
            raise ValueError("no runtime: add a table such as [runtime.ort-cpu]")
        if not self.precision:
            raise ValueError("no precision: add a table such as [precision.fp32]")
        outside = [b for b in self.timing.batches if not self.batch.min <= b <= self.batch.max]
        if outside:
            allowed = f"{self.batch.min} to {self.batch.max}"
            raise ValueError(f"timing.batches must lie in batch ({allowed}), found {outside[0]}")

    def only(self, precisions: tuple[str, ...]) -> Profile:
        """Return the profile with just these precisions. Raises `ProfileError` for one it lacks."""
        if not precisions:
            raise ProfileError(
                "no precision was chosen", hint=f"known: {', '.join(sorted(self.precision))}"
            )
        for name in precisions:
            if name not in self.precision:
                raise ProfileError(
                    f"the profile has no table [precision.{name}], so nothing says what is good "
                    "enough for it",
                    hint=nearest(name, self.precision),
                )
        kept = {name: self.precision[name] for name in self.precision if name in precisions}
        return msgspec.structs.replace(self, precision=kept)

    def to_toml(self) -> str:
        """Return the profile as TOML that `load_profile` reads back to the same profile."""
        return msgspec.toml.encode(self).decode()


def profile_names() -> tuple[str, ...]:
    """Return the names of the profiles that ship with the package."""
    return tuple(sorted(_builtin()))


def load_profile(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Profile:
    """Return a built-in profile by name, or the one in a ``.toml`` file.

    ``overrides`` are dotted keys and values that replace the file's, say ``{"timing.runs": 20}``.
    Raises `UnknownName` for an unknown name, `ProfileError` for anything else: a file that cannot
    be read, a wrong key or value (naming the key, what was found and the nearest allowed), an
    unknown runtime or precision or one of its options.
    """
    path = Path(name_or_path)
    source: Traversable
    if path.suffix == ".toml":
        source, where = path, path.name
    else:
        known = _builtin()
        if str(name_or_path) not in known:
            raise UnknownName("profile", str(name_or_path), known)
        source, where = known[str(name_or_path)], f"{name_or_path}.toml"
    table = _parse(source, where)
    if overrides:
        where += " with what overrides it"
    for key, value in (overrides or {}).items():
        _override(table, key, deepcopy(value))
    return read_profile(table, where=where)


def read_profile(table: Mapping[str, Any], *, where: str) -> Profile:
    """Return a table as a profile whose plug-ins and options are all known to exist.

    Raises `ProfileError` or `UnknownName`; no framework is imported.
    """
    _check_names_no_code(table, where)
    choices = {
        name: read(PrecisionChoice, choice, where=f"{where}: precision.{name}")
        for name, choice in _tables(table, "precision", where)
    }
    runtimes = dict(_tables(table, "runtime", where))
    rest = {key: value for key, value in table.items() if key not in ("precision", "runtime")}
    profile = read(
        Profile,
        {**rest, "runtime": runtimes, "precision": msgspec.to_builtins(choices)},
        where=where,
    )
    try:
        for name, options in profile.runtime.items():
            load_runtime(name, options, where=f"{where}: runtime.{name}")
        for name, choice in profile.precision.items():
            load_precision(name, choice.options, where=f"{where}: precision.{name}.options")
    except UnknownName as error:
        raise error.at(where) from error
    return profile


def _builtin() -> dict[str, Traversable]:
    found = files("exporter.profiles").iterdir()
    return {f.name.removesuffix(".toml"): f for f in found if f.name.endswith(".toml")}


def _parse(source: Traversable, where: str) -> dict[str, Any]:
    try:
        if isinstance(source, Path) and _is_special(source):
            raise ProfileError(f"{where}: a pipe, socket or device, so not a profile")
        with source.open("rb") as stream:
            text = stream.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ProfileError(f"{where}: larger than {_LARGEST} bytes, so not a profile")
        return tomllib.loads(text.decode("utf-8"))
    except FileNotFoundError as error:
        hint = f"built-in profiles: {', '.join(profile_names())}"
        raise ProfileError(f"{where}: no such file", hint=hint) from error
    except OSError as error:
        raise ProfileError(f"{where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ProfileError(f"{where}: not UTF-8 text (byte {error.start})") from error
    except (ValueError, RecursionError) as error:  # tomllib passes on what int() refuses
        raise ProfileError(f"{where}: not valid TOML: {plain(error, most=200)}") from error


def _is_special(path: Path) -> bool:
    """Return whether a path is what reading would wait for, or never come to the end of."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _check_names_no_code(table: Mapping[str, Any], where: str) -> None:
    """Raise `ProfileError` if a profile says which network to build, and so which code to run."""
    found = table.get("model", {})
    others = [key for key in found if key != "args"] if isinstance(found, dict) else [found]
    if others:
        raise ProfileError(
            f"{where}: model: a profile says how a network is built, in [model.args], and never "
            f"which or by what code, found {shown(others[0])}",
            hint="name the network on the command line, with --model",
        )
    for key, text in _texts(found.get("args") if isinstance(found, dict) else None, "model.args"):
        if what := _leads_outside(text):
            raise ProfileError(
                f"{where}: {key}: {what}, and a profile names nothing outside itself, found "
                f"{shown(text)}",
                hint="write it into a factory of your own, and name that with --model",
            )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield every text in a value, and the keys of its tables, each with where it stands."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield f"{key}.{plain(name)}", str(name)
            yield from _texts(part, f"{key}.{plain(name)}")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _texts(part, f"{key}[{index}]")


def _leads_outside(text: str) -> str | None:
    """Return what a factory might take a text for that it could fetch or run."""
    if re.match(r"\s*[\w.+-]+:\S", text) or text.lstrip().startswith("//"):
        return "this may be a URL, or name code"
    if "$" in text or re.search(r"%\w+%", text):
        return "this may be an environment variable"
    path = PureWindowsPath(text)  # which knows / too
    if path.anchor or ".." in path.parts or text.lstrip().startswith("~"):
        return "this may be a path that leaves the profile's folder"
    return None


def _tables(table: Mapping[str, Any], key: str, where: str) -> list[tuple[str, dict[str, Any]]]:
    found = table.get(key, {})
    if not isinstance(found, dict):
        raise ProfileError(
            f"{where}: {key}: expected tables such as [{key}.x], found {shown(found)}"
        )
    for name, value in found.items():
        if not isinstance(value, dict):
            raise ProfileError(
                f"{where}: {key}.{plain(name)}: expected a table, found {shown(value)}"
            )
    return list(found.items())


def _override(table: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ProfileError(f"{key}: {parent!r} is a value, not a table")
    table[last] = value
