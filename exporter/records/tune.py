"""A search for the best mixture of precisions: what was asked for, tried and found."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from exporter.records.asked import Tolerance
from exporter.records.base import Asked, Found, Verdict, whole
from exporter.records.latency import Latency
from exporter.records.made import File
from exporter.records.quality import Parity
from exporter.records.report import Source, Stage

Objective: TypeAlias = Literal["latency", "size", "sqnr"]


class Budget(Asked, frozen=True):
    """What a mixture may cost, and what is to be best within that.

    ``max_drop`` is the largest drop in accuracy, as a share of all samples there could be, of a
    network whose one output is a classification, and ``min_sqnr`` the least SQNR in dB of every
    output, so that the worst counts; ``max_latency`` is in ms for one batch of the
    first size that the profile times, ``max_size`` in MB (10⁶ bytes) of the ONNX file.
    """

    objective: Objective = "latency"
    max_drop: float | None = None
    min_sqnr: float | None = None
    max_latency: float | None = None
    max_size: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_drop", "min_sqnr", "max_latency", "max_size"):
            bound = getattr(self, name)
            if bound is not None and not (math.isfinite(bound) and bound > 0):
                raise ValueError(f"{name} must be above 0 and finite, found {bound:g}")
        if self.max_drop is not None and self.max_drop > 1:
            raise ValueError(f"max_drop is a share from 0 to 1, found {self.max_drop:g}")
        if self.max_drop is not None and self.min_sqnr is not None:
            raise ValueError("max_drop and min_sqnr are two budgets for one thing: choose one")
        exact = self.max_drop is None and self.min_sqnr is None
        if self.objective == "sqnr" and self.max_latency is None and self.max_size is None:
            raise ValueError(
                "the objective sqnr needs max_latency or max_size, since without either the least "
                "quantised network is always best"
            )
        if self.objective != "sqnr" and exact:
            raise ValueError(f"the objective {self.objective} needs a budget: max_drop or min_sqnr")

    @property
    def tolerance(self) -> Tolerance:
        """Return the side of the budget that is about quality."""
        return Tolerance(accuracy_drop=self.max_drop, sqnr_db=self.min_sqnr)

    def __str__(self) -> str:
        words = {
            "max_drop": "an accuracy drop of at most {:.10g}%",
            "min_sqnr": "an SQNR of at least {:g} dB",
            "max_latency": "a latency of at most {:g} ms",
            "max_size": "at most {:g} MB",
        }
        said = [
            form.format(100 * bound if name == "max_drop" else bound)
            for name, form in words.items()
            if (bound := getattr(self, name)) is not None
        ]
        best = {"latency": "the least latency", "size": "the least size", "sqnr": "the best SQNR"}
        return f"{best[self.objective]} with {' and '.join(said)}"


class Sensitivity(Found, frozen=True):
    """What quantising one layer alone does to an output: ‖y − r‖ / ‖r‖, r that of FP32.

    Of several it is ``output``, the one that loses most. ``rel_l2`` is None where an output is not
    finite, or the layer cannot be quantised at all, for which ``refused`` has the reason.
    """

    layer: str
    rel_l2: float | None
    refused: str | None = None
    output: str | None = None

    @property
    def sqnr_db(self) -> float | None:
        if self.rel_l2 is None:
            return None
        return -20 * math.log10(self.rel_l2) if self.rel_l2 > 0 else math.inf


class Candidate(Found, frozen=True):
    """One graph that was made, run on the validation samples, and timed.

    ``parity`` is of each output, and empty where it was not run; of several the worst counts.
    ``keep`` has all layers that its precision's option of that name holds, None for a precision
    that is as the profile has it. ``same_as`` names an earlier candidate whose graph it is, node
    for node, so that it was not measured again; ``refused`` says why it could not be made or run.
    """

    name: str
    precision: str
    keep: tuple[str, ...] | None
    file: File | None = None
    notes: tuple[str, ...] = ()
    parity: tuple[Parity, ...] = ()
    latency: Latency | None = None
    same_as: str | None = None
    refused: str | None = None

    @property
    def megabytes(self) -> float:
        return self.file.size / 1e6 if self.file else math.inf

    @property
    def worst(self) -> Parity | None:
        return worst_of(self.parity)

    @property
    def sqnr_db(self) -> float | None:
        return self.worst.sqnr_db if self.worst else None

    @property
    def accuracy_drop(self) -> float | None:
        """Return that of the output that labels are of, if there is one."""
        drops = (parity.accuracy_drop for parity in self.parity)
        return next((drop for drop in drops if drop is not None), None)

    def is_good_enough(self, budget: Budget) -> bool:
        """Return whether the figures seen on the validation samples are within the budget."""
        if not self.parity or any(parity.nonfinite_candidate for parity in self.parity):
            return False
        if budget.max_drop is not None:
            drop = self.accuracy_drop
            return drop is not None and drop <= budget.max_drop
        if budget.min_sqnr is not None:
            return self.sqnr_db is not None and self.sqnr_db >= budget.min_sqnr
        return True

    def is_cheap_enough(self, budget: Budget) -> bool:
        """Return whether latency and size as measured are within the budget."""
        if budget.max_size is not None and self.megabytes > budget.max_size:
            return False
        if budget.max_latency is None:
            return True
        return self.latency is not None and self.latency.p50_ms <= budget.max_latency


def worst_of(outputs: Iterable[Parity]) -> Parity | None:
    """Return the parity of the output that lost most, one that is not finite before others."""
    return max(outputs, key=lambda p: math.inf if p.rel_l2 is None else p.rel_l2, default=None)


class TuneReport(Found, frozen=True):
    """The record of one search.

    ``front`` names the candidates that no other beats in SQNR, latency and size at once;
    ``choice`` is one of them or an equal, and ``nearest`` the best of a search without a choice.
    ``confirmation`` has each output of the choice on the evaluation samples, which the search never
    saw, and is empty without a choice.
    """

    schema: int
    tool: str
    source: Source
    profile: dict[str, Any]
    environment: dict[str, str]
    calibration: str
    precision: str
    runtime: str
    budget: Budget
    validation: str
    sensitivities: tuple[Sensitivity, ...]
    candidates: tuple[Candidate, ...]
    front: tuple[str, ...]
    choice: str | None
    nearest: str | None
    confirmation: tuple[Parity, ...]
    findings: tuple[str, ...]
    doubts: tuple[str, ...]
    stages: tuple[Stage, ...]

    @property
    def chosen(self) -> Candidate | None:
        return next((c for c in self.candidates if c.name == self.choice), None)

    @property
    def verdict(self) -> Verdict:
        """Return whether the choice keeps the budget on samples that the search never saw."""
        if self.choice is None:
            return "fail"
        return whole(parity.verdict for parity in self.confirmation)
