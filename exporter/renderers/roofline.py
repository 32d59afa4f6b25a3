"""Kernels under a machine's ceilings: as a table, most to win first, and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from exporter.records import Kernel, Roofline
from exporter.renderers import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (7.5, 5.0)  # inches
_HEADS = (
    *("kernel", "operator", "type", "ms", "share", "GFLOP/s", "FLOP/byte", "least ms"),
    *("of the ceiling", "left, ms", "bound by"),
)


def table(found: Roofline, *, rows: int = 15) -> str:
    """Return the ceilings, and the kernels with most to win, as plain text."""
    return "\n".join([*_ceilings(found), "", *_kernels(found, rows), "", *_totals(found)])


def as_json(found: Roofline) -> str:
    """Return the record as JSON, with each kernel's least time and what is left to win."""
    plain = msgspec.to_builtins(found)
    for kernel, entry in zip(found.kernels, plain["kernels"], strict=True):
        entry |= {
            "flops": kernel.flops,
            "gflops": kernel.gflops,
            "flops_per_byte": kernel.intensity,
            "least_ms": found.bound_ms(kernel),
            "achieved": found.achieved(kernel),
            "left_ms": found.left_ms(kernel),
            "memory_bound": found.is_memory_bound(kernel),
        }
    plain |= {"total_ms": found.total_ms, "least_ms": found.least_ms}
    return msgspec.json.format(msgspec.json.encode(plain), indent=2).decode()


def _ceilings(found: Roofline) -> Iterator[str]:
    ceilings = found.ceilings
    yield (
        f"{found.file} on {found.runtime}, batch {found.batch}, {ceilings.threads} "
        f"{'thread' if ceilings.threads == 1 else 'threads'}: medians of {found.runs} profiled runs"
    )
    peaks = ", ".join(f"{kind.upper()} {peak:.0f}" for kind, peak in ceilings.peaks.items())
    yield f"peaks, GFLOP/s, of a large matrix product by torch: {peaks}"
    sizes = ", ".join(f"{_size(b.working_set)} {b.gigabytes:.0f}" for b in ceilings.bandwidths)
    yield f"bandwidth, GB/s read and written, of copies in a working set of: {sizes}"


def _kernels(found: Roofline, rows: int) -> Iterator[str]:
    lines = [_HEADS, *(_row(found, kernel) for kernel in found.ranked[:rows])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        words = [
            cell.ljust(width) if at < 3 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(words).rstrip()
    if len(found.kernels) > rows:
        yield f"and {len(found.kernels) - rows} more"


def _row(found: Roofline, kernel: Kernel) -> tuple[str, ...]:
    return (
        kernel.name,
        kernel.op,
        (kernel.type or "unknown").upper(),
        f"{kernel.milliseconds:.3f}",
        f"{kernel.milliseconds / found.total_ms:.1%}" if found.total_ms else "–",
        f"{kernel.gflops:.1f}",
        f"{kernel.intensity:.1f}",
        f"{found.bound_ms(kernel):.3f}",
        f"{found.achieved(kernel):.0%}",
        f"{found.left_ms(kernel):.3f}",
        "memory" if found.is_memory_bound(kernel) else "arithmetic",
    )


def _totals(found: Roofline) -> Iterator[str]:
    yield (
        f"all {len(found.kernels)} kernels take {found.total_ms:.2f} ms, and {found.least_ms:.2f} "
        f"ms at their ceilings: {found.total_ms - found.least_ms:.2f} ms are left to win as it is"
    )
    floats = [k for k in found.kernels if k.macs and k.type == "fp32"]
    for kind in ("bf16", "int8"):
        if floats and kind in found.ceilings.peaks:
            least = sum(k.flops for k in floats) / found.ceilings.peak(kind) / 1e6
            now = sum(k.milliseconds for k in floats)
            yield (
                f"the {len(floats)} FP32 convolutions and products take {now:.2f} ms; in "
                f"{kind.upper()} their arithmetic would take {least:.2f} ms at the least"
            )
    beyond = [k for k in found.kernels if found.achieved(k) > 1.1]
    if beyond:
        yield (
            f"{len(beyond)} kernels are faster than the ceilings that were measured: the machine "
            "was busier while they were, or keeps more in its caches than one kernel's bytes"
        )


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


# ── The plot ────────────────────────────────────────────────────────────────────────


def plot(found: Roofline) -> str:
    """Return the kernels that compute, on the roofline, as SVG."""
    with plots.own_settings():
        return plots.svg(draw(found))


def draw(found: Roofline) -> Figure:
    """Return the plot as matplotlib's: GFLOP/s against FLOPs per byte, both logarithmic."""
    from matplotlib.figure import Figure

    ceilings = found.ceilings
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    kernels = [kernel for kernel in found.kernels if kernel.flops]
    right = 2 * max([kernel.intensity for kernel in kernels] + [100.0])
    left = min([kernel.intensity for kernel in kernels] + [1.0]) / 2
    cache, memory = max(b.gigabytes for b in ceilings.bandwidths), ceilings.bandwidths[-1].gigabytes
    top = max(ceilings.peaks.values())
    for name, slope, style in (("caches", cache, ":"), ("memory", memory, "-")):
        ends = (left, min(right, top / slope))
        label = f"{name}, {slope:.0f} GB/s"
        axes.plot(ends, [slope * x for x in ends], color="0.4", ls=style, lw=1, label=label)
    for at, (kind, peak) in enumerate(ceilings.peaks.items()):
        ends = (peak / cache, right)
        label = f"{kind.upper()}, {peak:.0f} GFLOP/s"
        axes.plot(ends, (peak, peak), color=f"C{at}", linewidth=1, label=label)
    longest = max((kernel.milliseconds for kernel in kernels), default=1.0)
    colours = {kind: f"C{at}" for at, kind in enumerate(ceilings.peaks)}
    for kernel in kernels:
        colour, area = (
            colours.get(kernel.type or "", "0.5"),
            10 + 150 * kernel.milliseconds / longest,
        )
        axes.scatter([kernel.intensity], [kernel.gflops], s=[area], color=colour, alpha=0.7)
    for kernel in [k for k in found.ranked if k.flops][:5]:
        place = (kernel.intensity, kernel.gflops)
        axes.annotate(kernel.name, place, (5, -9), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte read or written   (area: time; named: most to win)")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"{found.file} on {found.runtime}, batch {found.batch}", fontsize=10)
    axes.legend(fontsize=7)
    return figure
