"""What an ONNX file takes and gives, as far as it says so itself, and what of it can be judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from exporter.errors import InputRefused, nearest
from exporter.factories import Shapes
from exporter.records import TensorSpec
from exporter.words import plain, quoted

if TYPE_CHECKING:
    import onnx

EXTRACT = "leave it out of the file's outputs: onnx.utils.extract_model(path, to, inputs, outputs)"


def check_ends(graph: onnx.GraphProto) -> None:
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
                    f"it {verb} {quoted(value.name)} as {kind_of(kind)}, where FLOAT is needed",
                    hint=half_hint(kind) or _ends_hint(verb),
                )
    taken = {value.name for value in graph.input}
    follows = set(taken)
    for node in graph.node:
        holds_graph = any(a.g.node or a.graphs for a in node.attribute)  # which reads what it will
        if follows.intersection(node.input) or holds_graph:
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
    sizes = sizes_of(value)
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


def sizes_of(value: onnx.ValueInfoProto) -> list[int | None]:
    """Return a tensor's sizes, None where they are open."""
    axes = value.type.tensor_type.shape.dim
    return [axis.dim_value if axis.HasField("dim_value") else None for axis in axes]


def kind_of(kind: int) -> str:
    """Return an element type in words."""
    import onnx

    if kind not in onnx.TensorProto.DataType.values():
        return f"of the unknown type {kind}"
    return str(onnx.TensorProto.DataType.Name(kind)) if kind else "of no tensor type"


def half_hint(kind: int) -> str | None:
    """Return what helps where an element type is half, and else None."""
    import onnx

    if kind not in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
        return None
    return "start from the float32 file that it was made from; --precision fp16 converts it"
