"""16-bit floats inside, 32-bit floats at the edges unless asked otherwise, and where they must be.

A half holds magnitudes up to 65504 and, at full precision, down to 2⁻¹⁴ ≈ 6.1e-5. What leaves that
range on the calibration samples stays in FP32 and is named with its figure (`_range` says what is
looked for); nothing is clamped to 65504 or flushed to 0 in silence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from exporter.contracts import Converted, Plugin, Progress, Statistics, silent
from exporter.precisions._half import MARGIN, to_half
from exporter.records import Array, Range, Ranges

if TYPE_CHECKING:
    import onnx


class Fp16(Plugin, frozen=True):
    """IEEE half precision for weights and activations; ``half_io`` for input and output too.

    ``margin`` is how many times further than on the calibration samples an activation may reach;
    ``keep`` names layers, as in the PyTorch module, that stay in FP32 whatever their range.
    """

    half_io: bool = False
    margin: float = MARGIN
    keep: tuple[str, ...] = ()

    needs_calibration: ClassVar[bool] = True

    RANGES: ClassVar[Ranges] = {"margin": Range(1)}

    def convert(
        self,
        model: onnx.ModelProto,
        statistics: Statistics,
        samples: Array,
        *,
        progress: Progress = silent,
    ) -> Converted:
        return to_half(
            model,
            half_io=self.half_io,
            statistics=statistics,
            samples=samples,
            margin=self.margin,
            keep=self.keep,
        )


PLUGIN = Fp16
