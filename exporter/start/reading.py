"""A stranger's ONNX file, made into the graph that the rest of the program reads, or refused.

    file ── check_onnx ──▶ parsed, external data brought in ── normal ──▶ one float32 graph

Whether the graph still computes the same is not decided here: `exporter.start.file` runs both.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from exporter.emulation import Emulator
from exporter.emulation.rounding import LAYERS
from exporter.errors import ExportError, InputRefused
from exporter.onnx_files import LARGEST_FILE, check_onnx
from exporter.records import TensorSpec
from exporter.start.normal import (
    FLOATS_AND_SHAPES,
    ONNX,
    Normal,
    drop_given_constants,
    input_of,
    make_normal,
)
from exporter.words import plain, quoted

if TYPE_CHECKING:
    import onnx

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


def read_file(path: Path, *, opset: int, input_shape: tuple[int, ...] | None) -> Given:
    """Return what a file holds, in this opset; ``input_shape`` (C, H, W) says free sizes.

    Raises `InputRefused` for what `check_onnx` refuses, and for what cannot be started from: other
    inputs and outputs than one float32 tensor (N, C, H, W) and one (N, classes), other types than
    float32, quantised graphs, operators that are not known exactly, a batch axis that cannot be
    freed, and another opset that ONNX cannot convert.
    """
    import onnx

    check_onnx(path, runs=False)
    try:
        data = path.read_bytes()
        spec = _asked_of(onnx.load_model_from_string(data).graph, input_shape)
    except (ExportError, OSError) as error:
        raise _named(path, error) from error
    check_onnx(path, runs=True, sizes=spec.shape)
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
        normal = make_normal(model, spec, opset=opset)
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


def _asked_of(graph: onnx.GraphProto, shape: tuple[int, ...] | None) -> TensorSpec:
    """Return the input of a graph that can be started from, as far as it tells without a run."""
    drop_given_constants(graph)
    _check_ends(graph)
    _check_operators(graph)
    return input_of(graph, shape)


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
    """Raise `InputRefused` unless there is one float32 input and one float32 output."""
    import onnx

    for verb, values in (("takes", graph.input), ("gives", graph.output)):
        if len(values) != 1:
            names = ", ".join(quoted(value.name) for value in values[:_SHOWN])
            raise InputRefused(
                f"it {verb} {len(values)} tensors ({names}), and only files of one input and one "
                "output can be started from so far"
            )
        kind = values[0].type.tensor_type.elem_type
        if kind != onnx.TensorProto.FLOAT:
            raise InputRefused(
                f"it {verb} {quoted(values[0].name)} as {_kind(kind)}, where FLOAT is needed",
                hint=_half_hint(kind),
            )


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
    Emulator.of(model)  # names an operator that has no emulation


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
