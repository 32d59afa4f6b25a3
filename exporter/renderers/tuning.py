"""A search for the best mixture, as a record, as a page, and for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from exporter.evidence import at_least, at_most
from exporter.records import Candidate, Parity, TuneReport
from exporter.renderers import _figures as figures
from exporter.renderers.markdown import _escape as escape
from exporter.renderers.markdown import _table as table
from exporter.renderers.terminal import COLOURS

if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST_LAYERS = 5  # that the terminal lists, of the most sensitive


class Row(NamedTuple):
    """One line of the table of candidates."""

    candidate: str
    sqnr: str
    drop: str
    latency: str
    size: str
    budget: str
    front: str


HEADS = Row("candidate", "SQNR", "accuracy drop", "p50 latency", "size", "in budget", "front")


def rows(report: TuneReport) -> list[Row]:
    """Return the candidates, those with the best SQNR first, as seen on the validation samples."""
    order = sorted(report.candidates, key=lambda c: -1.0 if c.sqnr_db is None else c.sqnr_db)
    return [_row(report, candidate) for candidate in reversed(order)]


def _row(report: TuneReport, candidate: Candidate) -> Row:
    name, budget = candidate.name, report.budget
    good = candidate.is_good_enough(budget) and candidate.is_cheap_enough(budget)
    return Row(
        candidate=f"{name} (the choice)" if name == report.choice else name,
        sqnr=_sqnr(candidate.sqnr_db, candidate.worst.output if candidate.worst else None),
        drop=figures.share(candidate.accuracy_drop),
        latency=figures.milliseconds(candidate.latency),
        size=figures.size(candidate.file),
        budget=_budget(candidate, is_good=good),
        front="yes" if name in report.front else "",
    )


def _sqnr(decibels: float | None, output: str | None) -> str:
    """Return an SQNR, and of several outputs whose it is."""
    text = figures.decibels(decibels)
    return text if output is None else f"{text or 'not finite'}, {output}"


def _budget(candidate: Candidate, *, is_good: bool) -> str:
    if candidate.refused:
        return "FAIL: not made"
    if candidate.same_as:
        return f"is {candidate.same_as}"
    return "yes" if is_good else "no"


def said(report: TuneReport) -> Iterator[str]:
    """Yield what the search came to, one sentence each."""
    if len(report.source.outputs) > 1:
        names = " and ".join(repr(spec.name) for spec in report.source.outputs)
        yield f"the budget speaks of {names} alike: an SQNR is that of the one that loses most"
    chosen = report.chosen
    if chosen:
        yield f"chosen: {chosen.name}, for {report.budget}"
    yield from report.findings
    if report.nearest:
        nearest = next(c for c in report.candidates if c.name == report.nearest)
        drop = nearest.accuracy_drop
        known = [
            figures.decibels(nearest.sqnr_db),
            f"a drop of {figures.share(drop)}" if drop is not None else "",
            figures.milliseconds(nearest.latency),
            figures.size(nearest.file),
        ]
        yield f"the nearest is {nearest.name}: {', '.join(filter(None, known))}"
    for parity in report.confirmation:
        yield confirmed(parity)
        yield from (f"missed: {failure}" for failure in parity.failures)
        yield from (f"not enough evidence: {why}" for why in parity.unproven)
    yield from (f"{c.name}: {c.refused}" for c in report.candidates if c.refused)
    yield from (f"in doubt: {doubt}" for doubt in report.doubts)


def confirmed(parity: Parity) -> str:
    """Return what the samples that the search never saw show of the choice."""
    sqnr = figures.decibels(parity.sqnr_db) or "not finite"
    whose = "" if parity.output is None else f"{parity.output!r} of "
    text = f"{whose}the choice on the {parity.inputs}, which the search never saw: {sqnr}"
    bounds = parity.accuracy_drop_bounds
    if bounds is None or parity.accuracy_drop is None:
        return text
    return (
        f"{text}, accuracy drop {figures.share(parity.accuracy_drop)} ({parity.lost} lost and "
        f"{parity.gained} gained), which proves {at_least(bounds[0])} to {at_most(bounds[1])}"
    )


def to_json(report: TuneReport) -> str:
    """Return the record as JSON, and beside it the figures that follow from it."""
    record = msgspec.to_builtins(report)
    record = {"schema": record.pop("schema"), "verdict": report.verdict, **record}
    for candidate, entry in zip(report.candidates, record["candidates"], strict=True):
        entry["sqnr_db"] = candidate.sqnr_db  # infinite where exact, which JSON has as null
        entry["accuracy_drop"] = candidate.accuracy_drop
        entry["p50_ms"] = candidate.latency.p50_ms if candidate.latency else None
        entry["in_budget"] = candidate.is_good_enough(report.budget) and candidate.is_cheap_enough(
            report.budget
        )
    for found, entry in zip(report.sensitivities, record["sensitivities"], strict=True):
        entry["sqnr_db"] = found.sqnr_db
    return msgspec.json.format(msgspec.json.encode(record), indent=2).decode() + "\n"


def to_markdown(report: TuneReport) -> str:
    """Return the search as one Markdown page."""
    source = report.source
    shape = " and ".join("×".join(map(str, spec.shape)) for spec in source.inputs)
    order = sorted(
        report.sensitivities, key=lambda s: (s.rel_l2 is not None, -(s.rel_l2 or 0.0), s.layer)
    )
    chosen = report.chosen
    kept = set(chosen.keep or ()) if chosen else set()
    lines = [
        f"# {escape(source.model)}, tuned: {report.verdict.upper()}",
        "",
        f"Wanted: {escape(str(report.budget))}.",
        "",
        *(f"- {escape(sentence)}" for sentence in said(report)),
        "",
        "## Candidates",
        "",
        *table(HEADS, rows(report)),
        "",
        "![SQNR against latency](pareto.svg)",
        "",
        f"SQNR and accuracy are on {escape(report.validation)}, against the unfolded network in "
        f"float64, in {escape(report.runtime)}; the evaluation samples were run once, for the "
        "choice alone, so that nothing was chosen by them. Latencies are of one run in which all "
        "candidates take turns; an interrupted search keeps sensitivities and SQNR, and takes the "
        "latencies again. A candidate is on the front if none is at least as good in SQNR, latency "
        "and size, and better in one. Of candidates that are not shown to be slower than the "
        "fastest (sign test over the turns, 95 %), the most exact is chosen. One that keeps 3 has "
        "the three most sensitive layers in float, and one that keeps 3 light those whose error is "
        "largest against their work (for size: their parameters). Whether an artefact computes its "
        "graph (fidelity) is judged when the profile is exported.",
        "",
        f"## What {escape(report.precision)} does to the outputs, one layer at a time",
        "",
        *table(
            ("layer", "SQNR", "in the choice"),
            (
                (
                    s.layer,
                    s.refused or _sqnr(s.sqnr_db, s.output) or "not finite",
                    _place(report, is_kept=s.layer in kept),
                )
                for s in order
            ),
        ),
        "",
        "Only this layer is quantised, plainly, without repairs, and the outputs are compared with "
        "those of the FP32 graph; of several the one that loses most is named. Errors of layers "
        "add up nearly as independent noise does.",
        "",
        "## Made with",
        "",
        f"{report.tool}; input N×{shape}; weights {escape(source.weights)}, SHA-256 "
        f"{source.weights_sha256}; calibrated on {escape(report.calibration)}; "
        + escape(", ".join(f"{key} {value}" for key, value in report.environment.items()))
        + ".",
        "",
        "Stages: " + escape(", ".join(f"{s.name} {s.seconds:.1f} s" for s in report.stages)) + ".",
    ]
    return "\n".join((*lines, ""))


def _place(report: TuneReport, *, is_kept: bool) -> str:
    chosen = report.chosen
    if chosen is None:
        return ""
    if chosen.keep is None:
        return chosen.precision
    return "in float" if is_kept else report.precision


def profile_comment(report: TuneReport) -> str:
    """Return the comment above the profile: what it is, in a line or two."""
    source = report.source
    text = f"{report.choice}, for {report.budget}; weights {source.weights_sha256[:12]}…"
    return f"# {report.tool} tune: {text}\n"


def render(report: TuneReport, folder: Path) -> RenderableType:
    """Return the search as something rich can print."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for field, head in zip(Row._fields, HEADS, strict=True):
        is_word = field in ("candidate", "budget", "front")
        grid.add_column(head, justify="left" if is_word else "right", overflow="fold")
    for row in rows(report):
        grid.add_row(*map(Text, row), style="bold" if row.candidate.endswith("choice)") else "")
    worst = sorted(report.sensitivities, key=lambda s: -(s.rel_l2 or float("inf")))[:_MOST_LAYERS]
    named = ", ".join(f"{s.layer} {_sqnr(s.sqnr_db, s.output)}" for s in worst)
    lines: list[RenderableType] = [
        Text(f"most sensitive by themselves: {named}"),
        Text(""),
        grid,
        Text(""),
        *(Text(sentence, style=_colour(sentence)) for sentence in said(report)),
        *([Text(f"profile: {folder / 'tuned.toml'}")] if report.choice else []),
        Text(f"{report.verdict}: {folder / 'tune.md'}", style=COLOURS[report.verdict]),
    ]
    return Group(*lines)


def _colour(sentence: str) -> str:
    for word, style in (("missed:", "fail"), ("not enough evidence:", "not enough evidence")):
        if sentence.startswith(word):
            return COLOURS[style]
    return "yellow" if sentence.startswith("in doubt:") else ""
