"""What is drawn into a bundle, as SVG.

The same record gives the same bytes: identifiers are salted with a constant, the file has no date,
settings are matplotlib's own, and text stays text, so that no font of this machine is drawn into
it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from exporter.records import Convergence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CALIBRATION = "calibration.svg"
_SIZE = (7.0, 4.0)  # inches
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "resnet-export",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
}


def calibration(found: Convergence) -> str:
    """Return how the scales approached the final ones, as SVG."""
    from matplotlib.figure import Figure

    with own_settings():
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        for at, curve in enumerate(found.curves):
            style: dict[str, Any] = {"color": f"C{at}", "marker": "o", "markersize": 3}
            name = curve.calibrator
            axes.plot(found.counts, _percent(curve.largest), label=f"{name}, largest", **style)
            axes.plot(
                found.counts, _percent(curve.median), label=f"{name}, median", ls=":", **style
            )
        axes.axhline(
            100 * found.WITHIN, color="0.6", linewidth=0.8, label=f"settled: {found.WITHIN:.0%}"
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(found.counts, [f"{count:,}" for count in found.counts], minor=False)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("calibration samples, in the order given")
        axes.set_ylabel("distance to the final scale, %")
        axes.set_title(f"Scales of {found.tensors} tensors", fontsize=10)
        axes.legend(fontsize=8)
        return svg(figure)


def _percent(shares: tuple[float, ...]) -> list[float]:
    return [100 * share for share in shares]


@contextmanager
def own_settings() -> Iterator[None]:
    """Draw as any machine would: nothing of a matplotlibrc, nor of what a caller has set."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def svg(figure: Figure) -> str:
    """Return a figure as SVG that has no date."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()
