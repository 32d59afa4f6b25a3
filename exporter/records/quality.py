"""Quality: how far a candidate's outputs are from the reference's, and what that proves."""

from __future__ import annotations

import math

from exporter import evidence
from exporter.records.asked import Tolerance
from exporter.records.base import Found, Verdict


class Parity(Found, frozen=True):
    """The distance between two things that should compute the same.

    With r the reference's outputs, y the candidate's, both (samples, outputs), in float64, and
    t a sample's largest output in r:

        max_abs         max |y − r|
        rel_l2          ‖y − r‖ / ‖r‖, over all samples at once
        sqnr_db         −20 log₁₀ rel_l2, the signal-to-quantisation-noise ratio in dB
        cosine          the smallest cosine similarity of one sample's y and r
        margin_used     max ((yⱼ − yₜ) − (rⱼ − rₜ)) / (rₜ − rⱼ) over j ≠ t and all samples: how much
                        of its decision margin the worst sample has used up; from 1 on it flips
        noise_multiple  rel_l2 / noise_floor, with noise_floor = the float32 reference's own
        agreement       the share of samples with the same largest output, of those decided
        accuracy        the share of samples whose largest output is the label
        accuracy_drop   the reference's accuracy − the candidate's, (lost − gained) / samples

    What the samples prove with 95 % confidence is between ``agreement_proven`` and
    ``agreement_possible``, and within ``accuracy_drop_bounds``; `exporter.evidence` has the
    formulas. ``undecided`` samples have their largest output in r more than once, and may agree
    or not. ``lost`` samples the reference alone labels right, ``gained`` ones the candidate alone.
    ``classes`` and ``labels`` count the different t and the different labels; ``constant`` names
    a side whose output is the same for every sample.

    Where the candidate gives the largest scores alone, r and y are what their places have
    (`exporter.topk`), and there is no margin.

    Figures are None where a value is not finite or where there is nothing to compute them from, as
    those of classes are for a tensor that is no classification, whose ``classes`` are 0. ``output``
    is None for a network's only one.
    """

    inputs: str
    samples: int
    max_abs: float | None
    rel_l2: float | None
    cosine: float | None
    margin_used: float | None
    noise_floor: float | None
    agreeing: int | None
    undecided: int
    classes: int
    labels: int | None
    reference_correct: int | None
    lost: int | None
    gained: int | None
    constant: tuple[str, ...]
    nonfinite_reference: int
    nonfinite_candidate: int
    tolerance: Tolerance
    output: str | None = None

    @property
    def where(self) -> str:
        """Return what was compared, as the end of a sentence."""
        named = "" if self.output is None else f"for {self.output!r} "
        return f"{named}on the {self.inputs}"

    @property
    def sqnr_db(self) -> float | None:
        if self.rel_l2 is None:
            return None
        return -20 * math.log10(self.rel_l2) if self.rel_l2 > 0 else math.inf

    @property
    def noise_multiple(self) -> float | None:
        if self.rel_l2 == 0:
            return 0.0
        if self.rel_l2 is None or not self.noise_floor:
            return None
        return self.rel_l2 / self.noise_floor

    @property
    def agreement(self) -> float | None:
        decided = self.samples - self.undecided
        return None if self.agreeing is None or not decided else self.agreeing / decided

    @property
    def agreement_proven(self) -> float | None:
        if self.agreeing is None:
            return None
        return evidence.share_bounds(self.agreeing, self.samples)[0]

    @property
    def agreement_possible(self) -> float | None:
        if self.agreeing is None:
            return None
        return evidence.share_bounds(self.agreeing + self.undecided, self.samples)[1]

    @property
    def reference_accuracy(self) -> float | None:
        return None if self.reference_correct is None else self.reference_correct / self.samples

    @property
    def accuracy(self) -> float | None:
        if self.reference_correct is None or self.lost is None or self.gained is None:
            return None
        return (self.reference_correct - self.lost + self.gained) / self.samples

    @property
    def accuracy_drop(self) -> float | None:
        if self.lost is None or self.gained is None:
            return None
        return (self.lost - self.gained) / self.samples

    @property
    def accuracy_drop_bounds(self) -> tuple[float, float] | None:
        if self.lost is None or self.gained is None:
            return None
        return evidence.drop_bounds(self.lost, self.gained, self.samples)

    @property
    def failures(self) -> tuple[str, ...]:
        """Return one phrase per missed gate: the figure and the limit."""
        bad = [
            f"{count} outputs of the {who} are NaN or infinite {self.where}"
            for who, count in (
                ("reference", self.nonfinite_reference),
                ("candidate", self.nonfinite_candidate),
            )
            if count
        ]
        shown = self._shown()
        for name, bound in self.tolerance.bounds().items():
            figure = getattr(self, name)
            if name in shown:
                bad += [shown[name].said] if shown[name].met is False else []
            elif figure is None:
                bad.append(f"{name} could not be computed {self.where}")
            elif name in Tolerance.UPPER and not figure <= bound:
                bad.append(f"{name} {evidence.apart(figure, '>', bound)} {self.where}")
            elif name in Tolerance.LOWER and not figure >= bound:
                bad.append(f"{name} {evidence.apart(figure, '<', bound)} {self.where}")
        return tuple(bad)

    @property
    def unproven(self) -> tuple[str, ...]:
        """Return one phrase per gate that the samples neither meet nor miss, or what they lack."""
        if not self.tolerance.bounds():
            return ()
        lacking = [f"{lack} {self.where}" for lack in self._lacks()]
        return (*lacking, *(s.said for s in self._shown().values() if s.met is None))

    @property
    def verdict(self) -> Verdict:
        if self.failures:
            return "fail"
        if self.unproven:
            return "not enough evidence"
        return "pass" if self.tolerance.bounds() else "not checked"

    def _shown(self) -> dict[str, evidence.Shown]:
        """Return what the samples show of each gate that is a share, but of values not finite."""
        shown = {}
        gates, on = self.tolerance, self.where
        if gates.agreement is not None and self.agreeing is not None:
            shown["agreement"] = evidence.judge_agreement(
                self.agreeing, self.undecided, self.samples, gates.agreement, on
            )
        if gates.accuracy_drop is not None and self.labels is None:
            shown["accuracy_drop"] = evidence.Shown(None, f"accuracy_drop needs labels {on}")
        if gates.accuracy_drop is not None and self.lost is not None and self.gained is not None:
            shown["accuracy_drop"] = evidence.judge_drop(
                self.lost, self.gained, self.samples, gates.accuracy_drop, on
            )
        return shown

    def _lacks(self) -> list[str]:
        """Return why samples like these show nothing, however near the outputs are."""
        if self.samples < 2:
            return ["one sample alone shows nothing"]
        if self.constant:
            return [f"the {side}'s output is the same for every sample" for side in self.constant]
        if self.labels is None and self.tolerance.agreement is None:
            return []  # noise, say: nothing rests on classes
        lacks = []
        if self.undecided == self.samples:
            lacks.append("the reference has no one largest output for any sample")
        elif self.classes == 1:
            lacks.append("the reference's largest output is the same for every sample")
        if self.labels == 1:
            lacks.append("the labels are of one class alone")
        return lacks
