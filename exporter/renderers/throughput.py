"""A bench as a picture: images/s against batch size with the knee, and p90 with the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from exporter.records import BenchReport, Latency
from exporter.renderers import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "throughput.svg"
KNEE, FITS = "knee", "largest batch within the budget"
_WIDTH, _PANEL = 8.5, 3.2  # inches
_COLOURS = 10  # of matplotlib's cycle, after which lines are dashed
_LIMIT = "#c0392b"


class Point(NamedTuple):
    """A figure at a batch size, and its 95 % interval, which is the figure itself if unknown."""

    batch: int
    value: float
    low: float
    high: float


class Mark(NamedTuple):
    """A larger, empty marker around a point; ``area`` is in points²."""

    label: str
    marker: str
    colour: str
    area: float


_KNEE = Mark(KNEE, "o", "black", 70.0)
_FITS = Mark(FITS, "s", _LIMIT, 140.0)


def render(report: BenchReport) -> str:
    """Return the picture as SVG, as `plots` writes it."""
    with plots.own_settings():
        return plots.svg(draw(report))


def draw(report: BenchReport) -> Figure:
    """Return the picture as matplotlib's; p90s are in it where a budget was asked for."""
    from matplotlib.figure import Figure

    budget = report.asked.budget_ms
    panels = 1 if budget is None else 2
    figure = Figure(figsize=(_WIDTH, 1.0 + _PANEL * panels), layout="constrained")
    _draw_rates(figure.add_subplot(panels, 1, 1), report)
    if budget is not None:
        _draw_p90s(figure.add_subplot(panels, 1, 2), report, budget)
    sizes = sorted(report.batches)
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_xticks([], minor=True)
        axes.grid(visible=True, color="#e8e8e8")
        axes.set_axisbelow(True)
    figure.axes[-1].set_xlabel("batch size   (bars: 95 % intervals)")
    figure.suptitle(
        f"Throughput by batch size, {report.environment.get('cpu', 'CPU not told')}", fontsize=10
    )
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = [handle for some, _ in found for handle in some]
    labels = [label for _, some in found for label in some]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7)
    return figure


def rates(report: BenchReport, name: str) -> list[Point]:
    """Return a candidate's images/s at the p50, by batch size."""
    found = []
    for one in _own(report, name):
        fast, slow = one.figure(50.0).interval or (one.p50_ms, one.p50_ms)
        images = 1e3 * one.batch
        found.append(Point(one.batch, one.per_second, images / slow, images / fast))
    return found


def p90s(report: BenchReport, name: str) -> list[Point]:
    """Return a candidate's p90 in ms by batch size, where there are samples enough for one."""
    figures = [(one.batch, one.figure(90.0)) for one in _own(report, name)]
    return [Point(b, p.ms, *(p.interval or (p.ms, p.ms))) for b, p in figures if p.ms is not None]


def _draw_rates(axes: Axes, report: BenchReport) -> None:
    curves = {one.name: rates(report, one.name) for one in report.timed}
    _draw(axes, list(curves.values()), labels=list(curves))
    _put(_KNEE, axes, curves, {knee.name: knee.batch for knee in report.knees})
    _put(_FITS, axes, curves, {fit.name: fit.batch for fit in report.fits})
    axes.set_ylim(bottom=0)
    axes.set_ylabel("images/s, at the p50")


def _draw_p90s(axes: Axes, report: BenchReport, budget: float) -> None:
    curves = {one.name: p90s(report, one.name) for one in report.timed}
    _draw(axes, list(curves.values()), labels=["" for _ in curves])
    _put(_FITS._replace(label=""), axes, curves, {f.name: f.batch for f in report.fits})
    axes.axhline(budget, color=_LIMIT, ls="--", linewidth=1, label=f"budget: {budget:g} ms")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("p90 of a batch, ms")


def _draw(axes: Axes, curves: Sequence[list[Point]], *, labels: Sequence[str]) -> None:
    for at, (points, label) in enumerate(zip(curves, labels, strict=True)):
        style: dict[str, Any] = {"color": f"C{at % _COLOURS}", "marker": "o", "markersize": 3}
        axes.errorbar(
            [point.batch for point in points],
            [point.value for point in points],
            yerr=(
                [max(0.0, point.value - point.low) for point in points],
                [max(0.0, point.high - point.value) for point in points],
            ),
            label=label or None,
            linestyle="-" if at < _COLOURS else "--",
            linewidth=1.2,
            capsize=2,
            **style,
        )


def _put(
    mark: Mark, axes: Axes, curves: dict[str, list[Point]], where: dict[str, int | None]
) -> None:
    """Put the mark around one point of each curve, at its batch size."""
    points = [p for name, batch in where.items() for p in curves[name] if p.batch == batch]
    if points:
        axes.scatter(
            [point.batch for point in points],
            [point.value for point in points],
            s=mark.area,
            marker=mark.marker,
            label=mark.label or None,
            facecolors="none",
            edgecolors=mark.colour,
        )


def _own(report: BenchReport, name: str) -> list[Latency]:
    return sorted((one for one in report.latency if one.name == name), key=lambda one: one.batch)
