"""One run's request, resolved: everything that can be wrong on paper is found here.

Names, options, files and shapes are looked at before any work is done, so that a mistake costs
seconds and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from exporter import environment, samples
from exporter.contracts import (
    Advance,
    Ends,
    Model,
    Precision,
    Progress,
    Runtime,
    Session,
    classification,
    inputs_of,
    outputs_of,
)
from exporter.data import (
    Data,
    DataSet,
    choose_calibration,
    is_built_in,
    open_data,
    shared_samples,
)
from exporter.errors import InputRefused, OutOfMemory, RuntimeMissing
from exporter.factories import Shapes
from exporter.network import NetworkStart, code_of, kind_of
from exporter.packing import in_words, packed_shape, unpack
from exporter.parity import collect_all
from exporter.plugins import load_precision, load_runtime, remedy
from exporter.profile import PrecisionChoice, Profile
from exporter.records import (
    FEW_IMAGES,
    Array,
    Convergence,
    Feed,
    Outputs,
    Part,
    Source,
    TensorSpec,
    TopK,
)
from exporter.samples import Samples, Split
from exporter.sizing import Size, checked_sizes, free_outputs, free_sides, size_of
from exporter.stages import Stages
from exporter.start import Start, choose
from exporter.topk import choose_top_k
from exporter.weights import AskedWeights, Loaded

if TYPE_CHECKING:
    import torch


_RUNGS = 4  # in PyTorch: float64, float32 and folded, and what one of them is compared in
_ELSEWHERE = 3 * (samples.FEW + samples.FEW_NOISE)  # samples at the other sizes of an input
_UNTRAINED = (
    "nobody trained the weights ({}): a trained network may lose more, and accuracy says nothing"
)


@dataclass(slots=True)
class Job:
    """What was asked for, found possible; and what each stage of it took.

    ``top`` is what artefacts give in place of scores, if the profile asks for it; ``calibrated`` is
    there once a graph was calibrated; ``overlap`` are the calibration samples that are among the
    held-out ones.
    """

    name: str
    model: Ends
    start: Start
    weights: str
    loaded: Loaded
    input_specs: tuple[TensorSpec, ...]
    profile: Profile
    precisions: dict[str, Precision]
    runtimes: dict[str, Runtime]
    output_specs: tuple[TensorSpec, ...]
    data: DataSet
    held_out: Samples
    noise: Array
    calibration: Samples | None
    stages: Stages
    top: TopK | None = None
    overlap: tuple[int, ...] = ()
    calibrated: Convergence | None = None

    @classmethod
    def resolve(
        cls,
        model: str | Model | Path,
        profile: Profile,
        *,
        weights: AskedWeights | None,
        input_shape: Shapes | None,
        calibration: Data | None,
        progress: Progress,
        data: Data | None = None,
        classes: int | None = None,
        builds: bool = True,
        allow_overlap: bool = False,
    ) -> Job:
        """Return the job. Raises the `ExportError` of whatever is wrong with the request.

        ``model`` is a network's name or a `Model`, or the path of an ONNX file. ``data`` and
        ``calibration`` are what `exporter.data` takes, in place of the model's own. A
        job that ``builds`` nothing needs no runtime that could. Calibration samples that are among
        those it is judged on are refused unless ``allow_overlap``.
        """
        stages = Stages(progress)
        if profile.size.is_free and isinstance(model, Path):
            raise InputRefused(
                f"{model.name} is taken in one size, and [size] is of networks in PyTorch so far",
                hint="leave it out, and say the size with --input where the file leaves it open",
            )
        network = choose(model, profile, input_shape=input_shape, classes=classes)
        chosen = network.model
        runtimes = _runtimes(profile, builds=builds)
        precisions = {n: load_precision(n, c.options) for n, c in profile.precision.items()}
        first, *more = inputs_of(chosen)
        if isinstance(input_shape, tuple):
            first = TensorSpec(first.name, input_shape)
        inputs = (first, *more)
        taken = free_sides(inputs, profile.size)
        _check_memory(taken, profile, own=data is None or is_built_in(data))
        start = network.start(weights, inputs, profile)
        inputs = start.inputs
        origin, loaded = start.origin
        needed = any(precision.needs_calibration for precision in precisions.values())
        specs = outputs_of(chosen)
        if profile.size.is_free and isinstance(start, NetworkStart):
            specs = free_outputs(start.module, inputs, specs, profile.size, name=network.name)
        top = choose_top_k(inputs, specs, profile.postprocess)
        labelled = classification(specs)
        fits = (chosen.data, inputs, labelled, profile)
        whole: Split | None = None if calibration is None else "held-out"
        dataset = open_data(data, *fits, whole=whole)
        judged_on = dataset.part("held-out")
        held_out = judged_on.samples
        if labelled is None:
            held_out = held_out._replace(labels=None)
        _check_outputs_memory(specs, len(held_out.inputs) + profile.parity.random, profile)
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
            input_specs=inputs,
            profile=profile,
            precisions=precisions,
            runtimes=runtimes,
            output_specs=specs,
            data=dataset,
            held_out=held_out,
            noise=_noise(inputs, profile),
            calibration=calibrating,
            stages=stages,
            top=top,
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

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.output_specs)

    @property
    def graph_outputs(self) -> tuple[TensorSpec, ...]:
        """Return what the artefacts give."""
        return self.output_specs if self.top is None else self.top.instead(self.output_specs)

    @property
    def labelled(self) -> TensorSpec | None:
        """Return the output that the labels are of, if it is plain which."""
        return classification(self.output_specs)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Return the sizes at which everything is checked beside the inputs' own."""
        free = self.profile.size.is_free
        return checked_sizes(self.profile.size, size_of(self.input_specs)) if free else ()

    def outputs(
        self,
        session: Session,
        inputs: Array,
        advance: Advance = lambda: None,
        *,
        specs: Sequence[TensorSpec] = (),
        of_artefact: bool = False,
        size: int | None = None,
    ) -> dict[str, Array]:
        """Return what a session makes of the inputs, (samples, values) float64 by output.

        ``specs`` are those that the samples have, where that is another size. The outputs are the
        network's, or those ``of_artefact``. ``size`` replaces the profile's batch.
        """
        size = size or self.profile.batch.opt
        return collect_all(
            session,
            samples.feeds(inputs, specs or self.input_specs, size=size),
            [spec.name for spec in (self.graph_outputs if of_artefact else self.output_specs)],
            samples=len(inputs),
            advance=advance,
        )

    def all_outputs(
        self, session: Session, what: str, *, of_artefact: bool = False, at_once: int | None = None
    ) -> tuple[Outputs, Outputs]:
        """Return what a session makes of the held-out samples and of the noise, as a stage.

        ``at_once`` is how many samples it would best be given, if the profile's batches allow it.
        """
        batch = self.profile.batch
        size = max(batch.min, min(at_once or batch.opt, batch.opt))
        inputs = (self.held_out.inputs, self.noise)
        total = sum(-(-len(part) // size) for part in inputs)
        with self.stage(what, total, part="evidence") as advance:
            held_out, noise = (
                self.outputs(session, part, advance, of_artefact=of_artefact, size=size)
                for part in inputs
            )
        return held_out, noise

    def gates(self, precision: str, output: TensorSpec) -> PrecisionChoice:
        """Return what the profile asks of an output, as far as that and the samples can say it."""
        found = self.profile.precision[precision]
        tolerance, random = found.tolerance, found.random_tolerance
        if self.held_out.labels is None or output != self.labelled:
            tolerance = msgspec.structs.replace(tolerance, accuracy_drop=None)
        if not output.has_classes:
            tolerance, random = (
                msgspec.structs.replace(gates, agreement=None) for gates in (tolerance, random)
            )
        return msgspec.structs.replace(found, tolerance=tolerance, random_tolerance=random)

    def feed(self, size: int) -> Feed:
        """Return one batch of held-out samples."""
        return next(samples.feeds(self.held_out.inputs, self.input_specs, size=size))

    def timed_feeds(self, size: int) -> list[Feed]:
        """Return the batches of held-out samples that a timing takes in turn."""
        return samples.varied(self.held_out.inputs, self.input_specs, size=size)

    def example(self) -> tuple[torch.Tensor, ...]:
        """Return two held-out samples as the network takes them."""
        import torch

        two = unpack(self.held_out.inputs[:2], self.input_specs)
        return tuple(torch.from_numpy(value) for value in two.values())

    def doubts(self) -> tuple[str, ...]:
        """Return the reasons not to trust what was found: of the weights, and of calibration."""
        untrained = not self.loaded.format and self.weights.startswith("random")
        doubts = [_UNTRAINED.format(self.weights)] if untrained else []
        doubts += self.data.record.doubts if self.data.record else ()
        if kind_of(self.model) and self.data.record is None:
            doubts.append(
                f"no data were given, and the {self.held_out.origin} that it is judged on may be "
                "nothing that the network was made for"
            )
        if self.labelled is None:
            doubts.append(
                "accuracy is not checked, and no gate on it: " + _why_unlabelled(self.output_specs)
            )
        elif self.held_out.labels is None:
            doubts.append(
                f"accuracy is not checked, and no gate on it: the {self.held_out.origin} have no "
                "labels"
            )
        if dense := [spec for spec in self.output_specs if not spec.has_classes]:
            names = " and ".join(repr(spec.name) for spec in dense)
            doubts.append(
                f"agreement is not checked, and no gate on it, for {names}: "
                "only an output (N, classes) has labels that could agree"
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
            input=self.input_specs[0],
            output=self.output_specs[0],
            opset=self.profile.opset,
            weights_format=self.loaded.format,
            weights_changes=self.loaded.changes,
            factory=code_of(self.model),
            more_outputs=self.output_specs[1:],
            more_inputs=self.input_specs[1:],
            given=kind_of(self.model),
            file=self.start.file,
            weights_key=self.loaded.key,
            top_k=self.top,
        )


def _why_unlabelled(outputs: Sequence[TensorSpec]) -> str:
    names = [repr(spec.name) for spec in outputs if spec.has_classes]
    if not names:
        return "no output is (N, classes)"
    return f"nothing says which of {' and '.join(names)} the labels are of"


def _runtimes(profile: Profile, *, builds: bool) -> dict[str, Runtime]:
    runtimes = {name: load_runtime(name, options) for name, options in profile.runtime.items()}
    for name, runtime in runtimes.items() if builds else ():
        if reason := runtime.missing("build"):
            raise RuntimeMissing(
                f"the runtime {name!r} cannot be used here: {reason}",
                hint=remedy(name, reason),
            )
    return runtimes


def _noise(inputs: tuple[TensorSpec, ...], profile: Profile) -> Array:
    asked = profile.parity
    kind = inputs[0].dtype  # several are all float32
    return samples.noise(packed_shape(inputs), count=asked.random, seed=asked.seed, dtype=kind)


def _overlapping(calibration: Samples, held_out: Samples, shared: tuple[int, ...]) -> InputRefused:
    """Return why scales are not set on the samples that they are judged on."""
    return InputRefused(
        f"{len(shared)} of the {len(calibration.inputs)} calibration samples are among the "
        f"{held_out.origin} that the export is judged on, the first of them sample {shared[0]}",
        hint="leave them out, or allow it with --allow-overlap",
    )


def _check_memory(inputs: Sequence[TensorSpec], profile: Profile, *, own: bool) -> None:
    """Raise `OutOfMemory` if the samples alone would not fit; libraries fail on it in odd ways.

    Where they are not the model's ``own``, they are read as they are needed.
    """
    memory = environment.memory_bytes()
    count = samples.MOST if own else profile.calibration.images
    count += profile.parity.random + samples.VARIED * max(profile.timing.batches)
    needed = count * prod(packed_shape(inputs)) * 4
    said, hint = in_words(spec.shape for spec in inputs), "lower --input or parity.random"
    if profile.size.is_free:
        largest = in_words(spec.largest for spec in inputs)
        needed += _ELSEWHERE * sum(prod(spec.largest) for spec in inputs) * 4
        said, hint = f"{said} and {_ELSEWHERE} of up to {largest}", f"{hint}, or size.max"
    if memory and needed > memory:
        raise OutOfMemory(
            f"{count} samples of {said} are {needed / 1e9:.0f} GB, more than this machine's "
            f"{memory / 1e9:.0f} GB of memory",
            hint=hint,
        )


def _check_outputs_memory(outputs: Sequence[TensorSpec], count: int, profile: Profile) -> None:
    """Raise `OutOfMemory` if what all artefacts give, which is kept to be compared, is too much."""
    memory = environment.memory_bytes()
    rungs = _RUNGS + len(profile.precision) * len(profile.runtime)
    needed = rungs * count * sum(prod(spec.shape) for spec in outputs) * 8
    if profile.size.is_free:
        needed += rungs * _ELSEWHERE * sum(prod(spec.largest) for spec in outputs) * 8
        count += _ELSEWHERE
    if memory and needed > memory:
        raise OutOfMemory(
            f"{rungs} times the outputs of {count} samples are {needed / 1e9:.0f} GB, more than "
            f"this machine's {memory / 1e9:.0f} GB of memory",
            hint="lower --input, or give fewer samples with --data",
        )
