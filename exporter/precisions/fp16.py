"""16-bit floats inside, 32-bit floats at the edges unless asked otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from exporter.contracts import Converted, Plugin, Progress, Statistics, silent
from exporter.precisions._half import to_half
from exporter.records import Array

if TYPE_CHECKING:
    import onnx


class Fp16(Plugin, frozen=True):
    """IEEE half precision for weights and activations; ``half_io`` for input and output too."""

    half_io: bool = False

    needs_calibration: ClassVar[bool] = False

    def convert(
        self,
        model: onnx.ModelProto,
        statistics: Statistics,
        samples: Array,
        *,
        progress: Progress = silent,
    ) -> Converted:
        return to_half(model, half_io=self.half_io)


PLUGIN = Fp16
