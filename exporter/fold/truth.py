"""What a network computes on an example, in float64, and how far a fold has moved it.

After a fold, only what it changed is computed again, and what reads that, until a value agrees with
the unfolded network's. The largest relative L2 error where they meet again is the fold's error; a
fold that is wrong meets it nowhere, and shows at the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from exporter.fold.graph import Graph
from exporter.fold.same import Example
from exporter.fold.shapes import on_example, shape_of

AGREES = 1e-9  # rounding in float64 stays far below it, and mistakes far above
MOST_VALUES = 1 << 28  # that are kept, 2 GiB
SAMPLES = 2


@dataclass(frozen=True, slots=True)
class Truth:
    """The value of every node of a network, by the node's name."""

    values: dict[str, Any]

    @classmethod
    def of(cls, traced: fx.GraphModule, example: Example) -> Truth | None:
        """Run a network in float64. None if that cannot be done, so that nothing is measured.

        It cannot where a network insists on another type, where values would take too much room,
        and where running node by node gives something else than running the network does, since it
        draws random numbers or reads what it has changed in place.
        """
        size = sum(
            torch.Size(shape).numel() for shape in map(shape_of, traced.graph.nodes) if shape
        )
        if size > MOST_VALUES:
            return None

        def run(*inputs: torch.Tensor) -> Truth | None:
            truth = cls({})
            graph = Graph(traced, torch.float64)
            given = iter(inputs)
            for node in traced.graph.nodes:
                if node.op == "placeholder":  # what follows the inputs has its default
                    truth.values[node.name] = next(given, *node.args)
                else:
                    truth.values[node.name] = truth.value(graph, node)
            output = next(node for node in traced.graph.nodes if node.op == "output")
            again = traced(*(x.clone() for x in inputs))
            return truth if distance(again, truth.values[output.name]) <= AGREES else None

        try:
            with torch.inference_mode():
                exact = tuple(one.double() for one in example)
                found: Truth | None = on_example(run, exact, SAMPLES)
        except Exception:  # of the network's own forward(), which may insist on another type
            return None
        return found

    def copy(self) -> Truth:
        return Truth(dict(self.values))

    def value(self, graph: Graph, node: fx.Node) -> Any:
        """Return what a node makes of the values of what it reads."""
        if node.op == "get_attr":
            return _attribute(graph.traced, str(node.target))
        in_place = graph.is_in_place(node)

        def known(read: fx.Node) -> Any:
            value = self.values[read.name]
            return value.clone() if in_place and isinstance(value, torch.Tensor) else value

        args: Any = fx.node.map_arg(node.args, known)
        kwargs: Any = fx.node.map_arg(node.kwargs, known)
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            return graph.module(node)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def error(self, graph: Graph) -> float:
        """Return how far the edits since the last call have moved the network, and follow them."""
        moved: set[fx.Node] = set()
        error = 0.0
        with torch.inference_mode():
            for node in graph.traced.graph.nodes:
                if node.name not in graph.touched and moved.isdisjoint(node.all_input_nodes):
                    continue
                value = self.value(graph, node)
                away = distance(value, self.values[node.name]) if node.name in self.values else None
                if away is not None and (away <= AGREES or node.op == "output"):
                    error = max(error, away)
                else:
                    moved.add(node)
                    self.values[node.name] = value
        graph.touched.clear()
        return error


def distance(value: Any, truth: Any) -> float:
    """Return the largest relative L2 distance between two values or two structures of them."""
    if isinstance(truth, torch.Tensor):
        if not isinstance(value, torch.Tensor) or value.shape != truth.shape:
            return float("inf")
        if truth.is_complex():
            return distance(torch.view_as_real(value), torch.view_as_real(truth))
        if not truth.is_floating_point():
            return 0.0 if torch.equal(value, truth) else float("inf")
        same = (value == truth) | (value.isnan() & truth.isnan())
        if bool(same.all()):
            return 0.0
        size = torch.linalg.vector_norm(truth)
        away = float(torch.linalg.vector_norm(value - truth) / (size if size > 0 else 1.0))
        return away if away < float("inf") else float("inf")
    if isinstance(truth, dict):
        return max((distance(value.get(key), part) for key, part in truth.items()), default=0.0)
    if isinstance(truth, tuple | list):
        parts = zip(value, truth, strict=True)
        return max((distance(one, other) for one, other in parts), default=0.0)
    return 0.0 if value == truth else float("inf")


def _attribute(module: Any, target: str) -> Any:
    for name in target.split("."):
        module = getattr(module, name)
    return module
