"""Networks side by side, as text, as JSON and as a figure: ``resnet-export compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from exporter.records import Contender, Contest, Cost, Latency
from exporter.renderers import _text as text
from exporter.renderers import plots
from exporter.renderers.costs import ratio, uncounted
from exporter.renderers.record import cost_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADS = (
    *("network", "input", "outputs", "MACs", "FLOPs", "parameters", "weights", "peak memory"),
    *("p50 latency", "p10 to p90", "GFLOP/s"),
)
_BAR, _LIGHT = "#0b6e99", "#e8e8e8"
_PANEL = 2.6  # inches
_ROOM = 1.3  # of the longest bar, for the figures at the ends


class Panel(NamedTuple):
    """One figure of all networks: its title, and each network's number with the words for it."""

    title: str
    bars: tuple[tuple[float, str], ...]


def render(contest: Contest, drawn: Path) -> str:
    """Return the table, what it rests on, and where the figure is."""
    measured = [one for one in contest.networks if one.cost and one.latency]
    lines = [f"{one.name}: refused: {one.refused}" for one in contest.networks if one.refused]
    lines += [f"{one.name}: weights {one.weights}" for one in measured]
    for one in measured:
        if one.cost and (unknown := uncounted(one.cost)):
            lines.append(f"{one.name}: cost unknown, and in no figure: {unknown}")
    lines += [f"in doubt: {doubt}" for doubt in contest.doubts]
    if measured:
        runs, threads = _runs(measured)
        lines.append(
            f"One sample, BatchNorm folded away and exported to ONNX; {runs} runs each, in turn, "
            f"on {contest.runtime} with {threads} threads, {contest.environment['cpu']}; one MAC "
            "is two FLOPs; peak memory is of activations alone."
        )
    lines.append(str(drawn))
    table = text.table(HEADS, [_row(one.cost, one.latency, one) for one in contest.networks])
    return f"{table}\n\n" + "\n".join(lines) + "\n"


def render_json(contest: Contest) -> str:
    """Return the record as JSON, with sums and percentiles written out."""
    table = msgspec.to_builtins(contest)
    for one, entry in zip(contest.networks, table["networks"], strict=True):
        if one.cost:
            entry["cost"] |= cost_figures(one.cost)
        if one.latency:
            entry["latency"]["p50_ms"] = one.latency.p50_ms
        entry["gflops_per_second"] = one.gflops_per_second
    return msgspec.json.format(msgspec.json.encode(table), indent=2).decode() + "\n"


def plot(contest: Contest) -> str:
    """Return the figure as SVG, as `plots` writes it."""
    with plots.own_settings():
        return plots.svg(draw(contest))


def draw(contest: Contest) -> Figure:
    """Return the figure as matplotlib's: a panel for each figure, a bar for each network."""
    from matplotlib.figure import Figure

    measured = [one for one in contest.networks if one.cost and one.latency]
    shown = panels(measured)
    size = (_PANEL * len(shown), 1.2 + 0.35 * max(1, len(measured)))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"One sample each, folded, on {contest.runtime}", fontsize=10)
    for at, panel in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), at + 1)
        _draw(axes, panel)
        names = [f"{one.name}\n{text.shape(one.input)}" for one in measured]
        axes.set_yticks(range(len(measured)), names if at == 0 else [], fontsize=8)
    return figure


def panels(measured: list[Contender]) -> tuple[Panel, ...]:
    """Return what is drawn of networks that were counted and timed."""
    pairs = [(one.cost, one.latency) for one in measured if one.cost and one.latency]
    return (
        Panel("FLOPs, G", tuple((c.flops / 1e9, f"{c.flops / 1e9:.2f}") for c, _ in pairs)),
        Panel(
            "parameters, M",
            tuple((c.parameters / 1e6, f"{c.parameters / 1e6:.1f}") for c, _ in pairs),
        ),
        Panel(
            "weights, MB",
            tuple((c.weight_bytes / 1e6, f"{c.weight_bytes / 1e6:.1f}") for c, _ in pairs),
        ),
        Panel(
            "peak memory, MB",
            tuple(((c.peak_bytes or 0) / 1e6, _megabytes(c.peak_bytes)) for c, _ in pairs),
        ),
        Panel("p50 latency, ms", tuple((t.p50_ms, f"{t.p50_ms:.1f}") for _, t in pairs)),
    )


def _draw(axes: Axes, panel: Panel) -> None:
    lengths = [length for length, _ in panel.bars]
    longest = max(lengths, default=1.0) or 1.0
    axes.barh(range(len(lengths)), lengths, color=_BAR, height=0.6)
    for at, (length, words) in enumerate(panel.bars):
        axes.text(length + 0.02 * longest, at, words, va="center", fontsize=8)
    axes.set_xlim(0, _ROOM * longest)
    axes.invert_yaxis()
    axes.set_title(panel.title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(visible=True, axis="x", color=_LIGHT)
    axes.set_axisbelow(True)


def _row(cost: Cost | None, latency: Latency | None, one: Contender) -> tuple[str, ...]:
    start = (one.name, text.shape(one.input))
    if cost is None or latency is None:
        return (*start, *("" for _ in HEADS[2:-1]), "refused")
    low, high = latency.percentile(10), latency.percentile(90)
    return (
        *start,
        text.shape(one.output),
        ("≥ " if cost.uncounted else "") + text.count(cost.macs),
        ("≥ " if cost.uncounted else "") + text.count(cost.flops),
        text.count(cost.parameters),
        _megabytes(cost.weight_bytes) + " MB",
        _megabytes(cost.peak_bytes) + " MB",
        f"{latency.p50_ms:.1f} ms",
        f"{low:.1f} to {high:.1f} ms",
        ratio(one.gflops_per_second),
    )


def _megabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.1f}"


def _runs(measured: list[Contender]) -> tuple[int, int]:
    latency = next(one.latency for one in measured if one.latency)
    return len(latency.samples_ms), latency.threads
