"""8-bit floats (E4M3), as explicit quantise/dequantise pairs: for GPUs from SM89 on.

    activations  per tensor,       q = E4M3(x / s),  s = amax / 448
    weights      per out channel,  q = E4M3(w / s),  s = max |w| / 448

E4M3 is the nearest number with 4 significant bits, of 2⁻⁹ to 448, and ±448 beyond: it has no
infinity (P. Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433). Pairs stand
where those of INT8 do (`_qdq`).

FP8 is floating: a value is off by up to 1/16 of itself, wherever amax lies, as long as it is above
amax / 28,672. A range that is cut off gains nothing, so the scale is that of the largest magnitude;
``percentile`` is for ranges of rare values that are thousands of times the rest. And a scale may
be larger than it need be: where ``around`` is half it is at least 2⁻¹⁴, half's smallest normal
number, and the smallest step, 2⁻²³, is then the next to half's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from exporter.calibrators import PERCENTILE, threshold
from exporter.contracts import Converted, Plugin, Progress, Statistics, silent
from exporter.precisions._half import SMALLEST_NORMAL, check_half_io, in_halves
from exporter.precisions._qdq import FP8, Pairs, activation_scale, coverage, layers_to_quantise
from exporter.records import Array, Ranges

if TYPE_CHECKING:
    import onnx


class Fp8(Plugin, frozen=True):
    """FP8 (E4M3): weights per channel, activations calibrated per tensor; SM89 and later.

    ``calibrator`` is ``"max"`` or ``"percentile"`` (of magnitudes, at ``percentile`` %);
    ``around`` is what is not FP8: ``"fp32"`` or ``"fp16"``; ``linear`` quantises linear layers too;
    ``keep`` names layers, as in the PyTorch module, that stay in float; ``half_io`` makes input and
    output half where ``around`` is.
    """

    calibrator: Literal["max", "percentile"] = "max"
    percentile: float = 99.999
    around: Literal["fp32", "fp16"] = "fp32"
    linear: bool = False
    keep: tuple[str, ...] = ()
    half_io: bool = False

    needs_calibration: ClassVar[bool] = True

    RANGES: ClassVar[Ranges] = {"percentile": PERCENTILE}

    def __post_init__(self) -> None:
        Plugin.__post_init__(self)
        check_half_io(self.around, half_io=self.half_io)

    def convert(
        self,
        model: onnx.ModelProto,
        statistics: Statistics,
        samples: Array,
        *,
        progress: Progress = silent,
    ) -> Converted:
        import onnx

        storage = FP8._replace(least=SMALLEST_NORMAL) if self.around == "fp16" else FP8
        quantised = onnx.ModelProto()
        quantised.CopyFrom(model)
        layers = layers_to_quantise(quantised.graph, linear=self.linear, keep=self.keep)
        writer = Pairs(quantised.graph, layers, storage)
        for name in writer.activations():
            amax = threshold(self.calibrator, statistics[name], self.percentile)
            writer.quantise_activation(name, activation_scale(name, amax, storage))
        writer.quantise_weights()
        writer.write()
        made = Converted(quantised, (coverage(model.graph, layers, FP8.name, self.around),))
        return in_halves(
            made, self.around, half_io=self.half_io, statistics=statistics, samples=samples
        )


PLUGIN = Fp8
