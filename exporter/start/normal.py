"""An ONNX graph made into what `export_onnx` would have written.

In the profile's opset, with a free batch axis, nodes named after their layers, constants among the
initialisers, and nothing in it but the network. What was done to get there is said, one clause
each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from exporter.emulation import Emulator, Step, Values
from exporter.emulation.rounding import EXACT
from exporter.errors import GraphError, InputRefused
from exporter.onnx_edits import drop_unread, replace_nodes
from exporter.packing import inputs_of_graph
from exporter.records import TensorSpec
from exporter.start.ends import EXTRACT, sizes_of
from exporter.start.shapes import compute_shapes, free_shapes
from exporter.to_onnx import module_of, name_nodes, strip
from exporter.words import plain, quoted

if TYPE_CHECKING:
    import onnx

ONNX = ("", "ai.onnx")  # the domain of its own operators
FLOATS_AND_SHAPES = {1, 6, 7, 9}  # onnx.TensorProto: FLOAT, and INT32, INT64 and BOOL
_BATCH = "batch"
_PLACED, _PLACE = 11, "coordinate_transformation_mode"  # since which opset Resize has it
_SAMPLES = 2
_LARGEST_CONSTANT = 1 << 24  # values of one that is computed here


class Normal(NamedTuple):
    """A graph made normal, its ends in its order, and what it was.

    ``batch`` is the size that its batch axis was fixed at, None where that was free; ``opset`` the
    one that it had.
    """

    model: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    batch: int | None
    changes: tuple[str, ...]


def drop_given_constants(graph: onnx.GraphProto) -> None:
    """Take the constants from the inputs, among which files of IR version 3 list them too."""
    stored = {tensor.name for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in stored]
    del graph.input[:]
    graph.input.extend(given)


def make_normal(model: onnx.ModelProto, inputs: tuple[TensorSpec, ...], *, opset: int) -> Normal:
    """Return a model of such inputs made normal. Raises `InputRefused` where it cannot be."""
    import onnx

    changes = []
    found = next(o.version for o in model.opset_import if o.domain in ONNX)
    name_nodes(model, _layer_of)
    if found != opset:
        model = _converted(model, found, opset)
        name_nodes(model, _layer_of)  # what it put in has no name, and what had one still has it
        changes.append(f"opset {found} converted to {opset}")
    batch = _free(model.graph, inputs)
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
        free_shapes(model.graph, batch)
    _check_sizes(model, batch)
    outputs = _gives(model, batch)
    if count := compute_shapes(model):
        changes.append(f"what follows from shapes alone computed, nodes: {count}")
    _declare(model, outputs)
    return Normal(model, inputs, outputs, found, batch, tuple(changes))


def _converted(model: onnx.ModelProto, found: int, opset: int) -> onnx.ModelProto:
    """Return the model in another opset, by ONNX's own converter. Raises `InputRefused`."""
    import onnx

    try:
        converted = onnx.version_converter.convert_version(model, opset)
    except Exception as error:  # its C++ raises what comes to it
        reason = _why(error).rpartition(" failed: ")[2]  # not where in its sources
        raise InputRefused(
            f"it uses opset {found}, and ONNX cannot convert it to the profile's {opset}: {reason}",
            hint=f"keep its own with --set opset={found}, or export it anew",
        ) from error
    if found < _PLACED:
        _place_as_before(converted.graph)
    return converted


def _place_as_before(graph: onnx.GraphProto) -> None:
    """Say where a Resize takes its values from as it once was; the converter leaves it unsaid."""
    import onnx

    for node in graph.node:
        told = {attribute.name for attribute in node.attribute}
        if node.op_type == "Resize" and not told & {_PLACE, "nearest_mode"}:
            said = {_PLACE: "asymmetric", "nearest_mode": "floor"}
            node.attribute.extend(onnx.helper.make_attribute(*pair) for pair in said.items())


def _free(graph: onnx.GraphProto, specs: Sequence[TensorSpec]) -> int | None:
    """Free the batch axes, and fix all others; return the batch that they were fixed at.

    Raises `InputRefused` for inputs that are fixed at different ones.
    """
    fixed = {}
    for value, spec in zip(graph.input, specs, strict=True):
        batch, *_ = sizes_of(value)
        if batch is not None:
            fixed[value.name] = batch
        first, *others = value.type.tensor_type.shape.dim
        first.dim_param = _BATCH
        for axis, size in zip(others, spec.shape, strict=True):
            axis.dim_value = size
    if len(set(fixed.values())) > 1:
        said = " and ".join(f"{quoted(name)} is of {size}" for name, size in fixed.items())
        raise InputRefused(
            f"the first axes of its inputs are not of one batch: {said}",
            hint="each input needs a row for every sample: export it anew with a free batch axis",
        )
    return next(iter(fixed.values()), None)


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


def _computed(emulator: Emulator, step: Step, constants: Values) -> Values | None:
    """Return what a node makes of constants, or None where it reads others or gives an output."""
    known = all(name in constants for name in step.reads if name)
    if not known or step.op not in EXACT or step.dtype not in FLOATS_AND_SHAPES:
        return None
    if set(emulator.outputs) & set(step.writes):
        return None
    found = emulator.compute(step, [constants[name] if name else None for name in step.reads])
    return found if all(v.numel() <= _LARGEST_CONSTANT for v in found.values()) else None


def _check_sizes(model: onnx.ModelProto, batch: int | None) -> None:
    """Raise `InputRefused` for shapes that contradict one another; outputs are undeclared.

    ``batch`` is what was freed.
    """
    import onnx

    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        said = f"the shapes of its tensors do not go together: {_why(error)}"
        raise (InputRefused(said) if batch is None else _not_freed(batch, said)) from error


def _declare(model: onnx.ModelProto, outputs: Sequence[TensorSpec]) -> None:
    """Declare the outputs with a free batch axis. Raises `InputRefused` where that is not valid."""
    import onnx

    for value, spec in zip(model.graph.output, outputs, strict=True):
        sizes: list[str | int | None] = [_BATCH, *spec.shape]
        declared = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, sizes)
        value.type.CopyFrom(declared)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputRefused(f"not valid ONNX with a free batch axis: {_why(error)}") from error


def _why(error: Exception) -> str:
    return plain(" ".join(str(error).split()), most=200).rstrip(".")


def _gives(model: onnx.ModelProto, batch: int | None) -> tuple[TensorSpec, ...]:
    """Return the outputs, of the shapes that a run of another batch tells.

    Raises `InputRefused`, and `GraphError` as that run.
    """
    emulator, specs = Emulator.of(model), inputs_of_graph(model)
    samples = _SAMPLES if batch != _SAMPLES else _SAMPLES + 1
    try:
        found = _shapes(emulator, specs, samples)
    except GraphError as error:
        if batch is None or isinstance(error.__cause__, NotImplementedError):
            raise
        raise _not_freed(batch, str(error)) from error
    for name, shape in found.items():
        if shape[:1] == (samples,) and 0 not in shape:
            continue
        if batch is not None:
            raise _not_freed(batch, f"its output {quoted(name)} is not of that many samples")
        said = " × ".join(map(str, shape)) or "one value"
        raise InputRefused(
            f"it gives {quoted(name)} as a tensor of {said} for a batch of {samples}, and only "
            "outputs that have a row for each sample, (N, …), can be judged",
            hint=EXTRACT,
        )
    return tuple(TensorSpec(name, shape[1:]) for name, shape in found.items())


def _shapes(
    emulator: Emulator, specs: Sequence[TensorSpec], samples: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each output for so many samples, in order. Raises `GraphError`."""
    import torch

    with torch.inference_mode():
        found = emulator.run({spec.name: torch.zeros(samples, *spec.shape) for spec in specs})
    return {name: tuple(found[name].shape) for name in emulator.outputs}


def _not_freed(batch: int, why: str) -> InputRefused:
    return InputRefused(
        f"its batch axis is fixed at {batch}, and cannot be freed: with another size {why}",
        hint="export it anew with a free batch axis (dynamic_axes or dynamic_shapes)",
    )
