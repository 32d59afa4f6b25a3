"""TensorRT, on the NVIDIA GPU in this machine."""

from __future__ import annotations

from typing import ClassVar

from exporter.contracts import Action
from exporter.runtimes._cuda import missing_gpu, missing_to_run
from exporter.runtimes._trt import TensorRt

OLDEST = (10, 12)  # the first whose strongly typed networks take what this package writes


class FullTensorRt(TensorRt, frozen=True):
    """TensorRT 10.12 or later, for the GPU present; it can neither build nor run without one."""

    package: ClassVar[str] = "tensorrt"

    def missing(self, action: Action) -> str | None:
        """Ask the driver first: without a GPU, TensorRT's own calls fail badly or crash."""
        if reason := self._missing_package():
            return reason
        from importlib.metadata import version

        found = version("tensorrt")
        if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
            return f"tensorrt {found} is older than {OLDEST[0]}.{OLDEST[1]}"
        return missing_gpu() if action == "build" else missing_to_run()


PLUGIN = FullTensorRt
