"""Weights alone as 8-bit integers, and activations as floats: a file of a quarter the size.

    weights      per out channel,  q = clip(rint(w / s), −127, 127),  s = max |w| / 127

Each layer reads its weights through a DequantizeLinear; no activation is quantised, and calibration
only says what leaves half's range where ``around`` is half. TensorRT-RTX keeps the weights as
integers and fuses bias, ReLU and sum as it does around floats, which it does not around INT8
activations. Linear layers are quantised too unless told otherwise: their weights are rounded as
finely as any other's, and they may be most of a file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from exporter.contracts import Converted, Plugin, Progress, Statistics, silent
from exporter.precisions._half import check_half_io, in_halves
from exporter.precisions._qdq import INT8, Pairs, coverage, layers_to_quantise
from exporter.records import Array

if TYPE_CHECKING:
    import onnx


class Int8Weights(Plugin, frozen=True):
    """Symmetric INT8 for weights alone, per channel; activations stay in float.

    ``around`` is what activations and biases are: ``"fp32"`` or ``"fp16"``; ``linear`` quantises
    linear layers too; ``keep`` names layers, as in the PyTorch module, whose weights stay in float;
    ``half_io`` makes input and output half where ``around`` is.
    """

    around: Literal["fp32", "fp16"] = "fp32"
    linear: bool = True
    keep: tuple[str, ...] = ()
    half_io: bool = False

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
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

        quantised = onnx.ModelProto()
        quantised.CopyFrom(model)
        layers = layers_to_quantise(quantised.graph, linear=self.linear, keep=self.keep)
        writer = Pairs(quantised.graph, layers, INT8)
        writer.quantise_weights()
        writer.write()
        notes = (coverage(model.graph, layers, "INT8 (weights alone)", self.around),)
        return in_halves(
            Converted(quantised, notes),
            self.around,
            half_io=self.half_io,
            statistics=statistics,
            samples=samples,
        )


PLUGIN = Int8Weights
