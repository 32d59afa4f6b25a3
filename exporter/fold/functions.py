"""Turn calls of ``batch_norm()`` into BatchNorm modules, which is what the rest of folding knows.

Layers that join a BatchNorm with an activation call the function on tensors of their own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from exporter.fold.graph import Graph
from exporter.fold.kinds import LAYERS, is_batch_norm
from exporter.fold.shapes import shape_of


def name_functions(graph: Graph) -> None:
    """Let every call of ``batch_norm()`` that is plainly one at inference be a module's call."""
    for node in list(graph.traced.graph.nodes):
        if is_batch_norm(node) and (made := _as_module(graph, node)):
            batchnorm, owner = made
            named = graph.insert_behind(node, f"{owner}_norm", batchnorm)
            named.args = (node.all_input_nodes[0],)
            reads = node.all_input_nodes[1:]
            graph.traced.graph.erase_node(node)
            for read in reads:
                if not read.users:
                    graph.traced.graph.erase_node(read)


def _as_module(graph: Graph, node: fx.Node) -> tuple[nn.Module, str] | None:
    """Return what a call computes and who owns its statistics; None if that is not plain."""
    try:
        bound = inspect.signature(functional.batch_norm).bind(*node.args, **node.kwargs)
    except TypeError:  # torch.batch_norm, which takes more
        return None
    bound.apply_defaults()
    given: dict[str, Any] = bound.arguments
    names = ("running_mean", "running_var", "weight", "bias")
    tensors = {name: _read(graph, given[name]) for name in names if given[name] is not None}
    source, eps = given["input"], given["eps"]
    kind = _kind(graph, source) if isinstance(source, fx.Node) else None
    plain = given["training"] is False and isinstance(eps, float) and kind is not None
    whole = all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    if not (plain and whole and {"running_mean", "running_var"} <= set(tensors)):
        return None
    assert kind is not None
    batchnorm = kind(len(tensors["running_mean"]), eps=eps, affine=False)
    for name, tensor in tensors.items():
        value = tensor.detach().clone()
        setattr(batchnorm, name, nn.Parameter(value, False) if name in names[2:] else value)
    return batchnorm.eval(), str(given["running_mean"].target).rpartition(".")[0] or node.name


def _kind(graph: Graph, source: fx.Node) -> type[Any] | None:
    """Return which BatchNorm is over what a node gives, by its axes, if they are known."""
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    if shape := shape_of(source):
        return kinds.get(len(shape))
    if graph.is_a(source, LAYERS) and not isinstance(graph.module(source), nn.Linear):
        return kinds[len(graph.module(source).kernel_size) + 2]
    return None


def _read(graph: Graph, node: Any) -> Any:
    """Return the tensor of the network's own that a node reads, if it does."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: Any = graph.traced
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found
