"""An ONNX file, where a run starts: computed by the emulation of its operators, and folded.

The truth is what its operators mean, in float64. That this is what the file is, ONNX Runtime is the
witness, which runs it as it stands there: where the two differ by more than rounding explains, or
other batch sizes give something else, nothing is started.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from exporter.contracts import Runtime, Session
from exporter.emulation import Emulator, emulate
from exporter.errors import BuildError, GraphError, InputRefused
from exporter.factories import Shapes
from exporter.fidelity import distance, judge_outputs
from exporter.packing import in_words, packed_shape
from exporter.parity import collect_all
from exporter.plugins import load_runtime
from exporter.profile import Profile
from exporter.records import Array, BatchRange, Fate, Feed, OnnxModel, TensorSpec, TopK
from exporter.reference import GraphSession
from exporter.samples import feeds, fitting_all, noise
from exporter.start.reading import FEWEST, Given, read_file
from exporter.topk import with_top_k
from exporter.weights import AskedWeights, Loaded
from exporter.words import plain, quoted

if TYPE_CHECKING:
    import onnx

    from exporter.fold.same import Example

_LONGEST = 64  # characters of a name that files are called by
_SAME = 1e-9  # float64's rounding stays far below it


class FileEnds(NamedTuple):
    """What a file takes and gives, and the samples that it is judged on where there are no others.

    They fit the channels of its one input, as those of a factory's network do; several have none.
    """

    input: TensorSpec
    output: TensorSpec
    data: str
    more_inputs: tuple[TensorSpec, ...]
    more_outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """An ONNX file that was asked for, and can be read."""

    name: str
    file: str
    model: FileEnds
    given: Given
    runtime: Runtime

    @classmethod
    def choose(
        cls, path: Path, profile: Profile, input_shape: Shapes | None, classes: int | None
    ) -> OnnxFile:
        """Return it in the profile's opset. Raises `InputRefused` as `read_file`."""
        file = plain(path.name)
        if profile.model.args:
            raise InputRefused(
                f"{file} is not built with the profile's model.args", hint="leave them out"
            )
        given = read_file(path, opset=profile.opset, input_shape=input_shape)
        inputs, outputs = given.normal.inputs, given.normal.outputs
        if classes is not None and [spec.shape for spec in outputs] != [(classes,)]:
            gives = in_words(spec.shape for spec in outputs)
            raise InputRefused(f"{file} gives {gives} values, not {classes}")
        name = re.sub(r"[^\w.-]", "_", path.stem, flags=re.ASCII)[:_LONGEST].strip(".")
        runtime = load_runtime("ort-cpu", profile.runtime.get("ort-cpu", {}))
        ends = FileEnds(inputs[0], outputs[0], fitting_all(inputs), inputs[1:], outputs[1:])
        return cls(name or "model", file, ends, given, runtime)

    def start(
        self, weights: AskedWeights | None, inputs: tuple[TensorSpec, ...], profile: Profile
    ) -> FileStart:
        """Return it as the top of a run. Raises `InputRefused` if it is not what it seems."""
        if profile.preprocess.fuse or profile.postprocess.softmax:
            what = "preprocess.fuse" if profile.preprocess.fuse else "postprocess.softmax"
            raise InputRefused(
                f"{self.file} is taken as it is, and {what} is of networks in PyTorch so far",
                hint="leave it out",
            )
        if weights is not None:
            raise InputRefused(
                f"{self.file} has its own weights, and takes no others", hint="leave out --weights"
            )
        given = self.given
        loaded = Loaded(given.sha256, f"ONNX, opset {given.normal.opset}", given.changes)
        found = FileStart(self.file, inputs, (self.file, loaded), given.normal.model, self.runtime)
        try:
            _check_same(given, self.runtime)
        except BuildError as error:
            whole = str(error).partition("given.onnx: ")[2] or str(error)
            reason = whole.rpartition(" failed:")[2].rstrip(".")  # not where a copy of it is
            raise InputRefused(f"{self.file}: ONNX Runtime refuses it: {reason}") from error
        except GraphError as error:
            raise InputRefused(f"{self.file}: {error}", hint=error.hint) from error
        return found


def _check_same(given: Given, runtime: Runtime) -> None:
    """Raise `GraphError` unless the file, run as it is, gives what its emulation does."""
    import numpy as np

    normal = given.normal
    emulator, names = Emulator.of(normal.model), [spec.name for spec in normal.outputs]
    size = normal.batch or FEWEST
    inputs = noise(packed_shape(normal.inputs), count=FEWEST, seed=0)

    def emulated(kind: Any, at_once: int) -> dict[str, Array]:
        return emulate(emulator, feeds(inputs, normal.inputs, size=at_once), kind)

    exact, noisy, singly = (
        emulated(*how) for how in (("exact", FEWEST), ("noisy", FEWEST), ("exact", 1))
    )
    for name in names:
        if bad := int((~np.isfinite(exact[name])).sum()):
            raise GraphError(
                f"{bad} of {exact[name].size} values of its output {quoted(name)} are NaN or "
                "infinite on noise of unit variance, in float64"
            )
        same = singly[name].shape == exact[name].shape
        apart = distance(singly[name], exact[name]) if same else None
        if apart is None or apart > _SAME:
            raise GraphError(
                "its samples are not independent of one another: a batch of one gives something "
                f"else as {quoted(name)}"
            )
    with _opened(runtime, given.original) as session:
        got = collect_all(session, feeds(inputs, normal.inputs, size=size), names, samples=FEWEST)
    said = judge_outputs(exact, got, exact=exact, noisy=noisy, against="what its operators mean")
    if said.failures:
        raise GraphError(
            f"ONNX Runtime does not compute what its operators mean: {said.failures[0]}",
            hint="export it anew in the profile's opset, with a free batch axis",
        )


@contextmanager
def _opened(runtime: Runtime, data: bytes) -> Iterator[Session]:
    """Open a model that is in memory."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "given.onnx")
        path.write_bytes(data)
        with runtime.open(path) as session:
            yield session


@dataclass(frozen=True, slots=True)
class FileStart:
    """An ONNX file made normal, where a run starts."""

    file: str
    inputs: tuple[TensorSpec, ...]
    origin: tuple[str, Loaded]
    model: onnx.ModelProto
    runtime: Runtime

    @property
    def timed(self) -> str:
        return f"{self.file} in ONNX Runtime, fp32"

    @property
    def parameters(self) -> int:
        import onnx

        stored = self.model.graph.initializer
        floats = [t for t in stored if t.data_type == onnx.TensorProto.FLOAT]
        return sum(prod(tensor.dims) for tensor in floats)

    def double(self) -> Session:
        return GraphSession.of(self.model, double=True)

    @contextmanager
    def single(self, top: TopK | None = None) -> Iterator[Session]:
        model = self.model if top is None else with_top_k(self.model, top)
        with _opened(self.runtime, model.SerializeToString()) as session:
            yield session

    def fold(self, example: Example, *, double: bool = False) -> FoldedFile:
        import torch

        from exporter.fold import fold_traced
        from exporter.start.layers import layers_of
        from exporter.start.writing import write_back

        if all(node.op_type != "BatchNormalization" for node in self.model.graph.node):
            return FoldedFile(self.model, ())
        kind = torch.float64 if double else torch.float32
        layers = layers_of(self.model)
        folded = fold_traced(layers.module, tuple(one.double() for one in example), kind)
        return FoldedFile(write_back(folded.module, self.model), (*folded.fates, *layers.fates))


@dataclass(frozen=True, slots=True)
class FoldedFile:
    """An ONNX graph with its BatchNorms folded, and what became of each."""

    model: onnx.ModelProto
    fates: tuple[Fate, ...]
    writer: ClassVar[str] = "resnet-export"

    def session(self, *, double: bool = False) -> Session:
        return GraphSession.of(self.model, double=double)

    def write(
        self,
        path: Path,
        *,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        batch: BatchRange,
        opset: int,
    ) -> OnnxModel:
        import onnx

        try:
            onnx.checker.check_model(self.model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            reason = str(error).splitlines()[0]
            raise GraphError(f"the folded graph is not valid ONNX: {reason}") from error
        onnx.save(self.model, path)
        return OnnxModel(path, "fp32", inputs[0], outputs[0], batch, inputs[1:])

    def layer_outputs(self, feed: Feed) -> Mapping[str, Array]:
        """Return nothing: its layers are the graph's own nodes."""
        return {}
