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
# cuDNN's half kernels read channels last; its FP32 kernels are as fast or faster without.
_OPTIONS: dict[str, dict[str, Any]] = {
    "ort-cuda": {"cuda_graph": True},
    "tensorrt-rtx": {"targets": ["current"]},
}
_HALF: dict[str, dict[str, Any]] = {
    "torch-eager-cuda": {"channels_last": True},
    "torch-compile-cuda": {"channels_last": True},
}


class Candidate(NamedTuple):
    """A graph on a runtime."""

    precision: str
    name: str
    runtime: Runtime

    @property
    def title(self) -> str:
        return f"{self.precision} on {self.name}"


def candidates(name: str) -> Iterator[Candidate]:
    """Yield a runtime in each precision."""
    for precision in PRECISIONS:
        options = _OPTIONS.get(name, {}) | (_HALF.get(name, {}) if precision == "fp16" else {})
        yield Candidate(precision, name, load_runtime(name, options))


def graph(folder: Path, precision: str, pixels: int) -> OnnxModel:
    """Return the network as ONNX, as `graphs.make` left it."""
    path = folder / f"resnet18.{precision}.onnx"
    return OnnxModel(path, precision, TensorSpec("input", (1, pixels, pixels)), OUTPUT, BATCH)
