"""8-bit integers, as explicit quantise/dequantise pairs: the form that TensorRT 11 takes.

    activations  per tensor,       q = clip(rint(x / s), −128, 127),  s = amax / 127
    weights      per out channel,  q = clip(rint(w / s), −127, 127),  s = max |w| / 127

Symmetric, zero point 0, biases left in float. Pairs stand where TensorRT documents them ("Working
with quantized types", explicit quantisation): on the input and the weights of every convolution,
not on its output, and on the identity branch of a residual sum, so that convolution, bias, sum and
ReLU can become one integer kernel. Linear layers are left in float unless asked for: they are a
negligible part of the work and cost accuracy. (TensorRT fuses; whether a runtime gains speed from
INT8 is measured, not assumed.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from exporter.contracts import Converted, Plugin, Progress, Statistics, silent
from exporter.precisions._half import to_half
from exporter.precisions._qdq import INT8, Pairs, activation_scale, coverage, layers_to_quantise
from exporter.records import Array

if TYPE_CHECKING:
    import onnx


class Int8(Plugin, frozen=True):
    """Symmetric INT8: weights per channel, activations calibrated per tensor.

    ``calibrator`` is ``"max"`` or ``"percentile"`` (of magnitudes, at ``percentile`` %);
    ``around`` is the type of what is not quantised; ``linear`` quantises linear layers too;
    ``keep`` names layers, as in the PyTorch module, that stay in float; ``half_io`` makes input and
    output half where ``around`` is.
    """

    calibrator: Literal["max", "percentile"] = "percentile"
    percentile: float = 99.999
    around: Literal["fp32", "fp16"] = "fp32"
    linear: bool = False
    keep: tuple[str, ...] = ()
    half_io: bool = False

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 0 and at most 100, found {self.percentile}")
        if self.half_io and self.around != "fp16":
            raise ValueError('half_io needs around = "fp16"')

    def convert(
        self,
        model: onnx.ModelProto,
        statistics: Statistics,
        samples: Array,
        *,
        progress: Progress = silent,
    ) -> Converted:
        import onnx

        quantised = onnx.ModelProto()
        quantised.CopyFrom(model)
        layers = layers_to_quantise(quantised.graph, linear=self.linear, keep=self.keep)
        writer = Pairs(quantised.graph, layers, INT8)
        for name in writer.activations():
            writer.quantise_activation(name, self._scale(name, statistics))
        writer.quantise_weights()
        writer.write()
        notes = (coverage(model.graph, layers, INT8.name, self.around),)
        if self.around == "fp16":
            half = to_half(quantised, half_io=self.half_io)
            return Converted(half.model, (*notes, *half.notes))
        return Converted(quantised, notes)

    def _scale(self, name: str, statistics: Statistics) -> float:
        seen = statistics[name]
        amax = seen.amax if self.calibrator == "max" else seen.percentile(self.percentile)
        return activation_scale(name, amax, INT8)


PLUGIN = Int8
