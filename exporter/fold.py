"""Fold batch normalisation away, exactly.

At inference it is one affine map per channel:

    BN(x) = a·x + c            a = γ / √(σ² + ε),  c = β − a·μ

Behind a convolution, scale and shift go into its weights and bias:

    BN(W∗x + b)                = (a·W)∗x + (a·b + c)

Behind a ReLU the usual fold is wrong, since ReLU(a·z + c) is not a·ReLU(z) + c. Still exact, with
z = W∗x + b, is a clamp at c per channel, and the clamp is a ReLU with a constant on either side:

    BN(ReLU(z))                = max(a·z + c, c)  for a ≥ 0      = sign(a)·ReLU(|a|·z) + c
                                 min(a·z + c, c)  for a < 0

so |a| goes into the convolution and the ReLU stays, where every runtime fuses it; what is left is
one addition per channel, and one multiplication by ±1 if some a is negative. Adding a constant
commutes with max-pooling, so where a max-pool follows, the addition moves behind it, onto a quarter
of the elements. In ONNX Runtime the forms (clamp before the pool, clamp behind it, this one) are
equally fast (benchmarks/stem_forms.py); this one leaves a Conv+ReLU, which TensorRT fuses.

Everything is computed in float64 and rounded once, to the type the network had.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import fx, nn
from torch.nn import functional

from exporter.errors import GraphError
from exporter.records import Fate

if TYPE_CHECKING:
    from collections.abc import Iterator

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MAXPOOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
RELUS = (functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_")


@dataclass(frozen=True, slots=True)
class Folded:
    """The folded network, a copy, and what became of each BatchNorm of the original."""

    module: fx.GraphModule
    fates: tuple[Fate, ...]

    @property
    def kept(self) -> tuple[Fate, ...]:
        return tuple(fate for fate in self.fates if not fate.folded)


def fold_batchnorm(module: nn.Module) -> Folded:
    """Return a copy with every BatchNorm folded that can be, exactly. The argument is left alone.

    Folded are Conv → BatchNorm and Conv → ReLU → BatchNorm, with or without a max-pool behind, for
    any sign of γ. Any other BatchNorm stays, and its fate says why.

    Raises `GraphError` if the network is in training mode, cannot be traced by torch.fx, or has a
    BatchNorm without running statistics, with non-finite ones, or with σ² + ε ≤ 0.
    """
    if module.training:
        raise GraphError("cannot fold a network in training mode", hint="call module.eval() first")
    dtype = _floating_dtype(module)
    kind = type(module).__name__
    try:
        copy = deepcopy(module).double()
    except RuntimeError as error:  # what parametrisations of the old kind leave in place of weights
        raise GraphError(f"cannot copy {kind}: {_first_line(error)}") from error
    try:
        traced = fx.symbolic_trace(copy)
    except Exception as error:  # tracing runs the user's own forward(), which may raise anything
        raise GraphError(f"torch.fx cannot trace {kind}: {_first_line(error)}") from error
    fates = tuple(_fold(traced, node) for node in _batchnorms(traced))
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    return Folded(traced.to(dtype).eval(), fates)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), repr(error))


def _floating_dtype(module: nn.Module) -> torch.dtype:
    tensors = (*module.parameters(), *module.buffers())
    kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if len(kinds) > 1:
        names = ", ".join(sorted(map(str, kinds)))
        raise GraphError(f"cannot fold a network that mixes {names}")
    return kinds.pop() if kinds else torch.get_default_dtype()


# ── One BatchNorm ───────────────────────────────────────────────────────────────────


def _batchnorms(traced: fx.GraphModule) -> list[fx.Node]:
    """Return every use of batch normalisation, foldable or not: none may go unreported."""
    kind = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - torch's only common base of them all
    return [
        node
        for node in traced.graph.nodes
        if (node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), kind))
        or (node.op == "call_function" and node.target in (functional.batch_norm, torch.batch_norm))
    ]


def _fold(traced: fx.GraphModule, node: fx.Node) -> Fate:
    """Fold one BatchNorm in place, or leave it and say why."""
    if node.op == "call_function":
        return Fate(node.name, "batch_norm()", False, "a function call, not a BatchNorm module")
    name = str(node.target)
    batchnorm: Any = traced.get_submodule(name)
    if type(batchnorm) not in BATCHNORMS:
        kind = type(batchnorm).__name__
        return Fate(name, kind, False, f"a {kind}, whose arithmetic is its own")
    scale, shift = _affine(batchnorm, name)
    chain = list(_chain(traced, node))
    pattern = " → ".join([*(_kind(traced, link) for link in reversed(chain)), "BatchNorm"])
    if reason := _obstacle(traced, node, chain):
        return Fate(name, pattern, False, reason)
    convolution = str(chain[-1].target)
    conv: Any = traced.get_submodule(convolution)
    if len(chain) == 1:
        _scale_convolution(conv, scale, shift)
        node.replace_all_uses_with(chain[0])
        traced.graph.erase_node(node)
        return Fate(name, pattern, True, f"scale and shift into {convolution}")
    _scale_convolution(conv, scale.abs(), torch.zeros_like(shift))
    where = _replace_by_shift(traced, node, scale, shift, spatial=len(conv.kernel_size))
    return Fate(name, pattern, True, f"scale into {convolution}, {where}")


def _affine(batchnorm: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a and c of BN(x) = a·x + c, (channels,) float64. Raises `GraphError`."""
    mean, variance = batchnorm.running_mean, batchnorm.running_var
    if batchnorm.training:
        raise GraphError(f"{name} is in training mode", hint="call module.eval() first")
    if mean is None or variance is None:
        raise GraphError(f"{name} has no running statistics, so it cannot be folded or exported")
    gamma = torch.ones_like(mean) if batchnorm.weight is None else batchnorm.weight.detach()
    beta = torch.zeros_like(mean) if batchnorm.bias is None else batchnorm.bias.detach()
    named = {"running_mean": mean, "running_var": variance, "weight": gamma, "bias": beta}
    for kind, value in named.items():
        if bad := (~torch.isfinite(value)).nonzero().flatten().tolist():
            channel = bad[0]
            raise GraphError(f"{name}.{kind} is {value[channel].item()} in channel {channel}")
    if bad := (variance + batchnorm.eps <= 0).nonzero().flatten().tolist():
        found = variance[bad[0]].item()
        raise GraphError(f"{name}.running_var + eps is not above 0 in channel {bad[0]} ({found:g})")
    scale = gamma / torch.sqrt(variance + batchnorm.eps)
    return scale, beta - scale * mean


def _chain(traced: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """Yield what feeds the BatchNorm: a convolution, or a ReLU and what feeds that."""
    source = node.all_input_nodes[0]
    yield source
    if _is_relu(traced, source):
        yield source.all_input_nodes[0]


def _obstacle(traced: fx.GraphModule, node: fx.Node, chain: list[fx.Node]) -> str | None:
    """Return why the BatchNorm cannot be folded into the end of its chain, or None."""
    end = chain[-1]
    if not _calls(end, traced, CONVOLUTIONS):
        return "no convolution in front of it"
    calls = Counter(str(other.target) for other in traced.graph.nodes if other.op == "call_module")
    for name in (str(node.target), str(end.target)):
        module = traced.get_submodule(name)
        if calls[name] > 1:
            return f"{name} is called {calls[name]} times"
        if module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001 - no public view
            return f"{name} has hooks, which may change what it computes"
        if any(
            other.op == "get_attr" and str(other.target).startswith(f"{name}.")
            for other in traced.graph.nodes
        ):
            return f"{name}'s weights are also read by themselves"
    if str(end.target) in _shared_parameters(traced):
        return f"{end.target} shares its weights with another module"
    for link in chain:
        if len(link.users) > 1:
            others = ", ".join(sorted(user.name for user in link.users if user is not node))
            return f"{_label(link)} is also read by {others}"
    return None


def _scale_convolution(conv: Any, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Replace W by scale·W and b by scale·b + shift, per output channel."""
    along = (-1, *[1] * (conv.weight.ndim - 1))
    bias = torch.zeros_like(shift) if conv.bias is None else conv.bias.detach()
    conv.weight = nn.Parameter(conv.weight.detach() * scale.view(along), requires_grad=False)
    conv.bias = nn.Parameter(bias * scale + shift, requires_grad=False)


def _replace_by_shift(
    traced: fx.GraphModule, node: fx.Node, scale: torch.Tensor, shift: torch.Tensor, *, spatial: int
) -> str:
    """Put ±1· (if needed) and +c in place of a BatchNorm behind a ReLU; return where they went."""
    name, source = str(node.target), node.all_input_nodes[0]
    along = (-1, *[1] * spatial)
    said = ""
    if negative := int((scale < 0).sum()):
        sign = torch.where(scale < 0, -1.0, 1.0).to(scale)
        traced.add_submodule(f"{name}_sign", ChannelSign(sign.view(along)))
        with traced.graph.inserting_before(node):
            source = traced.graph.call_module(f"{name}_sign", (source,))
        said = f"sign of {negative} channels with γ < 0 by one multiplication, "
    node.replace_all_uses_with(source)
    traced.graph.erase_node(node)
    pool = _only_maxpool(traced, source)
    behind = pool or source
    _set_submodule(traced, name, ChannelShift(shift.view(along)))
    with traced.graph.inserting_after(behind):
        added = traced.graph.call_module(name, (behind,))
    behind.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
    return f"{said}shift by one addition behind {_label(behind)}"


def _only_maxpool(traced: fx.GraphModule, source: fx.Node) -> fx.Node | None:
    """Return the max-pool that is all that reads a node: an addition commutes with it."""
    users = list(source.users)
    if len(users) == 1 and _calls(users[0], traced, MAXPOOLS):
        pool: Any = traced.get_submodule(str(users[0].target))
        return None if pool.return_indices else users[0]
    return None


class ChannelShift(nn.Module):
    """Add one constant per channel: what is left of a BatchNorm behind a ReLU."""

    shift: torch.Tensor

    def __init__(self, shift: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


class ChannelSign(nn.Module):
    """Multiply each channel by 1 or −1, which rounds nothing."""

    sign: torch.Tensor

    def __init__(self, sign: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("sign", sign)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.sign


# ── Reading a traced graph ──────────────────────────────────────────────────────────


def _calls(
    node: object, traced: fx.GraphModule, kinds: tuple[type[nn.Module], ...]
) -> TypeGuard[fx.Node]:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and type(traced.get_submodule(str(node.target))) in kinds
    )


def _is_relu(traced: fx.GraphModule, node: fx.Node) -> bool:
    called = node.op in ("call_function", "call_method") and node.target in RELUS
    return called or _calls(node, traced, (nn.ReLU,))


def _kind(traced: fx.GraphModule, node: fx.Node) -> str:
    if _is_relu(traced, node):
        return "ReLU"
    if node.op == "call_module":
        kind = type(traced.get_submodule(str(node.target))).__name__
        return "Conv" if kind in ("Conv1d", "Conv2d", "Conv3d") else kind
    return (
        node.op if node.op == "placeholder" else str(getattr(node.target, "__name__", node.target))
    )


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _shared_parameters(traced: fx.GraphModule) -> set[str]:
    """Return the modules whose weight or bias is also another module's."""
    owners: dict[int, list[str]] = {}
    for name, parameter in traced.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _set_submodule(traced: fx.GraphModule, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(traced.get_submodule(parent), last, module)
