"""Give a BatchNorm a layer of its own, where others read the one in front of it.

The layer is called a second time, with the same input, for the BatchNorm alone, and so is what
stands between. Its work is then done twice, which is why this waits for the user's permission.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from exporter.fold.graph import Graph, Stays
from exporter.fold.kinds import LAYERS, SUM


def fork(graph: Graph, batchnorm: fx.Node) -> tuple[str, Callable[[], None]]:
    """Call again what leads to a BatchNorm; return the layer's name and what undoes it.

    Raises `Stays` with the reason if nothing is gained or the second call might give another value.
    """
    path = _path(graph, batchnorm)
    readers = [batchnorm, *path]
    shared = [
        i
        for i, node in enumerate(path)
        if any(user is not readers[i] for user in graph.readers(node))
    ]
    if not shared:
        raise Stays("nothing else reads what leads to it")
    first = shared[0]
    graph.check_unchanged(path[-1], batchnorm, besides=path)
    added: list[fx.Node] = []
    below = None
    for node in reversed(path[first:]):
        with graph.traced.graph.inserting_after(node):
            again = graph.traced.graph.node_copy(node)
        if below is not None:
            again.replace_input_with(node.all_input_nodes[0], below)
        added.append(again)
        below = again
    assert below is not None
    readers[first].replace_input_with(path[first], below)

    def undo() -> None:
        readers[first].replace_input_with(added[-1], path[first])
        for again in reversed(added):
            graph.traced.graph.erase_node(again)

    graph.touched.update(node.name for node in added)
    return str(path[-1].target), undo


def _path(graph: Graph, batchnorm: fx.Node) -> list[fx.Node]:
    """Return what leads to a BatchNorm, from in front of it back to a layer."""
    path: list[fx.Node] = []
    node = batchnorm
    while not path or not graph.is_a(node, LAYERS):
        if len(node.all_input_nodes) != 1 or graph.is_a(node, SUM):
            raise Stays(f"{graph.label(node)} leads to no layer alone")
        node = node.all_input_nodes[0]
        path.append(node)
    return path
