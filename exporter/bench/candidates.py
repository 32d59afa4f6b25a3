"""What a bench times: the files of bundles, each in every runtime and with every thread count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from exporter import environment, samples
from exporter.bundle import Manifest
from exporter.contracts import Model, Runtime, classification
from exporter.data import Data, open_data
from exporter.errors import BuildError, InputRefused, OutOfMemory, RuntimeMissing, with_hint
from exporter.onnx_files import check_onnx
from exporter.packing import packed_shape
from exporter.plugins import load_model, load_runtime, options_of
from exporter.profile import Profile, load_profile
from exporter.records import (
    Artefact,
    BenchAsked,
    File,
    NotTimed,
    OnnxModel,
    Parity,
    Report,
    Variant,
)
from exporter.samples import Samples, Split
from exporter.shipped import check_data, intact_file, read_bundle


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that was read, and the held-out samples of its network as it takes them."""

    label: str
    folder: Path
    manifest: Manifest
    report: Report
    profile: Profile
    held_out: Samples

    @property
    def fed(self) -> str:
        """Return what runs are fed, and in which size where others are possible."""
        sides = self.report.source.input.sides
        at = "" if sides is None else f" at {' × '.join(map(str, sides))}"
        return f"{self.held_out.origin}{at}"

    @classmethod
    def read(cls, folder: Path, label: str, model: Model | None, data: Data | None) -> Bundle:
        """Return it, with held-out samples of ``data`` or else of its network's own.

        Raises `InputRefused` if it is none, or not what it was, or was judged on other data.
        """
        manifest, report = read_bundle(folder)
        intact_file(manifest, "report.json", folder)
        profile = load_profile(folder / intact_file(manifest, "profile.toml", folder).name)
        held_out = _held_out(report, profile, _own_data(report, model, profile), data)
        return cls(label, folder, manifest, report, profile, held_out)


def _held_out(report: Report, profile: Profile, own: str, data: Data | None) -> Samples:
    """Return the samples of the data named, which must be those that the bundle was judged on."""
    source, before = report.source, report.data
    whole: Split | None = "held-out" if before and before.held_out == before.samples else None
    found = open_data(
        data, own, source.inputs, classification(source.outputs), profile, whole=whole
    )
    if data is not None:
        check_data(found.record, before)
    return found.load("held-out")


def _own_data(report: Report, model: Model | None, profile: Profile) -> str:
    """Return the name of the network's samples; code that made it is not needed for that."""
    source = report.source
    shape = profile.preprocess.channels_first(source.input.shape)
    if source.more_inputs:
        return samples.NO_DATA
    if model is None and (source.factory or source.given or source.file):
        return samples.fitting(shape[0])
    return (model or load_model(report.source.model, input_shape=shape)).data


class Candidate(NamedTuple):
    """A file that is to be timed in a runtime; ``recorded`` is what its bundle says of it."""

    name: str
    bundle: Bundle
    precision: str
    runtime_name: str
    runtime: Runtime
    path: Path
    file: File
    recorded: Parity | None


class Found(NamedTuple):
    """What can be timed, and what cannot with the reason."""

    candidates: list[Candidate]
    not_timed: list[NotTimed]


def read_bundles(
    folders: Sequence[Path], models: Sequence[Model | None], data: Data | None
) -> list[Bundle]:
    """Return the bundles, each under its folder's name, and that with a number if it is another's.

    Raises `InputRefused` for the first that is none, or not what it was.
    """
    bundles: list[Bundle] = []
    for folder, model in zip(folders, models, strict=True):
        name = folder.resolve().name
        same = sum(Path(bundle.folder).resolve().name == name for bundle in bundles)
        label = f"{name} ({same + 1})" if same else name
        bundles.append(Bundle.read(folder, label, model, data))
    return bundles


def doubts_of_data(bundles: Sequence[Bundle], data: Data | None) -> Iterator[str]:
    """Yield whose accuracy is not compared with its record, since its data was not named."""
    for bundle in bundles:
        if data is None and bundle.report.data:
            yield (
                f"{bundle.label} was judged on {bundle.report.data.name!r} and runs on "
                f"{bundle.held_out.origin}, so that its accuracy is not compared with its record: "
                "name its data with --data"
            )


def find_candidates(bundles: Sequence[Bundle], asked: BenchAsked, scratch: Path) -> Found:
    """Return every candidate. What a runtime needs beside the ONNX files is built in ``scratch``.

    Raises `UnknownName` for an unknown runtime; `RuntimeMissing` for one that was asked for and
    cannot run here, or if none can; `InputRefused` for a file that is gone or altered, for a batch
    that an engine does not take, or if nothing is left to be timed.
    """
    found = Found([], [])
    for bundle in bundles:
        prefix = f"{bundle.label}: " if len(bundles) > 1 else ""
        for variant in bundle.report.variants:
            if variant.refused:
                found.not_timed.append(NotTimed(f"{prefix}{variant.precision}", variant.refused))
                continue
            for name in asked.runtimes or tuple(bundle.profile.runtime):
                _add(found, bundle, variant, name, asked, prefix, scratch)
    if found.candidates:
        return found
    reasons = "; ".join(dict.fromkeys(f"{n.name}: {n.reason}" for n in found.not_timed))
    kind = (
        RuntimeMissing if any(v.file for b in bundles for v in b.report.variants) else InputRefused
    )
    raise kind(f"nothing of the bundle can be timed here: {reasons}")


def _add(
    found: Found,
    bundle: Bundle,
    variant: Variant,
    name: str,
    asked: BenchAsked,
    prefix: str,
    scratch: Path,
) -> None:
    """Add one precision in one runtime, with every thread count that was asked for."""
    title = f"{prefix}{variant.precision} on {name}"
    artefact = next((a for a in variant.artefacts if a.runtime == name), None)
    for threads, runtime in _with_threads(bundle, name, asked):
        if reason := runtime.missing("run"):
            if asked.runtimes:
                raise _missing(name, reason)
            found.not_timed.append(NotTimed(title, reason))
            return
        try:
            path, file = _file(bundle, variant, artefact, runtime, scratch)
        except BuildError as error:
            found.not_timed.append(NotTimed(title, with_hint(error)))
            return
        if path.suffix != ".onnx":
            _check_batch(title, bundle.profile, asked)
        label = f"{title}, {threads} thread{'s' if threads > 1 else ''}" if threads else title
        recorded = _labelled(artefact, bundle) if artefact else None
        found.candidates.append(
            Candidate(label, bundle, variant.precision, name, runtime, path, file, recorded)
        )


def _with_threads(
    bundle: Bundle, name: str, asked: BenchAsked
) -> Iterator[tuple[int | None, Runtime]]:
    """Yield the runtime as the bundle's profile has it, or once for each count of threads."""
    options = bundle.profile.runtime.get(name, {})
    if "threads" not in options_of("runtimes", name) or not asked.threads:
        yield None, load_runtime(name, options)
        return
    for threads in asked.threads:
        yield threads, load_runtime(name, {**options, "threads": threads})


def _file(
    bundle: Bundle, variant: Variant, artefact: Artefact | None, runtime: Runtime, scratch: Path
) -> tuple[Path, File]:
    """Return what the runtime opens: the bundle's own file, or one that is built from its graph.

    Raises `BuildError` where it was refused or is now, `InputRefused` for a file that is altered.
    """
    if artefact and artefact.refused:
        raise BuildError(artefact.refused)
    if artefact and artefact.file:
        file = intact_file(bundle.manifest, artefact.file.name, bundle.folder)
        path = bundle.folder / file.name
        if path.suffix == ".onnx":
            check_onnx(path, runs=True)
        return path, file
    assert variant.file is not None  # what was refused is not here
    source = bundle.report.source
    path = bundle.folder / intact_file(bundle.manifest, variant.file.name, bundle.folder).name
    check_onnx(path, runs=True)
    model = OnnxModel(
        path,
        variant.precision,
        source.input,
        source.output,
        bundle.profile.batch,
        source.more_inputs,
    )
    built = runtime.build(model, scratch)
    return built, File.of(built, built.parent)


def _labelled(artefact: Artefact, bundle: Bundle) -> Parity | None:
    """Return what the record says of the artefact on the samples that are at hand."""
    return next(
        (
            parity
            for parity in artefact.parity
            if parity.inputs == bundle.held_out.origin and parity.reference_correct is not None
        ),
        None,
    )


def _missing(name: str, reason: str) -> RuntimeMissing:
    return RuntimeMissing(
        f"the runtime {name!r} cannot run here: {reason}",
        hint="leave it out, or use a machine with that GPU"
        if "GPU" in reason
        else f"pip install 'resnet-export[{name}]', or leave it out",
    )


def _check_batch(title: str, profile: Profile, asked: BenchAsked) -> None:
    """Raise `InputRefused` for a batch that an engine was not built for."""
    allowed = profile.batch
    for batch in asked.batches:
        if not allowed.min <= batch <= allowed.max:
            raise InputRefused(
                f"{title} takes batches of {allowed.min} to {allowed.max}, and {batch} was asked "
                "for",
                hint="its batch range was set by [batch] in the profile",
            )


def check_memory(bundles: Sequence[Bundle], batches: Sequence[int]) -> None:
    """Raise `OutOfMemory` if the batches alone would not fit."""
    sample = sum(prod(packed_shape(bundle.report.source.inputs)) for bundle in bundles)
    needed = 4 * samples.VARIED * sum(batches) * sample
    what = f"{samples.VARIED} batches of {', '.join(map(str, batches))} samples"
    _check_memory(needed, what, "lower --batch")


def check_loads(candidates: Sequence[Candidate], loads: int) -> None:
    """Raise `OutOfMemory` if the files, loaded that often, would not fit."""
    needed = loads * sum(candidate.file.size for candidate in candidates)
    _check_memory(needed, f"{loads} loads of {len(candidates)} files", "lower --loads")


def _check_memory(needed: int, what: str, hint: str) -> None:
    memory = environment.memory_bytes()
    if memory and needed > memory:
        raise OutOfMemory(
            f"{what} are {needed / 1e9:.0f} GB, more than this machine's {memory / 1e9:.0f} GB of "
            "memory",
            hint=hint,
        )
