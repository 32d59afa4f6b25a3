"""An ONNX graph as torch.fx has one, of the layers that folding knows; the way back is `writing`.

Each node becomes one call, which knows which node it is. Where a module of torch.nn computes the
very same it is that, a convolution with a zero padding in front of it where that differs from side
to side. All else is an `OnnxOperator`, which computes what `exporter.emulation` says that the node
means, and which nothing is folded through.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, fx, nn

from exporter.emulation import Emulator, Step
from exporter.emulation.operators import OPERATORS
from exporter.records import Fate
from exporter.start.known import Call, Known, Padded
from exporter.start.making import MAKERS

if TYPE_CHECKING:
    import onnx

_HOLDS = {
    "Conv": ("weight", "bias"),
    "ConvTranspose": ("weight", "bias"),
    "Gemm": ("weight", "bias"),
    "MatMul": ("weight",),
    "BatchNormalization": ("weight", "bias", "running_mean", "running_var"),
}


class Held(NamedTuple):
    """Which of a node's inputs a module holds, under which name, and whether as its transpose."""

    place: int
    name: str
    turned: bool = False


class Written(NamedTuple):
    """Which node a call stands for, None for what is part of the next; and what it holds of it."""

    node: int | None
    holds: tuple[Held, ...] = ()


class OnnxOperator(nn.Module):
    """One node that is no layer of torch.nn, with the constants among its inputs."""

    def __init__(self, step: Step, constants: dict[str, Tensor]) -> None:
        super().__init__()
        self.step = step
        for place, name in enumerate(step.reads):
            if name in constants:
                self.register_buffer(f"input{place}", constants[name])

    def forward(self, *given: Tensor) -> Any:
        rest, inputs = iter(given), []
        for place, name in enumerate(self.step.reads):
            held = getattr(self, f"input{place}", None)
            inputs.append(next(rest) if name and held is None else held)
        got = OPERATORS[self.step.op](self.step.attributes, *inputs)
        parts = got if isinstance(got, tuple) else (got,)
        return parts if len(self.step.writes) > 1 else parts[0]


class Layers(NamedTuple):
    """A graph of layers, and the fates of the BatchNorms that are none of them."""

    module: fx.GraphModule
    fates: tuple[Fate, ...]


def layers_of(model: onnx.ModelProto) -> Layers:
    """Return a graph as one of layers, in float64, of its inputs and outputs in its order.

    Each module has ``written``, and each call of a function has it in ``meta``. Raises `GraphError`
    for an operator that has no emulation.
    """
    import onnx

    emulator = Emulator.of(model)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    sizes = {
        value.name: [a.dim_value if a.HasField("dim_value") else None for a in dims]
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if (dims := value.type.tensor_type.shape.dim)
    }
    return _Builder(emulator, sizes).build()


class _Builder:
    """One walk over the nodes."""

    def __init__(self, emulator: Emulator, sizes: dict[str, list[int | None]]) -> None:
        self.emulator = emulator
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.known = Known(sizes, dict(emulator.constants))
        self.fates: list[Fate] = []

    def build(self) -> Layers:
        for place, name in enumerate(self.emulator.inputs):
            self.known.values[name] = self.graph.placeholder(f"input_{place}")
        for number, step in enumerate(self.emulator.steps):
            self._add(number, step)
        self.graph.output(tuple(self.known.values[name] for name in self.emulator.outputs))
        module = fx.GraphModule(self.root, self.graph, "Network").eval()
        return Layers(module, tuple(self.fates))

    def _add(self, number: int, step: Step) -> None:
        make = MAKERS.get(step.op) if self.known.reads(step) else None
        made = make(self.known, step) if make else None
        holds: tuple[Held, ...] = ()
        if made is None:
            kind = type(step.op, (OnnxOperator,), {})  # folding names what is in the way by it
            made = kind(step, self.known.constants)
            if step.op == "BatchNormalization":
                why = "its parameters are computed, or how many axes it reads is not known"
                self.fates.append(Fate(step.name, step.op, False, why))
        elif step.op in _HOLDS:
            turned = isinstance(made, nn.Linear) and not step.attributes.get("transB")
            holds = tuple(
                Held(place, name, turned and name == "weight")
                for place, name in enumerate(_HOLDS[step.op], start=1)
            )
        written = Written(number, holds)
        reads = self.known.reads(step)
        if isinstance(made, Padded):
            reads = [self._call(f"{step.name}/Pad", made.pad, reads, Written(None))]
            made = made.layer
        if isinstance(made, Call):
            node = self.graph.call_function(made.function, made.args, made.options)
            node.meta["written"] = written
        else:
            node = self._call(step.name, made, reads, written)
        if len(step.writes) == 1:
            self.known.values[step.writes[0]] = node
            return
        for place, name in enumerate(step.writes):
            if not name:
                continue
            part = self.graph.call_function(operator.getitem, (node, place))
            part.meta["written"] = Written(None)
            self.known.values[name] = part

    def _call(
        self, name: str, module: nn.Module, reads: Sequence[fx.Node], written: Written
    ) -> fx.Node:
        module.written = written  # type: ignore[assignment]  # no tensor, as modules mostly have
        return self.graph.call_module(_hold(self.root, name, module.eval()), tuple(reads))


def _hold(root: nn.Module, name: str, module: nn.Module) -> str:
    """Put a module under its name, or one like it where that cannot be; return which."""
    *outer, last = name.split(".")
    holder = root
    for part in outer:
        inner = holder._modules.get(part)  # noqa: SLF001 - `getattr` finds methods too
        if inner is None and part and not hasattr(holder, part):
            inner = nn.Module()
            holder.add_module(part, inner)
        if inner is None:
            return _hold(root, name.replace(".", "_"), module)
        holder = inner
    count, free = 1, last
    while not free or hasattr(holder, free):
        count += 1
        free = f"{last}_{count}"
    holder.add_module(free, module)
    return ".".join([*outer, free])
