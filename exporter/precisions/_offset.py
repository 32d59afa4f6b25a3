"""Pairs that use all 256 steps of INT8 for what does not have 0 in its middle, zero points 0.

TensorRT takes no zero point and reads UINT8 as INT8, so that a tensor behind a ReLU has 128 of the
256 steps, and one that reaches further up than down has fewer than it could. Here an offset is
taken off before a tensor is rounded, and put back behind it (`exporter.steps`):

    t = Δ · (clip(rint((t − o) / Δ), −128, 127)) + o        o = zero · Δ

Neither costs anything where t is computed and read by weighted layers. The −o goes into the bias of
the convolution that writes t, through maxima and sums, and through a ReLU where half the steps are
taken off: storing cuts off what is below −o, so that the ReLU is not needed. The +o goes into the
bias of each convolution that reads t, as Σ w · o over its row. A convolution that pads would pad
with o instead of 0, so that in front of it −o is padded before storing, the same for all channels;
where that is not wanted (``pad``), its input is stored as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from exporter.precisions._qdq import INT8, Pairs
from exporter.precisions._signs import bound, cuts_below_zero, never_negative
from exporter.records import Array
from exporter.steps import Held, Kind, across

if TYPE_CHECKING:
    import onnx

_LAYERS = ("Conv", "Gemm")


class _Offset(NamedTuple):
    """What is taken off a tensor of so many axes, float64: one number, or one per channel (C,)."""

    values: Array
    axes: int

    @property
    def across(self) -> Array:
        """Return it as float32 that meets the tensor's channels."""
        return across(self.values.astype("float32"), self.axes)


class Offsets(Pairs):
    """A graph and the pairs that go into it, with an offset where one is given.

    `kinds` says which offset a tensor can have. `computed` has the tensors that are computed less a
    constant: their names, and of each the name that it had and the constant, () or (C,).
    """

    def __init__(
        self,
        graph: onnx.GraphProto,
        layers: dict[str, onnx.NodeProto],
        *,
        residual: bool = True,
        pad: bool = False,
    ) -> None:
        import onnx

        super().__init__(graph, layers, INT8, residual=residual)
        self._constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        self._outputs = {value.name for value in graph.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        positive = never_negative(graph, self._constants)
        self.kinds = {
            name: "unsigned" if name in positive else self._kind(name)
            for name, reads in self._reads.items()
            if all(self._can_read(node, i, pad=pad) for node, i in reads)
        }
        self._plain = {node.name for node in graph.node if self._is_plain(node)}
        self._free_biases = {node.name for node in graph.node if self._has_free_bias(node)}
        self.computed: dict[str, tuple[str, Array]] = {}
        self._offsets: dict[str, Held] = {}
        self._tensors: dict[str, onnx.TensorProto] = {}  # the constants, once quantised
        self._taken_up: dict[str, Array] = {}  # by a layer's bias for its input, (O,)
        self._moved: dict[str, Array] = {}  # a layer's output by its bias, () or (O,)

    def offset(self, name: str, steps: Held) -> None:
        """Let a tensor be stored less an offset, once its pair is there."""
        if steps.zero.any():
            self._offsets[name] = steps

    def write(self) -> None:
        """Put the pairs into the graph, and what the offsets need."""
        import numpy as np
        import onnx

        self._tensors = {t.name: t for t in self.graph.initializer}
        for name, steps in self._offsets.items():
            scale = float(onnx.numpy_helper.to_array(self._tensors[f"{name}_scale"]))
            self._offset(name, _Offset(np.asarray(steps.zero * scale), self._axes(name)), scale)
        for node in list(self.graph.node):
            if node.name in self._taken_up or node.name in self._moved:
                self._write_bias(node)
        self._drop_unread()
        super().write()

    # ── Who reads it ────────────────────────────────────────────────────────────────

    def _can_read(self, node: onnx.NodeProto, index: int, *, pad: bool) -> bool:
        """Return whether what reads a tensor can make up for its offset."""
        if node.op_type == "Add":
            return True
        attributes = _attributes(node)
        if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            return False
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        constant = all(name in self._constants for name in node.input[1:] if name)
        return index == 0 and constant and plain and (pad or not any(_pads(node)))

    def _kind(self, name: str) -> Kind:
        """Return how a tensor that may be negative can be stored."""
        padded = any(any(_pads(node)) for node, _ in self._reads[name])
        return "tensor" if padded or not self._axes(name) else "channel"

    def _axes(self, name: str) -> int:
        """Return how many axes a tensor has that a layer reads or writes, else 0."""
        nodes = [node for node, _ in self._reads[name]]
        if name in self._producer:
            nodes.append(self._producer[name])
        layers = (node for node in nodes if node.op_type in _LAYERS)
        weights = (self._constants[node.input[1].removesuffix("_dq")] for node in layers)
        return next((array.ndim for array in weights), 0)

    def _offset(self, name: str, offset: _Offset, scale: float) -> None:
        quantise, dequantise = self._pairs.pop(name)
        source = self._lowered(name, offset, scale)
        quantise.input[0] = source
        behind = self._pairs.setdefault(source, [])
        padded: dict[tuple[int, ...], list[onnx.NodeProto]] = {}
        if any(not any(_pads(node)) for node, _ in self._reads[name]):
            behind += [quantise, dequantise]
        for node, index in self._reads[name]:
            if node.op_type == "Add":
                self._give_back(node, index, offset)
                continue
            self._taken_up[node.name] = self._product(node, offset.values)
            if any(_pads(node)):
                padded.setdefault(tuple(_pads(node)), []).append(node)
        for sides, nodes in padded.items():
            behind += self._padded(name, sides, float(offset.values), quantise, dequantise)
            for node in nodes:
                node.input[0] = behind[-1].output[0]
                _set_pads(node, [0] * len(sides))

    def _padded(
        self,
        name: str,
        sides: tuple[int, ...],
        offset: float,
        quantise: onnx.NodeProto,
        dequantise: onnx.NodeProto,
    ) -> list[onnx.NodeProto]:
        """Return the nodes that pad a tensor with what stands for 0, and store it."""
        import numpy as np
        import onnx

        made = f"{name}_padded_" + "_".join(map(str, sides))
        axes = len(sides) // 2
        whole = [0, 0, *sides[:axes], 0, 0, *sides[axes:]]
        sizes = self._constant(f"{made}_pads", np.array(whole, dtype=np.int64))
        value = self._constant(f"{made}_value", np.array(-offset, dtype=np.float32))
        nodes = [
            onnx.helper.make_node("Pad", [quantise.input[0], sizes, value], [made], f"{made}/Pad")
        ]
        for node, written in ((quantise, f"{made}_q"), (dequantise, f"{made}_dq")):
            copy = type(node).FromString(node.SerializeToString())
            copy.name, copy.input[0] = f"{made}/{node.op_type}", nodes[-1].output[0]
            copy.output[0] = written
            nodes.append(copy)
        return nodes

    def _give_back(self, add: onnx.NodeProto, index: int, offset: _Offset) -> None:
        """Add the offset to the other side of a sum, or else to what is read."""
        import onnx

        other = self._producer.get(add.input[1 - index])
        if other is not None and other.name in self._free_biases:
            self._move(other, offset.values)
            return
        read = add.input[index]
        back = f"{read}_back"
        constant = self._constant(f"{back}_by", offset.across)
        node = onnx.helper.make_node("Add", [read, constant], [back], f"{back}/Add")
        self._pairs.setdefault(read, []).append(node)
        add.input[index] = back

    # ── Who computes it ─────────────────────────────────────────────────────────────

    def _lowered(self, name: str, offset: _Offset, scale: float) -> str:
        """Return the name of a tensor less its offset, computed so where that is free."""
        import onnx

        quantised = {node.output[0] for node, _ in self._reads[name]}
        alone = all(node.output[0] in quantised for node in self._readers[name])
        if alone and name not in self._outputs and self._is_free(name, scale):
            return self._lower(name, offset)
        lowered = f"{name}_offset"
        constant = self._constant(f"{lowered}_by", offset.across)
        node = onnx.helper.make_node("Sub", [name, constant], [lowered], f"{lowered}/Sub")
        self._pairs.setdefault(name, []).append(node)
        self.computed[lowered] = (name, offset.values)
        return lowered

    def _is_free(self, name: str, scale: float) -> bool:
        """Return whether constants alone can make a tensor less, as far as it is stored."""
        node = self._producer.get(name)
        if node is None:
            return False
        if node.op_type in _LAYERS:
            own = name in self._reads and node.name in self._plain
            return own or node.name in self._free_biases
        if node.op_type == "Add":
            return self._term(node) is not None or self._constant_of(node) is not None
        if node.op_type == "Clip":
            high = bound(node, 2, self._constants)
            passes = high is None or high >= 254.5 * scale  # stored as 255 steps, as beyond it
            passes = passes and cuts_below_zero(node, self._constants)
        elif node.op_type == "Min":
            passes = len(node.input) == 2 and node.input[1] in self._constants
        else:
            passes = node.op_type in ("Relu", "MaxPool")
        return passes and self._is_read_once(node.input[0]) and self._is_free(node.input[0], scale)

    def _lower(self, name: str, offset: _Offset) -> str:
        """Let a tensor be computed less a constant, and return its new name."""
        node = self._producer[name]
        if cuts_below_zero(node, self._constants):  # storing does the same
            self.graph.node.remove(node)
            return self._lower(node.input[0], offset)
        lowered = f"{name}_offset"
        layer = node if node.op_type in _LAYERS else self._term(node)
        constant = self._constant_of(node)
        if layer is not None:
            self._move(layer, -offset.values)
        elif node.op_type == "Add":
            assert constant is not None
            less = self._constants[node.input[constant]] - offset.across
            node.input[constant] = self._constant(f"{lowered}_by", less)
        else:
            node.input[0] = self._lower(node.input[0], offset)
        if node.op_type == "Min":
            limit = self._constants[node.input[1]] - offset.across
            node.input[1] = self._constant(f"{lowered}_limit", limit)
        if layer is not node:  # whose output is named when its bias is written
            node.output[0] = lowered
            self.computed[lowered] = (name, offset.values)
        return lowered

    def _move(self, layer: onnx.NodeProto, by: Array) -> None:
        self._moved[layer.name] = self._moved.get(layer.name, 0.0) + by

    def _is_read_once(self, name: str) -> bool:
        return len(self._readers.get(name, [])) == 1 and name not in self._outputs

    def _has_free_bias(self, node: onnx.NodeProto) -> bool:
        """Return whether a layer's bias can move its output, for the one node that reads it."""
        return (
            node.name in self._plain
            and self._is_read_once(node.output[0])
            and node.output[0] not in self._reads
        )

    def _is_plain(self, node: onnx.NodeProto) -> bool:
        """Return whether a layer adds its bias as it is, and nothing of it is computed."""
        return (
            node.op_type in _LAYERS
            and all(name in self._constants for name in node.input[1:] if name)
            and _attributes(node).get("beta", 1.0) == 1.0
        )

    def _constant_of(self, node: onnx.NodeProto) -> int | None:
        """Return which input of a sum is a constant, if one is."""
        found = [i for i, name in enumerate(node.input) if name in self._constants]
        return found[0] if node.op_type == "Add" and len(found) == 1 else None

    def _term(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return a layer that writes one of a sum's terms and has a free bias."""
        if node.op_type != "Add":
            return None
        found = [self._producer.get(name) for name in node.input]
        return next((n for n in found if n is not None and n.name in self._free_biases), None)

    # ── Biases ──────────────────────────────────────────────────────────────────────

    def _write_bias(self, node: onnx.NodeProto) -> None:
        import numpy as np
        import onnx

        moved = self._moved.get(node.name)
        bias: Array = self._taken_up.get(node.name, 0.0) + np.zeros(self._rows(node))
        if moved is not None:
            bias = bias + moved
        if len(node.input) > 2 and node.input[2]:
            bias = bias + onnx.numpy_helper.to_array(self._tensors[node.input[2]]).astype(
                np.float64
            )
        del node.input[2:]
        node.input.append(self._constant(f"{node.name}/bias", bias.astype(np.float32)))
        if moved is not None:
            name = node.output[0]
            node.output[0] = f"{name}_offset"
            self.computed[node.output[0]] = (name, np.asarray(-moved))
            for reader in self._readers[name]:
                reader.input[:] = [node.output[0] if n == name else n for n in reader.input]

    def _rows(self, node: onnx.NodeProto) -> int:
        """Return how many outputs a layer has."""
        weights = self._constants[node.input[1].removesuffix("_dq")]
        rows_first = node.op_type == "Conv" or _attributes(node).get("transB", 0)
        return int(weights.shape[0 if rows_first else 1])

    def _product(self, node: onnx.NodeProto, offset: Array) -> Array:
        """Return each row of a layer's weights, as they are stored, times the offset, float64."""
        import numpy as np
        import onnx

        name = node.input[1].removesuffix("_dq")
        whole, scales = (
            onnx.numpy_helper.to_array(self._tensors[f"{name}_{part}"]) for part in ("q", "scale")
        )
        rows = whole.reshape(*whole.shape[:2], -1).sum(axis=2, dtype=np.float64)  # (O, C / groups)
        groups = _attributes(node).get("group", 1)
        each = np.broadcast_to(offset, (groups * rows.shape[1],)).reshape(groups, -1)
        by_row = np.repeat(each, len(rows) // groups, axis=0)
        return np.asarray((rows * by_row).sum(axis=1) * scales.astype(np.float64))

    def _constant(self, name: str, value: Array) -> str:
        import onnx

        self.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        return name

    def _drop_unread(self) -> None:
        """Take out the constants that nothing reads any more."""
        pairs = [node for nodes in self._pairs.values() for node in nodes]
        nodes = (*self.graph.node, *self._weight_pairs, *pairs)
        read = {name for node in nodes for name in node.input}
        for tensor in list(self.graph.initializer):
            if tensor.name in self._constants and tensor.name not in read:
                self.graph.initializer.remove(tensor)


def _attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    import onnx

    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _pads(node: onnx.NodeProto) -> list[int]:
    return list(_attributes(node).get("pads", [])) if node.op_type == "Conv" else []


def _set_pads(node: onnx.NodeProto, pads: list[int]) -> None:
    for attribute in node.attribute:
        if attribute.name == "pads":
            attribute.ints[:] = pads
