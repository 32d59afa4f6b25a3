"""One artefact before the gate, end to end and layer by layer, as `exporter.ladder` judges it.

A `Case` is a network in one precision: the graph asked for, emulated. A mutant counts as caught if
`Fidelity.verdict` is "fail", or if it cannot be loaded and run at all. It is no mutant if it still
computes the same function: emulated in float64 its outputs are then within 1e-12 of the graph's
own, which is ten thousand times float64's roundoff and a ten-thousandth of float32's, on the
samples that are judged and on as many that are five times as large, so that bounds are reached;
and with halves rounded they are still.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from exporter.calibration import calibrate
from exporter.contracts import Session
from exporter.difference import describe_difference
from exporter.emulation import Emulator, emulate
from exporter.errors import ExportError
from exporter.fidelity import compare_layers, expose, judge_outputs, layer_name
from exporter.fold import fold_batchnorm
from exporter.parity import collect_outputs
from exporter.plugins import load_precision
from exporter.records import Array, BatchRange, Feed, Fidelity, Outputs, TensorSpec
from exporter.reference import TorchSession
from exporter.runtimes._graph import has_float8, has_half_scales
from exporter.runtimes._ort import NOT_FOR_FP8, as_float8
from exporter.samples import feeds
from exporter.to_onnx import export_onnx
from mutation.nets import SHAPE, Net, pictures

INPUT, OUTPUT = TensorSpec("input", SHAPE), TensorSpec("logits", (10,))
PLAIN = {
    "calibrator": "percentile",
    "equalise": False,
    "rounding": False,
    "bias_correction": False,
    "offset": "none",
}
PRECISIONS = {  # without the repairs of INT8, which choose by samples and take seconds a graph
    "fp32": ("fp32", {}),
    "fp16": ("fp16", {}),
    "int8": ("int8", PLAIN),
    "int8 around fp16": ("int8", {**PLAIN, "around": "fp16"}),
    "int8-weights": ("int8-weights", {}),
    "fp8": ("fp8", {}),
    "fp8 around fp16": ("fp8", {"around": "fp16"}),
}
JUDGED, LAYERED = 12, 8  # samples, as many as the ladder takes
SAME = 1e-12


@dataclass(frozen=True, slots=True)
class Truth:
    """What the graph asked for gives on some inputs; arrays are (samples, 10) float64."""

    inputs: Array
    reference: Array
    exact: Array
    noisy: Array
    against: str


@dataclass(frozen=True, slots=True)
class Case:
    """A network in one precision: ``model`` is ``source``, the FP32 graph, as `convert` makes it.

    ``wild`` is what it gives for five times the inputs.
    """

    net: Net
    precision: str
    source: onnx.ModelProto
    statistics: Mapping[str, Any]
    model: onnx.ModelProto
    emulator: Emulator
    truth: Truth
    wild: Array

    def convert(self, source: onnx.ModelProto) -> onnx.ModelProto:
        """Return an FP32 graph in this precision; tensors that are new to it are calibrated."""
        try:
            return convert(source, self.precision, self.statistics)
        except KeyError:
            found = calibrate(source, feeds(self.net.calibration, INPUT.name, size=1))
            return convert(source, self.precision, {**found, **self.statistics})

    def layers(self, mutant: onnx.ModelProto) -> frozenset[str]:
        """Return the layers that a mutant has otherwise than the graph asked for."""
        return frozenset(
            layer_name(self.emulator, step)
            for step in self.emulator.steps
            if any(describe_difference(self.model, mutant, name) for name in step.writes)
        )

    def draw(self, seed: int) -> Truth:
        """Return the truth on inputs of a seed."""
        inputs = pictures(JUDGED, seed=seed)
        exact, noisy = (_emulated(self.emulator, inputs, kind) for kind in ("exact", "noisy"))
        if self.emulator.rounds_to_half:
            rounded = _emulated(self.emulator, inputs, "rounded")
            return Truth(inputs, rounded, exact, noisy, "the graph with rounding emulated")
        if self.emulator.quantises:
            return Truth(inputs, exact, exact, noisy, "the graph in float64")
        double = TorchSession.of(self.net.module, OUTPUT.name, double=True)
        return Truth(inputs, double({"input": inputs})["logits"], exact, noisy, "PyTorch float64")

    def same(self, mutant: onnx.ModelProto) -> bool:
        """Return whether a mutant computes the function that was asked for."""
        try:
            emulator = Emulator.of(mutant)
            pairs = [
                (_emulated(emulator, self.truth.inputs, "exact"), self.truth.exact),
                (_emulated(emulator, 5 * self.truth.inputs, "exact"), self.wild),
            ]
            if self.emulator.rounds_to_half:
                pairs.append(
                    (_emulated(emulator, self.truth.inputs, "rounded"), self.truth.reference)
                )
        except (ExportError, RuntimeError, ValueError, IndexError, KeyError):
            return False  # what has no meaning is not the same
        return all(
            one.shape == other.shape and np.abs(one - other).max() <= SAME * np.abs(other).max()
            for one, other in pairs
        )


def cases(net: Net, precisions: Mapping[str, Any] | tuple[str, ...] = ()) -> Iterator[Case]:
    """Yield the network in each precision, all of them unless some are named."""
    folded = fold_batchnorm(net.module, torch.zeros(1, *SHAPE)).module
    source = export(folded)
    statistics = calibrate(source, feeds(net.calibration, INPUT.name, size=1))
    for precision in precisions or PRECISIONS:
        model = convert(source, precision, statistics)
        emulator = Emulator.of(model)
        known = (net, precision, source, statistics, model, emulator)
        truth = Case(*known, _NOTHING, _NOTHING.exact).draw(seed=1)
        yield Case(*known, truth, _emulated(emulator, 5 * truth.inputs, "exact"))


def convert(
    source: onnx.ModelProto, precision: str, statistics: Mapping[str, Any]
) -> onnx.ModelProto:
    """Return an FP32 graph in a precision, as the tool converts it."""
    name, options = PRECISIONS[precision]
    return load_precision(name, options).convert(source, statistics, np.empty(0)).model


def export(module: torch.nn.Module) -> onnx.ModelProto:
    """Return a network as the FP32 graph that the tool writes."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "net.onnx")
        export_onnx(module, path, input=INPUT, output=OUTPUT, batch=BatchRange(1, 8, 32))
        return onnx.load(path)


def open_session(
    model: onnx.ModelProto, *, optimise: bool = True, threads: int = 1, as_written: bool = True
) -> Session:
    """Load a graph as the runtime ort-cpu does, at one of ONNX Runtime's optimisation extremes.

    ``as_written=False`` leaves out what ort-cpu sets for graphs whose quantisation scales are half,
    or that have FP8.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    levels = ort.GraphOptimizationLevel
    level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    options.graph_optimization_level = level
    disabled = list(NOT_FOR_FP8) if as_written and has_float8(model.graph) else []
    if as_written and (has_half_scales(model.graph) or has_float8(model.graph)):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    data = model.SerializeToString()
    session = ort.InferenceSession(
        data, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )
    names = [output.name for output in session.get_outputs()]
    kinds = [output.type for output in session.get_outputs()]

    def run(feed: Feed) -> Outputs:
        found = map(as_float8, session.run(names, dict(feed)), kinds)
        return dict(zip(names, found, strict=True))

    return run


def judge(case: Case, mutant: onnx.ModelProto, *, as_written: bool = True) -> Fidelity | str:
    """Return the gate's verdict on a file, or why it cannot be loaded and run."""
    inputs = case.truth.inputs
    try:
        whole = open_session(mutant, as_written=as_written)({"input": inputs})
        every = open_session(expose(mutant), as_written=as_written)({"input": inputs[:LAYERED]})
        candidate = collect_outputs(
            lambda _: whole, [{"input": inputs}], OUTPUT.name, samples=JUDGED
        )
    except ExportError as error:
        return str(error)
    except Exception as error:  # onnxruntime raises one private class per status code
        if type(error).__module__.partition(".")[0] != "onnxruntime":
            raise
        return f"onnxruntime refused it: {str(error).splitlines()[0]}"
    if candidate.shape != case.truth.reference.shape:
        return f"it gives {candidate.shape} where {case.truth.reference.shape} was asked for"
    found = {"input": inputs[:LAYERED], **every}
    return verdict(case, case.truth, candidate, found)


def verdict(case: Case, truth: Truth, candidate: Array, found: Mapping[str, Array]) -> Fidelity:
    """Return the gate's verdict on outputs, and on tensors by name."""
    return judge_outputs(
        {OUTPUT.name: truth.reference},
        {OUTPUT.name: candidate},
        exact={OUTPUT.name: truth.exact},
        noisy={OUTPUT.name: truth.noisy},
        against=truth.against,
        layers=tuple(compare_layers(case.emulator, found)) if found else (),
    )


def _emulated(emulator: Emulator, inputs: Array, kind: Any) -> Array:
    batches = feeds(inputs, emulator.inputs[0], size=len(inputs))
    return emulate(emulator, batches, kind)[OUTPUT.name]


_NOTHING = Truth(*[np.zeros((0, 10))] * 4, "nothing")
