"""The nouns: what flows between stages. Frozen, serialisable, and without behaviour.

Numbers that were measured are fields; numbers that follow from them are properties, and
``renderers/record.py`` writes those too, for readers that only have the JSON.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import msgspec

from exporter.errors import ParityError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Feed: TypeAlias = "Mapping[str, np.ndarray[Any, Any]]"
Outputs: TypeAlias = "Mapping[str, np.ndarray[Any, Any]]"
Array: TypeAlias = "npt.NDArray[Any]"
Verdict: TypeAlias = Literal["pass", "fail", "not checked"]

MOST_THREADS = 256
SCHEMA = 1  # of report.json and manifest.json; history: 1, November 2026, the first


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
    ``cosine`` and ``agreement`` are lower ones. `Parity` says what each figure is.
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
    FRACTIONS: ClassVar[tuple[str, ...]] = ("accuracy_drop", "agreement")

    def __post_init__(self) -> None:
        for name, bound in self.bounds().items():
            if not math.isfinite(bound):
                raise ValueError(f"{name} must be a finite number, found {bound}")
            if name in self.UPPER and bound < 0:
                raise ValueError(f"{name} must be 0 or more, found {bound}")
            if name in self.FRACTIONS and not 0 <= bound <= 1:
                raise ValueError(f"{name} is a fraction from 0 to 1, found {bound}")
            if name == "cosine" and not -1 <= bound <= 1:
                raise ValueError(f"cosine lies from -1 to 1, found {bound}")

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

    With r the reference's outputs, y the candidate's, both (samples, outputs), in float64:

        max_abs         max |y − r|
        rel_l2          ‖y − r‖ / ‖r‖, over all samples at once
        sqnr_db         −20 log₁₀ rel_l2, the signal-to-quantisation-noise ratio in dB
        cosine          the smallest cosine similarity of one sample's y and r
        agreement       the share of samples with the same largest output
        agreement_proven  what the samples prove of it: the one-sided 95 % lower bound of
                        C. Clopper, E. Pearson (1934), B⁻¹(0.05; k, n − k + 1) for k of n
        accuracy        the share of samples whose largest output is the label
        accuracy_drop   the reference's accuracy − the candidate's
        noise_multiple  rel_l2 / noise_floor, with noise_floor = float32 PyTorch's own rel_l2

    Figures are None where a value is not finite or where there is nothing to compute them from.
    """

    inputs: str
    samples: int
    max_abs: float | None
    rel_l2: float | None
    cosine: float | None
    agreement: float | None
    accuracy: float | None
    reference_accuracy: float | None
    noise_floor: float | None
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
    def accuracy_drop(self) -> float | None:
        if self.accuracy is None or self.reference_accuracy is None:
            return None
        hits, reference = (
            round(share * self.samples) for share in (self.accuracy, self.reference_accuracy)
        )
        return (reference - hits) / self.samples

    @property
    def agreement_proven(self) -> float | None:
        if self.agreement is None:
            return None
        from scipy.special import betaincinv

        agreeing = round(self.agreement * self.samples)
        if not agreeing:
            return 0.0
        return float(betaincinv(agreeing, self.samples - agreeing + 1, 0.05))

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
        for name, bound in self.tolerance.bounds().items():
            figure = getattr(self, name)
            if figure is None:
                bad.append(f"{name} could not be computed on the {self.inputs}")
            elif name in Tolerance.UPPER and not figure <= bound:
                bad.append(f"{name} {_apart(figure, '>', bound)} on the {self.inputs}")
            elif name in Tolerance.LOWER and not figure >= bound:
                bad.append(f"{name} {_apart(figure, '<', bound)} on the {self.inputs}")
        return tuple(bad)

    @property
    def verdict(self) -> Verdict:
        if self.failures:
            return "fail"
        return "pass" if self.tolerance.bounds() else "not checked"


def rank(percent: float, count: int) -> int:
    """Return ⌈percent / 100 · count⌉, at least 1: exact, where 99.9 / 100 · 1000 is not 999."""
    return max(1, math.ceil(Fraction(str(percent)) * count / 100))


def _apart(figure: float, sign: str, bound: float) -> str:
    """Return ``figure sign bound`` with the digits it takes to tell the two apart."""
    for digits in range(4, 18):
        left, right = f"{figure:.{digits}g}", f"{bound:.{digits}g}"
        if left != right:
            break
    return f"{left} {sign} {right}"


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

    @property
    def name(self) -> str:
        return f"{self.precision} on {self.runtime}"

    @property
    def failures(self) -> tuple[str, ...]:
        if self.refused:
            return (self.refused,)
        return tuple(failure for parity in self.parity for failure in parity.failures)

    @property
    def verdict(self) -> Verdict:
        verdicts = {parity.verdict for parity in self.parity}
        if self.failures:
            return "fail"
        return "pass" if "pass" in verdicts else "not checked"


class Variant(Found, frozen=True):
    """One precision: its graph, what that graph costs, and what each runtime made of it.

    ``refused`` says why the graph could not be stored in this precision.
    """

    precision: str
    file: File | None = None
    cost: Cost | None = None
    notes: tuple[str, ...] = ()
    artefacts: tuple[Artefact, ...] = ()
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
    variants: tuple[Variant, ...]
    latency: tuple[Latency, ...]
    doubts: tuple[str, ...]
    stages: tuple[Stage, ...]

    @property
    def artefacts(self) -> tuple[Artefact, ...]:
        return tuple(artefact for v in self.variants for artefact in v.artefacts)

    @property
    def failures(self) -> tuple[str, ...]:
        unmade = tuple(f"{v.precision}: {v.refused}" for v in self.variants if v.refused)
        return unmade + tuple(f"{a.name}: {why}" for a in self.artefacts for why in a.failures)

    @property
    def verdict(self) -> Verdict:
        verdicts = {artefact.verdict for artefact in self.artefacts}
        if self.failures:
            return "fail"
        return "pass" if "pass" in verdicts else "not checked"

    def raise_for_parity(self) -> None:
        """Raise `ParityError`, naming artefact, figure and limit, if any gate was missed."""
        if self.failures:
            raise ParityError("; ".join(self.failures))
