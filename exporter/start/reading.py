"""A stranger's ONNX file, made into the graph that the rest of the program reads, or refused.

    file ── check_onnx ──▶ parsed, external data brought in ── normal ──▶ a float32 graph

Whether the graph still computes the same is not decided here: `exporter.start.file` runs both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from exporter import environment
from exporter.emulation.operators import OPERATORS
from exporter.emulation.rounding import LAYERS
from exporter.errors import ExportError, InputRefused, OutOfMemory
from exporter.factories import Shapes
from exporter.onnx_files import LARGEST_FILE, check_onnx
from exporter.records import TensorSpec
from exporter.start.ends import check_ends, half_hint, inputs_of_file, kind_of
from exporter.start.normal import (
    FLOATS_AND_SHAPES,
    ONNX,
    Normal,
    drop_given_constants,
    make_normal,
)
from exporter.words import plain, quoted

if TYPE_CHECKING:
    import onnx

_KNOWN = {
    *OPERATORS,
    "CastLike",
    "Upsample",
}  # the last two become others (`exporter.start.normal`)
FEWEST = 3  # samples that are computed at once, and that a file is held against its emulation on
_COPIES = 8  # of a tensor in float64: it, what it is made of, its noise and what that is made of
_EVAL = "export it anew after module.eval()"
_SHOWN = 5
_QUANTISED = re.compile(r"(De|Dynamic)?[Qq]uantizeLinear|QLinear.*|.*Integer")


class Given(NamedTuple):
    """What a file holds, as it was and made normal, and what was done to make it so.

    ``original`` is the model as it stands in the file, its external data inside.
    """

    original: bytes
    sha256: str
    normal: Normal
    changes: tuple[str, ...]


def read_file(path: Path, *, opset: int, input_shape: Shapes | None) -> Given:
    """Return what a file holds, in this opset; ``input_shape`` says free sizes.

    It is that of one input, (C, H, W), or of inputs by their names. Raises `InputRefused` for what
    `check_onnx` refuses, and for what cannot be started from: inputs and outputs that are not
    float32 tensors with a row for each sample, one input alone that is not (N, C, H, W), an output
    that is an input or follows from none, other types than float32, quantised graphs, operators
    that are not known exactly, a batch axis that cannot be freed, and another opset that ONNX
    cannot convert.
    """
    import onnx

    check_onnx(path, runs=False)
    try:
        data = path.read_bytes()
        specs = _asked_of(onnx.load_model_from_string(data).graph, input_shape)
    except (ExportError, OSError) as error:
        raise _named(path, error) from error
    check_onnx(path, runs=True, sizes={spec.name: spec.shape for spec in specs})
    try:
        model = onnx.load_model_from_string(data)
        digest, places = _pinned(data, model, path.parent)
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
        if model.ByteSize() > LARGEST_FILE:
            raise InputRefused(
                f"it has {model.ByteSize():,} bytes with its external data, and {LARGEST_FILE:,} "
                "are the most that one ONNX file can hold"
            )
        original = model.SerializeToString()
        drop_given_constants(model.graph)
        _check_types(model.graph)
        _check_memory(model, specs)
        normal = make_normal(model, specs, opset=opset)
        _check_values(normal.model)
    except OutOfMemory as error:
        raise OutOfMemory(f"{plain(path.name)}: {error}", hint=error.hint) from error
    except (ExportError, OSError) as error:
        raise _named(path, error) from error
    brought = ("its external data brought in",) if places else ()
    return Given(original, digest, normal, (*brought, *normal.changes))


def _named(path: Path, error: ExportError | OSError) -> InputRefused:
    """Return a refusal that names the file."""
    if isinstance(error, OSError):
        return InputRefused(f"{plain(path.name)}: cannot be read: {error.strerror or error}")
    return InputRefused(f"{plain(path.name)}: {error}", hint=error.hint)


def _asked_of(graph: onnx.GraphProto, shape: Shapes | None) -> tuple[TensorSpec, ...]:
    """Return the inputs of a graph that can be started from, as far as it tells without a run."""
    drop_given_constants(graph)
    check_ends(graph)
    _check_operators(graph)
    return inputs_of_file(graph, shape)


def _pinned(data: bytes, model: onnx.ModelProto, folder: Path) -> tuple[str, list[str]]:
    """Return a file's SHA-256, and the files of its external data.

    With any it is that of the digests of the file and of each of those, in order of their names.
    """
    outside = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    places = sorted({entry.value for entry in outside if entry.key == "location"})
    digests = [hashlib.sha256(data).hexdigest()]
    for place in places:
        with (folder / place).open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    whole = hashlib.sha256("".join(digests).encode()).hexdigest()
    return (whole if places else digests[0]), places


# ── What is refused ─────────────────────────────────────────────────────────────────


def _check_operators(graph: onnx.GraphProto) -> None:
    """Raise `InputRefused` for operators that are foreign, unknown, quantise, or train."""
    import onnx

    foreign = {f"{n.domain}::{n.op_type}" for n in graph.node if n.domain not in ONNX}
    if foreign:
        raise InputRefused(
            f"it has operators that are not ONNX's own: {_some(sorted(foreign))}",
            hint="start from the file as it was exported, before a runtime optimised it",
        )
    if quantising := sorted({n.op_type for n in graph.node if _QUANTISED.fullmatch(n.op_type)}):
        raise InputRefused(
            f"it is quantised already: it has {_some(quantising)}",
            hint="start from the float32 file that it was made from; --precision int8 quantises it",
        )
    unknown = {node.op_type: node for node in reversed(graph.node) if node.op_type not in _KNOWN}
    if unknown:
        said = [f"{kind} {_node(node)}" for kind, node in sorted(unknown.items())]
        raise InputRefused(
            f"the float64 reference does not know what it has: {' and '.join(said[:_SHOWN])}",
            hint="onnxsim or onnxslim may compute it where it follows from constants; else export "
            "without it, or cut the file in front of it: onnx.utils.extract_model(path, to, "
            "inputs, outputs)",
        )
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        drops = node.input[2] if node.op_type == "Dropout" and len(node.input) > 2 else ""
        if drops in stored and onnx.numpy_helper.to_array(stored[drops]).any():
            raise InputRefused(f"the Dropout {_node(node)} is in training mode", hint=_EVAL)
        trains = any(a.name == "training_mode" and a.i for a in node.attribute)
        if node.op_type == "BatchNormalization" and trains:
            raise InputRefused(
                f"the BatchNormalization {quoted(node.name)} is in training mode",
                hint=_EVAL,
            )


def _check_types(graph: onnx.GraphProto) -> None:
    """Raise `InputRefused` for constants that are no numbers."""
    import onnx

    for tensor in graph.initializer:
        if tensor.data_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
            raise InputRefused(
                f"its tensor {quoted(tensor.name)} is {kind_of(tensor.data_type)}, and the FP32 "
                "graph of a network is needed"
            )


def _check_memory(model: onnx.ModelProto, specs: Sequence[TensorSpec]) -> None:
    """Raise for tensors that are empty, or too large to be computed in float64 here.

    `InputRefused` and `OutOfMemory`.
    """
    import onnx

    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    for value, spec in zip(sized.graph.input, specs, strict=True):
        axes = value.type.tensor_type.shape.dim
        for axis, size in zip(axes, (FEWEST, *spec.shape), strict=True):
            axis.dim_value = size
    for value in sized.graph.output:
        value.type.tensor_type.ClearField("shape")
    found = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    memory = environment.memory_bytes()
    for value in (*found.input, *found.value_info, *found.output):
        kind = value.type.tensor_type
        sizes = [axis.dim_value for axis in kind.shape.dim if axis.HasField("dim_value")]
        said = " × ".join(map(str, sizes))
        if 0 in sizes[1:] and kind.elem_type == onnx.TensorProto.FLOAT:
            raise InputRefused(f"its tensor {quoted(value.name)} of {said} is empty")
        needed = _COPIES * 8 * prod(sizes)
        if memory and needed > memory:
            raise OutOfMemory(
                f"its tensor {quoted(value.name)} is {said} for {FEWEST} samples, and computing "
                f"it in float64 takes {needed / 1e9:,.0f} GB, more than this machine's "
                f"{memory / 1e9:.0f} GB of memory",
                hint="take a machine with more, or a smaller picture",
            )


def _check_values(model: onnx.ModelProto) -> None:
    """Raise `InputRefused` for tensors of types that are not known exactly, and broken weights."""
    import numpy as np
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    for name, kind in types.items():
        if kind not in FLOATS_AND_SHAPES:
            raise InputRefused(
                f"its tensor {quoted(name)} is {kind_of(kind)}, and the FP32 graph of a network is "
                "needed",
                hint=half_hint(kind),
            )
    weighted = (*LAYERS, "BatchNormalization")
    read = {name for node in model.graph.node if node.op_type in weighted for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.name in read and (
            bad := int((~np.isfinite(onnx.numpy_helper.to_array(tensor))).sum())
        ):
            raise InputRefused(
                f"its tensor {quoted(tensor.name)} holds {bad} values that are NaN or infinite"
            )


def _node(node: onnx.NodeProto) -> str:
    return quoted(node.name or next(iter(node.output), ""))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(plain, names[:_SHOWN])) + more
