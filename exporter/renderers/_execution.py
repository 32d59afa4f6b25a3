"""In words: in which type layers really ran, and whether that was worth it."""

from __future__ import annotations

from collections.abc import Iterator

from exporter.intervals import FEWEST_PAIRS
from exporter.records import Artefact, Comparison, Executed, Execution, Report

_SOURCES = {
    "profile": "by the profile of a run",
    "runtime": "by how the runtime is made",
    "engine inspector": "by the engine inspector",
    "engine text": "by the text in the engine, a hint: nothing was run",
}


def happened(artefact: Artefact) -> Iterator[str]:
    """Yield how many layers ran as they were asked to, one line for each type asked for."""
    execution = artefact.execution
    if execution is None:
        return
    if execution.unknown:
        yield f"not checked in which type its layers run: {execution.unknown}"
    verb = "compiled to" if execution.hint else "ran in"
    for kind, (count, total) in execution.counts.items():
        layers = [layer for layer in execution.layers if layer.asked == kind]
        untold = sum(layer.ran is None for layer in layers)
        rest = f", {untold} not told" if untold else ""
        yield (
            f"{count} of {total} {_noun(layers)} {verb} {_type(kind)}{rest} "
            f"({_SOURCES[execution.source]}){_fused(layers)}"
        )


def missed(execution: Execution) -> Iterator[str]:
    """Yield the layers that did not run as asked, those with one reason in one line."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for layer in (*execution.missed, *execution.untold):
        ran = "not told" if layer.ran is None else f"in {_type(layer.ran)}"
        reason = layer.reason or "for a reason that is not known"
        groups.setdefault((_type(layer.asked), ran, reason), []).append(layer.layer)
    for (asked, ran, reason), names in groups.items():
        yield f"{asked} asked for, {ran}: {', '.join(names)}: {reason}"


def compared(report: Report, one: Comparison) -> str:
    """Return what a comparison shows, and what to ship where the baseline wins."""
    where = f"on this machine at batch {one.batch}"
    if one.interval is None:
        return (
            f"{one.artefact} takes {one.ratio:.2f} times as long as {one.baseline} {where}: too "
            f"few samples to tell ({FEWEST_PAIRS} or more do)"
        )
    low, high = one.interval
    if one.speed == "no significant difference":
        return (
            f"{one.artefact} shows no significant difference from {one.baseline} {where}: "
            f"{one.ratio:.2f} times its latency ({low:.2f} to {high:.2f})"
        )
    ratio = one.ratio
    if one.speed == "faster":
        ratio, low, high = 1 / ratio, 1 / high, 1 / low
    said = (
        f"{one.artefact} is {ratio:.2f} times {one.speed} ({low:.2f} to {high:.2f}) than "
        f"{one.baseline} {where}"
    )
    verdicts = {artefact.name: artefact.verdict for artefact in report.artefacts}
    if one.speed == "slower" and verdicts[one.baseline] == "pass":
        return f"{said}: ship {one.baseline} there"
    return said


def recommended(report: Report) -> Iterator[str]:
    """Yield what to ship, and which faster artefacts have not passed."""
    found = report.recommendation
    if found is None:
        return
    if found.artefact is None:
        yield "nothing to recommend: no artefact that was timed passes"
    else:
        level = f"; not shown to be slower: {', '.join(found.level)}" if found.level else ""
        yield (
            f"recommended: {found.artefact}, the fastest of those that pass on this machine at "
            f"batch {found.batch}{level}"
        )
    for name, verdict in found.unproven if found.artefact else ():
        yield f"faster, but not recommended: {name} ({verdict})"


def _type(kind: str) -> str:
    head, _, rest = kind.partition(" ")
    return f"{head.upper()} {rest}".strip()


def _noun(layers: list[Executed]) -> str:
    return "convolutions" if {layer.op for layer in layers} == {"Conv"} else "layers"


def _fused(layers: list[Executed]) -> str:
    told = [layer.fused for layer in layers if layer.fused is not None]
    if not told:
        return ""
    parts = (f"{part} in {sum(part in own for own in told)}" for part in ("bias", "ReLU", "sum"))
    return f"; fused, of {len(told)}: {', '.join(parts)}"
