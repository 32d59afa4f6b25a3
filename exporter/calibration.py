"""What the activations are like: one streaming pass over the calibration samples.

Every sample runs alone through the FP32 graph in ONNX Runtime, so the result cannot depend on a
batch size, and everything kept is a maximum or a count, so it cannot depend on the order either.

Magnitudes are counted in bins that are fixed beforehand: the upper 16 bits of |x| as float32, which
is a logarithmic scale with 256 steps an octave. Memory is half a megabyte per tensor, however many
samples there are, and a percentile is read off to within 0.4 %, from above.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.contracts import Advance
from exporter.errors import GraphError, InputRefused
from exporter.records import Array, Feed, rank

if TYPE_CHECKING:
    import onnx

READERS = (  # of the tensors that are watched
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Concat", "LeakyRelu"),
    *("AveragePool", "GlobalAveragePool", "ReduceMean", "Sigmoid", "HardSigmoid", "HardSwish"),
)
_SHIFT = 15  # of the 31 bits below the sign, 16 are left: 8 of exponent, 8 of mantissa
_BINS = 1 << 16


@dataclass(slots=True)
class Magnitudes:
    """How often each magnitude occurred in one tensor."""

    counts: Array
    amax: float = 0.0

    @classmethod
    def empty(cls) -> Magnitudes:
        import numpy as np

        return cls(np.zeros(_BINS, dtype=np.int64))

    def add(self, values: Array) -> None:
        """Count the values, any shape, float32 and finite."""
        import numpy as np

        magnitudes = np.abs(np.ascontiguousarray(values, dtype=np.float32)).ravel()
        bins = magnitudes.view(np.uint32) >> np.uint32(_SHIFT)
        self.counts += np.bincount(bins, minlength=_BINS)
        self.amax = max(self.amax, float(magnitudes.max()))

    def percentile(self, percent: float) -> float:
        """Return a magnitude that at least ``percent`` % of the values do not exceed.

        It is the upper edge of the bin that holds the smallest such one, or the maximum.
        """
        import numpy as np

        wanted = rank(percent, int(self.counts.sum()))
        index = int(np.searchsorted(np.cumsum(self.counts), wanted))
        edge = np.array([min(index + 1, _BINS - 1) << _SHIFT], dtype=np.uint32).view(np.float32)[0]
        return min(float(edge), self.amax)


def watched_tensors(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the activations whose magnitudes matter: what convolutions, products and sums read."""
    constants = {tensor.name for tensor in model.graph.initializer}
    read = (name for node in model.graph.node if node.op_type in READERS for name in node.input)
    return tuple(dict.fromkeys(name for name in read if name and name not in constants))


def calibrate(
    model: onnx.ModelProto, feeds: Iterable[Feed], *, advance: Advance = lambda: None
) -> dict[str, Magnitudes]:
    """Run the FP32 graph on every feed and return the magnitudes of each watched tensor.

    A feed has one sample; ``advance`` is called after each. The argument is left as it was. Raises
    `InputRefused` if there is no feed or one is not finite, `GraphError` if an activation is not.
    """
    import numpy as np
    import onnx
    import onnxruntime as ort

    names = watched_tensors(model)
    watching = onnx.ModelProto()
    watching.CopyFrom(model)
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    watching.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
        if name not in known
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        watching.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    computed = [output.name for output in session.get_outputs()]
    found = {name: Magnitudes.empty() for name in names}
    count = 0
    for feed in feeds:
        values = {**feed, **dict(zip(computed, session.run(computed, dict(feed)), strict=True))}
        for name in names:
            if not np.isfinite(values[name]).all():
                if name in feed:
                    raise InputRefused(f"calibration sample {count} holds NaN or infinite values")
                layer = next((n.name for n in model.graph.node if name in n.output), name)
                raise GraphError(
                    f"in float32 the network's {layer!r} gives NaN or infinite values on "
                    f"calibration sample {count}"
                )
            found[name].add(values[name])
        count += 1
        advance()
    if not count:
        raise InputRefused("there is no calibration data")
    return found
