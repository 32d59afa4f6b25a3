"""The report for a terminal: the table, what it rests on, what failed, and where the rest is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exporter.records import Comparison, Report
from exporter.renderers import _execution as execution
from exporter.renderers import _figures as figures
from exporter.renderers import _sizes as sizes
from exporter.renderers import _stages as stages

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_VERDICTS = ("fidelity", "quality")
COLOURS: dict[str, str] = {
    "pass": "green",
    "fail": "bold red",
    "not enough evidence": "bold magenta",
    "not checked": "yellow",
}


def render(report: Report, folder: Path) -> RenderableType:
    """Return the summary as something rich can print."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for field, head in zip(figures.Row._fields, figures.heads(report), strict=True):
        justify = "left" if field in ("artefact", *_VERDICTS) else "right"
        table.add_column(head, justify=justify, overflow="fold")  # type: ignore[arg-type]  # Literal
    for row in figures.rows(report):
        cells = [
            _verdict(cell) if field in _VERDICTS else Text(cell)
            for field, cell in zip(row._fields, row, strict=True)
        ]
        table.add_row(*cells)
    fold = report.fold
    took = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for field, head in zip(stages.Row._fields, stages.HEADS, strict=True):
        justify = "left" if field in ("stage", "part") else "right"
        took.add_column(head, justify=justify, overflow="fold")  # type: ignore[arg-type]  # Literal
    for line in stages.summed(report.stages):
        took.add_row(*map(Text, line))
    lines: list[RenderableType] = [
        Text(f"{fold.folded} of {len(fold.fates)} BatchNorms folded"),
        *(Text(f"  {fate}") for fate in fold.fates),
        Text(""),
        took,
        Text(""),
        Text(stages.whole(report)),
        Text(""),
        table,
        Text(""),
        *(Text(line, style=COLOURS["not checked"]) for line in not_run(report)),
        *(Text(f"{a.name}: {note}") for a in report.artefacts for note in a.notes),
        *(Text(f"{a.name}: {line}") for a in report.artefacts for line in figures.shown(a)),
        *(Text(line) for line in sizes.lines(report)),
        *(Text(f"{a.name}: {line}") for a in report.artefacts for line in execution.happened(a)),
        *(Text(execution.compared(report, one)) for one in _with_fp32(report)),
        *(Text(f"missed: {failure}", style=COLOURS["fail"]) for failure in report.failures),
        *(
            Text(f"not enough evidence: {phrase}", style=COLOURS["not enough evidence"])
            for phrase in report.unproven
        ),
        *(Text(f"in doubt: {doubt}", style="yellow") for doubt in report.doubts),
        *(Text(line) for line in execution.recommended(report)),
        Text(f"{report.verdict}: {folder / 'report.md'}", style=COLOURS[report.verdict]),
    ]
    return Group(*lines)


def _verdict(said: str) -> Text:
    """Return a verdict in its colour; the reason stands below the table."""
    from rich.text import Text

    word = said.partition(":")[0]
    return Text(word, style=COLOURS.get(word.lower(), ""))


def _with_fp32(report: Report) -> list[Comparison]:
    """Return the comparisons for the summary: with FP32, at the first batch size."""
    first = report.latency[0].batch if report.latency else 0
    return [c for c in report.comparisons if c.batch == first and c.baseline.startswith("fp32 on ")]


def not_run(report: Report) -> list[str]:
    """Return one line for each reason why artefacts were not run."""
    named: dict[str, list[str]] = {}
    for artefact in report.artefacts:
        if artefact.not_run and not artefact.refused:
            named.setdefault(artefact.not_run, []).append(artefact.name)
    return [
        f"not checked: built, not run: {reason}: {', '.join(names)}"
        for reason, names in named.items()
    ]
