"""16-bit floats with the range of 32-bit ones and 8 bits of mantissa, FP16's having 11.

Hardly anything leaves the range of bfloat16, and everything loses three bits more than in FP16: it
is for networks whose activations would leave much of an FP16 graph in FP32. ONNX has convolutions
and pools in BFLOAT16 from opset 22 on, to which the graph is raised. TensorRT builds it for SM80
and newer; ONNX Runtime's CPU provider has no kernels for it, and says so when it loads the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from exporter.contracts import Converted, Plugin, Progress, Statistics, silent
from exporter.precisions._floats import BF16
from exporter.precisions._half import MARGIN, to_half
from exporter.records import Array, Range, Ranges

if TYPE_CHECKING:
    import onnx

OPSET = 22


class Bf16(Plugin, frozen=True):
    """Bfloat16 for weights and activations, float32 for input and output.

    ``margin`` is how many times further than on the calibration samples an activation may reach;
    ``keep`` names layers, as in the PyTorch module, that stay in FP32 whatever their range.
    """

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
            self._raised(model),
            half_io=False,
            half=BF16,
            statistics=statistics,
            samples=samples,
            margin=self.margin,
            keep=self.keep,
        )

    def _raised(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return the graph in an opset that knows BFLOAT16."""
        import onnx

        found = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        if found >= OPSET:
            return model
        raised = onnx.version_converter.convert_version(model, OPSET)
        raised.graph.name, raised.producer_name = model.graph.name, model.producer_name
        return raised


PLUGIN = Bf16
