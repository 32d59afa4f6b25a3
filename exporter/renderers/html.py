"""The report in a notebook: its verdict, its main table and what there is to say of that, as HTML.

All of it is in the text itself: no script, no style sheet, nothing that is fetched. Colours are of
verdicts alone, white on dark, so that a light page and a dark one both show them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from exporter.records import Report
from exporter.renderers import _figures as figures
from exporter.renderers.terminal import not_run

_COLOURS = {
    "pass": "#1a7f37",
    "fail": "#b3261e",
    "not enough evidence": "#8a3ffc",
    "not checked": "#7a5c00",
}
_BADGE = "color:#fff;border-radius:3px;padding:1px 6px;white-space:nowrap;background:"
_TABLE = "border-collapse:collapse"
_ROW = "border-bottom:1px solid rgba(128,128,128,.4)"
_VERDICTS = ("fidelity", "quality")


def summary(report: Report, folder: Path) -> str:
    """Return it, compact; the whole report lies in the folder."""
    source = report.source
    shape = "×".join(source.input.said)
    said = [
        *(f"missed: {failure}" for failure in report.failures),
        *(f"not enough evidence: {phrase}" for phrase in report.unproven),
        *not_run(report),
        *(f"in doubt: {doubt}" for doubt in report.doubts),
    ]
    return "".join(
        (
            "<div>",
            f"<p><b>{escape(source.model)}</b> {_badge(report.verdict)} N×{shape}, "
            f"{source.parameters:,} parameters, {report.fold.folded} of "
            f"{len(report.fold.fates)} BatchNorms folded</p>",
            _table(report),
            *(f"<p>{escape(line)}</p>" for line in said),
            f"<p>The whole report: {escape(_shown(folder / 'report.md'))}</p>",
            "</div>",
        )
    )


def _shown(path: Path) -> str:
    return str(path).encode(errors="replace").decode()  # names may be any bytes


def _table(report: Report) -> str:
    heads = figures.heads(report)
    return (
        f'<table style="{_TABLE}">{_row("th", heads, heads)}'
        + "".join(_row("td", row, _cells(row)) for row in figures.rows(report))
        + "</table>"
    )


def _cells(row: figures.Row) -> Iterator[str]:
    """Yield what a row's cells show; the reason for a verdict stands below the table."""
    for field, value in row._asdict().items():
        word = value.partition(":")[0]
        is_verdict = field in _VERDICTS and word.lower() in _COLOURS
        yield _badge(word) if is_verdict else escape(value)


def _row(tag: str, row: figures.Row, cells: Iterable[str]) -> str:
    """Return one line; words begin at their left, and figures end at their right."""
    sides = ("left" if field in ("artefact", *_VERDICTS) else "right" for field in row._fields)
    inside = "".join(
        f'<{tag} style="text-align:{side}">{cell}</{tag}>'
        for side, cell in zip(sides, cells, strict=True)
    )
    return f'<tr style="{_ROW}">{inside}</tr>'


def _badge(verdict: str) -> str:
    return f'<span style="{_BADGE}{_COLOURS[verdict.lower()]}">{escape(verdict)}</span>'
