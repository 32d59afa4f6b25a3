"""Count what one sample costs: of an ONNX graph, as it is deployed, or of a PyTorch module.

    formulas    multiply-accumulates by operator
    graph       an ONNX graph's nodes        liveness    what is held in memory while each runs
    module      a PyTorch module's calls

Bytes are those of the stored types. Every operator is taken to read its inputs and to write its
outputs, as the graph says; a runtime that fuses some, or computes in place, moves and holds less.
"""

from __future__ import annotations

from exporter.flops.graph import count_flops, input_shape_of, read_file
from exporter.flops.module import count_module

__all__ = ["count_flops", "count_module", "input_shape_of", "read_file"]
