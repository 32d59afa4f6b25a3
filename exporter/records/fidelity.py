"""Fidelity: whether an artefact computes the graph that was asked for, and where it does not."""

from __future__ import annotations

import math

from exporter.records.base import Found, Verdict


class LayerError(Found, frozen=True):
    """One node's own error: what it makes of the artefact's own inputs, beside what it should.

    ``layer`` is its name in the PyTorch module, ``multiple`` its error in the channel that is worst
    off, in standard deviations of what its precision must lose there; ``relative`` is the error of
    the whole tensor. Both are None where there is no number, and ``detail`` says why.
    """

    layer: str
    op: str
    tensor: str
    multiple: float | None
    relative: float | None
    detail: str | None = None

    @property
    def size(self) -> float:
        return math.inf if self.multiple is None else self.multiple

    def exceeds(self, limit: float) -> bool:
        return not self.size <= limit

    def __str__(self) -> str:
        if self.multiple is None:
            return f"{self.layer} ({self.op}), where {self.tensor!r} {self.detail}"
        where = f" in {self.detail}" if self.detail else ""
        return f"{self.layer} ({self.op}), off by {self.multiple:.3g} times its rounding{where}"


class Fidelity(Found, frozen=True):
    """Whether an artefact computes the graph that was asked for: `exporter.fidelity`.

    ``error`` is ‖y − r‖ / ‖r‖, None if a value is not finite; ``floor`` what the declared precision
    must lose at worst, so that ``multiple`` = error / floor is at most ``limit``; ``layers`` counts
    those compared one by one, ``worst`` and ``first`` are the worst of them and the first beyond
    the limit. ``cause`` says what is known of it, ``unseen`` why there are no layers. Of several
    outputs the figures are those of the one that is worst off, ``output``.
    """

    against: str
    samples: int
    error: float | None
    floor: float | None
    limit: float
    nonfinite: int = 0
    layers: int = 0
    worst: LayerError | None = None
    first: LayerError | None = None
    cause: str | None = None
    unseen: str | None = None
    output: str | None = None

    @property
    def multiple(self) -> float | None:
        if self.error is None or self.floor is None:
            return None
        if self.error == 0:
            return 0.0
        return self.error / self.floor if self.floor else math.inf

    @property
    def failures(self) -> tuple[str, ...]:
        bad = []
        if self.nonfinite:
            bad.append(f"{self.nonfinite} outputs are NaN or infinite")
        elif self.multiple is not None and not self.multiple <= self.limit:
            said = "its outputs are" if self.output is None else f"its {self.output!r} is"
            bad.append(
                f"{said} {self.multiple:.3g} times as far from {self.against} as its "
                f"precision explains (at most {self.limit:g})"
            )
        if self.first is not None:
            bad.append(f"it leaves the graph at {self.first}")
        if bad and self.cause:
            bad.append(self.cause)
        return tuple(bad)

    @property
    def verdict(self) -> Verdict:
        if self.failures:
            return "fail"
        return "not checked" if self.multiple is None else "pass"


class Rung(Found, frozen=True):
    """One step of the ladder from the reference in float64 down to an engine.

    ``error`` and ``flips`` are the relative L2 error and the number of samples whose largest output
    is another one, both against the rung ``above`` and against the ``top``; None if not finite. Of
    several outputs the error is the largest, and flips are in any that may be a classification,
    None where none may.
    """

    name: str
    above: str
    samples: int
    error_above: float | None
    error_top: float | None
    flips_above: int | None
    flips_top: int | None
    fidelity: Fidelity | None = None


class Flip(Found, frozen=True):
    """An input on which network and artefact give different labels.

    ``step`` is the gradient step at which it was found, 0 for a sample as it was; ``distance`` the
    largest change of an element from the real sample; ``margin`` by how much the network itself
    prefers its label there; the others are the two labels.
    """

    step: int
    distance: float
    margin: float
    reference: int
    artefact: int


class WorstCase(Found, frozen=True):
    """What the search for the largest disagreement came to: a figure, not a gate.

    ``tried`` inputs were run through both, the ``_on_samples`` figures are those of the real
    samples it began at. ``gap`` is the largest |y − r| of one value, over inputs with finite ones;
    ``file`` has inputs in the bundle: those with the widest gaps, then the first that flipped. Of
    several outputs the gap ``is_relative``: each value's, over the root mean square of its output
    on the samples. Without ``has_classes`` no output is a classification, and none can flip.
    """

    artefact: str
    tried: int
    steps: int
    radius: float
    gap_on_samples: float
    gap: float
    flips_on_samples: int
    flips: int
    first_flip: Flip | None
    nonfinite: int
    file: str | None = None
    has_classes: bool = True
    is_relative: bool = False
