"""Quantise/dequantise pairs, and where they stand in a graph: what int8 and fp8 share.

Pairs stand where TensorRT documents them ("Working with quantized types", explicit quantisation):
on the input and the weights of every convolution, not on its output, and on the identity branch of
a residual sum, so that convolution, bias, sum and ReLU can become one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from exporter.errors import GraphError
from exporter.records import Array

if TYPE_CHECKING:
    import onnx

CONVOLUTIONS = ("Conv",)
LINEAR = ("Gemm",)


class Pairs:
    """A graph and the Q/DQ pairs that go into it."""

    def __init__(self, graph: onnx.GraphProto, layers: dict[str, onnx.NodeProto]) -> None:
        self.graph, self.layers = graph, layers
        self._producer = {name: node for node in graph.node for name in node.output}
        self._reads = dict(_reads(graph, self._producer, set(layers)))
        self._pairs: dict[str, list[onnx.NodeProto]] = {}
        self._weight_pairs: list[onnx.NodeProto] = []

    def activations(self) -> list[str]:
        """Return the tensors to quantise, in the order they are read."""
        return list(self._reads)

    def quantise_activation(self, name: str, scale: float) -> None:
        """Add one pair behind ``name``, and let the quantised layers read it there."""
        import numpy as np
        import onnx

        constants: dict[str, Array] = {
            f"{name}_scale": np.array(scale, dtype=np.float32),
            f"{name}_zero": np.array(0, dtype=np.int8),
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

    def quantise_weights(self) -> None:
        """Store each layer's weights as INT8 and dequantise them in front of it.

        Weights that two layers share are stored once.
        """
        import onnx

        tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        done: set[str] = set()
        for node in self.layers.values():
            name = node.input[1]
            if name not in done:
                done.add(name)
                weights, scales = quantise(onnx.numpy_helper.to_array(tensors[name]), name)
                self._add_weights(name, weights, scales)
                self.graph.initializer.remove(tensors[name])
            node.input[1] = f"{name}_dq"

    def _add_weights(self, name: str, weights: Array, scales: Array) -> None:
        import numpy as np
        import onnx

        zeros = np.zeros(len(scales), dtype=np.int8)
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
            nodes += self._pairs.get(value.name, [])
        for node in self.graph.node:
            nodes.append(node)
            for name in node.output:
                nodes += self._pairs.get(name, [])
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)
        del self.graph.value_info[:]


def _reads(
    graph: onnx.GraphProto, producer: dict[str, onnx.NodeProto], layers: set[str]
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
        elif node.op_type == "Add" and not constants.intersection(node.input):
            main = [i for i in (0, 1) if _is_from(node.input[i], producer, layers)]
            if main:
                through = max(main, key=lambda i: depth[node.input[i]])
                readers.setdefault(node.input[1 - through], []).append((node, 1 - through))
    yield from readers.items()


def _is_from(name: str, producer: dict[str, onnx.NodeProto], layers: set[str]) -> bool:
    return name in producer and producer[name].name in layers


def rows_are_outputs(node: onnx.NodeProto) -> bool:
    return any(a.name == "transB" and a.i == 1 for a in node.attribute)


def quantise(weights: Array, name: str) -> tuple[Array, Array]:
    """Return INT8 weights and float32 scales, one per output channel; a channel of zeros has 1."""
    import numpy as np

    flat = weights.reshape(len(weights), -1).astype(np.float64)
    amax = np.abs(flat).max(axis=1)
    scales = np.where(amax > 0, amax / 127, 1.0).astype(np.float32)
    if bad := np.flatnonzero(~(scales >= 2.0**-126)).tolist():
        raise GraphError(
            f"{name!r} cannot be quantised: its channel {bad[0]} reaches no further than "
            f"{amax[bad[0]]:g}"
        )
    rounded = np.clip(np.rint(flat / scales[:, None].astype(np.float64)), -127, 127)
    return rounded.astype(np.int8).reshape(weights.shape), scales
