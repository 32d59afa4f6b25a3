"""What became of each bug in each network, and how that adds up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from exporter.fidelity import LIMIT
from mutation.bugs import Bug
from mutation.honest import Run
from mutation.judge import Case, judge

Fate = Literal["caught", "refused", "missed", "the same", "no place"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One bug in one network and precision.

    ``by_outputs`` and ``by_layers`` say whether either comparison alone would have caught it,
    ``named`` of what is caught whether the first layer beyond the limit has the bug: None where
    no layer has it; the bug is in ``layers`` of them. ``detail`` is the verdict in words.
    """

    bug: str
    net: str
    precision: str
    fate: Fate
    by_outputs: bool = False
    by_layers: bool = False
    nonfinite: bool = False
    named: bool | None = None
    layers: int = 0
    detail: str = ""


def try_bug(case: Case, bug: Bug, *, seed: int = 0) -> Outcome:
    """Seed a bug and judge what comes of it."""
    where = (bug.name, case.net.name, case.precision)
    mutant = bug.apply(case, seed=seed)
    if mutant is None:
        return Outcome(*where, "no place")
    got = judge(case, mutant.model, as_written=mutant.as_written)
    if mutant.as_written and case.same(mutant.model):
        return Outcome(*where, "the same")
    if isinstance(got, str):
        return Outcome(*where, "refused", detail=got)
    touched = case.layers(mutant.model)
    first = got.first.layer if got.first is not None else None
    fails = got.verdict == "fail"
    return Outcome(
        *where,
        "caught" if fails else "missed",
        by_outputs=bool(got.nonfinite) or got.multiple is None or not got.multiple <= LIMIT,
        by_layers=first is not None,
        nonfinite=bool(got.nonfinite),
        named=first in touched if touched and fails else None,
        layers=len(touched),
        detail="; ".join(got.failures) or f"{got.multiple:.3g} times its noise; worst: {got.worst}",
    )


def score(outcomes: Sequence[Outcome]) -> str:
    """Return a table by bug, then the total."""
    names = dict.fromkeys(outcome.bug for outcome in outcomes)
    width = max(map(len, names), default=0)
    head = f"{'bug':<{width}}  seeded  caught  outputs  layers  named  same  no place"
    line = "─" * len(head)
    rows = [f"{name:<{width}}  {_row([o for o in outcomes if o.bug == name])}" for name in names]
    total = f"{'all':<{width}}  {_row(outcomes)}"
    return "\n".join([head, line, *rows, line, total, "", *_shares(outcomes)])


def seeded(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return those that are bugs: there was a place for them, and the function is another one."""
    return [o for o in outcomes if o.fate not in ("the same", "no place")]


def caught(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return those that the gate catches."""
    return [o for o in outcomes if o.fate in ("caught", "refused")]


def _row(of: Sequence[Outcome]) -> str:
    bugs = seeded(of)
    figures = (
        (6, len(bugs)),
        (6, len(caught(bugs))),
        (7, _alone(bugs, "by_outputs")),
        (6, _alone(bugs, "by_layers")),
        (5, sum(o.named is True for o in bugs)),
        (4, sum(o.fate == "the same" for o in of)),
        (8, sum(o.fate == "no place" for o in of)),
    )
    return "  ".join(f"{figure:>{wide}}" for wide, figure in figures)


def _alone(bugs: Sequence[Outcome], comparison: str) -> int:
    """Return how many one comparison alone would catch; what is refused needs neither."""
    return sum(getattr(o, comparison) or o.fate == "refused" for o in bugs)


def _shares(outcomes: Sequence[Outcome]) -> Iterator[str]:
    bugs = seeded(outcomes)
    named = [o for o in bugs if o.named is not None]
    single = [o for o in named if o.layers == 1]
    refused, infinite = sum(o.fate == "refused" for o in bugs), sum(o.nonfinite for o in bugs)
    yield _share("caught", len(caught(bugs)), len(bugs))
    yield f"  of them {refused} were refused when loaded or run, and {infinite} not finite"
    yield _share("by the outputs alone", _alone(bugs, "by_outputs"), len(bugs))
    yield _share("by the layers alone", _alone(bugs, "by_layers"), len(bugs))
    yield _share("first layer named has the bug", sum(bool(o.named) for o in named), len(named))
    yield _share("  where one layer has it", sum(bool(o.named) for o in single), len(single))
    for said, of in (
        ("missed", [o for o in bugs if o.fate == "missed"]),
        ("named wrongly", [o for o in named if not o.named]),
    ):
        yield from (f"{said}: {o.bug}, {o.net}, {o.precision}: {o.detail}" for o in of)


def _share(what: str, part: int, whole: int) -> str:
    return f"{what}: {part} of {whole} ({part / max(whole, 1):.2%})"


def alarms(runs: Sequence[Run]) -> list[Run]:
    """Return the runs that the gate fails, in which nothing is wrong."""
    return [run for run in runs if run.fidelity.verdict != "pass"]


def honest_score(runs: Sequence[Run]) -> str:
    """Return the largest multiples by precision and runtime, beside the limit, and the alarms."""
    kinds = dict.fromkeys((run.precision, run.by.partition(",")[0]) for run in runs)
    rows = [f"{'honest runs':<32}   runs  outputs  layers  (at most {LIMIT:g})"]
    for precision, by in kinds:
        own = [r for r in runs if r.precision == precision and r.by.startswith(f"{by},")]
        ends = max(r.fidelity.multiple or 0.0 for r in own)
        worst = max((r.fidelity.worst for r in own if r.fidelity.worst), key=lambda w: w.size)
        kind = f"{precision}, {by}"
        rows.append(f"{kind:<32}  {len(own):>5}  {ends:>7.3f}  {worst.size:>6.3f}  {worst}")
    found = alarms(runs)
    rows += ["", f"false alarms: {len(found)} of {len(runs)}"]
    rows += [f"{r.net}, {r.precision}, {r.by}: {'; '.join(r.fidelity.failures)}" for r in found]
    return "\n".join(rows)
