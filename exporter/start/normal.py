"""An ONNX graph made into what `export_onnx` would have written.

In the profile's opset, with a free batch axis, nodes named after their layers, constants among the
initialisers, and nothing in it but the network. What was done to get there is said, one clause
each.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from exporter.emulation import Emulator, Step, Values
from exporter.emulation.rounding import EXACT
from exporter.errors import InputRefused
from exporter.onnx_edits import drop_unread, replace_nodes
from exporter.records import TensorSpec
from exporter.to_onnx import module_of, name_nodes, strip
from exporter.words import plain, quoted

if TYPE_CHECKING:
    import onnx

ONNX = ("", "ai.onnx")  # the domain of its own operators
FLOATS_AND_SHAPES = {1, 6, 7, 9}  # onnx.TensorProto: FLOAT, and INT32, INT64 and BOOL
_BATCH = "batch"
_SAMPLES = 2
_LARGEST_CONSTANT = 1 << 24  # values of one that is computed here


class Normal(NamedTuple):
    """A graph made normal, its ends, and what it was.

    ``batch`` is the size that its batch axis was fixed at, None where that was free; ``opset`` the
    one that it had.
    """

    model: onnx.ModelProto
    input: TensorSpec
    output: TensorSpec
    opset: int
    batch: int | None
    changes: tuple[str, ...]


def drop_given_constants(graph: onnx.GraphProto) -> None:
    """Take the constants from the inputs, among which files of IR version 3 list them too."""
    stored = {tensor.name for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in stored]
    del graph.input[:]
    graph.input.extend(given)


def make_normal(model: onnx.ModelProto, spec: TensorSpec, *, opset: int) -> Normal:
    """Return a model of such an input made normal. Raises `InputRefused` where it cannot be."""
    import onnx

    changes = []
    found = next(o.version for o in model.opset_import if o.domain in ONNX)
    name_nodes(model, _layer_of)
    if found != opset:
        model = _converted(model, found, opset)
        name_nodes(model, _layer_of)  # what it put in has no name, and what had one still has it
        changes.append(f"opset {found} converted to {opset}")
    batch = _free(model.graph, spec)
    if batch is not None:
        changes.append(f"its batch axis of {batch} freed")
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", opset))
    least = onnx.helper.find_min_ir_version_for(model.opset_import)
    model.ir_version = max(model.ir_version, least)
    _spell_out_casts(model)
    strip(model)
    if count := _fold_constants(model):
        changes.append(f"what reads constants alone computed, nodes: {count}")
    if batch is not None:
        _free_reshapes(model.graph, batch)
    output = _infer(model, batch)
    return Normal(model, spec, output, found, batch, tuple(changes))


def _converted(model: onnx.ModelProto, found: int, opset: int) -> onnx.ModelProto:
    """Return the model in another opset, by ONNX's own converter. Raises `InputRefused`."""
    import onnx

    try:
        return onnx.version_converter.convert_version(model, opset)
    except Exception as error:  # its C++ raises what comes to it
        reason = plain(" ".join(str(error).split()), most=200).rstrip(".")
        raise InputRefused(
            f"it uses opset {found}, and ONNX cannot convert it to the profile's {opset}: {reason}",
            hint=f"keep its own with --set opset={found}, or export it anew",
        ) from error


def input_of(graph: onnx.GraphProto, shape: tuple[int, ...] | None) -> TensorSpec:
    """Return the input; ``shape`` (C, H, W) says sizes that are open.

    Raises `InputRefused` for another than (N, C, H, W), or where that is not what ``shape`` says.
    """
    value = graph.input[0]
    sizes = _sizes(value)
    said = " × ".join("free" if size is None else str(size) for size in sizes)
    if len(sizes) != 4:
        raise InputRefused(
            f"its input {quoted(value.name)} is {said or 'without axes'}, where N × C × H × W is "
            "needed"
        )
    rest = sizes[1:]
    if shape is None and None in rest:
        raise InputRefused(
            f"its input {quoted(value.name)} is {said}, which leaves sizes open",
            hint="say them, as --input 3x224x224",
        )
    wanted = tuple(size or 0 for size in rest) if shape is None else shape
    fits = len(wanted) == len(rest) and all(
        size in (None, want) for size, want in zip(rest, wanted, strict=False)
    )
    if not fits or min(wanted) < 1:
        asked = " × ".join(map(str, wanted))
        raise InputRefused(f"its input {quoted(value.name)} is {said}, and cannot be {asked}")
    return TensorSpec(value.name, wanted)


def _sizes(value: onnx.ValueInfoProto) -> list[int | None]:
    """Return a tensor's sizes, None where they are open."""
    axes = value.type.tensor_type.shape.dim
    return [axis.dim_value if axis.HasField("dim_value") else None for axis in axes]


def _free(graph: onnx.GraphProto, spec: TensorSpec) -> int | None:
    """Free the batch axis, and fix all others; return the batch that it was fixed at."""
    value = graph.input[0]
    batch, *_ = _sizes(value)
    first, *others = value.type.tensor_type.shape.dim
    first.dim_param = _BATCH
    for axis, size in zip(others, spec.shape, strict=True):
        axis.dim_value = size
    return batch


def _spell_out_casts(model: onnx.ModelProto) -> None:
    """Let a CastLike, which casts to the type of another tensor, be a Cast to that type."""
    import onnx

    casts = [node for node in model.graph.node if node.op_type == "CastLike"]
    if not casts:
        return
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    for node in casts:
        if kind := types.get(node.output[0]):
            node.op_type = "Cast"
            del node.input[1:]
            node.attribute.append(onnx.helper.make_attribute("to", kind))


def _layer_of(node: onnx.NodeProto) -> str:
    """Return a node's layer, by what torch.onnx says of it or by its own name.

    ``/layer1/layer1.0/conv1/Conv``, as torch.onnx once named them, is ``layer1.0.conv1``.
    """
    parts = [part for part in node.name.split("/") if part]
    if len(parts) > 1 and re.fullmatch(rf"{re.escape(node.op_type)}([_.]\d+)?", parts[-1]):
        parts.pop()
    kept = [part for part, inner in pairwise([*parts, ""]) if not inner.startswith(f"{part}.")]
    name = module_of(node) or ".".join(kept) or node.op_type
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)


def _fold_constants(model: onnx.ModelProto) -> int:
    """Compute nodes that read constants alone and round nothing, and return how many."""
    import onnx

    emulator = Emulator.of(model)
    constants = dict(emulator.constants)
    left, count = [], 0
    for node, step in zip(model.graph.node, emulator.steps, strict=True):
        found = _computed(emulator, step, constants)
        if found is None:
            left.append(node)
            continue
        constants |= found
        dtype = onnx.helper.tensor_dtype_to_np_dtype(step.dtype)
        for name, value in found.items():
            tensor = onnx.numpy_helper.from_array(value.numpy().astype(dtype), name)
            model.graph.initializer.append(tensor)
        count += step.op != "Constant"
    replace_nodes(model.graph, left)
    drop_unread(model.graph)
    return count


def _free_reshapes(graph: onnx.GraphProto, batch: int) -> None:
    """Let each Reshape to (batch, …) keep the samples that it is given, however many these are.

    One whose first axis is not of samples then gives another shape, or other values for one sample
    alone, and the file is refused for that.
    """
    import numpy as np
    import onnx

    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        plain_zero = not any(a.name == "allowzero" and a.i for a in node.attribute)
        if node.op_type != "Reshape" or node.input[1] not in stored or not plain_zero:
            continue
        first, *rest = onnx.numpy_helper.to_array(stored[node.input[1]]).tolist() or [0]
        if first == batch:
            name = f"{node.name}.shape"
            shape = np.array([0, *rest], np.int64)
            graph.initializer.append(onnx.numpy_helper.from_array(shape, name))
            node.input[1] = name
    drop_unread(graph)


def _computed(emulator: Emulator, step: Step, constants: Values) -> Values | None:
    """Return what a node makes of constants, or None where it reads others or gives an output."""
    known = all(name in constants for name in step.reads if name)
    if not known or step.op not in EXACT or step.dtype not in FLOATS_AND_SHAPES:
        return None
    if set(emulator.outputs) & set(step.writes):
        return None
    found = emulator.compute(step, [constants[name] if name else None for name in step.reads])
    return found if all(v.numel() <= _LARGEST_CONSTANT for v in found.values()) else None


def _infer(model: onnx.ModelProto, batch: int | None) -> TensorSpec:
    """Declare and return the output. Raises `InputRefused` unless it is (N, classes), N free."""
    import onnx

    value = model.graph.output[0]
    value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        reason = plain(" ".join(str(error).split()), most=200).rstrip(".")
        raise InputRefused(f"the shapes of its tensors do not go together: {reason}") from error
    axes = inferred.graph.output[0].type.tensor_type.shape.dim
    known = [axis.dim_param or axis.dim_value for axis in axes]
    if batch is not None and (not known or known[0] != _BATCH):
        raise InputRefused(
            f"its batch axis is fixed at {batch}, and cannot be freed: with another size its "
            f"output is not of that many samples",
            hint="export it anew with a free batch axis (dynamic_axes or dynamic_shapes)",
        )
    sizes = _gives(model)
    declared = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [_BATCH, *sizes])
    value.type.CopyFrom(declared)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = plain(" ".join(str(error).split()), most=200).rstrip(".")
        raise InputRefused(f"not valid ONNX with a free batch axis: {reason}") from error
    return TensorSpec(value.name, sizes)


def _gives(model: onnx.ModelProto) -> tuple[int, ...]:
    """Return the shape of a sample's output, as a run tells it. Raises `InputRefused`."""
    import torch

    emulator = Emulator.of(model)
    axes = model.graph.input[0].type.tensor_type.shape.dim
    zeros = torch.zeros(_SAMPLES, *(axis.dim_value for axis in axes[1:]))
    with torch.inference_mode():
        (found,) = emulator.run({emulator.inputs[0]: zeros}).values()
    if found.ndim != 2 or found.shape[0] != _SAMPLES or not found.numel():
        shape = " × ".join(map(str, found.shape))
        raise InputRefused(
            f"it gives a tensor of {shape} for a batch of {_SAMPLES}, and only networks that give "
            "(N, classes) can be judged so far"
        )
    return tuple(found.shape[1:])
