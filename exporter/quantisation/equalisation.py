"""Channel factors that make the most of one scale per tensor.

A tensor of scale Δ loses Δ²/12 in each value. With channel c divided by s_c, its scale is that of
its largest channel, and what reaches the outputs is, over the tensors t of a group and their
readers' weights W,

    Σ_t Δ_t²/12 · Σ_c G_tc s_c²  +  Σ_o δ_o²/12 · G_o · k · Σ_c P_tc / s_c²
    Δ_t = max_c(M_tc / s_c) / 127          δ_o = max_c(|W_oc| s_c) / 127

with M the largest magnitudes, P mean squares, G sensitivities (`observe`), k the taps. Both maxima
are taken as p-norms: on inputs that calibration has not seen every channel may go further than it
did there, and the smaller p, the fewer channels come near the limit; p → ∞ fills the range with
every channel. For one tensor alone the minimum is s ∝ (M^p / G)^(1/(p + 2)); for a group it is the
fixed point of the same equation, which balances what pulls each s_c down against what pulls it up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from exporter.emulation import Step
from exporter.onnx_edits import replace_constants, replace_nodes
from exporter.quantisation.groups import LAYERS, Groups
from exporter.quantisation.network import Network
from exporter.quantisation.observe import Observed

if TYPE_CHECKING:
    import onnx

    from exporter.records import Array

_FLOOR = 1e-3  # of a tensor's largest channel: what a channel that saw little may still come to
_WEIGHTS = 0.3  # rounding to second order leaves about a third of the weights' error
_WEIGHT_NORM = 6.0  # the weights are known, but a smooth maximum is balanced by more channels
_STEPS = 30


class Factors:
    """What the sum is over, found once for the ranges of any samples."""

    def __init__(self, network: Network, observed: Observed, groups: Groups) -> None:
        self._members: dict[str, list[str]] = {}
        self._terms: dict[str, _Tensor] = {}
        for name in network.tensors:
            if (group := groups.of(name)) is not None:
                self._members.setdefault(group, []).append(name)
                self._terms[name] = _Tensor.of(network, observed, name)

    def best(self, peaks: Mapping[str, Tensor], p: float) -> dict[str, Tensor]:
        """Return s of each group, (…, C) float32 with largest value 1, by the group's name.

        ``peaks`` (…, C) are the largest magnitudes of each tensor that is read quantised, a row for
        each set of samples; a group of which a tensor is 0 on all samples of a set has no factors.
        """
        found = {}
        for group, names in self._members.items():
            reached = [peaks[name].double().numpy() for name in names]
            if all((peak.max(axis=-1) > 0).all() for peak in reached):
                terms = [self._terms[name] for name in names]
                found[group] = torch.from_numpy(_solve(terms, reached, p)).float()
        return found


class _Tensor(NamedTuple):
    """One tensor's terms of the sum, float64: G and P, (C,), and those of each of its readers.

    A reader's are each input channel's largest weight to the power of the norm, (O, C), and k · G,
    (O,).
    """

    gain: Array
    power: Array
    readers: tuple[tuple[Array, Array], ...] = ()

    @classmethod
    def of(cls, network: Network, observed: Observed, name: str) -> _Tensor:
        gain = observed.gain[name].numpy()
        return cls(
            gain + 1e-6 * gain.mean() + 1e-300,
            observed.power[name].numpy(),
            tuple(
                _reader(
                    network.emulator.constants[step.reads[1]], observed.gain_behind[step.writes[0]]
                )
                for step, index in network.readers(name)
                if index == 0 and step in network.layers and step.attributes.get("group", 1) == 1
            ),
        )

    def pulls(self, peak: Array, s: Array, p: float) -> tuple[Array, Array]:
        """Return what grows with each s_c, and what shrinks, of the predicted error, (…, C)."""
        import numpy as np

        share = (peak / s) ** p
        total = _sum(share)
        step = total ** (2 / p)
        grows = step * self.gain * s**2
        shrinks = step * _sum(self.gain * s**2) * share / total
        power, to_norm = self.power / s**2, s**_WEIGHT_NORM
        for largest, gain in self.readers:
            row = to_norm @ largest.T
            noise = _WEIGHTS * gain * row ** (2 / _WEIGHT_NORM)
            per_row = np.divide(noise, row, out=np.zeros_like(row), where=row > 0)
            grows = grows + (per_row @ largest) * to_norm * _sum(power)
            shrinks = shrinks + _sum(noise) * power
        return grows, shrinks


def _solve(tensors: Sequence[_Tensor], peaks: Sequence[Array], p: float) -> Array:
    """Return s, (…, C) float64 with largest value 1, of the tensors of one group."""
    import numpy as np

    reached = [np.maximum(peak, _FLOOR * peak.max(axis=-1, keepdims=True)) for peak in peaks]
    s: Array = np.ones_like(reached[0])
    for _ in range(_STEPS):
        pulls = [t.pulls(peak, s, p) for t, peak in zip(tensors, reached, strict=True)]
        grows, shrinks = (sum(parts) for parts in zip(*pulls, strict=True))
        s = s * (shrinks / grows) ** (1 / (p + 2))
        s = s / s.max(axis=-1, keepdims=True)
    return s


def _sum(values: Array) -> Array:
    """Return the sum over channels, as one."""
    total: Array = values.sum(axis=-1, keepdims=True)
    return total


def _reader(weights: Tensor, gain: Tensor) -> tuple[Array, Array]:
    rows = weights.double().abs().reshape(*weights.shape[:2], -1)
    largest: Array = (rows.amax(dim=2) ** _WEIGHT_NORM).numpy()
    return largest, (rows.shape[2] * gain).numpy()


# ── The graph, scaled ───────────────────────────────────────────────────────────────


def equalise(
    network: Network,
    groups: Groups,
    by_group: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[onnx.ModelProto, dict[str, Tensor]]:
    """Return the graph with every group divided by its factors, and each tensor's divisor.

    It computes the same function, up to the rounding of its float32 constants. A Clip from 0 to u
    becomes a ReLU and a minimum with u / s_c.
    """
    import onnx

    def divisor(tensor: str) -> Tensor | None:
        found = by_group.get(groups.of(tensor) or "")
        return None if found is None else found.double()

    known = network.emulator.constants
    constants: dict[str, Tensor] = {}
    bounds: dict[str, Tensor] = {}
    for step in network.emulator.steps:
        inputs = network.activations(step)
        into, behind = divisor(inputs[0]) if inputs else None, divisor(step.writes[0])
        if step.op in LAYERS:
            constants |= _scaled_layer(step, known, into, behind)
        elif behind is not None and step.op in ("Add", "Clip") and len(inputs) == 1:
            shape = (-1, *[1] * (len(shapes[step.writes[0]]) - 2))
            if step.op == "Add":
                name = next(n for n in step.reads if n in known)
                constants[name] = (known[name].double().flatten() / behind).reshape(shape)
            else:
                bounds[step.name] = (known[step.reads[2]].double() / behind).reshape(shape)
    scaled = onnx.ModelProto()
    scaled.CopyFrom(network.model)
    replace_constants(scaled.graph, {name: _array(c) for name, c in constants.items()})
    _bound(scaled.graph, bounds)
    every = [*network.inputs, *(name for step in network.emulator.steps for name in step.writes)]
    return scaled, {name: s.float() for name in every if name and (s := divisor(name)) is not None}


def _scaled_layer(
    step: Step, known: Mapping[str, Tensor], into: Tensor | None, behind: Tensor | None
) -> dict[str, Tensor]:
    """Return W·s_in / s_out and b / s_out, where either is scaled."""
    if into is None and behind is None:
        return {}
    name = step.reads[1]
    weights = known[name].double()
    outputs, inputs = weights.shape[:2]
    spatial = [1] * (weights.ndim - 2)
    if into is not None:
        groups = step.attributes.get("group", 1)
        rows = into.reshape(groups, 1, inputs).expand(groups, outputs // groups, inputs)
        weights = weights * rows.reshape(outputs, inputs, *spatial)
    found = {}
    if behind is not None:
        weights = weights / behind.reshape(-1, 1, *spatial)
        if len(step.reads) > 2 and step.reads[2]:
            found[step.reads[2]] = known[step.reads[2]].double() / behind
    return {name: weights, **found}


def _array(value: Tensor) -> Array:
    found: Array = value.float().contiguous().numpy()
    return found


def _bound(graph: onnx.GraphProto, bounds: Mapping[str, Tensor]) -> None:
    """Write the Clips named as a ReLU and a minimum per channel."""
    import onnx

    nodes = []
    for node in graph.node:
        if node.name not in bounds:
            nodes.append(node)
            continue
        bound, inner = f"{node.output[0]}_bound", f"{node.output[0]}_relu"
        value = _array(bounds[node.name])
        graph.initializer.append(onnx.numpy_helper.from_array(value, bound))
        nodes += [
            onnx.helper.make_node("Relu", [node.input[0]], [inner], f"{node.name}/Relu"),
            onnx.helper.make_node("Min", [inner, bound], [node.output[0]], node.name),
        ]
    replace_nodes(graph, nodes)
