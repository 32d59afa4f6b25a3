"""Where a bug is made: a graph to edit, and what is at hand to find the place.

A bug is a function of a `Site` that edits its graph. Its docstring is what happens in the field. It
either applies `upstream`, to the FP32 graph before this is converted to another precision, or to
one that is converted already. Where there is no place for it, `DoesNotApply` is raised.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx
import torch
from torch import nn

from exporter.errors import ExportError
from exporter.fold import fold_batchnorm
from exporter.records import Array
from mutation.judge import Case, export
from mutation.nets import SHAPE

T = TypeVar("T")
NORMS = nn.BatchNorm2d


class DoesNotApply(Exception):
    """A network has no place for a bug."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A file with a bug in it; ``as_written`` is False where the bug is in how it is run."""

    model: onnx.ModelProto
    as_written: bool = True


@dataclass(slots=True)
class Site:
    """A graph to edit. The same seed finds the same place."""

    case: Case
    model: onnx.ModelProto
    random: random.Random
    as_written: bool = True

    @property
    def graph(self) -> onnx.GraphProto:
        return self.model.graph

    def pick(self, of: Sequence[T]) -> T:
        """Return one of them. Raises `DoesNotApply` if there is none."""
        if not of:
            raise DoesNotApply
        return self.random.choice(of)

    def nodes(
        self, *ops: str, where: Callable[[onnx.NodeProto], bool] = lambda _: True
    ) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if node.op_type in ops and where(node)]

    def node(
        self, *ops: str, where: Callable[[onnx.NodeProto], bool] = lambda _: True
    ) -> onnx.NodeProto:
        """Return one node of these operators. Raises `DoesNotApply` if there is none."""
        return self.pick(self.nodes(*ops, where=where))

    def has(self, name: str) -> bool:
        return any(tensor.name == name for tensor in self.graph.initializer)

    def value(self, name: str) -> Array:
        """Return a copy of a constant's values."""
        tensor = next((t for t in self.graph.initializer if t.name == name), None)
        if tensor is None:
            raise DoesNotApply
        return np.array(onnx.numpy_helper.to_array(tensor))

    def put(self, name: str, values: Array) -> None:
        """Store a constant, a new one or in place of what there was."""
        proto = onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)
        for tensor in self.graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(proto)
                return
        self.graph.initializer.append(proto)

    def own(self, node: onnx.NodeProto, index: int, values: Array) -> None:
        """Give one node a constant of its own, whoever else reads the one it had."""
        name = f"{node.input[index]}_of_{node.name}"
        self.put(name, values)
        node.input[index] = name

    def edit(self, name: str, change: Callable[[Array], Array]) -> None:
        """Store what ``change`` makes of a constant, in the type that it had."""
        values = self.value(name)
        self.put(name, np.asarray(change(values)).astype(values.dtype))

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if name in node.input]

    def writer(self, name: str) -> onnx.NodeProto | None:
        return next((node for node in self.graph.node if name in node.output), None)

    def insert(
        self, op: str, before: onnx.NodeProto, index: int, *more: str, **attributes: Any
    ) -> None:
        """Put a new node between one node and what it reads."""
        tensor = before.input[index]
        count = len(self.graph.node)
        made, name = f"{tensor}_{count}", f"{before.name}/{op}.{count}"
        node = onnx.helper.make_node(op, [tensor, *more], [made], name, **attributes)
        place = next(i for i, other in enumerate(self.graph.node) if other.name == before.name)
        before.input[index] = made
        self.graph.node.insert(place, node)

    def remove(self, node: onnx.NodeProto) -> None:
        """Take a node out: who reads what it writes now reads what it read first."""
        gone, kept = node.output[0], node.input[0]
        if gone in {value.name for value in self.graph.output}:
            raise DoesNotApply
        for reader in self.readers(gone):
            reader.input[:] = [kept if name == gone else name for name in reader.input]
        self.graph.node.remove(node)

    def replace(
        self, node: onnx.NodeProto, op: str, inputs: Sequence[str], **attributes: Any
    ) -> None:
        """Let another operator write what a node wrote."""
        made = onnx.helper.make_node(op, list(inputs), list(node.output), node.name, **attributes)
        node.CopyFrom(made)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor without its batch axis; a free axis is −1."""
        graph = onnx.shape_inference.infer_shapes(self.model).graph
        values = (*graph.input, *graph.output, *graph.value_info)
        return {
            value.name: tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)[1:]
            for value in values
        }

    def refold(self, change: Callable[[nn.Module], None]) -> None:
        """Fold a changed copy of the network, and let the graph have its parameters.

        Where the fold takes another form, the graph is what the tool exports of that.
        """
        module = deepcopy(self.case.net.module)
        with torch.no_grad():
            change(module)
        try:
            folded = fold_batchnorm(module, torch.zeros(1, *SHAPE)).module
        except ExportError as error:
            raise DoesNotApply from error
        state = {name: value.numpy() for name, value in folded.state_dict().items()}
        shapes = {name: v.shape for name, v in state.items() if "num_batches" not in name}
        stored = {t.name: tuple(t.dims) for t in self.graph.initializer if "." in t.name}
        if shapes != stored:
            self.model = export(folded)
            return
        for name in stored:
            self.put(name, state[name])
        norms = dict(folded.named_modules())
        for node in self.nodes("BatchNormalization"):
            set_attribute(node, "epsilon", float(norms[node.name].eps))


def attribute(node: onnx.NodeProto, key: str, default: Any = None) -> Any:
    """Return a node's attribute."""
    found = next((a for a in node.attribute if a.name == key), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def set_attribute(node: onnx.NodeProto, key: str, value: Any) -> None:
    """Set a node's attribute, or take it away with None."""
    kept = [a for a in node.attribute if a.name != key]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(onnx.helper.make_attribute(key, value))


def norms(module: nn.Module) -> list[Any]:
    """Return a network's BatchNorms."""
    return [layer for layer in module.modules() if isinstance(layer, NORMS)]


UPSTREAM = ("fp32", "fp16", "int8")


@dataclass(frozen=True, slots=True)
class Bug:
    """What goes wrong, in which precisions, and how it is made."""

    name: str
    what: str
    precisions: tuple[str, ...]
    upstream: bool
    make: Callable[[Site], None] = field(repr=False)

    def apply(self, case: Case, *, seed: int = 0) -> Mutant | None:
        """Return a file with the bug in it, or None where there is no place for it."""
        start = case.source if self.upstream else case.model
        model = onnx.ModelProto()
        model.CopyFrom(start)
        place = random.Random(f"{self.name} {case.net.name} {case.precision} {seed}")
        site = Site(case, model, place)
        try:
            self.make(site)
            made = case.convert(site.model) if self.upstream else site.model
        except (DoesNotApply, ExportError):  # the latter: the tool itself refuses such a graph
            return None
        return Mutant(made, site.as_written)


CATALOGUE: dict[str, Bug] = {}


def bug(*precisions: str, upstream: bool = False) -> Callable[[Callable[[Site], None]], Bug]:
    """Enter a function into the catalogue: for the graphs of ``precisions``, or made upstream."""

    def enter(make: Callable[[Site], None]) -> Bug:
        name = make.__name__.replace("_", " ")
        what = " ".join((make.__doc__ or "").split())
        made = Bug(name, what, precisions, upstream, make)
        if name in CATALOGUE or not what:
            raise ValueError(f"{name!r} is there twice, or says nothing")
        CATALOGUE[name] = made
        return made

    return enter


def upstream(*precisions: str) -> Callable[[Callable[[Site], None]], Bug]:
    """Enter a bug that is in the FP32 graph before it is converted, to all precisions or these."""
    return bug(*(precisions or UPSTREAM), upstream=True)


def floats(site: Site, *ops: str) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Yield each layer whose weights are stored as floats, and their name."""
    for node in site.nodes(*(ops or ("Conv", "Gemm"))):
        if site.has(node.input[1]):
            yield node, node.input[1]
