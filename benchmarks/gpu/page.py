"""A run on a card as a page; all of it follows from the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from exporter.intervals import ratio_interval
from exporter.records import Cost, Gpu, Latency
from exporter.renderers import _latency as shown
from exporter.renderers.benching import DEVICE
from exporter.renderers.markdown import _escape as escape
from exporter.renderers.markdown import _table as table
from gpu import parity, roof
from gpu.candidates import RUNTIMES

Record = Mapping[str, Any]

EAGER = "fp32 on torch-eager-cuda"
PERCENTS = (50.0, 90.0, 99.0)
HEADS = (
    *("candidate", "samples", *(f"p{percent:g} ms" for percent in PERCENTS), "far outside"),
    *("images/s", "times as fast as eager", "of the peak", "of the roofline"),
)


def render(record: Record) -> str:
    """Return the page as Markdown."""
    card, found = record["card"], {step["name"]: step["found"] for step in record["steps"]}
    parts = [
        [f"# {card['name']}: what runs, how right and how fast", ""],
        [f"{record['date']}{_network(found.get('graphs'))}. All of it was taken on this card.", ""],
        ["## Steps", "", *_steps(record["steps"]), ""],
        _section("Parity on the digits, against float64", _parity(found)),
        _section("TensorRT-RTX by target", _engines(found.get("engines"))),
        _section("Ceilings of the card", _ceilings(found.get("ceilings"))),
        *(
            _section(f"Latency at batch {at['batch']}", _latency(at, record, found))
            for at in (found.get("latency") or {}).get("at", ())
        ),
        _section("Not timed", _not_timed(found.get("latency"))),
        _section("Tests that need a GPU", _tests(found.get("tests"))),
        ["## What the figures are", "", *(f"- {escape(note)}" for note in DEFINITIONS), ""],
        ["## The machine", "", *_machine(card), ""],
    ]
    return "\n".join(line for part in parts for line in part)


DEFINITIONS = (
    "wall clock (a name with nothing behind it): from the launch to the end, inputs and outputs on "
    "the device; " + DEVICE,
    "PyTorch runs the exported graph, BatchNorms folded, TF32 off, in half precision channels last",
    "PyTorch and ONNX Runtime with copies: the call that takes and gives the host's own arrays; "
    "ONNX Runtime waits for the end of each replay of a graph, and that is in its time",
    shown.SUPPORTED,
    shown.FAR,
    shown.RATE,
    f"times as fast as eager: beside {EAGER}, timed in the same way in the same rounds; in "
    "brackets the 95 % interval of the ratio of medians (bootstrap over rounds)",
    "of the peak: the least time over p50, for the network as a whole: its FLOPs at the measured "
    "peak of its type, or its weights, inputs and outputs at the memory's bandwidth, whichever is "
    "more; no fusion and no cache beats it",
    "of the roofline: the same, summed over the layers with weights, each with the bytes that it "
    "reads and writes; a cache that keeps tensors from one kernel to the next can beat it",
    "verdict: the gates of the default profile, on the held-out digits, against the unfolded "
    "network in float64",
)


def _network(made: Record | None) -> str:
    if not made:
        return ""
    shape = f"1x{made['pixels']}x{made['pixels']}"
    return f": {made['network']} at {shape}, INT8 calibrated on {made['calibrated']}"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _steps(steps: Sequence[Record]) -> list[str]:
    rows = [
        (step["name"], step["state"], f"{step['seconds']:.0f}", step["reason"] or "")
        for step in steps
    ]
    return table(("step", "", "s", "why"), rows)


def _parity(found: Record) -> list[str]:
    rows = []
    for name in RUNTIMES:
        for row in found.get(parity.step(name)) or ():
            title = f"{row['precision']} on {name}"
            if "refused" in row:
                rows.append((title, "refused", "", "", "", row["refused"]))
                continue
            sqnr = "—" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
            agreeing = "—" if row["agreeing"] is None else f"{row['agreeing']} of {row['samples']}"
            accuracy = "—" if row["accuracy"] is None else f"{row['accuracy']:.2%}"
            said = "; ".join(filter(None, (row["executed"], *row["missed"], *row["notes"])))
            rows.append((title, row["verdict"], sqnr, agreeing, accuracy, said))
    heads = ("artefact", "verdict", "SQNR, dB", "agreeing", "accuracy", "")
    return table(heads, rows) if rows else []


def _engines(rows: Sequence[Record] | None) -> list[str]:
    said = []
    for row in rows or ():
        if "refused" in row:
            said.append((row["target"], row["precision"], "refused", "", "", row["refused"]))
            continue
        size, took = f"{row['bytes'] / 1e6:.1f} MB", f"{row['seconds']:.1f} s"
        said.append(
            (row["target"], row["precision"], f"{size}, {took}", row["validity"], row["ran"], "")
        )
    heads = ("target", "precision", "built", "validity query", "ran here", "why not")
    return table(heads, said) if said else []


def _ceilings(found: Record | None) -> list[str]:
    if not found:
        return []
    rows = [
        (f"{kind} product", f"{peak / 1e3:.1f} TFLOP/s") for kind, peak in found["peaks"].items()
    ]
    rows += [
        (f"copy, {int(size) / 2**20:.0f} MiB read and written", f"{rate:,.0f} GB/s")
        for size, rate in found["bandwidths"].items()
    ]
    rows += [(f"host memory, {way}", f"{rate:.1f} GB/s") for way, rate in found["host"].items()]
    rows += [(what, f"refused: {why}") for what, why in found["refused"].items()]
    return table(("what", "measured"), rows)


def _latency(at: Record, record: Record, found: Record) -> list[str]:
    if not at["latency"]:
        return [escape(f"Not timed: {at['why']}.")]
    timed = msgspec.convert(at["latency"], list[Latency])
    by_name = {one.name: one for one in timed}
    rows = [
        (
            one.name,
            str(len(one.samples_ms)),
            *(_figure(one, percent) for percent in PERCENTS),
            str(one.outliers.low + one.outliers.high),
            f"{one.per_second:,.0f}",
            beside_eager(one, by_name),
            *shares(one, record["costs"], found.get("ceilings"), record["pixels"]),
        )
        for one in sorted(timed, key=lambda one: one.p50_ms)
    ]
    lines = table(HEADS, rows)
    if at["gpu"]:
        lines += ["", escape(f"{msgspec.convert(at['gpu'], Gpu)}.")]
    lines += ["", *(f"- in doubt: {escape(why)}" for why in at["doubts"])] if at["doubts"] else []
    apart = max(at["farthest"].values(), default=None)
    if apart is not None:
        lines += ["", f"Timed outputs lie {apart:.1e} from untimed ones at most, relative L2."]
    return lines


def _figure(one: Latency, percent: float) -> str:
    """Return a percentile to the microsecond, or how many samples it lacks."""
    figure = one.figure(percent)
    if figure.ms is None:
        return f"needs {figure.missing:,} more"
    low, high = figure.interval or (figure.ms, figure.ms)
    return f"{figure.ms:.3f} ({low:.3f} to {high:.3f})"


def beside_eager(one: Latency, by_name: Mapping[str, Latency]) -> str:
    """Return how many times as fast one is as eager PyTorch in FP32, timed in the same way."""
    eager = by_name.get(", ".join((EAGER, *one.name.split(", ", 1)[1:])))
    if eager is None or eager is one:
        return "—"
    low, high = ratio_interval(eager.samples_ms, one.samples_ms)
    return f"{eager.p50_ms / one.p50_ms:.2f} ({low:.2f} to {high:.2f})"


def shares(one: Latency, costs: Record, ceilings: Record | None, pixels: int) -> tuple[str, str]:
    """Return what one latency reaches of the least time, as a whole and layer by layer."""
    precision = one.name.partition(" ")[0]
    peak = (ceilings or {}).get("peaks", {}).get(precision)
    rates = list((ceilings or {}).get("bandwidths", {}).values())
    if not peak or not rates or precision not in costs:
        return "not known", "not known"
    cost = msgspec.convert(costs[precision], Cost)
    least = roof.least(cost, one.batch, gflops=peak, gigabytes=rates[-1], shape=(1, pixels, pixels))
    return f"{least.whole_ms / one.p50_ms:.1%}", f"{least.layers_ms / one.p50_ms:.1%}"


def _not_timed(found: Record | None) -> list[str]:
    if not found:
        return []
    said: dict[str, str] = dict(found["not timed"])
    for at in found["at"]:
        for name, why in at["not timed"].items():
            said[f"{name} at batch {at['batch']}"] = why
    return [f"- {escape(name)}: {escape(why)}" for name, why in said.items()]


def _tests(found: Record | None) -> list[str]:
    if not found:
        return []
    return [
        f"{found['passed']} passed.",
        "",
        *(f"- failed: {escape(name)}: {escape(why)}" for name, why in found["failed"].items()),
        *(f"- skipped: {escape(name)}: {escape(why)}" for name, why in found["skipped"].items()),
    ]


def _machine(card: Record) -> Iterator[str]:
    for what, value in card.items():
        if what != "environment":
            yield f"- {escape(f'{what}: {value}')}"
    said = ", ".join(f"{what} {value}" for what, value in card["environment"].items())
    yield f"- {escape(said)}"
