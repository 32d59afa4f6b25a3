"""The best mixture of precisions for a budget, measured: ``resnet-export tune``.

    sensitivities ─▶ candidates ─▶ validated one by one ─▶ timed in turn ─▶ the choice
                         ▲              │                                  │
                         └── tune.search ◀──┘       confirmed once on the evaluation samples

The search sees training images that calibration did not draw, and no others; the choice alone is
then held against the evaluation samples, once. What was found so far is kept in the folder, so that
an interrupted search goes on; latencies are never kept, but taken again of all candidates in turn.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import onnx

from exporter import environment
from exporter.contracts import Model, Progress, Runtime, silent
from exporter.data import Data
from exporter.errors import InputRefused, ProfileError, RuntimeMissing, UnknownName
from exporter.graphs import export_source
from exporter.job import Job
from exporter.plugins import load_runtime, options_of
from exporter.profile import Profile
from exporter.records import Array, Budget, TuneReport
from exporter.samples import Samples
from exporter.tune.bench import Bench
from exporter.tune.loop import Search
from exporter.tune.state import State, check_folder
from exporter.version import TOOL
from exporter.weights import AskedWeights

FEWEST = 8  # validation samples, below which an SQNR is an accident


def tune_model(
    model: str | Model,
    profile: Profile,
    out: Path,
    budget: Budget,
    *,
    precision: str = "int8",
    runtime: str | None = None,
    weights: AskedWeights | None = None,
    input_shape: tuple[int, ...] | None = None,
    classes: int | None = None,
    calibration: Data | None = None,
    data: Data | None = None,
    validation: int = 128,
    minutes: float = 5.0,
    restart: bool = False,
    progress: Progress = silent,
) -> TuneReport:
    """Search which layers to keep in float, and write the choice as a profile into ``out``.

    ``precision`` is the one whose option ``keep`` is varied, and ``runtime`` where candidates run,
    the profile's first that can here. ``minutes`` are how long a search takes, about: 60 % are
    for candidates, and one that is begun is finished. The rest is as for `exporter.run`. Of several
    outputs the budget speaks of each, and figures are those of the one that loses most.

    A search in ``out`` that was made with the same things goes on; ``restart`` begins anew. Raises
    `InputRefused` if it was made with others, `OutputError` if the folder holds something else, and
    otherwise as `exporter.run`. A budget that nothing keeps is in the report.
    """
    _check_options(profile, precision, validation=validation, minutes=minutes)
    check_folder(out)
    name, chosen = _runtime(profile, runtime)
    job = Job.resolve(
        model,
        profile,
        weights=weights,
        input_shape=input_shape,
        classes=classes,
        calibration=calibration,
        data=data,
        progress=progress,
        builds=False,
    )
    _check_budget(job, budget)
    seen = _validation(job, validation)
    with TemporaryDirectory() as scratch, job.threads(), ExitStack() as sessions:
        with job.stage("fold BatchNorm"):
            folded = job.start.fold(job.example())
        with job.stage("export to ONNX"):
            source = export_source(job, folded, Path(scratch, f"{job.name}.fp32.onnx"))
        made_with = _made_with(job, source.path, seen, precision, name)
        state = State.open(out, made_with, restart=restart)
        bench = Bench(
            *(job, source, onnx.load(source.path), precision, name, chosen, seen, state, sessions)
        )
        return Search(bench, budget, minutes).run()


# ── What can be wrong on paper ──────────────────────────────────────────────────────


def _check_options(profile: Profile, precision: str, *, validation: int, minutes: float) -> None:
    """Raise `ProfileError` unless the profile has the precision, and that layers to keep."""
    if validation < FEWEST:
        raise ProfileError(f"validation must be {FEWEST} samples or more, found {validation}")
    if not 0 <= minutes < math.inf:
        raise ProfileError(f"minutes must be 0 or more and finite, found {minutes:g}")
    profile.only((precision,))
    if "keep" not in options_of("precisions", precision):
        raise ProfileError(f"{precision} has no option 'keep', so that there is nothing to search")


def _check_budget(job: Job, budget: Budget) -> None:
    """Raise `InputRefused` for a drop in accuracy that would leave an output without a bound."""
    found = job.output_specs
    if budget.max_drop is not None and (len(found) > 1 or not found[0].has_classes):
        shapes = ", ".join(f"{one.name!r} N×{'×'.join(map(str, one.shape))}" for one in found)
        raise InputRefused(
            f"{job.name} gives {shapes}, and a drop in accuracy is of one output (N, classes) "
            "alone",
            hint="--min-sqnr in place of --max-drop bounds every output",
        )


def _runtime(profile: Profile, wanted: str | None) -> tuple[str, Runtime]:
    """Return the runtime asked for, or the first of the profile that can build and run here."""
    if wanted is not None and wanted not in profile.runtime:
        raise UnknownName("runtime in the profile", wanted, profile.runtime)
    reasons = []
    for name in profile.runtime if wanted is None else (wanted,):
        runtime = load_runtime(name, profile.runtime[name])
        reason = runtime.missing("build") or runtime.missing("run")
        if reason is None:
            return name, runtime
        reasons.append(f"{name}: {reason}")
    raise RuntimeMissing(
        f"candidates are measured, and nothing can run them here: {'; '.join(reasons)}",
        hint="name a profile or a --runtime of this machine; resnet-export doctor lists them",
    )


def _validation(job: Job, count: int) -> Samples:
    """Return training samples whose content is none of calibration's, in the calibration's order.

    Raises `InputRefused` if too few are left.
    """
    import numpy as np

    training = job.data.load("train")
    drawn = job.calibration.inputs if job.calibration else training.inputs[:0]
    taken = {_digest(sample) for sample in drawn}
    order = np.random.RandomState(job.profile.calibration.seed).permutation(len(training.inputs))
    free = [index for index in order if _digest(training.inputs[index]) not in taken][:count]
    if len(free) < FEWEST:
        raise InputRefused(
            f"{len(free)} of the {training.origin} are left to validate on, and fewer than "
            f"{FEWEST} show nothing",
            hint="lower calibration.images",
        )
    origin = f"{len(free)} of the {training.origin} that are not calibrated on"
    labels = None if training.labels is None else training.labels[free]
    return Samples(training.inputs[free], labels, origin)


def _made_with(
    job: Job, graph: Path, seen: Samples, precision: str, runtime: str
) -> dict[str, str]:
    """Return what a search's figures depend on, by what a message calls it."""
    profile = job.profile
    said = msgspec.json.encode(
        (
            {name: profile.precision[name].options for name in profile.precision},
            profile.runtime[runtime],
            profile.runtime.get("ort-cpu"),
            profile.batch,
            profile.timing.pytorch_threads,
        )
    )
    return {
        "weights": " ".join(filter(None, (job.loaded.sha256, job.loaded.key))),
        "input shape": " ".join("x".join(map(str, spec.shape)) for spec in job.input_specs),
        "graph": hashlib.sha256(graph.read_bytes()).hexdigest(),
        "profile": hashlib.sha256(said).hexdigest(),
        "calibration data": _digest(job.calibration.inputs) if job.calibration else "none",
        "draw of validation samples": _digest(seen.inputs),
        "precision": precision,
        "runtime": runtime,
        "version of this tool": TOOL,
        "machine or package": msgspec.json.encode(environment.capture(), order="sorted").decode(),
    }


def _digest(array: Array) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
