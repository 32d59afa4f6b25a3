"""ONNX Runtime on the CPU."""

from __future__ import annotations

from typing import ClassVar

from exporter.runtimes._ort import OnnxRuntime


class OrtCpu(OnnxRuntime, frozen=True):
    """ONNX Runtime, CPU execution provider; ``threads`` as a whole, 0 for one per core."""

    provider: ClassVar[str] = "CPUExecutionProvider"
    device: ClassVar[str] = "cpu"


PLUGIN = OrtCpu
