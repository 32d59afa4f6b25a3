"""Quantise/dequantise pairs, and where they stand in a graph: shared by int8, fp8, int8-weights.

Pairs stand where TensorRT documents them ("Working with quantized types", explicit quantisation):
on the input and the weights of every convolution, not on its output, and on the identity branch of
a residual sum, so that convolution, bias, sum and ReLU can become one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from exporter.errors import GraphError, UnknownName
from exporter.onnx_edits import replace_nodes
from exporter.records import Array
from exporter.steps import OF_ZEROS, Kind

if TYPE_CHECKING:
    import onnx

CONVOLUTIONS = ("Conv",)
LINEAR = ("Gemm",)
SMALLEST = 2.0**-126  # float32's smallest normal number, and so the smallest scale


class Storage(NamedTuple):
    """A type that stores quantised numbers: its ONNX type, and what the largest magnitude becomes.

    A scale of less than ``least`` is raised to it, which only a type of floating numbers can bear.
    """

    name: str
    dtype: int
    largest: float
    least: float = 0.0

    def scale(self, amax: float) -> float:
        """Return the scale of a tensor that reaches as far as ``amax``."""
        return max(amax / self.largest, self.least) if amax else 0.0

    def stored(self, steps: Array) -> Array:
        """Return float64 numbers of steps, each as the nearest that the type holds."""
        import numpy as np
        import onnx

        within = np.clip(steps, -self.largest, self.largest)
        width = e4m3_widths(within) if self.dtype == FP8.dtype else 1.0
        numbers: Array = np.rint(within / width) * width
        return numbers.astype(onnx.helper.tensor_dtype_to_np_dtype(self.dtype))


INT8 = Storage("INT8", 3, 127.0)  # onnx.TensorProto.INT8
UINT8 = Storage("UINT8", 2, 255.0)  # onnx.TensorProto.UINT8
FP8 = Storage("FP8", 17, 448.0)  # onnx.TensorProto.FLOAT8E4M3FN


def e4m3_widths(steps: Array) -> Array:
    """Return how far apart FP8's numbers are around each: 3 bits behind the first, 2⁻⁹ at least.

    Numpy's FP8 rounds float64 to float32 on its way, and so ties that are none.
    """
    import numpy as np

    widths: Array = np.exp2(np.maximum(np.frexp(steps)[1], -5) - 4.0)
    return widths


class Pairs:
    """A graph and the Q/DQ pairs that go into it.

    ``kinds`` are those of the tensors' steps where they are not signed.
    """

    kinds: Mapping[str, Kind] = MappingProxyType({})

    def __init__(
        self,
        graph: onnx.GraphProto,
        layers: dict[str, onnx.NodeProto],
        storage: Storage = INT8,
        *,
        residual: bool = True,
    ) -> None:
        self.graph, self.layers, self.storage = graph, layers, storage
        self._producer = {name: node for node in graph.node for name in node.output}
        self._reads = dict(_reads(graph, self._producer, set(layers), residual=residual))
        self._pairs: dict[str, list[onnx.NodeProto]] = {}
        self._weight_pairs: list[onnx.NodeProto] = []

    def activations(self) -> list[str]:
        """Return the tensors to quantise, in the order they are read."""
        return list(self._reads)

    def sites(self) -> dict[tuple[str, int], str]:
        """Return the tensor that is read quantised at each (node, input index)."""
        return {(node.name, i): name for name, reads in self._reads.items() for node, i in reads}

    def quantise_activation(self, name: str, scale: float, zero: Array | None = None) -> None:
        """Add one pair behind ``name``, and let the quantised layers read it there.

        ``zero`` is what stands for 0, if it is not 0 in the pairs' own type.
        """
        import numpy as np
        import onnx

        constants: dict[str, Array] = {
            f"{name}_scale": np.array(scale, dtype=np.float32),
            f"{name}_zero": self.storage.stored(np.array(0.0)) if zero is None else zero,
        }
        for constant, value in constants.items():
            self.graph.initializer.append(onnx.numpy_helper.from_array(value, constant))
        scale_and_zero = list(constants)
        self._pairs[name] = [
            onnx.helper.make_node(
                "QuantizeLinear", [name, *scale_and_zero], [f"{name}_q"], f"{name}/QuantizeLinear"
            ),
            onnx.helper.make_node(
                "DequantizeLinear",
                [f"{name}_q", *scale_and_zero],
                [f"{name}_dq"],
                f"{name}/DequantizeLinear",
            ),
        ]
        for node, index in self._reads[name]:
            node.input[index] = f"{name}_dq"

    def quantise_weights(
        self, given: Mapping[str, tuple[Array, Array]] | None = None
    ) -> dict[str, Array]:
        """Store each layer's weights quantised, and return them by the layer's name.

        ``given`` has stored weights and scales by the weights' name, others are rounded to the
        nearest. Weights that two layers share are stored once.
        """
        import onnx

        tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        done: dict[str, Array] = {}
        found: dict[str, Array] = {}
        for layer, node in self.layers.items():
            name = node.input[1]
            if name not in done:
                stored = (given or {}).get(name)
                if stored is None:
                    original = onnx.numpy_helper.to_array(tensors[name])
                    stored = quantise(original, name, self.storage)
                done[name], scales = stored
                self._add_weights(name, done[name], scales)
                self.graph.initializer.remove(tensors[name])
            node.input[1] = f"{name}_dq"
            found[layer] = done[name]
        return found

    def _add_weights(self, name: str, weights: Array, scales: Array) -> None:
        import numpy as np
        import onnx

        zeros = self.storage.stored(np.zeros(len(scales)))
        parts = {f"{name}_q": weights, f"{name}_scale": scales, f"{name}_zero": zeros}
        self.graph.initializer.extend(
            onnx.numpy_helper.from_array(value, part) for part, value in parts.items()
        )
        self._weight_pairs.append(
            onnx.helper.make_node(
                "DequantizeLinear", list(parts), [f"{name}_dq"], f"{name}/DequantizeLinear", axis=0
            )
        )

    def write(self) -> None:
        """Put the pairs into the graph, each right behind what it reads."""
        nodes = list(self._weight_pairs)
        for value in self.graph.input:
            nodes += self._placed_behind(value.name)
        for node in self.graph.node:
            nodes += self._with_pairs(node)
        replace_nodes(self.graph, nodes)
        del self.graph.value_info[:]

    def _with_pairs(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        yield node
        for name in node.output:
            yield from self._placed_behind(name)

    def _placed_behind(self, name: str) -> Iterator[onnx.NodeProto]:
        for node in self._pairs.get(name, []):
            yield from self._with_pairs(node)


def _reads(
    graph: onnx.GraphProto,
    producer: dict[str, onnx.NodeProto],
    layers: set[str],
    *,
    residual: bool,
) -> Iterator[tuple[str, list[tuple[onnx.NodeProto, int]]]]:
    """Yield each tensor to quantise, with the places (node, input index) that read it so."""
    depth: dict[str, int] = {value.name: 0 for value in graph.input}
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        below = [depth[name] for name in node.input if name in depth]
        depth |= dict.fromkeys(node.output, 1 + max(below, default=0))
        if node.name in layers:
            readers.setdefault(node.input[0], []).append((node, 0))
        elif residual and node.op_type == "Add" and not constants.intersection(node.input):
            main = [i for i in (0, 1) if _is_from(node.input[i], producer, layers)]
            if main:
                through = max(main, key=lambda i: depth[node.input[i]])
                readers.setdefault(node.input[1 - through], []).append((node, 1 - through))
    yield from readers.items()


def _is_from(name: str, producer: dict[str, onnx.NodeProto], layers: set[str]) -> bool:
    return name in producer and producer[name].name in layers


def rows_are_outputs(node: onnx.NodeProto) -> bool:
    return any(a.name == "transB" and a.i == 1 for a in node.attribute)


def layers_to_quantise(
    graph: onnx.GraphProto, *, linear: bool, keep: tuple[str, ...]
) -> dict[str, onnx.NodeProto]:
    """Return the nodes to quantise, by name. Raises `UnknownName` for an unknown ``keep``."""
    constants = {tensor.name for tensor in graph.initializer}
    weighted = {
        node.name: node
        for node in graph.node
        if node.op_type in (*CONVOLUTIONS, *LINEAR) and node.input[1] in constants
    }
    for name in keep:
        if name not in weighted:
            raise UnknownName("layer to keep", name, weighted)
    return {
        name: node
        for name, node in weighted.items()
        if name not in keep
        and (node.op_type in CONVOLUTIONS or (linear and rows_are_outputs(node)))
    }


def coverage(
    graph: onnx.GraphProto, layers: dict[str, onnx.NodeProto], kind: str, around: str
) -> str:
    """Say how many layers are quantised, and which are not."""
    weighted = [n.name for n in graph.node if n.op_type in (*CONVOLUTIONS, *LINEAR)]
    left = [name for name in weighted if name not in layers]
    rest = f"; {', '.join(left)} in {around.upper()}" if left else ""
    return f"{len(layers)} of {len(weighted)} weighted layers in {kind}{rest}"


def check_sums(layer: str, weights: Array, most: int, biases: Array | None = None) -> None:
    """Raise `GraphError` if some input could add up to more than INT32 holds, in some channel.

    Whole numbers throughout: Σ |q_w| · ``most`` + |q_b| < 2³¹, where no input exceeds ``most``.
    """
    import numpy as np

    sums = np.abs(weights.reshape(len(weights), -1).astype(np.float64)).sum(axis=1) * most
    if biases is not None:
        sums = sums + np.abs(biases)
    if not sums.max(initial=0.0) < 2.0**31:
        channel = int(sums.argmax())
        raise GraphError(
            f"{layer!r} cannot be quantised: its channel {channel} may add up to "
            f"{sums[channel]:.3g} steps, and INT32 ends at {2**31:.3g}",
            hint=f"keep it in float: keep = [{layer!r}]",
        )


def activation_scale(name: str, amax: float, storage: Storage) -> float:
    """Return a tensor's scale. Raises `GraphError` if calibration never moved it."""
    return sound_scale(name, storage.scale(amax), amax)


def sound_scale(name: str, scale: float, amax: float) -> float:
    """Return a tensor's scale. Raises `GraphError` if calibration never moved it."""
    if not scale >= SMALLEST:
        raise GraphError(
            f"{name!r} cannot be quantised: its magnitude is {amax:g} on the calibration data",
            hint="calibrate on data like what the network will see",
        )
    return scale


def quantise(weights: Array, name: str, storage: Storage = INT8) -> tuple[Array, Array]:
    """Return stored weights and float32 scales, one per output channel.

    One of zeros has the largest of the others', for its bias's sake: that may be held in steps of
    s_x · s_w, by the graph itself or by a runtime.
    """
    import numpy as np

    flat = weights.reshape(len(weights), -1).astype(np.float64)
    amax = np.abs(flat).max(axis=1)
    needed = np.array([storage.scale(float(a)) for a in amax])
    others = needed[amax > 0].max(initial=0) or OF_ZEROS
    scales = np.where(amax > 0, needed, others).astype(np.float32)
    if bad := np.flatnonzero(~(scales >= SMALLEST)).tolist():
        raise GraphError(
            f"{name!r} cannot be quantised: its channel {bad[0]} reaches no further than "
            f"{amax[bad[0]]:g}"
        )
    return storage.stored(flat / scales[:, None].astype(np.float64)).reshape(weights.shape), scales
