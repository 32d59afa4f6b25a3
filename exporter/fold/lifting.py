"""Lift calls of functions to the layers they are, so that folding knows them.

    torch.export      conv2d(x, block.conv.weight, block.conv.bias, [1, 1], [1, 1])
    forward() itself  functional.conv2d(x, self.block.conv.weight, self.block.conv.bias, 1, 1)
    both become       a call of the nn.Conv2d ``block.conv``, which holds these very parameters

A call whose weights are computed, and not held by the network, stays what it is. So does one whose
name belongs to a layer already, with other settings. The rest of torch.export's calls become what
torch.fx would have written for them, where folding knows that, and run as they are where not.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from exporter.errors import GraphError
from exporter.fold.affine import BATCHNORMS
from exporter.fold.calls import (
    ASSERTIONS,
    DROPOUTS,
    FUNCTIONS,
    LAYERS,
    METHODS,
    NATIVE,
    NOTHING,
    RANKS,
    SLICE,
    Layer,
    as_index,
    attribute,
    call_of,
    gives_several,
    others,
    rank,
)

SPREAD = ("view", "reshape", "permute", "expand", "flip")  # methods that take sizes one by one
UNREAD = ("size", "t", "permute", "transpose")  # methods that do nothing if nothing reads them
FREE = frozenset({"__init__", "_check_input_dim", "extra_repr", "reset_parameters"})
BATCHNORM = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - torch's only common base of all


def lift(traced: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with its calls lifted to layers; the tensors they hold are shared."""
    lifter = _Lifter(traced)
    _drop_unread(traced.graph)
    for node in list(traced.graph.nodes):
        lifter.visit(node)
    _drop_unread(traced.graph)
    return fx.GraphModule(traced, traced.graph, type(traced).__name__)


def _drop_unread(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or node.target in UNREAD):
            graph.erase_node(node)


def plain(traced: Any, module: nn.Module, kind: str) -> fx.GraphModule:
    """Return torch.export's graph with one input, and outputs as forward() gave them.

    Tensors have the names that the module's own ``named_modules()`` would find them by.
    """
    graph = traced.graph
    spec = graph._codegen.pytree_info.out_spec  # noqa: SLF001 - no public view
    output = graph.output_node()
    (flat,) = output.args
    output.args = (pytree.tree_unflatten(list(flat), spec),)
    if len(output.all_input_nodes) < len({part for part in flat if isinstance(part, fx.Node)}):
        given = type(output.args[0]).__name__
        raise GraphError(f"{kind} gives a {given}, which a graph cannot hold")
    graph.set_codegen(CodeGen())
    first = _first_names(module)
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = first.get(str(node.target), node.target)
    return fx.GraphModule(_Both(traced, module), graph, kind)


class _Both(nn.Module):
    """The tensors of a module, and what an exported program has beside them."""

    def __init__(self, traced: nn.Module, module: nn.Module) -> None:
        super().__init__()
        for name, value in (*vars(traced)["_buffers"].items(), *vars(traced).items()):
            if isinstance(value, torch.Tensor) and "." not in name:
                self.register_buffer(name, value)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, child in (*traced.named_children(), *module.named_children()):
            self.add_module(name, child)


def _first_names(module: nn.Module) -> dict[str, str]:
    """Return the first name of each tensor that has several."""
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


class _Lifter:
    """One walk over a graph."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced = traced
        self.graph = traced.graph
        self.made: dict[object, str] = {}

    def visit(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self._plain_batchnorm(node)
            return
        if node.op != "call_function":
            return
        make = None if others(node) else LAYERS.get(node.target)
        layer = make(call_of(node)) if make else None
        if layer and (name := self._name(layer, node)):
            self._call(node, layer, name)
        elif isinstance(node.target, OpOverload):
            self._as_fx_would(node)

    # ── Layers ──────────────────────────────────────────────────────────────────────

    def _call(self, node: fx.Node, layer: Layer, name: str) -> None:
        with self.graph.inserting_before(node):
            called = self.graph.call_module(name, (layer.source,))
        self._replace(node, called)

    def _replace(self, node: fx.Node, called: fx.Node) -> None:
        """Put a call in the place of another, or of the first that the other gives."""
        called.meta = {key: node.meta[key] for key in ("val", "shape") if key in node.meta}
        if gives_several(node):
            called.meta["val"] = node.meta.get("val", (None,))[0]
            for user in list(node.users):
                user.replace_all_uses_with(called)
                self.graph.erase_node(user)
        node.replace_all_uses_with(called)
        self.graph.erase_node(node)

    def _name(self, layer: Layer, node: fx.Node) -> str | None:
        """Return the name of the layer, which is made if there is none; None if it cannot be."""
        tensors = {key: value for key, value in layer.tensors.items() if value is not None}
        if not all(isinstance(t, fx.Node) and t.op == "get_attr" for t in tensors.values()):
            return None
        targets = {key: str(value.target) for key, value in tensors.items()}
        same = (layer.kind, repr(layer.options), tuple(targets.items()))
        if targets and same in self.made:
            return self.made[same]
        name = self._free_name(targets, node)
        if name is None:
            return None
        held = {
            key: attribute(self.traced, targets[key]) if key in targets else None
            for key in layer.tensors
        }
        self.traced.add_submodule(name, _made(layer, held))
        self.made[same] = name
        return name

    def _free_name(self, targets: dict[str, str], node: fx.Node) -> str | None:
        """Return the name of what holds the tensors, or one like the node's."""
        owner = next(iter(targets.values()), "").rpartition(".")[0]
        nodes = [n for n in self.graph.nodes if n.op in ("call_module", "get_attr")]
        called = {str(n.target) for n in nodes if n.op == "call_module"}
        if owner in called:
            return None
        inside = {str(n.target) for n in nodes if str(n.target).startswith(f"{owner}.")}
        if owner and inside == {f"{owner}.{key}" for key in targets}:
            return owner
        name, count = f"{owner}.{node.name}" if owner else _caller(node) or node.name, 1
        free = name
        while attribute(self.traced, free) is not None:
            count += 1
            free = f"{name}_{count}"
        return free

    def _plain_batchnorm(self, node: fx.Node) -> None:
        """Let a kind of BatchNorm whose forward() is nn.BatchNorm2d's own be one."""
        name = str(node.target)
        found: Any = self.traced.get_submodule(name)
        base = own_forward(found)
        if base is None or has_hooks(found):
            return
        kind = base if base in BATCHNORMS else RANKS.get(rank(node.all_input_nodes[0]))
        calls = [n for n in self.graph.nodes if n.op == "call_module" and n.target == name]
        if kind is None or len(calls) > 1:
            return
        held = {
            key: getattr(found, key) for key in ("weight", "bias", "running_mean", "running_var")
        }
        if held["running_mean"] is None or held["running_var"] is None:
            return
        options = {"num_features": found.num_features, "eps": found.eps}
        self.traced.add_submodule(name, _made(Layer(None, kind, options), held))

    # ── What torch.export calls by other names ──────────────────────────────────────

    def _as_fx_would(self, node: fx.Node) -> None:
        target: Any = node.target
        if target in NOTHING and (target not in DROPOUTS or node.args[2] is False):
            node.replace_all_uses_with(node.all_input_nodes[0])
            self.graph.erase_node(node)
        elif target in ASSERTIONS and not node.users:
            self.graph.erase_node(node)
        elif target is NATIVE and not others(node):
            *given, momentum, eps = node.args
            with self.graph.inserting_before(node):
                plainly = (*given, False, momentum, eps, False)
                self._replace(node, self.graph.call_function(torch.batch_norm, plainly))
        elif target is SLICE and (index := as_index(node)) is not None:
            node.target, node.args = operator.getitem, (node.args[0], index)
            if not index:
                node.replace_all_uses_with(node.all_input_nodes[0])
                self.graph.erase_node(node)
        elif target in METHODS:
            first, *rest = node.args
            if METHODS[target] in SPREAD:
                sizes: Any = rest[0]
                rest = [*sizes, *rest[1:]]
            node.op, node.target, node.args = "call_method", METHODS[target], (first, *rest)
        elif target in FUNCTIONS and not node.kwargs:
            node.target = FUNCTIONS[target]
        elif target._schema.is_mutable:  # noqa: SLF001 - no public view
            node.target = target.overloadpacket  # whose name ends as names of such functions do


def _caller(node: fx.Node) -> str | None:
    """Return the name of the layer of torch.nn whose forward() made a call, if one did."""
    callers = [("", ""), *node.meta.get("nn_module_stack", {}).values()]
    name, kind = callers[-1]
    plain = all(part.isalnum() or part.isidentifier() for part in name.split("."))
    return name if plain and kind.startswith("torch.nn.modules.") else None


def own_forward(module: Any) -> type[nn.Module] | None:
    """Return which of torch's BatchNorms a module of another class computes exactly, if any."""
    kinds = (*BATCHNORMS, nn.SyncBatchNorm, BATCHNORM)
    if type(module) in BATCHNORMS or not isinstance(module, kinds):
        return None
    base = next(kind for kind in kinds if isinstance(module, kind))
    of_its_own = type(module).__mro__[: type(module).__mro__.index(base)]
    shadowed = {key for kind in of_its_own for key in vars(kind)} & set(dir(base(1)))
    ours = {key for key in shadowed if not (key.startswith("__") and key.endswith("__"))}
    called = {"__call__", "__getattr__", "__getattribute__"}
    if ours - FREE or any(called & set(vars(kind)) for kind in of_its_own):
        return None
    checked = any("_check_input_dim" in vars(kind) for kind in of_its_own)
    return BATCHNORM if checked or base is nn.SyncBatchNorm else base


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks, which may change what it computes."""
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001 - no public view


def _made(layer: Layer, held: dict[str, Any]) -> nn.Module:
    """Return a new layer that holds these tensors."""
    made = layer.kind(**layer.options).eval()
    for key, value in held.items():
        if key in ("running_mean", "running_var") and value is not None:
            setattr(made, key, value.detach())
        elif value is None or isinstance(value, nn.Parameter):
            setattr(made, key, value)
        else:
            setattr(made, key, nn.Parameter(value, requires_grad=False))
    return made
