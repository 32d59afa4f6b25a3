"""Tables as plain text: no colours, no frames, as wide as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from textwrap import wrap


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Return the rows under their heads; the first ``left`` columns begin at their left."""
    lines = [tuple(heads), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        [
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in padded)


def shape(sizes: Iterable[int]) -> str:
    """Return ``1×224×224``."""
    return "×".join(map(str, sizes))


def count(number: float | None) -> str:
    """Return a whole number with its thousands apart, or that it is not known."""
    return "not counted" if number is None else f"{number:,}"


def wrapped(heads: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int]) -> str:
    """Return the rows under their heads, each cell broken into lines of its column's width."""
    blocks = []
    for row in (heads, *rows):
        cells = [wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
        lines = zip_longest(*cells, fillvalue="")
        blocks.append(
            "\n".join(
                "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
                for line in lines
            )
        )
    return "\n\n".join(blocks)
