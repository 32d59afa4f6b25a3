"""The interfaces. Implement one in one file, and the rest of the program has it.

    Model       models/<name>.py       what is exported
    Precision   precisions/<name>.py   how its numbers are stored      ONNX → ONNX
    Runtime     runtimes/<name>.py     where it runs                   ONNX → Session
    Session                            a loaded model: feed → outputs

A runtime never asks which precision a graph is in: the graph's own types say so. And it executes
at that precision: faster-but-looser arithmetic is off unless an option of the runtime asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    TypeAlias,
    runtime_checkable,
)

from exporter.records import (
    Array,
    Asked,
    Execution,
    Feed,
    Kernel,
    OnnxModel,
    Outputs,
    Quantised,
    Repair,
    TensorSpec,
)

if TYPE_CHECKING:
    import onnx
    from torch import nn

Action: TypeAlias = Literal["build", "run"]


class Plugin(Asked, frozen=True, kw_only=True):
    """Base of every plug-in: its fields are the keys a profile may set."""


class Ends(Protocol):
    """The tensors that something takes and gives, and its samples.

    One of several inputs or outputs has those behind the first as ``more_inputs`` and
    ``more_outputs``: see `inputs_of` and `outputs_of`.
    """

    @property
    def input(self) -> TensorSpec:
        """Return the input that it was made for, the first of several."""

    @property
    def output(self) -> TensorSpec:
        """Return the output, the first of several."""

    @property
    def data(self) -> str:
        """Return the name of its samples."""


class Model(Ends, Protocol):
    """A network, the tensors it takes and gives, and where its weights and samples are.

    Fields that it is asked by, where it has them: ``channels`` of the input, and ``classes``.
    """

    @property
    def weights(self) -> Path | None:
        """Return the file of its weights, or None where none ship."""

    def module(self) -> nn.Module:
        """Return the network, freshly initialised, in eval mode."""


def inputs_of(model: Ends) -> tuple[TensorSpec, ...]:
    """Return every input of a network, in the order that its forward() takes them in."""
    return (model.input, *getattr(model, "more_inputs", ()))


def outputs_of(model: Ends) -> tuple[TensorSpec, ...]:
    """Return every output of a network, in the order that it gives them in."""
    return (model.output, *getattr(model, "more_outputs", ()))


def classification(outputs: Sequence[TensorSpec]) -> TensorSpec | None:
    """Return the one output that may be a classification, if there is just one."""
    found = [spec for spec in outputs if spec.has_classes]
    return found[0] if len(found) == 1 else None


class TensorStatistics(Protocol):
    """What calibration saw of one tensor.

    Every float tensor has its range. The rest raises `GraphError` for one that no
    convolution, product, sum or average reads. Channels lie along axis 1.
    """

    @property
    def samples(self) -> int:
        """Return how many samples the range is from."""

    @property
    def amax(self) -> float:
        """Return the largest magnitude seen."""

    @property
    def channel_amax(self) -> Array:
        """Return the largest magnitude in each channel, (C,)."""

    @property
    def channel_low(self) -> Array:
        """Return the smallest value in each channel, (C,)."""

    @property
    def channel_high(self) -> Array:
        """Return the largest value in each channel, (C,)."""

    @property
    def fold_low(self) -> Array:
        """Return the smallest of each fold of the samples, (folds, C); +inf in an empty one."""

    @property
    def fold_high(self) -> Array:
        """Return the largest of each fold, (folds, C); −inf in an empty one."""

    @property
    def channel_power(self) -> Array:
        """Return the mean square of each channel, (C,)."""

    @property
    def dead_channels(self) -> tuple[int, ...]:
        """Return the channels that were 0 in every sample."""

    def percentile(self, percent: float) -> float:
        """Return the smallest magnitude that ``percent`` % of all elements do not exceed."""

    def mse(self, levels: int = 127) -> float:
        """Return the threshold of the least squared error of so many levels above zero."""

    def entropy(self, levels: int = 127) -> float:
        """Return the threshold whose quantised magnitudes are distributed most like them."""


Statistics: TypeAlias = Mapping[str, TensorStatistics]


class Converted(NamedTuple):
    """A graph in its new precision, and what a reader must know of it, one sentence each.

    ``repairs`` are the steps that were to make it better, and what each brought; ``tensors`` what
    each quantised tensor came to; ``divisors`` what the channels of a tensor of the FP32 graph were
    divided by, (C,), by the tensor's name; ``offsets`` which tensors of this graph are one of the
    FP32 graph's less a constant: its name, and the constant, () or one per channel (C,), by their
    own.
    """

    model: onnx.ModelProto
    notes: tuple[str, ...] = ()
    repairs: tuple[Repair, ...] = ()
    tensors: tuple[Quantised, ...] = ()
    divisors: Mapping[str, Array] = MappingProxyType({})
    offsets: Mapping[str, tuple[str, Array]] = MappingProxyType({})


class Precision(Protocol):
    """A rewrite of the FP32 graph into one whose types say what they are."""

    needs_calibration: ClassVar[bool]

    def convert(
        self,
        model: onnx.ModelProto,
        statistics: Statistics,
        samples: Array,
        *,
        progress: Progress = ...,
    ) -> Converted:
        """Return the graph in this precision. The arguments are left as they were.

        ``samples`` are the calibration samples, (N, *shape) float32, those of several inputs as
        `exporter.packing` has them, and ``statistics`` what one pass of the FP32 graph over them
        saw; both are empty unless `needs_calibration`.

        Raises `GraphError` where the graph cannot be stored so without changing what it means.
        """


class Identity(NamedTuple):
    """Which library a runtime is, and the device that it runs on here, None without one."""

    version: str
    device: str | None


class Runtime(Protocol):
    """Something that can execute an ONNX graph."""

    def missing(self, action: Action) -> str | None:
        """Return what this machine lacks to build or to run, or None if it lacks nothing."""

    def identify(self) -> Identity | None:
        """Return the version and the device in words, or None where the package is not there."""

    def build(self, model: OnnxModel, folder: Path) -> Path:
        """Return the file `open` reads: a new one in ``folder``, or the ONNX file itself.

        It takes every batch of the model's range, and its inputs at every size of theirs. Raises
        `BuildError` where the runtime refuses the graph.
        """

    def open(self, path: Path) -> AbstractContextManager[Session]:
        """Load it, and let go of it afterwards. Raises `BuildError` where it cannot be loaded."""

    def describe(self, path: Path) -> tuple[str, ...]:
        """Return what a reader of its figures must know, say an option set for correctness."""

    def executed(self, model: OnnxModel, path: Path) -> Execution | None:
        """Return in which type each layer that asks for fewer bits really runs.

        ``path`` is what `build` made of ``model``. None where no layer asks; what cannot be known
        says why. Raises `BuildError` where what was built cannot be run.
        """


@runtime_checkable
class TellsKernels(Protocol):
    """A runtime that can say how long each of its kernels takes."""

    def kernels(
        self, path: Path, *, batch: int, runs: int, warmup: int
    ) -> tuple[int, tuple[Kernel, ...]]:
        """Return the threads it computes with, and its kernels in running order."""


class Session(Protocol):
    """Anything that computes: an engine, an ONNX file, or the PyTorch module itself."""

    @property
    def threads(self) -> int:
        """Return how many CPU threads it computes with."""

    def __call__(self, feed: Feed) -> Outputs:
        """Return the outputs for one batch."""

    def bind(self, feed: Feed) -> Callable[[], Any]:
        """Put the batch where the model reads it; calling the result runs once, and waits.

        What comes back is a `Bound` where a run's outputs can be had afterwards.
        """


@runtime_checkable
class Bound(Protocol):
    """A batch in place, that can tell what the last run of it computed."""

    def __call__(self) -> Any:
        """Run once, and wait."""

    def outputs(self) -> Outputs:
        """Return what the last run computed, as `Session` does."""


@runtime_checkable
class OnDevice(Protocol):
    """A session whose device has a clock of its own."""

    def on_device(self, feed: Feed) -> Mapping[str, Callable[[], float]]:
        """Put the batch in place; each result, by its name, runs once and returns milliseconds."""


class Progress(Protocol):
    """Told what is happening. ``total`` is None where a step has no parts to count."""

    def __call__(self, what: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Announce a step; call the result after each part of it."""


Advance: TypeAlias = Callable[[], object]


@contextmanager
def silent(what: str, total: int | None = None) -> Iterator[Advance]:  # noqa: ARG001 - a Progress
    """Tell nobody: the progress of a library call."""
    yield lambda: None


__all__ = [
    "Action",
    "Advance",
    "Bound",
    "Converted",
    "Ends",
    "Identity",
    "Model",
    "OnDevice",
    "Plugin",
    "Precision",
    "Progress",
    "Runtime",
    "Session",
    "Statistics",
    "TellsKernels",
    "TensorStatistics",
    "classification",
    "inputs_of",
    "outputs_of",
    "silent",
]
