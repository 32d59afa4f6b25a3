"""A bundle, compared once more with the network it was made from: ``resnet-export parity``.

The graphs that were asked for are made anew, from the network, its weights and the bundle's own
profile, and never read from the bundle. So whatever was done to its files since, or wherever they
run now, what they compute is held against what they should.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import msgspec
import onnx
from torch import nn

from exporter import environment
from exporter.bundle import extended_bundle
from exporter.contracts import Converted, Model, Progress, Session, silent
from exporter.data import Data
from exporter.emulation import Emulator
from exporter.errors import ExportError, GraphError, InputRefused, with_hint
from exporter.factories import FactoryModel, Shapes, load_factory
from exporter.graphs import as_shipped, convert_all, export_source
from exporter.job import Job
from exporter.ladder import Asked, Ladder, Truth
from exporter.live import live_model, usual_torch
from exporter.onnx_files import check_onnx
from exporter.packing import in_words, unpack
from exporter.parity import check_same_interface
from exporter.profile import Profile, load_profile
from exporter.records import Array, Artefact, Report, Source, TensorSpec, Variant
from exporter.runtimes._graph import read_graph
from exporter.shipped import check_data, is_intact, read_bundle
from exporter.sizes import AskedAt, Sizes
from exporter.weights import AskedWeights
from exporter.words import quoted
from exporter.worst_case import Found, Search, search_worst_case

_WORST = "worst-case"


@usual_torch()
def check_bundle(
    folder: Path,
    *,
    model: Model | nn.Module | Path | None = None,
    weights: AskedWeights | None = None,
    calibration: Data | None = None,
    data: Data | None = None,
    allow_overlap: bool = False,
    search: Search | None = None,
    progress: Progress = silent,
) -> Report:
    """Return the bundle's report with parity and fidelity measured anew.

    ``model``, ``weights``, ``calibration``, ``data`` and ``allow_overlap`` are what the bundle was
    exported with, where they were not the built-in ones; a network that was given as a module is
    given as one again, and code that made one is never taken from the bundle. The result has no
    latencies. Nothing is written, but that with ``search`` the worst inputs found for each artefact
    go into the bundle, as ``worst-case/<artefact>.npy``, and what they show into
    ``worst-case/record.json``.

    Raises `InputRefused` if the folder is not a bundle, or the weights or the calibration data are
    not those it was made from; otherwise as `exporter.run`. A file that cannot be loaded or has
    another interface fails its artefact alone.
    """
    manifest, before = read_bundle(folder)
    _check_start(model, before.source)
    profile = load_profile(folder / "profile.toml")
    shape: Shapes | None = profile.preprocess.channels_first(before.source.input.shape)
    if before.source.file:
        shape = {spec.name: spec.shape for spec in before.source.inputs}
    elif before.source.more_inputs:
        shape = None
    if isinstance(model, nn.Module):
        model = live_model(model, _shapes(before, profile), name=before.source.model)
    job = Job.resolve(
        model or before.source.model,
        profile,
        weights=weights,
        input_shape=shape,
        classes=_classes(before),
        calibration=calibration,
        data=data,
        progress=progress,
        builds=False,
        allow_overlap=allow_overlap,
    )
    _check_sources(job, before)
    intact = {file.name for file in manifest.files if is_intact(file, folder)}
    with job.stage("fold BatchNorm"):
        folded = job.start.fold(job.example())
    with TemporaryDirectory() as scratch, job.threads():
        with job.stage("export to ONNX again"):
            path = export_source(job, folded, Path(scratch, f"{job.name}.fp32.onnx")).path
        graph = onnx.load(path)
        asked = Asked.of(job, as_shipped(job, graph), "fp32")
        ladder = Ladder(job, Truth.compute(job, folded), asked)
        sizes = Sizes.compute(ladder)
        rungs = ladder.first_rungs()
        made = dict(convert_all(job, graph))
        bundle = _Bundle(job, folder, intact, ladder, sizes, search)
        variants = tuple(_recheck(bundle, v, made[v.precision]) for v in before.variants)
    if bundle.found:
        _save(folder, bundle.found, job.input_specs)
    return msgspec.structs.replace(
        before,
        environment=environment.capture(),
        pytorch=ladder.truth.parities,
        rungs=rungs,
        variants=variants,
        latency=(),
        doubts=(
            *job.doubts(),
            *(
                f"{file.name} is not the file that the manifest lists"
                for file in manifest.files
                if file.name not in intact
            ),
        ),
        stages=job.stages.so_far,
        calibrated=job.calibrated,
        sizes=sizes.records,
        worst_cases=tuple(found.record for found in bundle.found),
    )


def load_factory_of(folder: Path, code: str) -> FactoryModel:
    """Return a factory's network as a bundle has it: of its input, with its profile's arguments.

    Raises as `read_bundle`, `load_profile` and `load_factory`.
    """
    _, before = read_bundle(folder)
    profile = load_profile(folder / "profile.toml")
    return load_factory(code, profile.model.args, input_shape=_shapes(before, profile))


def _shapes(before: Report, profile: Profile) -> Shapes:
    """Return what a bundle's network takes, by name unless that is what one input is called."""
    shape = profile.preprocess.channels_first(before.source.input.shape)
    inputs = {spec.name: spec.shape for spec in before.source.inputs}
    return shape if list(inputs) == ["input"] else inputs


def _classes(before: Report) -> int | None:
    """Return how many classes a bundle's network was asked to tell apart, if it does that alone."""
    only = before.source.outputs
    return only[0].shape[0] if len(only) == 1 and only[0].has_classes else None


def _check_start(model: Model | nn.Module | Path | None, before: Source) -> None:
    """Raise `InputRefused` unless what the bundle was made from is given, where it must be."""
    if before.factory and model is None:
        raise InputRefused(
            f"the bundle's network was made by {before.factory}, and a bundle's word does not run "
            "code",
            hint="name the factory with --model, as package.module:factory or file.py:factory",
        )
    if before.given and model is None:
        raise InputRefused(
            f"the bundle's network was given in memory, as a {before.given}, and the bundle does "
            "not hold it",
            hint="name a factory that makes it with --model, or call exporter.check_bundle(folder, "
            "model=module)",
        )
    if before.file and not isinstance(model, Path):
        raise InputRefused(
            f"the bundle was made from the ONNX file {before.file!r}, which is not in it",
            hint="give that file with --onnx",
        )
    if isinstance(model, Path) and not before.file:
        raise InputRefused(
            f"the bundle was made from the network {before.model!r}, and not from an ONNX file",
            hint="leave out --onnx",
        )


def _check_sources(job: Job, before: Report) -> None:
    """Raise `InputRefused` unless weights, samples and profile are those of the bundle's report.

    And the network takes and gives what it did.
    """
    source = before.source
    for verb, then, now in (
        ("takes", source.inputs, job.input_specs),
        ("gives", source.outputs, job.output_specs),
    ):
        if then != now:
            said = (f"the bundle's network {verb} {_said(then)}", f"and this one {_said(now)}")
            raise InputRefused(", ".join(said))
    wanted, found = before.source.weights_sha256, job.loaded.sha256
    if wanted != found:
        raise InputRefused(
            f"the bundle was made from weights {before.source.weights!r} of SHA-256 "
            f"{wanted[:12]}…, and {job.weights!r} has {found[:12]}…",
            hint=f"give the same with {'--onnx' if before.source.file else '--weights'}",
        )
    _check_key(before.source.weights_key, job.loaded.key)
    check_data(job.data.record, before.data)
    calibrated = job.calibration.origin if job.calibration else "nothing"
    wanted = before.calibration or "nothing"
    if wanted != calibrated:
        raise InputRefused(
            f"the bundle was calibrated on {wanted}, and this would be on {calibrated}",
            hint="give the same file with --calibration"
            if before.calibration
            else "leave out --calibration",
        )
    for variant in before.variants:
        lacking = [variant.precision] if variant.precision not in job.precisions else []
        lacking += [a.runtime for a in variant.artefacts if a.runtime not in job.runtimes]
        if lacking:
            raise InputRefused(f"the bundle's report has {lacking[0]!r}, and its profile lacks it")


def _check_key(then: str | None, now: str | None) -> None:
    """Raise `InputRefused` for other weights of one file: without a key there is no choice."""
    if then is not None and now is not None and then != now:
        raise InputRefused(
            f"the bundle was made from the weights by the key {quoted(then)}, and this would be "
            f"from {quoted(now)}",
            hint=f"give --weights-key {quoted(then)}",
        )


def _said(tensors: tuple[TensorSpec, ...]) -> str:
    return " and ".join(f"{one.name!r} N×{'×'.join(one.said)}" for one in tensors)


@dataclass(frozen=True, slots=True)
class _Bundle:
    """A bundle's files, the ladder they are held against, and what a search has found."""

    job: Job
    folder: Path
    intact: set[str]
    ladder: Ladder
    sizes: Sizes
    search: Search | None
    found: list[Found] = field(default_factory=list)


def _recheck(bundle: _Bundle, variant: Variant, made: Converted | ExportError) -> Variant:
    """Return one precision, each of its artefacts compared anew."""
    if isinstance(made, ExportError):
        return msgspec.structs.replace(variant, artefacts=(), losses=(), refused=with_hint(made))
    asked = bundle.sizes.ask(made.model, variant.precision)
    artefacts = tuple(_judge(bundle, artefact, asked) for artefact in variant.artefacts)
    return msgspec.structs.replace(
        variant,
        artefacts=artefacts,
        losses=bundle.ladder.losses(asked.own, made),
        repairs=made.repairs,
        tensors=made.tensors,
        notes=made.notes,
    )


def _judge(bundle: _Bundle, before: Artefact, asked: AskedAt) -> Artefact:
    """Return one artefact, compared anew, or with the reason why it cannot be."""
    artefact = msgspec.structs.replace(
        before,
        parity=(),
        rung=None,
        refused=None,
        not_run=None,
        sizes=bundle.sizes.unchecked(),
    )
    runtime = bundle.job.runtimes[artefact.runtime]
    if before.file is None:  # it was refused when the bundle was made
        return before
    path = bundle.folder / before.file.name
    try:
        _check_file(bundle, path)
        if reason := runtime.missing("run"):
            return msgspec.structs.replace(artefact, not_run=reason)
        with runtime.open(path) as session:
            judged = bundle.sizes.judge(artefact, runtime, path, session, asked)
            if bundle.search is not None:
                bundle.found.append(
                    _search(bundle, judged, path, session, asked.own, bundle.search)
                )
            return judged
    except ExportError as error:
        return msgspec.structs.replace(artefact, refused=with_hint(error))


def _check_file(bundle: _Bundle, path: Path) -> None:
    """Raise `GraphError` for a file that is gone, or that cannot be what was asked for.

    An engine is a program, so one that the manifest does not list as it is now is not loaded.
    """
    name = path.relative_to(bundle.folder).as_posix()
    if not path.is_file():
        raise GraphError(f"{name}: the bundle lacks this file")
    if path.suffix == ".onnx":
        _check_runs(path, bundle.job.input_specs)
        check_same_interface(
            read_graph(path),
            name,
            input=bundle.job.input_specs[0],
            more_inputs=bundle.job.input_specs[1:],
            output=bundle.job.graph_outputs[0],
            more_outputs=bundle.job.graph_outputs[1:],
            dtypes=("float32", "float16"),
        )
    elif name not in bundle.intact:
        raise GraphError(
            f"{name} is not the file that the manifest lists, and an engine is a program, so it is "
            "not loaded"
        )


def _check_runs(path: Path, taken: tuple[TensorSpec, ...]) -> None:
    """Raise as `check_onnx`, which runs the file once at the largest size that it is for."""
    try:
        check_onnx(path, runs=True, sizes={spec.name: spec.largest for spec in taken})
    except ExportError as error:
        if not any(spec.free for spec in taken):
            raise
        shapes = in_words(spec.largest for spec in taken)
        raise type(error)(f"for an input of {shapes}, {error}", hint=error.hint) from error


def _search(
    bundle: _Bundle, artefact: Artefact, path: Path, session: Session, asked: Asked, search: Search
) -> Found:
    """Look for the input on which an artefact disagrees most. Raises `GraphError`."""
    job, source = bundle.job, bundle.ladder.source.emulator
    surrogate = Emulator.of(onnx.load(path)) if path.suffix == ".onnx" else asked.emulator
    if job.input_specs[0].dtype != "float32":
        raise GraphError(
            "no worst case can be searched for: it is found by gradients, and pixels have none"
        )
    if job.top is not None:
        raise GraphError(
            "no worst case can be searched for: it is found by gradients, and labels have none"
        )
    if source is None or surrogate is None:
        raise GraphError(f"no worst case can be searched for: {asked.unseen}")
    truth = job.start.double()
    what = f"{artefact.name}: search the worst case"
    with job.stage(what, search.steps, part="evidence") as advance:
        found = search_worst_case(
            artefact.name,
            reference=source,
            surrogate=surrogate,
            inputs=job.input_specs,
            outputs=job.output_specs,
            samples=job.held_out.inputs,
            on_samples=(bundle.ladder.truth.held_out, bundle.ladder.outputs[artefact.name]),
            run_reference=partial(job.outputs, truth),
            run_artefact=partial(job.outputs, session),
            search=search,
            advance=advance,
        )
    kind = "npz" if len(job.input_specs) > 1 else "npy"
    name = f"{artefact.precision}-{artefact.runtime}.{kind}"
    record = msgspec.structs.replace(found.record, file=f"{_WORST}/{name}")
    return Found(record, found.inputs)


def _save(folder: Path, found: list[Found], inputs: tuple[TensorSpec, ...]) -> None:
    """Put the worst inputs into the bundle, in place of those of an earlier search."""
    import numpy as np

    with extended_bundle(folder, _WORST) as part:
        for case in found:
            assert case.record.file is not None
            path = part / Path(case.record.file).name
            if len(inputs) == 1:
                np.save(path, case.inputs)
            else:
                _save_arrays(path, unpack(case.inputs, inputs))
        text = msgspec.json.format(msgspec.json.encode([case.record for case in found]), indent=2)
        (part / "record.json").write_bytes(text + b"\n")


def _save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write an ``.npz`` file; numpy.savez has no room for an array called ``file``."""
    import numpy as np

    with ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
