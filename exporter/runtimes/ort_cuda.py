"""ONNX Runtime on an NVIDIA GPU, through CUDA."""

from __future__ import annotations

from typing import ClassVar

from exporter.contracts import Action
from exporter.runtimes._cuda import device_name, missing_gpu
from exporter.runtimes._ort import OnnxRuntime


class OrtCuda(OnnxRuntime, frozen=True):
    """ONNX Runtime, CUDA execution provider, with TF32 off."""

    provider: ClassVar[str] = "CUDAExecutionProvider"
    device: ClassVar[str] = "cuda"
    provider_options: ClassVar[dict[str, str]] = {"use_tf32": "0"}

    def missing(self, action: Action) -> str | None:
        """Return what is missing; listing the provider proves nothing, so a driver must answer."""
        reason = OnnxRuntime.missing(self, action)
        return reason or (missing_gpu() if action == "run" else None)

    def _device_name(self) -> str:
        return device_name()


PLUGIN = OrtCuda
