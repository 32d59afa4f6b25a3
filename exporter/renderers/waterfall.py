"""The ladder for a terminal: ``resnet-export parity``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.records import Report
from exporter.renderers import _figures as figures
from exporter.renderers import _ladder as ladder
from exporter.renderers import _sizes as sizes
from exporter.renderers.terminal import COLOURS, not_run

if TYPE_CHECKING:
    from rich.console import RenderableType

_RIGHT = ("flips", "total_flips")


def render(report: Report) -> RenderableType:
    """Return the waterfall, what is known of each failure, and the verdict."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for field, head in zip(ladder.Step._fields, ladder.HEADS, strict=True):
        table.add_column(head, justify="right" if field in _RIGHT else "left", overflow="fold")
    for step in ladder.steps(report):
        cells = [Text(cell) for cell in step]
        cells[-1].stylize(COLOURS.get(step.fidelity.partition(":")[0].lower(), ""))
        table.add_row(*cells)
    lines: list[RenderableType] = [
        table,
        Text(""),
        *(Text(line, style=COLOURS["not checked"]) for line in not_run(report)),
        *(Text(f"{a.name}: {line}") for a in report.artefacts for line in figures.shown(a)),
        *(Text(line) for line in sizes.lines(report)),
        *(Text(ladder.worst(case)) for case in report.worst_cases),
        *(Text(line, style=COLOURS["fail"]) for line in ladder.findings(report)),
        *(
            Text(f"not enough evidence: {phrase}", style=COLOURS["not enough evidence"])
            for phrase in report.unproven
        ),
        *(Text(f"in doubt: {doubt}", style="yellow") for doubt in report.doubts),
        Text(report.verdict, style=COLOURS[report.verdict]),
    ]
    return Group(*lines)
