"""An ONNX graph, emulated: what it computes in exact arithmetic, rounded, or with rounding's noise.

    exact      float64 throughout, whatever the graph declares: the function that was asked for
    rounded    the same, and every half-precision tensor rounded to its type where it is written
    leaky      exact values, with gradients that never vanish (`leaky`), for a search by gradients
    noisy      float64, with a random error of the size that rounding to each declared type must
               cause: what any honest implementation loses, and how that grows to the output

INT8 and FP8 are part of the function in all of them (`grids`): QuantizeLinear rounds, and in the
noisy run what it reads is a little off, so that values near the middle between two steps fall to
either side, as they do from one runtime to the next. In a small network that is rare, but a single
value that does moves the outputs by thousands of float32's roundoffs; and whether one does is
chance, on either side. So in the noisy run one value does in every sample of every quantised
tensor: the nearest to a middle, in its own steps, where it is near. `operators` says what each node
means, `rounding` what it must lose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from exporter.emulation.grids import FLOAT8, LIMITS, spacing
from exporter.emulation.leaky import LEAKY
from exporter.emulation.operators import OPERATORS, Operator, along
from exporter.emulation.rounding import (
    FLOAT,
    HALVES,
    LAYERS,
    ROUNDOFF,
    fused_variance,
    input_variance,
    round_to,
    variance,
    winograd_variance,
)
from exporter.errors import GraphError

if TYPE_CHECKING:
    import onnx

    from exporter.records import Array, Feed

Arithmetic: TypeAlias = Literal["exact", "rounded", "noisy", "leaky"]
Values: TypeAlias = dict[str, Tensor]

_WHOLE = {6, 7, 9, 12, 13}  # INT32, INT64, BOOL, UINT32, UINT64: shapes, indices, conditions
_NEAR = 2.0**-6  # of a step: with a hundred values in a tensor, a few lie so near to a middle


class Grid(NamedTuple):
    """What a dequantised tensor's values are multiples of, and the type that holds how many.

    ``zero`` is how many stand for 0.
    """

    scale: Tensor
    kind: int
    zero: Tensor

    def widths(self, value: Tensor) -> Tensor:
        """Return how wide the steps around each value are. Several scales are of its first axis."""
        scale = along(self.scale, value, 0)
        return spacing(value / scale, self.kind) * scale


class Step(NamedTuple):
    """One node: its name and operator, attributes, tensors, and the type it writes."""

    name: str
    op: str
    attributes: Mapping[str, Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    dtype: int


@dataclass(frozen=True, slots=True)
class Emulator:
    """A graph that can be run node by node. Make one with `Emulator.of`."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    constants: Mapping[str, Tensor]
    dtypes: Mapping[str, int]
    grids: Mapping[str, Grid]
    kind: torch.dtype = torch.float64

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Emulator:
        """Read a graph. Raises `GraphError` for an operator that has no emulation."""
        import onnx

        graph = onnx.shape_inference.infer_shapes(model).graph
        constants = {t.name: _tensor(t) for t in graph.initializer}
        dtypes = {t.name: int(t.data_type) for t in graph.initializer}
        for value in (*graph.input, *graph.output, *graph.value_info):
            dtypes[value.name] = int(value.type.tensor_type.elem_type)
        steps = tuple(_step(node, dtypes) for node in graph.node)
        return cls(
            inputs=tuple(v.name for v in graph.input if v.name not in constants),
            outputs=tuple(value.name for value in graph.output),
            steps=steps,
            constants=constants,
            dtypes=dtypes,
            grids=dict(_grids(steps, constants, dtypes)),
        )

    def in_float32(self) -> Emulator:
        """Return an emulator that computes in float32: faster, and no longer exact."""
        constants = {
            name: value.float() if value.is_floating_point() else value
            for name, value in self.constants.items()
        }
        return replace(self, constants=constants, kind=torch.float32)

    @property
    def rounds_to_half(self) -> bool:
        """Whether any tensor is declared in 16 bits."""
        return any(step.dtype in HALVES for step in self.steps)

    @property
    def quantises(self) -> bool:
        """Whether any tensor is rounded to integers or to FP8."""
        return any(step.op in ("QuantizeLinear", "DequantizeLinear") for step in self.steps)

    def run(
        self,
        feed: Mapping[str, Tensor],
        arithmetic: Arithmetic = "exact",
        *,
        seed: int = 0,
        watch: Sequence[str] = (),
    ) -> Values:
        """Return the outputs, and the tensors to ``watch``, for one batch of float64 inputs."""
        generator = torch.Generator().manual_seed(seed)
        kept = {*self.outputs, *watch}
        last = {name: i for i, step in enumerate(self.steps) for name in step.reads}
        operators = LEAKY if arithmetic == "leaky" else OPERATORS
        values: Values = {name: feed[name].to(self.kind) for name in self.inputs}
        if arithmetic == "rounded":
            values = {name: round_to(x, self.dtypes[name]) for name, x in values.items()}
        found = {name: value for name, value in values.items() if name in kept}
        for i, step in enumerate(self.steps):
            inputs = [self.value(name, values) for name in step.reads]
            if arithmetic == "noisy" and step.op == "QuantizeLinear" and inputs[0] is not None:
                off = ROUNDOFF[FLOAT] * inputs[0].abs() / 3**0.5  # of the division by the scale
                inputs[0] = _tipped(inputs[0] + off * _noise(inputs[0], generator), step, inputs)
            for name, value in self.compute(step, inputs, operators).items():
                if arithmetic == "rounded":
                    value = round_to(value, step.dtype)
                elif arithmetic == "noisy":
                    own = self.noise_variance(step, inputs, value)
                    value = value if own is None else value + own.sqrt() * _noise(value, generator)
                values[name] = value
                if name in kept:
                    found[name] = value
            for name in step.reads:
                if last[name] == i:
                    values.pop(name, None)
        return found

    def compute(
        self,
        step: Step,
        inputs: Sequence[Tensor | None],
        operators: Mapping[str, Operator] = OPERATORS,
    ) -> Values:
        """Return what one node writes, exactly. Raises `GraphError` if it cannot be emulated."""
        try:
            got = operators[step.op](step.attributes, *inputs)
        except NotImplementedError as error:
            raise GraphError(f"{step.name!r}: {step.op} with {error} has no emulation") from error
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise GraphError(f"{step.name!r}: {step.op} cannot be emulated: {reason}") from error
        parts = got if isinstance(got, tuple) else (got,)
        if more := [name for name in step.writes[len(parts) :] if name]:
            raise GraphError(f"{step.name!r}: {step.op} that gives {more[0]!r} has no emulation")
        return dict(zip(step.writes, parts, strict=False))

    def variance(
        self, step: Step, inputs: Sequence[Tensor | None], output: Tensor
    ) -> Tensor | None:
        """Return the variance of what a node's own rounding adds to ``output``, or None."""
        bias_step = None
        if step.op in ("Add", "Sub", "Sum"):
            own = variance(step.op, step.attributes, inputs, output, step.dtype)
            return None if own is None else own + self._fused(step, inputs)
        found = [self.grids[name] for name in step.reads[:2] if name in self.grids]
        if step.op in LAYERS and [grid.kind != FLOAT8 for grid in found] == [True, True]:
            bias_step = found[0].scale * found[1].scale
        return variance(step.op, step.attributes, inputs, output, step.dtype, bias_step=bias_step)

    def _fused(self, step: Step, inputs: Sequence[Tensor | None]) -> Tensor | float:
        """Return the variance of a sum whose terms are made in the same kernel."""
        total: Tensor | float = 0.0
        for name, term in zip(step.reads, inputs, strict=True):
            assert term is not None  # a sum has no optional terms
            grid = self.grids.get(name)
            shift = None if grid is None else along(grid.zero * grid.scale, term, 0)
            total = total + fused_variance(term, shift)
        return total

    def noise_variance(
        self, step: Step, inputs: Sequence[Tensor | None], output: Tensor
    ) -> Tensor | None:
        """Return the variance of a node's own rounding, however it may be computed.

        Weights that alone are quantised are multiplied as floats, by any way there is.
        """
        own = self.variance(step, inputs, output)
        if own is None or (step.reads and step.reads[0] in self.grids):
            return own
        other = winograd_variance(step.op, step.attributes, inputs, step.dtype)
        return own if other is None else torch.maximum(own, other)

    def quantisation_variance(self, step: Step, inputs: Sequence[Tensor | None]) -> Tensor | None:
        """Return what a layer's output varies by from its input's and weights' quantisation.

        A value in steps of s is off by s²/12: Σ w²·sₓ²/12 + Σ x²·s_w²/12, and s is each value's own
        in FP8. None where neither is.
        """
        if step.op not in LAYERS:
            return None
        x, w = inputs[0], inputs[1]
        assert x is not None
        assert w is not None
        found = None
        for index, (name, value) in enumerate(zip(step.reads[:2], (x, w), strict=True)):
            if name in self.grids:
                steps = self.grids[name].widths(value) ** 2 / 12
                terms = (steps, w**2) if index == 0 else (x**2, steps)
                part = OPERATORS[step.op](step.attributes, *terms)
                assert isinstance(part, Tensor)
                found = part if found is None else found + part
        return found

    def input_variance(self, step: Step, inputs: Sequence[Tensor | None]) -> Tensor | None:
        """Return what a layer's output varies by if its input was kept wider than declared."""
        return input_variance(step.op, step.attributes, inputs, self.dtypes.get(step.reads[0], 0))

    def value(self, name: str, values: Values) -> Tensor | None:
        if not name:
            return None
        return values[name] if name in values else self.constants[name]


def emulate(
    emulator: Emulator,
    feeds: Iterator[Feed],
    arithmetic: Arithmetic,
    *,
    seed: int = 0,
    watch: Sequence[str] = (),
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Array]:
    """Return every output for all feeds in turn, (samples, values) float64, by name.

    Or the tensors to ``watch`` in place of the outputs.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in watch or emulator.outputs}
    with torch.inference_mode():
        for number, feed in enumerate(feeds):
            tensors = {name: torch.from_numpy(value).double() for name, value in feed.items()}
            got = emulator.run(tensors, arithmetic, seed=seed + number, watch=watch)
            for name, found in parts.items():
                found.append(got[name].reshape(len(got[name]), -1))
            advance()
    return {name: torch.cat(found).numpy() for name, found in parts.items()}


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return errors of variance 1, evenly spread as rounding's are; drawn in float32, for speed."""
    even = torch.rand(like.shape, generator=generator)
    return (even - 0.5).double() * 12**0.5


def _tipped(x: Tensor, step: Step, inputs: Sequence[Tensor | None]) -> Tensor:
    """Return x with each sample's value that is nearest to the middle of two steps beyond it."""
    scale, zero = inputs[1], inputs[2] if len(inputs) > 2 else None
    assert scale is not None
    axis = step.attributes.get("axis", 1)
    steps = along(scale, x, axis)
    position = x / steps
    kind = step.attributes["to"]
    width = spacing(position, kind)
    middle = ((position / width).floor() + 0.5) * width
    low, high = LIMITS[kind]
    shifted = middle if zero is None else middle + along(zero.double(), x, axis)
    distance = ((middle - position).abs() / width).where(
        (shifted > low) & (shifted < high), torch.inf
    )
    flat = distance.reshape(len(x), -1)
    near, where = flat.min(dim=1, keepdim=True)
    beyond = (middle + torch.where(middle >= position, _NEAR, -_NEAR) * width) * steps
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(1, where, near <= _NEAR)
    return torch.where(chosen.view_as(x), beyond, x)


def _step(node: onnx.NodeProto, dtypes: Mapping[str, int]) -> Step:
    import onnx

    if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
        kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        raise GraphError(f"{node.name!r}: the operator {kind} has no emulation")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    for key, value in attributes.items():
        if isinstance(value, onnx.TensorProto):
            attributes[key] = _tensor(value)
    dtype = dtypes.get(node.output[0], 0)
    if node.op_type == "Split":
        attributes.setdefault("num_outputs", len(node.output))
    if node.op_type == "QuantizeLinear":
        zero = dtypes.get(node.input[2], 2) if len(node.input) > 2 else 2
        attributes["to"] = attributes.get("output_dtype") or zero
    return Step(node.name, node.op_type, attributes, tuple(node.input), tuple(node.output), dtype)


def _tensor(proto: onnx.TensorProto) -> Tensor:
    import numpy as np
    import onnx

    value = onnx.numpy_helper.to_array(proto)
    if proto.data_type in _WHOLE:
        return torch.from_numpy(np.array(value))
    return torch.from_numpy(np.array(value, dtype=np.float64))


def _grids(
    steps: Sequence[Step], constants: Mapping[str, Tensor], dtypes: Mapping[str, int]
) -> Iterator[tuple[str, Grid]]:
    """Yield each dequantised tensor and what it is a multiple of."""
    for step in steps:
        if step.op == "DequantizeLinear" and step.reads[1] in constants:
            scale = constants[step.reads[1]]
            zero = constants.get(step.reads[2]) if len(step.reads) > 2 else None
            kind = dtypes.get(step.reads[0], 0)
            yield step.writes[0], Grid(scale, kind, scale * 0 if zero is None else zero)


__all__ = ["Arithmetic", "Emulator", "Step", "Values", "emulate"]
