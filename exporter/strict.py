"""Tables (TOML, JSON) into frozen records, strictly. msgspec does the work; the words are ours.

One rule: a key that no field claims is an error that names the nearest field. Profiles, plug-in
options and command-line overrides are all read through `read`.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from exporter.errors import ProfileError, nearest
from exporter.records import Asked
from exporter.words import plain, quoted, shown

T = TypeVar("T", bound=msgspec.Struct)

_AT = re.compile(r" - at `\$?(?P<path>[^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>[^`]*)`")
_MISSING = re.compile(r"Object missing required field `(?P<key>[^`]*)`")
_LONGEST = 80  # of what is looked for among the known words
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")


def read(cls: type[T], table: Mapping[str, Any], *, where: str) -> T:
    """Return the table as a record of type ``cls``.

    Raises `ProfileError` saying where (``where`` and the key's path), which value was found and
    what is allowed or nearest.
    """
    try:
        return msgspec.convert(dict(table), cls)
    except msgspec.ValidationError as error:
        raise _explain(cls, table, where, str(error)) from error


def _explain(cls: type[T], table: Mapping[str, Any], where: str, said: str) -> ProfileError:
    at = _AT.search(said)
    path = at["path"] if at else ""
    said = _AT.sub("", said)
    steps = [key or index for key, index in _STEP.findall(path)]
    place = ": ".join([where, plain(path.lstrip("."))]) if path else where
    if unknown := _UNKNOWN.match(said):
        fields = _fields(cls, steps)
        return ProfileError(
            f"{place}: unknown key {quoted(unknown['key'])}", hint=nearest(unknown["key"], fields)
        )
    if missing := _MISSING.match(said):
        return ProfileError(f"{place}: the key {missing['key']!r} is missing")
    if said.startswith("Invalid enum value"):
        value, words = str(_value(table, steps)), _words(_hint(cls, steps))
        return ProfileError(
            f"{place}: {quoted(value)} is not allowed", hint=nearest(value[:_LONGEST], words)
        )
    reason = said[0].lower() + re.sub(r"\bobject\b", "table", said[1:].replace("`", ""))
    reason = reason.replace(" | null", "")
    value = _value(table, steps)
    if reason.startswith(("expected", "invalid", "number")) and not isinstance(value, Mapping):
        reason += f", found {shown(value)}"
        if allowed := _allowed(cls, steps):
            reason += f" (allowed: {allowed})"
    return ProfileError(f"{place}: {reason}")


def _allowed(cls: type[Any], steps: list[str]) -> str | None:
    """Return in words what the key at a path may be, where its type does not say it."""
    names = [step for step in steps if not step.isdigit()]
    if not names:
        return None
    owner = _hint(cls, names[:-1])
    if isinstance(owner, type) and issubclass(owner, Asked) and names[-1] in owner.RANGES:
        return str(owner.RANGES[names[-1]])
    hint = _hint(cls, names)
    if hint is bool:
        return "true, false"
    return ", ".join(map(repr, _words(hint))) or None


def _words(hint: Any) -> tuple[str, ...]:
    """Return the words that a key may be, also where it may be left out."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return tuple(word for part in typing.get_args(hint) for word in _words(part))


def _fields(cls: type[Any], steps: list[str]) -> tuple[str, ...]:
    """Return the keys allowed at a path, following the records' own annotations."""
    return typing.cast("tuple[str, ...]", _hint(cls, steps).__struct_fields__)


def _hint(cls: type[Any], steps: list[str]) -> Any:
    """Return the annotation at a path."""
    for step in steps:
        cls = typing.get_type_hints(cls)[step]
    return cls


def _value(table: Any, steps: list[str]) -> Any:
    """Return what the table holds at a path."""
    for step in steps:
        table = table[step] if isinstance(table, Mapping) else table[int(step)]
    return table
