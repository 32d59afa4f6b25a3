"""A stranger's ONNX file, made into the graph that the rest of the program reads, or refused.

    file ── check_onnx ──▶ parsed, external data brought in ── normal ──▶ a float32 graph

Whether the graph still computes the same is not decided here: `exporter.start.file` runs both.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from exporter.emulation.operators import OPERATORS
from exporter.emulation.rounding import LAYERS
from exporter.errors import ExportError, InputRefused
from exporter.factories import Shapes
from exporter.onnx_files import LARGEST_FILE, check_onnx
from exporter.records import TensorSpec
from exporter.start.normal import (
    EXTRACT,
    FLOATS_AND_SHAPES,
    ONNX,
    Normal,
    drop_given_constants,
    inputs_of_file,
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
        normal = make_normal(model, specs, opset=opset)
        _check_values(normal.model)
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
    _check_ends(graph)
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


def _check_ends(graph: onnx.GraphProto) -> None:
    """Raise `InputRefused` unless inputs and outputs are float32 tensors of names of their own.

    And each output is computed from an input.
    """
    import onnx

    for verb, values in (("takes", graph.input), ("gives", graph.output)):
        if not values:
            raise InputRefused(f"it {verb} no tensor")
        names = Counter(value.name for value in values)
        for value in values:
            if not value.name or names[value.name] > 1:
                said = "two tensors called" if value.name else "a tensor called"
                raise InputRefused(
                    f"it {verb} {said} {quoted(value.name)}, and each needs a name of its own"
                )
            kind = value.type.tensor_type.elem_type
            if kind != onnx.TensorProto.FLOAT:
                raise InputRefused(
                    f"it {verb} {quoted(value.name)} as {_kind(kind)}, where FLOAT is needed",
                    hint=_half_hint(kind) or _ends_hint(verb),
                )
    taken = {value.name for value in graph.input}
    follows = set(taken)
    for node in graph.node:
        if follows.intersection(node.input):
            follows.update(node.output)
    for value in graph.output:
        if value.name in taken:
            raise InputRefused(
                f"its output {quoted(value.name)} is its input as it is, and nothing computes it",
                hint=EXTRACT,
            )
        if value.name not in follows:
            raise InputRefused(
                f"its output {quoted(value.name)} is a constant: no input leads to it",
                hint=EXTRACT,
            )


def _ends_hint(verb: str) -> str | None:
    return EXTRACT if verb == "gives" else None


def _check_operators(graph: onnx.GraphProto) -> None:
    """Raise `InputRefused` for operators that are not ONNX's own, quantise, or train."""
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
    unknown = sorted({n.op_type for n in graph.node} - _KNOWN)
    if unknown:
        raise InputRefused(
            f"the float64 reference does not know what it has: {_some(unknown)}",
            hint="constants are computed by onnxsim or onnxslim; else export it without, or cut "
            "the file in front of them: onnx.utils.extract_model(path, to, inputs, outputs)",
        )
    for node in graph.node:
        trains = any(a.name == "training_mode" and a.i for a in node.attribute)
        if node.op_type == "BatchNormalization" and trains:
            raise InputRefused(
                f"the BatchNormalization {quoted(node.name)} is in training mode",
                hint="export it anew after module.eval()",
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
                f"its tensor {quoted(name)} is {_kind(kind)}, and the FP32 graph of a network is "
                "needed",
                hint=_half_hint(kind),
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


def _kind(kind: int) -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(kind)) if kind else "of no tensor type"


def _half_hint(kind: int) -> str | None:
    import onnx

    if kind not in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
        return None
    return "start from the float32 file that it was made from; --precision fp16 converts it"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(plain, names[:_SHOWN])) + more
