"""Shape arithmetic, computed: what follows from sizes alone, where the batch has no part in it.

Exporters write ``x.view(x.shape[0], -1, x.shape[2])`` as nodes that ask a tensor for its shape,
take it apart and put it together, which shape inference and runtimes follow only so far. All sizes
but the batch are fixed here. So what follows from shapes is run for two sizes of a batch: whatever
is the same for both is a constant, and a Reshape to (batch, sizes that are the same) is one to
(0, …), which keeps the axis of samples, or to (−1, …), where it reads another first axis. What
holds for two sizes alone is found out where one sample at a time is compared with all together.

A batch whose size an exporter has written into a Reshape, Expand or Resize is freed before that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporter.emulation import Emulator
from exporter.emulation.rounding import EXACT
from exporter.onnx_edits import drop_unread, replace_nodes
from exporter.packing import inputs_of_graph

if TYPE_CHECKING:
    import onnx

_BATCHES = (2, 3)
_LARGEST = 1 << 20  # values of a constant that is stored in place of what makes it
_WHOLE = {6, 7, 9}  # onnx.TensorProto: INT32, INT64 and BOOL


def free_shapes(graph: onnx.GraphProto, batch: int) -> None:
    """Let what is made of (batch, …) keep the samples that it is given, however many these are.

    A node whose first axis is not of samples then gives another shape, or other values for one
    sample alone, and the file is refused for that.
    """
    _free_reshapes(graph, batch)
    _free_resizes(graph, batch)
    drop_unread(graph)


def compute_shapes(model: onnx.ModelProto) -> int:
    """Let what follows from shapes be constants where it is constant; return how many nodes went.

    Raises `GraphError` as the emulation.
    """
    import onnx

    graph, emulator = model.graph, Emulator.of(model)
    asked = _of_shapes(emulator)
    if not asked:
        return 0
    shaped = [n for n in graph.node if n.op_type == "Reshape" and n.input[1] in asked]
    found = [
        _run(emulator, model, size, [*asked, *(node.input[0] for node in shaped)])
        for size in _BATCHES
    ]
    for node in shaped:
        if (shape := _freed(node, found)) is not None:
            name = f"{node.name}.shape"
            graph.initializer.append(onnx.helper.make_tensor(name, 7, [len(shape)], shape))
            node.input[1] = name
    same = {
        name: one
        for name in asked
        if torch.equal(one := found[0][name], found[1][name]) and one.numel() <= _LARGEST
    }
    nodes = [node for node in graph.node if not same.keys() & set(node.output)]
    read = {name for node in nodes for name in node.input}
    for step in emulator.steps:
        for name in step.writes:
            if name in same and name in read:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(step.dtype)
                value = onnx.numpy_helper.from_array(same[name].numpy().astype(dtype), name)
                graph.initializer.append(value)
    left = _needed(nodes, [value.name for value in graph.output])
    count = len(graph.node) - len(left)
    replace_nodes(graph, left)
    drop_unread(graph)
    return count


def _of_shapes(emulator: Emulator) -> list[str]:
    """Return what nodes make of shapes and constants alone, and round nothing in, in order."""
    known = set(emulator.constants)
    found: list[str] = []
    for step in emulator.steps:
        follows = all(name in known for name in step.reads if name)
        exact = step.op in EXACT or step.dtype in _WHOLE
        if not set(step.writes) & set(emulator.outputs) and (
            step.op in ("Shape", "Size") or (follows and exact)
        ):
            known.update(step.writes)
            found += filter(None, step.writes)
    return found


def _run(
    emulator: Emulator, model: onnx.ModelProto, size: int, watch: Sequence[str]
) -> Mapping[str, Tensor]:
    zeros = {spec.name: torch.zeros(size, *spec.shape) for spec in inputs_of_graph(model)}
    with torch.inference_mode():
        return emulator.run(zeros, watch=watch)


def _freed(node: onnx.NodeProto, found: Sequence[Mapping[str, Tensor]]) -> list[int] | None:
    """Return the shape that a Reshape to (batch, …) may be given, None where there is none."""
    asked = [one[node.input[1]].tolist() for one in found]
    reads = [one[node.input[0]].shape[:1] for one in found]
    (first, *rest), (other, *same) = (shape or [None] for shape in asked)
    if (first, other) != _BATCHES or rest != same or not _keep_zeros(node, rest):
        return None
    if reads == [(size,) for size in _BATCHES]:
        return [0, *rest]
    return [-1, *rest] if -1 not in rest else None


def _keep_zeros(node: onnx.NodeProto, rest: Sequence[int]) -> bool:
    """Let a Reshape take 0 for an axis that stays, if what it has behind the first lets it."""
    said = [a for a in node.attribute if a.name == "allowzero" and a.i]
    if said and 0 in rest:
        return False
    for attribute in said:
        node.attribute.remove(attribute)
    return True


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """Return the nodes that something reads, in order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _free_reshapes(graph: onnx.GraphProto, batch: int) -> None:
    """Let a Reshape be to (0, …), which keeps the axis, and an Expand to (1, …)."""
    import numpy as np
    import onnx

    stored = {tensor.name: tensor for tensor in graph.initializer}
    kept = {"Reshape": 0, "Expand": 1}
    for node in graph.node:
        if node.op_type not in kept or node.input[1] not in stored:
            continue
        first, *rest = onnx.numpy_helper.to_array(stored[node.input[1]]).tolist() or [0]
        if first == batch and (node.op_type == "Expand" or _keep_zeros(node, rest)):
            name = f"{node.name}.shape"
            shape = np.array([kept[node.op_type], *rest], np.int64)
            graph.initializer.append(onnx.numpy_helper.from_array(shape, name))
            node.input[1] = name


def _free_resizes(graph: onnx.GraphProto, batch: int) -> None:
    """Let a Resize to the sizes (batch, …) ask how many samples there are."""
    import numpy as np
    import onnx

    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "Resize" and len(node.input) > 3 and node.input[3] in stored:
            first, *rest = onnx.numpy_helper.to_array(stored[node.input[3]]).tolist() or [0]
            whole = not any(a.name == "axes" for a in node.attribute)
            if first == batch and whole:
                count, others, sizes = (f"{node.name}.{part}" for part in ("count", "rest", "to"))
                value = onnx.numpy_helper.from_array(np.array(rest, np.int64), others)
                graph.initializer.append(value)
                nodes += [
                    onnx.helper.make_node("Shape", node.input[:1], [count], count, start=0, end=1),
                    onnx.helper.make_node("Concat", [count, others], [sizes], sizes, axis=0),
                ]
                node.input[3] = sizes
        nodes.append(node)
    replace_nodes(graph, nodes)
