"""From how many calibration samples on the scales no longer moved."""

from __future__ import annotations

from typing import ClassVar

from exporter.records.base import Found


class Curve(Found, frozen=True):
    """How far one calibrator's scales were from the final ones after each number of samples.

    ``largest`` and ``median`` are over the tensors, relative to the final scale.
    """

    calibrator: str
    largest: tuple[float, ...]
    median: tuple[float, ...]


class Convergence(Found, frozen=True):
    """The scales of ``tensors`` tensors after ``counts`` samples, in the order they were given.

    A calibrator's scales are settled from N samples on if from there to the end none was more than
    `WITHIN` from its final value; N is at most half of all samples, since the last of them would
    agree with themselves.
    """

    tensors: int
    counts: tuple[int, ...]
    curves: tuple[Curve, ...]

    WITHIN: ClassVar[float] = 0.05

    @property
    def samples(self) -> int:
        return self.counts[-1] if self.counts else 0

    @property
    def settled(self) -> dict[str, int | None]:
        """Return each calibrator's N, or None where its scales still moved."""
        return {curve.calibrator: self._settled(curve) for curve in self.curves}

    def _settled(self, curve: Curve) -> int | None:
        first = None
        for count, apart in zip(reversed(self.counts), reversed(curve.largest), strict=True):
            if apart > self.WITHIN:
                break
            if 2 * count <= self.samples:
                first = count
        return first
