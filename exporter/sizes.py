"""Every artefact at other sizes of its input than the one it is tuned for, where those are free.

    held-out samples ── resized ──┐
                                  ├──▶ network in float64 ◀── compared ── artefact
    noise of that size ───────────┘

The same two questions as at the inputs' own size (`exporter.ladder`), at the smallest size, the
largest and one between (`exporter.sizing`): does the artefact compute the graph that was asked for,
by the emulation of that graph in that size; and is it near enough to the network, by the profile's
gates on tensors. Labels are of the held-out samples as they were, so that no figure of classes is
taken here. The fold and the FP32 graph are held against the network as well, since a graph of
another precision is only ever compared with itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from exporter import samples
from exporter.contracts import Runtime, Session
from exporter.errors import ExportError
from exporter.fidelity import distance, farthest, judge_outputs
from exporter.job import Job
from exporter.ladder import Asked, Few, Ladder, join
from exporter.packing import packed_shape
from exporter.parity import compare_outputs
from exporter.records import (
    Artefact,
    Fidelity,
    LayerError,
    Outputs,
    Parity,
    SizeCheck,
    SizeRecord,
    TensorSpec,
    Tolerance,
)
from exporter.samples import FEW, FEW_NOISE
from exporter.sizing import Size, at_size, resized
from exporter.start import FoldedStart
from exporter.topk import places

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True)
class Expected:
    """What the network gives on a few samples in one size, and how far its float32 is from that.

    ``source`` is the FP32 graph, emulated on them.
    """

    size: Size
    few: Few
    source: Asked
    record: SizeRecord
    truth: Outputs
    floors: Mapping[str, float | None]

    def without(self, why: str) -> Expected:
        """Return it for a size at which fold or graph give nothing that can be compared."""
        return replace(self, record=msgspec.structs.replace(self.record, refused=why))


class AskedAt(NamedTuple):
    """A graph that was asked for, emulated in the inputs' own size and in every other."""

    own: Asked
    sizes: tuple[Asked, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Judges artefacts at every size that is checked, none where the size is fixed."""

    ladder: Ladder
    expected: tuple[Expected, ...]

    @classmethod
    def compute(cls, ladder: Ladder) -> Sizes:
        """Run the network and what was folded at every size, in float64 and in float32."""
        job = ladder.job
        if not job.sizes:
            return cls(ladder, ())
        with job.stages.quietly("fold in float64 for other sizes", part="evidence"):
            folded = job.start.fold(job.example(), double=True)
        return cls(ladder, tuple(_expected(ladder, folded, size) for size in job.sizes))

    @property
    def records(self) -> tuple[SizeRecord, ...]:
        return tuple(one.record for one in self.expected)

    def ask(self, model: onnx.ModelProto, precision: str) -> AskedAt:
        """Return the graph asked for in a precision, emulated at every size."""
        job, own = self.ladder.job, self.ladder.ask(model, precision)
        same = own is self.ladder.source
        sizes = (one.source if same else own.on(job, precision, one.few) for one in self.expected)
        return AskedAt(own, tuple(sizes))

    def unchecked(self) -> tuple[SizeCheck, ...]:
        """Return what is said of an artefact that did not run."""
        return tuple(SizeCheck(*one.size) for one in self.expected)

    def judge(
        self,
        artefact: Artefact,
        runtime: Runtime,
        path: Path,
        session: Session,
        asked: AskedAt,
    ) -> Artefact:
        """Return the artefact as `Ladder.judge` does, and checked at every size."""
        judged = self.ladder.judge(artefact, runtime, path, session, asked.own)
        checks = []
        for expected, graph in zip(self.expected, asked.sizes, strict=True):
            what = f"{artefact.name}: compare at {expected.size}"
            with self.ladder.job.stage(what, part="evidence"):
                checks.append(self._check(artefact, runtime, path, session, expected, graph))
        return msgspec.structs.replace(judged, sizes=tuple(checks))

    def _check(
        self,
        artefact: Artefact,
        runtime: Runtime,
        path: Path,
        session: Session,
        expected: Expected,
        asked: Asked,
    ) -> SizeCheck:
        check, job = SizeCheck(*expected.size), self.ladder.job
        if expected.record.failures:
            why = "the graph that it was made from is not the network there"
            return msgspec.structs.replace(check, refused=why)
        try:
            found = job.outputs(
                session, expected.few.inputs, specs=expected.few.specs, of_artefact=True
            )
            if odd := _other_shape(found, expected.truth):
                return msgspec.structs.replace(check, refused=f"it {odd}")
            fidelity = _fidelity(job, asked, expected, found)
            if fidelity.failures and path.suffix == ".onnx":
                layers = self._layers(artefact, runtime, path, expected, asked)
                fidelity = _fidelity(job, asked, expected, found, layers)
            parity = _parity(job, artefact.precision, expected, found)
        except ExportError as error:
            return msgspec.structs.replace(check, refused=str(error))
        return msgspec.structs.replace(check, fidelity=fidelity, parity=parity)

    def _layers(
        self, artefact: Artefact, runtime: Runtime, path: Path, expected: Expected, asked: Asked
    ) -> tuple[LayerError, ...]:
        """Return each layer's own error at a size; none where it cannot be had."""
        few, batch = expected.few, self.ladder.job.profile.batch
        size = min(max(FEW, batch.min), batch.max)
        feed = next(samples.feeds(few.inputs, few.specs, size=size))
        try:
            return self.ladder.layers(artefact, runtime, path, asked, feed)[0]
        except ExportError:  # the failure that there is stands without its layer
            return ()


def _expected(ladder: Ladder, folded: FoldedStart, size: Size) -> Expected:
    """Return what the network gives in one size, and whether what is made of it gives it too."""
    job = ladder.job
    few = _few(job, size)
    held_out = min(FEW, len(few.inputs) - FEW_NOISE)
    record = SizeRecord(*size, samples=held_out, noise=len(few.inputs) - held_out)
    what = f"run {job.source().reference} at {size}"
    with job.stage(what, part="evidence"), job.start.single() as single:
        truth, short = (
            job.outputs(session, few.inputs, specs=few.specs)
            for session in (job.start.double(), single)
        )
    floors = {name: distance(short[name], want) for name, want in truth.items()}
    found = _with_fold(Expected(size, few, ladder.source, record, truth, floors), job, folded)
    return found if found.record.refused else _with_graph(found, ladder)


def _with_fold(found: Expected, job: Job, folded: FoldedStart) -> Expected:
    """Compare the folded network with the unfolded one, both in float64."""
    few, truth = found.few, found.truth
    try:
        with job.stage(f"check the fold in float64 at {found.size}", part="evidence"):
            got = job.outputs(folded.session(double=True), few.inputs, specs=few.specs)
    except (ExportError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        return found.without(f"the folded network does not run: {reason}")
    if odd := _other_shape(got, truth):
        return found.without(f"the folded network {odd}")
    moved = farthest(distance(got[name], want) for name, want in truth.items())
    return replace(found, record=msgspec.structs.replace(found.record, float64_rel_l2=moved))


def _with_graph(found: Expected, ladder: Ladder) -> Expected:
    """Compare the FP32 graph, in exact arithmetic, with the network, where it has an emulation."""
    few, truth = found.few, found.truth
    if ladder.source.exact is None:
        return found
    source = ladder.source.on(ladder.job, "fp32", few)
    if source.exact is None:
        return found.without(f"the FP32 graph does not run: {source.unseen}")
    if odd := _other_shape(source.exact, truth):
        return found.without(f"the FP32 graph {odd}")
    graph = judge_outputs(
        truth, source.exact, exact=source.exact, noisy=source.noisy, against=source.against
    )
    if graph.failures:
        cause = ladder.export_cause(source, next(samples.feeds(few.inputs, few.specs, size=2)))
        graph = msgspec.structs.replace(graph, cause=cause)
    record = msgspec.structs.replace(found.record, graph=graph)
    return replace(found, source=source, record=record)


def _few(job: Job, size: Size) -> Few:
    """Return held-out samples in another size, and noise that is drawn in it."""
    specs = at_size(job.input_specs, size)
    real = resized(job.held_out.inputs[:FEW], job.input_specs, size)
    seed, kind = job.profile.parity.seed, specs[0].dtype
    drawn = samples.noise(packed_shape(specs), count=FEW_NOISE, seed=seed, dtype=kind)
    return Few(join(real, drawn), specs, f" at {size}")


def _other_shape(found: Outputs, truth: Outputs) -> str | None:
    """Return what an output has another number of values in, None where none has."""
    for name, want in truth.items():
        got = found.get(name, want)  # of a top-k there are places in place of scores
        if got.shape != want.shape:
            values = f"gives {got.shape[1]} values as {name!r}"
            return f"{values}, where the network gives {want.shape[1]}"
    return None


def _fidelity(
    job: Job,
    asked: Asked,
    expected: Expected,
    found: Outputs,
    layers: tuple[LayerError, ...] = (),
) -> Fidelity:
    return judge_outputs(
        expected.truth if asked.reference is None else asked.reference,
        found,
        exact=asked.exact,
        noisy=asked.noisy,
        against=asked.against,
        layers=layers,
        unseen=asked.unseen,
        top=job.top,
    )


def _parity(job: Job, precision: str, expected: Expected, found: Outputs) -> tuple[Parity, ...]:
    """Return how far each output is from the network's, on the held-out samples and on noise."""
    count, record = expected.record.samples, expected.record
    parts = (
        (slice(count), f"{count} of the {job.held_out.origin} at {record.name}"),
        (slice(count, None), f"{record.noise} noise samples at {record.name}"),
    )
    several = len(job.output_specs) > 1
    compared = {name: places(job.top, name, want, found) for name, want in expected.truth.items()}
    return tuple(
        compare_outputs(
            *(side[part] for side in compared[spec.name]),
            inputs=inputs,
            tolerance=_of_tensors(job, precision, spec, on_noise=bool(part.start)),
            noise_floor=expected.floors[spec.name],
            output=spec.name if several else None,
            has_classes=False,
        )
        for part, inputs in parts
        for spec in job.output_specs
    )


def _of_tensors(job: Job, precision: str, output: TensorSpec, *, on_noise: bool) -> Tolerance:
    """Return the profile's gates without those of classes."""
    gates = job.gates(precision, output)
    found = gates.random_tolerance if on_noise else gates.tolerance
    return msgspec.structs.replace(found, agreement=None, accuracy_drop=None)
