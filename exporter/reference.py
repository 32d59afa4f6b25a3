"""References as sessions, so that they are run, timed and compared like everything else.

A PyTorch module, or an ONNX graph as `exporter.emulation` computes it. In float64 it is the truth
that artefacts are compared with. In float32 a module is the baseline for latency, and its own
distance from float64 is the noise floor that errors are counted in.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.emulation import Emulator
from exporter.outputs import flatten
from exporter.records import Feed, Outputs

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class TorchSession:
    """An eager PyTorch module on the CPU, in eval mode, computing in ``dtype``."""

    module: nn.Module
    names: tuple[str, ...]
    dtype: torch.dtype
    threads: int

    @classmethod
    def of(cls, module: nn.Module, *outputs: str, double: bool = False) -> TorchSession:
        """Wrap a module with one input and these outputs; a copy of it where it must be cast."""
        import torch

        dtype = torch.float64 if double else torch.float32
        cast = deepcopy(module).to(dtype) if double else module
        return cls(cast.eval(), outputs, dtype, torch.get_num_threads())

    def __call__(self, feed: Feed) -> Outputs:
        bound = self.bind(feed)
        bound()
        return bound.outputs()

    def bind(self, feed: Feed) -> _Bound:
        import torch

        return _Bound(self, [torch.from_numpy(v).to(self.dtype) for v in feed.values()])


@dataclass(slots=True)
class _Bound:
    session: TorchSession
    tensors: list[torch.Tensor]
    last: Any = None

    def __call__(self) -> Any:
        import torch

        with torch.inference_mode():
            self.last = self.session.module(*self.tensors)
        return self.last

    def outputs(self) -> Outputs:
        assert self.last is not None  # a run came before
        found = flatten(self.last).values()
        return {n: value.numpy() for n, value in zip(self.session.names, found, strict=True)}


@dataclass(frozen=True, slots=True)
class GraphSession:
    """An ONNX graph as its operators are meant, computed in the emulator's type on the CPU."""

    emulator: Emulator
    threads: int

    @classmethod
    def of(cls, model: onnx.ModelProto, *, double: bool = False) -> GraphSession:
        """Read a graph. Raises `GraphError` for an operator that has no emulation."""
        import torch

        emulator = Emulator.of(model)
        return cls(emulator if double else emulator.in_float32(), torch.get_num_threads())

    def __call__(self, feed: Feed) -> Outputs:
        return self.bind(feed)()

    def bind(self, feed: Feed) -> Callable[[], Outputs]:
        import torch

        tensors = {name: torch.from_numpy(value) for name, value in feed.items()}

        def run() -> Outputs:
            with torch.inference_mode():
                found = self.emulator.run(tensors)
                return {name: found[name].numpy() for name in self.emulator.outputs}

        return run
