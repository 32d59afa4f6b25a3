"""Does an artefact compute the graph that was asked for? Gates that follow from arithmetic.

Two comparisons, both with an emulation of the graph *asked for* (`exporter.emulation`), which is
made anew from the PyTorch network and not read from the artefact:

    end to end      ‖y − r‖ / ‖r‖   ≤  LIMIT · ‖n − e‖ / ‖e‖
    layer by layer  rms(y − f(x))   ≤  LIMIT · rms(σ(x))           per channel, of what adds up
                    |y − f(x)|      ≤  LIMIT · σ(x)                per element, of what does not

y are the artefact's outputs, r the reference's, e those of the graph in exact arithmetic and n with
the noise that rounding to the declared types must cause, so that ‖n − e‖ is what the declared
precision must lose, at worst. Layer by layer, f is one node of the graph asked for, x what the
*artefact* gave its inputs, and σ² the variance of that one node's own rounding; so nothing adds up,
and a single channel that is a little off stands out. The first layer beyond the limit is where the
artefact leaves the graph.

LIMIT is 4. The noise is one standard deviation of the worst order of summation, and figures are
taken over many values, so an honest artefact stays near or below 1; in 3,000 honest runs the worst
was 1.9 end to end, and 3.3 in a channel of one value (`make mutation`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporter.emulation import Emulator, Step, Values
from exporter.emulation.grids import LIMITS, spacing
from exporter.emulation.rounding import BFLOAT16, BOUNDED, FLOAT, ROUNDOFF, held
from exporter.records import Array, Fidelity, LayerError, Outputs, TopK
from exporter.topk import REACH, places

if TYPE_CHECKING:
    import onnx

LIMIT = 4.0
_UNREADABLE = {BFLOAT16, 18, 19, 20}  # onnx.TensorProto: FLOAT8E4M3FNUZ, E5M2, E5M2FNUZ
_SMALLEST = 2.0**-149  # float32's smallest number: no error is taken for smaller than that


def expose(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph that gives every tensor it computes, beside its outputs.

    But for those in bfloat16 or an FP8 other than E4M3, which onnxruntime cannot hand over.
    """
    import onnx

    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    known = {value.name for value in model.graph.output}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    infos = inferred.value_info
    types = {v.name: v for v in infos if v.type.tensor_type.elem_type not in _UNREADABLE}
    for node in model.graph.node:
        for name in node.output:
            if name in types and name not in known:
                exposed.graph.output.append(types[name])
                known.add(name)
    return exposed


def unreadable(model: onnx.ModelProto) -> str | None:
    """Return why a graph's layers cannot be compared, or None: a tensor that `expose` leaves out.

    What stands in for one is not rounded, so that its reader would seem to be off.
    """
    import onnx

    for value in onnx.shape_inference.infer_shapes(model).graph.value_info:
        kind = value.type.tensor_type.elem_type
        if kind in _UNREADABLE:
            return f"tensors in {onnx.TensorProto.DataType.Name(kind)} cannot be read out"
    return None


def compare_layers(
    asked: Emulator, found: Mapping[str, Array], *, quantising: bool = False
) -> Iterator[LayerError]:
    """Yield every node's own error, in running order, on the artefact's own tensors.

    ``found`` has the artefact's inputs and whatever of its tensors it gives, by the names of the
    graph asked for. A tensor that it does not give is what the graph asked for makes of those it
    gives. With ``quantising`` the tensors are those of the graph before it was quantised, and a
    layer's error may be what its steps explain. A tensor of another shape is the last that can be
    compared. Raises `GraphError` if a node cannot be emulated.
    """
    known: Values = {name: _as_tensor(value) for name, value in found.items()}
    absent: dict[str, Step] = {}
    with torch.inference_mode():
        for step in asked.steps:
            inputs = [asked.value(name, known) for name in step.reads]
            for name, want in asked.compute(step, inputs).items():
                if name not in found:
                    known[name] = want
                    absent[name] = step
                elif want.is_floating_point():
                    got = known[name]
                    error = _error(asked, step, name, inputs, want, got, quantising=quantising)
                    lost = [name for name in step.reads if name in absent]
                    if lost and error.exceeds(LIMIT) and not quantising:
                        error = _missing(asked, absent[lost[0]], lost[0], error)
                    yield error
                    if got.shape != want.shape:
                        return


def first_deviation(errors: Sequence[LayerError], *, limit: float = LIMIT) -> LayerError | None:
    """Return the first layer whose error its precision does not explain."""
    return next((error for error in errors if error.exceeds(limit)), None)


def judge_outputs(
    reference: Outputs,
    candidate: Outputs,
    *,
    exact: Outputs | None,
    noisy: Outputs | None,
    against: str,
    layers: Sequence[LayerError] = (),
    unseen: str | None = None,
    top: TopK | None = None,
) -> Fidelity:
    """Return the verdict on one artefact; all arrays (samples, values) float64, by output.

    ``reference`` is what the candidate is compared with, ``against`` its name; ``exact`` and
    ``noisy`` are the two emulations whose distance is the noise floor, None where there are none.
    Each output is held to its own floor, and the figures are those of the one that is worst off.
    ``unseen`` says why there is no comparison, or none layer by layer. With ``top`` the candidate
    gives the largest scores, and as far as the scores may be off, they may (`exporter.topk`).
    """
    placed = {name: places(top, name, want, candidate) for name, want in reference.items()}
    floors = {
        name: None
        if noisy is None or exact is None
        else _floor(top, name, placed[name][0], exact[name], noisy[name])
        for name in reference
    }
    found = [
        Fidelity(
            against=against,
            samples=len(want),
            error=distance(got, want),
            floor=floors[name],
            limit=LIMIT,
            nonfinite=_nonfinite(got) + _nonfinite(want),
            layers=len(layers),
            worst=max(layers, key=lambda error: error.size, default=None),
            first=first_deviation(layers),
            unseen=unseen,
            output=name if len(reference) > 1 else None,
        )
        for name, (want, got) in placed.items()
    ]
    return max(found, key=_badness)


def _floor(top: TopK | None, name: str, want: Array, exact: Array, noisy: Array) -> float | None:
    """Return how far rounding may move an output, relative to ``want`` where that is of a top-k."""
    import numpy as np

    found = distance(noisy, exact)
    if found is None or top is None or name != top.scores.name:
        return found
    size, whole = (float(np.linalg.norm(side)) for side in (want, exact))
    return REACH * found * (whole or 1.0) / size if size else None


def _badness(found: Fidelity) -> tuple[int, float]:
    """Return what orders outputs: values that are not finite, then how far beyond its floor."""
    return found.nonfinite, math.inf if found.multiple is None else found.multiple


def _nonfinite(values: Array) -> int:
    import numpy as np

    return int((~np.isfinite(values)).sum())


def farthest(distances: Iterable[float | None]) -> float | None:
    """Return the largest of some distances, None if one of them is of values not finite."""
    found = list(distances)
    finite = [off for off in found if off is not None]
    return max(finite) if len(finite) == len(found) else None


def distance(one: Array, other: Array) -> float | None:
    """Return ‖one − other‖ / ‖other‖, or ‖one‖ where that is 0; None if a value is not finite."""
    import numpy as np

    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return None
    scale = max(float(np.abs(other).max()), float(np.abs(one).max()), _SMALLEST)
    size = float(np.linalg.norm(other / scale))
    off = float(np.linalg.norm((one - other) / scale))
    return off / size if size else off * scale


def layer_name(asked: Emulator, step: Step) -> str:
    """Return a node's layer as the PyTorch module calls it; Q/DQ pairs are their reader's."""
    if step.op in ("QuantizeLinear", "DequantizeLinear"):
        readers = (other for other in asked.steps if step.writes[0] in other.reads)
        if (reader := next(readers, None)) is not None:
            return layer_name(asked, reader)
    return step.name.partition("/")[0]


def _missing(asked: Emulator, step: Step, tensor: str, seen: LayerError) -> LayerError:
    """Return a reader's error as that of the node that is not there."""
    return LayerError(
        layer=layer_name(asked, step),
        op=step.op,
        tensor=tensor,
        multiple=None,
        relative=seen.relative,
        detail=f"is missing, which {seen.layer} should read",
    )


def _error(
    asked: Emulator,
    step: Step,
    tensor: str,
    inputs: Sequence[Tensor | None],
    want: Tensor,
    got: Tensor,
    *,
    quantising: bool,
) -> LayerError:
    name = layer_name(asked, step)
    if got.shape != want.shape:
        shapes = " where ".join("×".join(map(str, side.shape)) for side in (got, want))
        return LayerError(name, step.op, tensor, None, None, f"is {shapes} was asked for")
    finite = torch.isfinite(want)
    if bad := int((finite & ~torch.isfinite(got)).sum()):
        return LayerError(name, step.op, tensor, None, None, f"has {bad} values not finite")
    if bad := int((~finite & torch.isfinite(got)).sum()):
        said = f"has {bad} finite values that should not be"
        return LayerError(name, step.op, tensor, None, None, said)
    if step.op == "QuantizeLinear":
        error, spread = _quantisation(asked, step, inputs, got)
    else:
        error, spread = got - want, _spread(asked, step, inputs, want, quantising=quantising)
    error, spread = (torch.where(finite, side, 0.0) for side in (error, spread))
    own = _multiples(error, spread, bounded=step.op in BOUNDED, axis=_channels(asked, step))
    channel = int(own.argmax())
    size = float(want.square().mean().sqrt())
    return LayerError(
        layer=name,
        op=step.op,
        tensor=tensor,
        multiple=float(own.max()),
        relative=float(error.square().mean().sqrt()) / size if size else None,
        detail=f"channel {channel} of {own.numel()}" if own.numel() > 1 else None,
    )


def _spread(
    asked: Emulator,
    step: Step,
    inputs: Sequence[Tensor | None],
    want: Tensor,
    *,
    quantising: bool,
) -> Tensor:
    """Return the standard deviation of what the node may be off by."""
    own = asked.variance(step, inputs, want)
    if own is None:  # it rounds nothing; but what it reads may have been kept wider, and be rounded
        dtype = step.dtype if step.dtype in ROUNDOFF else FLOAT
        own = (ROUNDOFF[dtype] * held(want, dtype)) ** 2
    wider = asked.input_variance(step, inputs)  # and so much again where weights are rounded too
    more = [wider]
    if quantising:
        more += [wider, asked.quantisation_variance(step, inputs)]
    return sum((part for part in more if part is not None), own).sqrt()


def _quantisation(
    asked: Emulator, step: Step, inputs: Sequence[Tensor | None], got: Tensor
) -> tuple[Tensor, Tensor]:
    """Return how far x / s lies outside of the step it was rounded to, and how far it may.

    Values in the middle between two steps fall to either side. FP8's steps are as wide as they are
    around x / s.
    """
    x, scale, *rest = inputs
    assert x is not None
    assert scale is not None
    kind = step.attributes["to"]
    low, high = LIMITS[kind]
    zero = rest[0] if rest and rest[0] is not None else torch.zeros(())
    along = [1] * x.ndim
    if scale.numel() > 1:
        along[step.attributes.get("axis", 1)] = -1
    position = (x / scale.reshape(along) + zero.double().reshape(along)).clamp(low, high)
    width = spacing(position, kind)
    outside = ((position - got).abs() - width / 2).clamp(min=0)
    roundoff = ROUNDOFF.get(asked.dtypes.get(step.reads[0], FLOAT), ROUNDOFF[FLOAT])
    return outside, (position.abs() + width) * (ROUNDOFF[FLOAT] + roundoff)


def _multiples(error: Tensor, spread: Tensor, *, bounded: bool, axis: int) -> Tensor:
    """Return each channel's error in its standard deviations, (channels,) or (1,)."""
    others = [n for n in range(error.ndim) if n != axis] if error.ndim > axis else []
    error, spread = error.abs(), spread.clamp(min=_SMALLEST)
    if bounded:
        own = error / spread
        return (own.amax(dim=others) if others else own.amax()).flatten()
    sides = (side.square() for side in (error, spread))
    rms = [(s.mean(dim=others) if others else s.mean()).sqrt().flatten() for s in sides]
    return rms[0] / rms[1].clamp(min=_SMALLEST)


def _channels(asked: Emulator, step: Step) -> int:
    """Return the channels' axis: the first of weights, the second of activations."""
    return 0 if all(name in asked.constants for name in step.reads) else 1


def _as_tensor(value: Array) -> Tensor:
    import numpy as np

    plain = np.asarray(value)
    kind, size = plain.dtype.kind, plain.dtype.itemsize
    wide = kind in "fV" or (kind in "iu" and size < 4)  # floats, "V" for FP8, and quantised values
    return torch.from_numpy(plain.astype(np.float64) if wide else plain)
