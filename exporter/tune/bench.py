"""What makes and measures the candidates of a search, and keeps what was measured.

    sensitivity   one layer quantised, all others kept in float: its outputs against FP32's
    candidate     as the pipeline would make it, in the runtime: its outputs against float64 PyTorch

Both on training images that calibration did not draw. One layer alone, and not all but one, since
then its own error is what is seen: among twenty others of like size it would drown. For the order
alone, which is all that is asked of it, it is quantised plainly: repairs that search for minutes
are off, and a precision that has others is given `FEW` calibration samples. The statistics are
those of all samples, and taken once. Candidates have everything that the profile asks for.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec
import onnx

from exporter.contracts import Converted, Precision, Progress, Runtime, Session, silent
from exporter.errors import BuildError, ExportError, GraphError, with_hint
from exporter.graphs import convert, statistics_of
from exporter.job import Job
from exporter.parity import compare_outputs
from exporter.plugins import load_precision, load_runtime, options_of
from exporter.records import (
    Candidate,
    File,
    OnnxModel,
    Outputs,
    Parity,
    Sensitivity,
    Tolerance,
    worst_of,
)
from exporter.runtimes._graph import WEIGHTED, dequantised_weights
from exporter.samples import Samples
from exporter.tune.state import State

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PLAIN = {"calibrator": "max", "equalise": False, "rounding": False, "bias_correction": False}
FEW = 32  # samples: calibration's for one layer alone, and those that its error is measured on


@dataclass(slots=True)
class Bench:
    """A job's graph, the precision whose option ``keep`` is varied, and where candidates run."""

    job: Job
    source: OnnxModel
    graph: onnx.ModelProto
    precision: str
    runtime_name: str
    runtime: Runtime
    validation: Samples
    state: State
    open_sessions: ExitStack
    _statistics: Mapping[str, Any] = field(default_factory=dict)
    _truth: Outputs = field(default_factory=dict)
    _single: Outputs = field(default_factory=dict)
    _built: dict[str, Path] = field(default_factory=dict)

    # ── What is quantised, and what that does ───────────────────────────────────────

    def layers(self) -> list[str]:
        """Return the layers that the precision quantises as the profile has it, in graph order."""
        model = self._plain(self._kept_anyway())
        stored = dequantised_weights(model.graph)
        return [
            node.name
            for node in model.graph.node
            if node.op_type in WEIGHTED and node.input[1] in stored
        ]

    def sensitivity(self, layer: str, layers: list[str]) -> Sensitivity:
        """Return what quantising this layer alone does to the output that loses most."""
        rest = self.keeping([other for other in layers if other != layer])
        try:
            got = self._run_graph(self._plain(rest))
        except ExportError as error:
            return Sensitivity(layer, None, with_hint(error))
        few = self.validation._replace(labels=None)
        worst = worst_of(self.compared(self._fp32(), got, few))
        assert worst is not None  # a network gives something
        return Sensitivity(layer, worst.rel_l2, output=worst.output)

    def keeping(self, layers: list[str]) -> tuple[str, ...]:
        """Return the option that keeps these layers, and those that the profile keeps, in order."""
        kept = {*layers, *self._kept_anyway()}
        return tuple(node.name for node in self.graph.graph.node if node.name in kept)

    def _kept_anyway(self) -> tuple[str, ...]:
        return tuple(self.job.profile.precision[self.precision].options.get("keep", ()))

    def _plain(self, keep: tuple[str, ...]) -> onnx.ModelProto:
        """Return the graph with these layers kept and no repairs."""
        known = options_of("precisions", self.precision)
        plain = {name: value for name, value in PLAIN.items() if name in known}
        precision = self._variant(keep, **plain)
        return self._converted(self.precision, precision, samples=FEW, progress=silent).model

    def _variant(self, keep: tuple[str, ...], **more: Any) -> Precision:
        options = self.job.profile.precision[self.precision].options
        return load_precision(self.precision, {**options, **more, "keep": list(keep)})

    def _converted(
        self, name: str, precision: Precision, *, samples: int | None, progress: Progress
    ) -> Converted:
        calibration = self.job.calibration
        if precision.needs_calibration and not self._statistics:
            self._statistics = statistics_of(self.job, self.graph)
        inputs = self.validation.inputs[:0] if calibration is None else calibration.inputs[:samples]
        return convert(name, precision, self.graph, self._statistics, inputs, progress=progress)

    def _run_graph(self, model: onnx.ModelProto) -> Outputs:
        """Return a graph's outputs on a few samples, in ONNX Runtime on the CPU, wherever else."""
        runtime = load_runtime("ort-cpu", self.job.profile.runtime.get("ort-cpu", {}))
        with TemporaryDirectory() as folder:
            path = Path(folder, "one.onnx")
            onnx.save(model, path)
            with runtime.open(path) as session:
                return self.job.outputs(session, self.validation.inputs[:FEW])

    def _fp32(self) -> Outputs:
        if not self._single:
            self._single = self._run_graph(self.graph)
        return self._single

    # ── Candidates ──────────────────────────────────────────────────────────────────

    def judge(
        self,
        name: str,
        precision: str,
        keep: tuple[str, ...] | None = None,
        *,
        beside: Sequence[Candidate] = (),
    ) -> Candidate:
        """Make a candidate and run it on the validation samples, unless that was done before.

        One whose graph is that of one ``beside`` it takes over what that has shown.
        """
        known = self.state.candidate(precision, keep)
        if known is not None:
            return msgspec.structs.replace(known, name=name)
        made = self._made(Candidate(name, precision, keep))
        twin = next((other for other in beside if self._is_same(made, other)), None)
        if twin:
            made = msgspec.structs.replace(made, parity=twin.parity, same_as=twin.name)
        elif made.refused is None:
            made = self._compared(made)
        self.state.add(made)
        return made

    def _made(self, candidate: Candidate) -> Candidate:
        """Write the candidate's graph."""
        keep = candidate.keep
        chosen = self.job.precisions[candidate.precision] if keep is None else self._variant(keep)
        path = self.state.graphs() / f"{_slug(candidate)}.onnx"
        try:
            made = self._converted(
                candidate.precision, chosen, samples=None, progress=self.job.stage
            )
        except GraphError as error:
            return msgspec.structs.replace(candidate, refused=with_hint(error))
        onnx.save(made.model, path)
        file = File.of(path, self.state.folder)
        return msgspec.structs.replace(candidate, file=file, notes=made.notes)

    def _is_same(self, one: Candidate, other: Candidate) -> bool:
        """Return whether two graphs have the same nodes and constants, whatever they declare."""
        if not (self.state.has_graph(one) and self.state.has_graph(other)):
            return False
        assert one.file
        assert other.file
        (a, b) = (onnx.load(self.state.folder / file.name).graph for file in (one.file, other.file))
        return list(a.node) == list(b.node) and list(a.initializer) == list(b.initializer)

    def _compared(self, candidate: Candidate) -> Candidate:
        truth = self._float64()
        try:
            with ExitStack() as stack:
                session = stack.enter_context(self.runtime.open(self._path(candidate)))
                size = self.job.profile.batch.opt
                total = -(-len(self.validation.inputs) // size)
                what = f"{candidate.name}: validate"
                with self.job.stage(what, total, part="evidence") as advance:
                    got = self.job.outputs(session, self.validation.inputs, advance)
        except BuildError as error:
            return msgspec.structs.replace(candidate, refused=with_hint(error))
        parity = self.compared(truth, got, self.validation)
        return msgspec.structs.replace(candidate, parity=parity)

    def compared(
        self,
        want: Outputs,
        got: Outputs,
        samples: Samples,
        tolerance: Tolerance = Tolerance(),  # noqa: B008 - frozen
    ) -> tuple[Parity, ...]:
        """Return the parity of each output on these samples, with accuracy of a classification."""
        return tuple(
            compare_outputs(
                want[output.name],
                got[output.name],
                inputs=samples.origin,
                tolerance=tolerance,
                labels=samples.labels if output == self.job.labelled else None,
                output=output.name if len(self.job.output_specs) > 1 else None,
                has_classes=output.has_classes,
            )
            for output in self.job.output_specs
        )

    def _float64(self) -> Outputs:
        """Return the unfolded network's outputs on the validation samples, in float64."""
        if not self._truth:
            session = self.job.start.double()
            total = -(-len(self.validation.inputs) // self.job.profile.batch.opt)
            what = "run PyTorch in float64"
            with self.job.stage(what, total, part="evidence") as advance:
                self._truth = self.job.outputs(session, self.validation.inputs, advance)
        return self._truth

    def session(self, candidate: Candidate) -> Session:
        """Return the candidate as it runs, and keep it open; its graph is made anew if it went."""
        if not self.state.has_graph(candidate):
            again = self._made(msgspec.structs.replace(candidate, file=None, refused=None))
            if again.file != candidate.file:
                raise GraphError(
                    f"{candidate.name} did not come out as it did before, so its figures do not "
                    "hold",
                    hint="begin anew with --restart",
                )
        return self.open_sessions.enter_context(self.runtime.open(self._path(candidate)))

    def _path(self, candidate: Candidate) -> Path:
        """Return the file that the runtime opens."""
        assert candidate.file is not None  # it was made
        if candidate.name not in self._built:
            path = self.state.folder / candidate.file.name
            model = self.source._replace(path=path, precision=candidate.precision)
            self._built[candidate.name] = self.runtime.build(model, path.parent)
        return self._built[candidate.name]


def _slug(candidate: Candidate) -> str:
    """Return a file name that is the same for the same layers, whatever they are called."""
    if candidate.keep is None:
        return candidate.precision
    digest = hashlib.sha256("\n".join(candidate.keep).encode()).hexdigest()
    return f"{candidate.precision}-{digest[:12]}"
