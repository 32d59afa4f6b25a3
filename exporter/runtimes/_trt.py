"""TensorRT and TensorRT-RTX: one API under two names; the two files beside this one pick one.

Both are strongly typed: a graph's types are its precision, and there is no precision to set here,
only one to respect. TF32 is on by default and would make an FP32 engine compute in 10 mantissa
bits, so it is off unless the profile asks for it. The library never raises when it refuses a graph:
it returns nothing and logs why, so its log is kept and read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.contracts import Action, Identity, Plugin, Session
from exporter.errors import BuildError
from exporter.records import Execution, Feed, OnnxModel, Outputs, Range, Ranges
from exporter.runtimes import _cuda, _device, _engine
from exporter.runtimes._asked import asked_layers
from exporter.runtimes._graph import check_quantisation, read_graph

if TYPE_CHECKING:
    import onnx

# Without a GPU every real error is followed by this one, which says nothing.
_NOISE = "catchCudaError"


class TensorRt(Plugin, frozen=True):
    """TensorRT: ``workspace_mib`` limits the builder's scratch memory, ``tf32`` is off if false."""

    workspace_mib: int = 1024
    tf32: bool = False

    package: ClassVar[str]

    RANGES: ClassVar[Ranges] = {"workspace_mib": Range(1, 1 << 20)}

    def _missing_package(self) -> str | None:
        try:
            import_module(self.package)
        except ImportError as error:
            return str(error)
        return None

    def refuse(self, graph: onnx.GraphProto, name: str) -> None:
        """Raise `BuildError` for a graph that must not reach the library."""

    def describe(self, path: Path) -> tuple[str, ...]:
        return ("TF32 allowed",) if self.tf32 else ()

    def missing(self, action: Action) -> str | None:
        """Return what is missing to build or to run."""
        return self._missing_package() or _cuda.missing_to_run()

    def identify(self) -> Identity | None:
        if self._missing_package():
            return None
        version = str(import_module(self.package).__version__)
        return Identity(version, None if self.missing("run") else _cuda.device_name())

    def executed(self, model: OnnxModel, path: Path) -> Execution | None:
        """Return what the engine inspector says, or, where none can be had, the engine's text."""
        if not (asked := asked_layers(read_graph(model.path))):
            return None
        reason = self.missing("run")
        if not reason and (layers := _engine.inspected(self._inspect(model, path), asked)):
            return Execution("engine inspector", layers)
        if layers := _engine.read_text(path.read_bytes(), asked):
            return Execution("engine text", layers)
        return Execution(
            "engine inspector", unknown=reason or "the engine inspector names no layer's types"
        )

    def _inspect(self, model: OnnxModel, path: Path) -> str:
        """Return the engine inspector's JSON, for the batch that the engine is tuned for."""
        trt = import_module(self.package)
        said = listen(trt)
        runtime = trt.Runtime(said.logger)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise self._refused(path, said.errors)
        context = self._context(trt, engine)
        for spec in model.inputs:
            context.set_input_shape(spec.name, (model.batch.opt, *spec.shape))
        inspector = engine.create_engine_inspector()
        inspector.execution_context = context  # else formats are not told of dynamic shapes
        return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def build(self, model: OnnxModel, folder: Path) -> Path:
        """Write ``<model>.<runtime>.engine`` into ``folder`` and return its path."""
        graph = read_graph(model.path)
        check_quantisation(graph, model.path.name)
        self.refuse(graph, model.path.name)
        trt = import_module(self.package)
        said = listen(trt)
        builder = trt.Builder(said.logger)  # builder, network, parser: none keeps another alive
        network = builder.create_network(_strongly_typed(trt))
        network.name = model.path.stem
        parser = trt.OnnxParser(network, said.logger)
        parsed = parser.parse_from_file(str(model.path))
        if not parsed or not network.num_inputs or not network.num_outputs:
            problems = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
            raise self._refused(model.path, problems or said.errors)
        config = builder.create_builder_config()
        if not self.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # types, for `executed`
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.workspace_mib << 20)
        self._set_targets(trt, config)
        shapes = builder.create_optimization_profile()
        batch = model.batch
        for spec in model.inputs:
            sizes = (
                (batch.min, *spec.smallest),
                (batch.opt, *spec.shape),
                (batch.max, *spec.largest),
            )
            shapes.set_shape(spec.name, *sizes)
        if config.add_optimization_profile(shapes) < 0:
            raise self._refused(model.path, said.errors)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._refused(model.path, said.errors)
        path = folder / f"{model.path.stem}.{self.package.replace('_', '-')}.engine"
        path.write_bytes(memoryview(plan))
        return path

    def _set_targets(self, trt: Any, config: Any) -> None:
        targets = getattr(self, "targets", ())  # full TensorRT builds for the GPU present
        if targets:
            config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), i):
                raise BuildError(f"{self.package} does not take the target {target!r}")

    def _refused(self, path: Path, problems: list[str]) -> BuildError:
        reason = problems[0] if problems else "it gave no reason"
        return BuildError(f"{self.package} refused {path.name}: {reason}")

    @contextmanager
    def open(self, path: Path) -> Iterator[Session]:
        trt = import_module(self.package)
        cuda = _cuda.runtime_api()
        said = listen(trt)
        runtime = trt.Runtime(said.logger)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise self._refused(path, said.errors)
        context = self._context(trt, engine)
        with _cuda.stream() as stream:
            buffers = _cuda.Buffers()
            session = _EngineSession(trt, cuda, engine, context, stream, buffers)
            if hasattr(trt, "CudaGraphStrategy"):
                session.replaying = lambda: self._context(trt, engine, replays=True)
            try:
                yield session
            finally:
                session.close()
                buffers.free()

    def _context(self, trt: Any, engine: Any, *, replays: bool = False) -> Any:
        """Return an execution context; RTX compiles its kernels before the first run, not in it.

        One that ``replays`` captures CUDA graphs by itself, which RTX alone can.
        """
        if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        if replays:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return engine.create_execution_context(config)


@dataclass(slots=True)
class _EngineSession:
    trt: Any
    cuda: Any
    engine: Any
    context: Any
    stream: Any
    buffers: _cuda.Buffers
    threads: int = 1  # of the CPU: the one that launches
    timer: _device.Timer | None = None
    graphs: _device.Graphs | None = None
    replaying: Callable[[], Any] | None = None
    replayed: Any = None

    def __call__(self, feed: Feed) -> Outputs:
        self.bind(feed)()
        return self.outputs()

    def outputs(self) -> Outputs:
        outputs = self._copy_out()
        _cuda.call(self.cuda.cudaStreamSynchronize, self.stream)
        return outputs

    def bind(self, feed: Feed) -> Callable[[], Any]:
        import numpy as np

        for name, given in feed.items():
            dtype = self.trt.nptype(self.engine.get_tensor_dtype(name))
            value = np.ascontiguousarray(given, dtype=dtype)
            if not self.context.set_input_shape(name, value.shape):
                raise BuildError(
                    f"the engine does not take an input of shape {tuple(value.shape)}",
                    hint="its ranges were set by [batch] and [size] in the profile",
                )
            address = self.buffers.at(name, value.nbytes)
            self._copy(address, value.ctypes.data, value.nbytes, "HostToDevice")
            self.context.set_tensor_address(name, address)
        for name, (address, _, _) in self._outputs().items():
            self.context.set_tensor_address(name, address)
        _cuda.call(self.cuda.cudaStreamSynchronize, self.stream)
        return _Bound(self)

    def _set_replayed(self, feed: Feed) -> Any:
        """Return the context that captures by itself, set to the batch that is in place."""
        if self.replayed is None:
            assert self.replaying is not None  # or this is not called
            self.replayed = self.replaying()
        for name, value in feed.items():
            self.replayed.set_input_shape(name, value.shape)
            self.replayed.set_tensor_address(name, self.buffers.at(name, 0))
        for name, (address, _, _) in self._outputs().items():
            self.replayed.set_tensor_address(name, address)
        return self.replayed

    def on_device(self, feed: Feed) -> dict[str, Callable[[], float]]:
        """Return a run by CUDA events, one with copies in and out, and one as a CUDA graph."""
        import numpy as np

        self.bind(feed)()  # once before a graph is captured
        self.timer = self.timer or _device.Timer.of(self.cuda, self.stream)
        self.graphs = graphs = self.graphs or _device.Graphs(self.cuda, self.stream)
        given = {
            name: np.ascontiguousarray(value, self.trt.nptype(self.engine.get_tensor_dtype(name)))
            for name, value in feed.items()
        }
        key = tuple((v.shape, self.buffers.at(n, v.nbytes)) for n, v in given.items())

        def with_copies() -> None:
            for name, value in given.items():
                address = self.buffers.at(name, value.nbytes)
                self._copy(address, value.ctypes.data, value.nbytes, "HostToDevice")
            self.enqueue()
            self._copy_out()

        def launch() -> None:
            graphs.launch((*key, *self._places()), self.enqueue)

        replay = partial(self._enqueue, self._set_replayed(given)) if self.replaying else launch
        ways = {_device.EVENTS: self.enqueue, _device.COPIES: with_copies, _device.GRAPH: replay}
        return {n: _device.Step(self.timer, work, self.outputs) for n, work in ways.items()}

    def _places(self) -> list[int]:
        return [address for address, _, _ in self._outputs().values()]

    def close(self) -> None:
        """Let go of what only timing needed."""
        for made in (self.timer, self.graphs):
            if made is not None:
                made.close()

    def enqueue(self) -> None:
        """Start one run, and do not wait for it."""
        self._enqueue(self.context)

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(int(self.stream)):
            raise BuildError("the engine could not be executed")

    def _copy_out(self) -> Outputs:
        import numpy as np

        outputs = {}
        for name, (address, shape, dtype) in self._outputs().items():
            outputs[name] = np.empty(shape, dtype)
            self._copy(outputs[name].ctypes.data, address, outputs[name].nbytes, "DeviceToHost")
        return outputs

    def _outputs(self) -> dict[str, tuple[int, tuple[int, ...], Any]]:
        """Return each output's address, shape and type, for the input shapes that are set."""
        import numpy as np

        found = {}
        for i in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(i)
            if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.OUTPUT:
                shape = tuple(self.context.get_tensor_shape(name))
                dtype = np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name)))
                size = int(np.prod(shape)) * dtype.itemsize
                found[name] = (self.buffers.at(name, size), shape, dtype)
        return found

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        direction = getattr(self.cuda.cudaMemcpyKind, f"cudaMemcpy{kind}")
        _cuda.call(self.cuda.cudaMemcpyAsync, target, source, size, direction, self.stream)


@dataclass(frozen=True, slots=True)
class _Bound:
    session: _EngineSession

    def __call__(self) -> None:
        self.session.enqueue()
        _cuda.call(self.session.cuda.cudaStreamSynchronize, self.session.stream)

    def outputs(self) -> Outputs:
        return self.session.outputs()


# ── The library's log ───────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Said:
    logger: Any
    errors: list[str]


_heard: dict[str, _Said] = {}


def listen(trt: Any) -> _Said:
    """Return the logger with an empty list of errors; the library takes one logger a process."""
    if trt.__name__ not in _heard:
        errors: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[misc]  # the module is only known at run time
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.ERROR and _NOISE not in message:
                    errors.append(message.strip())

        _heard[trt.__name__] = _Said(Logger(), errors)
    said = _heard[trt.__name__]
    said.errors.clear()
    return said


def _parser_error(error: Any) -> str:
    node = f"{error.node_operator()} {error.node_name()!r}: " if error.node_operator() else ""
    return f"{node}{error.desc()}"


def _strongly_typed(trt: Any) -> int:
    """Return the creation flag, whose number moved between 10 and 11; 11 needs none."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)
