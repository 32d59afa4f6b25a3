"""Fold batch normalisation away, exactly.

At inference it is one affine map per channel:

    BN(x) = a·x + c            a = γ / √(σ² + ε),  c = β − a·μ

It is pushed backwards, through whatever commutes with it, into the layers that feed it:

    layer W, b                 a·(W∗x + b) + c           = (a·W)∗x + (a·b + c)
    average pool, resizing     a·mean(x) + c             = mean(a·x + c)
    shuffle, chunk, reshape    the channels of a and c are shuffled, too, where they stay whole
    x + y                      a·(x + y) + c             = (a·x + c) + a·y
    concatenation              each branch takes its channels of a and c
    clamp of z to [l, h]       a·clamp(z, l, h) + c      = clamp(a·z + c, a·l + c, a·h + c)
                                                           (the bounds change places for a < 0)
    f with f(k·z) = k·f(z), k ≥ 0: ReLU, LeakyReLU, PReLU, max-pool
                               a·f(z) + c                = sign(a)·f(|a|·z) + c

Behind a ReLU the usual fold is wrong, since ReLU(a·z + c) is not a·ReLU(z) + c; the last line is
what is exact there. |a| goes on backwards, and one addition per channel is left, with one
multiplication by ±1 if some a is negative. Adding a constant commutes with max-pooling, so where a
max-pool follows, the addition moves behind it, onto fewer elements. (The other exact forms are a
clamp at c before or behind the pool; all are equally fast, see benchmarks/stem_forms.py, and this
one leaves a Conv+ReLU, which TensorRT fuses.)

Where nothing in front can take it, it is pushed forwards into the layers that read it:

    layer W, b                 W∗(a·x + c) + b           = (W·a)∗x + (b + Σ W·c)

which is exact where no zero padding comes between, since the padding would have to be a·0 + c.
Where it does, where means are so large that float32 would lose digits, and where an activation
stands between, the shift is left as one addition in the BatchNorm's place, and the scale goes:

    layer W, b                 W∗(a·x + c) + b           = (W·a)∗(x + c/a) + b
    f as above                 W∗f(a·x + c) + b          = (W·|a|)∗f(sign(a)·x + c/|a|) + b
    clamp to [l, h]            clamp(|a|·z, l, h)        = |a|·clamp(z, l/|a|, h/|a|)

That loses no digits, since x + c/|a| rounds as a·x + c does. (For zero padding alone there is also
a constant map behind the layer; it is no faster overall and ties the network to one size of
picture, see benchmarks/padding_forms.py.)

Everything is computed in float64 and rounded once, to the type the network had. With an example,
the network's values are compared after every fold, and one that moves them is undone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
from msgspec import structs
from torch import fx, nn

from exporter.errors import GraphError
from exporter.fold.affine import (
    BATCHNORMS,
    Affine,
    ChannelClamp,
    ChannelScale,
    ChannelShift,
    affine_of,
)
from exporter.fold.backwards import push_backwards
from exporter.fold.copies import fork
from exporter.fold.exported import Axes
from exporter.fold.forwards import push_forwards
from exporter.fold.graph import Graph, Plan, Stays
from exporter.fold.lifting import BATCHNORM
from exporter.fold.same import Example, first_line
from exporter.fold.shapes import note_shapes
from exporter.fold.tracing import trace
from exporter.fold.truth import AGREES, Truth
from exporter.records import Fate

__all__ = [
    "ChannelClamp",
    "ChannelScale",
    "ChannelShift",
    "Folded",
    "fold_batchnorm",
    "fold_traced",
]


@dataclass(frozen=True, slots=True)
class Folded:
    """The folded network, a copy, and what became of each BatchNorm of the original."""

    module: fx.GraphModule
    fates: tuple[Fate, ...]

    @property
    def kept(self) -> tuple[Fate, ...]:
        return tuple(fate for fate in self.fates if not fate.folded)


def fold_batchnorm(
    module: nn.Module,
    example: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    copy_weights: bool = False,
    free: Sequence[Axes] = (),
) -> Folded:
    """Return a copy with every BatchNorm folded that can be, exactly. The argument is left alone.

    A BatchNorm that stays does so unchanged, and its fate says why. ``example`` is one input, or
    what forward() takes in its order; with it the shapes are known, which folding into linear
    layers and through reshapes may need, and every fold's error is measured. ``copy_weights`` lets
    a layer that others use too be copied; ``free`` are the axes of each input that have other sizes
    than in the example, beside the batch.

    Raises `GraphError` if the network is in training mode, cannot be copied or traced, or has a
    BatchNorm without running statistics, with non-finite ones, or with σ² + ε ≤ 0.
    """
    dtype = _floating_dtype(module)
    given = None if example is None else _given(example, dtype)
    traced, uncalled = trace(module, given, free)
    folded = fold_traced(traced, given, dtype, copy_weights=copy_weights)
    fates = (*map(partial(_named_as, module), folded.fates), *uncalled)
    return replace(folded, fates=fates)


def fold_traced(
    traced: fx.GraphModule,
    given: Example | None,
    dtype: torch.dtype,
    *,
    copy_weights: bool = False,
) -> Folded:
    """Fold as `fold_batchnorm` does in a graph of layers, which may be changed.

    ``given`` is a batch of each input, ``dtype`` the type that the result has, and raises are the
    same.
    """
    kind = type(traced).__name__
    if given is not None:
        try:
            note_shapes(traced, given)
        except Exception as error:  # of the network's own forward()
            raise GraphError(f"{kind} does not take the example: {first_line(error)}") from error
    traced = traced.double()
    truth = None if given is None else Truth.of(traced, given)
    wrong: dict[str, str] = {}
    while True:
        graph = Graph(traced if truth is None else deepcopy(traced), dtype)
        try:
            fates = _fold_all(
                graph, truth.copy() if truth else None, wrong, copy_weights=copy_weights
            )
        except _Wrong as found:
            wrong[found.node] = f"folding it moves the network's values by {found.error:.1e}"
        else:
            return Folded(_finished(graph), fates)


def _given(example: torch.Tensor | Sequence[torch.Tensor], dtype: torch.dtype) -> Example:
    several = [example] if isinstance(example, torch.Tensor) else example
    return tuple(one.to(dtype) for one in several)


def _named_as(module: nn.Module, fate: Fate) -> Fate:
    """Name a BatchNorm that was found in another's forward() after that one, which the user has."""
    name, call, rest = fate.name.partition(" (call ")
    holder = name.rpartition(".")[0]
    known = dict(module.named_modules())
    if name in known or not isinstance(known.get(holder), BATCHNORM):
        return fate
    return structs.replace(fate, name=f"{holder}{call}{rest}")


class _Wrong(Exception):
    """A fold that was planned and is none; never leaves this file."""

    def __init__(self, node: str, error: float) -> None:
        super().__init__(node)
        self.node, self.error = node, error


def _fold_all(
    graph: Graph, truth: Truth | None, wrong: dict[str, str], *, copy_weights: bool
) -> tuple[Fate, ...]:
    """Fold what can be, again and again while that helps. Raises `_Wrong` where values move."""
    fates: dict[str, Fate] = {}
    left = graph.batchnorms()
    names = _names(left)
    folding = True
    while folding:
        folding = False
        for node in list(left):
            fate = _fold(graph, node, names[node.name], wrong.get(node.name), copies=copy_weights)
            if fate.folded:
                error = None if truth is None else truth.error(graph)
                if error is not None and not error <= AGREES:
                    raise _Wrong(node.name, error)
                fate = structs.replace(fate, error=error)
                left.remove(node)
                folding = True
            fates[node.name] = fate
    return tuple(fates.values())


def _names(batchnorms: list[fx.Node]) -> dict[str, str]:
    """Name each use of a BatchNorm: by its module, and which call of it where there are several."""
    names, seen = {}, Counter[str]()
    calls = Counter(str(node.target) for node in batchnorms)
    for node in batchnorms:
        name = str(node.target)
        seen[name] += 1
        of = f" (call {seen[name]} of {calls[name]})" if calls[name] > 1 else ""
        names[node.name] = node.name if node.op == "call_function" else f"{name}{of}"
    return names


def _fold(graph: Graph, node: fx.Node, name: str, wrong: str | None, *, copies: bool) -> Fate:
    """Fold one use of a BatchNorm in place, or leave it and say why."""
    if node.op == "call_function":
        return Fate(
            name, "batch_norm()", False, "a function call that is not plainly a BatchNorm's"
        )
    batchnorm = graph.module(node)
    if type(batchnorm) not in BATCHNORMS:
        kind = type(batchnorm).__name__
        return Fate(name, kind, False, f"a {kind}, whose arithmetic is its own")
    affine = affine_of(batchnorm, str(node.target))
    pattern = f"{graph.path(node.all_input_nodes[0])} → BatchNorm"
    if wrong:
        return Fate(name, pattern, False, wrong)
    reasons: list[str] = []
    for ways, allowed in ((_WAYS, True), (_COPYING_WAYS, copies)):
        for way in ways:
            try:
                graph.check_hooks(node)
                plan, undo = way(graph, node, affine)
            except Stays as stays:
                if ways is _WAYS:
                    reasons.append(str(stays))
                continue
            if allowed:
                return _carry_out(graph, node, name, plan)
            undo()
            reasons.append(f"copy_weights=True would fold it: {', '.join(plan.said)}")
            break
    return Fate(name, pattern, False, "; ".join(dict.fromkeys(reasons)))


def _carry_out(graph: Graph, node: fx.Node, name: str, plan: Plan) -> Fate:
    module = str(node.target)
    for edit in plan.edits:
        edit(module)
    graph.remove(node)
    left = [said for shift in plan.left for said in graph.settle(shift, module)]
    return Fate(name, plan.pattern, True, ", ".join([*plan.said, *left]))


# ── Ways to fold, each with what undoes its planning ────────────────────────────────

_Way = Callable[[Graph, fx.Node, Affine], tuple[Plan, Callable[[], None]]]


def _backwards(graph: Graph, node: fx.Node, affine: Affine) -> tuple[Plan, Callable[[], None]]:
    plan = push_backwards(graph, node.all_input_nodes[0], node, affine)
    spatial = {nn.BatchNorm1d: (0, 1), nn.BatchNorm2d: (2,), nn.BatchNorm3d: (3,)}
    if plan.spatial not in spatial[type(graph.module(node))]:
        raise Stays(f"{plan.pattern} gives {plan.spatial} axes behind its channels")
    return plan._replace(pattern=f"{plan.pattern} → BatchNorm"), lambda: None


def _forwards(graph: Graph, node: fx.Node, affine: Affine) -> tuple[Plan, Callable[[], None]]:
    plan = push_forwards(graph, node, affine)
    return plan._replace(pattern=f"BatchNorm → {plan.pattern}"), lambda: None


def _copying(way: _Way) -> _Way:
    return lambda graph, node, affine: way(replace(graph, copies=True), node, affine)


def _forking(graph: Graph, node: fx.Node, affine: Affine) -> tuple[Plan, Callable[[], None]]:
    layer, undo = fork(graph, node)
    try:
        plan, _ = _backwards(graph, node, affine)
    except Stays:
        undo()
        raise
    return plan._replace(said=(*plan.said, f"which runs beside {layer}")), undo


_WAYS: tuple[_Way, ...] = (_backwards, _forwards)
_COPYING_WAYS: tuple[_Way, ...] = (_copying(_backwards), _copying(_forwards), _copying(_forking))


_CASTS: dict[torch.dtype, Callable[[fx.GraphModule], fx.GraphModule]] = {
    torch.float64: fx.GraphModule.double,  # `to` would take complex tensors too, and half of each
    torch.float32: fx.GraphModule.float,
    torch.float16: fx.GraphModule.half,
    torch.bfloat16: fx.GraphModule.bfloat16,
}


def _finished(graph: Graph) -> fx.GraphModule:
    """Return the network as a module of the type it had."""
    traced = graph.traced
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    return _CASTS[graph.dtype](traced).eval()


def _floating_dtype(module: nn.Module) -> torch.dtype:
    tensors = (*module.parameters(), *module.buffers())
    kinds = {tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point}
    if len(kinds) > 1:
        names = ", ".join(sorted(map(str, kinds)))
        raise GraphError(f"cannot fold a network that mixes {names}")
    return kinds.pop() if kinds else torch.get_default_dtype()
