"""The FP32 graph in PyTorch, with the places where it will be read quantised.

Runs in float32 and in small batches, so that memory does not grow with the number of samples; and
every step of it is differentiable, so that the effect of a small error anywhere on the outputs is
one backward pass away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from exporter.contracts import TensorStatistics
from exporter.emulation import Emulator, Step, Values
from exporter.emulation.operators import along
from exporter.packing import inputs_of_graph, unpack
from exporter.steps import HIGH, LOW, Held, Kind, Steps, steps_for

if TYPE_CHECKING:
    import onnx

    from exporter.records import Array

Site: TypeAlias = tuple[str, int]  # a node's name and which of its inputs

BATCH = 8


@dataclass(frozen=True, slots=True)
class Network:
    """A graph to be quantised: ``sites`` says which tensor is read quantised where.

    ``layers`` are the nodes whose weights are quantised. ``kinds`` are those of the tensors' steps
    where they are not signed. ``scales`` are what each of several outputs is multiplied by before
    its error counts, by name: see `weighed`.
    """

    model: onnx.ModelProto
    emulator: Emulator
    sites: Mapping[Site, str]
    layers: tuple[Step, ...]
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: onnx.ModelProto,
        sites: Mapping[Site, str],
        layers: Sequence[str],
        kinds: Mapping[str, Kind] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> Network:
        """Read a graph. Raises `GraphError` for an operator that has no emulation."""
        emulator = Emulator.of(model).in_float32()
        chosen = tuple(step for step in emulator.steps if step.name in set(layers))
        return cls(model, emulator, sites, chosen, kinds or {}, scales or {})

    def weighed(self, samples: Array) -> Network:
        """Return the network with each of several outputs divided by its own root mean square.

        So ‖ŷ − y‖² is a sum of relative errors, and a large output does not drown a small one. One
        output alone is left as it is, and so is one that is 0 on all samples.
        """
        if len(self.emulator.outputs) == 1:
            return self
        power = dict.fromkeys(self.emulator.outputs, 0.0)
        with torch.inference_mode():
            for x in batches(samples):
                found = self.run(x)
                for name in power:
                    power[name] += float(found[name].double().square().sum())
        scales = {name: (len(samples) / total) ** 0.5 for name, total in power.items() if total}
        return replace(self, scales=scales)

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.emulator.inputs

    def given(self, samples: Tensor) -> Values:
        """Return one batch of samples as the inputs they are of, by name."""
        return dict(unpack(samples, inputs_of_graph(self.model)))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Return the tensors that are read quantised, in the order they are read."""
        return tuple(dict.fromkeys(self.sites.values()))

    def kind(self, tensor: str) -> Kind:
        return self.kinds.get(tensor, "signed")

    def steps(self, tensor: str, seen: TensorStatistics, headroom: float = 1.0) -> Steps:
        """Return the steps that hold all that was seen of a tensor."""
        kind = self.kind(tensor)
        sides = seen.channel_low, seen.channel_high
        return as_steps(steps_for(kind, *sides, seen.samples, headroom))

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
        steps: Mapping[str, Steps] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        *,
        offsets: Values | None = None,
        watch: Sequence[str] = (),
    ) -> Values:
        """Return the outputs and the tensors to ``watch`` for one batch.

        ``steps`` quantises tensors where they are read so, ``weights`` replaces constants, and
        ``offsets`` are added to tensors where they are read quantised: one that is not there is put
        there, as zeros to differentiate by.
        """
        x = x.to(self.emulator.kind)  # pixels are whole numbers
        constants = {**self.emulator.constants, **(weights or {})}
        values = self.given(x)
        read: Values = {}
        kept = {*watch, *self.emulator.outputs}
        found = {name: value for name, value in values.items() if name in kept}
        last = {name: i for i, step in enumerate(self.emulator.steps) for name in step.reads}
        for i, step in enumerate(self.emulator.steps):
            inputs: list[Tensor | None] = []
            for index, name in enumerate(step.reads):
                value = None if not name else values.get(name, constants.get(name))
                if value is not None and (step.name, index) in self.sites:
                    if name not in read:
                        read[name] = _as_read(value, name, steps, offsets)
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

    def outputs(
        self,
        samples: Array,
        steps: Mapping[str, Steps] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the outputs, weighed and side by side, (samples, values) float64."""
        with torch.inference_mode():
            found = [self.joined(self.run(x, steps, weights)) for x in batches(samples)]
            return torch.cat(found).double()

    def joined(self, found: Values) -> Tensor:
        """Return the outputs of a run, weighed and side by side, (batch, values)."""
        values = (found[name] for name in self.emulator.outputs)
        parts = [value.reshape(len(value), -1) for value in values]
        if not self.scales:
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        scales = [self.scales.get(name, 1.0) for name in self.emulator.outputs]
        return torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)], dim=1)


class Reference:
    """The float network's outputs, computed once for each of the samples that is asked for."""

    def __init__(self, network: Network, samples: Array) -> None:
        self._network, self._samples = network, samples
        self._rows: dict[int, Tensor] = {}

    def outputs(self, indices: Sequence[int]) -> Tensor:
        """Return those of some samples, (samples, outputs) float64."""
        new = [index for index in indices if index not in self._rows]
        if new:
            self._rows |= zip(new, self._network.outputs(self._samples[new]), strict=True)
        return torch.stack([self._rows[index] for index in indices])


def batches(samples: Array, size: int = BATCH) -> Iterator[Tensor]:
    """Yield the samples in order, as tensors."""
    for start in range(0, len(samples), size):
        yield torch.from_numpy(samples[start : start + size])


def parts(samples: int) -> int:
    """Return how many batches so many samples make."""
    return -(-samples // BATCH)


def _as_read(
    value: Tensor, name: str, steps: Mapping[str, Steps] | None, offsets: Values | None
) -> Tensor:
    if steps is not None and name in steps:
        value = fake_quantise(value, steps[name])
    if offsets is None:
        return value
    if name not in offsets:
        offsets[name] = torch.zeros_like(value, requires_grad=True)
    return value + offsets[name]


def as_steps(held: Held) -> Steps:
    """Return what is stored as what tensors are quantised with."""
    return Steps(held.width, torch.from_numpy(held.zero) if held.zero.ndim else int(held.zero))


def fake_quantise(x: Tensor, steps: Steps) -> Tensor:
    """Return clip(rint(x / width), zero − 128, zero + 127) · width, channels along axis 1."""
    width, zero = (_along(part, x) for part in steps)
    low: Any = zero + LOW
    high: Any = zero + HIGH
    return (x / width).round_().clamp_(low, high).mul_(width)


def is_cut_off(x: Tensor, steps: Steps) -> Tensor:
    """Return which values lie beyond the steps by more than half of one."""
    width, zero = (_along(part, x) for part in steps)
    at = x / width - zero
    return (at < LOW - 0.5) | (at > HIGH + 0.5)


def _along(part: float | Tensor, x: Tensor) -> float | Tensor:
    """Return one number, or one per channel so that it meets them."""
    return along(part, x, 1) if isinstance(part, Tensor) else part
