"""Trace by torch.export, with free axes, and take what it made of a network before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from exporter.errors import GraphError
from exporter.fold.lifting import has_hooks, lift, plain
from exporter.fold.same import Differs, Example, check_same, quiet
from exporter.records import FreeAxis

Axes: TypeAlias = tuple[FreeAxis, ...]  # of one input

BATCHES = (1, 2, 3)  # sizes at which a graph is held against its module
LARGEST = 2**31  # bounds from here on are torch.export's own


def by_export(
    copy: nn.Module, example: Example, kind: str, free: Sequence[Axes] = ()
) -> fx.GraphModule:
    """Trace with a free batch axis, and of each input the ``free`` ones.

    Raises `GraphError` where the graph is for some of these sizes alone.
    """
    for name, child in copy.named_modules():
        if has_hooks(child):
            raise GraphError(f"{name} has hooks, which a traced copy would not run")
    if len(example[0]) == 1:  # which would be taken for a constant
        example = tuple(torch.cat([one, one]) for one in example)
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]  # torch's
    for one, axes in zip_longest(example, free, fillvalue=()):
        places = (0, *(1 + axis.axis for axis in axes))
        shapes[one] = dict.fromkeys(places, torch.export.Dim.AUTO)
    with quiet(), torch.no_grad(), _len_of_tensors(copy):
        program = torch.export.export(copy, example, dynamic_shapes=shapes, strict=False)
    traced = plain(program.module(check_guards=False), copy, kind)
    _check_free(traced, program.range_constraints, kind)
    _check_sides(traced, program.range_constraints, kind, free)
    lifted = lift(traced)
    check_same(copy, lifted, example, kind)
    for batch in BATCHES:
        times = -(-batch // len(example[0]))
        repeated = tuple(one.repeat(times, *[1] * (one.ndim - 1))[:batch] for one in example)
        try:
            check_same(copy, lifted, repeated, kind)
        except Differs as error:
            raise GraphError(
                f"{kind} takes another way for a batch of {batch} than for {len(example[0])}, "
                "and a graph has one way"
            ) from error
    return lifted


def exported(copy: Any, ranges: Any, kind: str) -> fx.GraphModule:
    """Return the graph that torch.export made of a network before, without its guards."""
    for node in list(copy.graph.nodes):
        if node.target == "_guards_fn":
            copy.graph.erase_node(node)
    traced = plain(copy, copy, kind)
    _check_free(traced, ranges, kind)
    return lift(traced)


def _check_free(traced: fx.GraphModule, ranges: dict[Any, Any], kind: str) -> None:
    """Raise `GraphError` if a graph is for some sizes of batch alone."""
    inputs = (node for node in traced.graph.nodes if node.op == "placeholder" and not node.args)
    for node in inputs:
        size = node.meta["val"].shape[0]
        asks = "as its code asks for the batch's size"
        if str(size).isdecimal():
            hint = "write x.shape[0] without int(), and do not go over the pictures in a loop"
            said = f"{kind} was traced by torch.export for a batch of {size} alone, {asks}"
            raise GraphError(said, hint=hint)
        largest = str(ranges[size.node.expr].upper)
        if largest.isdecimal() and int(largest) < LARGEST:
            said = f"{kind} was traced by torch.export for at most {largest} at once, {asks}"
            raise GraphError(said)


def _check_sides(
    traced: fx.GraphModule, ranges: dict[Any, Any], kind: str, free: Sequence[Axes]
) -> None:
    """Raise `GraphError` if a graph is for some heights or widths alone of those asked for."""
    inputs = (node for node in traced.graph.nodes if node.op == "placeholder" and not node.args)
    for node, axes in zip(inputs, free, strict=False):
        for axis in axes:
            size = node.meta["val"].shape[1 + axis.axis]
            fixed = str(size).isdecimal()
            found = None if fixed else ranges[size.node.expr]
            if found is not None and found.lower <= axis.min and axis.max <= found.upper:
                continue
            takes = f"of {size}" if found is None else f"from {found.lower} on"
            if found is not None and found.upper < axis.max:
                takes = f"from {found.lower} to {found.upper}"
            raise GraphError(
                f"{kind} was traced by torch.export for a {axis.name} {takes} alone, as its code "
                f"asks for it, and [size] is {axis.min} to {axis.max}",
                hint="let its forward() not decide by the size of its input, or narrow [size]",
            )


@contextmanager
def _len_of_tensors(module: nn.Module) -> Iterator[None]:
    """Let ``len(x)`` in any forward() be ``x.shape[0]``, which need not be a number yet."""

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, torch.Tensor) else len(value)

    forwards = (type(child).forward for child in module.modules())
    spaces = {id(found): found for f in forwards if (found := getattr(f, "__globals__", None))}
    own = [space for space in spaces.values() if not space["__name__"].startswith("torch.")]
    used = [space for space in own if "len" not in space]
    try:
        for space in used:
            space["len"] = length
        yield
    finally:
        for space in used:
            del space["len"]
