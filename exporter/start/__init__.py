"""Where a run starts: at a network in PyTorch, or at an ONNX file of somebody's.

    network     computed by PyTorch, folded as a module, written by torch.onnx
    file        computed by the emulation of its operators, folded as a graph, written back

What the rest of the program needs of either is a `Start`; `choose` says which it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from exporter.contracts import Ends, Model, Session
from exporter.errors import InputRefused
from exporter.factories import Shapes
from exporter.network import Network
from exporter.profile import Profile
from exporter.records import Array, BatchRange, Fate, Feed, OnnxModel, TensorSpec, TopK
from exporter.weights import AskedWeights, Loaded

if TYPE_CHECKING:
    from exporter.fold.same import Example


class FoldedStart(Protocol):
    """What is left after folding, and what became of each BatchNorm."""

    writer: ClassVar[str]  # what writes it as ONNX

    @property
    def fates(self) -> tuple[Fate, ...]:
        """Return what became of each BatchNorm."""

    def session(self, *, double: bool = False) -> Session:
        """Return it as a session, in float64 or in float32."""

    def write(
        self,
        path: Path,
        *,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        batch: BatchRange,
        opset: int,
    ) -> OnnxModel:
        """Write it as the FP32 graph. Raises `GraphError`."""

    def layer_outputs(self, feed: Feed) -> Mapping[str, Array]:
        """Return what its layers give in float64, by their names in the graph it is written as."""


class Start(Protocol):
    """The top of the ladder, and what is made of it."""

    @property
    def file(self) -> str | None:
        """Return the name of the ONNX file, None for a network in PyTorch."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Return what it takes, with what the profile fuses in front of it."""

    @property
    def timed(self) -> str:
        """Return what `single` is called where latencies are compared."""

    @property
    def origin(self) -> tuple[str, Loaded]:
        """Return where the weights are from in words, and what was loaded."""

    @property
    def parameters(self) -> int:
        """Return how many numbers it has learned."""

    def double(self) -> Session:
        """Return it in float64: the truth."""

    def single(self, top: TopK | None = None) -> AbstractContextManager[Session]:
        """Open it in float32: the noise floor, and what latencies are compared with.

        With ``top`` it gives the largest scores, as the artefacts do.
        """

    def fold(self, example: Example, *, double: bool = False) -> FoldedStart:
        """Fold its BatchNorms, rounded to float32 or not. Raises `GraphError`."""


class Chosen(Protocol):
    """What was asked for, before any weights are looked at."""

    @property
    def name(self) -> str:
        """Return what it is called in the report and in the names of files."""

    @property
    def model(self) -> Ends:
        """Return the tensors that it takes and gives, and its samples."""

    def start(
        self, weights: AskedWeights | None, inputs: tuple[TensorSpec, ...], profile: Profile
    ) -> Start:
        """Return it with its weights, known to take such inputs. Raises `InputRefused`."""


def choose(
    model: str | Model | Path,
    profile: Profile,
    *,
    input_shape: Shapes | None,
    classes: int | None,
) -> Chosen:
    """Return the network of a name, of a factory, or any other `Model`, or the ONNX file at a path.

    ``input_shape`` says sizes by the names of inputs for a file alone: a factory has been told.
    Raises as `Network.choose` and `OnnxFile.choose`.
    """
    if isinstance(model, Path):
        from exporter.start.file import OnnxFile

        return OnnxFile.choose(model, profile, input_shape, classes)
    if isinstance(input_shape, Mapping):
        raise InputRefused(
            f"sizes by the names of inputs ({', '.join(input_shape)}) are said of an ONNX file",
            hint="a built-in network takes one input, and a factory's is told by load_factory",
        )
    return Network.choose(model, profile.model.args, input_shape, classes)
