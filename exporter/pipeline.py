"""The recipe. Read this file first: it is the whole program, top to bottom.

    PyTorch ── fold ──▶ PyTorch ── export ──▶ ONNX FP32 ── convert ──▶ ONNX ── build ──▶ engine
       │                                                                 │                  │
       └── float64: the truth ◀────────────────── compared with ─────────┴──────────────────┘

Where it starts, at PyTorch or at an ONNX file of somebody's, is `exporter.start`'s to know.
`exporter.job` has found everything that can be wrong on paper by then; everything is written into a
folder that gets its name only when it is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import msgspec

from exporter import environment
from exporter.axes import at_optimum
from exporter.bundle import new_bundle, write_manifest
from exporter.contracts import Model, Progress, Runtime, Session, silent
from exporter.data import Data
from exporter.errors import BuildError, ExportError, with_hint
from exporter.factories import Shapes
from exporter.fidelity import farthest
from exporter.flops import count_flops
from exporter.graphs import as_shipped, convert_all, export_source
from exporter.job import Job
from exporter.ladder import Asked, Ladder, Truth
from exporter.latency import measure_latency
from exporter.live import usual_torch
from exporter.parity import compare_outputs
from exporter.profile import Profile
from exporter.records import (
    SCHEMA,
    Artefact,
    File,
    FoldRecord,
    Latency,
    OnnxModel,
    Report,
    Variant,
)
from exporter.renderers import markdown, plots, record
from exporter.sizes import AskedAt, Sizes
from exporter.start import FoldedStart
from exporter.version import TOOL
from exporter.weights import AskedWeights

if TYPE_CHECKING:
    import onnx

_USEFUL = 0.5  # accuracy below which a network's labels are hardly worth preserving
_FOLD_SAMPLES = 8  # enough to see a wrong fold, whose error is some 1e13 times that of a right one


@usual_torch()
def run(
    model: str | Model | Path,
    profile: Profile,
    out: Path,
    *,
    weights: AskedWeights | None = None,
    input_shape: Shapes | None = None,
    classes: int | None = None,
    calibration: Data | None = None,
    data: Data | None = None,
    allow_overlap: bool = False,
    progress: Progress = silent,
) -> Report:
    """Export a model in every precision of a profile, check it, time it, and write the bundle.

    ``model`` is a built-in's name, a `load_factory`, or anything that keeps the contract; a path is
    an ONNX file's, which is network and weights in one. ``weights`` replaces its own: a file (see
    `load_weights`), or a `WeightsFile` with the key of those in it; "random" are values from a
    seed, "factory" those that a factory made. ``input_shape`` replaces its own (C, H, W), of a
    file's inputs also by their names, ``classes`` their number, ``data`` its own samples by any
    that `exporter.data` takes, in words or in memory, and ``calibration``, such data or one array
    (N, C, H, W) float32, the draw from those; samples that the result is judged on are refused
    there unless ``allow_overlap``. Words with a colon name code, which is run. The bundle ``out``
    is written whole or not at all.

    Missed gates are in the report (`Report.raise_for_parity` makes them an exception). Raises an
    `ExportError` of the kind that `exporter.errors` says for anything that keeps a bundle from
    being written.
    """
    import onnx

    job = Job.resolve(
        model,
        profile,
        weights=weights,
        input_shape=input_shape,
        classes=classes,
        calibration=calibration,
        data=data,
        progress=progress,
        allow_overlap=allow_overlap,
    )
    with job.stage("fold BatchNorm"):
        folded = job.start.fold(job.example())
    with new_bundle(out) as folder, job.threads(), ExitStack() as sessions:
        with job.stage("export to ONNX"):
            source = export_source(job, folded, folder / f"{job.name}.fp32.onnx")
        truth = Truth.compute(job, folded)
        fold = _check_fold(job, folded, truth)
        graph = onnx.load(source.path)
        ladder = Ladder(job, truth, Asked.of(job, as_shipped(job, graph), "fp32"))
        sizes = Sizes.compute(ladder)
        rungs = ladder.first_rungs()
        reference = sessions.enter_context(job.start.single(job.top))
        bench = _Bench(job, ladder, sizes, sessions, timed={job.start.timed: reference})
        variants = _variants(job, source, graph, bench)
        latency, doubts = _time(job, bench.timed)
        with job.stages.quietly("write the profile and the plot", part="other"):
            (folder / "profile.toml").write_text(profile.to_toml(), "utf-8")
            if job.calibrated:
                drawn = plots.calibration(job.calibrated)
                (folder / plots.CALIBRATION).write_text(drawn, "utf-8")
        report = Report(
            schema=SCHEMA,
            tool=TOOL,
            source=job.source(),
            profile=msgspec.json.decode(msgspec.json.encode(profile)),
            environment=environment.capture(),
            calibration=job.calibration.origin if job.calibration else None,
            fold=fold,
            pytorch=truth.parities,
            rungs=rungs,
            variants=variants,
            latency=latency,
            doubts=(*_doubts_of_accuracy(truth), *job.doubts(), *doubts),
            stages=job.stages.so_far,
            calibrated=job.calibrated,
            data=job.data.record,
            sizes=sizes.records,
        )
        (folder / "report.json").write_text(record.render(report), "utf-8")
        (folder / "report.md").write_text(markdown.render(report), "utf-8")
        write_manifest(folder, tool=TOOL, environment=report.environment)
    return report


# ── What the figures rest on ────────────────────────────────────────────────────────


def _check_fold(job: Job, folded: FoldedStart, truth: Truth) -> FoldRecord:
    """Fold again in float64: what is left between the two is rounding, or the fold is wrong."""
    with job.stage("check the fold in float64", part="evidence"):
        session = job.start.fold(job.example(), double=True).session(double=True)
        got = job.outputs(session, job.held_out.inputs[:_FOLD_SAMPLES])
    errors = (
        compare_outputs(truth.held_out[name][: len(found)], found, inputs="").rel_l2
        for name, found in got.items()
    )
    return FoldRecord(folded.fates, farthest(errors))


def _doubts_of_accuracy(truth: Truth) -> tuple[str, ...]:
    found = (parity.reference_accuracy for parity in truth.parities)
    accuracy = next((share for share in found if share is not None), None)
    if accuracy is None or accuracy >= _USEFUL:
        return ()
    return (
        f"the network itself labels only {accuracy:.1%} of the held-out samples correctly, so that "
        "agreement and accuracy say little",
    )


# ── One precision after another ─────────────────────────────────────────────────────


def _variants(
    job: Job, source: OnnxModel, graph: onnx.ModelProto, bench: _Bench
) -> tuple[Variant, ...]:
    """Return every precision, those that cannot be made with the reason. Raises if none can."""
    import onnx

    variants: list[Variant] = []
    errors: list[ExportError] = []
    for name, made in convert_all(job, graph):
        if isinstance(made, ExportError):
            errors.append(made)
            variants.append(Variant(name, refused=with_hint(made)))
            continue
        path = source.path.with_name(f"{job.name}.{name}.onnx")
        with job.stages.quietly(f"{name}: write"):
            onnx.save(made.model, path)
            file = File.of(path, path.parent)
        with job.stages.quietly(f"{name}: count its cost", part="evidence"):
            cost = count_flops(at_optimum(made.model))
        model = source._replace(path=path, precision=name)
        asked = bench.sizes.ask(made.model, name)
        artefacts = tuple(bench.judge(model, asked, *runtime) for runtime in job.runtimes.items())
        with job.stages.quietly(f"{name}: what each layer loses", part="evidence"):
            losses = bench.ladder.losses(asked.own, made)
        variants.append(
            Variant(
                precision=name,
                file=file,
                cost=cost,
                notes=made.notes,
                artefacts=artefacts,
                losses=losses,
                repairs=made.repairs,
                tensors=made.tensors,
            )
        )
    if len(errors) == len(job.precisions):
        raise errors[0]
    if "fp32" not in job.precisions:
        source.path.unlink()
    return tuple(variants)


@dataclass(frozen=True, slots=True)
class _Bench:
    """Builds artefacts, compares those that can run with the truth, and keeps them to be timed."""

    job: Job
    ladder: Ladder
    sizes: Sizes
    open_sessions: ExitStack
    timed: dict[str, Session] = field(default_factory=dict)

    def judge(self, model: OnnxModel, asked: AskedAt, name: str, runtime: Runtime) -> Artefact:
        """Build for one runtime, and compare with the truth if it can run here."""
        folder = model.path.parent
        artefact = Artefact(
            model.precision,
            name,
            None,
            targets=getattr(runtime, "targets", ()),
            sizes=self.sizes.unchecked(),
        )
        start = perf_counter()
        try:
            with self.job.stage(f"{artefact.name}: build", part="engines"):
                path = runtime.build(model, folder)
        except BuildError as error:
            return msgspec.structs.replace(artefact, refused=with_hint(error))
        artefact = msgspec.structs.replace(
            artefact,
            file=File.of(path, folder),
            build_seconds=perf_counter() - start if path != model.path else None,
            notes=runtime.describe(path),
            not_run=runtime.missing("run"),
        )
        try:
            with self.job.stages.quietly(f"{artefact.name}: ask what ran in what", part="evidence"):
                execution = runtime.executed(model, path)
            artefact = msgspec.structs.replace(artefact, execution=execution)
            if artefact.not_run:
                return artefact
            with self.job.stages.quietly(f"{artefact.name}: load", part="evidence"):
                session = self.open_sessions.enter_context(runtime.open(path))
            judged = self.sizes.judge(artefact, runtime, path, session, asked)
        except ExportError as error:
            return msgspec.structs.replace(artefact, refused=with_hint(error))
        self.timed[artefact.name] = session
        return judged


# ── Latency ─────────────────────────────────────────────────────────────────────────


def _time(job: Job, timed: Mapping[str, Session]) -> tuple[tuple[Latency, ...], tuple[str, ...]]:
    """Return every candidate's latency, and the reasons not to trust it."""
    timing = job.profile.timing
    batches = {size: job.timed_feeds(size) for size in timing.batches}
    others = environment.OtherLoad()
    latency = measure_latency(timed, batches, timing, progress=partial(job.stage, part="latency"))
    return latency, (*others.doubt(), *(why for found in latency for why in found.doubts))
