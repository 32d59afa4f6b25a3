"""How long a run takes by the GPU's own clock: CUDA events around it, recorded in its stream.

    CUDA events     inputs and outputs on the device: execution alone
    with copies     from pageable host memory to the device, execution, and back
    CUDA graph      execution, captured once as a graph and launched as one, here or by the runtime

The wall clock has in it what these have not: the launch, and waiting for the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from exporter.records import Outputs
from exporter.runtimes import _cuda

EVENTS, COPIES, GRAPH = "CUDA events", "CUDA events, with copies", "CUDA events, CUDA graph"


class Clock(Protocol):
    """A device's clock."""

    def ms(self, work: Callable[[], object]) -> float:
        """Return how long the work takes on the device, in ms."""


@dataclass(frozen=True, slots=True)
class Timer:
    """Two events of a stream."""

    cuda: Any
    stream: Any
    start: Any
    stop: Any

    @classmethod
    def of(cls, cuda: Any, stream: Any) -> Timer:
        start, stop = (_cuda.call(cuda.cudaEventCreate) for _ in range(2))
        return cls(cuda, stream, start, stop)

    def ms(self, work: Callable[[], object]) -> float:
        """Return how long the work takes on the device, in ms."""
        _cuda.call(self.cuda.cudaEventRecord, self.start, self.stream)
        work()
        _cuda.call(self.cuda.cudaEventRecord, self.stop, self.stream)
        _cuda.call(self.cuda.cudaEventSynchronize, self.stop)
        return float(_cuda.call(self.cuda.cudaEventElapsedTime, self.start, self.stop))

    def close(self) -> None:
        for event in (self.start, self.stop):
            _cuda.call(self.cuda.cudaEventDestroy, event)


@dataclass(slots=True)
class Graphs:
    """Work captured as graphs, one for each set of shapes and addresses, after a first run."""

    cuda: Any
    stream: Any
    made: dict[Any, Any] = field(default_factory=dict)

    def launch(self, key: Any, enqueue: Callable[[], object]) -> None:
        """Launch the graph under a key, captured from ``enqueue`` if it is the first time."""
        if key not in self.made:
            mode = self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            _cuda.call(self.cuda.cudaStreamBeginCapture, self.stream, mode)
            try:
                enqueue()
            finally:
                graph = _cuda.call(self.cuda.cudaStreamEndCapture, self.stream)
            self.made[key] = _cuda.call(self.cuda.cudaGraphInstantiate, graph, 0)
            _cuda.call(self.cuda.cudaGraphDestroy, graph)
        _cuda.call(self.cuda.cudaGraphLaunch, self.made[key], self.stream)

    def close(self) -> None:
        for graph in self.made.values():
            _cuda.call(self.cuda.cudaGraphExecDestroy, graph)
        self.made.clear()


@dataclass(frozen=True, slots=True)
class Step:
    """One way of running a batch that is in place; calling it returns the device's milliseconds."""

    timer: Clock
    work: Callable[[], object]
    read: Callable[[], Outputs]

    def __call__(self) -> float:
        return self.timer.ms(self.work)

    def outputs(self) -> Outputs:
        return self.read()
