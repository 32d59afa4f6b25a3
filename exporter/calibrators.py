"""Which magnitude a symmetric quantiser clips at: the rules by name.

    max          the largest magnitude seen
    percentile   the magnitude that so many % of the values do not exceed
    mse          the one of the least expected squared error
    entropy      the one whose quantised values' distribution is nearest (Kullback-Leibler)

Each is a method of what calibration saw of a tensor; `exporter.calibration.thresholds` has formulas
and sources. The scale is the threshold over the number of levels above zero, 127 for INT8.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from exporter.contracts import TensorStatistics
from exporter.errors import UnknownName
from exporter.records import Range

Calibrator: TypeAlias = Literal["max", "percentile", "mse", "entropy"]
CALIBRATORS: tuple[Calibrator, ...] = ("max", "percentile", "mse", "entropy")
PERCENTILE = Range(0, 100, over=True)  # some share of the values, or all


def threshold(
    name: str, tensor: TensorStatistics, percentile: float = 99.999, *, levels: int = 127
) -> float:
    """Return the magnitude that a calibrator lets a tensor be clipped at.

    ``percentile`` is for the calibrator of that name, ``levels`` for those that weigh rounding.
    Raises `UnknownName`.
    """
    if name == "max":
        return tensor.amax
    if name == "percentile":
        return tensor.percentile(percentile)
    if name == "mse":
        return tensor.mse(levels)
    if name == "entropy":
        return tensor.entropy(levels)
    raise UnknownName("calibrator", name, CALIBRATORS)
