"""An ONNX file that a stranger made, checked before anything opens it.

    file ── wire ──▶ outline ── outside, order, operators ──▶ isolated: parse, infer, run once

Its protocol buffer is read here, as it lies on disk (`wire`); where it says that numbers are
outside of it is held against the file system (`outside`); its nodes must be in an order in which
they can run, and its operators known. Only then is it parsed by ONNX, in a process of its own with
limits on memory and time, which infers the sizes of all that it makes, and, for a command that runs
it, runs it once (`isolated`). Nothing turns one of them off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import MappingProxyType

from exporter.errors import ExportError, InputRefused
from exporter.onnx_files.isolated import Sizes, check_isolated
from exporter.onnx_files.outside import check_outside, tensor_bytes
from exporter.onnx_files.wire import DAMAGED, Graph, Node, Outline, Tensor, read_outline
from exporter.words import plain, quoted

__all__ = ["check_onnx"]

LARGEST_FILE = (1 << 31) - 1  # bytes, of any protocol buffer
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")  # the last is ONNX Runtime's own
_SHOWN = 5


def check_onnx(path: Path, *, runs: bool, sizes: Sizes = MappingProxyType({})) -> None:
    """Check an ONNX file, and if it is to be run, that one run of it comes to an end.

    A file that nobody runs may have custom operators, and its external data may be gone. ``sizes``
    are what the sizes of inputs behind their batch axes are, by name, where the file leaves them
    open. Raises `InputRefused` saying what in it is not as it must be, and `OutOfMemory`.
    """
    name = plain(path.name)
    if not path.is_file():
        what = "not a file" if path.exists() else "no such file"
        raise InputRefused(f"{plain(path, most=4096)}: {what}")
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if not 0 < size <= LARGEST_FILE:
                found = f"it has {size:,} bytes, and a protocol buffer {LARGEST_FILE:,} at the most"
                raise InputRefused(found if size else "an empty file")
            outside = _check_outline(read_outline(stream, size), path, runs=runs)
            run = path if runs else None
            check_isolated(stream, size, run=run, outside=outside, sizes=sizes)
    except OSError as error:
        raise InputRefused(f"{name}: cannot be read: {error.strerror or error}") from error
    except ExportError as error:
        raise type(error)(f"{name}: {error}", hint=error.hint) from error


def _check_outline(outline: Outline, path: Path, *, runs: bool) -> int:
    """Check all that the outline tells, and return the bytes of external data."""
    graph = outline.graph
    if graph is None or not graph.outputs:
        raise InputRefused(f"{DAMAGED}: no graph with an output")
    if outline.version is None or not outline.opsets.keys() & {"", "ai.onnx"}:
        raise InputRefused("it does not say which version of ONNX's operators it uses")
    if outline.trains:
        raise InputRefused("it holds a training graph, and only what infers is read")
    if outline.functions:
        raise InputRefused(
            f"it has functions of its own: {_some(outline.functions)}",
            hint="inline them, where it was made: onnx.inliner.inline_local_functions(model)",
        )
    _check_order(graph, set())
    custom = {node.kind for node in _nodes(graph) if node.domain not in DOMAINS}
    if custom and runs:
        raise InputRefused(
            f"it has custom operators, which no runtime here has: {_some(sorted(custom))}"
        )
    inner = [tensor for node in _nodes(graph) for tensor in _inner(node)]
    for tensor in (*graph.tensors, *inner):
        _check_inline(tensor)
    for tensor in inner:
        if tensor.outside:
            raise InputRefused(
                f"the tensor {quoted(tensor.name)} inside a node has external data, which only "
                "initialisers of the graph may have"
            )
    return check_outside(path, [t for t in graph.tensors if t.outside], opened=runs)


def _nodes(graph: Graph) -> Iterator[Node]:
    for node in graph.nodes:
        yield node
        for inner in node.graphs:
            yield from _nodes(inner)


def _inner(node: Node) -> Iterator[Tensor]:
    yield from node.tensors
    for graph in node.graphs:
        yield from graph.tensors


def _check_order(graph: Graph, known: set[str]) -> None:
    """Raise `InputRefused` unless every node reads what there is by then, and writes new names.

    ``known`` is what the graph around it has, and is left as it was.
    """
    given = {*graph.inputs, *(tensor.name for tensor in graph.tensors)}
    added = given - known
    known |= added
    written: set[str] = set()
    for node in graph.nodes:
        for name in node.reads:
            if name and name not in known:
                raise InputRefused(
                    f"{node} reads {quoted(name)} before it is written: a cycle, or out of order"
                )
        for inner in node.graphs:
            _check_order(inner, known)
        for name in filter(None, node.writes):
            if name in written or name in given:
                raise InputRefused(f"{node} writes {quoted(name)}, which is there already")
            written.add(name)
            if name not in known:
                added.add(name)
                known.add(name)
    known -= added


def _check_inline(tensor: Tensor) -> None:
    """Raise `InputRefused` unless a tensor has as many numbers in the file as its shape says."""
    shown = quoted(tensor.name)
    if tensor.outside and tensor.held:
        raise InputRefused(f"the tensor {shown} has numbers in the file and outside of it")
    if tensor.external and not tensor.outside:
        raise InputRefused(f"the tensor {shown} has external data and says that it has none")
    if tensor.outside or tensor.kind == _TEXT:
        return
    needed = tensor_bytes(tensor)
    if tensor.raw is not None and tensor.raw != needed:
        raise InputRefused(
            f"the tensor {shown} of {tensor.dims} needs {needed:,} bytes, and {tensor.raw:,} are "
            "there"
        )
    if prod(tensor.dims) > _DENSEST * tensor.held:
        raise InputRefused(
            f"the tensor {shown} of {tensor.dims} has {tensor.held:,} bytes of numbers"
        )


_TEXT = 8  # TensorProto.STRING
_DENSEST = 4  # elements of a byte, of two bits each


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(plain, names[:_SHOWN])) + more
