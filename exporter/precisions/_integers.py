"""Quantise/dequantise pairs around whole operators: the form that ONNX Runtime runs in integers.

    never negative   q = clip(rint(x / s), 0, 255)            s = amax / 255
    otherwise        q = clip(rint(x / s) + 128, 0, 255)      s = amax / 127, 128 stands for 0
    bias             q = rint(b / s), INT32 per channel       s = s_x · s_w

Activations are UINT8 and weights INT8 per output channel: the pair that x86 multiplies (ONNX
Runtime's documentation, "Quantize ONNX models", U8S8). An operator is replaced by its integer
kernel where all that it reads and what it writes is quantised. So pairs stand behind the input and
behind every convolution, sum, product of activations, concatenation and average; not between one of
them and the ReLU that alone reads it: from zero point 0 on, storing a tensor cuts off what is below
0, and the ReLU is dropped. A maximum and a change of shape keep the scale of what they read.

Whether a tensor can be negative is read off the operators that write it, not off the data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from exporter.precisions._qdq import (
    CONVOLUTIONS,
    INT8,
    UINT8,
    Pairs,
    activation_scale,
    check_sums,
    quantise,
)
from exporter.precisions._signs import (
    AVERAGES,
    SHAPES,
    bound,
    cuts_below_zero,
    never_negative,
)
from exporter.records import Array

if TYPE_CHECKING:
    import onnx

ZERO = 128  # what stands for 0 where a tensor may be negative

_JOINING = ("Add", "Mul", "Concat", "LeakyRelu")
_MOVES = ("MaxPool", *SHAPES)


class Integers(Pairs):
    """A graph and the Q/DQ pairs that let ONNX Runtime compute it in integers.

    ``watched`` are the tensors whose ranges are known. A convolution that writes another, or an
    output of the graph, is taken out of ``layers``: it could not run in integers.
    """

    def __init__(
        self,
        graph: onnx.GraphProto,
        layers: dict[str, onnx.NodeProto],
        watched: Collection[str],
    ) -> None:
        import onnx

        super().__init__(graph, layers, INT8, residual=False)
        self._watched = frozenset(watched)
        self._outputs = {value.name for value in graph.output}
        self._constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        self._readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in graph.node:
            for index, name in enumerate(node.input):
                self._readers.setdefault(name, []).append((node, index))
        self._positive = never_negative(graph, self._constants)
        self.layers = {name: node for name, node in layers.items() if self._can(node)}
        self._operators: list[onnx.NodeProto] = []
        tensors = self._find()
        self._reads = {name: self._readers.get(name, []) for name in tensors}
        self.unsigned = frozenset(name for name in tensors if name in self._positive)
        self.kinds = dict.fromkeys(self.unsigned, "unsigned")

    def sites(self) -> dict[tuple[str, int], str]:
        """Return the tensor that is read quantised at each (node, input index).

        What only moves is left out, as it reads the steps that it writes; and what is not watched.
        """
        return {
            (node.name, index): name
            for name, reads in self._reads.items()
            for node, index in reads
            if name in self._watched and not self._is_moved(node)
        }

    def quantise(
        self,
        reach: Callable[[str], float | None],
        stored: Mapping[str, tuple[Array, Array]],
        biases: Mapping[str, Array],
    ) -> None:
        """Add a pair behind every tensor, and store weights, biases and constants quantised.

        ``reach`` is how far a watched tensor reaches, if that is known; ``stored`` and ``biases``
        stand in for the graph's own. Raises `GraphError` where a sum might leave INT32.
        """
        import numpy as np

        scales = self._scales(reach)
        weights = {}
        for node in self.layers.values():
            name = node.input[1]
            weights[name] = stored.get(name) or quantise(self._constants[name], name)
        for node in self.layers.values():
            most = 255 if node.input[0] in self.unsigned else ZERO
            scale = scales[node.input[0]]
            self._quantise_bias(node, scale, weights[node.input[1]], biases, most)
        self.quantise_weights(weights)
        for node in self._operators:
            for index, name in enumerate(node.input):
                if name in self._constants:
                    node.input[index] = self._quantise_constant(name)
        for name, scale in scales.items():
            unsigned = name in self.unsigned
            self.quantise_activation(name, scale, np.array(0 if unsigned else ZERO, np.uint8))
        self._drop_unread()

    # ── Where ───────────────────────────────────────────────────────────────────────

    def _find(self) -> list[str]:
        """Return the tensors to quantise, in the order they are met."""
        found: dict[str, None] = {}
        for node in self.graph.node:
            takes = self._activations(node)
            moves = node.op_type in _MOVES
            if node.name in self.layers:
                takes = takes[:1]
            elif not (found.keys() & set(takes) and self._joins(node, takes)):
                continue
            elif not moves:
                self._operators.append(node)
            found |= dict.fromkeys(takes)
            behind = node.output[0] if moves else self._behind(node.output[0])
            if behind not in self._outputs and self._is_known(behind):
                found[behind] = None
        return list(found)

    def _can(self, layer: onnx.NodeProto) -> bool:
        """Return whether a layer can run in integers: a linear one may write floats."""
        if not all(name in self._constants for name in layer.input[1:] if name):
            return False
        behind = self._behind(layer.output[0])
        quantised = behind not in self._outputs and self._is_known(behind)
        return quantised or layer.op_type not in CONVOLUTIONS

    def _joins(self, node: onnx.NodeProto, takes: list[str]) -> bool:
        """Return whether a node that reads something quantised is to run in integers as well."""
        if not all(map(self._is_known, takes)):
            return False
        if node.op_type in _MOVES:
            out = node.output[0]
            useful = node.op_type == "MaxPool" or self._feeds_layers(out)
            return useful and out not in self._outputs and self._is_known(out)
        behind = self._behind(node.output[0])
        if behind in self._outputs or not self._is_known(behind):
            return False
        if node.op_type in AVERAGES:  # of no account, unless integers go on behind it
            return self._feeds_layers(behind)
        alone = len(takes) == len(node.input)  # a product's constant would lose too much
        return node.op_type == "Add" or (node.op_type in _JOINING and alone)

    def _activations(self, node: onnx.NodeProto) -> list[str]:
        return [name for name in node.input if name and name not in self._constants]

    def _behind(self, name: str) -> str:
        """Return what a ReLU makes of a tensor where it alone reads it, or else the tensor."""
        readers = self._readers.get(name, [])
        if (
            name in self._outputs
            or len(readers) != 1
            or not cuts_below_zero(readers[0][0], self._constants)
        ):
            return name
        return str(readers[0][0].output[0])

    def _ceiling(self, name: str) -> float | None:
        """Return what a tensor cannot exceed, or what of it matters: a Clip's or a Min's bound."""
        node = self._producer.get(name)
        if node is not None and node.op_type == "Clip" and cuts_below_zero(node, self._constants):
            return bound(node, 2, self._constants)
        readers = self._readers.get(name, [])
        if readers and all(reader.op_type == "Min" for reader, _ in readers):
            bounds = [bound(reader, 1 - index, self._constants) for reader, index in readers]
            return None if None in bounds else max(b for b in bounds if b is not None)
        return None

    def _is_known(self, name: str) -> bool:
        """Return whether it is known how far a tensor reaches, perhaps from where it is moved."""
        if name in self._watched or self._ceiling(name) is not None:
            return True
        readers = (reader for reader, _ in self._readers.get(name, []))
        return any(r.op_type in _MOVES and self._is_known(r.output[0]) for r in readers)

    def _feeds_layers(self, name: str) -> bool:
        """Return whether a layer that is quantised reads a tensor, or what is made of it."""
        passing = (*_MOVES, *_JOINING, *AVERAGES, "Relu", "Clip")
        return any(
            reader.name in self.layers
            or (reader.op_type in passing and self._feeds_layers(reader.output[0]))
            for reader, _ in self._readers.get(name, [])
        )

    def _is_moved(self, node: onnx.NodeProto) -> bool:
        return node.op_type in _MOVES and node.output[0] in self._reads

    # ── How ─────────────────────────────────────────────────────────────────────────

    def _scales(self, reach: Callable[[str], float | None]) -> dict[str, float]:
        """Return each tensor's scale, the same for all that is moved without being changed."""
        import numpy as np

        found: dict[str, float] = {}
        for members in self._moved_together():
            known = [(self._reach(name, reach), self._ceiling(name)) for name in members]
            reaches = [min(r for r in pair if r is not None) for pair in known if any(pair)]
            unsigned = members[0] in self.unsigned
            storage = UINT8 if unsigned else INT8
            scale = np.float32(activation_scale(members[0], max(reaches, default=0.0), storage))
            if unsigned and scale * np.float32(255) > max(reaches):
                scale = np.nextafter(scale, np.float32(0))  # else a Clip there could not be dropped
            found |= dict.fromkeys(members, float(scale))
        return {name: found[name] for name in self._reads}

    def _reach(self, name: str, reach: Callable[[str], float | None]) -> float | None:
        """Return how far a tensor reaches, or as far as what a Min makes of it does."""
        if name in self._watched:
            return reach(name)
        readers = [reader for reader, _ in self._readers.get(name, [])]
        if not readers or any(reader.op_type != "Min" for reader in readers):
            return None
        behind = [self._reach(reader.output[0], reach) for reader in readers]
        return None if None in behind else max(b for b in behind if b is not None)

    def _moved_together(self) -> Iterator[list[str]]:
        """Yield the tensors that differ in nothing but the places of their values."""
        group: dict[str, list[str]] = {name: [name] for name in self._reads}
        for node in self.graph.node:
            takes = self._activations(node)
            if takes and takes[0] in group and self._is_moved(node):
                one, other = group[takes[0]], group[node.output[0]]
                if one is not other:
                    one += other
                    group |= dict.fromkeys(other, one)
        yield from {id(members): members for members in group.values()}.values()

    def _quantise_bias(
        self,
        node: onnx.NodeProto,
        scale: float,
        weights: tuple[Array, Array],
        biases: Mapping[str, Array],
        most: int,
    ) -> None:
        import numpy as np

        if len(node.input) < 3 or not node.input[2]:
            check_sums(node.name, weights[0], most)
            return
        steps = np.float32(scale) * weights[1]
        bias = biases.get(node.input[2], self._constants[node.input[2]])
        whole = np.rint(bias.astype(np.float64) / steps.astype(np.float64))
        check_sums(node.name, weights[0], most, whole)
        name = f"{node.name}/bias"
        node.input[2] = self._add_constant(name, whole.astype(np.int32), steps)

    def _quantise_constant(self, name: str) -> str:
        """Store the constant of a sum as UINT8, and return what dequantises it."""
        import numpy as np

        if any(node.output[0] == f"{name}_dq" for node in self._weight_pairs):
            return f"{name}_dq"
        value = self._constants[name].astype(np.float64)
        unsigned = name in self._positive
        amax = float(np.abs(value).max()) or 1.0
        scale = np.array(activation_scale(name, amax, UINT8 if unsigned else INT8), np.float32)
        zero = np.array(0 if unsigned else ZERO, np.uint8)
        whole = np.clip(np.rint(value / float(scale)) + float(zero), 0, 255).astype(np.uint8)
        return self._add_constant(name, whole, scale, zero)

    def _add_constant(
        self, name: str, whole: Array, scale: Array, zero: Array | None = None
    ) -> str:
        """Store whole numbers, and return the tensor that they are dequantised to."""
        import onnx

        parts = {f"{name}_q": whole, f"{name}_scale": scale}
        if zero is not None:
            parts[f"{name}_zero"] = zero
        self.graph.initializer.extend(
            onnx.numpy_helper.from_array(value, part) for part, value in parts.items()
        )
        made = onnx.helper.make_node(
            "DequantizeLinear", list(parts), [f"{name}_dq"], f"{name}/DequantizeLinear"
        )
        if scale.ndim:
            made.attribute.append(onnx.helper.make_attribute("axis", 0))
        self._weight_pairs.append(made)
        return f"{name}_dq"

    def _drop_unread(self) -> None:
        """Take out the float constants that nothing reads any more."""
        pairs = [node for pair in self._pairs.values() for node in pair]
        nodes = (*self.graph.node, *self._weight_pairs, *pairs)
        read = {name for node in nodes for name in node.input} | self._outputs
        for tensor in list(self.graph.initializer):
            if tensor.name in self._constants and tensor.name not in read:
                self.graph.initializer.remove(tensor)
