"""ONNX Runtime on the CPU."""

from __future__ import annotations

from typing import ClassVar

from exporter.runtimes._ort import OnnxRuntime


class OrtCpu(OnnxRuntime, frozen=True):
    """ONNX Runtime, CPU execution provider; ``threads`` as a whole, 0 for one per core.

    ``as_written`` is for quantised graphs of another form than ``onnxruntime``: none of their pairs
    becomes an integer kernel, and weights are dequantised once, when the file is loaded.
    """

    provider: ClassVar[str] = "CPUExecutionProvider"
    device: ClassVar[str] = "cpu"


PLUGIN = OrtCpu
