"""The candidates of a search as a picture: SQNR against latency, with the front. SVG.

The same report gives the same bytes: identifiers are salted with a constant, the file has no date,
and text stays text, so that no font of this machine is drawn into it.
"""

from __future__ import annotations

import io
import math

from exporter.records import Candidate, TuneReport

_SIZE = (8.0, 5.0)  # inches
_FRONT, _OTHER, _CHOICE = "#0b6e99", "#b0b0b0", "#c0392b"
_STYLE = {"svg.hashsalt": "resnet-export", "svg.fonttype": "none", "font.family": "sans-serif"}


def render(report: TuneReport) -> str:
    """Return the picture as SVG; a circle's area is the file's size."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    points = [(c, *point) for c in report.candidates if (point := _point(c))]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        largest = max((c.megabytes for c, _, _ in points), default=1.0)
        for candidate, latency, sqnr in points:
            axes.scatter(
                [latency],
                [sqnr],
                s=[30 + 170 * candidate.megabytes / largest],
                color=_colour(report, candidate),
                alpha=0.8,
                zorder=2,
            )
            axes.annotate(
                candidate.name, (latency, sqnr), (6, 4), textcoords="offset points", fontsize=7
            )
        steps = sorted((x, y) for c, x, y in points if c.name in front_of_two(points))
        axes.plot(*zip(*steps, strict=True), color=_FRONT, linewidth=1, zorder=1) if steps else None
        if report.budget.min_sqnr is not None:
            axes.axhline(report.budget.min_sqnr, color=_CHOICE, linestyle="--", linewidth=1)
        if report.budget.max_latency is not None:
            axes.axvline(report.budget.max_latency, color=_CHOICE, linestyle="--", linewidth=1)
        axes.set_xlabel(f"p50 latency on {report.runtime}, ms (area: size of the file)")
        axes.set_ylabel("SQNR on validation samples, dB")
        axes.set_title(f"{report.source.model}: {report.choice or 'nothing'} is chosen", fontsize=9)
        axes.margins(0.12)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()


def front_of_two(points: list[tuple[Candidate, float, float]]) -> set[str]:
    """Return the names of those that none beats in latency and SQNR, which is what is drawn."""
    return {
        c.name
        for c, latency, sqnr in points
        if not any(x <= latency and y >= sqnr and (x, y) != (latency, sqnr) for _, x, y in points)
    }


def _point(candidate: Candidate) -> tuple[float, float] | None:
    """Return latency and SQNR, if there are both and they can be drawn."""
    if candidate.latency is None or candidate.sqnr_db is None:
        return None
    return (
        (candidate.latency.p50_ms, candidate.sqnr_db) if math.isfinite(candidate.sqnr_db) else None
    )


def _colour(report: TuneReport, candidate: Candidate) -> str:
    if candidate.name == report.choice:
        return _CHOICE
    return _FRONT if candidate.name in report.front else _OTHER
