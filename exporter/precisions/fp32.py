"""32-bit floats: the graph as PyTorch exported it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from exporter.contracts import Converted, Plugin, Progress, Statistics, silent
from exporter.records import Array

if TYPE_CHECKING:
    import onnx


class Fp32(Plugin, frozen=True):
    """IEEE single precision; the graph is unchanged."""

    needs_calibration: ClassVar[bool] = False

    def convert(
        self,
        model: onnx.ModelProto,
        statistics: Statistics,
        samples: Array,
        *,
        progress: Progress = silent,
    ) -> Converted:
        return Converted(model)


PLUGIN = Fp32
