"""The FP32 graph in PyTorch, with the places where it will be read quantised.

Runs in float32 and in small batches, so that memory does not grow with the number of samples; and
every step of it is differentiable, so that the effect of a small error anywhere on the outputs is
one backward pass away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from exporter.emulation import Emulator, Step, Values

if TYPE_CHECKING:
    import onnx

    from exporter.records import Array

Site: TypeAlias = tuple[str, int]  # a node's name and which of its inputs
Scale: TypeAlias = float | Tensor

BATCH = 8
LOW, HIGH, UNSIGNED = -128, 127, 255


@dataclass(frozen=True, slots=True)
class Network:
    """A graph to be quantised: ``sites`` says which tensor is read quantised where.

    ``layers`` are the nodes whose weights are quantised. ``unsigned`` are tensors that are never
    negative and are stored so: in 255 steps up to what 127 reach elsewhere.
    """

    model: onnx.ModelProto
    emulator: Emulator
    sites: Mapping[Site, str]
    layers: tuple[Step, ...]
    unsigned: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        model: onnx.ModelProto,
        sites: Mapping[Site, str],
        layers: Sequence[str],
        unsigned: frozenset[str] = frozenset(),
    ) -> Network:
        """Read a graph. Raises `GraphError` for an operator that has no emulation."""
        emulator = Emulator.of(model).in_float32()
        chosen = tuple(step for step in emulator.steps if step.name in set(layers))
        return cls(model, emulator, sites, chosen, unsigned)

    @property
    def input(self) -> str:
        return self.emulator.inputs[0]

    @property
    def output(self) -> str:
        return self.emulator.outputs[0]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Return the tensors that are read quantised, in the order they are read."""
        return tuple(dict.fromkeys(self.sites.values()))

    def quantise(self, tensor: str, value: Tensor, scale: Scale) -> Tensor:
        """Return a tensor's value as it is read, for the scale of 127 steps."""
        if tensor in self.unsigned:
            return fake_quantise(value, scale * HIGH / UNSIGNED, 0, UNSIGNED)
        return fake_quantise(value, scale)

    def step(self, tensor: str, scale: float) -> float:
        """Return how wide a tensor's steps are, for the scale of 127 steps."""
        return scale * HIGH / UNSIGNED if tensor in self.unsigned else scale

    def readers(self, tensor: str) -> list[tuple[Step, int]]:
        """Return who reads a tensor, and as which input."""
        return [
            (step, index)
            for step in self.emulator.steps
            for index, name in enumerate(step.reads)
            if name == tensor
        ]

    def activations(self, step: Step) -> list[str]:
        """Return what a node reads that is no constant."""
        return [name for name in step.reads if name and name not in self.emulator.constants]

    def run(
        self,
        x: Tensor,
        scales: Mapping[str, Scale] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        *,
        offsets: Mapping[str, Tensor] | None = None,
        watch: Sequence[str] = (),
    ) -> Values:
        """Return the output and the tensors to ``watch`` for one batch.

        ``scales`` quantises tensors where they are read so, ``weights`` replaces constants, and
        ``offsets`` are added to tensors where they are read quantised.
        """
        constants = {**self.emulator.constants, **(weights or {})}
        values: Values = {self.input: x}
        read: Values = {}
        kept = {*watch, self.output}
        found = {self.input: x} if self.input in kept else {}
        last = {name: i for i, step in enumerate(self.emulator.steps) for name in step.reads}
        for i, step in enumerate(self.emulator.steps):
            inputs: list[Tensor | None] = []
            for index, name in enumerate(step.reads):
                value = None if not name else values.get(name, constants.get(name))
                if value is not None and (step.name, index) in self.sites:
                    if name not in read:
                        read[name] = self._as_read(value, name, scales, offsets)
                    value = read[name]
                inputs.append(value)
            for name, value in self.emulator.compute(step, inputs).items():
                values[name] = value
                if name in kept:
                    found[name] = value
            for name in step.reads:
                if last[name] == i:
                    values.pop(name, None)
                    read.pop(name, None)
        return found

    def _as_read(
        self,
        value: Tensor,
        name: str,
        scales: Mapping[str, Scale] | None,
        offsets: Mapping[str, Tensor] | None,
    ) -> Tensor:
        if scales is not None and name in scales:
            value = self.quantise(name, value, scales[name])
        return value if offsets is None else value + offsets[name]

    def outputs(
        self,
        samples: Array,
        scales: Mapping[str, Scale] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the outputs, (samples, outputs) float64."""
        with torch.inference_mode():
            found = [self.run(x, scales, weights)[self.output] for x in batches(samples)]
            return torch.cat([part.flatten(1) for part in found]).double()


def batches(samples: Array, size: int = BATCH) -> Iterator[Tensor]:
    """Yield the samples in order, as tensors."""
    for start in range(0, len(samples), size):
        yield torch.from_numpy(samples[start : start + size])


def parts(samples: int) -> int:
    """Return how many batches so many samples make."""
    return -(-samples // BATCH)


def fake_quantise(x: Tensor, scale: Scale, low: int = LOW, high: int = HIGH) -> Tensor:
    """Return clip(rint(x / s), low, high) · s, for one s or one per channel."""
    return (x / scale).round_().clamp_(low, high).mul_(scale)
