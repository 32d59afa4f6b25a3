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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen
from torch.nn import functional
from torch.utils import _pytree as pytree

from exporter.errors import GraphError
from exporter.fold.affine import BATCHNORMS, CONVOLUTIONS, TRANSPOSED

aten = torch.ops.aten
RANKS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
FREE = frozenset({"__init__", "_check_input_dim", "extra_repr", "reset_parameters"})

Arguments = dict[str, Any]


class Layer(NamedTuple):
    """A layer that a call is: what it reads, how it is made, and the tensors it holds, by name."""

    source: Any
    kind: type[nn.Module]
    options: dict[str, Any]
    tensors: dict[str, Any] = {}  # noqa: RUF012 - never changed


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
        if not node.users and (node.op == "get_attr" or node.target == "size"):
            graph.erase_node(node)


def of_program(program: Any, module: nn.Module, kind: str) -> fx.GraphModule:
    """Return an exported program's graph, plain: one input, and outputs as forward() gave them.

    Tensors have the names that the module's own ``named_modules()`` would find them by.
    """
    traced = program.module(check_guards=False)
    graph = traced.graph
    spec = graph._codegen.pytree_info.out_spec
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
        make = LAYERS.get(node.target)
        layer = make(_arguments(node), node) if make else None
        if layer and (name := self._name(layer, node)):
            self._call(node, layer, name)
        elif isinstance(node.target, torch._ops.OpOverload):
            self._as_fx_would(node)

    # ── Layers ──────────────────────────────────────────────────────────────────────

    def _call(self, node: fx.Node, layer: Layer, name: str) -> None:
        with self.graph.inserting_before(node):
            called = self.graph.call_module(name, (layer.source,))
        called.meta = dict(node.meta)
        if layer.kind in PAIRED:  # whose function gives values and indices
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
            key: _attribute(self.traced, targets[key]) if key in targets else None
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
        name, count = f"{owner}.{node.name}" if owner else node.name, 1
        free = name
        while _attribute(self.traced, free) is not None:
            count += 1
            free = f"{name}_{count}"
        return free

    def _plain_batchnorm(self, node: fx.Node) -> None:
        """Let a kind of BatchNorm whose forward() is nn.BatchNorm2d's own be one."""
        name = str(node.target)
        found: Any = self.traced.get_submodule(name)
        base = _own_forward(found)
        if base is None or found._forward_hooks or found._forward_pre_hooks:
            return
        kind = base if base in BATCHNORMS else RANKS.get(rank(node.all_input_nodes[0], self) or 0)
        calls = [n for n in self.graph.nodes if n.op == "call_module" and n.target == name]
        if kind is None or len(calls) > 1:
            return
        held = {key: getattr(found, key) for key in ("weight", "bias", *STATISTICS)}
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
        elif target in METHODS:
            first, *rest = node.args
            if rest and isinstance(rest[0], list | tuple):
                rest = [*rest[0], *rest[1:]]
            node.op, node.target, node.args = "call_method", METHODS[target], (first, *rest)
        elif target in FUNCTIONS and not node.kwargs:
            node.target = FUNCTIONS[target]
        elif target._schema.is_mutable:
            node.target = target.overloadpacket  # whose name ends as names of such functions do


def rank(node: fx.Node, lifter: _Lifter) -> int | None:
    """Return how many axes a node's tensor has, where an example or a convolution tells."""
    if node.op == "call_module":
        module: Any = lifter.traced.get_submodule(str(node.target))
        if type(module) in (*CONVOLUTIONS, *TRANSPOSED):
            return 2 + len(module.kernel_size)
    if shape := node.meta.get("shape"):
        return len(shape)
    value = node.meta.get("val")
    return value.ndim if isinstance(value, torch.Tensor) else None


def _own_forward(module: Any) -> type[nn.Module] | None:
    """Return which of torch's BatchNorms a module of another class computes exactly, if any."""
    kinds = (*BATCHNORMS, nn.SyncBatchNorm, nn.modules.batchnorm._BatchNorm)
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
    return nn.modules.batchnorm._BatchNorm if checked or base is nn.SyncBatchNorm else base


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


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


# ── Calls and the layers they are ───────────────────────────────────────────────────

STATISTICS = ("running_mean", "running_var")
CONVOLVED = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
NAMES: dict[Any, tuple[str, ...]] = {  # of functions that cannot be asked for them
    functional.conv1d: CONVOLVED,
    functional.conv2d: CONVOLVED,
    functional.conv3d: CONVOLVED,
    functional.linear: ("input", "weight", "bias"),
    functional.prelu: ("self", "weight"),
    functional.batch_norm: (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    ),
    torch.batch_norm: (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("training", "momentum", "eps", "cudnn_enabled"),
    ),
}


def _arguments(node: fx.Node) -> Arguments:
    """Return a call's arguments by name, with the defaults of an aten call."""
    target: Any = node.target
    if target in NAMES:
        return {**dict(zip(NAMES[target], node.args, strict=False)), **node.kwargs}
    schema = target._schema.arguments
    given = dict(zip((argument.name for argument in schema), node.args, strict=False))
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**defaults, **given, **node.kwargs}


def _parameter(value: object) -> torch.Tensor | None:
    """Return the tensor that a get_attr node gives."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found = _attribute(value.graph.owning_module, str(value.target))
    return found if isinstance(found, torch.Tensor) else None


def _convolution(given: Arguments, node: fx.Node) -> Layer | None:
    weight = _parameter(given["weight"])
    if weight is None or weight.ndim not in (3, 4, 5):
        return None
    axes = weight.ndim - 2
    transposed = bool(given.get("transposed")) or "transpose" in str(node.target)
    groups = given.get("groups", 1)
    into, out = weight.shape[1] * groups, weight.shape[0]
    if transposed:
        into, out = weight.shape[0], weight.shape[1] * groups
    options = {"in_channels": into, "out_channels": out, "groups": groups, "device": "meta"}
    options["kernel_size"] = tuple(weight.shape[2:])
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0)):
        value = given.get(name, default)
        if name != "output_padding" or transposed:
            options[name] = value if isinstance(value, str) else _each(value, axes)
    kind = (TRANSPOSED if transposed else CONVOLUTIONS)[axes - 1]
    return Layer(given["input"], kind, options, {key: given.get(key) for key in ("weight", "bias")})


def _each(value: Any, axes: int) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * axes if len(values) == 1 else values


def _linear(given: Arguments, node: fx.Node) -> Layer | None:
    weight = _parameter(given["weight"])
    if weight is None or weight.ndim != 2:
        return None
    out, into = weight.shape
    options = {"in_features": into, "out_features": out, "device": "meta"}
    return Layer(
        given["input"], nn.Linear, options, {key: given.get(key) for key in ("weight", "bias")}
    )


def _batchnorm(given: Arguments, node: fx.Node) -> Layer | None:
    mean = _parameter(given.get("running_mean"))
    kind = RANKS.get(_rank_in(given["input"]) or 0)
    if mean is None or given.get("training", False) is not False or kind is None:
        return None
    names = ("running_mean", "running_var", "weight", "bias")
    tensors = {name: given.get(name) for name in names}
    if tensors["running_var"] is None:
        return None
    options = {"num_features": len(mean), "eps": given.get("eps", 1e-5)}
    if tensors["weight"] is None and tensors["bias"] is None:
        options["affine"] = False
    return Layer(given["input"], kind, options, tensors)


def _rank_in(node: fx.Node) -> int | None:
    return rank(node, _Lifter(node.graph.owning_module))  # type: ignore[arg-type]  # a GraphModule


def _prelu(given: Arguments, node: fx.Node) -> Layer | None:
    weight = _parameter(given["weight"])
    if weight is None or weight.ndim > 1:
        return None
    options = {"num_parameters": weight.numel()}
    return Layer(given["self"], nn.PReLU, options, {"weight": given["weight"]})


def _pool(kind: type[nn.Module]) -> Callable[[Arguments, fx.Node], Layer]:
    names = ("kernel_size", "padding", "dilation", "ceil_mode", "count_include_pad")

    def layer(given: Arguments, node: fx.Node) -> Layer:
        options = {name: _fixed(given[name]) for name in names if name in given}
        options["stride"] = _fixed(given["stride"]) or None
        if "divisor_override" in given:
            options["divisor_override"] = given["divisor_override"]
        return Layer(given["self"], kind, options)

    return layer


def _adaptive(kind: type[nn.Module]) -> Callable[[Arguments, fx.Node], Layer | None]:
    def layer(given: Arguments, node: fx.Node) -> Layer | None:
        size = given["output_size"]
        read = [user.args[1] for user in node.users if user.users or user.args[1] == 0]
        if kind in PAIRED and any(index != 0 for index in read):
            return None
        if not all(isinstance(part, int) for part in size):
            return None
        return Layer(given["self"], kind, {"output_size": _fixed(size)})

    return layer


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _hardtanh(given: Arguments, node: fx.Node) -> Layer | None:
    low = given.get("min_val", given.get("min"))
    high = given.get("max_val", given.get("max"))
    numbers = isinstance(low, int | float) and isinstance(high, int | float)
    if not numbers or not low < high:
        return None
    options = {"min_val": low, "max_val": high, "inplace": "_." in node.target.__name__}  # type: ignore[union-attr]  # an operator
    return Layer(given["self"], nn.Hardtanh, options)


def _leaky(given: Arguments, node: fx.Node) -> Layer:
    options = {"negative_slope": given["negative_slope"], "inplace": True}
    return Layer(given["self"], nn.LeakyReLU, options)


def _hardsigmoid(given: Arguments, node: fx.Node) -> Layer:
    return Layer(given["self"], nn.Hardsigmoid, {"inplace": True})


PAIRED = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
LAYERS: dict[Any, Callable[[Arguments, fx.Node], Layer | None]] = {
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), _convolution),
    **dict.fromkeys((functional.linear, aten.linear.default), _linear),
    **dict.fromkeys((functional.prelu, aten.prelu.default), _prelu),
    **dict.fromkeys(
        (functional.batch_norm, torch.batch_norm, aten.batch_norm.default), _batchnorm
    ),
    **dict.fromkeys((aten.conv1d.default, aten.conv1d.padding), _convolution),
    **dict.fromkeys((aten.conv2d.default, aten.conv2d.padding), _convolution),
    **dict.fromkeys((aten.conv3d.default, aten.conv3d.padding), _convolution),
    **dict.fromkeys((aten.conv_transpose1d.default, aten.conv_transpose2d.input), _convolution),
    **dict.fromkeys((aten.conv_transpose3d.input, aten.convolution.default), _convolution),
    aten.max_pool1d.default: _pool(nn.MaxPool1d),
    aten.max_pool2d.default: _pool(nn.MaxPool2d),
    aten.max_pool3d.default: _pool(nn.MaxPool3d),
    aten.avg_pool1d.default: _pool(nn.AvgPool1d),
    aten.avg_pool2d.default: _pool(nn.AvgPool2d),
    aten.avg_pool3d.default: _pool(nn.AvgPool3d),
    aten.adaptive_avg_pool1d.default: _adaptive(nn.AdaptiveAvgPool1d),
    aten.adaptive_avg_pool2d.default: _adaptive(nn.AdaptiveAvgPool2d),
    aten.adaptive_avg_pool3d.default: _adaptive(nn.AdaptiveAvgPool3d),
    aten.adaptive_max_pool1d.default: _adaptive(nn.AdaptiveMaxPool1d),
    aten.adaptive_max_pool2d.default: _adaptive(nn.AdaptiveMaxPool2d),
    aten.adaptive_max_pool3d.default: _adaptive(nn.AdaptiveMaxPool3d),
    **dict.fromkeys((aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default), _hardtanh),
    aten.leaky_relu_.default: _leaky,
    aten.hardsigmoid_.default: _hardsigmoid,
}
DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
NOTHING = (*DROPOUTS, aten.alias.default, aten.detach.default)
ASSERTIONS = (
    *(aten._assert_tensor_metadata.default, aten._assert_scalar.default),
    *(aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default),
)
METHODS = {
    aten.view.default: "view",
    aten.reshape.default: "reshape",
    aten.permute.default: "permute",
    aten.transpose.int: "transpose",
    aten.contiguous.default: "contiguous",
    aten.clone.default: "clone",
    aten.chunk.default: "chunk",
    aten.split.Tensor: "split",
    aten.sym_size.int: "size",
}
FUNCTIONS: dict[Any, Any] = {
    aten.relu.default: functional.relu,
    aten.relu_.default: torch.relu_,
    aten.relu6.default: functional.relu6,
    aten.leaky_relu.default: functional.leaky_relu,
    aten.hardsigmoid.default: functional.hardsigmoid,
    aten.sigmoid.default: torch.sigmoid,
    aten.flatten.using_ints: torch.flatten,
    aten.mean.dim: torch.mean,
    aten.cat.default: torch.cat,
    aten.add.Tensor: operator.add,
    aten.add_.Tensor: operator.iadd,
    aten.sub.Tensor: operator.sub,
    aten.mul.Tensor: operator.mul,
    aten.div.Tensor: operator.truediv,
    aten.batch_norm.default: torch.batch_norm,
}
