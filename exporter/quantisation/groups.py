"""Which tensors of a graph must be scaled alike, channel by channel.

Dividing channel c of a tensor by s_c > 0 passes unchanged through what is positively homogeneous
and keeps channels apart (ReLU, pooling, sums of equally scaled tensors); a convolution or linear
layer takes it up in its weights, W[o, i] · s_i, on one side, and begins another group of tensors on
the other, W[o, i] / s_o. So all tensors between the weighted layers around them, residual streams
included, form one group with one s (Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", ICCV 2019, there for pairs of layers). A group that reaches the
network's input or output, or an operator that does not commute with a scale, is left as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from exporter.emulation import Step
from exporter.quantisation.network import Network

CHANNELWISE = (
    *("Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("GlobalMaxPool", "ReduceMean", "Identity", "Dropout", "Reshape", "Flatten", "Squeeze"),
)
LAYERS = ("Conv", "Gemm")


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a graph: `of` a tensor is its group's name, or None where it stays."""

    _parent: dict[str, str] = field(default_factory=dict)
    _fixed: set[str] = field(default_factory=set)

    @classmethod
    def find(cls, network: Network, shapes: Mapping[str, tuple[int, ...]]) -> Groups:
        """Return the groups; ``shapes`` are the tensors' on a batch of any size."""
        groups = cls()
        reads = Counter(name for step in network.emulator.steps for name in set(step.reads))
        groups._fix(*network.inputs, *network.emulator.outputs)
        for step in network.emulator.steps:
            groups._join(network, step, shapes, reads)
        return groups

    def of(self, tensor: str) -> str | None:
        """Return the name of a tensor's group, or None if it cannot be scaled."""
        root = self._root(tensor)
        return None if any(self._root(name) == root for name in self._fixed) else root

    def _join(
        self,
        network: Network,
        step: Step,
        shapes: Mapping[str, tuple[int, ...]],
        reads: Counter[str],
    ) -> None:
        inputs, output = network.activations(step), step.writes[0]
        constants = [n for n in step.reads if n in network.emulator.constants]
        alone = all(reads[name] == 1 for name in constants)
        if step.op in LAYERS and len(inputs) == 1 and alone and _rows_are_outputs(step):
            return
        keeps = step.op in CHANNELWISE and len(inputs) == 1 and _keeps_channels(step, shapes)
        if keeps or (step.op == "Clip" and _is_relu6(network, step)):
            self._union(inputs[0], output)
        elif step.op == "Add" and len(inputs) == 2 and shapes[inputs[0]] == shapes[inputs[1]]:
            self._union(inputs[0], output)
            self._union(inputs[1], output)
        elif step.op in ("Add", "Mul") and len(inputs) == 1 and alone:
            if _per_channel(network, step, shapes):
                self._union(inputs[0], output)
            else:
                self._fix(inputs[0], output)
        else:
            self._fix(*inputs, *step.writes)

    def _root(self, name: str) -> str:
        while (above := self._parent.setdefault(name, name)) != name:
            name = above
        return name

    def _union(self, one: str, other: str) -> None:
        self._parent[self._root(one)] = self._root(other)

    def _fix(self, *names: str) -> None:
        self._fixed.update(name for name in names if name)


def _rows_are_outputs(step: Step) -> bool:
    return step.op == "Conv" or (
        step.attributes.get("transB", 0) == 1 and not step.attributes.get("transA", 0)
    )


def _keeps_channels(step: Step, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether axis 1 stays what it was; a reshape must not mix positions into it."""
    before, after = shapes[step.reads[0]], shapes[step.writes[0]]
    if min(len(before), len(after)) < 2 or before[1] != after[1]:
        return False
    if step.op == "PRelu":
        return True
    if step.op in ("Reshape", "Flatten", "Squeeze"):
        return all(size == 1 for size in (*before[2:], *after[2:]))
    return True


def _is_relu6(network: Network, step: Step) -> bool:
    """Return whether a Clip has 0 as its lower bound and a constant as its upper."""
    low, high = [network.emulator.constants.get(name) for name in (*step.reads[1:3], "", "")[:2]]
    return low is not None and high is not None and float(low) == 0 < float(high)


def _per_channel(network: Network, step: Step, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether the constant of a sum or product is one value, or one per channel."""
    constant = next(c for n in step.reads if (c := network.emulator.constants.get(n)) is not None)
    shape = (*[1] * (len(shapes[step.writes[0]]) - constant.ndim), *constant.shape)
    return all(size == 1 for axis, size in enumerate(shape) if axis != 1)
