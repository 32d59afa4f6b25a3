"""The candidates of a search as a picture: SQNR against latency, with the front."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from exporter.records import Candidate, TuneReport
from exporter.renderers import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (8.0, 5.0)  # inches
_FRONT, _OTHER, _CHOICE = "#0b6e99", "#b0b0b0", "#c0392b"
_LEAST, _MOST = 30.0, 200.0  # points², of a circle


class Point(NamedTuple):
    """A candidate where it is drawn."""

    candidate: Candidate
    latency: float
    sqnr: float


def render(report: TuneReport) -> str:
    """Return the picture as SVG, as `plots` writes it; a circle's area is the file's size."""
    with plots.own_settings():
        return plots.svg(draw(report))


def draw(report: TuneReport) -> Figure:
    """Return the picture as matplotlib's."""
    from matplotlib.figure import Figure

    points = [point for candidate in report.candidates if (point := _point(candidate))]
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    largest = max((point.candidate.megabytes for point in points), default=1.0)
    for turn, (candidate, latency, sqnr) in enumerate(sorted(points, key=lambda p: p.latency)):
        area = _LEAST + (_MOST - _LEAST) * candidate.megabytes / largest
        colour = _colour(report, candidate)
        axes.scatter([latency], [sqnr], s=[area], color=colour, alpha=0.8, zorder=2)
        label = candidate.name.removeprefix(f"{report.precision} keeping ")
        place = (4, (8, -14)[turn % 2])
        axes.annotate(label, (latency, sqnr), place, textcoords="offset points", fontsize=7)
    steps = sorted((point.latency, point.sqnr) for point in front(points))
    axes.plot([x for x, _ in steps], [y for _, y in steps], color=_FRONT, linewidth=1, zorder=1)
    limit: dict[str, Any] = {"color": _CHOICE, "linestyle": "--", "linewidth": 1}
    if report.budget.min_sqnr is not None:
        axes.axhline(report.budget.min_sqnr, **limit)
    if report.budget.max_latency is not None:
        axes.axvline(report.budget.max_latency, **limit)
    axes.set_xlabel(
        f"p50 latency on {report.runtime}, ms   (area: size of the file; a number, none or all: "
        f"layers of {report.precision} kept in float)",
        fontsize=8,
    )
    axes.set_ylabel("SQNR on validation samples, dB")
    chosen = f"chosen: {report.choice}" if report.choice else "nothing keeps the budget"
    axes.set_title(f"{report.source.model}, {report.budget}\n{chosen}", fontsize=9)
    axes.margins(0.12)
    return figure


def front(points: list[Point]) -> list[Point]:
    """Return those that none beats in latency and SQNR, the two that are drawn."""

    def is_beaten(point: Point) -> bool:
        return any(
            other.latency <= point.latency and other.sqnr >= point.sqnr and other[1:] != point[1:]
            for other in points
        )

    return [point for point in points if not is_beaten(point)]


def _point(candidate: Candidate) -> Point | None:
    """Return where a candidate is drawn, if it has both figures and they are finite."""
    if candidate.latency is None or candidate.sqnr_db is None:
        return None
    if not math.isfinite(candidate.sqnr_db):
        return None
    return Point(candidate, candidate.latency.p50_ms, candidate.sqnr_db)


def _colour(report: TuneReport, candidate: Candidate) -> str:
    if candidate.name == report.choice:
        return _CHOICE
    return _FRONT if candidate.name in report.front else _OTHER
