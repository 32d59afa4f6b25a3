"""The nouns: what flows between stages. Frozen, serialisable, and without behaviour.

Numbers that were measured are fields; numbers that follow from them are properties, and
``renderers/record.py`` writes those too, for readers that only have the JSON.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import msgspec

from exporter import evidence
from exporter.errors import ParityError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Feed: TypeAlias = "Mapping[str, np.ndarray[Any, Any]]"
Outputs: TypeAlias = "Mapping[str, np.ndarray[Any, Any]]"
Array: TypeAlias = "npt.NDArray[Any]"
Verdict: TypeAlias = Literal["pass", "fail", "not enough evidence", "not checked"]

MOST_THREADS = 256
# Of report.json and manifest.json. History: 1, the first; 2, counts of samples in place of shares.
SCHEMA = 2


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a user wrote: a key that no field claims is an error."""


class Found(msgspec.Struct, frozen=True):
    """What a run found. Reading ignores keys of newer versions."""


# ── What was asked for ──────────────────────────────────────────────────────────────


class TensorSpec(Found, frozen=True):
    """A tensor's name and shape, without the batch axis, which always comes first."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


class BatchRange(Asked, frozen=True):
    """The batch sizes one engine must serve, and the one it is tuned for."""

    min: int = 1
    opt: int = 1
    max: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            found = f"{self.min}, {self.opt}, {self.max}"
            raise ValueError(f"need 1 <= min <= opt <= max, found {found}")

    def __str__(self) -> str:
        return f"{self.min} to {self.max}, tuned for {self.opt}"


def check_threads(name: str, threads: int) -> None:
    """Raise `ValueError` for a count that no pool takes; libraries crash on absurd ones."""
    if not 0 <= threads <= MOST_THREADS:
        raise ValueError(f"{name} must be from 0 to {MOST_THREADS}, found {threads}")


class Timing(Asked, frozen=True):
    """How latency is sampled: every candidate in turn, ``runs`` times, at each batch size.

    Before each timed run a candidate runs untimed for ``settle_ms`` milliseconds or longer, until
    the threads that the one before it left spinning are asleep. ``pytorch_threads`` are the
    baseline's, 0 for one per core; a runtime has its own option.
    """

    batches: tuple[int, ...] = (1,)
    warmup: int = 5
    runs: int = 100
    pytorch_threads: int = 0
    settle_ms: float = 15.0

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches must be 1 or more, found {list(self.batches)}")
        if self.warmup < 0 or self.runs < 2:
            raise ValueError(
                f"need warmup >= 0 and runs >= 2, found warmup {self.warmup} and runs {self.runs}"
            )
        if not 0 <= self.settle_ms <= 1000:
            raise ValueError(f"settle_ms must be from 0 to 1000, found {self.settle_ms}")
        check_threads("pytorch_threads", self.pytorch_threads)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed must be from 0 to {(1 << 32) - 1}, found {seed}")


class ParityInputs(Asked, frozen=True):
    """What outputs are compared on, beside the model's held-out samples: seeded unit noise."""

    random: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.random < 1:
            raise ValueError(f"random must be 1 or more, found {self.random}")
        _check_seed(self.seed)


class Calibration(Asked, frozen=True):
    """How many training samples set the scales, and which draw of them."""

    images: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images must be 1 or more, found {self.images}")
        _check_seed(self.seed)


class Tolerance(Asked, frozen=True, omit_defaults=True):
    """How far a candidate may be from float64 PyTorch. A bound left out is not checked.

    ``max_abs``, ``rel_l2``, ``noise_multiple`` and ``accuracy_drop`` are upper bounds; ``sqnr_db``,
    ``cosine`` and ``agreement`` are lower ones. `Parity` says what each figure is. ``agreement``
    and ``accuracy_drop`` speak of all inputs there could be, so they are met where the samples
    prove it, and missed where the samples prove that.
    """

    max_abs: float | None = None
    rel_l2: float | None = None
    noise_multiple: float | None = None
    accuracy_drop: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    agreement: float | None = None

    UPPER: ClassVar[tuple[str, ...]] = ("max_abs", "rel_l2", "noise_multiple", "accuracy_drop")
    LOWER: ClassVar[tuple[str, ...]] = ("sqnr_db", "cosine", "agreement")
    SHARES: ClassVar[tuple[str, ...]] = ("accuracy_drop", "agreement")

    def __post_init__(self) -> None:
        for name, bound in self.bounds().items():
            if not math.isfinite(bound):
                raise ValueError(f"{name} must be a finite number, found {bound}")
            if name in self.UPPER and bound < 0:
                raise ValueError(f"{name} must be 0 or more, found {bound}")
            if name in self.SHARES and not 0 <= bound <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, found {bound}")
            if name == "cosine" and not -1 <= bound <= 1:
                raise ValueError(f"cosine lies from -1 to 1, found {bound}")
        if self.agreement == 1:
            raise ValueError(
                "agreement must be below 1, since no number of samples proves that all agree, "
                f"found {self.agreement}"
            )
        if self.accuracy_drop == 0:
            raise ValueError(
                "accuracy_drop must be above 0, since no number of samples proves that none is "
                f"lost, found {self.accuracy_drop}"
            )

    def bounds(self) -> dict[str, float]:
        """Return the bounds that are set, by name."""
        every = {name: getattr(self, name) for name in (*self.UPPER, *self.LOWER)}
        return {name: bound for name, bound in every.items() if bound is not None}


# ── What was made ───────────────────────────────────────────────────────────────────


class File(Found, frozen=True):
    """A file of the bundle, pinned by its content; ``name`` is relative to the bundle."""

    name: str
    sha256: str
    size: int

    @classmethod
    def of(cls, path: Path, folder: Path) -> File:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(path.relative_to(folder).as_posix(), digest, path.stat().st_size)


class OnnxModel(NamedTuple):
    """A graph on disk. Its precision lives in the graph, and nowhere else."""

    path: Path
    precision: str
    input: TensorSpec
    output: TensorSpec
    batch: BatchRange


class Fate(Found, frozen=True):
    """What became of one BatchNorm.

    ``error`` is how far folding it moved the network's values in float64, as relative L2; None if
    that was not measured.
    """

    name: str
    pattern: str
    folded: bool
    detail: str
    error: float | None = None

    def __str__(self) -> str:
        measured = "" if self.error is None else f" (error {self.error:.1e})"
        kept = "" if self.folded else "kept: "
        return f"{self.name}: {self.pattern}: {kept}{self.detail}{measured}"


# ── What was measured ───────────────────────────────────────────────────────────────


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
        noise_multiple  rel_l2 / noise_floor, with noise_floor = float32 PyTorch's own rel_l2
        agreement       the share of samples with the same largest output, of those decided
        accuracy        the share of samples whose largest output is the label
        accuracy_drop   the reference's accuracy − the candidate's, (lost − gained) / samples

    What the samples prove with 95 % confidence is between ``agreement_proven`` and
    ``agreement_possible``, and within ``accuracy_drop_bounds``; `exporter.evidence` has the
    formulas. ``undecided`` samples have their largest output in r more than once, and may agree
    or not. ``lost`` samples the reference alone labels right, ``gained`` ones the candidate alone.
    ``classes`` and ``labels`` count the different t and the different labels; ``constant`` names
    a side whose output is the same for every sample.

    Figures are None where a value is not finite or where there is nothing to compute them from.
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
            f"{count} outputs of the {who} are NaN or infinite on the {self.inputs}"
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
                bad.append(f"{name} could not be computed on the {self.inputs}")
            elif name in Tolerance.UPPER and not figure <= bound:
                bad.append(f"{name} {evidence.apart(figure, '>', bound)} on the {self.inputs}")
            elif name in Tolerance.LOWER and not figure >= bound:
                bad.append(f"{name} {evidence.apart(figure, '<', bound)} on the {self.inputs}")
        return tuple(bad)

    @property
    def unproven(self) -> tuple[str, ...]:
        """Return one phrase per gate that the samples neither meet nor miss, or what they lack."""
        if not self.tolerance.bounds():
            return ()
        lacking = [f"{lack} on the {self.inputs}" for lack in self._lacks()]
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
        gates, on = self.tolerance, f"on the {self.inputs}"
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


def _worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on a whole, from those on its parts."""
    order: tuple[Verdict, ...] = ("fail", "not enough evidence", "pass", "not checked")
    return min(verdicts, key=order.index, default="not checked")


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
    the limit. ``cause`` says what is known of it, ``unseen`` why there are no layers.
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
            bad.append(
                f"its outputs are {self.multiple:.3g} times as far from {self.against} as its "
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
    """One step of the ladder from PyTorch in float64 down to an engine.

    ``error`` and ``flips`` are the relative L2 error and the number of samples whose largest output
    is another one, both against the rung ``above`` and against the ``top``; None if not finite.
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
    largest change of an element from the real sample; the others are the two labels.
    """

    step: int
    distance: float
    reference: int
    artefact: int


class WorstCase(Found, frozen=True):
    """What the search for the largest disagreement came to: a figure, not a gate.

    ``tried`` inputs were run through both, the ``_on_samples`` figures are those of the real
    samples it began at. ``gap`` is the largest |y − r| of one output, over inputs with finite ones;
    ``file`` has the inputs in the bundle, the worst first.
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


def rank(percent: float, count: int) -> int:
    """Return ⌈percent / 100 · count⌉, at least 1: exact, where 99.9 / 100 · 1000 is not 999."""
    return max(1, math.ceil(Fraction(str(percent)) * count / 100))


class Latency(Found, frozen=True):
    """Every sample that was taken, warm-up excluded. Summaries are derived, never stored."""

    name: str
    batch: int
    threads: int
    warmup: int
    samples_ms: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Return the smallest sample that at least ``percent`` % of all do not exceed, in ms."""
        return sorted(self.samples_ms)[rank(percent, len(self.samples_ms)) - 1]

    @property
    def p50_ms(self) -> float:
        return self.percentile(50)

    @property
    def p90_ms(self) -> float:
        return self.percentile(90)

    @property
    def p99_ms(self) -> float:
        return self.percentile(99)

    @property
    def per_second(self) -> float:
        return 1000 * self.batch / self.p50_ms


class LayerCost(Found, frozen=True):
    """One node of a graph, for a batch of one. ``name`` is the layer's name in PyTorch."""

    name: str
    op: str
    output_shape: tuple[int, ...]
    macs: int
    parameters: int
    weight_bytes: int
    activation_bytes: int


class Cost(Found, frozen=True):
    """What one sample costs. One multiply-accumulate (MAC) is two FLOPs, and both are shown.

    ``uncounted`` has the operators with no formula, by type: were it not empty, ``macs`` would
    be a lower bound.
    """

    layers: tuple[LayerCost, ...]
    uncounted: dict[str, int]

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        return sum(layer.activation_bytes for layer in self.layers)


class Artefact(Found, frozen=True):
    """What one runtime runs for one precision: the ONNX file itself, or an engine made from it.

    ``not_run`` says why it could not be executed here, ``refused`` why it could not be made.
    """

    precision: str
    runtime: str
    file: File | None
    targets: tuple[str, ...] = ()
    build_seconds: float | None = None
    not_run: str | None = None
    refused: str | None = None
    notes: tuple[str, ...] = ()
    parity: tuple[Parity, ...] = ()
    rung: Rung | None = None

    @property
    def name(self) -> str:
        return f"{self.precision} on {self.runtime}"

    @property
    def failures(self) -> tuple[str, ...]:
        if self.refused:
            return (self.refused,)
        unfaithful = self.rung.fidelity.failures if self.rung and self.rung.fidelity else ()
        missed = (failure for parity in self.parity for failure in parity.failures)
        return (*unfaithful, *missed)

    @property
    def unproven(self) -> tuple[str, ...]:
        return tuple(phrase for parity in self.parity for phrase in parity.unproven)

    @property
    def fidelity(self) -> Verdict:
        """Return whether it computes the graph that was asked for."""
        if self.refused:
            return "fail"
        found = self.rung.fidelity if self.rung else None
        return found.verdict if found else "not checked"

    @property
    def quality(self) -> Verdict:
        """Return whether that graph is good enough, which is what the profile's gates say."""
        return "fail" if self.refused else _worst(parity.verdict for parity in self.parity)

    @property
    def verdict(self) -> Verdict:
        """Return both in one word: a pass is a pass of both."""
        said = (self.fidelity, self.quality)
        return "not checked" if set(said) == {"pass", "not checked"} else _worst(said)


class Variant(Found, frozen=True):
    """One precision: its graph, what that graph costs, and what each runtime made of it.

    ``losses`` has each layer's own loss by the conversion, from inputs in FP32, in multiples of
    what the precision must lose there (above 4 it loses more, say because values are clipped).
    ``refused`` says why the graph could not be stored in this precision.
    """

    precision: str
    file: File | None = None
    cost: Cost | None = None
    notes: tuple[str, ...] = ()
    artefacts: tuple[Artefact, ...] = ()
    losses: tuple[LayerError, ...] = ()
    refused: str | None = None


class FoldRecord(Found, frozen=True):
    """Every BatchNorm's fate, and how far the folded network is from the one it came from.

    ``float64_rel_l2`` compares the two in float64: what is left is rounding alone.
    """

    fates: tuple[Fate, ...]
    float64_rel_l2: float | None

    @property
    def folded(self) -> int:
        return sum(fate.folded for fate in self.fates)

    @property
    def unmeasured(self) -> int:
        return sum(fate.folded and fate.error is None for fate in self.fates)


class Source(Found, frozen=True):
    """What was exported: a network, its weights, and the shape it was asked to take."""

    model: str
    weights_sha256: str
    weights: str
    parameters: int
    input: TensorSpec
    output: TensorSpec
    opset: int


class Stage(Found, frozen=True):
    """How long one step of the run took."""

    name: str
    seconds: float


class Report(Found, frozen=True):
    """The record of one run. Markdown and the terminal's table are views of it.

    ``doubts`` are reasons not to trust figures that are in it, one sentence each.
    """

    schema: int
    tool: str
    source: Source
    profile: dict[str, Any]
    environment: dict[str, str]
    calibration: str | None
    fold: FoldRecord
    pytorch: tuple[Parity, ...]
    rungs: tuple[Rung, ...]
    variants: tuple[Variant, ...]
    latency: tuple[Latency, ...]
    doubts: tuple[str, ...]
    stages: tuple[Stage, ...]
    worst_cases: tuple[WorstCase, ...] = ()

    @property
    def ladder(self) -> tuple[Rung, ...]:
        """Return every rung, from PyTorch in float32 down."""
        return (*self.rungs, *(a.rung for a in self.artefacts if a.rung))

    @property
    def artefacts(self) -> tuple[Artefact, ...]:
        return tuple(artefact for v in self.variants for artefact in v.artefacts)

    @property
    def failures(self) -> tuple[str, ...]:
        unmade = tuple(f"{v.precision}: {v.refused}" for v in self.variants if v.refused)
        unmade += tuple(
            f"{r.name}: {why}" for r in self.rungs if r.fidelity for why in r.fidelity.failures
        )
        return unmade + tuple(f"{a.name}: {why}" for a in self.artefacts for why in a.failures)

    @property
    def unproven(self) -> tuple[str, ...]:
        return tuple(f"{a.name}: {phrase}" for a in self.artefacts for phrase in a.unproven)

    @property
    def verdict(self) -> Verdict:
        return "fail" if self.failures else _worst(artefact.verdict for artefact in self.artefacts)

    def raise_for_parity(self) -> None:
        """Raise `ParityError` if a gate was missed, or could not be shown to be met.

        It names artefact, figure and limit, or what there is too little evidence of.
        """
        if said := (*self.failures, *self.unproven):
            raise ParityError("; ".join(said))
