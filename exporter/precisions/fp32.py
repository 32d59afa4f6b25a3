"""32-bit floats: the graph as PyTorch exported it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from exporter.contracts import Converted, Plugin, Statistics

if TYPE_CHECKING:
    import onnx


class Fp32(Plugin, frozen=True):
    """IEEE single precision; the graph is unchanged."""

    needs_statistics: ClassVar[bool] = False

    def convert(self, model: onnx.ModelProto, statistics: Statistics) -> Converted:
        return Converted(model)


PLUGIN = Fp32
