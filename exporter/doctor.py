"""What runs here: every runtime is tried on a small network, and believed in nothing else.

That a library lists a device proves nothing (ONNX Runtime lists CUDA where there is no GPU, and
falls back in silence). So a session is made, asked what it got, run, and its answer compared with
float64; and the same network in every precision is given to the runtime, which says in which types
its layers ran, as in an export (`contracts.Runtime.executed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from exporter import environment, plugins
from exporter.contracts import Progress, Runtime, silent
from exporter.cores import usable_cores
from exporter.errors import ExportError, RuntimeMissing, UnknownName
from exporter.records import (
    BatchRange,
    Checkup,
    Diagnosis,
    Execution,
    OnnxModel,
    TensorSpec,
    Trial,
)
from exporter.version import TOOL

if TYPE_CHECKING:
    import onnx

    from exporter.records import Array

INPUT, OUTPUT = TensorSpec("input", (4, 16, 16)), TensorSpec("logits", (4,))
LIMIT = 1e-5  # of an FP32 answer, relative L2: rounding makes 1e-7, BF16 or TF32 1e-3
_PLAIN = {"equalise": False, "rounding": False, "bias_correction": False, "calibrator": "max"}
_FORMS: Mapping[str, Sequence[Mapping[str, Any]]] = {"int8": ({}, {"form": "onnxruntime"})}


def examine(runtimes: Sequence[str] = (), *, progress: Progress = silent) -> Diagnosis:
    """Return the machine and what each runtime did, all of them unless some are named.

    Raises `UnknownName` for a name that is no runtime's.
    """
    known = plugins.names("runtimes")
    for name in runtimes:
        if name not in known:
            raise UnknownName("runtime", name, known)
    machine = environment.capture()
    with TemporaryDirectory() as folder:
        with progress("write a small network in every precision", None):
            graphs = dict(_graphs(Path(folder)))
        found = []
        for name in runtimes or known:
            with progress(f"try {name}", None):
                found.append(_examine(name, graphs, Path(folder)))
    return Diagnosis(
        tool=TOOL,
        cpu=machine["cpu"],
        cores=usable_cores(),
        native=environment.native_precisions(),
        runtimes=tuple(found),
    )


def require(diagnosis: Diagnosis) -> None:
    """Raise `RuntimeMissing` for the first runtime that cannot run here."""
    for found in diagnosis.runtimes:
        if not found.ready:
            raise RuntimeMissing(
                f"the runtime {found.runtime!r} cannot run here: {found.run or found.failed}",
                hint=found.remedy,
            )


def _examine(name: str, graphs: Mapping[str, OnnxModel | str], folder: Path) -> Checkup:
    runtime = plugins.load_runtime(name, {})
    identity = runtime.identify()
    build, run = runtime.missing("build"), runtime.missing("run")
    reason = run or build
    found: dict[str, Any] = {
        "runtime": name,
        "version": identity and identity.version,
        "device": identity and identity.device,
        "build": build,
        "run": run,
        "remedy": plugins.remedy(name, reason) if reason else None,
    }
    if reason:
        return Checkup(**found)
    source = graphs["fp32"]
    assert isinstance(source, OnnxModel)  # it is not converted
    try:
        error = _answer(runtime, source, folder)
    except ExportError as refusal:
        return Checkup(**{**found, "device": None}, failed=str(refusal))
    if not error <= LIMIT:
        said = f"its answer in FP32 is off by {error:.1e} of it, where {LIMIT:.0e} is allowed"
        return Checkup(**found, error=error, failed=said)
    trials = tuple(_try(runtime, precision, graph, folder) for precision, graph in graphs.items())
    return Checkup(**found, error=error, trials=trials)


def _answer(runtime: Runtime, model: OnnxModel, folder: Path) -> float:
    """Return how far the outputs are from those in float64, as relative L2."""
    import numpy as np
    import onnx

    from exporter.emulation import Emulator, emulate

    x = _samples(3)
    emulator = Emulator.of(onnx.load(model.path))
    want = emulate(emulator, iter([{INPUT.name: x}]), "exact")[OUTPUT.name]
    with runtime.open(runtime.build(model, folder)) as session:
        got = session({INPUT.name: x})[OUTPUT.name]
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _try(runtime: Runtime, precision: str, model: OnnxModel | str, folder: Path) -> Trial:
    """Return in which types the layers of one graph ran."""
    if isinstance(model, str):
        return Trial(precision, refused=model)
    try:
        execution = runtime.executed(model, runtime.build(model, folder))
    except ExportError as error:
        return Trial(precision, refused=str(error))
    return _trial(precision, execution)


def _trial(precision: str, execution: Execution | None) -> Trial:
    if execution is None:
        return Trial(precision)
    if execution.unknown:
        return Trial(precision, refused=execution.unknown)
    counts = execution.counts.values()
    other = next(iter((*execution.missed, *execution.untold)), None)
    return Trial(
        precision,
        asked=sum(total for _, total in counts),
        ran=sum(ran for ran, _ in counts),
        reason=None if other is None else other.reason,
    )


# ── The small network ───────────────────────────────────────────────────────────────


def _graphs(folder: Path) -> Iterator[tuple[str, OnnxModel | str]]:
    """Yield the network in every precision, or why it cannot be had in it."""
    import onnx

    from exporter.calibration import calibrate

    graph, samples = network(), _samples(16)
    statistics = calibrate(graph, [{INPUT.name: samples}])
    for name in plugins.names("precisions"):
        plain = {k: v for k, v in _PLAIN.items() if k in plugins.options_of("precisions", name)}
        for form in _FORMS.get(name, ({},)):
            label = " ".join([name, *(f"({key} = {value})" for key, value in form.items())])
            precision = plugins.load_precision(name, {**plain, **form})
            try:
                made = precision.convert(graph, statistics, samples).model
            except ExportError as error:
                yield label, str(error)
                continue
            path = folder / f"{name}{len(form) or ''}.onnx"
            onnx.save(made, path)
            yield label, OnnxModel(path, name, INPUT, OUTPUT, BatchRange(1, 1, 8))


def network() -> onnx.ModelProto:
    """Return two convolutions, a residual sum, an average and a linear layer, of fixed weights."""
    import numpy as np
    import onnx
    from onnx import helper

    draw = np.random.RandomState(0).standard_normal
    weights = {
        "conv1.weight": draw((4, 4, 3, 3)) / 6,
        "conv1.bias": draw(4) / 4,
        "conv2.weight": draw((4, 4, 3, 3)) / 6,
        "conv2.bias": draw(4) / 4,
        "linear.weight": draw((4, 4)) / 2,
        "linear.bias": draw(4) / 4,
    }

    def node(op: str, reads: Sequence[str], writes: str, name: str, **options: Any) -> Any:
        return helper.make_node(op, reads, [writes], name, **options)

    spread = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        node("Conv", [INPUT.name, "conv1.weight", "conv1.bias"], "a", "conv1", **spread),
        node("Relu", ["a"], "b", "relu1"),
        node("Conv", ["b", "conv2.weight", "conv2.bias"], "c", "conv2", **spread),
        node("Add", ["c", "b"], "d", "sum"),
        node("Relu", ["d"], "e", "relu2"),
        node("GlobalAveragePool", ["e"], "f", "pool"),
        node("Flatten", ["f"], "g", "flatten"),
        node("Gemm", ["g", "linear.weight", "linear.bias"], OUTPUT.name, "linear", transB=1),
    ]
    single = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(INPUT.name, single, ["batch", *INPUT.shape])],
        [helper.make_tensor_value_info(OUTPUT.name, single, ["batch", *OUTPUT.shape])],
        [onnx.numpy_helper.from_array(v.astype("float32"), k) for k, v in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _samples(count: int) -> Array:
    from exporter.samples import noise

    return noise(INPUT.shape, count=count, seed=0)
