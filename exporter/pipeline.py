"""The recipe. Read this file first: it is the whole program, top to bottom.

    PyTorch ── fold ──▶ PyTorch ── export ──▶ ONNX FP32 ── convert ──▶ ONNX ── build ──▶ engine
       │                                                                 │                  │
       └── float64: the truth ◀────────────────── compared with ─────────┴──────────────────┘

Everything that can be wrong on paper is found before any work is done; everything is written into a
folder that gets its name only when it is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec

from exporter import environment, samples
from exporter.bundle import new_bundle, write_manifest
from exporter.calibration import calibrate
from exporter.contracts import Advance, Model, Precision, Progress, Runtime, Session, silent
from exporter.errors import BuildError, ExportError, GraphError, InputRefused, RuntimeMissing
from exporter.flops import count_flops
from exporter.fold import Folded, fold_batchnorm
from exporter.latency import measure_latency
from exporter.parity import collect_outputs, compare_outputs
from exporter.plugins import load_model, load_precision, load_runtime
from exporter.profile import Profile
from exporter.records import (
    SCHEMA,
    Array,
    Artefact,
    File,
    FoldRecord,
    Latency,
    OnnxModel,
    Parity,
    Report,
    Source,
    Stage,
    TensorSpec,
    Tolerance,
    Variant,
)
from exporter.reference import TorchSession
from exporter.renderers import markdown, record
from exporter.to_onnx import export_onnx
from exporter.version import TOOL
from exporter.weights import load_weights

if TYPE_CHECKING:
    import onnx
    from torch import nn

PYTORCH = "PyTorch eager, fp32"
_FOLD_SAMPLES = 8  # enough to see a wrong fold, whose error is some 1e13 times that of a right one


def run(
    model: str | Model,
    profile: Profile,
    out: Path,
    *,
    weights: Path | None = None,
    input_shape: tuple[int, ...] | None = None,
    calibration: Array | None = None,
    progress: Progress = silent,
) -> Report:
    """Export a model in every precision of a profile, check it, time it, and write the bundle.

    ``model`` is a built-in's name or anything that keeps the contract; ``weights`` replaces its own
    (safetensors), ``input_shape`` its own (C, H, W), and ``calibration``, (N, C, H, W) float32,
    the draw from its training samples. The bundle ``out`` is written whole or not at all.

    Missed gates are in the report (`Report.raise_for_parity` makes them an exception). Raises an
    `ExportError` of the kind that `exporter.errors` says for anything that keeps a bundle from
    being written.
    """
    job = _prepare(model, profile, weights, input_shape, calibration, progress)
    with new_bundle(out) as folder, job.threads():
        with job.stage("fold BatchNorm"):
            folded = fold_batchnorm(job.module)
        with job.stage("export to ONNX"):
            source = export_onnx(
                folded.module,
                folder / f"{job.name}.fp32.onnx",
                input=job.input,
                output=job.model.output,
                batch=profile.batch,
                opset=profile.opset,
            )
        truth = _Truth.compute(job)
        fold = _check_fold(job, folded, truth)
        with ExitStack() as open_sessions:
            timed: dict[str, Session] = {PYTORCH: truth.pytorch}
            variants = _variants(job, source, truth, open_sessions, timed)
            latency = _time(job, timed)
        report = Report(
            schema=SCHEMA,
            tool=TOOL,
            source=job.source(),
            profile=msgspec.json.decode(msgspec.json.encode(profile)),
            environment=environment.capture(),
            calibration=job.calibration.origin if job.calibration else None,
            fold=fold,
            pytorch=truth.parities,
            variants=variants,
            latency=latency,
            stages=tuple(job.stages),
        )
        (folder / "report.json").write_text(record.render(report), "utf-8")
        (folder / "report.md").write_text(markdown.render(report), "utf-8")
        (folder / "profile.toml").write_text(profile.to_toml(), "utf-8")
        write_manifest(folder, tool=TOOL, environment=report.environment)
    return report


# ── Before any work ─────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Job:
    """What was asked for, resolved and found possible; and how long each stage took."""

    name: str
    model: Model
    module: nn.Module
    weights: tuple[str, str]
    input: TensorSpec
    profile: Profile
    precisions: dict[str, Precision]
    runtimes: dict[str, Runtime]
    held_out: samples.Samples
    noise: Array
    calibration: samples.Samples | None
    progress: Progress
    stages: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, what: str, total: int | None = None) -> Iterator[Advance]:
        start = perf_counter()
        with self.progress(what, total) as advance:
            yield advance
        self.stages.append(Stage(what, perf_counter() - start))

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Give PyTorch the profile's threads, and its own back afterwards."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.profile.timing.pytorch_threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def source(self) -> Source:
        return Source(
            model=self.name,
            weights=self.weights[0],
            weights_sha256=self.weights[1],
            parameters=sum(parameter.numel() for parameter in self.module.parameters()),
            input=self.input,
            output=self.model.output,
            opset=self.profile.opset,
        )

    def outputs(self, session: Session, inputs: Array, advance: Advance) -> Array:
        batches = samples.feeds(inputs, self.input.name, size=self.profile.batch.opt)
        return collect_outputs(
            session, batches, self.model.output.name, samples=len(inputs), advance=advance
        )

    @property
    def batches(self) -> int:
        """Return how many batches one look at all inputs takes."""
        size = self.profile.batch.opt
        return -(-len(self.held_out.inputs) // size) - (-len(self.noise) // size)


def _prepare(
    model: str | Model,
    profile: Profile,
    weights: Path | None,
    input_shape: tuple[int, ...] | None,
    calibration: Array | None,
    progress: Progress,
) -> _Job:
    """Resolve every name, file and shape. Raises the `ExportError` of whatever is wrong."""
    name = model if isinstance(model, str) else type(model).__name__.lower()
    chosen = load_model(model) if isinstance(model, str) else model
    runtimes = {n: load_runtime(n, options) for n, options in profile.runtime.items()}
    precisions = {n: load_precision(n, c.options) for n, c in profile.precision.items()}
    for runtime_name, runtime in runtimes.items():
        if reason := runtime.missing("build"):
            raise RuntimeMissing(
                f"the runtime {runtime_name!r} cannot be used here: {reason}",
                hint=f"pip install 'resnet-export[{runtime_name}]', or choose another profile",
            )
    spec = TensorSpec(chosen.input.name, input_shape or chosen.input.shape)
    module = chosen.module()
    path = weights or chosen.weights
    digest = load_weights(module, path)
    _check_input(module, spec, name)
    wanted = profile.calibration
    drawn = None
    if calibration is not None:
        checked = samples.check_calibration(calibration, spec, origin="the given array")
        drawn = samples.Samples(checked, checked[:0], f"{len(checked)} samples of the given array")
    elif any(precision.needs_statistics for precision in precisions.values()):
        training = samples.load_split(chosen.data, spec.shape, "train")
        drawn = samples.draw(training, count=wanted.images, seed=wanted.seed)
    return _Job(
        name=name,
        model=chosen,
        module=module,
        weights=(path.name, digest),
        input=spec,
        profile=profile,
        precisions=precisions,
        runtimes=runtimes,
        held_out=samples.load_split(chosen.data, spec.shape, "held-out"),
        noise=samples.noise(spec.shape, count=profile.parity.random, seed=profile.parity.seed),
        calibration=drawn,
        progress=progress,
    )


def _check_input(module: nn.Module, spec: TensorSpec, name: str) -> None:
    """Raise `InputRefused` unless the network takes the shape; on torch's meta device, for free."""
    from copy import deepcopy

    import torch

    shape = " × ".join(map(str, spec.shape))
    if min(spec.shape) < 1:
        raise InputRefused(f"{name} cannot take an input of {shape}: every size must be 1 or more")
    try:
        with torch.inference_mode():
            deepcopy(module).to("meta")(torch.empty(1, *spec.shape, device="meta"))
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputRefused(f"{name} cannot take an input of {shape}: {reason}") from error


# ── The truth, and how far from it float32 PyTorch is ───────────────────────────────


@dataclass(frozen=True, slots=True)
class _Truth:
    """The unfolded network's outputs in float64, on the held-out samples and on noise."""

    held_out: Array
    noise: Array
    pytorch: TorchSession
    parities: tuple[Parity, Parity]

    @classmethod
    def compute(cls, job: _Job) -> _Truth:
        double = TorchSession.of(job.module, job.model.output.name, double=True)
        single = TorchSession.of(job.module, job.model.output.name)
        with job.stage("run PyTorch in float64", job.batches) as advance:
            want = [job.outputs(double, inputs, advance) for inputs in _inputs(job)]
        with job.stage("run PyTorch in float32", job.batches) as advance:
            got = [job.outputs(single, inputs, advance) for inputs in _inputs(job)]
        held_out = compare_outputs(
            want[0], got[0], inputs=job.held_out.origin, labels=job.held_out.labels
        )
        noise = compare_outputs(want[1], got[1], inputs=_noise_name(job))
        return cls(want[0], want[1], single, (held_out, noise))


def _inputs(job: _Job) -> tuple[Array, Array]:
    return job.held_out.inputs, job.noise


def _noise_name(job: _Job) -> str:
    return f"{len(job.noise)} noise samples"


def _check_fold(job: _Job, folded: Folded, truth: _Truth) -> FoldRecord:
    """Fold again in float64: what is left between the two is rounding, or the fold is wrong."""
    from copy import deepcopy

    with job.stage("check the fold in float64"):
        exact = fold_batchnorm(deepcopy(job.module).double()).module
        session = TorchSession.of(exact, job.model.output.name, double=True)
        few = job.held_out.inputs[:_FOLD_SAMPLES]
        got = job.outputs(session, few, lambda: None)
        error = compare_outputs(truth.held_out[: len(few)], got, inputs="").rel_l2
    return FoldRecord(folded.fates, error)


# ── One precision after another ─────────────────────────────────────────────────────


def _variants(
    job: _Job,
    source: OnnxModel,
    truth: _Truth,
    open_sessions: ExitStack,
    timed: dict[str, Session],
) -> tuple[Variant, ...]:
    import onnx

    graph = onnx.load(source.path)
    statistics: Mapping[str, Any] = {}
    if any(precision.needs_statistics for precision in job.precisions.values()):
        assert job.calibration is not None  # _prepare saw to it
        inputs = job.calibration.inputs
        with job.stage(f"calibrate on {len(inputs)} samples", len(inputs)) as advance:
            one_by_one = samples.feeds(inputs, job.input.name, size=1)
            statistics = calibrate(graph, one_by_one, advance=advance)
    variants = []
    for name, precision in job.precisions.items():
        try:
            with job.stage(f"{name}: convert"):
                model, notes = _convert(job, source, graph, name, precision, statistics)
        except GraphError as error:
            refused = tuple(Artefact(name, r, None, refused=str(error)) for r in job.runtimes)
            variants.append(Variant(name, None, None, (), refused))
            continue
        artefacts = tuple(
            _artefact(job, model, runtime_name, runtime, truth, open_sessions, timed)
            for runtime_name, runtime in job.runtimes.items()
        )
        folder = model.path.parent
        cost = count_flops(onnx.load(model.path))
        variants.append(Variant(name, File.of(model.path, folder), cost, notes, artefacts))
    if "fp32" not in job.precisions:
        source.path.unlink()
    return tuple(variants)


def _convert(
    job: _Job,
    source: OnnxModel,
    graph: onnx.ModelProto,
    name: str,
    precision: Precision,
    statistics: Mapping[str, Any],
) -> tuple[OnnxModel, tuple[str, ...]]:
    """Write the graph in one precision. Raises `GraphError`."""
    import onnx

    converted = precision.convert(graph, statistics)
    try:
        onnx.checker.check_model(converted.model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the {name} graph is not valid ONNX: {error}") from error
    path = source.path.with_name(f"{job.name}.{name}.onnx")
    onnx.save(converted.model, path)
    return source._replace(path=path, precision=name), converted.notes


def _artefact(
    job: _Job,
    model: OnnxModel,
    name: str,
    runtime: Runtime,
    truth: _Truth,
    open_sessions: ExitStack,
    timed: dict[str, Session],
) -> Artefact:
    """Build for one runtime, and compare with the truth if it can run here."""
    folder = model.path.parent
    artefact = Artefact(model.precision, name, None, targets=getattr(runtime, "targets", ()))
    start = perf_counter()
    try:
        with job.stage(f"{artefact.name}: build"):
            path = runtime.build(model, folder)
    except BuildError as error:
        return msgspec.structs.replace(artefact, refused=str(error))
    artefact = msgspec.structs.replace(
        artefact,
        file=File.of(path, folder),
        build_seconds=perf_counter() - start if path != model.path else None,
        notes=runtime.describe(path),
        not_run=runtime.missing("run"),
    )
    if artefact.not_run:
        return artefact
    try:
        session = open_sessions.enter_context(runtime.open(path))
        parity = _compare(job, session, artefact, truth)
    except ExportError as error:
        return msgspec.structs.replace(artefact, refused=str(error))
    timed[artefact.name] = session
    return msgspec.structs.replace(artefact, parity=parity)


def _compare(
    job: _Job, session: Session, artefact: Artefact, truth: _Truth
) -> tuple[Parity, Parity]:
    gates = job.profile.precision[artefact.precision]
    with job.stage(f"{artefact.name}: compare with PyTorch", job.batches) as advance:
        got = [job.outputs(session, inputs, advance) for inputs in _inputs(job)]

    def compare(
        want: Array, found: Array, tolerance: Tolerance, pytorch: Parity, **labels: Array
    ) -> Parity:
        return compare_outputs(
            want,
            found,
            inputs=pytorch.inputs,
            tolerance=tolerance,
            noise_floor=pytorch.rel_l2,
            **labels,
        )

    on_held_out, on_noise = truth.parities
    return (
        compare(truth.held_out, got[0], gates.tolerance, on_held_out, labels=job.held_out.labels),
        compare(truth.noise, got[1], gates.random_tolerance, on_noise),
    )


def _time(job: _Job, sessions: Mapping[str, Session]) -> tuple[Latency, ...]:
    feeds = {
        size: next(samples.feeds(job.held_out.inputs, job.input.name, size=size))
        for size in job.profile.timing.batches
    }
    return measure_latency(sessions, feeds, job.profile.timing, progress=job.stage)
