"""TensorRT, on the NVIDIA GPU in this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from exporter.contracts import Action
from exporter.errors import BuildError
from exporter.runtimes._cuda import compute_capability, missing_gpu, missing_to_run
from exporter.runtimes._graph import has_float8
from exporter.runtimes._trt import TensorRt

if TYPE_CHECKING:
    import onnx

OLDEST = (10, 12)  # the first whose strongly typed networks take what this package writes
FIRST_WITH_FP8 = 89  # compute capability 8.9, Ada


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

    def refuse(self, graph: onnx.GraphProto, name: str) -> None:
        """Raise `BuildError` for FP8 where the GPU has none."""
        if not has_float8(graph):
            return
        here = compute_capability()
        if int(here.removeprefix("sm")) < FIRST_WITH_FP8:
            raise BuildError(
                f"{name}: the NVIDIA GPU here is {here}, and FP8 exists from sm{FIRST_WITH_FP8} on",
                hint="export int8 or fp16 for it",
            )


PLUGIN = FullTensorRt
