"""An ONNX file's outline, read from its protocol buffer as it lies on disk.

No library parses anything here, numbers of tensors are passed over and not read, and every count is
bounded while it is counted, so that a file of any kind costs little memory and time. What a reader
could take in two ways, as one field that is there twice, is refused.

Field numbers are those of ``onnx.proto`` (onnx 1.23).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from exporter.errors import InputRefused
from exporter.words import quoted

MOST_FIELDS = 2_000_000  # of messages: twenty for each node
MOST_NODES = 100_000
DEEPEST = 8  # graphs in graphs, as the branches of an If
LONGEST_NAME = 4096  # bytes
MOST_AXES = 64
DAMAGED = "truncated, damaged or not an ONNX model"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(slots=True)
class Tensor:
    """A stored tensor. ``held`` are the bytes of its numbers in the file, ``raw`` if as they are.

    ``external`` are the keys and values that say where its numbers are, if ``outside``.
    """

    name: str = ""
    dims: list[int] = field(default_factory=list)
    kind: int = 0
    raw: int | None = None
    held: int = 0
    outside: bool = False
    external: list[tuple[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class Node:
    """A node, what it reads and writes, and its attributes' graphs and tensors."""

    name: str = ""
    op: str = ""
    domain: str = ""
    reads: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    graphs: list[Graph] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The operator, with its domain where that is not ONNX's own."""
        return self.op if self.domain in ("", "ai.onnx") else f"{self.domain}::{self.op}"

    def __str__(self) -> str:
        named = self.name or next(iter(self.writes), "")
        return f"{quoted(self.kind)[1:-1]} {quoted(named)}"


@dataclass(slots=True)
class Graph:
    """A graph's nodes and tensors, and the names of what it is given and gives."""

    nodes: list[Node] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Outline:
    """A model: its version, the operator sets it uses, its graph, and its functions' names."""

    version: int | None = None
    opsets: dict[str, int] = field(default_factory=dict)
    graph: Graph | None = None
    functions: list[str] = field(default_factory=list)
    trains: bool = False


def read_outline(stream: BinaryIO, size: int) -> Outline:
    """Return what an ONNX file of ``size`` bytes has. Raises `InputRefused`."""
    stream.seek(0)
    return _Reader(stream).model(size)


class _Reader:
    """Reads messages one field after another; ``at`` is the position in the file."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.at = 0
        self.fields_read = 0
        self.nodes_read = 0

    # ── Messages ────────────────────────────────────────────────────────────────────

    def model(self, end: int) -> Outline:
        found = Outline()
        for number, value, stop in self.fields(end, "the model", once=(1, 7)):
            if number == 1 and value is not None:
                found.version = value
            elif number == 7 and stop is not None:
                found.graph = self.graph(stop, depth=0)
            elif number == 8 and stop is not None:
                domain, version = self.opset(stop)
                if domain in found.opsets:
                    raise InputRefused(f"the operator set {quoted(domain or 'ai.onnx')} is twice")
                found.opsets[domain] = version
            elif number == 20:
                found.trains = True
            elif number == 25 and stop is not None:
                found.functions.append(self.first_text(stop, 1))
        return found

    def opset(self, end: int) -> tuple[str, int]:
        domain, version = "", 0
        for number, value, stop in self.fields(end, "an operator set", once=(1, 2)):
            if number == 1 and stop is not None:
                domain = self.text(stop)
            elif number == 2 and value is not None:
                version = value
        return "" if domain == "ai.onnx" else domain, version

    def graph(self, end: int, *, depth: int) -> Graph:
        if depth > DEEPEST:
            raise InputRefused(f"its graphs lie more than {DEEPEST} deep in one another")
        found = Graph()
        for number, _, stop in self.fields(end, "a graph", once=(2,)):
            if stop is None:
                continue
            if number == 1:
                found.nodes.append(self.node(stop, depth))
            elif number == 5:
                found.tensors.append(self.tensor(stop))
            elif number == 11:
                found.inputs.append(self.first_text(stop, 1))
            elif number == 12:
                found.outputs.append(self.first_text(stop, 1))
            elif number == 15:
                found.tensors += self.sparse(stop)
        return found

    def node(self, end: int, depth: int) -> Node:
        self.nodes_read += 1
        if self.nodes_read > MOST_NODES:
            raise InputRefused(
                f"it has more than {MOST_NODES:,} nodes, and no network needs so many"
            )
        found = Node()
        for number, _, stop in self.fields(end, "a node", once=(3, 4, 7, 8)):
            if stop is None:
                continue
            if number == 1:
                found.reads.append(self.text(stop))
            elif number == 2:
                found.writes.append(self.text(stop))
            elif number == 3:
                found.name = self.text(stop)
            elif number == 4:
                found.op = self.text(stop)
            elif number == 5:
                self.attribute(stop, found, depth)
            elif number == 7:
                found.domain = self.text(stop)
        return found

    def attribute(self, end: int, node: Node, depth: int) -> None:
        for number, _, stop in self.fields(end, "an attribute", once=(1, 5, 6, 20, 22)):
            if stop is None:
                continue
            if number in (5, 10):
                node.tensors.append(self.tensor(stop))
            elif number in (6, 11):
                node.graphs.append(self.graph(stop, depth=depth + 1))
            elif number in (22, 23):
                node.tensors += self.sparse(stop)

    def sparse(self, end: int) -> list[Tensor]:
        fields = self.fields(end, "a sparse tensor", once=(1, 2))
        return [self.tensor(stop) for number, _, stop in fields if number in (1, 2) and stop]

    def tensor(self, end: int) -> Tensor:
        found = Tensor()
        for number, value, stop in self.fields(end, "a tensor", once=(2, 3, 8, 9, 14)):
            if number == 1:
                self.sizes(found.dims, value, stop)
            elif number == 2 and value is not None:
                found.kind = value
            elif number == 8 and stop is not None:
                found.name = self.text(stop)
            elif number == 9 and stop is not None:
                found.raw = stop - self.at
                found.held += found.raw
            elif number in (4, 5, 6, 7, 10, 11):
                found.held += 8 if stop is None else stop - self.at
            elif number == 13 and stop is not None:
                found.external.append(self.pair(stop))
            elif number == 14 and value is not None:
                if value not in (0, 1):
                    raise InputRefused(f"a tensor's numbers are at a place of kind {value}")
                found.outside = value == 1
        return found

    def pair(self, end: int) -> tuple[str, str]:
        key, text = "", ""
        for number, _, stop in self.fields(end, "an entry of external data", once=(1, 2)):
            if number == 1 and stop is not None:
                key = self.text(stop)
            elif number == 2 and stop is not None:
                text = self.text(stop)
        return key, text

    def first_text(self, end: int, wanted: int) -> str:
        text = ""
        for number, _, stop in self.fields(end, "a name", once=(wanted,)):
            if number == wanted and stop is not None:
                text = self.text(stop)
        return text

    # ── Fields ──────────────────────────────────────────────────────────────────────

    def fields(
        self, end: int, what: str, *, once: tuple[int, ...]
    ) -> Iterator[tuple[int, int | None, int | None]]:
        """Yield each field's number, and its value or where it ends; what is not read is skipped.

        Raises `InputRefused` for one of ``once`` that is there twice.
        """
        seen = set()
        while self.at < end:
            self.fields_read += 1
            if self.fields_read > MOST_FIELDS:
                raise InputRefused(f"it has more than {MOST_FIELDS:,} fields")
            key = self.varint(end)
            number, kind = key >> 3, key & 7
            if not 0 < number < 1 << 29:
                raise InputRefused(DAMAGED)
            if number in once and number in seen:
                raise InputRefused(
                    f"the field {number} of {what} is there twice, which is ambiguous"
                )
            seen.add(number)
            if kind == _VARINT:
                yield number, self.varint(end), None
            elif kind == _BYTES:
                length = self.varint(end)
                stop = self.at + length
                if stop > end or length < 0:
                    raise InputRefused(DAMAGED)
                yield number, None, stop
                self.skip(stop - self.at)
            elif kind in (_FIXED64, _FIXED32):
                self.skip(8 if kind == _FIXED64 else 4)
                if self.at > end:
                    raise InputRefused(DAMAGED)
                yield number, None, None
            else:
                raise InputRefused(DAMAGED)

    def varint(self, end: int) -> int:
        """Return a number of 64 bits with a sign."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.stream.read(1) if self.at < end else b""
            if not byte:
                break
            self.at += 1
            value |= (byte[0] & 127) << shift
            if byte[0] < 128:
                value &= (1 << 64) - 1
                return value - (1 << 64) if value >> 63 else value
        raise InputRefused(DAMAGED)

    def sizes(self, found: list[int], value: int | None, end: int | None) -> None:
        """Add one size of a tensor, or those up to ``end``."""
        if value is not None:
            found.append(value)
        while end is not None and self.at < end and len(found) <= MOST_AXES:
            found.append(self.varint(end))
        if len(found) > MOST_AXES:
            raise InputRefused(f"a tensor has more than {MOST_AXES} axes")

    def text(self, end: int) -> str:
        length = end - self.at
        if length > LONGEST_NAME:
            raise InputRefused(f"a name in it has {length:,} bytes, where {LONGEST_NAME:,} suffice")
        data = self.stream.read(length)
        self.at = end
        if len(data) < length:
            raise InputRefused(DAMAGED)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputRefused(f"{DAMAGED}: a name in it is not UTF-8") from error

    def skip(self, count: int) -> None:
        if count:
            self.stream.seek(count, 1)
            self.at += count
