"""An ONNX graph made into what `export_onnx` would have written.

In the profile's opset, with a free batch axis, nodes named after their layers, constants among the
initialisers, and nothing in it but the network. What was done to get there is said, one clause
each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from exporter.emulation import Emulator, Step, Values
from exporter.emulation.rounding import EXACT
from exporter.errors import GraphError, InputRefused, nearest
from exporter.factories import Shapes
from exporter.onnx_edits import drop_unread, replace_nodes
from exporter.packing import inputs_of_graph
from exporter.records import TensorSpec
from exporter.to_onnx import module_of, name_nodes, strip
from exporter.words import plain, quoted

if TYPE_CHECKING:
    import onnx

ONNX = ("", "ai.onnx")  # the domain of its own operators
FLOATS_AND_SHAPES = {1, 6, 7, 9}  # onnx.TensorProto: FLOAT, and INT32, INT64 and BOOL
EXTRACT = "leave it out of the file's outputs: onnx.utils.extract_model(path, to, inputs, outputs)"
_BATCH = "batch"
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
        _free_reshapes(model.graph, batch)
        _free_resizes(model.graph, batch)
    outputs = _infer(model, batch)
    return Normal(model, inputs, outputs, found, batch, tuple(changes))


def _converted(model: onnx.ModelProto, found: int, opset: int) -> onnx.ModelProto:
    """Return the model in another opset, by ONNX's own converter. Raises `InputRefused`."""
    import onnx

    try:
        return onnx.version_converter.convert_version(model, opset)
    except Exception as error:  # its C++ raises what comes to it
        raise InputRefused(
            f"it uses opset {found}, and ONNX cannot convert it to the profile's {opset}: "
            f"{_why(error)}",
            hint=f"keep its own with --set opset={found}, or export it anew",
        ) from error


def inputs_of_file(graph: onnx.GraphProto, shape: Shapes | None) -> tuple[TensorSpec, ...]:
    """Return the inputs in the file's order; ``shape`` says sizes that are open.

    It is that of one input, (C, H, W), or of inputs by their names. Raises `InputRefused` for a
    name that no input has, for one input alone that is not (N, C, H, W), for others that are not
    (N, …), and for sizes that stay open or are not what ``shape`` says.
    """
    names = [value.name for value in graph.input]
    if isinstance(shape, Mapping):
        if unknown := [name for name in shape if name not in names]:
            raise InputRefused(
                f"it has no input {quoted(unknown[0])}, and takes {_listed(names)}",
                hint=nearest(unknown[0], map(plain, names)),
            )
    elif shape is not None and len(names) > 1:
        raise InputRefused(
            f"it takes {len(names)} inputs, {_listed(names)}, and one shape without a name was "
            "given",
            hint="name each whose sizes are open, as --input NAME=CxHxW",
        )
    said = shape if isinstance(shape, Mapping) else dict.fromkeys(names, shape)
    return tuple(_input(value, said.get(value.name), len(names)) for value in graph.input)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(quoted, names))


def _input(value: onnx.ValueInfoProto, shape: tuple[int, ...] | None, count: int) -> TensorSpec:
    """Return one of so many inputs. Raises `InputRefused`."""
    sizes = _sizes(value)
    named = quoted(value.name)
    said = " × ".join("free" if size is None else str(size) for size in sizes) or "without axes"
    if len(sizes) != 4 and (count == 1 or len(sizes) < 2):
        needed = "N × C × H × W" if count == 1 else "N × …"
        raise InputRefused(f"its input {named} is {said}, where {needed} is needed")
    if sizes[0] is not None and sizes[0] < 1:
        raise InputRefused(
            f"its input {named} is {said}, and a batch of {sizes[0]} holds no sample",
            hint="export it anew with a free batch axis (dynamic_axes or dynamic_shapes)",
        )
    rest = sizes[1:]
    if shape is None and None in rest:
        option = "--input 3x224x224" if count == 1 else f"--input {plain(value.name)}=3x224x224"
        raise InputRefused(
            f"its input {named} is {said}, which leaves sizes open", hint=f"say them, as {option}"
        )
    wanted = tuple(size or 0 for size in rest) if shape is None else shape
    fits = len(wanted) == len(rest) and all(
        size in (None, want) for size, want in zip(rest, wanted, strict=False)
    )
    if not fits or min(wanted) < 1:
        asked = " × ".join(map(str, wanted))
        raise InputRefused(f"its input {named} is {said}, and cannot be {asked}")
    return TensorSpec(value.name, wanted)


def _sizes(value: onnx.ValueInfoProto) -> list[int | None]:
    """Return a tensor's sizes, None where they are open."""
    axes = value.type.tensor_type.shape.dim
    return [axis.dim_value if axis.HasField("dim_value") else None for axis in axes]


def _free(graph: onnx.GraphProto, specs: Sequence[TensorSpec]) -> int | None:
    """Free the batch axes, and fix all others; return the batch that they were fixed at.

    Raises `InputRefused` for inputs that are fixed at different ones.
    """
    fixed = {}
    for value, spec in zip(graph.input, specs, strict=True):
        batch, *_ = _sizes(value)
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


def _free_resizes(graph: onnx.GraphProto, batch: int) -> None:
    """Let each Resize to the sizes (batch, …) keep the samples that it is given."""
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


def _infer(model: onnx.ModelProto, batch: int | None) -> tuple[TensorSpec, ...]:
    """Declare and return the outputs. Raises `InputRefused` unless each is (N, …), N free."""
    import onnx

    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        raise InputRefused(
            f"the shapes of its tensors do not go together: {_why(error)}"
        ) from error
    outputs = _gives(model, batch)
    for value, spec in zip(model.graph.output, outputs, strict=True):
        sizes: list[str | int | None] = [_BATCH, *spec.shape]
        declared = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, sizes)
        value.type.CopyFrom(declared)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputRefused(f"not valid ONNX with a free batch axis: {_why(error)}") from error
    return outputs


def _why(error: Exception) -> str:
    return plain(" ".join(str(error).split()), most=200).rstrip(".")


def _gives(model: onnx.ModelProto, batch: int | None) -> tuple[TensorSpec, ...]:
    """Return the outputs, of the shapes that a run of another batch tells.

    Raises `InputRefused`, and `GraphError` as that run.
    """
    emulator, specs = Emulator.of(model), inputs_of_graph(model.graph)
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
