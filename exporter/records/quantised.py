"""How a graph was quantised: what each step brought, and what each tensor came to."""

from __future__ import annotations

from exporter.records.base import Found


class Repair(Found, frozen=True):
    """One step of a conversion, and what it brought.

    ``sqnr_db`` is that of the outputs beside the float network's, with this step on top of those
    before it that were kept, on calibration samples that it was not made from; None if it was not
    tried. ``kept`` says whether it is in the graph.
    """

    name: str
    detail: str | None
    kept: bool
    sqnr_db: float | None


class Quantised(Found, frozen=True):
    """One tensor or one layer's weights, quantised, as calibration samples see it.

    ``layers`` are those that read it; ``largest`` is its largest magnitude and ``scale`` its step
    (of weights, the largest of any channel's); ``saturated`` the share of values beyond the last
    step, ``dead`` the channels that are 0 throughout; ``sqnr_db`` is that of the tensor itself.
    ``share`` is its part in the error of the outputs, to first order: all of them add up to 1.
    """

    name: str
    layers: tuple[str, ...]
    is_weights: bool
    largest: float
    scale: float
    saturated: float
    dead: int
    sqnr_db: float | None
    share: float
