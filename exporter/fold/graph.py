"""A traced network, as folding reads and edits it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from exporter.fold.affine import (
    BATCHNORMS,
    Affine,
    ChannelClamp,
    ChannelScale,
    ChannelShift,
    misfit,
    out_channels,
    overflow,
)
from exporter.fold.kinds import (
    ADAPTIVE,
    AVGPOOL,
    CONCATENATION,
    FLATTEN,
    IDENTITY,
    IN_PLACE,
    LAYERS,
    LEAKY,
    MAXPOOL,
    PRELU,
    REARRANGING,
    RELU,
    RESIZE,
    SUM,
    ZERO_PAD,
    Kinds,
    asks_for_shape,
    is_batch_norm,
    is_rearrangement,
    name_of,
)
from exporter.fold.shapes import rearranged, shape_of

Edit = Callable[[str], None]  # takes the name of the BatchNorm it is for


class Stays(Exception):
    """Why a map cannot go further; never leaves this package."""


class Left(NamedTuple):
    """What stays in the graph behind ``node``: a sign, where one is negative, and a shift."""

    node: fx.Node
    affine: Affine
    spatial: int


class Plan(NamedTuple):
    """What folding would change, decided before anything is changed.

    ``once`` has the nodes that two plans cannot both change, even for channels of their own.
    """

    pattern: str
    spatial: int
    edits: tuple[Edit, ...] = ()
    said: tuple[str, ...] = ()
    left: tuple[Left, ...] = ()
    once: tuple[fx.Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Graph:
    """A traced network with the questions and edits that folding needs.

    ``dtype`` is the type it will have again. ``copies`` lets a layer that others use too be copied.
    ``touched`` names the nodes whose value or whose reading an edit has changed.
    """

    traced: fx.GraphModule
    dtype: torch.dtype
    copies: bool = False
    touched: set[str] = field(default_factory=set)

    def batchnorms(self) -> list[fx.Node]:
        """Return every use of batch normalisation, foldable or not: none may go unreported."""
        base = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - torch's only common base of all
        return [
            node
            for node in self.traced.graph.nodes
            if isinstance(self.module(node), base) or is_batch_norm(node)
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

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Return all that reads the node's values."""
        return [user for user in node.users if not asks_for_shape(user)]

    def only_reader(
        self, node: fx.Node, reader: fx.Node, besides: Collection[fx.Node] = ()
    ) -> None:
        """Raise `Stays` if anything else reads the node's values, or ``reader`` does so twice."""
        readers = (user for user in self.readers(node) if user is not reader)
        if others := sorted(user.name for user in readers if user not in besides):
            raise Stays(f"{self.label(node)} is also read by {', '.join(others)}")
        reads: list[fx.Node] = []
        fx.node.map_arg((reader.args, reader.kwargs), reads.append)
        if reads.count(node) > 1:
            raise Stays(f"{self.label(node)} is read twice by {reader.name}")

    def check_unchanged(
        self, first: fx.Node, last: fx.Node, besides: Collection[fx.Node] = ()
    ) -> None:
        """Raise `Stays` if anything is changed in place between two nodes, in running order.

        What is changed may be a view of what the first one read, in more ways than can be told.
        """
        nodes = list(self.traced.graph.nodes)
        for node in nodes[nodes.index(first) + 1 : nodes.index(last)]:
            if self.is_in_place(node) and node not in besides:
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
        pools = (MAXPOOL, AVGPOOL, ADAPTIVE, ZERO_PAD)
        if any(self.is_a(node, kinds) for kinds in pools) and _pooled_axes(self, node) != spatial:
            raise Stays(f"{self.label(node)} pools over channels")

    def is_in_place(self, node: fx.Node) -> bool:
        """Return whether a node changes what it reads."""
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False))
        name = name_of(node)
        flagged = any(argument is True for argument in node.args[1:])
        flagged = flagged or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
        return bool(name.endswith("_") or name in IN_PLACE or flagged)

    def why_shared(self, node: fx.Node) -> str | None:
        """Return why changing the module that a node calls would change anything else, or None."""
        name = str(node.target)
        nodes = self.traced.graph.nodes
        calls = Counter(str(other.target) for other in nodes if other.op == "call_module")
        if calls[name] > 1:
            return f"{name} is called {calls[name]} times"
        gets = (other for other in nodes if other.op == "get_attr" and self.readers(other))
        read = (str(other.target) for other in gets)
        if any(target.startswith(f"{name}.") for target in read):
            return f"{name}'s weights are also read by themselves"
        owners: dict[int, set[str]] = {}
        for key, parameter in self.traced.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), set()).add(key.rpartition(".")[0])
        if any(name in those and len(those) > 1 for those in owners.values()):
            return f"{name} shares its weights with another module"
        return None

    def taker(self, node: fx.Node) -> str:
        """Return the layer that a node calls, in words. Raises `Stays` if it may not be changed."""
        self.check_hooks(node)
        why = self.why_shared(node)
        if why and not self.copies:
            raise Stays(why)
        return f"a copy of {node.target}" if why else str(node.target)

    def check_fits(self, node: fx.Node, take: Any, affine: Affine) -> None:
        """Raise `Stays` if the network's type cannot hold what the layer would become."""
        if why := misfit(self.module(node), take, affine, self.dtype):
            raise Stays(f"{node.target} cannot take it: {why}")

    def check_range(self, node: fx.Node, *values: torch.Tensor) -> None:
        """Raise `Stays` if the network's type cannot hold values that would stand behind a node."""
        for value in values:
            if why := overflow(value, self.dtype):
                raise Stays(f"behind {self.label(node)}, {why}")

    def check_rank(self, node: fx.Node, spatial: int) -> None:
        """Raise `Stays` if a node is known to give another number of axes behind the channels."""
        if (shape := shape_of(node)) and len(shape) != spatial + 2:
            raise Stays(f"{self.label(node)} has no axis of samples in front of its channels")

    def rearranges(self, node: fx.Node) -> bool:
        """Return whether a node only moves values, and what it makes of them is known."""
        sources = self.sources(node) if self.moves(node) else []
        return len(sources) == 1 and bool(shape_of(node) or "parts" in node.meta)

    def moves(self, node: fx.Node) -> bool:
        """Return whether a node only moves values, known or not."""
        if node.op == "call_module":
            return type(self.module(node)) in REARRANGING
        return is_rearrangement(node)

    def between(self, node: fx.Node) -> str:
        """Return a node's kind, for a reason why it is in the way."""
        unknown = self.moves(node) and not self.rearranges(node)
        told = " (what it does with channels, an example input would tell)" if unknown else ""
        return f"{'the output' if node.op == 'output' else self.kind(node)}{told}"

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes with tensors that a node reads, where an example was run."""
        reads = node.all_input_nodes
        return [read for read in reads if shape_of(read) or "parts" in read.meta]

    def moved(self, node: fx.Node, values: Any) -> Any:
        """Return what a rearrangement makes of ``values``. Raises `Stays` if it makes nothing."""
        self.check_hooks(node)
        try:
            return rearranged(self.module(node), node, self.sources(node)[0], values)
        except Exception as error:  # torch's, for what does not fit
            raise Stays(f"what {self.label(node)} does with channels cannot be told") from error

    def channels(self, node: fx.Node) -> int | None:
        """Return how many channels a node gives, where its shape or its kind tells."""
        if shape := shape_of(node):
            return shape[1] if len(shape) > 1 else None
        module = self.module(node)
        if self.is_a(node, LAYERS):
            return out_channels(module)
        if type(module) in BATCHNORMS:
            return int(module.num_features)
        if self.is_a(node, CONCATENATION):
            parts = [self.channels(part) for part in node.all_input_nodes]
            return None if None in parts else sum(part for part in parts if part)
        keeps = (RELU, LEAKY, PRELU, MAXPOOL, IDENTITY, AVGPOOL, ADAPTIVE, RESIZE, SUM)
        left = ChannelClamp | ChannelScale | ChannelShift
        kept = isinstance(module, left | nn.Hardtanh | nn.Hardsigmoid)
        if kept or any(self.is_a(node, kinds) for kinds in keeps):
            return self.channels(node.all_input_nodes[0])
        return None

    def joined(self, node: fx.Node) -> list[fx.Node]:
        """Return what a concatenation joins, in order."""
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        if not isinstance(parts, list | tuple):
            raise Stays(f"what {self.label(node)} joins cannot be told")
        return [part for part in parts if isinstance(part, fx.Node)]

    def joined_axis(self, node: fx.Node) -> object:
        """Return along which axis a concatenation joins."""
        named = node.kwargs.get("dim", node.kwargs.get("axis", 0))
        return node.args[1] if len(node.args) > 1 else named

    def flattens(self, node: fx.Node) -> bool:
        """Return whether a node gives all of a sample's values as one axis of features."""
        if self.is_a(node, FLATTEN):
            return _flattens_all(node, self.module(node))
        if node.target not in ("view", "reshape", torch.reshape):
            return False
        before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
        return bool(before and after and len(after) == 2 and before[0] == after[0])

    def is_matrix(self, node: fx.Node) -> bool:
        """Return whether a node is known to give (samples, features), with nothing behind."""
        if shape := shape_of(node):
            return len(shape) == 2
        if self.flattens(node):
            return True
        alike = any(self.is_a(node, kinds) for kinds in (RELU, LEAKY, PRELU, IDENTITY))
        if alike or isinstance(self.module(node), nn.Linear | nn.BatchNorm1d | nn.Hardtanh):
            return self.is_matrix(node.all_input_nodes[0])
        return False

    # ── Edits ───────────────────────────────────────────────────────────────────────

    def owned(self, node: fx.Node) -> Any:
        """Return the module that a node calls, to be changed: a copy where others use it too."""
        self.touched.add(node.name)
        if self.why_shared(node):
            name = self._free_name(f"{node.target}_copy", node)
            self._put(name, copy.deepcopy(self.module(node)))
            node.target = name
        return self.module(node)

    def settle(self, left: Left, batchnorm: str) -> list[str]:
        """Put a sign and a shift behind a node, the shift behind a max-pool that follows it."""
        node, affine, spatial = left
        along = (-1, *[1] * spatial)
        said = []
        if affine.negative:
            sign = torch.where(affine.scale < 0, -1.0, 1.0).to(affine.scale)
            node = self.insert_behind(node, f"{batchnorm}_sign", ChannelScale(sign.view(along)))
            said.append(f"sign of {affine.negative} channels with γ < 0 by one multiplication")
        if affine.shift.any():
            pooled = self._maxpool_behind(node, spatial)
            self.insert_behind(pooled, batchnorm, ChannelShift(affine.shift.view(along)))
            said.append(f"shift by one addition behind {self.label(pooled)}")
        return said

    def remove(self, node: fx.Node) -> None:
        """Let all that reads a node read what it reads."""
        self.touched.update(user.name for user in node.users)
        node.replace_all_uses_with(node.all_input_nodes[0])
        self.traced.graph.erase_node(node)

    def insert_behind(self, node: fx.Node, name: str, module: nn.Module) -> fx.Node:
        """Let all that reads a node read ``module`` of it, under the name or one like it."""
        free = self._free_name(name, node)
        self._put(free, module)
        with self.traced.graph.inserting_after(node):
            added = self.traced.graph.call_module(free, (node,))
        added.meta = dict(node.meta)
        node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        self.touched.update(user.name for user in (added, *added.users))
        return added

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(self.traced.get_submodule(parent), last, module)

    def _free_name(self, name: str, behind: fx.Node) -> str:
        """Return the name, or one like it, that means nothing but a BatchNorm about to go."""
        free, count = name, 1
        while not self._is_free(free, behind):
            count += 1
            free = f"{name}_{count}"
        return free

    def _is_free(self, name: str, behind: fx.Node) -> bool:
        """Return whether nothing has the name, or a BatchNorm that none but ``behind`` uses."""
        for node in self.traced.graph.nodes:
            target = str(node.target)
            reads = node.op == "get_attr" and target.startswith(f"{name}.")
            if (node.op == "call_module" and target == name and node is not behind) or reads:
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


def _flattens_all(node: fx.Node, module: Any) -> bool:
    """Return whether a flatten keeps the samples apart and leaves one axis of features."""
    if module is not None:
        return bool(module.start_dim == 1 and module.end_dim == -1)
    start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
    end = node.kwargs.get("end_dim", node.args[2] if len(node.args) > 2 else -1)
    return (start, end) == (1, -1)
