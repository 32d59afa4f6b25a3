"""How the names that a stranger chose are shown: on one line, short, and with nothing hidden."""

from __future__ import annotations

LONGEST = 80


def quoted(name: object) -> str:
    """Return a name in quotes, with what does not print escaped, and cut where it is too long."""
    text = str(name)
    return repr(text) if len(text) <= LONGEST else f"{text[:LONGEST]!r}…"


def shown(value: object) -> str:
    """Return a value as Python writes it, cut where that is too long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def plain(name: object, *, most: int = LONGEST) -> str:
    """Return a name as it is where it prints on one line, and otherwise escaped."""
    text = str(name)
    cut = text if len(text) <= most else f"{text[:most]}…"
    return cut if cut.isprintable() else repr(cut)[1:-1]
