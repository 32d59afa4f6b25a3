"""Edits of an ONNX graph that its protocol buffers make roundabout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from exporter.records import Array

if TYPE_CHECKING:
    import onnx


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Let a graph have these nodes, in this order; some may be its own."""
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def replace_constants(graph: onnx.GraphProto, values: Mapping[str, Array]) -> None:
    """Put other values in place of a graph's constants, by their names."""
    import onnx

    for tensor in graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))


def drop_unread(graph: onnx.GraphProto) -> None:
    """Take out the constants that no node reads."""
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
    del graph.initializer[:]
    graph.initializer.extend(copies)
