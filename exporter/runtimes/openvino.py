"""OpenVINO, at the precision of the graph.

Left alone it computes FP32 graphs in BF16 on a CPU that has BF16 (measured: 61 dB from FP32's
outputs, where it can be at 127). Its execution mode ACCURACY keeps the graph's types
("execution_mode", OpenVINO's documentation of inference hints), and what the compiled model says of
itself is read back. No option asks for BF16: the precision ``bf16`` is a graph whose types say so,
which OpenVINO runs in BF16 kernels in the same mode and the same time, and which has a gate of its
own.

Every type that a CPU has kernels for is run in them; a graph in FP16 is run in FP32 on one that has
none. The batch axis stays free, as the file has it: a compiled model serves the profile's range.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from exporter.contracts import Action, Identity, Plugin, Session
from exporter.errors import BuildError, RuntimeMissing
from exporter.records import THREADS, Execution, Feed, Kernel, OnnxModel, Outputs, Ranges
from exporter.runtimes._asked import asked_layers
from exporter.runtimes._graph import has_float8, read_graph, shapes_to_run
from exporter.runtimes._openvino import executed, kernel_times
from exporter.samples import noise

_CHOOSE_ALONE = ("AUTO", "MULTI", "HETERO", "BATCH")  # they fall back from one device to another


class OpenVino(Plugin, frozen=True):
    """OpenVINO on one ``device``, ``threads`` of a CPU as a whole, 0 for one per core."""

    threads: int = 0
    device: str = "CPU"

    RANGES: ClassVar[Ranges] = {"threads": THREADS}

    def __post_init__(self) -> None:
        Plugin.__post_init__(self)
        if self.device.partition(":")[0] in _CHOOSE_ALONE:
            raise ValueError(f"device {self.device!r} chooses by itself where to run: name one")
        if not re.fullmatch(r"[A-Z]+(\.[0-9]+)?", self.device):
            raise ValueError(f'device must be a name such as "CPU", found {self.device!r}')

    def missing(self, action: Action) -> str | None:
        """Return what is missing, to build as to run: the package, or the device that is named."""
        try:
            found = _core().available_devices
        except RuntimeMissing as error:
            return str(error)
        if any(self.device in (name, name.partition(".")[0]) for name in found):
            return None
        return f"OpenVINO has no device {self.device!r} here, but {', '.join(found) or 'none'}"

    def identify(self) -> Identity | None:
        try:
            import openvino
        except ImportError:
            return None
        name = None
        if self.missing("run") is None:
            name = str(_core().get_property(self.device, "FULL_DEVICE_NAME")).strip()
        return Identity(openvino.__version__.partition("-")[0], name)

    def build(self, model: OnnxModel, folder: Path) -> Path:
        return model.path

    def describe(self, path: Path) -> tuple[str, ...]:
        """Name the library and the device, which decide what its figures mean."""
        found = self.identify()
        if found is None or found.device is None:
            return ()
        said = f"OpenVINO {found.version} on {found.device}, at the graph's own precision"
        if has_float8(read_graph(path)):
            return (said, "OpenVINO rounds to FP16 on the way to FP8, and so a few values twice")
        return (said,)

    def executed(self, model: OnnxModel, path: Path) -> Execution | None:
        """Return what the compiled model says of each layer, after a run."""
        import numpy as np

        graph = read_graph(path)
        if not (asked := asked_layers(graph)):
            return None
        if reason := self.missing("run"):
            return Execution("profile", unknown=reason)
        compiled = self._compiled(path, profiled=True)
        zeros = {
            spec.name: np.zeros((model.batch.min, *spec.shape), np.dtype(spec.dtype))
            for spec in model.inputs
        }
        _Session(compiled, path.name)(zeros)
        return Execution("profile", executed(asked, compiled.get_runtime_model()))

    def kernels(
        self, path: Path, *, batch: int, runs: int, warmup: int
    ) -> tuple[int, tuple[Kernel, ...]]:
        """Return the threads, and every kernel's median time over the runs, of one batch size."""
        import numpy as np

        compiled = self._compiled(path, profiled=True, batch=batch)
        session = _Session(compiled, path.name)
        drawn = {}
        for seed, given in enumerate(compiled.inputs):
            kind = "uint8" if given.element_type.to_dtype() == np.uint8 else "float32"
            count, *rest = given.shape
            drawn[given.any_name] = noise(tuple(rest), count=count, seed=seed, dtype=kind)
        request, _read = session.prepared(drawn)
        times: dict[str, list[float]] = {}
        for turn in range(warmup + runs):
            request.start_async()
            request.wait()
            for one in request.profiling_info if turn >= warmup else ():
                if one.status == one.Status.EXECUTED:
                    times.setdefault(one.node_name, []).append(one.real_time.total_seconds() * 1e3)
        ran = kernel_times(compiled.get_runtime_model(), times, read_graph(path))
        return session.threads, tuple(ran)

    @contextmanager
    def open(self, path: Path) -> Iterator[Session]:
        yield _Session(self._compiled(path), path.name)

    def _compiled(self, path: Path, *, profiled: bool = False, batch: int | None = None) -> Any:
        """Return the compiled model, for one batch size if that is given, and one size.

        Raises `BuildError` where it is not what was asked for.
        """
        read_graph(path)  # OpenVINO asks every frontend it has about a file that is not ONNX
        core = _core()
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "EXECUTION_MODE_HINT": "ACCURACY",
            "PERF_COUNT": profiled,
        }
        if self.device == "CPU":
            options["INFERENCE_NUM_THREADS"] = self.threads
        try:
            model = core.read_model(path)
            if batch is not None:
                model.reshape({n: list(s) for n, s in shapes_to_run(path, batch).items()})
            compiled = core.compile_model(model, self.device, options)
        except RuntimeError as error:
            raise BuildError(f"openvino refused {path.name}: {_said(error)}") from error
        got = compiled.get_property("EXECUTION_DEVICES")
        if [name.partition(".")[0] for name in got] != [self.device.partition(".")[0]]:
            raise BuildError(f"openvino gave {', '.join(got)} where {self.device} was asked for")
        kept = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if kept not in ("dynamic", "f32"):
            raise BuildError(f"openvino would run {path.name} in {kept}, whatever the graph says")
        return compiled


@dataclass(frozen=True, slots=True)
class _Session:
    compiled: Any
    name: str

    @property
    def threads(self) -> int:
        """Return how many threads OpenVINO says it uses: no more than there are cores."""
        if "INFERENCE_NUM_THREADS" not in self.compiled.get_property("SUPPORTED_PROPERTIES"):
            return 1
        return int(self.compiled.get_property("INFERENCE_NUM_THREADS"))

    def __call__(self, feed: Feed) -> Outputs:
        return self.bind(feed).outputs()

    def bind(self, feed: Feed) -> _Bound:
        """Return a step on a request of its own, whose outputs have their memory by then."""
        return _Bound(self.compiled, *self.prepared(feed))

    def prepared(self, feed: Feed) -> tuple[Any, list[Any]]:
        """Return a request that reads the batch where it lies and has run, and what it reads."""
        import numpy as np
        import openvino

        request, read = self.compiled.create_infer_request(), []
        try:
            for port in self.compiled.inputs:
                value = np.ascontiguousarray(feed[port.any_name], port.element_type.to_dtype())
                request.set_tensor(port, openvino.Tensor(value, shared_memory=True))
                read.append(value)
            request.start_async()
            request.wait()
        except RuntimeError as error:
            raise BuildError(f"openvino cannot run {self.name}: {_said(error)}") from error
        return request, read


@dataclass(frozen=True, slots=True)
class _Bound:
    """One request, and what it reads, which OpenVINO does not own."""

    compiled: Any
    request: Any
    read: list[Any]

    def __call__(self) -> None:
        self.request.start_async()  # unlike `infer`, it copies no outputs
        self.request.wait()

    def outputs(self) -> Outputs:
        return {
            output.any_name: _as_numbers(self.request.get_tensor(output).data.copy(), output)
            for output in self.compiled.outputs
        }


def _as_numbers(value: Any, port: Any) -> Any:
    """Return a tensor as numbers: OpenVINO hands FP8 over as the bytes that hold it."""
    import onnx

    if port.element_type.get_type_name() != "f8e4m3":
        return value
    return value.view(onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.FLOAT8E4M3FN))


def _core() -> Any:
    """Return OpenVINO's core. Raises `RuntimeMissing` without the package."""
    try:
        import openvino
    except ImportError as error:
        raise RuntimeMissing(str(error), hint="pip install openvino") from error
    return openvino.Core()


def _said(error: Exception) -> str:
    """Return the last line of an error: those before say where in OpenVINO's sources it arose."""
    lines = [line.strip("-. ") for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no reason"


PLUGIN = OpenVino
