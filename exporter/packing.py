"""Several inputs of a network, side by side in one row for each sample.

So whatever looks at samples, and not at what is in them, is the same for any number of inputs: what
tells them apart, how they are divided and drawn, what is run in which order. One input alone is
what it is, (N, C, H, W); several are (N, values) float32, and become tensors where they are fed:

    (N, 3·8·8 + 1·4·4)      a (N, 3, 8, 8), b (N, 1, 4, 4)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

from exporter.axes import shape_at_optimum
from exporter.records import Array, TensorSpec

if TYPE_CHECKING:
    import onnx


def packed_shape(specs: Sequence[TensorSpec]) -> tuple[int, ...]:
    """Return the shape of one sample of all these inputs."""
    return specs[0].shape if len(specs) == 1 else (sum(prod(spec.shape) for spec in specs),)


def in_words(shapes: Iterable[Sequence[int]]) -> str:
    """Return shapes as they are said: ``1 × 8 × 8 and 2 × 4``."""
    return " and ".join(" × ".join(map(str, shape)) for shape in shapes)


def pack(arrays: Sequence[Array]) -> Array:
    """Return inputs, each (N, …), as samples."""
    import numpy as np

    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)


def unpack(rows: Any, specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """Return samples, an array or a tensor, as the inputs they are of, by name."""
    if len(specs) == 1:
        return {specs[0].name: rows}
    ends = list(accumulate(prod(spec.shape) for spec in specs))
    parts = (rows[:, start:stop] for start, stop in zip([0, *ends], ends, strict=False))
    return {
        spec.name: part.reshape((len(rows), *spec.shape))
        for spec, part in zip(specs, parts, strict=True)
    }


def inputs_of_graph(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """Return what a graph takes, in the size it is tuned for; one that it leaves open is 0."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return tuple(
        TensorSpec(value.name, tuple(shape_at_optimum(model, value)))
        for value in model.graph.input
        if value.name not in stored
    )
