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
from exporter.fidelity import distance, judge_outputs
from exporter.plugins import load_runtime
from exporter.profile import Profile
from exporter.records import Array, BatchRange, Fate, Feed, OnnxModel, TensorSpec, TopK
from exporter.reference import GraphSession
from exporter.samples import feeds, fitting, noise
from exporter.start.reading import Given, read_file
from exporter.topk import with_top_k
from exporter.weights import AskedWeights, Loaded
from exporter.words import plain

if TYPE_CHECKING:
    import onnx

    from exporter.fold.same import Example

_LONGEST = 64  # characters of a name that files are called by
_FEWEST = 3  # samples that a file is held against its emulation on
_SAME = 1e-9  # float64's rounding stays far below it


class FileEnds(NamedTuple):
    """What a file takes and gives, and the samples that it is judged on where there are no others.

    They fit the channels of its input, as those of a factory's network do.
    """

    input: TensorSpec
    output: TensorSpec
    data: str


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
        cls, path: Path, profile: Profile, input_shape: tuple[int, ...] | None, classes: int | None
    ) -> OnnxFile:
        """Return it in the profile's opset. Raises `InputRefused` as `read_file`."""
        file = plain(path.name)
        if profile.model.args:
            raise InputRefused(
                f"{file} is not built with the profile's model.args", hint="leave them out"
            )
        given = read_file(path, opset=profile.opset, input_shape=input_shape)
        if classes is not None and given.normal.output.shape != (classes,):
            raise InputRefused(f"{file} gives {given.normal.output.shape[0]} values, not {classes}")
        name = re.sub(r"[^\w.-]", "_", path.stem, flags=re.ASCII)[:_LONGEST].strip(".")
        runtime = load_runtime("ort-cpu", profile.runtime.get("ort-cpu", {}))
        ends = FileEnds(
            given.normal.input, given.normal.output, fitting(given.normal.input.shape[0])
        )
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
            reason = str(error).rpartition(" failed:")[2].rstrip(".")  # not where a copy of it is
            raise InputRefused(f"{self.file}: ONNX Runtime refuses it: {reason}") from error
        except GraphError as error:
            raise InputRefused(f"{self.file}: {error}", hint=error.hint) from error
        return found


def _check_same(given: Given, runtime: Runtime) -> None:
    """Raise `GraphError` unless the file, run as it is, gives what its emulation does."""
    import numpy as np

    normal = given.normal
    emulator, name = Emulator.of(normal.model), normal.output.name
    size = normal.batch or _FEWEST
    count = size * -(-_FEWEST // size)
    inputs = noise(normal.input.shape, count=count, seed=0)

    def emulated(kind: Any, at_once: int) -> Array:
        return emulate(emulator, feeds(inputs, normal.input.name, size=at_once), kind)[name]

    exact, noisy, singly = (
        emulated(*how) for how in (("exact", count), ("noisy", count), ("exact", 1))
    )
    with _opened(runtime, given.original) as session:
        runs = [session(feed)[name] for feed in feeds(inputs, normal.input.name, size=size)]
    got = np.concatenate(runs).reshape(count, -1).astype(np.float64)
    said = judge_outputs(
        {name: exact},
        {name: got},
        exact={name: exact},
        noisy={name: noisy},
        against="what its operators mean",
    )
    apart = distance(singly, exact)
    if apart is None or apart > _SAME:
        raise GraphError(
            "its samples are not independent of one another: a batch of one gives something else"
        )
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
        return OnnxModel(path, "fp32", inputs[0], outputs[0], batch)

    def layer_outputs(self, feed: Feed) -> Mapping[str, Array]:
        """Return nothing: its layers are the graph's own nodes."""
        return {}
