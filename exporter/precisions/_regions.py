"""Which nodes of a graph are FP32 and which are half, with few casts between the two.

Nodes that must be FP32 are given. Others join them where that saves casts: nodes without weights,
one by one or a connected set at once, whenever fewer tensors then change their type; and an
activation function behind a layer in FP32 that feeds nothing else, or the pair of Q and DQ in front
of one, so that they can fuse. A quantiser and the dequantiser that reads the same scale are always
of one type.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from exporter.precisions._floats import ALWAYS_FLOAT, Floats
from exporter.precisions._range import QUANTISERS

if TYPE_CHECKING:
    import onnx

READS_ANY = frozenset({"Cast", "Shape", "Size"})  # and so never need a cast in front of them
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ACTIVATIONS = frozenset({
    "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "PRelu", "Relu", "Selu",
    "Sigmoid", "Tanh",
})  # fmt: skip


@dataclass(slots=True)
class Regions:
    """The nodes, by index, that are ``single``: FP32. All others that touch floats are half."""

    floats: Floats
    half_io: bool
    single: set[int] = field(default_factory=set)
    joined: list[int] = field(default_factory=list)
    producer: dict[str, int] = field(init=False)
    readers: dict[str, list[int]] = field(init=False)
    outputs: set[str] = field(init=False)
    pairs: dict[int, frozenset[int]] = field(init=False)

    def __post_init__(self) -> None:
        graph = self.floats.graph
        self.producer = {name: i for i, node in enumerate(graph.node) for name in node.output}
        self.readers = {}
        for index, node in enumerate(graph.node):
            for name in dict.fromkeys(float_reads(self.floats, node)):
                self.readers.setdefault(name, []).append(index)
        self.outputs = {value.name for value in graph.output}
        by_scale: dict[str, set[int]] = {}
        for index, node in enumerate(graph.node):
            if node.op_type in QUANTISERS:
                by_scale.setdefault(node.input[1], set()).add(index)
        self.pairs = {i: frozenset(group) for group in by_scale.values() for i in group}

    def force(self, index: int) -> None:
        """Make a node FP32, and its quantiser's or dequantiser's other half."""
        self.single |= self._unit(index)

    def is_single(self, name: str) -> bool:
        """Whether a tensor is written as FLOAT."""
        return self.producer[name] in self.single if name in self.producer else not self.half_io

    def grow(self) -> None:
        """Let nodes join the FP32 ones while that saves casts."""
        forced = set(self.single)
        while self._grow_once():
            pass
        self.joined = sorted(self.single - forced)

    def tensors(self, index: int) -> list[str]:
        """Return the activations that a node reads or writes as its own type, each once."""
        node = self.floats.graph.node[index]
        written = [name for name in node.output if self.floats.activation(name)]
        return list(dict.fromkeys([*float_reads(self.floats, node), *written]))

    def _unit(self, index: int) -> frozenset[int]:
        return self.pairs.get(index, frozenset((index,)))

    def _grow_once(self) -> bool:
        grown = False
        for unit in self._candidates():
            if unit & self.single or not self._touches_single(unit):
                continue
            names = {name for index in unit for name in self.tensors(index)}
            before = self._casts(names)
            self.single |= unit
            after = self._casts(names)
            if after < before or (after == before and self._fuses(unit)):
                grown = True
            else:
                self.single -= unit
        return grown

    def _candidates(self) -> Iterator[frozenset[int]]:
        """Yield what may join: each node without weights, then each connected set of them."""
        nodes = self.floats.graph.node
        free = [
            index
            for index, node in enumerate(nodes)
            if index not in self.single and node.op_type not in _WEIGHTED and self.tensors(index)
        ]
        yield from dict.fromkeys(self._unit(index) for index in free)
        left = set(free)
        for start in free:
            found: set[int] = set()
            front = [start] if start in left else []
            while front:
                index = front.pop()
                if index in left:
                    left.discard(index)
                    found |= self._unit(index)
                    front += [*self._neighbours(index), *self._unit(index)]
            if len(found) > 1:
                yield frozenset(found)

    def _neighbours(self, index: int) -> Iterator[int]:
        for name in self.tensors(index):
            yield from self.readers.get(name, ())
            if name in self.producer:
                yield self.producer[name]

    def _touches_single(self, unit: Iterable[int]) -> bool:
        return any(other in self.single for index in unit for other in self._neighbours(index))

    def _casts(self, names: Iterable[str]) -> int:
        return sum(len(self.wanted(name) - {self.is_single(name)}) for name in names)

    def wanted(self, name: str) -> set[bool]:
        """Return in which types a tensor is read: True for FLOAT, False for half."""
        kinds = {index in self.single for index in self.readers.get(name, ())}
        return kinds | {not self.half_io} if name in self.outputs else kinds

    def _fuses(self, unit: frozenset[int]) -> bool:
        """Whether it is all that stands between FP32 layers, or behind one, and can become part."""
        nodes = self.floats.graph.node
        if unit <= self.pairs.keys():
            given = [i for i in unit if nodes[i].op_type == "DequantizeLinear"]
            readers = [r for i in given for r in self.readers.get(nodes[i].output[0], ())]
            return bool(readers) and self.single.issuperset(readers)
        if len(unit) > 1:
            return False
        (index,) = unit
        node = nodes[index]
        source = node.input[0] if node.input else ""
        layer = self.producer.get(source)
        alone = self.readers.get(source) == [index] and source not in self.outputs
        return node.op_type in _ACTIVATIONS and layer in self.single and alone


def float_reads(floats: Floats, node: onnx.NodeProto) -> Iterator[str]:
    """Yield the activations that a node reads in its own type."""
    if node.op_type not in READS_ANY:
        fixed = ALWAYS_FLOAT.get(node.op_type, ())
        for index, name in enumerate(node.input):
            if index not in fixed and floats.activation(name):
                yield name
