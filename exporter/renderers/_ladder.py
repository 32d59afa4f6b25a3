"""The ladder as words: what each step from the float64 reference down to an engine adds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from exporter.records import Artefact, Fidelity, LayerError, Report, Rung, Variant, WorstCase

MOST_LOSSES = 3
_WIDTH = 16  # of the longest bar
_LEAST, _MOST = -9.0, 0.0  # decades of relative error from which a bar starts and where it is full


class Step(NamedTuple):
    """One line of the waterfall."""

    rung: str
    above: str
    added: str
    bar: str
    total: str
    flips: str
    total_flips: str
    multiple: str
    layers: str
    fidelity: str


HEADS = Step(
    "step",
    "from",
    "adds",
    "",
    "in all",
    "flips",
    "in all",
    "× its precision",
    "layers right",
    "fidelity",
)


def steps(report: Report) -> list[Step]:
    """Return the waterfall, from the top down; what did not run has a line with no figures."""
    table = [Step(report.source.top, "", "", "", "", "", "", "", "", "the top")]
    table += [_step(rung) for rung in report.rungs]
    for artefact in report.artefacts:
        if artefact.rung:
            table.append(_step(artefact.rung))
        else:
            said = "FAIL: not made" if artefact.refused else "not checked"
            table.append(Step(artefact.name, "", "", "", "", "", "", "", "", said))
    return table


def findings(report: Report) -> Iterator[str]:
    """Yield what is known of every rung that is not plainly right, one sentence each."""
    for rung in report.rungs:
        if rung.fidelity:
            yield from (f"{rung.name}: {why}" for why in rung.fidelity.failures)
    for size in report.sizes:
        yield from size.failures
    for variant in report.variants:
        if variant.refused:
            yield f"{variant.precision}: {variant.refused}"
        for artefact in variant.artefacts:
            yield from (f"{artefact.name}: {why}" for why in _of_artefact(artefact))
            fidelity = artefact.rung.fidelity if artefact.rung else None
            is_faithful = fidelity is not None and fidelity.verdict == "pass"
            if fidelity and is_faithful and any(parity.failures for parity in artefact.parity):
                lines = _of_quality(variant, fidelity.limit)
                yield from (f"{artefact.name}: {line}" for line in lines)


def _of_artefact(artefact: Artefact) -> Iterator[str]:
    yield from artefact.failures
    fidelity = artefact.rung.fidelity if artefact.rung else None
    if fidelity and fidelity.unseen and not artefact.failures:
        yield f"not compared layer by layer: {fidelity.unseen}"


def _of_quality(variant: Variant, limit: float) -> Iterator[str]:
    """Name the layers at which a precision loses most, where a gate of quality was missed."""
    beyond = [loss for loss in variant.losses if loss.exceeds(limit)]
    if beyond:
        yield f"the first layer that loses more than its precision explains is {_loss(beyond[0])}"
    worst = sorted(variant.losses, key=lambda loss: loss.relative or 0.0, reverse=True)
    if worst:
        named = ", ".join(_loss(loss) for loss in worst[:MOST_LOSSES])
        yield f"the layers that lose most by themselves are {named}"


def _loss(loss: LayerError) -> str:
    if loss.relative is None or loss.multiple is None:
        return f"{loss.layer} ({loss.detail})"
    return f"{loss.layer} ({100 * loss.relative:.2g} %, {loss.multiple:.2g} times what it must)"


def share(loss: LayerError | None) -> str:
    """Return what a layer loses, and in brackets in multiples of what it must."""
    if loss is None or loss.relative is None or loss.multiple is None:
        return "" if loss is None else loss.detail or ""
    return f"{100 * loss.relative:.2g} % ({loss.multiple:.2g})"


def _step(rung: Rung) -> Step:
    fidelity = rung.fidelity
    return Step(
        rung=rung.name,
        above=rung.above,
        added=error(rung.error_above),
        bar=bar(rung.error_above),
        total=error(rung.error_top),
        flips=count(rung.flips_above),
        total_flips=count(rung.flips_top),
        multiple=_multiple(fidelity),
        layers=_layers(fidelity),
        fidelity=_verdict(fidelity),
    )


def error(value: float | None) -> str:
    """Return a relative L2 error, and in dB; not finite where there is none."""
    if value is None:
        return "not finite"
    return f"{value:.1e} {-20 * math.log10(value):4.0f} dB" if value > 0 else "nothing"


def bar(value: float | None) -> str:
    """Return a bar whose length is the error's logarithm, from 1e-9 to 1."""
    if value is None:
        return "█" * _WIDTH
    if value <= 0:
        return ""
    share = (math.log10(value) - _LEAST) / (_MOST - _LEAST)
    return "█" * max(1, round(_WIDTH * min(1.0, max(0.0, share))))


def count(value: int | None) -> str:
    return "" if value is None else str(value)


def _multiple(fidelity: Fidelity | None) -> str:
    if fidelity is None or fidelity.multiple is None:
        return ""
    return f"{fidelity.multiple:.2f} (at most {fidelity.limit:g})"


def _layers(fidelity: Fidelity | None) -> str:
    if fidelity is None or not fidelity.layers:
        return ""
    worst = fidelity.worst.size if fidelity.worst else 0.0
    if fidelity.first is not None:
        return f"not {fidelity.first.layer}"
    return f"all {fidelity.layers}, worst {worst:.2f}"


def _verdict(fidelity: Fidelity | None) -> str:
    if fidelity is None:
        return "the yardstick"
    return "FAIL" if fidelity.verdict == "fail" else fidelity.verdict


def worst(case: WorstCase) -> str:
    """Return what a search for the worst case came to, as one line."""
    logit = "logit " if case.has_classes and not case.is_relative else ""
    unit = " of its output's root mean square" if case.is_relative else ""
    said = (
        f"{case.artefact}: the largest {logit}gap near a sample is {case.gap:.3g}{unit}, on the "
        f"samples themselves {case.gap_on_samples:.3g} ({case.tried} inputs tried, none further "
        f"from a sample than {case.radius:.0%} of the data's range)"
    )
    if case.nonfinite:
        said += f"; {case.nonfinite} inputs gave values that are not finite"
    flip = case.first_flip
    if not case.has_classes:
        return said
    if flip is None:
        return f"{said}; no label flip"
    where = "on a sample itself" if flip.step == 0 else f"at step {flip.step}"
    return (
        f"{said}; {case.flips + case.flips_on_samples} label flips, the first {where}, "
        f"{flip.distance:.3g} away: {flip.reference}, which the network prefers by "
        f"{flip.margin:.2g}, became {flip.artefact}"
    )
