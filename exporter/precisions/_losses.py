"""What it costs to store weights that lie below half's normal range, measured at the outputs.

A channel of tiny weights loses bits, or all it has. In a dead channel that moves nothing; where a
later layer scales it up, it moves everything. So the FP32 graph is run on calibration samples, once
as it is and once with those weights rounded, and the outputs are compared: what moves them by no
more than half's unit roundoff moves them no more than half does anyway.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from exporter.onnx_edits import replace_constants
from exporter.packing import inputs_of_graph, unpack
from exporter.precisions._floats import Half
from exporter.records import Array

if TYPE_CHECKING:
    import onnx

_SAMPLES = 8


class Moved(NamedTuple):
    """The nodes to keep in FP32, with the reason, and what there is to say of the others."""

    kept: dict[int, str]
    notes: tuple[str, ...]


def outputs_moved(
    model: onnx.ModelProto,
    lossy: Mapping[int, Collection[str]],
    samples: Array | None,
    half: Half,
) -> Moved:
    """Return which nodes' factors, named in ``lossy``, must not be rounded to half.

    Without samples it is all of them.
    """
    if not lossy:
        return Moved({}, ())
    nodes = model.graph.node
    if samples is None or not len(samples):
        why = f"a channel loses more bits below {half.name}'s normal range than rounding costs"
        return Moved(dict.fromkeys(lossy, f"{why} ({half.normal:.2g})"), ())
    few = samples[:_SAMPLES]
    want = _outputs(model, few)

    def off(names: Collection[str]) -> float:
        return _distance(_outputs(_rounded(model, names, half), few), want)

    kept: dict[int, str] = {}
    if not off({name for names in lossy.values() for name in names}) <= half.roundoff:
        for index, names in lossy.items():
            if not (moved := off(names)) <= half.roundoff / len(lossy):
                kept[index] = (
                    f"a channel loses bits below {half.name}'s normal range ({half.normal:.2g}), "
                    f"which moves the outputs by {moved:.1e}"
                )
    rest = {index: names for index, names in lossy.items() if index not in kept}
    if not rest:
        return Moved(kept, ())
    layers = ", ".join(nodes[index].name or nodes[index].op_type for index in rest)
    moved = off({name for names in rest.values() for name in names})
    return Moved(
        kept,
        (
            f"channels of {layers} lose bits below {half.name}'s normal range, which moves the "
            f"outputs of {len(few)} samples by {moved:.1e} at most",
        ),
    )


def _rounded(model: onnx.ModelProto, names: Collection[str], half: Half) -> onnx.ModelProto:
    import onnx

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    constants = {t.name: t for t in changed.graph.initializer if t.name in names}
    rounded = {n: half.rounded(onnx.numpy_helper.to_array(t)) for n, t in constants.items()}
    replace_constants(changed.graph, rounded)
    return changed


def _outputs(model: onnx.ModelProto, samples: Array) -> list[Array]:
    """Return each output for each sample; every sample runs alone."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    inputs = inputs_of_graph(model)
    return [
        part.ravel()
        for sample in samples
        for part in session.run(None, unpack(sample[None], inputs))
    ]


def _distance(got: list[Array], want: list[Array]) -> float:
    """Return ‖got − want‖ / ‖want‖ of the sample and output where it is largest."""
    import numpy as np

    sides = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(got, want, strict=True)]
    found = [np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 2.0**-126) for a, b in sides]
    return float(np.max(found))
