"""PyTorch on an NVIDIA GPU, compiled by TorchInductor, its kernels launched as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from exporter.contracts import Action, Session
from exporter.errors import BuildError
from exporter.records import Feed
from exporter.runtimes import _device
from exporter.runtimes._torch import Run
from exporter.runtimes._torch_cuda import CudaSession, DeviceGraph, PyTorchCuda, TorchTimer, Work

if TYPE_CHECKING:
    import torch


class TorchCompileCuda(PyTorchCuda, frozen=True):
    """``torch.compile`` on CUDA, mode ``reduce-overhead``; ``channels_last`` in memory.

    Code is compiled for one batch size when that is first bound, before any clock starts.
    """

    def missing(self, action: Action) -> str | None:
        """Return what is missing: Triton, which compiles the kernels, is needed to run."""
        if (reason := PyTorchCuda.missing(self, action)) or action == "build":
            return reason
        try:
            import triton  # noqa: F401 - whether it can be imported is the question
        except ImportError as error:
            return f"torch.compile needs Triton on CUDA ({error})"
        return None

    def _session(self, graph: DeviceGraph) -> Session:
        return _CompiledSession(graph)


@dataclass(slots=True)
class _CompiledSession(CudaSession):
    runs: dict[Any, Run] = field(default_factory=dict)

    def work(self, tensors: list[torch.Tensor]) -> Work:
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes not in self.runs:
            self.runs[shapes] = self._compiled(tensors)
        return Work(self.runs[shapes], tensors, self.graph)

    def on_device(self, feed: Feed) -> dict[str, Callable[[], float]]:
        """Return a run by CUDA events, which is a CUDA graph's, and one with copies in and out."""
        work = self.work(self.graph.tensors(feed))
        return {
            _device.GRAPH: _device.Step(TorchTimer.of_cuda(), work, work.outputs),
            _device.COPIES: self.with_copies(feed),
        }

    def _compiled(self, tensors: list[torch.Tensor]) -> Run:
        """Return the graph compiled for these shapes, run as often as it takes to be captured.

        It is traced first, with values, so that shapes which a graph holds as tensors are numbers;
        its constants are buffers then, which a captured graph reads where they are. What cannot be
        captured is refused, where PyTorch by itself would run it without CUDA graphs.
        """
        import torch
        from torch._inductor import config
        from torch.fx.experimental.proxy_tensor import make_fx

        try:
            with torch.no_grad(), config.patch({"triton.cudagraph_or_error": True}):
                flat = _with_buffers(make_fx(self.graph.module)(*tensors))
                made = torch.compile(flat, mode="reduce-overhead", fullgraph=True, dynamic=False)
                run = _step(made)
                for _ in range(3):  # compiled, warmed up and captured
                    run(*tensors)
        except Exception as error:  # whatever a compiler may raise
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise BuildError(f"torch.compile refused the graph: {reason}") from error
        return run


def _step(made: Callable[..., Any]) -> Run:
    """Return a run that is a step of its own: the outputs of the one before may be overwritten."""
    import torch

    def run(*tensors: torch.Tensor) -> tuple[Any, ...]:
        compiler: Any = torch.compiler
        compiler.cudagraph_mark_step_begin()
        return tuple(made(*tensors))

    return run


def _with_buffers(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Make buffers of the tensors that tracing found and left as plain attributes."""
    import torch

    for node in module.graph.nodes:
        value = getattr(module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(value, torch.Tensor) and str(node.target) not in dict(module.named_buffers()):
            delattr(module, str(node.target))
            module.register_buffer(str(node.target), value)
    return module


PLUGIN = TorchCompileCuda
