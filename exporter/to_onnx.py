"""PyTorch to ONNX, in FP32, with a free batch axis, and nothing in the file but the network.

Height and width are free where the inputs say so, and then the file says their range
(`exporter.axes`).

The exporter writes source paths and stack traces into node metadata; they are taken out, so that
the file says nothing of the machine that wrote it and the same network gives the same bytes
anywhere. What is worth keeping of them is the module each node came from: nodes are named after it.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.axes import tell_sides
from exporter.errors import GraphError
from exporter.records import BatchRange, OnnxModel, TensorSpec

if TYPE_CHECKING:
    import onnx
    from torch import nn

_SCOPES = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # of nodes that ask for a size
_OUTPUT = "output:"  # what no tensor of PyTorch's is called


def export_onnx(
    module: nn.Module,
    path: Path,
    *,
    input: TensorSpec,
    more_inputs: Sequence[TensorSpec] = (),
    output: TensorSpec,
    more_outputs: Sequence[TensorSpec] = (),
    batch: BatchRange,
    opset: int = 20,
) -> OnnxModel:
    """Write the network, which takes (N, *input.shape), to ``path``.

    ``more_inputs`` are those behind the first, in the order of its forward(), and ``output`` and
    ``more_outputs`` name what it gives, in its order; their free axes are free in the graph. Raises
    `GraphError` if it cannot be exported, for every size in its range if some are free, or if what
    was written is not valid ONNX.
    """
    import onnx
    import torch

    inputs, outputs = (input, *more_inputs), (output, *more_outputs)
    example = tuple(  # of two: a batch of 1 would be taken for a constant
        torch.zeros(2, *spec.shape, dtype=getattr(torch, spec.dtype)) for spec in inputs
    )
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                example,
                input_names=[spec.name for spec in inputs],
                output_names=[f"{_OUTPUT}{i}" for i in range(len(outputs))],
                dynamic_shapes=_dynamic(inputs),
                opset_version=opset,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _cannot_export(error) from error
    assert program is not None  # only None when a path is given
    model = program.model_proto
    _name_outputs(model, [spec.name for spec in outputs])
    _name_axes(model, inputs, outputs)
    name_nodes(model, lambda node: module_of(node) or node.op_type)
    strip(model)
    tell_sides(model, inputs)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).splitlines()[0]
        raise GraphError(f"torch.onnx wrote an invalid graph: {reason}") from error
    found = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    if found != opset:
        raise GraphError(f"torch.onnx wrote opset {found} where {opset} was asked for")
    onnx.save(model, path)
    return OnnxModel(path, "fp32", input, output, batch, tuple(more_inputs))


def _dynamic(inputs: Sequence[TensorSpec]) -> tuple[dict[int, Any], ...]:
    """Return the free axes of each input as torch.export takes them, one of a name being one."""
    from torch.export import Dim

    sides: dict[str, Any] = {}
    for axis in (axis for spec in inputs for axis in spec.free):
        times = axis.multiple
        least, most = axis.min // times, axis.max // times
        sides[axis.name] = (
            Dim(axis.name, min=least, max=most)
            if times == 1
            else times * Dim(f"{axis.name}_by_{times}", min=least, max=most)
        )
    return tuple(
        {0: "batch"} | {1 + axis.axis: sides[axis.name] for axis in spec.free} for spec in inputs
    )


def _cannot_export(error: Exception) -> GraphError:
    """Return what torch.onnx said, and of sizes that it cannot leave free which those are."""
    lines = str(error.__cause__ or error).strip().splitlines()
    broken = next((line.strip(" -") for line in lines if line.startswith("  - ")), None)
    if broken is None or "Constraints violated" not in lines[0]:
        return GraphError(f"torch.onnx cannot export the network: {lines[0]}")
    return GraphError(
        f"torch.onnx cannot export the network for every size: {broken.rstrip('.')}",
        hint="its forward() decides by the size of its input: narrow [size], or leave it out",
    )


def _name_axes(
    model: onnx.ModelProto, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    """Name the free axes of inputs and outputs. Raises `GraphError` for one that is fixed."""
    known = {spec.name: spec for spec in (*inputs, *outputs)}
    for value in (*model.graph.input, *model.graph.output):
        spec, dims = known[value.name], value.type.tensor_type.shape.dim
        names = {axis.axis: axis.name for axis in spec.free}
        if any(spec.free for spec in inputs):
            for axis, size in enumerate(spec.shape):
                if axis not in names:
                    dims[1 + axis].dim_value = size
                elif dims[1 + axis].HasField("dim_value"):
                    raise GraphError(
                        f"torch.onnx wrote {value.name!r} with a fixed {names[axis]} of "
                        f"{dims[1 + axis].dim_value}"
                    )
                else:
                    dims[1 + axis].dim_param = names[axis]


def _name_outputs(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Give the outputs their names; a tensor inside that has one of them gets another."""
    graph = model.graph
    if len(graph.output) != len(names):
        raise GraphError(
            f"torch.onnx wrote {len(graph.output)} outputs, and the network gives {len(names)}"
        )
    known = {tensor.name for tensor in (*graph.input, *graph.initializer, *graph.value_info)}
    known |= {name for node in graph.node for name in node.output}
    renamed = {value.name: name for value, name in zip(graph.output, names, strict=True)}
    for name in known.intersection(names):
        free = (f"{name}_{i}" for i in count(1))
        renamed[name] = next(new for new in free if new not in known and new not in names)
    for tensor in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in graph.node:
        for side in (node.input, node.output):
            side[:] = [renamed.get(name, name) for name in side]


def name_nodes(model: onnx.ModelProto, layer_of: Callable[[onnx.NodeProto], str]) -> None:
    """Name each node after the layer that it is or belongs to, say ``block2.0/Add``, uniquely."""
    seen: Counter[str] = Counter()
    taken: set[str] = set()
    for node in model.graph.node:
        name = layer_of(node)
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization"):
            name = f"{name}/{node.op_type}"
        node.name = name
        while node.name in taken or not seen[name]:
            seen[name] += 1
            node.name = name if seen[name] == 1 else f"{name}.{seen[name]}"
        taken.add(node.name)


def module_of(node: onnx.NodeProto) -> str:
    """Return the path of the innermost module that torch.onnx says a node came from, or nothing.

    Its scopes read ``['', 'block2', 'block2.conv1', op]``.
    """
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    try:
        names = ast.literal_eval(scopes)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # others write files too
        return ""
    inner = names[:-1] if isinstance(names, list) else []
    modules = (name for name in reversed(inner) if isinstance(name, str) and name != _NO_MODULE)
    return next(filter(None, modules), "")


def strip(model: onnx.ModelProto) -> None:
    """Take out what only says how the file came to be."""
    graph = model.graph
    model.producer_name, model.producer_version = "resnet-export", ""
    graph.name = "main"
    for holder in (model, graph, *graph.node, *graph.initializer, *model.functions):
        del holder.metadata_props[:]
        holder.doc_string = ""
    for value in (*graph.input, *graph.output, *graph.value_info):
        del value.metadata_props[:]
        value.doc_string = ""
    del graph.value_info[:]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from writing to stderr: failures are raised, the rest is advice."""
    silenced = {"torch.onnx": logging.ERROR, "torch._guards": logging.CRITICAL}
    loggers = {logging.getLogger(name): level for name, level in silenced.items()}
    before = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
