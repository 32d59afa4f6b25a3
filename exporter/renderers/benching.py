"""A bench as a record, as a page, and for a terminal, each figure with what it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from exporter.errors import OutputError
from exporter.files import write_text
from exporter.intervals import FEWEST_PAIRS, SUPPORT
from exporter.records import BenchReport, Comparison, Fit, Knee, Timed
from exporter.records.worth import ALIKE
from exporter.renderers import _latency as latency
from exporter.renderers import throughput
from exporter.renderers.markdown import _escape as escape
from exporter.renderers.markdown import _table as table
from exporter.renderers.terminal import COLOURS

if TYPE_CHECKING:
    from rich.console import RenderableType

RATIO = (
    "times its p50: of the medians, in brackets the 95 % interval of the ratio (bootstrap over "
    "rounds, as few counted as their correlation leaves, and no less than what the loads of a file "
    "differ by); no significant difference where that "
    f"comes within {ALIKE:.0%} of 1, which two loads of one file differ by; each comparison by "
    "itself, so of 20 between equals one may err"
)
LOADED = (
    "load: from the file to the first session of it; first: its first call, from handing inputs "
    "over to reading outputs, at the first batch size; both once, and in no other figure"
)
REAL = (
    "timed outputs: those of a quarter of the timed runs, drawn at random, beside the same session "
    "called untimed on the same inputs, at most 1e-3 apart in relative L2; accuracy: held-out "
    "samples labelled correctly, beside the bundle's record"
)
DEVICE = (
    "by CUDA events: what the device took between two events around the run, inputs and outputs on "
    "it; with copies: from pageable host memory and back; CUDA graph: captured once, launched as "
    "one; the wall clock has the launch in it and waiting for the end, so the two are not compared"
)
KNEE = "knee: the smallest batch with 90 % or more of the most images/s seen"
WITHIN = (
    "within the budget: of the batches that were timed, the largest whose p90, at the upper end of "
    "its 95 % interval, takes no longer"
)
_CHECKED = ("candidate", "load ms", "first ms", "timed outputs", "accuracy")
_RATIOS = ("candidate", "batch", "beside", "times its p50", "")


def definitions(report: BenchReport) -> list[str]:
    """Return what each figure that is shown is."""
    notes = [latency.SUPPORTED, latency.FAR, latency.RATE]
    notes += [RATIO] if report.comparisons else []
    notes += [DEVICE] if report.on_device else []
    notes += [LOADED, REAL]
    notes += [KNEE] if report.knees else []
    return [*notes, *([WITHIN] if report.fits else [])]


def checked(timed: Timed) -> tuple[str, ...]:
    """Return one line of the table of what was timed."""
    found = timed.checked
    outputs, accuracy = "not checked", "not checked"
    if found.timed:
        apart = f"{found.farthest:.1e} apart" if found.farthest else "the same"
        outputs = f"{'FAIL: ' if found.outputs == 'fail' else ''}{found.timed} {apart}"
    if found.correct is not None and found.recorded is not None:
        sign = "FAIL: " if found.accuracy == "fail" else ""
        accuracy = f"{sign}{found.correct} of {found.samples}, recorded {found.recorded}"
    return (timed.name, f"{timed.load_ms:.1f}", f"{timed.first_ms:.2f}", outputs, accuracy)


def ratio(one: Comparison) -> tuple[str, ...]:
    """Return one line of the table of ratios."""
    said = one.speed
    shown = f"{one.ratio:.3f}"
    if one.interval is None:
        return (*_whose(one), shown, f"{said}: {FEWEST_PAIRS} or more do")
    low, high = one.interval
    return (*_whose(one), f"{shown} ({low:.3f} to {high:.3f})", said)


def _whose(one: Comparison) -> tuple[str, str, str]:
    return one.artefact, str(one.batch), one.baseline


def said(report: BenchReport) -> Iterator[str]:
    """Yield what the bench came to, one sentence each."""
    for batch, (fastest, *others) in report.level.items():
        if not others and len(report.at(batch)) == 1:
            continue
        alike = f"; not shown to be slower: {', '.join(others)}" if others else ""
        yield f"fastest at batch {batch}: {fastest}{alike}"
    yield from (f"{knee.name}: {_knee(knee)}" for knee in report.knees)
    for fit in report.fits:
        yield f"{fit.name}: {_fit(report, fit)}"
    yield from (f"{one.name}: {note}" for one in report.timed for note in one.notes)
    yield from (f"not timed: {one.name}: {one.reason}" for one in report.not_timed)
    yield from (f"not real: {failure}" for failure in report.failures)
    yield from (f"in doubt: {doubt}" for doubt in report.doubts)


def _knee(knee: Knee) -> str:
    if knee.batch is None:
        return (
            f"no knee: images/s still rise at batch {knee.most_batch}, the largest that was timed, "
            f"to {knee.most:.1f}"
        )
    return (
        f"the knee is at batch {knee.batch} with {knee.per_second:.1f} images/s; the most are "
        f"{knee.most:.1f}, at batch {knee.most_batch}"
    )


def _fit(report: BenchReport, fit: Fit) -> str:
    budget = f"{report.asked.budget_ms:g} ms"
    if fit.missing:
        return (
            f"whether a batch is within {budget} takes {fit.missing} samples more, as a p90 needs "
            f"{SUPPORT[90.0]}"
        )
    if fit.batch is None:
        return f"no batch that was timed is within {budget}"
    return f"the largest batch within {budget} is {fit.batch}"


def noise(report: BenchReport) -> str:
    """Return what else the machine did meanwhile."""
    found = report.noise
    load = "not told" if found.load_average is None else f"{found.load_average:.2f}"
    others = "not told" if found.others is None else f"{found.others:.0%}"
    switches = "not told" if found.switches is None else f"{found.switches:,}"
    return (
        f"load average before {load} on {found.cores} processors; other processes took {others} of "
        f"them; {switches} involuntary context switches in {found.turns:,} turns; CPU "
        f"{report.environment.get('cpu', 'not told')}, "
        f"{report.environment.get('instructions', 'not told')}; governor "
        f"{report.environment.get('governor', 'not told')}"
    )


def to_json(report: BenchReport) -> str:
    """Return the record as JSON, and beside it the figures that follow from it."""
    record = msgspec.to_builtins(report)
    record = {"schema": record.pop("schema"), "verdict": report.verdict, **record}
    for one, entry in zip(report.latency, record["latency"], strict=True):
        entry |= latency.to_builtins(one)
    for one, entry in zip(report.on_device, record["on_device"], strict=True):
        entry |= latency.to_builtins(one)
    for timed, entry in zip(report.timed, record["timed"], strict=True):
        entry["checked"] |= {
            "outputs": timed.checked.outputs,
            "accuracy": timed.checked.accuracy,
        }
    record["comparisons"] = [{**c._asdict(), "speed": c.speed} for c in report.comparisons]
    record["fastest"] = {str(batch): names for batch, names in report.level.items()}
    record["knees"] = [knee._asdict() for knee in report.knees]
    record["fits"] = [fit._asdict() for fit in report.fits]
    record["failures"] = list(report.failures)
    record["definitions"] = definitions(report)
    return msgspec.json.format(msgspec.json.encode(record), indent=2).decode() + "\n"


def to_markdown(report: BenchReport) -> str:
    """Return the bench as one Markdown page."""
    rounds = max(one.warmup for one in report.latency)
    versions = ", ".join(f"{key} {value}" for key, value in report.environment.items())
    lines = [
        f"# Bench: {report.verdict.upper()}",
        "",
        *(f"- {escape(sentence)}" for sentence in said(report)),
        "",
        "## Latency",
        "",
        latency.method(msgspec.to_builtins(report.timing), rounds),
        "",
        *table(latency.HEADS, map(latency.row, report.latency)),
        "",
    ]
    if is_drawn(report):
        lines += [f"Throughput by batch size, with knee and budget, is in {throughput.FILE}.", ""]
    if report.on_device:
        rows = map(latency.row, report.on_device)
        lines += ["## By the device's own clock", "", *table(latency.HEADS, rows), ""]
    if report.comparisons:
        lines += ["## Ratios", "", *table(_RATIOS, map(ratio, report.comparisons)), ""]
    lines += [
        "## What was timed",
        "",
        *table(_CHECKED, map(checked, report.timed)),
        "",
        f"Inputs: {escape(', '.join(report.samples))}.",
        "",
        "## What the figures are",
        "",
        *(f"- {escape(note)}" for note in definitions(report)),
        "",
        "## The machine",
        "",
        escape(noise(report)) + ".",
        "",
        *([f"{escape(str(report.gpu))}.", ""] if report.gpu else []),
        f"{report.tool}; {escape(versions)}.",
    ]
    return "\n".join((*lines, ""))


def render(report: BenchReport) -> RenderableType:
    """Return the bench as something rich can print."""
    from rich.console import Group
    from rich.text import Text

    lines: list[RenderableType] = [
        _grid(latency.HEADS, [latency.row(one) for one in report.latency]),
        Text(""),
    ]
    if report.on_device:
        lines += [_grid(latency.HEADS, [latency.row(one) for one in report.on_device]), Text("")]
    if report.comparisons:
        lines += [_grid(_RATIOS, [ratio(one) for one in report.comparisons]), Text("")]
    lines += [_grid(_CHECKED, [checked(one) for one in report.timed]), Text("")]
    lines += [Text(sentence, style=_colour(sentence)) for sentence in said(report)]
    lines += [Text(f"the machine: {noise(report)}")]
    lines += [*([Text(f"the GPU: {report.gpu}")] if report.gpu else []), Text("")]
    lines += [Text(note, style="dim") for note in definitions(report)]
    return Group(*lines, Text(report.verdict, style=COLOURS[report.verdict]))


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        is_word = head in ("candidate", "beside", "", "timed outputs", "accuracy")
        grid.add_column(head, justify="left" if is_word else "right", overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _colour(sentence: str) -> str:
    for word, style in (("not real:", COLOURS["fail"]), ("not timed:", COLOURS["not checked"])):
        if sentence.startswith(word):
            return style
    return "yellow" if sentence.startswith("in doubt:") else ""


# ── The folder ──────────────────────────────────────────────────────────────────────


def check_folder(folder: Path) -> None:
    """Raise `OutputError` for what results cannot be written into, before anything is timed."""
    if (folder / "manifest.json").exists():
        raise OutputError(
            f"{folder.name} is a bundle, and holds its own files alone",
            hint="name another folder with --out",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {str(folder)!r}: {error.strerror or error}") from error


def is_drawn(report: BenchReport) -> bool:
    """Return whether there is a curve to draw: two batch sizes or more."""
    return len(report.batches) > 1


def write(report: BenchReport, folder: Path) -> None:
    """Write ``bench.json`` and ``bench.md``, and with two batch sizes or more the picture.

    One that an earlier bench left there does not stay beside figures that are not its own. Raises
    `OutputError`.
    """
    picture = folder / throughput.FILE
    try:
        picture.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {str(picture)!r}: {error.strerror or error}") from error
    write_text(folder / "bench.json", to_json(report))
    write_text(folder / "bench.md", to_markdown(report))
    if is_drawn(report):
        write_text(picture, throughput.render(report))
