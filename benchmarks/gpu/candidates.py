"""What is put on the GPU: each runtime, in each precision, with the options that suit it best."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from exporter.contracts import Runtime
from exporter.plugins import load_runtime
from exporter.records import BatchRange, OnnxModel, TensorSpec

PRECISIONS = ("fp32", "fp16", "int8")
RUNTIMES = ("torch-eager-cuda", "torch-compile-cuda", "ort-cuda", "tensorrt", "tensorrt-rtx")
BATCH = BatchRange(1, 8, 256)
OUTPUT = TensorSpec("logits", (10,))
# In the order in which they are tried. cuDNN's half kernels read channels last; and ONNX Runtime
# refuses to capture a graph of which a node stays on the CPU.
_TRIES: dict[str, tuple[dict[str, Any], ...]] = {
    "ort-cuda": ({"cuda_graph": True}, {}),
    "tensorrt-rtx": ({"targets": ["current"]},),
}
_HALF = {name: ({"channels_last": True},) for name in RUNTIMES if name.startswith("torch-")}


class Candidate(NamedTuple):
    """A graph on a runtime, with the options to try."""

    precision: str
    name: str
    tries: tuple[Runtime, ...]

    @property
    def title(self) -> str:
        return f"{self.precision} on {self.name}"


def candidates(name: str) -> Iterator[Candidate]:
    """Yield a runtime in each precision."""
    for precision in PRECISIONS:
        tries = _TRIES.get(name, ({},))
        if precision == "fp16":
            tries = _HALF.get(name, tries)
        yield Candidate(precision, name, tuple(load_runtime(name, options) for options in tries))


def graph(folder: Path, precision: str, pixels: int) -> OnnxModel:
    """Return the network as ONNX, as `graphs.make` left it."""
    path = folder / f"resnet18.{precision}.onnx"
    return OnnxModel(path, precision, TensorSpec("input", (1, pixels, pixels)), OUTPUT, BATCH)
