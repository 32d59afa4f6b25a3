"""The process that first parses an ONNX file, run as a script.

    python _child.py FOLDER MEMORY SECONDS RUN SIZES < MODEL

It leaves FOLDER/outcome.json: ``{}``, or what was refused. MEMORY is in bytes, beyond what the
libraries take. With RUN the path of the model, it is also loaded by ONNX Runtime and run once on
zeros, a batch of one; RUN is empty for one that is not. SIZES, as ``{"image": [3, 224, 224]}``, are
what sizes of inputs behind their batch axes are that the model leaves open. An axis that the
model's metadata has a range for (`exporter.axes`) is at its largest without.

It imports nothing of the package but `exporter.limits`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).parents[2]))  # where the package is

from exporter.limits import limit

if TYPE_CHECKING:
    import onnx

LARGEST_TENSOR = 4 << 30  # bytes
_SMALL = 1024  # elements of a constant that may say what a shape is
_OPEN_FILES = 128
_RANGE = "size."  # what keys of metadata begin with that are ranges of axes
_WRITTEN = 1 << 20  # bytes of a file


class Refused(Exception):
    """What the model has that cannot be used."""


def check(data: bytes, sizes: dict[str, list[int]]) -> list[str]:
    """Return which tensors' shapes do not follow from the graph. Raises `Refused`."""
    import onnx

    model = onnx.load_model_from_string(data)
    if model.ir_version > onnx.IR_VERSION:
        raise Refused(
            f"it is of the IR version {model.ir_version}, and {onnx.IR_VERSION} is the newest known"
        )
    newest = onnx.defs.onnx_opset_version()
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if not 1 <= opset <= newest:
        raise Refused(f"it uses operator set {opset}, where 1 to {newest} are known")
    single = _without_numbers(model, sizes)
    onnx.checker.check_model(single)
    inferred = onnx.shape_inference.infer_shapes(single, data_prop=True).graph
    return list(_unknown(inferred))


def _without_numbers(model: onnx.ModelProto, sizes: dict[str, list[int]]) -> onnx.ModelProto:
    """Return the model for a batch of one of these sizes, its large constants as inputs."""
    import onnx

    single = onnx.ModelProto()
    single.CopyFrom(model)
    told = _told((entry.key, entry.value) for entry in model.metadata_props)
    single.ir_version = max(model.ir_version, 4)  # from which on constants need not be inputs
    graph = single.graph
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    del graph.initializer[:]
    given = [value for value in model.graph.input if value.name not in stored]
    del graph.input[:]
    graph.input.extend(given)
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = 1
    for value in graph.input:
        dims, said = value.type.tensor_type.shape.dim[1:], sizes.get(value.name, [])
        for dim, size in zip(dims, said, strict=False):
            if not dim.HasField("dim_value"):
                dim.dim_value = size
        for dim in dims:
            if dim.dim_param in told:
                dim.dim_value = told[dim.dim_param]
    for tensor in stored.values():
        if prod(tensor.dims) <= _SMALL and not tensor.external_data:
            graph.initializer.append(tensor)
        else:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(info)
    return single


def _told(metadata: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Return the largest size of every axis that metadata has a range for, by its name."""
    found = {}
    for key, value in metadata:
        numbers = value.split()
        if key.startswith(_RANGE) and len(numbers) == 3 and all(map(_is_size, numbers)):
            found[key.removeprefix(_RANGE)] = int(numbers[2])
    return found


def _is_size(text: str) -> bool:
    return len(text) < 10 and text.isascii() and text.isdecimal()


def _unknown(graph: onnx.GraphProto) -> Any:
    """Yield the names whose shapes are not known. Raises `Refused` for one that is too large."""
    import onnx

    kinds = {node_output: node for node in graph.node for node_output in node.output}
    known = set()
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        dims = tensor.shape.dim
        if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in dims):
            continue
        known.add(value.name)
        sizes = [dim.dim_value for dim in dims]
        width = 8
        with suppress(KeyError):
            width = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
        if prod(sizes) * width > LARGEST_TENSOR or min(sizes, default=0) < 0:
            node = kinds.get(value.name)
            what = f"{node.op_type} {node.name!r} makes" if node else "the graph is given"
            said = f"{what} {value.name[:80]!r} of {' × '.join(map(str, sizes))}"
            if min(sizes) < 0:
                raise Refused(f"{said}, and no size is negative")
            raise Refused(f"{said}, which is {prod(sizes) * width / 1e9:,.0f} GB")
    yield from (name for name in kinds if name and name not in known)


def run_once(path: str, sizes: dict[str, list[int]]) -> None:
    """Load the model with ONNX Runtime, and run it on zeros, a batch of one of these sizes."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {}
    told = _told(session.get_modelmeta().custom_metadata_map.items())
    for given in session.get_inputs():
        own = [1, *sizes.get(given.name, [])]
        said = zip_longest(given.shape, own[: len(given.shape)], fillvalue=0)
        shape = [
            size if isinstance(size, int) else other or told.get(size, 1) for size, other in said
        ]
        feed[given.name] = np.zeros(shape, _NUMPY.get(given.type, "float32"))
    session.run(None, feed)


_NUMPY = {
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def _no_memory(error: BaseException) -> bool:
    words = ("bad_alloc", "Failed to allocate", "bad allocation")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def main(folder: Path, memory: int, seconds: int, run: str, sizes: dict[str, list[int]]) -> None:
    import onnx  # noqa: F401 - what the library takes is not the model's

    if run:
        import onnxruntime  # noqa: F401 - as above
    outcome: dict[str, Any] = {}
    stage = "error"
    limit(memory, written=_WRITTEN, seconds=seconds, files=_OPEN_FILES)
    try:
        with open(0, "rb", closefd=False) as stream:
            stream.seek(0)
            unknown = check(stream.read(), sizes)
        stage = "not run"
        if run:
            run_once(run, sizes)
    except Refused as error:
        outcome = {"refused": str(error)}
    except Exception as error:  # a hostile file may raise anything
        kind = "memory" if _no_memory(error) else stage
        outcome = {kind: f"{type(error).__name__}: {error}"[:2000]}
        if kind == "not run":
            outcome["unknown"] = unknown[:1]
    (folder / "outcome.json").write_text(json.dumps(outcome), "ascii")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5])
    )
