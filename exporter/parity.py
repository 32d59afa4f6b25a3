"""How far a candidate is from what PyTorch computes, and whether the two can be compared at all.

`exporter.records.Parity` has the formulas. Both sides' outputs are compared in float64; a value
that is not finite, on either side, is a failure whatever the other figures say, since argmax of
NaN "agrees" with argmax of NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from exporter.contracts import Advance
from exporter.errors import GraphError
from exporter.records import Array, Feed, Outputs, Parity, TensorSpec, Tolerance

if TYPE_CHECKING:
    import onnx


def collect_outputs(
    session: Callable[[Feed], Outputs],
    feeds: Iterable[Feed],
    output: str,
    *,
    samples: int,
    advance: Advance = lambda: None,
) -> Array:
    """Run every feed and return the named output: `collect_all` of it alone."""
    return collect_all(session, feeds, (output,), samples=samples, advance=advance)[output]


def collect_all(
    session: Callable[[Feed], Outputs],
    feeds: Iterable[Feed],
    outputs: Sequence[str],
    *,
    samples: int,
    advance: Advance = lambda: None,
) -> dict[str, Array]:
    """Run every feed and return the named outputs of the first ``samples``, (samples, values).

    What comes back is float64; ``advance`` is called after each feed.

    Raises `GraphError` if the session has no output of a name, or one without a row for each
    sample of the batch, each as long as those before it.
    """
    import numpy as np

    parts: dict[str, list[Array]] = {name: [] for name in outputs}
    for feed in feeds:
        found = session(feed)
        for name, rows in parts.items():
            if name not in found:
                raise GraphError(f"no output named {name!r}, only {', '.join(map(repr, found))}")
            rows.append(_rows(name, found[name], len(next(iter(feed.values())))))
            if rows[-1].shape[1:] != rows[0].shape[1:]:
                raise GraphError(
                    f"the output {name!r} has {rows[-1].shape[1]} values a sample, and had "
                    f"{rows[0].shape[1]} before"
                )
        advance()
    return {name: np.concatenate(rows)[:samples] for name, rows in parts.items()}


def _rows(name: str, found: Array, size: int) -> Array:
    """Return an output for a batch of a size as (size, values) float64. Raises `GraphError`."""
    import numpy as np

    value = np.asarray(found, dtype=np.float64)
    if value.shape[:1] != (size,) or not value.size:
        raise GraphError(f"the output {name!r} is {value.shape} for a batch of {size}")
    return value.reshape(size, -1)


def check_same_interface(
    graph: onnx.GraphProto,
    name: str,
    *,
    input: TensorSpec,
    more_inputs: Sequence[TensorSpec] = (),
    output: TensorSpec,
    more_outputs: Sequence[TensorSpec] = (),
    dtypes: Collection[str] = ("float32",),
) -> None:
    """Raise `GraphError` unless a graph declares the reference's inputs and outputs, and no others.

    The batch axis may be free or fixed, every other is as it is there, and the type must be one of
    ``dtypes`` where the reference has float32; ``name`` is what the error calls the graph.
    """
    stored = {tensor.name for tensor in graph.initializer}
    taken = [value for value in graph.input if value.name not in stored]
    inputs, outputs = (input, *more_inputs), (output, *more_outputs)
    for verb, values, specs in (("takes", taken, inputs), ("gives", graph.output, outputs)):
        found = " and ".join(_declared(value) for value in values) or "nothing"
        wanted = {_asked(specs, dtype) for dtype in dtypes}
        if found not in wanted:
            reference = _asked(specs, " or ".join(dtypes))
            raise GraphError(f"{name} {verb} {found}, and the reference {verb} {reference}")


def _asked(specs: Iterable[TensorSpec], dtype: str) -> str:
    """Return what a reference has in words, in that type where it has float32."""
    return " and ".join(
        _named(
            spec.name,
            ("N", *_axes(spec)),
            dtype if spec.dtype == "float32" else spec.dtype,
        )
        for spec in specs
    )


def _axes(spec: TensorSpec) -> Iterator[str]:
    """Yield each axis as `_declared` has it."""
    names = {axis.axis: repr(axis.name) for axis in spec.free}
    for axis, size in enumerate(spec.shape):
        yield names.get(axis, str(size))


def _declared(value: onnx.ValueInfoProto) -> str:
    """Return a graph's input or output in words, with N for its batch axis whatever that is."""
    import onnx

    if not value.type.HasField("tensor_type"):
        return f"{value.name!r}, which is no tensor"
    tensor = value.type.tensor_type
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    if not tensor.HasField("shape"):
        return f"{value.name!r} of unknown shape"
    axes = [
        str(axis.dim_value) if axis.HasField("dim_value") else repr(axis.dim_param)
        for axis in tensor.shape.dim
    ]
    return _named(
        value.name,
        ("N", *axes[1:]) if axes else ("no axes",),
        {"float": "float32", "double": "float64"}.get(kind, kind),
    )


def _named(name: str, axes: Iterable[str], dtype: str) -> str:
    return f"{name!r} {'×'.join(axes)} {dtype}"


class Firsts(NamedTuple):
    """Each side's first class, (samples,), where the arrays compared are not of all classes.

    ``undecided`` are the samples for which the reference has more than one.
    """

    reference: Array
    candidate: Array
    undecided: Array


def compare_outputs(
    reference: Array,
    candidate: Array,
    *,
    inputs: str,
    tolerance: Tolerance = Tolerance(),  # noqa: B008 - frozen
    labels: Array | None = None,
    noise_floor: float | None = None,
    output: str | None = None,
    has_classes: bool = True,
    firsts: Firsts | None = None,
) -> Parity:
    """Return the distance between two arrays of one output, both (samples, values).

    ``labels`` (samples,) adds accuracy; without them, say on noise, one class alone is no lack.
    ``noise_floor``, the float32 reference's own relative error, adds the error as a multiple of it.
    ``output`` names one of several, and without ``has_classes`` there are no figures of classes,
    which are of the largest values, or of ``firsts``; with those no margin is known.
    Raises `GraphError` if the shapes differ or are empty.
    """
    import numpy as np

    want = np.asarray(reference, dtype=np.float64)
    got = np.asarray(candidate, dtype=np.float64)
    if want.shape != got.shape or want.ndim != 2 or not want.size:
        raise GraphError(f"cannot compare outputs of shape {got.shape} with {want.shape}")
    if labels is not None and labels.shape != want.shape[:1]:
        raise GraphError(f"cannot compare {len(want)} samples with labels of shape {labels.shape}")
    bad_want, bad_got = (int((~np.isfinite(side)).sum()) for side in (want, got))
    finite = not (bad_want or bad_got)
    top_want, top_got, undecided = firsts or Firsts(
        want.argmax(axis=1), got.argmax(axis=1), _undecided(want)
    )
    same = (top_want == top_got) & ~undecided
    told = finite and labels is not None
    right, still = top_want == labels, top_got == labels
    decides = finite and has_classes
    return Parity(
        output=output,
        inputs=inputs,
        samples=len(want),
        max_abs=_largest_error(want, got) if finite else None,
        rel_l2=_relative_error(want, got) if finite else None,
        cosine=_smallest_cosine(want, got) if finite else None,
        margin_used=_margin_used(want, got) if decides and firsts is None else None,
        noise_floor=noise_floor,
        agreeing=int(same.sum()) if decides else None,
        undecided=int(undecided.sum()) if has_classes else 0,
        classes=len(np.unique(top_want)) if has_classes else 0,
        labels=None if labels is None else len(np.unique(labels)),
        reference_correct=int(right.sum()) if told else None,
        lost=int((right & ~still).sum()) if told else None,
        gained=int((still & ~right).sum()) if told else None,
        constant=tuple(
            who
            for who, side in (("reference", want), ("candidate", got))
            if len(side) > 1 and (side == side[0]).all()
        ),
        nonfinite_reference=bad_want,
        nonfinite_candidate=bad_got,
        tolerance=tolerance,
    )


def _largest_error(want: Array, got: Array) -> float:
    """Return max |got − want|, or the largest float where that is larger still."""
    import numpy as np

    with np.errstate(over="ignore"):
        return float(np.nan_to_num(np.abs(want - got).max()))


def _relative_error(want: Array, got: Array) -> float | None:
    """Return ‖got − want‖ / ‖want‖, scaled by the largest magnitude so that squares stay finite."""
    import numpy as np

    scale = max(np.abs(want).max(), np.abs(got).max())
    if scale == 0:
        return 0.0
    if scale > np.finfo(float).max / 4:
        return _relative_error(want / 4, got / 4)  # so that no difference overflows
    size = float(np.linalg.norm(want / scale))
    return float(np.linalg.norm((got - want) / scale)) / size if size else None


def _smallest_cosine(want: Array, got: Array) -> float:
    """Return the smallest cosine of one sample's two outputs; of two equal ones it is 1, also 0."""
    import numpy as np

    def unit(side: Array) -> Array:
        side = side / np.maximum(np.abs(side).max(axis=1, keepdims=True), np.finfo(float).tiny)
        norms = np.linalg.norm(side, axis=1, keepdims=True)
        return side / np.where(norms > 0, norms, 1.0)

    cosines = np.einsum("ij,ij->i", unit(want), unit(got))
    cosines[(want == got).all(axis=1)] = 1.0
    return float(cosines.min())


def _undecided(want: Array) -> Array:
    """Return which samples have their largest output more than once."""
    largest: Array = want == want.max(axis=1, keepdims=True)
    twice: Array = largest.sum(axis=1) > 1
    return twice


def _margin_used(want: Array, got: Array) -> float | None:
    """Return the largest share of a decision margin that error has used up, if one is decided.

    What is too large to be told is the largest float.
    """
    import numpy as np

    want, got = want / 4, got / 4  # so that no difference overflows
    decided = ~_undecided(want)
    if want.shape[1] < 2 or not decided.any():
        return None
    want, got = want[decided], got[decided]
    top = want.argmax(axis=1)[:, None]
    before = np.take_along_axis(want, top, axis=1) - want
    after = np.take_along_axis(got, top, axis=1) - got
    with np.errstate(over="ignore", invalid="ignore"):  # of the largest with itself it is 0 / 0
        used = (before - after) / before
    np.put_along_axis(used, top, -np.inf, axis=1)
    return float(np.nan_to_num(used).max())
