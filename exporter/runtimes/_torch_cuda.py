"""PyTorch on an NVIDIA GPU: an exported graph in PyTorch's operators, each tensor in its own type.

As on the CPU (`_torch`) the file is what runs, as a module without a loop; but what the graph
declares in half precision is computed in half precision here, since a GPU has fast kernels for it.
FP32 is FP32: TF32, which PyTorch allows to convolutions by default, is off while a session is open.
cuDNN tries its kernels for each shape and takes the fastest, before any clock starts. There are no
integer convolutions, so a quantised graph is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.contracts import Action, Identity, Plugin, Session
from exporter.errors import BuildError, GraphError
from exporter.records import Execution, Feed, OnnxModel, Outputs
from exporter.runtimes import _device
from exporter.runtimes._asked import asked_layers
from exporter.runtimes._cuda import device_name, missing_gpu
from exporter.runtimes._graph import has_float8, is_quantised, read_graph
from exporter.runtimes._torch import Run, as_module, run_graph

if TYPE_CHECKING:
    import torch
    from torch import fx

_WARM = 3  # runs before one is captured, as PyTorch's own documentation has it


class PyTorchCuda(Plugin, frozen=True):
    """PyTorch on the first NVIDIA GPU; ``channels_last`` in memory, as its half kernels like it."""

    channels_last: bool = False

    place: ClassVar[str] = "cuda"

    def missing(self, action: Action) -> str | None:
        """Return what is missing: to run, a GPU and a PyTorch that was made for it."""
        if action == "run" and (reason := missing_gpu()):
            return reason
        try:
            import torch
        except ImportError as error:
            return str(error)
        if action == "build" or torch.cuda.is_available():
            return None
        return f"PyTorch {torch.__version__} cannot use the NVIDIA GPU here"

    def identify(self) -> Identity | None:
        try:
            import torch
        except ImportError:
            return None
        return Identity(torch.__version__, None if self.missing("run") else device_name())

    def build(self, model: OnnxModel, folder: Path) -> Path:
        graph = read_graph(model.path)
        if is_quantised(graph) or has_float8(graph):
            raise BuildError(f"PyTorch has no integer convolution on CUDA for {model.path.name}")
        return model.path

    def describe(self, path: Path) -> tuple[str, ...]:
        """Say what of the graph PyTorch runs."""
        laid = ", channels last" if self.channels_last else ""
        return (f"the exported graph in PyTorch's operators, TF32 off{laid}",)

    def executed(self, model: OnnxModel, path: Path) -> Execution | None:
        """Return that each layer runs in the type of its weights, as PyTorch converts nothing."""
        if not (asked := asked_layers(read_graph(path))):
            return None
        return Execution("runtime", tuple(layer.as_run(layer.asked) for layer in asked))

    @contextmanager
    def open(self, path: Path) -> Iterator[Session]:
        import torch

        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield self._session(self._graph(path))
            finally:
                torch.set_float32_matmul_precision(before)

    def _session(self, graph: DeviceGraph) -> Session:
        return EagerSession(graph)

    def _graph(self, path: Path) -> DeviceGraph:
        import onnx
        import torch

        graph = read_graph(path)
        try:
            module = as_module(onnx.load(path), as_declared=True)
        except GraphError as error:
            raise BuildError(f"PyTorch cannot run {path.name}: {error}") from error
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        moved: Any = module.to(self.place)
        others = {2: torch.uint8, 10: torch.float16, 16: torch.bfloat16}
        return DeviceGraph(
            module=moved.to(memory_format=layout),
            inputs={
                value.name: others.get(value.type.tensor_type.elem_type, torch.float32)
                for value in graph.input
            },
            outputs=tuple(value.name for value in graph.output),
            layout=layout,
            place=self.place,
        )


@dataclass(frozen=True, slots=True)
class DeviceGraph:
    """An exported graph as a module on the device, and the types of its inputs."""

    module: fx.GraphModule
    inputs: Mapping[str, torch.dtype]
    outputs: tuple[str, ...]
    layout: torch.memory_format
    place: str

    def tensors(self, feed: Feed) -> list[torch.Tensor]:
        """Return the inputs on the device, in the graph's order, types and layout."""
        return [self._moved(feed[name], dtype) for name, dtype in self.inputs.items()]

    def _moved(self, value: Any, dtype: torch.dtype) -> torch.Tensor:
        import torch

        moved = torch.from_numpy(value).to(self.place).to(dtype)
        return moved.contiguous(memory_format=self.layout) if moved.ndim == 4 else moved

    def read(self, found: Sequence[torch.Tensor]) -> Outputs:
        return {n: value.cpu().numpy() for n, value in zip(self.outputs, found, strict=True)}


@dataclass(slots=True)
class Work:
    """A batch in place, and what the last run of it gave; calling it only puts it in the stream."""

    run: Run
    tensors: list[torch.Tensor]
    graph: DeviceGraph
    found: tuple[Any, ...] = ()

    def __call__(self) -> None:
        self.found = run_graph(self.run, self.tensors)

    def outputs(self) -> Outputs:
        return self.graph.read(self.found)


@dataclass(frozen=True, slots=True)
class _Bound:
    """A batch in place; calling it runs once, and waits for the device."""

    work: Work

    def __call__(self) -> None:
        import torch

        self.work()
        torch.cuda.synchronize()

    def outputs(self) -> Outputs:
        return self.work.outputs()


@dataclass(frozen=True, slots=True)
class TorchTimer:
    """Two events of PyTorch's current stream."""

    start: Any
    stop: Any

    @classmethod
    def of_cuda(cls) -> TorchTimer:
        import torch

        cuda: Any = torch.cuda
        return cls(*(cuda.Event(enable_timing=True) for _ in range(2)))

    def ms(self, work: Callable[[], object]) -> float:
        """Return how long the work takes on the device, in ms."""
        self.start.record()
        work()
        self.stop.record()
        self.stop.synchronize()
        return float(self.start.elapsed_time(self.stop))


class _Replay:
    """A run, captured as a CUDA graph."""

    def __init__(self, run: Run, tensors: Sequence[torch.Tensor]) -> None:
        import torch

        cuda: Any = torch.cuda
        self.given = [tensor.clone() for tensor in tensors]
        aside = cuda.Stream()
        aside.wait_stream(cuda.current_stream())
        with torch.no_grad(), cuda.stream(aside):
            for _ in range(_WARM):
                run(*self.given)
        cuda.current_stream().wait_stream(aside)
        self.graph = cuda.CUDAGraph()
        with torch.no_grad(), cuda.graph(self.graph):
            self.found = run(*self.given)

    def __call__(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Replay it on what is in place, which must be the tensors that `put` put there."""
        self.graph.replay()
        return tuple(self.found)

    def put(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        for place, tensor in zip(self.given, tensors, strict=True):
            place.copy_(tensor)
        return self.given


@dataclass(slots=True)
class CudaSession:
    """What eager and compiled PyTorch share: copies, the wait, and the device's clock."""

    graph: DeviceGraph
    threads: int = 1  # of the CPU: the one that launches

    def __call__(self, feed: Feed) -> Outputs:
        work = self.work(self.graph.tensors(feed))
        work()
        return work.outputs()

    def bind(self, feed: Feed) -> _Bound:
        return _Bound(self.work(self.graph.tensors(feed)))

    def work(self, tensors: list[torch.Tensor]) -> Work:
        """Return what runs on these tensors, compiled or tuned for their shapes by then."""
        raise NotImplementedError

    def with_copies(self, feed: Feed) -> _device.Step:
        """Return a run that copies its inputs to the device and its outputs back."""
        found: dict[str, Any] = {}

        def work() -> None:
            found.update(self(feed))

        return _device.Step(TorchTimer.of_cuda(), work, lambda: found)


@dataclass(slots=True)
class EagerSession(CudaSession):
    """One operator after another."""

    seen: set[Any] = field(default_factory=set)
    captured: dict[Any, _Replay] = field(default_factory=dict)

    def work(self, tensors: list[torch.Tensor]) -> Work:
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        work = Work(self.graph.module, tensors, self.graph)
        if shapes not in self.seen:
            work()  # cuDNN tries its kernels in the first run of a shape
            self.seen.add(shapes)
        return work

    def on_device(self, feed: Feed) -> dict[str, Callable[[], float]]:
        """Return a run by CUDA events, one with copies in and out, and one as a CUDA graph."""
        timer, tensors = TorchTimer.of_cuda(), self.graph.tensors(feed)
        plain = self.work(tensors)
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes not in self.captured:
            self.captured[shapes] = _Replay(self.graph.module, tensors)
        replay = self.captured[shapes]
        replayed = Work(replay, replay.put(tensors), self.graph)
        return {
            _device.EVENTS: _device.Step(timer, plain, plain.outputs),
            _device.COPIES: self.with_copies(feed),
            _device.GRAPH: _device.Step(timer, replayed, replayed.outputs),
        }
