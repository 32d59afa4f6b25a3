"""Figures as words, the same on every page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from exporter.evidence import at_least, at_most
from exporter.records import Artefact, File, Latency, Parity, Report, Verdict

NOT_MADE = "FAIL: not made"


class Row(NamedTuple):
    """One line of the main table."""

    artefact: str
    size: str
    fidelity: str
    quality: str
    sqnr: str
    agreement: str
    accuracy: str
    latency: str
    speedup: str


def heads(report: Report) -> Row:
    """Return the heads of the main table."""
    return Row(
        artefact="artefact",
        size="size",
        fidelity="fidelity",
        quality="quality",
        sqnr="SQNR",
        agreement="agreement",
        accuracy="accuracy",
        latency="p50 latency",
        speedup=f"vs {report.source.reference}",
    )


def rows(report: Report) -> list[Row]:
    """Return the main table: the reference, then every artefact, at the first batch size timed."""
    batch = report.latency[0].batch if report.latency else 0
    timed = {latency.name: latency for latency in report.latency if latency.batch == batch}
    reference = report.latency[0] if report.latency else None
    table = [
        Row(
            reference.name if reference else report.source.reference,
            "",
            "the reference",
            "is its float64",
            *_least(report.pytorch),
            milliseconds(reference),
            "1.00 ×" if reference else "",
        )
    ]
    unmade = [variant.precision for variant in report.variants if variant.refused]
    table += [Row(precision, "", NOT_MADE, "", "", "", "", "", "") for precision in unmade]
    for artefact in report.artefacts:
        latency = timed.get(artefact.name)
        table.append(
            Row(
                artefact.name,
                size(artefact.file),
                verdict(artefact, artefact.fidelity),
                verdict(artefact, artefact.quality),
                *_least(artefact.parity),
                milliseconds(latency),
                f"{reference.p50_ms / latency.p50_ms:.2f} ×" if latency and reference else "",
            )
        )
    return table


def _least(found: Sequence[Parity]) -> tuple[str, str, str]:
    """Return SQNR, agreement and accuracy on the held-out samples, of the output that is worst."""
    held_out = [parity for parity in found if parity.inputs == found[0].inputs]

    def least(values: Iterable[float | None]) -> float | None:
        return min((value for value in values if value is not None), default=None)

    return (
        least_sqnr(held_out),
        share(least(parity.agreement for parity in held_out)),
        share(least(parity.accuracy for parity in held_out)),
    )


def least_sqnr(found: Iterable[Parity]) -> str:
    """Return the SQNR of the output that is worst off."""
    known = (parity.sqnr_db for parity in found)
    return decibels(min((value for value in known if value is not None), default=None))


def verdict(artefact: Artefact, said: Verdict) -> str:
    """Return one of an artefact's two verdicts, and why it has none."""
    if artefact.refused:
        return NOT_MADE
    if said == "not checked" and artefact.not_run:
        return f"not checked: built, not run: {artefact.not_run}"
    return "FAIL" if said == "fail" else said


def size(file: File | None) -> str:
    return f"{file.size / 1e6:.1f} MB" if file else ""


def decibels(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f} dB" if math.isfinite(value) else "exact"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def proven(parity: Parity) -> str:
    """Return the agreement that the samples prove."""
    return "" if parity.agreement_proven is None else f"≥ {at_least(parity.agreement_proven)}"


def drop(parity: Parity) -> str:
    """Return the drop in accuracy, and from where to where the samples prove it to lie."""
    if parity.accuracy_drop is None or parity.accuracy_drop_bounds is None:
        return ""
    least, most = parity.accuracy_drop_bounds
    return f"{share(parity.accuracy_drop)} ({at_least(least)} to {at_most(most)})"


def margin(parity: Parity) -> str:
    """Return how much of its decision margin the worst sample has used up."""
    used, said = parity.margin_used, []
    if used is not None:
        said = [f"{100 * used:.2g}%" if used < 0.995 else f"{min(used, 10):.0%}"]
        said = [f"{said[0]} or more"] if used > 10 else said
    said += [f"{parity.undecided} undecided"] if parity.undecided else []
    return ", ".join(said)


def classes(parity: Parity) -> str:
    """Return how many classes the reference gives, and how many there are among the labels."""
    if not parity.classes:
        return ""
    return str(parity.classes) if parity.labels is None else f"{parity.classes} of {parity.labels}"


def shown(artefact: Artefact) -> Iterator[str]:
    """Yield what an artefact's labelled samples show of its quality, one line each."""
    for parity in artefact.parity:
        if parity.labels is not None and parity.agreeing is not None:
            named = "" if parity.output is None else f"{parity.output!r}: "
            yield (
                f"{named}{parity.agreeing} of {parity.samples} agree, proven {proven(parity)}; "
                f"accuracy drop {drop(parity)}; margin used "
                f"{margin(parity) or 'not known'}; "
                f"classes {classes(parity)}"
            )


def milliseconds(latency: Latency | None) -> str:
    return f"{latency.p50_ms:.2f} ms" if latency else ""


def number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def one_minus(cosine: float | None) -> str:
    """Return 1 − cosine: 1.000000 says nothing."""
    return "" if cosine is None else f"{max(0.0, 1 - cosine):.1e}"


def gates(parity: Parity) -> str:
    signs = {True: "≤", False: "≥"}
    upper = parity.tolerance.UPPER
    bounds = parity.tolerance.bounds().items()
    return ", ".join(f"{name} {signs[name in upper]} {bound:g}" for name, bound in bounds) or "none"
