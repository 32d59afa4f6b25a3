"""Sizes of the input as words: what was found at each, for pages and for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from exporter.records import Artefact, Fidelity, Parity, Report, Verdict, worst
from exporter.renderers import _figures as figures

LABELS = (
    "figures of labels and classes are those at the size the engines are tuned for: pictures in "
    "another size are not the held-out ones"
)


class Row(NamedTuple):
    """One artefact at one size."""

    artefact: str
    size: str
    fidelity: str
    multiple: str
    quality: str
    sqnr: str
    noise: str
    largest: str


HEADS = Row(
    "artefact",
    "height × width",
    "fidelity",
    "× its precision",
    "quality",
    "SQNR",
    "SQNR on noise",
    "largest error",
)


def optimum(report: Report) -> str | None:
    """Return the height and width that engines are tuned for, None where there are no others."""
    sides = next((spec.sides for spec in report.source.inputs if spec.sides), None)
    return None if sides is None else " × ".join(map(str, sides))


def rows(report: Report) -> Iterator[Row]:
    """Yield every artefact at its own size and at those beside it; none where the size is fixed."""
    own = optimum(report)
    if own is None:
        return
    for artefact in report.artefacts:
        fidelity = artefact.rung.fidelity if artefact.rung else None
        yield _row(artefact, f"{own} (tuned for)", fidelity, artefact.parity)
        for size in artefact.sizes:
            yield _row(
                artefact, size.name, size.fidelity, size.parity, (size.faithful, size.quality)
            )


def _row(
    artefact: Artefact,
    size: str,
    fidelity: Fidelity | None,
    parity: Sequence[Parity],
    verdicts: tuple[Verdict, Verdict] | None = None,
) -> Row:
    own = fidelity.verdict if fidelity else "not checked"
    faithful, quality = verdicts or (own, worst(one.verdict for one in parity))
    first = parity[0].inputs if parity else ""
    real = [one for one in parity if one.inputs == first]
    noise = [one for one in parity if one.inputs != first]
    return Row(
        artefact.name,
        size,
        figures.verdict(artefact, faithful),
        "" if fidelity is None or fidelity.multiple is None else f"{fidelity.multiple:.2f}",
        figures.verdict(artefact, quality),
        figures.least_sqnr(real),
        figures.least_sqnr(noise),
        figures.number(max((p.max_abs for p in real if p.max_abs is not None), default=None)),
    )


def lines(report: Report) -> Iterator[str]:
    """Yield one line for each artefact that ran, with what was found at each size."""
    for artefact in report.artefacts:
        if artefact.sizes and not artefact.not_run and not artefact.refused:
            found = (
                f"at {size.name} fidelity {size.faithful}{_figures(size.fidelity, size.parity)}"
                for size in artefact.sizes
            )
            yield f"{artefact.name}: {'; '.join(found)}"


def _figures(fidelity: Fidelity | None, parity: Sequence[Parity]) -> str:
    if fidelity is None or not parity:
        return ""
    times = "" if fidelity.multiple is None else f"{fidelity.multiple:.2f} × its precision, "
    real = [one for one in parity if one.inputs == parity[0].inputs]
    return f" ({times}SQNR {figures.least_sqnr(real) or 'not finite'})"
