"""Whether the candidate still computes what PyTorch computes.

`exporter.records.Parity` has the formulas. Both sides' outputs are compared in float64; a value
that is not finite, on either side, is a failure whatever the other figures say, since argmax of
NaN "agrees" with argmax of NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from exporter.contracts import Advance
from exporter.errors import GraphError
from exporter.records import Array, Feed, Outputs, Parity, Tolerance


def collect_outputs(
    session: Callable[[Feed], Outputs],
    feeds: Iterable[Feed],
    output: str,
    *,
    samples: int,
    advance: Advance = lambda: None,
) -> Array:
    """Run every feed and return the named output of the first ``samples``, (samples, outputs).

    What comes back is float64; ``advance`` is called after each feed.

    Raises `GraphError` if the session has no output of that name.
    """
    import numpy as np

    parts = []
    for feed in feeds:
        found = session(feed)
        if output not in found:
            raise GraphError(f"no output named {output!r}, only {', '.join(map(repr, found))}")
        value = np.asarray(found[output], dtype=np.float64)
        parts.append(value.reshape(len(value), -1))
        advance()
    return np.concatenate(parts)[:samples]


def compare_outputs(
    reference: Array,
    candidate: Array,
    *,
    inputs: str,
    tolerance: Tolerance = Tolerance(),  # noqa: B008 - frozen
    labels: Array | None = None,
    noise_floor: float | None = None,
) -> Parity:
    """Return the distance between two arrays of outputs, both (samples, outputs).

    ``labels`` (samples,) adds accuracy; ``noise_floor``, float32 PyTorch's own relative error,
    adds the error as a multiple of it. Raises `GraphError` if the shapes differ or are empty.
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
    largest_want, largest_got = want.argmax(axis=1), got.argmax(axis=1)

    def share(hits: Array) -> float | None:
        return float(hits.mean()) if finite else None

    return Parity(
        inputs=inputs,
        samples=len(want),
        max_abs=float(np.abs(want - got).max()) if finite else None,
        rel_l2=_relative_error(want, got) if finite else None,
        cosine=_smallest_cosine(want, got) if finite else None,
        agreement=share(largest_want == largest_got),
        accuracy=None if labels is None else share(largest_got == labels),
        reference_accuracy=None if labels is None else share(largest_want == labels),
        noise_floor=noise_floor,
        nonfinite_reference=bad_want,
        nonfinite_candidate=bad_got,
        tolerance=tolerance,
    )


def _relative_error(want: Array, got: Array) -> float | None:
    """Return ‖got − want‖ / ‖want‖, scaled by the largest magnitude so that squares stay finite."""
    import numpy as np

    scale = max(np.abs(want).max(), np.abs(got).max())
    if scale == 0:
        return 0.0
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
