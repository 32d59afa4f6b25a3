"""PyTorch as a session, so that the reference is run, timed and compared like everything else.

In float64 it is the truth that artefacts are compared with; in float32 it is the baseline for
latency, and its own distance from float64 is the noise floor that errors are counted in.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.outputs import flatten
from exporter.records import Feed, Outputs

if TYPE_CHECKING:
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
