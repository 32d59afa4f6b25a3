"""Where a quantised graph's pairs stand, and the same graph with fewer of them.

Tools differ in what they quantise, and every pair costs accuracy: two of them can be compared where
the same inputs of the same layers are quantised. A pair's scale does not depend on who reads it, so
that a graph with more pairs gives the one with fewer by letting some readers read past theirs.

    place       (layer, input index) of an activation that a pair stands on
    placement   all of a graph's places
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import onnx

from exporter.records import Array

Place: TypeAlias = tuple[str, int]

WEIGHTED = ("Conv", "Gemm", "MatMul")
_OUTPUT = "output of the graph"
_PAIR = ("QuantizeLinear", "DequantizeLinear")


class Placement(NamedTuple):
    """The places by kind; ``others`` are those that no weighted layer and no sum reads."""

    convolutions: frozenset[Place]
    linear: frozenset[Place]
    sums: frozenset[Place]
    others: frozenset[Place]

    @property
    def places(self) -> frozenset[Place]:
        return self.convolutions | self.linear | self.sums | self.others

    def __str__(self) -> str:
        counts = zip(self._fields, map(len, self), strict=True)
        return ", ".join(f"{count} {kind}" for kind, count in counts if count)


def placement(model: onnx.ModelProto) -> Placement:
    """Return where activations are quantised. Layers are known by name, which the tools keep."""
    found: dict[str, set[Place]] = {kind: set() for kind in Placement._fields}
    for node, index, _ in _edges(model.graph):
        kind = {"Conv": "convolutions", "Gemm": "linear", "MatMul": "linear", "Add": "sums"}
        found[kind.get(node.op_type, "others")].add((node.name, index))
    return Placement(*map(frozenset, found.values()))


def reduced(
    model: onnx.ModelProto, wanted: frozenset[Place], float32: onnx.ModelProto
) -> onnx.ModelProto:
    """Return the graph with pairs at the wanted places alone.

    A layer that loses the pair on its input reads its weights from ``float32`` again, which is the
    graph before it was quantised.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {node.name: node.input[1] for node in float32.graph.node if node.op_type in WEIGHTED}
    originals = {tensor.name: tensor for tensor in float32.graph.initializer}
    for node, index, source in list(_edges(copy.graph)):
        if (node.name, index) in wanted:
            continue
        if node.name == _OUTPUT:
            _give_directly(copy.graph, source, node.input[0])
            continue
        node.input[index] = source
        if node.op_type in WEIGHTED and index == 0:
            restored = copy.graph.initializer.add()
            restored.CopyFrom(originals[weights[node.name]])
            restored.name = node.input[1] = f"{node.name}_float32"
    _drop_unread(copy.graph)
    return copy


def _edges(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, int, str]]:
    """Yield each node that reads a pair's output, at which input, and what the pair quantises."""
    constants = {tensor.name for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in _PAIR:
            continue
        for index, name in enumerate(node.input):
            source = _behind(name, makers)
            if source is not None and source not in constants:
                yield node, index, source
    for output in graph.output:
        source = _behind(output.name, makers)
        if source is not None:
            yield onnx.helper.make_node("Identity", [output.name], [], _OUTPUT), 0, source


def _behind(name: str, makers: dict[str, onnx.NodeProto]) -> str | None:
    """Return the activation that ``name`` is the dequantised form of, if it is one."""
    dequantise = makers.get(name)
    if dequantise is None or dequantise.op_type != "DequantizeLinear":
        return None
    quantise = makers.get(dequantise.input[0])
    if quantise is None or quantise.op_type != "QuantizeLinear":
        return None
    return _behind(quantise.input[0], makers) or quantise.input[0]


def _give_directly(graph: onnx.GraphProto, source: str, output: str) -> None:
    """Let ``source`` be the output, which was its dequantised form."""
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == output:
                    names[index] = f"{output}_was_quantised"
                elif name == source:
                    names[index] = output


def _drop_unread(graph: onnx.GraphProto) -> None:
    while True:
        read = {name for node in graph.node for name in node.input}
        read |= {output.name for output in graph.output}
        dead = [node for node in graph.node if not read.intersection(node.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)


def problems(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return why TensorRT would not take the graph as it is meant, one sentence each."""
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    stored = {t.name: t.data_type for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            value = node.attribute[0].t
            tensors[node.output[0]] = onnx.numpy_helper.to_array(value)
            stored[node.output[0]] = value.data_type
    found: set[str] = set()
    for node in model.graph.node:
        if node.op_type in _PAIR:
            found.update(_problems_of(node, tensors, stored))
    return tuple(sorted(found))


def _problems_of(
    node: onnx.NodeProto, tensors: dict[str, Array], stored: dict[str, int]
) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"domain {node.domain}"
    if stored.get(node.input[0]) == onnx.TensorProto.INT32:
        yield "a bias is dequantised from INT32"
        return
    if len(node.input) < 3 or not node.input[2]:
        if node.op_type == "QuantizeLinear":
            yield "no zero point, which means UINT8"
        return
    zero = node.input[2]
    if zero not in tensors:
        yield "a zero point is computed"
    elif tensors[zero].any():
        yield "a zero point is not 0"
    if stored.get(zero, onnx.TensorProto.INT8) != onnx.TensorProto.INT8:
        yield f"{onnx.TensorProto.DataType.Name(stored[zero])} instead of INT8"
