"""Code that somebody names: ``package.module:factory``, or ``file.py:factory``.

The words come from a command line, or from a program; nothing that was read from a file is ever
given to what is here. A file's own folder is searched last for what it imports; the current folder
is not searched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from exporter.errors import ExportError, InputRefused, UnknownName

_HINT = "write package.module:factory, or file.py:factory"


class Words(NamedTuple):
    """What was said: a module or a file, and a name in it, with dots perhaps."""

    where: str
    attribute: str

    @classmethod
    def of(cls, code: str) -> Words:
        """Read them. Raises `InputRefused` for what can be no such words."""
        where, _, attribute = code.rpartition(":")
        if not all(part.isidentifier() for part in attribute.split(".")) or not where:
            raise InputRefused(f"{code!r} names no factory", hint=_HINT)
        return cls(where, attribute)

    @property
    def said(self) -> str:
        """Return the words with no folder in them."""
        where = Path(self.where).name if self.where.endswith(".py") else self.where
        return f"{where}:{self.attribute}"

    def load(self) -> Any:
        """Import it. Raises `InputRefused`, `UnknownName` where there is no such name."""
        found: Any = _import(self.where)
        for part in self.attribute.split("."):
            if not hasattr(found, part):
                known = [name for name, value in vars(found).items() if callable(value)]
                shown = self.said.rpartition(":")[0]
                raise UnknownName(f"factory in {shown}", part, [n for n in known if n[:1] != "_"])
            found = getattr(found, part)
        return found


def is_code(words: str) -> bool:
    """Return whether the words name code, and no file that is there."""
    return ":" in words and not Path(words).exists()


@contextmanager
def refusing(
    what: str, *, hint: str | None = None, passing: type[Exception] = ExportError
) -> Iterator[None]:
    """Turn whatever code of others raises into `InputRefused`, in one line.

    It may also try to end the process. Ctrl-C stays what it is.
    """
    try:
        yield
    except (ExportError, KeyboardInterrupt, passing):
        raise
    except BaseException as error:
        reason = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        raise InputRefused(
            f"{what} {type(error).__name__}{': ' if reason else ''}{reason}",
            hint=hint or "--debug shows where",
        ) from error


def _import(where: str) -> ModuleType:
    if where.endswith(".py"):
        return _import_file(Path(where))
    if not all(part.isidentifier() for part in where.split(".")):
        raise InputRefused(f"{where!r} is neither a module's name nor a .py file", hint=_HINT)
    try:
        with refusing(f"importing {where} raised", passing=ModuleNotFoundError):
            return import_module(where)
    except ModuleNotFoundError as error:
        raise InputRefused(
            f"{where} cannot be imported: there is no module named {error.name!r}",
            hint="install its package, or name a file, as net.py:factory",
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputRefused(f"{path}: no such file")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = f"_given_{path.stem}"
    spec = util.spec_from_file_location(name, path)
    assert spec is not None  # it is there, and ends in .py
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickles look for it
    with refusing(f"importing {path.name} raised"):
        spec.loader.exec_module(module)
    return module
