"""ONNX Runtime, for any execution provider. ``ort_cpu.py`` and ``ort_cuda.py`` name one each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.contracts import Action, Identity, Plugin, Session
from exporter.cores import usable_cores
from exporter.errors import BuildError
from exporter.records import THREADS, Array, Execution, Feed, Kernel, OnnxModel, Outputs, Ranges
from exporter.runtimes import _ort_audit
from exporter.runtimes._asked import asked_layers
from exporter.runtimes._graph import (
    dequantised_weights,
    has_float8,
    has_half_scales,
    is_quantised,
    read_graph,
    shapes_to_run,
)
from exporter.runtimes._ort_kernels import computing_nodes, kernel_times
from exporter.samples import noise

if TYPE_CHECKING:
    import onnx

# With its default optimisations ONNX Runtime's CPU provider computes wrong results for graphs whose
# Q/DQ scales are half, or that have FP8: it is told to run their pairs as they are written. Where
# weights alone are quantised it then dequantises them once, and not in every run.
_AS_WRITTEN = "session.disable_quant_qdq"
# And before an FP8 quantiser it drops every ReLU, since it takes the zero point 0 for the lowest
# number, and fails on every Clip.
NOT_FOR_FP8 = ("ReluQuantRewrite", "ClipQuantRewrite")


class OnnxRuntime(Plugin, frozen=True):
    """ONNX Runtime; ``as_written`` runs no pair in integers, and dequantises weights when loaded.

    That is faster for graphs of another form than its own, whose layers run in float anyway: left
    alone it dequantises their weights in every run, and does not rearrange them (measured, on a CPU
    with VNNI: 1.04 times FP32's time in place of 1.31, where its own form takes 0.28).
    """

    threads: int = 0
    as_written: bool = False

    provider: ClassVar[str]
    device: ClassVar[str]
    provider_options: ClassVar[dict[str, str]] = {}

    RANGES: ClassVar[Ranges] = {"threads": THREADS}

    def missing(self, action: Action) -> str | None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            return str(error)
        has = ort.get_available_providers()
        return None if self.provider in has else f"{self.provider} is not in {', '.join(has)}"

    def identify(self) -> Identity | None:
        try:
            import onnxruntime as ort
        except ImportError:
            return None
        return Identity(ort.__version__, None if self.missing("run") else self._device_name())

    def _device_name(self) -> str:
        return self.device.upper()

    def build(self, model: OnnxModel, folder: Path) -> Path:
        return model.path

    def describe(self, path: Path) -> tuple[str, ...]:
        """Say with which options a graph is run that would else be computed wrongly, or slower."""
        graph = read_graph(path)
        if has_float8(graph):
            return (
                f"run with {_AS_WRITTEN}=1 and without {' and '.join(NOT_FOR_FP8)}, as this graph "
                "has FP8",
            )
        if has_half_scales(graph):
            return (f"run with {_AS_WRITTEN}=1, as this graph's quantisation scales are half",)
        if _only_weights(graph):
            return (
                "weights are dequantised once, when the file is loaded: the file is smaller, and "
                "expect no gain beside that",
            )
        if self.as_written and is_quantised(graph):
            return (f"run with {_AS_WRITTEN}=1, as the option as_written asks for",)
        return ()

    def executed(self, model: OnnxModel, path: Path) -> Execution | None:
        """Return what the profile of one run says, beside the graph as it was optimised."""
        graph = read_graph(path)
        if not (asked := asked_layers(graph)):
            return None
        if reason := self.missing("run"):
            return Execution("profile", unknown=reason)
        optimised, kernels = self._profile(model, path)
        kept = None
        if has_half_scales(graph):
            kept = (
                f"its quantisation scales are half, so {_AS_WRITTEN}=1 keeps its pairs as written"
            )
        elif self.as_written:
            kept = "the runtime's option as_written keeps its pairs as written"
        layers = _ort_audit.executed(
            asked, graph, optimised, kernels, as_written=kept, explain=self.device == "cpu"
        )
        return Execution("profile", layers)

    def _profile(
        self, model: OnnxModel, path: Path
    ) -> tuple[onnx.GraphProto, dict[str, _ort_audit.Kernel]]:
        import numpy as np

        zeros = {
            spec.name: np.zeros((model.batch.min, *spec.shape), np.dtype(spec.dtype))
            for spec in model.inputs
        }
        with TemporaryDirectory() as folder:
            written = Path(folder, "optimised.onnx")
            options = self._session_options(path)
            options.optimized_model_filepath = str(written)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder, "profile"))
            session = self._load(path, options)
            OrtSession(session, self.device, 1)(zeros)
            events = json.loads(Path(session.end_profiling()).read_bytes())
            return read_graph(written), _ort_audit.kernels(events)

    def kernels(
        self, path: Path, *, batch: int, runs: int, warmup: int
    ) -> tuple[int, tuple[Kernel, ...]]:
        """Return the threads, and every kernel's median time over the runs of one profile."""
        with TemporaryDirectory() as folder:
            options = self._session_options(path)
            written = Path(folder, "optimised.onnx")
            options.optimized_model_filepath = str(written)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder, "profile"))
            session = self._load(path, options)
            feed, shapes = {}, shapes_to_run(path, batch)
            for seed, given in enumerate(session.get_inputs()):
                _, *rest = shapes[given.name]
                kind = "uint8" if given.type == "tensor(uint8)" else "float32"
                feed[given.name] = noise(tuple(rest), count=batch, seed=seed, dtype=kind)
            opened = OrtSession(session, self.device, self._thread_count())
            for _ in range(warmup + runs):
                opened(feed)
            events = json.loads(Path(session.end_profiling()).read_bytes())
            nodes = computing_nodes(read_graph(path), read_graph(written))
        return opened.threads, kernel_times(events, nodes, skip=warmup)

    @contextmanager
    def open(self, path: Path) -> Iterator[Session]:
        session = self._load(path, self._session_options(path))
        yield OrtSession(session, self.device, self._thread_count())

    def _session_options(self, path: Path) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        # Threads that spin after a run would slow whatever is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        graph = read_graph(path)
        needed = _only_weights(graph) or has_half_scales(graph) or has_float8(graph)
        if needed or (self.as_written and is_quantised(graph)):
            options.add_session_config_entry(_AS_WRITTEN, "1")
        return options

    def _load(self, path: Path, options: Any, **more: str) -> Any:
        """Return a session of the provider with its options, and ``more`` of them."""
        import onnxruntime as ort

        self._prepare()
        disabled = NOT_FOR_FP8 if has_float8(read_graph(path)) else ()
        providers = [(self.provider, {**self.provider_options, **more})]
        try:
            session = ort.InferenceSession(
                path, options, providers=providers, disabled_optimizers=list(disabled)
            )
        except Exception as error:  # onnxruntime raises one private class per status code
            reason = str(error).strip().splitlines()[0]
            raise BuildError(f"onnxruntime refused {path.name}: {reason}") from error
        got = session.get_providers()[0]
        if got != self.provider:  # it falls back to the CPU in silence
            raise BuildError(f"onnxruntime gave {got} where {self.provider} was asked for")
        return session

    def _prepare(self) -> None:
        """Find what the provider needs, before the first session is made."""

    def _thread_count(self) -> int:
        return self.threads or usable_cores()


@dataclass(frozen=True, slots=True)
class OrtSession:
    """A session on one device, whose inputs and outputs stay there while it is timed."""

    session: Any
    device: str
    threads: int

    def __call__(self, feed: Feed) -> Outputs:
        return self.run(feed)

    def run(self, feed: Feed, options: Any = None) -> Outputs:
        """Return the outputs of a run with onnxruntime's own ``RunOptions``."""
        names = [output.name for output in self.session.get_outputs()]
        try:
            found = self.session.run(names, self.typed(feed), options)
        except Exception as error:  # onnxruntime raises one private class per status code
            raise _cannot_run(error) from error
        return _named(self.session, found)

    def bind(self, feed: Feed, options: Any = None) -> OrtBound:
        binding = self.session.io_binding()
        for name, value in self.typed(feed).items():
            binding.bind_ortvalue_input(name, self.placed(value))
        for output in self.session.get_outputs():
            binding.bind_output(output.name, self.device)
        return OrtBound(self.session, binding, options)

    def placed(self, value: Array) -> Any:
        """Return an array as an ``OrtValue`` on the device."""
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_numpy(value, self.device)

    def typed(self, feed: Feed) -> dict[str, Any]:
        """Return the feed in the graph's own input types: a graph with half I/O takes halves."""
        half = {i.name for i in self.session.get_inputs() if i.type == "tensor(float16)"}
        return {
            name: value.astype("float16") if name in half else value for name, value in feed.items()
        }


@dataclass(frozen=True, slots=True)
class OrtBound:
    """A batch in place, and onnxruntime's own ``RunOptions`` to run it with."""

    session: Any
    binding: Any
    options: Any = None

    def __call__(self) -> None:
        try:
            self.session.run_with_iobinding(self.binding, self.options)
        except Exception as error:  # onnxruntime raises one private class per status code
            raise _cannot_run(error) from error

    def outputs(self) -> Outputs:
        return _named(self.session, self.binding.copy_outputs_to_cpu())


def _cannot_run(error: Exception) -> BuildError:
    reason = str(error).strip().splitlines()[0]
    return BuildError(f"onnxruntime cannot run the graph: {reason}")


def _named(session: Any, found: Sequence[Any]) -> Outputs:
    """Return outputs by their names, as numbers."""
    outputs = session.get_outputs()
    return {
        output.name: as_float8(value, output.type)
        for output, value in zip(outputs, found, strict=True)
    }


def _only_weights(graph: onnx.GraphProto) -> bool:
    return bool(dequantised_weights(graph)) and not is_quantised(graph)


def as_float8(value: Any, kind: str) -> Any:
    """Return a tensor as numbers: onnxruntime hands FP8 over as the bytes that hold it."""
    import onnx

    if kind != "tensor(float8e4m3fn)":
        return value
    return value.view(onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.FLOAT8E4M3FN))
