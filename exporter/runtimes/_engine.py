"""Which layers of an engine run in which type: from its inspector, or as a hint from its text.

The inspector's JSON comes in two schemas (NVIDIA, "Migrating IEngineInspector Usage from TensorRT
10.x to 11.x"): a tensor's type is in ``Format/Datatype``, in words, or in ``Datatype``. A layer of
the engine names the ONNX layers it was made from in ``Metadata``, and else in its own name.

TensorRT-RTX's engines hold the compiled graph as text, which needs no GPU to read. That is
undocumented (seen in 1.7), so it is a hint: every convolution with the names of the tensors it
reads, every tensor with its type, and what is fused. Weights that are stored in fewer bits than the
convolution reads go through a kernel of their own first, which is a ``function`` there.

    tensor={ … dims={ 64 4 7 7 } name="c" … type=int8 }
    function={ name=f args={ "c" "d" } … output_args={ "e" } … }
    corrltn={ name="layer" output={"y" } input={"x" "c" … } … relu=true … bias=true … accu=true …
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from exporter.records import Executed
from exporter.runtimes._asked import Layer

_WORDS = {
    "int8": "int8",
    "fp8": "fp8",
    "fp8_e4m3": "fp8",
    "fp8e4m3": "fp8",
    "e4m3": "fp8",
    "half": "fp16",
    "fp16": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "float": "fp32",
    "fp32": "fp32",
}
_PRODUCTS = ("conv", "corr", "gemm", "matmul", "matrix", "fully")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def runs_in(activations: str | None, weights: str | None) -> str | None:
    """Return what a kernel runs in, from the types of the activations and weights it reads."""
    if activations is None or weights is None or activations == weights:
        return activations
    return f"{weights} weights" if weights in ("int8", "fp8") else activations


# ── The engine inspector ────────────────────────────────────────────────────────────


def inspected(text: str, asked: Sequence[Layer]) -> tuple[Executed, ...]:
    """Return every layer that was asked for fewer bits; none if the JSON tells of no types.

    An engine of less than detailed verbosity gives names alone.
    """
    try:
        told = json.loads(text)
    except ValueError:
        return ()
    entries = told.get("Layers", ()) if isinstance(told, dict) else ()
    detailed = [entry for entry in entries if isinstance(entry, dict) and entry.get("Inputs")]
    if not detailed:
        return ()
    return tuple(_inspected(layer, detailed) for layer in asked)


def _inspected(layer: Layer, entries: Sequence[Mapping[str, Any]]) -> Executed:
    own = [entry for entry in entries if layer.node.name in _made_from(entry)]
    products = [entry for entry in own if _is_product(entry)]
    found = {_entry_type(entry) for entry in products or own}
    if not own:
        return layer.as_run(None, "no layer of the engine names it")
    if len(found) > 1:
        return layer.as_run(None, "several layers of the engine name it, in several types")
    return layer.as_run(found.pop(), fused=_entry_fused((products or own)[0]))


def _made_from(entry: Mapping[str, Any]) -> set[str]:
    names = set(_ONNX_LAYER.findall(str(entry.get("Metadata", ""))))
    return names or set(re.split(r"\s*\+\s*", str(entry.get("Name", ""))))


def _is_product(entry: Mapping[str, Any]) -> bool:
    kind = f"{entry.get('LayerType', '')} {entry.get('ParameterType', '')}".lower()
    return any(word in kind for word in _PRODUCTS)


def _entry_type(entry: Mapping[str, Any]) -> str | None:
    """Return what a layer runs in. Weights are in it, or, where they are not, its second input."""
    types = [_tensor_type(tensor) for tensor in entry["Inputs"]]
    weights = entry.get("Weights")
    if isinstance(weights, dict):
        return runs_in(types[0], _word(str(weights.get("Type", ""))))
    return runs_in(types[0], types[1] if len(types) > 1 else None)


def _tensor_type(tensor: Mapping[str, Any]) -> str | None:
    for key in ("Format/Datatype", "Datatype", "DataType"):
        if key in tensor:
            return _word(str(tensor[key]))
    return None


def _word(said: str) -> str | None:
    words = (_WORDS.get(word) for word in re.findall(r"\w+", said.lower()))
    return next((word for word in words if word), None)


def _entry_fused(entry: Mapping[str, Any]) -> tuple[str, ...] | None:
    if "HasBias" not in entry and "HasReLU" not in entry:
        return None
    return _fused(entry.get("HasBias"), entry.get("HasReLU"), entry.get("HasSum"))


def _fused(bias: Any, relu: Any, total: Any) -> tuple[str, ...]:
    parts = {"bias": bias, "ReLU": relu, "sum": total}
    return tuple(name for name, there in parts.items() if there)


# ── The text in an engine of TensorRT-RTX ───────────────────────────────────────────

_INNER = rb"[^{}]*(?:\{[^{}]*\}[^{}]*)*?"  # of braces: what is in them may have braces once more
_TENSOR = re.compile(rb"tensor=\{" + _INNER + rb'\bname="([^"]*)"' + _INNER + rb"\btype=(\w+) \}")
_PRODUCT = re.compile(
    rb'\b(?:corrltn|convolution|deconv\w*|fully_connected|gemm|matmul)=\{ name="([^"]*)" '
    rb"output=\{[^{}]*\} input=\{([^{}]*)\}(" + _INNER + rb")layers="
)
_FUNCTION = re.compile(
    rb"\bfunction=\{ name=\S+ [^{}]*\bargs=\{[^{}]*\} input_args=\{([^{}]*)\}[^{}]*"
    rb"\boutput_args=\{([^{}]*)\}"
)


class _Told(NamedTuple):
    """What the text says of one layer."""

    ran: str | None
    fused: tuple[str, ...] | None
    dequantised: bool


def read_text(engine: bytes, asked: Sequence[Layer]) -> tuple[Executed, ...]:
    """Return every layer that was asked for fewer bits; none if there is no such text."""
    types = {name: kind.decode() for name, kind in _TENSOR.findall(engine)}
    unpacked = {
        name
        for reads, writes in _FUNCTION.findall(engine)
        if any(_WORDS.get(types.get(one, "")) in ("int8", "fp8") for one in _names(reads))
        for name in _names(writes)
    }
    found: dict[str, set[_Told]] = {}
    for name, inputs, options in _PRODUCT.findall(engine):
        read = _names(inputs)
        told = _Told(
            _text_type([types.get(one) for one in read]),
            _text_fused(options),
            len(read) > 1 and read[1] in unpacked,
        )
        found.setdefault(name.decode("utf-8", "replace"), set()).add(told)
    if not found:
        return ()
    return tuple(_from_text(layer, found.get(layer.node.name, set())) for layer in asked)


def _text_type(read: Sequence[str | None]) -> str | None:
    first, second = (_WORDS.get(kind) if kind else None for kind in (*read, None, None)[:2])
    return None if first is None or second is None else runs_in(first, second)


def _text_fused(options: bytes) -> tuple[str, ...] | None:
    told = dict(re.findall(rb"\b(bias|relu|accu)=(true|false)\b", options))
    if len(told) < 3:
        return None
    return _fused(*(told[option] == b"true" for option in (b"bias", b"relu", b"accu")))


def _from_text(layer: Layer, found: Iterable[_Told]) -> Executed:
    told = list(found)
    if len(told) != 1:
        return layer.as_run(None, "the engine's text does not name it as one layer")
    (only,) = told
    reason = "a kernel of its own dequantises the weights first" if only.dequantised else None
    return layer.as_run(only.ran, reason, only.fused)


def _names(quoted: bytes) -> list[bytes]:
    return re.findall(rb'"([^"]*)"', quoted)
