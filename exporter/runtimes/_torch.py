"""PyTorch as a runtime: an exported graph in PyTorch's own operators, on the CPU, in float32.

The file is what runs, as in every other runtime, so that it can be timed, compared and taken from a
bundle like theirs. Each node becomes one call of PyTorch, as `exporter.emulation` writes it down,
in a module without a loop (torch.fx). That is the network with its BatchNorms folded, and costs
what the folded `nn.Module` costs (measured: 28.4 ms against 27.9, and 28.9 unfolded), whose own
latency is beside it in every report, as "PyTorch eager". What is left out is everything below 32
bits: quantisers round, halves do not, and all of it is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.contracts import Action, Identity, Plugin, Session
from exporter.errors import BuildError, GraphError
from exporter.records import THREADS, Execution, Feed, OnnxModel, Outputs, Ranges
from exporter.runtimes._asked import asked_layers
from exporter.runtimes._graph import read_graph

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import fx

Run = Callable[..., tuple[Any, ...]]


class PyTorch(Plugin, frozen=True):
    """PyTorch on the CPU: ``threads`` as a whole, 0 for as many as it has; ``channels_last``."""

    threads: int = 0
    channels_last: bool = False

    RANGES: ClassVar[Ranges] = {"threads": THREADS}

    def missing(self, action: Action) -> str | None:
        try:
            import torch  # noqa: F401 - whether it can be imported is the question
        except ImportError as error:
            return str(error)
        return None

    def identify(self) -> Identity | None:
        try:
            import torch
        except ImportError:
            return None
        return Identity(torch.__version__, "CPU")

    def build(self, model: OnnxModel, folder: Path) -> Path:
        return model.path

    def describe(self, path: Path) -> tuple[str, ...]:
        """Say what of the graph PyTorch runs."""
        laid = ", channels last" if self.channels_last else ""
        return (f"the exported graph in PyTorch's operators, all of it in FP32{laid}",)

    def executed(self, model: OnnxModel, path: Path) -> Execution | None:
        """Return that every layer runs in FP32, which is what the module is made of."""
        asked = asked_layers(read_graph(path))
        if not asked:
            return None
        reason = "PyTorch is given the graph in FP32: these values, and no kernel of this type"
        return Execution("runtime", tuple(layer.as_run("fp32", reason) for layer in asked))

    @contextmanager
    def open(self, path: Path) -> Iterator[Session]:
        yield self._session(path)

    def _session(self, path: Path) -> TorchGraph:
        import onnx
        import torch

        graph = read_graph(path)
        try:
            module = as_module(onnx.load(path))
        except GraphError as error:
            raise BuildError(f"PyTorch cannot run {path.name}: {error}") from error
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return TorchGraph(
            _laid_out(module, layout),
            tuple(value.name for value in graph.input),
            tuple(value.name for value in graph.output),
            layout,
            self.threads or torch.get_num_threads(),
        )


@dataclass(frozen=True, slots=True)
class TorchGraph:
    """An exported graph as a module, called with its own number of threads."""

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layout: torch.memory_format
    threads: int

    def __call__(self, feed: Feed) -> Outputs:
        bound = self.bind(feed)
        bound()
        return bound.outputs()

    def bind(self, feed: Feed) -> _Bound:
        tensors = self.tensors(feed)
        return self.step(self.module, tensors)

    def tensors(self, feed: Feed) -> list[torch.Tensor]:
        """Return the inputs in the graph's order, laid out as the module wants them."""
        import torch

        given = [torch.from_numpy(feed[name]).float() for name in self.inputs]
        return [t.contiguous(memory_format=self.layout) if t.ndim == 4 else t for t in given]

    def step(self, run: Run, tensors: list[torch.Tensor]) -> _Bound:
        """Return what runs once; the process's number of threads is as before afterwards."""
        return _Bound(run, tensors, self.outputs, self.threads)


def run_graph(run: Run, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """Return what a graph gives for one batch. Raises `BuildError` where PyTorch cannot run it."""
    import torch

    try:
        with torch.no_grad():
            return run(*tensors)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise BuildError(f"PyTorch cannot run the graph: {reason}") from error


@dataclass(slots=True)
class _Bound:
    """A batch that is in place, and what the last run of it gave."""

    run: Run
    tensors: list[torch.Tensor]
    names: tuple[str, ...]
    threads: int
    found: tuple[Any, ...] = ()

    def __call__(self) -> None:
        import torch

        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            self.found = run_graph(self.run, self.tensors)
        finally:
            if before != self.threads:
                torch.set_num_threads(before)

    def outputs(self) -> Outputs:
        return {n: value.numpy() for n, value in zip(self.names, self.found, strict=True)}


def _laid_out(module: Any, layout: torch.memory_format) -> fx.GraphModule:
    moved: fx.GraphModule = module.to(memory_format=layout)  # torch's types do not know it
    return moved


def as_module(model: onnx.ModelProto, *, as_declared: bool = False) -> fx.GraphModule:
    """Return a graph as a module whose `forward` gives its outputs, in order.

    All of it in float32, or each tensor in the type that the graph declares.

    Raises `GraphError` for an operator that PyTorch is not known to have.
    """
    from torch import fx, nn

    from exporter.emulation import Emulator
    from exporter.emulation.operators import OPERATORS

    class Node(nn.Module):
        """One node of the graph: an operator and its attributes."""

        def __init__(self, op: str, attributes: Mapping[str, Any]) -> None:
            super().__init__()
            cast = as_declared and op == "Cast"
            self.run, self.attributes = _cast if cast else OPERATORS[op], attributes

        def forward(self, *inputs: Any) -> Any:
            return self.run(self.attributes, *inputs)

    emulator = Emulator.of(model).in_float32()
    graph, root = fx.Graph(), nn.Module()
    nodes: dict[str, Any] = {
        name: graph.placeholder(f"input_{i}") for i, name in enumerate(emulator.inputs)
    }
    for i, (name, value) in enumerate(emulator.constants.items()):
        kind = _floats().get(emulator.dtypes[name]) if as_declared else None
        root.register_buffer(f"constant_{i}", value if kind is None else value.to(kind))
        nodes[name] = graph.get_attr(f"constant_{i}")
    for i, step in enumerate(emulator.steps):
        root.add_module(f"node_{i}", Node(step.op, step.attributes))
        made = graph.call_module(f"node_{i}", tuple(nodes.get(name) for name in step.reads))
        for j, name in enumerate(step.writes):
            several = len(step.writes) > 1
            nodes[name] = graph.call_function(getitem, (made, j)) if several else made
    graph.output(tuple(nodes[name] for name in emulator.outputs))
    return fx.GraphModule(root, graph)


def _floats() -> dict[int, torch.dtype]:
    import torch

    return {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}


def _cast(attributes: Mapping[str, Any], x: torch.Tensor) -> Any:
    """Convert as the graph says, where the emulation keeps all floats in one type."""
    from exporter.emulation.operators import OPERATORS

    kind = _floats().get(attributes["to"])
    return OPERATORS["Cast"](attributes, x) if kind is None else x.to(kind)
