"""Fold batch normalisation away, exactly.

At inference it is one affine map per channel:

    BN(x) = a·x + c            a = γ / √(σ² + ε),  c = β − a·μ

It is pushed backwards, through whatever commutes with it, into the layers that feed it:

    layer W, b                 a·(W∗x + b) + c           = (a·W)∗x + (a·b + c)
    average pool, identity     a·mean(x) + c             = mean(a·x + c)
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

Everything is computed in float64 and rounded once, to the type the network had.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from exporter.errors import GraphError
from exporter.fold.affine import BATCHNORMS, ChannelClamp, ChannelShift, ChannelSign, affine_of
from exporter.fold.backwards import push_backwards
from exporter.fold.forwards import check_centred, push_forwards
from exporter.fold.graph import Graph, Stays, note_shapes
from exporter.fold.same import first_line
from exporter.fold.tracing import trace
from exporter.records import Fate

__all__ = ["ChannelClamp", "ChannelShift", "ChannelSign", "Folded", "fold_batchnorm"]


@dataclass(frozen=True, slots=True)
class Folded:
    """The folded network, a copy, and what became of each BatchNorm of the original."""

    module: fx.GraphModule
    fates: tuple[Fate, ...]

    @property
    def kept(self) -> tuple[Fate, ...]:
        return tuple(fate for fate in self.fates if not fate.folded)


def fold_batchnorm(module: nn.Module, example: torch.Tensor | None = None) -> Folded:
    """Return a copy with every BatchNorm folded that can be, exactly. The argument is left alone.

    A BatchNorm that stays does so unchanged, and its fate says why. ``example`` is one input; with
    it the shapes are known, which folding into linear layers and out of reshapes may need.

    Raises `GraphError` if the network is in training mode, cannot be copied or traced, or has a
    BatchNorm without running statistics, with non-finite ones, or with σ² + ε ≤ 0.
    """
    dtype = _floating_dtype(module)
    kind = type(module).__name__
    example = None if example is None else example.to(dtype)
    traced, uncalled = trace(module, example)
    if example is not None:
        try:
            note_shapes(traced, example)
        except Exception as error:  # of the network's own forward()
            raise GraphError(f"{kind} does not take the example: {first_line(error)}") from error
    graph = Graph(traced.double())
    fates = (*(_fold(graph, node) for node in graph.batchnorms()), *uncalled)
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    return Folded(traced.to(dtype).eval(), fates)


def _fold(graph: Graph, node: fx.Node) -> Fate:
    """Fold one BatchNorm in place, or leave it and say why."""
    if node.op == "call_function":
        return Fate(node.name, "batch_norm()", False, "a function call, not a BatchNorm module")
    name = str(node.target)
    batchnorm = graph.module(node)
    if type(batchnorm) not in BATCHNORMS:
        kind = type(batchnorm).__name__
        return Fate(name, kind, False, f"a {kind}, whose arithmetic is its own")
    affine = affine_of(batchnorm, name)
    source = node.all_input_nodes[0]
    try:
        graph.check_own(node)
    except Stays as stays:
        return Fate(name, f"{graph.path(source)} → BatchNorm", False, str(stays))
    try:
        plan = push_backwards(graph, source, node, affine)
        pattern = f"{plan.pattern} → BatchNorm"
    except Stays as in_front:
        try:
            plan = push_forwards(graph, node, affine)
            check_centred(batchnorm)
        except Stays as behind:
            pattern = f"{graph.path(source)} → BatchNorm"
            return Fate(name, pattern, False, f"{in_front}; {behind}")
        pattern = f"BatchNorm → {plan.pattern}"
    for edit in plan.edits:
        edit(name)
    graph.remove(node)
    left = [said for shift in plan.left for said in graph.settle(shift, name)]
    return Fate(name, pattern, True, ", ".join([*plan.said, *left]))


def _floating_dtype(module: nn.Module) -> torch.dtype:
    tensors = (*module.parameters(), *module.buffers())
    kinds = {tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point}
    if len(kinds) > 1:
        names = ", ".join(sorted(map(str, kinds)))
        raise GraphError(f"cannot fold a network that mixes {names}")
    return kinds.pop() if kinds else torch.get_default_dtype()
