"""The k largest scores and their labels, at the end of a graph, and how the two are judged.

    graph ── scores (N, C) ── TopK ─┬─ values v (N, k), the largest first
                                    └─ labels l (N, k)

With r a reference's scores and r₍ᵢ₎ the i-th largest of a sample, place i should have the value
r₍ᵢ₎ and the label of that score. Where two scores are nearly equal, either label is right, so a
label is judged by the reference's own score of it; and of the two what is farther off counts:

    dᵢ = vᵢ − r₍ᵢ₎   or   r[lᵢ] − r₍ᵢ₎        whichever is larger in magnitude

If the scores y that an artefact sorts are near r, so are both. Sorting moves no two vectors further
apart, in any norm (G. Hardy, J. Littlewood, G. Pólya, "Inequalities", 1934, ch. X), and with l the
order of y, over all samples,

    ‖v − r₍₎‖     = ‖y₍₎ − r₍₎‖                        ≤ ‖y − r‖
    ‖r[l] − r₍₎‖  ≤ ‖r[l] − y[l]‖ + ‖y₍₎ − r₍₎‖         ≤ 2 ‖y − r‖
    ‖d‖           ≤ √(1 + 2²) · ‖y − r‖                                                 (reach)

So a gate on ‖y − r‖ is one on ‖d‖ that no near tie can miss, while a label that is not one of the
k, in another place or of another axis is off by the difference of the scores. A label that is no
class, or that a sample has twice, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from exporter.contracts import classification
from exporter.errors import GraphError, InputRefused
from exporter.packing import in_words
from exporter.records import Array, Outputs, Postprocess, TensorSpec, TopK

if TYPE_CHECKING:
    import onnx

REACH = 5**0.5
_K = "top_k"  # the constant's name


def choose_top_k(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], after: Postprocess
) -> TopK | None:
    """Return which scores a profile asks the largest of, None if it does not.

    Raises `InputRefused` unless just one output is (N, classes), of so many classes at least, and
    the names of its values and labels are free.
    """
    if after.top_k is None:
        return None
    scores = classification(outputs)
    if scores is None:
        raise InputRefused(
            "postprocess.top_k is of the one output (N, classes), and the network gives N × "
            + in_words(spec.shape for spec in outputs).replace(" and ", " and N × "),
            hint="leave it out",
        )
    (classes,) = scores.shape
    if after.top_k > classes:
        raise InputRefused(
            f"postprocess.top_k is {after.top_k}, and {scores.name!r} has {classes} classes",
            hint=f"at most {classes}",
        )
    found = TopK(scores, after.top_k)
    taken = {spec.name for spec in (*inputs, *outputs)}
    if twice := sorted(taken & {found.values.name, found.labels.name}):
        raise InputRefused(
            f"postprocess.top_k would give {twice[0]!r}, and the network has a tensor called so",
            hint="give that another key",
        )
    return found


# ── In a graph ──────────────────────────────────────────────────────────────────────


def with_top_k(model: onnx.ModelProto, top: TopK) -> onnx.ModelProto:
    """Return a copy of a graph that ends in ONNX's TopK: its scores stay a tensor inside.

    Labels are INT64 whatever type the scores have. Equal scores are in the order of their classes.
    """
    import onnx

    made = type(model)()
    made.CopyFrom(model)
    graph = made.graph
    own = [top.values.name, top.labels.name]
    _free(graph, {*own, _K})
    kept = [type(value).FromString(value.SerializeToString()) for value in graph.output]
    (scores,) = (value for value in kept if value.name == top.scores.name)
    graph.initializer.append(onnx.helper.make_tensor(_K, onnx.TensorProto.INT64, [1], [top.k]))
    node = onnx.helper.make_node("TopK", [scores.name, _K], own, "TopK", axis=1)
    graph.node.append(node)
    del graph.output[:]
    for value in kept:
        graph.output.extend(_ends(scores, top) if value is scores else [value])
    return made


def _ends(scores: onnx.ValueInfoProto, top: TopK) -> list[onnx.ValueInfoProto]:
    """Return what is declared of values and labels, with the batch axis of the scores."""
    import onnx

    found = []
    for spec in (top.values, top.labels):
        value = type(scores).FromString(scores.SerializeToString())
        value.name = spec.name
        value.type.tensor_type.shape.dim[1].dim_value = top.k
        if spec.dtype == "int64":
            value.type.tensor_type.elem_type = onnx.TensorProto.INT64
        found.append(value)
    return found


def _free(graph: onnx.GraphProto, names: set[str]) -> None:
    """Give tensors and nodes inside a graph that are called so another name."""
    known = {name for node in graph.node for name in (*node.input, *node.output)}
    known |= {tensor.name for tensor in graph.initializer}
    renamed = {}
    for name in sorted(known & names):
        free = name
        while free in known | names:
            free += "_"
        renamed[name] = free
    for tensor in (*graph.initializer, *graph.value_info):
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in graph.node:
        for side in (node.input, node.output):
            side[:] = [renamed.get(name, name) for name in side]
        if node.name == "TopK":
            node.name = "TopK_"


# ── Judged ──────────────────────────────────────────────────────────────────────────


class Seen(NamedTuple):
    """What places should have and what they have, (N, k) float64, and each side's first label.

    ``undecided`` are the samples whose largest score the reference has more than once.
    """

    want: Array
    got: Array
    first_want: Array
    first_got: Array
    undecided: Array


def see(top: TopK, scores: Array, found: Outputs) -> Seen:
    """Return what was found, as values and labels or as scores, against a reference's scores.

    ``scores`` are (N, classes) float64. Raises `GraphError` for labels that are no classes, or
    that a sample has twice.
    """
    import numpy as np

    order = _order(scores, top.k)
    want = np.take_along_axis(scores, order, axis=1)
    if top.labels.name in found:
        values, labels = found[top.values.name], _labels(top, found[top.labels.name])
    else:
        labels = _order(found[top.scores.name], top.k)
        values = np.take_along_axis(found[top.scores.name], labels, axis=1)
    if values.shape != want.shape or labels.shape != want.shape:
        raise GraphError(f"cannot compare top-k of shape {values.shape} with {want.shape}")
    chosen = np.take_along_axis(scores, labels, axis=1)
    with np.errstate(invalid="ignore"):  # of what is infinite on both sides
        is_label = np.abs(chosen - want) > np.abs(values - want)
    undecided = (scores == want[:, :1]).sum(axis=1) > 1
    return Seen(want, np.where(is_label, chosen, values), order[:, 0], labels[:, 0], undecided)


def places(top: TopK | None, name: str, reference: Array, found: Outputs) -> tuple[Array, Array]:
    """Return what is compared of an output: its values, or what the places of a top-k have.

    ``reference`` is what it should be. Raises `GraphError` as `see`.
    """
    if top is None or name != top.scores.name:
        return reference, found[name]
    seen = see(top, reference, found)
    return seen.want, seen.got


def _order(scores: Array, k: int) -> Array:
    """Return the classes of the k largest scores, equal ones in the order of their classes."""
    import numpy as np

    found: Array = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return found


def _labels(top: TopK, found: Array) -> Array:
    """Return labels as indices."""
    import numpy as np

    (classes,), name = top.scores.shape, top.labels.name
    with np.errstate(invalid="ignore"):  # of NaN, which is no integer
        labels = found.astype(np.int64)
    if bad := np.argwhere((labels < 0) | (labels >= classes) | (labels != found)).tolist():
        row, place = bad[0]
        raise GraphError(
            f"the output {name!r} has the label {found[row, place]:g} for sample {row}, and there "
            f"are {classes} classes"
        )
    ordered = np.sort(labels, axis=1)
    if bad := np.argwhere(ordered[:, 1:] == ordered[:, :-1]).tolist():
        row, place = bad[0]
        raise GraphError(
            f"the output {name!r} has the label {ordered[row, place]} twice for sample {row}"
        )
    return labels
