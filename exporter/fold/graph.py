"""A traced network, as folding reads and edits it."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from exporter.fold.affine import (
    BATCHNORMS,
    CONVOLUTIONS,
    TRANSPOSED,
    Affine,
    ChannelShift,
    ChannelSign,
    out_channels,
)

Edit = Callable[[str], None]  # takes the name of the BatchNorm it is for


class Stays(Exception):
    """Why a map cannot go further; never leaves this package."""


class Left(NamedTuple):
    """What stays in the graph behind ``node``: a sign, where one is negative, and a shift."""

    node: fx.Node
    affine: Affine
    spatial: int


class Plan(NamedTuple):
    """What folding would change, decided before anything is changed."""

    pattern: str
    spatial: int
    edits: tuple[Edit, ...] = ()
    said: tuple[str, ...] = ()
    left: tuple[Left, ...] = ()


class Kinds(NamedTuple):
    """The modules, functions and methods that compute one thing."""

    modules: tuple[type[nn.Module], ...]
    functions: tuple[object, ...] = ()


RELU = Kinds(
    (nn.ReLU,), (functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_")
)
LEAKY = Kinds((nn.LeakyReLU,), (functional.leaky_relu,))
PRELU = Kinds((nn.PReLU,))
MAXPOOL = Kinds(
    (
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    ),
    (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d),
)
IDENTITY = Kinds((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d))
AVGPOOL = Kinds((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d))
ADAPTIVE = Kinds(
    (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d),
)
FLATTEN = Kinds((nn.Flatten,), (torch.flatten, "flatten"))
SUM = Kinds((), (operator.add, operator.iadd, torch.add, "add", "add_"))
CONCATENATION = Kinds((), (torch.cat, torch.concat))
LAYERS = Kinds((*CONVOLUTIONS, *TRANSPOSED, nn.Linear))


# fmt: off
IN_PLACE = frozenset({  # of Python's operators
    "iadd", "iand", "ifloordiv", "imatmul", "imod", "imul", "ior", "ipow", "isub", "itruediv",
    "setitem",
})
# fmt: on


@dataclass(frozen=True, slots=True)
class Graph:
    """A traced network with the questions and edits that folding needs."""

    traced: fx.GraphModule

    def batchnorms(self) -> list[fx.Node]:
        """Return every use of batch normalisation, foldable or not: none may go unreported."""
        base = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - torch's only common base of all
        functions = (functional.batch_norm, torch.batch_norm)
        return [
            node
            for node in self.traced.graph.nodes
            if isinstance(self.module(node), base)
            or (node.op == "call_function" and node.target in functions)
        ]

    def module(self, node: fx.Node) -> Any:
        """Return the module that a node calls, or None if it calls none."""
        return self.traced.get_submodule(str(node.target)) if node.op == "call_module" else None

    def is_a(self, node: fx.Node, kinds: Kinds) -> bool:
        if node.op == "call_module":
            return type(self.module(node)) in kinds.modules
        return node.op in ("call_function", "call_method") and node.target in kinds.functions

    def kind(self, node: fx.Node) -> str:
        """Return a node's kind in words."""
        if self.is_a(node, RELU):
            return "ReLU"
        if node.op == "call_module":
            name = type(self.module(node)).__name__
            return "Conv" if name in ("Conv1d", "Conv2d", "Conv3d") else name
        if node.op == "placeholder":
            return "input"
        return str(getattr(node.target, "__name__", node.target))

    def label(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else node.name

    def returns_indices(self, node: fx.Node) -> bool:
        """Return whether a max-pool gives indices too."""
        pool = self.module(node)
        return bool(node.kwargs.get("return_indices") if pool is None else pool.return_indices)

    def does_nothing(self, node: fx.Node) -> bool:
        """Return whether a node gives what it reads: an identity, or a dropout at inference."""
        if node.target is functional.dropout:
            return node.kwargs.get("training", node.args[2:3]) in (False, (False,))
        return self.is_a(node, IDENTITY)

    def path(self, node: fx.Node) -> str:
        """Return what leads to a node, back to a layer, an input, or a meeting of branches."""
        kinds = [self.kind(node)]
        while not self.is_a(node, LAYERS) and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
            kinds.append(self.kind(node))
        return " → ".join(reversed(kinds))

    def only_reader(self, node: fx.Node, reader: fx.Node) -> None:
        """Raise `Stays` if anything else reads the node's values, or ``reader`` does so twice."""
        readers = (user for user in node.users if user is not reader)
        if others := sorted(user.name for user in readers if not _asks_for_shape(user)):
            raise Stays(f"{self.label(node)} is also read by {', '.join(others)}")
        reads: list[fx.Node] = []
        fx.node.map_arg((reader.args, reader.kwargs), reads.append)
        if reads.count(node) > 1:
            raise Stays(f"{self.label(node)} is read twice by {reader.name}")

    def check_unchanged(self, first: fx.Node, last: fx.Node) -> None:
        """Raise `Stays` if anything is changed in place between two nodes, in running order.

        What is changed may be a view of what the first one read, in more ways than can be told.
        """
        nodes = list(self.traced.graph.nodes)
        for node in nodes[nodes.index(first) + 1 : nodes.index(last)]:
            if self._is_in_place(node):
                changed = (
                    self.label(node.all_input_nodes[0]) if node.all_input_nodes else "a tensor"
                )
                raise Stays(f"{changed} is changed in place by {self.label(node)}")

    def check_hooks(self, node: fx.Node) -> None:
        """Raise `Stays` if the module that a node calls has hooks."""
        module = self.module(node)
        if module is not None and (
            module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001 - no public view
        ):
            raise Stays(f"{self.label(node)} has hooks, which may change what it computes")

    def check_pool(self, node: fx.Node, spatial: int | None) -> None:
        """Raise `Stays` if a pool takes another number of axes than lie behind the channels.

        It would then pool over channels, taking samples for channels.
        """
        pools = (MAXPOOL, AVGPOOL, ADAPTIVE)
        if any(self.is_a(node, kinds) for kinds in pools) and _pooled_axes(self, node) != spatial:
            raise Stays(f"{self.label(node)} pools over channels")

    def _is_in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False))
        name = str(getattr(node.target, "__name__", node.target))
        flagged = True in node.args[1:] or node.kwargs.get("inplace") or "out" in node.kwargs
        return bool(name.endswith("_") or name in IN_PLACE or flagged)

    def check_own(self, node: fx.Node) -> None:
        """Raise `Stays` if changing the module that a node calls would change anything else."""
        name = str(node.target)
        nodes = self.traced.graph.nodes
        calls = Counter(str(other.target) for other in nodes if other.op == "call_module")
        if calls[name] > 1:
            raise Stays(f"{name} is called {calls[name]} times")
        self.check_hooks(node)
        read = (str(other.target) for other in nodes if other.op == "get_attr")
        if any(target.startswith(f"{name}.") for target in read):
            raise Stays(f"{name}'s weights are also read by themselves")
        owners: dict[int, set[str]] = {}
        for key, parameter in self.traced.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), set()).add(key.rpartition(".")[0])
        if any(name in those and len(those) > 1 for those in owners.values()):
            raise Stays(f"{name} shares its weights with another module")

    def channels(self, node: fx.Node) -> int | None:
        """Return how many channels a node gives, where its shape or its kind tells."""
        if shape := _shape(node):
            return shape[1] if len(shape) > 1 else None
        module = self.module(node)
        if self.is_a(node, LAYERS):
            return out_channels(module)
        if type(module) in BATCHNORMS:
            return int(module.num_features)
        if self.is_a(node, CONCATENATION):
            parts = [self.channels(part) for part in node.all_input_nodes]
            return None if None in parts else sum(part for part in parts if part)
        keeps = (RELU, LEAKY, PRELU, MAXPOOL, IDENTITY, AVGPOOL, ADAPTIVE, SUM)
        kept = isinstance(module, ChannelShift | ChannelSign | nn.Hardtanh | nn.Hardsigmoid)
        if kept or any(self.is_a(node, kinds) for kinds in keeps):
            return self.channels(node.all_input_nodes[0])
        return None

    def flattens(self, node: fx.Node) -> bool:
        """Return whether a node gives all of a sample's values as one axis of features."""
        if self.is_a(node, FLATTEN):
            return _flattens_all(node, self.module(node))
        if node.target not in ("view", "reshape", torch.reshape):
            return False
        before, after = _shape(node.all_input_nodes[0]), _shape(node)
        return bool(before and after and len(after) == 2 and before[0] == after[0])

    def is_matrix(self, node: fx.Node) -> bool:
        """Return whether a node is known to give (samples, features), with nothing behind."""
        if shape := _shape(node):
            return len(shape) == 2
        if self.flattens(node):
            return True
        alike = any(self.is_a(node, kinds) for kinds in (RELU, LEAKY, PRELU, IDENTITY))
        if alike or isinstance(self.module(node), nn.Linear | nn.BatchNorm1d | nn.Hardtanh):
            return self.is_matrix(node.all_input_nodes[0])
        return False

    # ── Edits ───────────────────────────────────────────────────────────────────────

    def settle(self, left: Left, batchnorm: str) -> list[str]:
        """Put a sign and a shift behind a node, the shift behind a max-pool that follows it."""
        node, affine, spatial = left
        along = (-1, *[1] * spatial)
        said = []
        if affine.negative:
            sign = torch.where(affine.scale < 0, -1.0, 1.0).to(affine.scale)
            node = self.insert_behind(node, f"{batchnorm}_sign", ChannelSign(sign.view(along)))
            said.append(f"sign of {affine.negative} channels with γ < 0 by one multiplication")
        if affine.shift.any():
            pooled = self._maxpool_behind(node, spatial)
            self.insert_behind(pooled, batchnorm, ChannelShift(affine.shift.view(along)))
            said.append(f"shift by one addition behind {self.label(pooled)}")
        return said

    def remove(self, node: fx.Node) -> None:
        """Let all that reads a node read what it reads."""
        node.replace_all_uses_with(node.all_input_nodes[0])
        self.traced.graph.erase_node(node)

    def insert_behind(self, node: fx.Node, name: str, module: nn.Module) -> fx.Node:
        """Let all that reads a node read ``module`` of it, under the name or one like it."""
        free, count = name, 1
        while not self._is_free(free):
            count += 1
            free = f"{name}_{count}"
        parent, _, last = free.rpartition(".")
        setattr(self.traced.get_submodule(parent), last, module)
        with self.traced.graph.inserting_after(node):
            added = self.traced.graph.call_module(free, (node,))
        node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        return added

    def _is_free(self, name: str) -> bool:
        """Return whether nothing has the name, or only a BatchNorm that is called no more."""
        calls = (str(n.target) for n in self.traced.graph.nodes if n.op == "call_module")
        if name in calls:
            return False
        parent, _, last = name.rpartition(".")
        found = getattr(self.traced.get_submodule(parent), last, None)
        return found is None or type(found) in BATCHNORMS

    def _maxpool_behind(self, node: fx.Node, spatial: int) -> fx.Node:
        """Return the max-pool that is all that reads a node, or the node itself."""
        users = list(node.users)
        if len(users) != 1 or not self.is_a(users[0], MAXPOOL):
            return node
        try:
            self.check_pool(users[0], spatial)
            self.check_hooks(users[0])
        except Stays:
            return node
        return node if self.returns_indices(users[0]) else users[0]


def _pooled_axes(graph: Graph, node: fx.Node) -> int:
    """Return over how many axes a pool goes, which ends its kind's name."""
    called = node.target if graph.module(node) is None else type(graph.module(node))
    name = str(getattr(called, "__name__", called))
    kinds = {functional.max_pool1d: 1, functional.max_pool2d: 2, functional.max_pool3d: 3}
    return kinds[called] if called in kinds else int(name[-2])


def _asks_for_shape(node: fx.Node) -> bool:
    """Return whether a node reads no values, which a fold changes, but what it leaves alone."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    asks = node.target is getattr and len(node.args) > 1
    return asks and node.args[1] in ("shape", "ndim", "dtype", "device")


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    """Return a node's shape, if an example was run and the node gives one tensor."""
    found: tuple[int, ...] | None = node.meta.get("shape")
    return found


def note_shapes(traced: fx.GraphModule, example: torch.Tensor) -> None:
    """Run the network and note the shape of every tensor, for `_shape` to find."""

    class Shapes(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            found = super().run_node(node)
            if isinstance(found, torch.Tensor):
                node.meta["shape"] = tuple(found.shape)
            return found

    with torch.inference_mode():
        Shapes(traced).run(example)


def _flattens_all(node: fx.Node, module: Any) -> bool:
    """Return whether a flatten keeps the samples apart and leaves one axis of features."""
    if module is not None:
        return bool(module.start_dim == 1 and module.end_dim == -1)
    start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
    end = node.kwargs.get("end_dim", node.args[2] if len(node.args) > 2 else -1)
    return (start, end) == (1, -1)
