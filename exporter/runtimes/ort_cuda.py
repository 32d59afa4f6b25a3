"""ONNX Runtime on an NVIDIA GPU, through CUDA.

Where NVIDIA's bindings are there, it computes in a stream that was made for it, so that CUDA events
can be recorded around a run, which returns before the device is done then
(``disable_synchronize_execution_providers``).

CUDA graphs: ONNX Runtime captures a run of each shape by itself, under a number (``gpu_graph_id``;
−1 leaves a run out of it), and replays it on the memory that it was captured on, so all batches of
a shape are put into the same place. It waits for the end of a replay in any case (onnxruntime
1.31), so that its return is in the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from exporter.contracts import Action, Session
from exporter.errors import RuntimeMissing
from exporter.records import Feed, Outputs
from exporter.runtimes import _cuda, _device
from exporter.runtimes._cuda import device_name, missing_gpu
from exporter.runtimes._ort import OnnxRuntime, OrtBound, OrtSession

_NO_GRAPH = "-1"


class OrtCuda(OnnxRuntime, frozen=True):
    """ONNX Runtime, CUDA execution provider, with TF32 off; ``cuda_graph`` replays captured runs.

    A graph is refused then of which a node would stay on the CPU.
    """

    cuda_graph: bool = False

    provider: ClassVar[str] = "CUDAExecutionProvider"
    device: ClassVar[str] = "cuda"
    provider_options: ClassVar[dict[str, str]] = {"use_tf32": "0"}

    def missing(self, action: Action) -> str | None:
        """Return what is missing; listing the provider proves nothing, so a driver must answer."""
        reason = OnnxRuntime.missing(self, action)
        return reason or (missing_gpu() if action == "run" else None)

    def describe(self, path: Path) -> tuple[str, ...]:
        said = OnnxRuntime.describe(self, path)
        return (*said, "runs are replayed as CUDA graphs") if self.cuda_graph else said

    def _device_name(self) -> str:
        return device_name()

    def _prepare(self) -> None:
        import onnxruntime as ort

        with suppress(AttributeError), redirect_stdout(StringIO()):  # it prints what it lacks
            ort.preload_dlls()  # of NVIDIA's packages, to which no system path leads

    @contextmanager
    def open(self, path: Path) -> Iterator[Session]:
        options = self._session_options(path)
        more = {"enable_cuda_graph": "1"} if self.cuda_graph else {}
        try:
            cuda = _cuda.runtime_api()
        except RuntimeMissing:  # the wall clock is the only one then
            yield _CudaSession(self._on_device(self._load(path, options, **more)), self.cuda_graph)
            return
        with _cuda.stream() as stream:
            own = self._load(path, options, user_compute_stream=str(int(stream)), **more)
            timer = _device.Timer.of(cuda, stream)
            session = _TimedSession(self._on_device(own), self.cuda_graph, timer=timer)
            del own
            try:
                yield session
            finally:
                session.close()

    def _on_device(self, session: Any) -> OrtSession:
        return OrtSession(session, self.device, self._thread_count())


class _Place(NamedTuple):
    """Where all batches of a shape are put, and the number of the graph captured on it."""

    number: str
    inputs: dict[str, Any]
    binding: Any


@dataclass(slots=True)
class _CudaSession:
    """A session that ``captures`` a graph for each shape, or none."""

    plain: OrtSession | None
    captures: bool
    places: dict[Any, _Place] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        return self._open().threads

    def __call__(self, feed: Feed) -> Outputs:
        return self._open().run(feed, self._options())

    def bind(self, feed: Feed) -> OrtBound:
        return self._replayed(feed) if self.captures else self._open().bind(feed)

    def _open(self) -> OrtSession:
        assert self.plain is not None  # it is used while it is open
        return self.plain

    def _replayed(self, feed: Feed, *, wait: bool = True) -> OrtBound:
        place = self._place(feed)
        return OrtBound(self._open().session, place.binding, self._options(place.number, wait=wait))

    def _options(self, number: str = _NO_GRAPH, *, wait: bool = True) -> Any:
        """Return how to run: as which graph, and whether to wait for the device."""
        import onnxruntime as ort

        options = ort.RunOptions()
        options.log_severity_level = 3
        if self.captures:
            options.add_run_config_entry("gpu_graph_id", number)
        if not wait:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _place(self, feed: Feed) -> _Place:
        """Put a batch where those of its shape go; the first of them makes the place."""
        import numpy as np

        given = self._open().typed(feed)
        key = tuple((name, value.shape) for name, value in given.items())
        if key not in self.places:
            self.places[key] = self._new_place(feed)
        place = self.places[key]
        for name, value in given.items():
            place.inputs[name].update_inplace(np.ascontiguousarray(value))
        return place

    def _new_place(self, feed: Feed) -> _Place:
        plain = self._open()
        outputs = plain.run(feed, self._options())  # for their shapes
        binding = plain.session.io_binding()
        inputs = {name: plain.placed(value) for name, value in plain.typed(feed).items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, found in outputs.items():
            binding.bind_ortvalue_output(name, plain.placed(found))
        return _Place(str(len(self.places) + 1), inputs, binding)


@dataclass(slots=True)
class _TimedSession(_CudaSession):
    """One whose stream is known, so that events can be recorded in it."""

    timer: _device.Timer | None = None

    def on_device(self, feed: Feed) -> dict[str, Callable[[], float]]:
        """Return a run by CUDA events, one with copies in and out, and one as a CUDA graph."""
        assert self.timer is not None  # as `_open`
        copied: dict[str, Any] = {}

        def with_copies() -> None:
            copied.update(self(feed))

        run = self._open().bind(feed, self._options(wait=False))
        found: dict[str, Callable[[], float]] = {
            _device.EVENTS: _device.Step(self.timer, run, run.outputs),
            _device.COPIES: _device.Step(self.timer, with_copies, lambda: copied),
        }
        if self.captures:
            replay = self._replayed(feed, wait=False)
            found[_device.GRAPH] = _device.Step(self.timer, replay, replay.outputs)
        return found

    def close(self) -> None:
        """Let go of the session, before its stream is destroyed."""
        self.places.clear()
        self.plain = None
        if self.timer is not None:
            self.timer.close()


PLUGIN = OrtCuda
