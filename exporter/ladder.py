"""The ladder of artefacts, each compared with the one it came from and with the top.

    PyTorch float64 → PyTorch float32 → folded → ONNX FP32 → ONNX FP16, INT8 → engine

Where an ONNX file was started from, that stands in PyTorch's place. `Truth` is the top, on the
held-out samples and on noise. `Asked` is one graph that was asked for, emulated
(`exporter.emulation`). `Ladder` judges one artefact after another: quality, how far its outputs are
from the top's (`exporter.parity`), and fidelity, whether it computes the graph that was asked for
(`exporter.fidelity`), end to end and layer by layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch

from exporter.contracts import Advance, Converted, Runtime, Session
from exporter.difference import describe_difference
from exporter.emulation import Arithmetic, Emulator, emulate
from exporter.emulation.rounding import LAYERS
from exporter.errors import GraphError
from exporter.fidelity import (
    LIMIT,
    compare_layers,
    distance,
    expose,
    farthest,
    judge_outputs,
    layer_name,
    unreadable,
)
from exporter.job import Job
from exporter.parity import Firsts, compare_outputs
from exporter.records import (
    Array,
    Artefact,
    Feed,
    Fidelity,
    LayerError,
    Outputs,
    Parity,
    Rung,
    TensorSpec,
    Tolerance,
)
from exporter.samples import FEW, FEW_NOISE, feeds
from exporter.start import FoldedStart
from exporter.steps import across
from exporter.topk import see

if TYPE_CHECKING:
    import onnx

FOLDED = "folded"
_LAYERED = 8  # samples whose every tensor is compared
_EXPORTED = 1e-4  # of a layer's output, which float32 weights move by 1e-7 a layer before it
_AT_ONCE = 4  # samples emulated together: fewer are slow, more take memory
_DOUBLES = 1 << 17  # values of samples run in float64 together: of a batch all windows are laid out


@dataclass(frozen=True, slots=True)
class Truth:
    """The unfolded reference's outputs in float64, and how far its float32 is from them.

    Arrays are (samples, values) float64, by output; ``parities`` are of every output, on the
    held-out samples and then on noise.
    """

    held_out: Outputs
    noise: Outputs
    parities: tuple[Parity, ...]
    single: Outputs
    folded: tuple[Outputs, Outputs]
    folding: FoldedStart

    @classmethod
    def compute(cls, job: Job, folding: FoldedStart) -> Truth:
        """Run the reference in float64 and float32, and what was folded in float32."""
        name = job.source().reference
        held_out, noise = job.all_outputs(
            job.start.double(),
            f"run {name} in float64",
            at_once=max(1, _DOUBLES // job.held_out.inputs[0].size),
        )
        with job.start.single() as single:
            got = job.all_outputs(single, f"run {name} in float32")
        short = job.all_outputs(folding.session(), "run the folded network")
        with job.stages.quietly(f"judge {name} in float32", part="evidence"):
            parities = tuple(
                _compared(job, output, want, have, on_noise=on_noise)
                for on_noise, want, have in ((False, held_out, got[0]), (True, noise, got[1]))
                for output in job.output_specs
            )
        return cls(held_out, noise, parities, got[0], short, folding)

    def few(self, held_out: Outputs, noise: Outputs) -> Outputs:
        """Return the outputs on the samples that fidelity is judged on."""
        return {name: join(held_out[name], noise[name]) for name in held_out}


def _compared(
    job: Job,
    output: TensorSpec,
    want: Outputs,
    got: Outputs,
    *,
    on_noise: bool,
    tolerance: Tolerance = Tolerance(),  # noqa: B008 - frozen
    floor: float | None = None,
) -> Parity:
    """Return the parity of one output, with figures of classes where it may have some."""
    reference, firsts = want[output.name], None
    if job.top is not None and output == job.top.scores:
        reference, candidate, *each = see(job.top, reference, got)
        firsts = Firsts(*each)
    else:
        candidate = got[output.name]
    return compare_outputs(
        reference,
        candidate,
        inputs=job.noise_name if on_noise else job.held_out.origin,
        tolerance=tolerance,
        labels=None if on_noise or output != job.labelled else job.held_out.labels,
        noise_floor=floor,
        output=output.name if len(job.output_specs) > 1 else None,
        has_classes=output.has_classes,
        firsts=firsts,
    )


class Few(NamedTuple):
    """The samples that fidelity is judged on, side by side, held-out ones first; and of what."""

    inputs: Array
    specs: tuple[TensorSpec, ...]
    where: str = ""

    @classmethod
    def of(cls, job: Job) -> Few:
        """Return those in the inputs' own size."""
        return cls(join(job.held_out.inputs, job.noise), job.input_specs)


def join(held_out: Array, noise: Array) -> Array:
    """Return the held-out samples and the noise that fidelity is judged on: the first of each."""
    import numpy as np

    return np.concatenate([held_out[:FEW], noise[:FEW_NOISE]])


@dataclass(frozen=True, slots=True)
class Asked:
    """A graph that was asked for, and what it gives on a few samples, emulated.

    ``reference`` is None where the graph is FP32 throughout: then it must give what the top of the
    ladder gives. ``emulator`` is None where a node has no emulation, and ``unseen`` names it.
    """

    model: onnx.ModelProto
    emulator: Emulator | None
    exact: Outputs | None = None
    noisy: Outputs | None = None
    reference: Outputs | None = None
    against: str = ""
    unseen: str | None = None

    @classmethod
    def of(cls, job: Job, model: onnx.ModelProto, precision: str) -> Asked:
        """Emulate a graph, as a stage."""
        try:
            asked = cls(model, Emulator.of(model), against=job.source().top)
        except GraphError as error:
            return cls(model, None, against=job.source().top, unseen=str(error))
        return asked.on(job, precision, Few.of(job))

    def on(self, job: Job, precision: str, few: Few) -> Asked:
        """Emulate the same graph on other samples, as a stage."""
        if self.emulator is None:
            return self
        emulator, against = self.emulator, job.source().top
        runs: tuple[Arithmetic, ...] = ("exact", "noisy")
        if emulator.rounds_to_half:
            runs += ("rounded",)
        what = f"{precision}: emulate the graph asked for{few.where}"
        count = -(-len(few.inputs) // _AT_ONCE) * len(runs)
        try:
            with job.stage(what, count, part="evidence") as advance:
                got = {kind: _emulated(job, emulator, few, kind, advance) for kind in runs}
        except GraphError as error:
            return Asked(self.model, None, against=against, unseen=str(error))
        reference = None
        if emulator.rounds_to_half:
            reference, against = got["rounded"], f"the {precision} graph with rounding emulated"
        elif emulator.quantises:
            reference, against = got["exact"], f"the {precision} graph in float64"
        return Asked(self.model, emulator, got["exact"], got["noisy"], reference, against)


def _emulated(
    job: Job, emulator: Emulator, few: Few, kind: Arithmetic, advance: Advance
) -> Outputs:
    batches = feeds(few.inputs, few.specs, size=_AT_ONCE)
    found = emulate(emulator, batches, kind, watch=job.output_names, advance=advance)
    count = len(few.inputs)  # the last batch is filled up
    return {name: rows[:count] for name, rows in found.items()}


@dataclass(frozen=True, slots=True)
class Ladder:
    """Judges artefacts. ``outputs`` has every rung's on the held-out samples, from the top down."""

    job: Job
    truth: Truth
    source: Asked
    outputs: dict[str, Outputs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        source = self.job.source()
        self.outputs[source.top] = self.truth.held_out
        self.outputs[source.single] = self.truth.single
        self.outputs[FOLDED] = self.truth.folded[0]

    def ask(self, model: onnx.ModelProto, precision: str) -> Asked:
        """Return the graph asked for in a precision, emulated unless it is the source itself."""
        return self.source if model == self.source.model else Asked.of(self.job, model, precision)

    def losses(self, asked: Asked, made: Converted) -> tuple[LayerError, ...]:
        """Return what each weighted layer loses by itself in the graph asked for, beside FP32.

        ``made`` is that graph, and knows which tensors it computes divided, or less a constant.
        """
        if asked is self.source or asked.emulator is None or self.source.emulator is None:
            return ()
        feed = self.job.feed(_LAYERED)
        inputs = {name: torch.from_numpy(value) for name, value in feed.items()}
        every = [name for step in self.source.emulator.steps for name in step.writes]
        with torch.inference_mode():
            values = self.source.emulator.run(inputs, watch=every)
        found = {**feed, **{name: value.numpy() for name, value in values.items()}}
        for name, divisor in made.divisors.items():
            found[name] = found[name] / across(divisor, found[name].ndim)
        for name, (old, constant) in made.offsets.items():
            found[name] = found[old] - across(constant, found[old].ndim)
        for step in asked.emulator.steps:  # what a cast at the edge reads has a name of its own
            if step.op == "Cast" and step.writes[0] in found:
                found.setdefault(step.reads[0], found[step.writes[0]])
        errors = compare_layers(asked.emulator, found, quantising=True)
        return tuple(error for error in errors if error.op in LAYERS)

    def first_rungs(self) -> tuple[Rung, Rung]:
        """Return the two rungs below the top: the reference in float32, and folded."""
        few, source = self.truth.few(*self.truth.folded), self.job.source()
        return (
            self._rung(source.single, source.top, None),
            self._rung(FOLDED, source.single, self._fidelity(self.source, few, (), None)),
        )

    def judge(
        self, artefact: Artefact, runtime: Runtime, path: Path, session: Session, asked: Asked
    ) -> Artefact:
        """Return the artefact with its parity and its rung.

        Raises `GraphError` or `BuildError` where it cannot be compared at all.
        """
        what = f"{artefact.name}: compare with {self.job.source().reference}"
        held_out, noise = self.job.all_outputs(session, what, of_artefact=True)
        batch = self.job.profile.batch
        feed = self.job.feed(min(max(_LAYERED, batch.min), batch.max))
        layers, unseen = self.layers(artefact, runtime, path, asked, feed)
        with self.job.stages.quietly(f"{artefact.name}: judge", part="evidence"):
            parity = self._parity(artefact, held_out, noise)
            few = self.truth.few(held_out, noise)
            fidelity = self._fidelity(asked, few, layers, unseen)
            if fidelity.failures:
                cause = self._cause(fidelity, path, asked)
                fidelity = msgspec.structs.replace(fidelity, cause=cause)
        above = self._above(artefact, is_engine=path.suffix != ".onnx")
        self.outputs[artefact.name] = held_out
        return msgspec.structs.replace(
            artefact,
            parity=parity,
            rung=self._rung(artefact.name, above, fidelity),
        )

    def _parity(self, artefact: Artefact, held_out: Outputs, noise: Outputs) -> tuple[Parity, ...]:
        floors = iter(self.truth.parities)
        found = []
        for on_noise, want, got in (
            (False, self.truth.held_out, held_out),
            (True, self.truth.noise, noise),
        ):
            for output in self.job.output_specs:
                gates = self.job.gates(artefact.precision, output)
                tolerance = gates.random_tolerance if on_noise else gates.tolerance
                floor = next(floors).rel_l2
                found.append(
                    _compared(
                        *(self.job, output, want, got),
                        on_noise=on_noise,
                        tolerance=tolerance,
                        floor=floor,
                    )
                )
        return tuple(found)

    def _fidelity(
        self, asked: Asked, candidate: Outputs, layers: tuple[LayerError, ...], unseen: str | None
    ) -> Fidelity:
        top = self.truth.few(self.truth.held_out, self.truth.noise)
        return judge_outputs(
            top if asked.reference is None else asked.reference,
            candidate,
            exact=asked.exact,
            noisy=asked.noisy,
            against=asked.against,
            layers=layers,
            unseen=asked.unseen or unseen,
            top=self.job.top,
        )

    def layers(
        self, artefact: Artefact, runtime: Runtime, path: Path, asked: Asked, feed: Feed
    ) -> tuple[tuple[LayerError, ...], str | None]:
        """Return each layer's own error on a batch, or why there are none."""
        import onnx

        if asked.emulator is None:
            return (), asked.unseen
        if path.suffix != ".onnx":
            return (), "an engine gives its outputs alone"
        if reason := unreadable(onnx.load(path)):
            return (), reason
        with TemporaryDirectory() as folder:
            exposed = Path(folder, path.name)
            onnx.save(expose(onnx.load(path)), exposed)
            with (
                self.job.stage(f"{artefact.name}: compare every layer", part="evidence"),
                runtime.open(exposed) as session,
            ):
                found = {**feed, **session(feed)}
                return tuple(compare_layers(asked.emulator, found)), None

    def _cause(self, fidelity: Fidelity, path: Path, asked: Asked) -> str | None:
        """Return what is known of a failure's cause, in words."""
        import onnx

        if path.suffix != ".onnx":
            return None
        if fidelity.first is not None:
            return describe_difference(asked.model, onnx.load(path), fidelity.first.tensor)
        if not fidelity.layers:
            return None
        if asked is self.source and self._is_off(asked):
            return self.export_cause(asked, self.job.feed(2))
        return (
            "with every tensor read out each layer is right, so it is what the runtime makes of "
            "the graph as a whole"
        )

    def _is_off(self, asked: Asked) -> bool:
        """Return whether the FP32 graph itself, in exact arithmetic, is not the network."""
        assert asked.exact is not None  # it has an emulator
        assert asked.noisy is not None
        top = self.truth.few(self.truth.held_out, self.truth.noise)
        for name, want in top.items():
            exact, noisy = asked.exact[name], asked.noisy[name]
            off, floor = distance(exact, want), distance(noisy, exact)
            if off is None or floor is None or off > LIMIT * floor:
                return True
        return False

    def export_cause(self, asked: Asked, feed: Feed) -> str:
        """Name the first layer that was written as something else, or the fold."""
        assert asked.emulator is not None
        folding = self.truth.folding
        layers = folding.layer_outputs(feed)
        written = {
            step.writes[0]: layer_name(asked.emulator, step)
            for step in asked.emulator.steps
            if step.op in LAYERS
        }
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(value).double() for name, value in feed.items()}
            values = asked.emulator.run(inputs, watch=list(written))
        for tensor, layer in written.items():
            want = layers.get(layer)
            if want is None:
                continue
            found = values[tensor].numpy()
            off = distance(found, want) if found.shape == want.shape else math.inf
            if off is not None and off > _EXPORTED:
                said = f"{folding.writer} wrote {layer!r} as something else than the folded network"
                return f"{said} has"
        return (
            f"the folded network, or how {folding.writer} wrote what is no layer, is not the "
            "network"
        )

    def _above(self, artefact: Artefact, *, is_engine: bool) -> str:
        """Return the rung an artefact came from: its graph in ONNX, the FP32 one, or the folded."""
        same = [name for name in self.outputs if name.startswith(f"{artefact.precision} on ")]
        first = [name for name in self.outputs if name.startswith("fp32 on ")]
        if is_engine and same:
            return same[0]
        return first[0] if first and artefact.precision != "fp32" else FOLDED

    def _rung(self, name: str, above: str, fidelity: Fidelity | None) -> Rung:
        top = self.truth.held_out
        got, over = self.outputs[name], self.outputs[above]
        return Rung(
            name=name,
            above=above,
            samples=len(next(iter(got.values()))),
            error_above=self._farthest(got, over),
            error_top=self._farthest(got, top),
            flips_above=self._flips(got, over),
            flips_top=self._flips(got, top),
            fidelity=fidelity,
        )

    def _flips(self, one: Outputs, other: Outputs) -> int | None:
        """Return how many samples have another largest output, of those that may be of classes.

        None if there are none, or a value is not finite.
        """
        import numpy as np

        flipped: Array | None = None
        for output in self.job.output_specs:
            (mine, first), (theirs, other_first) = (
                self._placed(output, side) for side in (one, other)
            )
            if not (np.isfinite(mine).all() and np.isfinite(theirs).all()):
                return None
            if output.has_classes:
                differ = first != other_first
                flipped = differ if flipped is None else flipped | differ
        return None if flipped is None else int(flipped.sum())

    def _farthest(self, one: Outputs, other: Outputs) -> float | None:
        """Return the relative distance of the output that is farthest, None if one is not finite.

        Of a top-k each side is what its places have by the scores of the top.
        """
        return farthest(
            distance(*(self._placed(output, side)[0] for side in (one, other)))
            for output in self.job.output_specs
        )

    def _placed(self, output: TensorSpec, found: Outputs) -> tuple[Array, Array]:
        """Return an output on the held-out samples, and its largest value's place or label."""
        top = self.job.top
        if top is None or output != top.scores:
            values = found[output.name]
            return values, values.argmax(axis=1)
        seen = see(top, self.truth.held_out[output.name], found)
        return seen.got, seen.first_got
