"""The report: every precision, what each runtime made of it, and what was found."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

from exporter.errors import ParityError
from exporter.records.asked import TensorSpec, TopK
from exporter.records.base import Found, Verdict, whole, worst
from exporter.records.calibration import Convergence
from exporter.records.cost import Cost
from exporter.records.data import DataRecord
from exporter.records.execution import Execution
from exporter.records.fidelity import LayerError, Rung, WorstCase
from exporter.records.latency import Latency
from exporter.records.made import Fate, File
from exporter.records.quality import Parity
from exporter.records.quantised import Quantised, Repair
from exporter.records.size import SizeCheck, SizeRecord
from exporter.records.worth import Comparison, Recommendation, recommend

# What a stage is for: making the graphs, building engines from them, showing that they compute what
# they should, timing them, and everything else.
Part: TypeAlias = Literal["conversion", "engines", "evidence", "latency", "other"]
_BASELINES = ("fp32", "fp16")  # what fewer bits are compared with, on the same runtime


class Artefact(Found, frozen=True):
    """What one runtime runs for one precision: the ONNX file itself, or an engine made from it.

    ``not_run`` says why it could not be executed here, ``refused`` why it could not be made;
    ``execution`` is None where no layer asks for fewer bits than 32. ``sizes`` are those at which
    it is checked beside the one that it is tuned for.
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
    execution: Execution | None = None
    sizes: tuple[SizeCheck, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.precision} on {self.runtime}"

    @property
    def failures(self) -> tuple[str, ...]:
        if self.refused:
            return (self.refused,)
        unfaithful = self.rung.fidelity.failures if self.rung and self.rung.fidelity else ()
        missed = (failure for parity in self.parity for failure in parity.failures)
        elsewhere = (failure for size in self.sizes for failure in size.failures)
        return (*unfaithful, *missed, *elsewhere)

    @property
    def unproven(self) -> tuple[str, ...]:
        every = (*self.parity, *(parity for size in self.sizes for parity in size.parity))
        return tuple(phrase for parity in every for phrase in parity.unproven)

    @property
    def fidelity(self) -> Verdict:
        """Return whether it computes the graph that was asked for, at every size."""
        if self.refused:
            return "fail"
        found = self.rung.fidelity if self.rung else None
        own = found.verdict if found else "not checked"
        return whole((own, *(size.faithful for size in self.sizes)))

    @property
    def quality(self) -> Verdict:
        """Return whether that graph is good enough, which is what the profile's gates say."""
        if self.refused:
            return "fail"
        outputs: dict[str | int, list[Verdict]] = {}  # all of a network's, on the same inputs
        for index, parity in enumerate(self.parity):
            on = index if parity.output is None else parity.inputs
            outputs.setdefault(on, []).append(parity.verdict)
        return worst((*map(whole, outputs.values()), *(size.quality for size in self.sizes)))

    @property
    def verdict(self) -> Verdict:
        """Return both in one word: a pass is a pass of both."""
        return whole((self.fidelity, self.quality))


class Variant(Found, frozen=True):
    """One precision: its graph, what that graph costs, and what each runtime made of it.

    ``losses`` has each layer's own loss by the conversion, from inputs in FP32, in multiples of
    what the precision must lose there (above 4 it loses more, say because values are clipped).
    ``repairs`` are what was done to lose less, ``tensors`` what each quantised one came to.
    ``refused`` says why the graph could not be stored in this precision.
    """

    precision: str
    file: File | None = None
    cost: Cost | None = None
    notes: tuple[str, ...] = ()
    artefacts: tuple[Artefact, ...] = ()
    losses: tuple[LayerError, ...] = ()
    repairs: tuple[Repair, ...] = ()
    tensors: tuple[Quantised, ...] = ()
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
    """What was exported: a network, its weights, and the shape it was asked to take.

    ``weights`` is the file's name without its folder, or what is taken in place of one,
    ``weights_sha256`` of the file or of those values, ``weights_format`` what kind of file it is,
    and whether that has a checksum; ``weights_changes`` are what its names had taken off or changed
    to be the network's, one clause each, and ``weights_key`` the key in full of those that were
    asked for, of several in the file. ``top_k`` is what artefacts give in place of the scores.
    ``factory`` is the code that made the network, and
    ``given`` the class of the module that a program gave; both are None for a built-in one.
    ``file`` is the name of the ONNX file that was started from, None for a network in PyTorch; with
    it the weights are those in it, and the changes what was done to read it. ``more_outputs`` and
    ``more_inputs`` are those behind the first, in the network's order.
    """

    model: str
    weights_sha256: str
    weights: str
    parameters: int
    input: TensorSpec
    output: TensorSpec
    opset: int
    weights_format: str = ""
    weights_changes: tuple[str, ...] = ()
    factory: str | None = None
    given: str | None = None
    more_outputs: tuple[TensorSpec, ...] = ()
    more_inputs: tuple[TensorSpec, ...] = ()
    file: str | None = None
    weights_key: str | None = None
    top_k: TopK | None = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (self.input, *self.more_inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (self.output, *self.more_outputs)

    @property
    def graph_outputs(self) -> tuple[TensorSpec, ...]:
        """Return what the artefacts give: the outputs, or the largest scores in place of them."""
        return self.outputs if self.top_k is None else self.top_k.instead(self.outputs)

    @property
    def reference(self) -> str:
        """Return what artefacts are compared with, in words."""
        return self.file or "PyTorch"

    @property
    def top(self) -> str:
        """Return the ladder's first rung: the truth."""
        return f"{self.reference} float64"

    @property
    def single(self) -> str:
        """Return the rung below: the same in float32."""
        return f"{self.reference} float32"


class Stage(Found, frozen=True):
    """How long one step of the run took, and how much memory the process held in it at most.

    Both are the step's own, without the steps inside it, so that the seconds of all are those of
    the run. ``peak_bytes`` is the resident set, None where the system does not tell it; with
    ``so_far`` it is the peak from the start of the process to the end of the step.
    """

    name: str
    seconds: float
    part: Part = "other"
    peak_bytes: int | None = None
    so_far: bool = False


class Report(Found, frozen=True):
    """The record of one run. Markdown and the terminal's table are views of it.

    ``doubts`` are reasons not to trust figures that are in it, one sentence each; ``calibrated`` is
    None where no scale was calibrated, and ``data`` where the model's own samples were used.
    ``sizes`` are those at which everything is checked beside the input's own.
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
    calibrated: Convergence | None = None
    data: DataRecord | None = None
    sizes: tuple[SizeRecord, ...] = ()

    @property
    def seconds(self) -> float:
        """Return how long the run took, up to the writing of its report."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def seconds_by_part(self) -> dict[Part, float]:
        """Return how long the stages of each kind took; no kind is left out."""
        return {
            part: sum(stage.seconds for stage in self.stages if stage.part == part)
            for part in get_args(Part)
        }

    @property
    def ladder(self) -> tuple[Rung, ...]:
        """Return every rung, from the reference in float32 down."""
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
        unmade += tuple(why for size in self.sizes for why in size.failures)
        return unmade + tuple(f"{a.name}: {why}" for a in self.artefacts for why in a.failures)

    @property
    def unproven(self) -> tuple[str, ...]:
        return tuple(f"{a.name}: {phrase}" for a in self.artefacts for phrase in a.unproven)

    @property
    def verdict(self) -> Verdict:
        return "fail" if self.failures else worst(artefact.verdict for artefact in self.artefacts)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Return every artefact of fewer bits beside FP32 and FP16 on the same runtime."""
        timed = {(latency.name, latency.batch): latency for latency in self.latency}
        return tuple(
            Comparison.of(latency, timed[baseline, latency.batch])
            for artefact in self.artefacts
            if artefact.precision != "fp32"
            for latency in self.latency
            if latency.name == artefact.name
            for baseline in (f"{precision} on {artefact.runtime}" for precision in _BASELINES)
            if baseline != artefact.name and (baseline, latency.batch) in timed
        )

    @property
    def recommendation(self) -> Recommendation | None:
        """Return what to ship, by latency at the first batch size; None if nothing was timed."""
        verdicts = {artefact.name: artefact.verdict for artefact in self.artefacts}
        return recommend(
            [
                (latency, verdicts[latency.name])
                for latency in self.latency
                if latency.name in verdicts and latency.batch == self.latency[0].batch
            ]
        )

    def raise_for_parity(self) -> None:
        """Raise `ParityError` if a gate was missed, or could not be shown to be met.

        It names artefact, figure and limit, or what there is too little evidence of.
        """
        if said := (*self.failures, *self.unproven):
            raise ParityError("; ".join(said))
