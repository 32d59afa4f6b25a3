"""Everything this package raises on purpose, and the exit code the command gives it.

    ExportError            str(error) is one sentence fit to show a user; .hint says what to type,
    │                      and stands below a traceback
    ├── ProfileError    2  a profile, or an option that overrides it, says something unreadable
    ├── UnknownName     2  no such model, precision, runtime, target or profile
    ├── InputRefused    3  weights, calibration data or an input shape that cannot be used
    ├── GraphError      3  a network cannot be traced, folded, exported or converted
    ├── RuntimeMissing  4  the runtime's package or its device is not on this machine
    ├── BuildError      4  a runtime refused the graph
    ├── OutputError     5  the bundle could not be written
    ├── OutOfMemory     5  what was asked for does not fit into this machine's memory
    └── ParityError     1  outputs differ by more than the profile allows, or may well do

Anything else that escapes is a bug, and looks like one.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable


class ExportError(Exception):
    """Base of every error below."""

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(f"Hint: {hint}")


class ProfileError(ExportError):
    """A profile, or an option that overrides it, says something unreadable."""

    exit_code = 2


class UnknownName(ExportError):
    """No such model, precision, runtime, target or profile."""

    exit_code = 2

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"no {kind} named {name!r}", hint=nearest(name, known))

    def at(self, place: str) -> UnknownName:
        """Return the error, saying where the name was read."""
        self.args = (f"{place}: {self}",)
        return self


class InputRefused(ExportError):
    """Weights, calibration data or an input shape that cannot be used."""

    exit_code = 3


class GraphError(ExportError):
    """A network cannot be traced, folded, exported or converted."""

    exit_code = 3


class RuntimeMissing(ExportError):
    """The runtime's package or its device is not on this machine."""

    exit_code = 4


class BuildError(ExportError):
    """A runtime refused the graph."""

    exit_code = 4


class OutputError(ExportError):
    """The bundle could not be written."""

    exit_code = 5


class OutOfMemory(ExportError):
    """What was asked for does not fit into this machine's memory."""

    exit_code = 5


class ParityError(ExportError):
    """Outputs differ by more than the profile allows, or are not shown not to."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the closest known words, or lists them all."""
    known = sorted(known)
    by_lower = {word.lower(): word for word in known}
    close = [by_lower[word] for word in get_close_matches(name.lower(), by_lower, n=3)]
    if not close:
        return f"known: {', '.join(known) or 'none'}"
    *others, last = map(repr, close)
    return f"did you mean {', '.join(others) + ' or ' if others else ''}{last}?"


def with_hint(error: ExportError) -> str:
    """Return an error as one line of a report, with its hint."""
    return f"{error} ({error.hint})" if error.hint else str(error)
