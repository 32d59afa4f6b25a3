"""Progress as bars: one for each step, on a terminal or in a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from exporter.contracts import Advance, Progress

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def bars(console: Console) -> Iterator[Progress]:
    """Show a bar for each step that is announced."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console) as shown:

        @contextmanager
        def bar(what: str, total: int | None = None) -> Iterator[Advance]:
            task = shown.add_task(what, total=total)
            yield lambda: shown.advance(task)
            shown.update(task, total=total or 1, completed=total or 1)

        yield bar
