"""PyTorch, compiled by TorchInductor into C++."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.contracts import Action, Bound, Session
from exporter.errors import BuildError
from exporter.records import Feed, Outputs
from exporter.runtimes._graph import read_graph, shapes_to_run
from exporter.runtimes._torch import PyTorch, Run, TorchGraph


class TorchCompile(PyTorch, frozen=True):
    """PyTorch with ``torch.compile``: ``freezing`` makes the weights constants it may rearrange.

    ``threads`` and ``channels_last`` as for eager PyTorch. Code is compiled for one batch size, and
    one size of pictures: for the smallest batch that the file takes when it is loaded, so that
    compiling is in the time to load, and for others when they are first bound, which is before any
    clock starts.
    """

    freezing: bool = True

    def missing(self, action: Action) -> str | None:
        """Return what is missing: a C++ compiler and Python's headers are needed to run."""
        if (reason := PyTorch.missing(self, action)) or action == "build":
            return reason
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:  # torch raises a class of a private module
            return f"torch.compile needs a C++ compiler, and found none ({type(error).__name__})"
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            return "torch.compile needs Python's headers, and there is no Python.h"
        return None

    def describe(self, path: Path) -> tuple[str, ...]:
        """Say what is compiled, and when."""
        (said,) = PyTorch.describe(self, path)
        frozen = "frozen" if self.freezing else "not frozen"
        return (f"{said}, compiled for one batch size with its weights {frozen}",)

    @contextmanager
    def open(self, path: Path) -> Iterator[Session]:
        session = _Compiled(self._session(path), self.freezing)
        session.bind(_smallest(path))
        yield session


@dataclass(frozen=True, slots=True)
class _Compiled:
    graph: TorchGraph
    freezing: bool
    _runs: dict[tuple[Any, ...], Run] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        return self.graph.threads

    def __call__(self, feed: Feed) -> Outputs:
        bound = self.bind(feed)
        bound()
        return bound.outputs()

    def bind(self, feed: Feed) -> Bound:
        tensors = self.graph.tensors(feed)
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes not in self._runs:
            self._runs[shapes] = self._compiled(tensors)
        return self.graph.step(self._runs[shapes], tensors)

    def _compiled(self, tensors: list[Any]) -> Run:
        """Return the graph compiled for inputs of these shapes, which it has run on once.

        It is traced first, with values: shapes that a graph holds as tensors are numbers then.
        """
        import torch
        from torch._inductor import config
        from torch.fx.experimental.proxy_tensor import make_fx

        def trace_and_compile(*given: torch.Tensor) -> tuple[Any, ...]:
            flat = make_fx(self.graph.module)(*given)
            run: Run = torch.compile(flat, fullgraph=True, dynamic=False)
            made.append(run)
            return run(*given)

        made: list[Run] = []
        try:
            with config.patch(freezing=self.freezing):
                self.graph.step(trace_and_compile, tensors)()
        except BuildError:
            raise
        except Exception as error:  # whatever a compiler may raise
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise BuildError(f"torch.compile refused the graph: {reason}") from error
        return made[0]


def _smallest(path: Path) -> Feed:
    """Return zeros of the smallest batch that the file takes, in the size that it is tuned for."""
    import numpy as np

    first = read_graph(path).input[0].type.tensor_type.shape.dim[0]
    shapes = shapes_to_run(path, first.dim_value or 1)
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


PLUGIN = TorchCompile
