"""One run's request, resolved: everything that can be wrong on paper is found here.

Names, options, files and shapes are looked at before any work is done, so that a mistake costs
seconds and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from exporter import environment, samples
from exporter.contracts import Advance, Ends, Model, Precision, Progress, Runtime, Session
from exporter.data import DataSet, choose_calibration, open_data, shared_samples
from exporter.errors import InputRefused, OutOfMemory, RuntimeMissing
from exporter.initial import Initial
from exporter.network import code_of
from exporter.parity import collect_outputs
from exporter.plugins import load_precision, load_runtime, remedy
from exporter.profile import PrecisionChoice, Profile
from exporter.records import FEW_IMAGES, Array, Convergence, Feed, Part, Source, TensorSpec
from exporter.samples import Samples, Split
from exporter.stages import Stages
from exporter.start import Start, choose
from exporter.weights import Loaded

if TYPE_CHECKING:
    import torch


_UNTRAINED = (
    "nobody trained the weights ({}): a trained network may lose more, and accuracy says nothing"
)


@dataclass(slots=True)
class Job:
    """What was asked for, found possible; and what each stage of it took.

    ``calibrated`` is there once a graph was calibrated; ``overlap`` are the calibration samples
    that are among the held-out ones.
    """

    name: str
    model: Ends
    start: Start
    weights: str
    loaded: Loaded
    input: TensorSpec
    profile: Profile
    precisions: dict[str, Precision]
    runtimes: dict[str, Runtime]
    data: DataSet
    held_out: Samples
    noise: Array
    calibration: Samples | None
    stages: Stages
    overlap: tuple[int, ...] = ()
    calibrated: Convergence | None = None

    @classmethod
    def resolve(
        cls,
        model: str | Model | Path,
        profile: Profile,
        *,
        weights: Path | Initial | None,
        input_shape: tuple[int, ...] | None,
        calibration: Array | Path | str | None,
        progress: Progress,
        data: Path | str | None = None,
        classes: int | None = None,
        builds: bool = True,
        allow_overlap: bool = False,
    ) -> Job:
        """Return the job. Raises the `ExportError` of whatever is wrong with the request.

        ``model`` is a network's name or a `Model`, or the path of an ONNX file. ``data`` and
        ``calibration`` name what `exporter.data` takes, in place of the model's own. A
        job that ``builds`` nothing needs no runtime that could. Calibration samples that are among
        those it is judged on are refused unless ``allow_overlap``.
        """
        stages = Stages(progress)
        network = choose(model, profile, input_shape=input_shape, classes=classes)
        chosen = network.model
        runtimes = _runtimes(profile, builds=builds)
        precisions = {n: load_precision(n, c.options) for n, c in profile.precision.items()}
        spec = TensorSpec(chosen.input.name, input_shape or chosen.input.shape)
        _check_memory(spec, profile)
        start = network.start(weights, spec)
        origin, loaded = start.origin
        needed = any(precision.needs_calibration for precision in precisions.values())
        fits = (chosen.data, spec, chosen.output, profile)
        whole: Split | None = None if calibration is None else "held-out"
        dataset = open_data(data, *fits, whole=whole)
        judged_on = dataset.part("held-out")
        held_out = judged_on.samples
        calibrating = None
        shared: tuple[int, ...] = ()
        if needed or calibration is not None:
            part = choose_calibration(calibration, dataset, *fits)
            calibrating = part.samples
            shared = shared_samples(part, judged_on)
            if shared and not allow_overlap:
                raise _overlapping(calibrating, held_out, shared)
        stages.name_what_was("look at what was asked for")
        return cls(
            name=network.name,
            model=chosen,
            start=start,
            weights=origin,
            loaded=loaded,
            input=spec,
            profile=profile,
            precisions=precisions,
            runtimes=runtimes,
            data=dataset,
            held_out=held_out,
            noise=samples.noise(spec.shape, count=profile.parity.random, seed=profile.parity.seed),
            calibration=calibrating,
            stages=stages,
            overlap=shared,
        )

    def stage(
        self, what: str, total: int | None = None, *, part: Part = "conversion"
    ) -> AbstractContextManager[Advance]:
        """Report a stage's progress, and note its time and memory."""
        return self.stages.announced(what, total, part=part)

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

    def outputs(self, session: Session, inputs: Array, advance: Advance = lambda: None) -> Array:
        """Return what a session makes of the inputs, (samples, outputs) float64."""
        size = self.profile.batch.opt
        return collect_outputs(
            session,
            samples.feeds(inputs, self.input.name, size=size),
            self.model.output.name,
            samples=len(inputs),
            advance=advance,
        )

    def all_outputs(self, session: Session, what: str) -> tuple[Array, Array]:
        """Return what a session makes of the held-out samples and of the noise, as a stage."""
        size = self.profile.batch.opt
        inputs = (self.held_out.inputs, self.noise)
        total = sum(-(-len(part) // size) for part in inputs)
        with self.stage(what, total, part="evidence") as advance:
            held_out, noise = (self.outputs(session, part, advance) for part in inputs)
        return held_out, noise

    def gates(self, precision: str) -> PrecisionChoice:
        """Return what the profile asks of a precision, as far as the samples can say it."""
        found = self.profile.precision[precision]
        if self.held_out.labels is not None:
            return found
        unlabelled = msgspec.structs.replace(found.tolerance, accuracy_drop=None)
        return msgspec.structs.replace(found, tolerance=unlabelled)

    def feed(self, size: int) -> Feed:
        """Return one batch of held-out samples."""
        return next(samples.feeds(self.held_out.inputs, self.input.name, size=size))

    def timed_feeds(self, size: int) -> list[Feed]:
        """Return the batches of held-out samples that a timing takes in turn."""
        return samples.varied(self.held_out.inputs, self.input.name, size=size)

    def example(self) -> torch.Tensor:
        """Return two held-out samples as the network takes them."""
        import torch

        return torch.from_numpy(self.held_out.inputs[:2])

    def doubts(self) -> tuple[str, ...]:
        """Return the reasons not to trust what was found: of the weights, and of calibration."""
        untrained = not self.loaded.format and self.weights.startswith("random")
        doubts = [_UNTRAINED.format(self.weights)] if untrained else []
        doubts += self.data.record.doubts if self.data.record else ()
        if self.held_out.labels is None:
            doubts.append(
                f"accuracy is not checked, and no gate on it: the {self.held_out.origin} have no "
                "labels"
            )
        if self.calibration is None or self.calibrated is None:
            return tuple(doubts)
        if (count := len(self.calibration.inputs)) < FEW_IMAGES:
            doubts.append(
                f"the scales were calibrated on {count} samples, and below {FEW_IMAGES} they "
                "depend much on which ones"
            )
        if self.overlap:
            doubts.append(
                f"{len(self.overlap)} of the {count} calibration samples are among the "
                f"{self.held_out.origin} that the precisions are judged on, so that those look "
                "better than they are"
            )
        return tuple(doubts)

    @property
    def noise_name(self) -> str:
        return f"{len(self.noise)} noise samples"

    def source(self) -> Source:
        """Return the record of what is exported."""
        return Source(
            model=self.name,
            weights=self.weights,
            weights_sha256=self.loaded.sha256,
            parameters=self.start.parameters,
            input=self.input,
            output=self.model.output,
            opset=self.profile.opset,
            weights_format=self.loaded.format,
            weights_changes=self.loaded.changes,
            factory=code_of(self.model),
            file=self.start.file,
        )


def _runtimes(profile: Profile, *, builds: bool) -> dict[str, Runtime]:
    runtimes = {name: load_runtime(name, options) for name, options in profile.runtime.items()}
    for name, runtime in runtimes.items() if builds else ():
        if reason := runtime.missing("build"):
            raise RuntimeMissing(
                f"the runtime {name!r} cannot be used here: {reason}",
                hint=remedy(name, reason),
            )
    return runtimes


def _overlapping(calibration: Samples, held_out: Samples, shared: tuple[int, ...]) -> InputRefused:
    """Return why scales are not set on the samples that they are judged on."""
    return InputRefused(
        f"{len(shared)} of the {len(calibration.inputs)} calibration samples are among the "
        f"{held_out.origin} that the export is judged on, the first of them sample {shared[0]}",
        hint="leave them out, or allow it with --allow-overlap",
    )


def _check_memory(spec: TensorSpec, profile: Profile) -> None:
    """Raise `OutOfMemory` if the samples alone would not fit; libraries fail on it in odd ways."""
    memory = environment.memory_bytes()
    count = samples.MOST + profile.parity.random + samples.VARIED * max(profile.timing.batches)
    needed = count * prod(spec.shape) * 4
    if memory and needed > memory:
        shape = " × ".join(map(str, spec.shape))
        raise OutOfMemory(
            f"{count} samples of {shape} are {needed / 1e9:.0f} GB, more than this machine's "
            f"{memory / 1e9:.0f} GB of memory",
            hint="lower --input or parity.random",
        )
