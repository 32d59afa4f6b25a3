"""``resnet-export``: only it and its commands print, and only they exit."""

from __future__ import annotations

import re
import signal
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from decimal import Decimal
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from exporter.commands.bench import bench
from exporter.commands.networks import claims, compare, flops
from exporter.commands.options import (
    Weights,
    classes_option,
    data_option,
    inputs_option,
    model_option,
    network_of,
    onnx_option,
    size_of,
    start_of,
    weights_key_option,
    weights_of,
    weights_option,
)
from exporter.errors import ExportError, ProfileError
from exporter.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

    from exporter.contracts import Advance, Progress
    from exporter.initial import Initial

EPILOG = """Exit codes: 0 every gate that could be checked was met, 1 a gate was missed, or could
not be shown to be met, or one of several artefacts could not be made, 2 usage, 3 input refused, 4
environment unfit, 5 disk or memory does not suffice, 130 interrupted, 143 terminated."""

_LEFT = "exporter.left"  # what an interrupted command leaves behind, in words


class Failure(click.ClickException):
    """An `ExportError`, as the terminal shows it."""

    def __init__(self, error: ExportError) -> None:
        super().__init__(f"{error}\nHint: {error.hint}" if error.hint else str(error))
        self.exit_code: int = error.exit_code  # type: ignore[misc]  # click's own, per class


class Group(click.Group):
    """The one place where an `ExportError` becomes a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        stopped = _Stopped()
        try:
            return super().invoke(ctx)
        except BaseException as error:  # an interrupted import or trace may end in any error
            if stopped.by:
                left = ctx.meta.get(_LEFT, "nothing was left behind")
                click.echo(f"Interrupted: {left}.", err=True)
                raise SystemExit(128 + stopped.by) from None
            if not isinstance(error, ExportError):
                raise
            if ctx.params.get("debug"):
                traceback.print_exception(error)
            raise Failure(error) from error


class _Stopped:
    """Ctrl-C and SIGTERM, as one exception that passes every clean-up; ``by`` is the signal."""

    def __init__(self) -> None:
        self.by = 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._stop)

    def _stop(self, signum: int, frame: object) -> None:
        self.by = signum
        raise KeyboardInterrupt


class Terminal(NamedTuple):
    """What a command in ``exporter/commands`` shows things with."""

    bars: Callable[[], AbstractContextManager[Progress]]
    show: Callable[[RenderableType, int], None]


_profile_option = click.option(
    "--profile", default="default", show_default=True, help="A built-in profile, or a .toml file."
)
_allow_overlap = click.option(
    "--allow-overlap",
    is_flag=True,
    help="Calibrate even on samples that the result is judged on; the report says so.",
)


class Percentage(click.ParamType[float]):
    """``0.2%``, as the share 0.002."""

    name = "PERCENT"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found = re.fullmatch(r"([0-9]+(\.[0-9]*)?|\.[0-9]+) *%", str(value).strip())
        if not found:
            self.fail(f"{value!r} is not a percentage such as 0.2%", param, ctx)
        return float(Decimal(found[1]) / 100)


@click.group(cls=Group, invoke_without_command=True, epilog=EPILOG)
@model_option
@onnx_option
@click.option(
    "-p", "--precision", multiple=True, help="Repeatable, or a,b. Default: all in the profile."
)
@_profile_option
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("build"),
    show_default=True,
    help="The bundle: a folder that is written whole or not at all.",
)
@weights_option
@weights_key_option
@inputs_option
@classes_option
@click.option(
    "--calibration",
    help="A .npy file, (N, C, H, W) float32, or what --data takes, to calibrate on instead.",
)
@data_option
@_allow_overlap
@click.option("-t", "--target", multiple=True, help="Engine targets, say sm86,sm89. Repeatable.")
@click.option("--batch", metavar="MIN,OPT,MAX", help="Batch range of the engines, say 1,8,32.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override any key of the profile, say timing.runs=50. Repeatable.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="resnet-export")
@click.pass_context
def main(ctx: click.Context, /, **asked: Any) -> None:
    """Export a network, prove that it still computes the same thing, and time it.

    Writes ONNX files and engines in every precision of the profile, compares each with the
    unfolded network in float64, and leaves a report beside them.
    """
    if ctx.invoked_subcommand:
        ctx.obj = Terminal(_bars, _show)
        return
    from exporter.profile import load_profile

    profile = load_profile(asked["profile"], _overrides(asked))
    if asked["precision"]:
        profile = profile.only(tuple(_split(asked["precision"])))
    report = _export(profile, asked)
    ctx.exit(1 if report.verdict in ("fail", "not enough evidence") else 0)


for command in (bench, claims, compare, flops):
    main.add_command(command)


@main.command()
@click.argument("runtimes", nargs=-1, metavar="[RUNTIME]...")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def doctor(runtimes: tuple[str, ...], *, as_json: bool) -> None:
    """Try every runtime on a small network: what builds and runs here, on what and in which types.

    With RUNTIMEs, try those alone; one that cannot run here is then an error, of exit code 4.
    """
    from exporter.doctor import examine, require
    from exporter.renderers import checkup

    with _bars() as progress:
        diagnosis = examine(runtimes, progress=progress)
    click.echo((checkup.to_json if as_json else checkup.render)(diagnosis), nl=False)
    if runtimes:
        require(diagnosis)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-m", "--model", help="The factory of its network, if it is no built-in one.")
@click.option(
    "--onnx",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The ONNX file that it was made from, if it was made from one.",
)
@click.option(
    "-w",
    "--weights",
    type=Weights(),
    help="The weights it was exported from, if not those that ship with the network.",
)
@weights_key_option
@click.option(
    "--calibration",
    help="The calibration data it was exported with, if not the built-in ones.",
)
@data_option
@_allow_overlap
@click.option(
    "--worst-case",
    is_flag=True,
    help="Also search the inputs on which each artefact disagrees most, and save them in BUNDLE.",
)
@click.option(
    "--steps",
    type=click.IntRange(1, 100_000),
    default=60,
    show_default=True,
    help="Gradient steps of that search.",
)
@click.option(
    "--radius",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.1,
    show_default=True,
    help="How far from a real sample it may go, as a share of the data's range.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the record as JSON instead of the waterfall."
)
@click.pass_context
def parity(
    ctx: click.Context,
    bundle: Path,
    model: str | None,
    onnx: Path | None,
    weights: Path | Initial | None,
    weights_key: str | None,
    calibration: str | None,
    data: str | None,
    steps: int,
    radius: float,
    *,
    allow_overlap: bool,
    worst_case: bool,
    as_json: bool,
) -> None:
    """Compare all that is in BUNDLE once more with the network it was exported from.

    Prints the ladder from float64 down to the engines: what each step adds, whether each
    artefact computes the graph that was asked for, and for one that does not, the first layer where
    it leaves it. The graphs asked for are made anew; without --worst-case nothing is written.
    """
    if onnx is not None and any(given is not None for given in (model, weights, weights_key)):
        raise click.UsageError("--onnx is the network and its weights in one: give it alone")
    chosen = weights_of(weights, weights_key)
    with _bars() as progress:
        with progress("load PyTorch", None):
            from rich.console import Console

            from exporter.recheck import check_bundle, load_factory_of
            from exporter.renderers import record, waterfall
            from exporter.worst_case import Search
        report = check_bundle(
            bundle,
            model=onnx if model is None else load_factory_of(bundle, model),
            weights=chosen,
            calibration=calibration,
            data=data,
            allow_overlap=allow_overlap,
            search=Search(steps=steps, radius=radius) if worst_case else None,
            progress=progress,
        )
    if as_json:
        click.echo(record.render(report), nl=False)
    else:
        width = None if sys.stdout.isatty() else 180
        Console(width=width, soft_wrap=True).print(waterfall.render(report))
    ctx.exit(0 if report.verdict in ("pass", "not checked") else 1)


@main.command()
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("-m", "--model", default="resnet18", show_default=True, help="A built-in network.")
def train(path: Path, model: str) -> None:
    """Train a built-in network on its own samples, reproducibly, and write its weights to PATH."""
    from exporter.plugins import load_model
    from exporter.train import train as train_model

    with _bars() as progress:
        trained = train_model(load_model(model), path, progress=progress)
    click.echo(f"{trained.path}: {trained.accuracy:.2%} on the held-out samples")
    click.echo(f"SHA-256 {trained.sha256}")


@main.command()
@click.argument("model", default="resnet18")
@_profile_option
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("tune"),
    show_default=True,
    help="The folder of the search: its state, its results, and tuned.toml.",
)
@click.option("--objective", default="latency", show_default=True, help="latency, size or sqnr.")
@click.option("--max-drop", type=Percentage(), help="The largest drop in accuracy, say 0.2%.")
@click.option("--min-sqnr", type=float, metavar="DB", help="The least SQNR of the outputs.")
@click.option("--max-latency", type=float, metavar="MS", help="The largest latency of one batch.")
@click.option("--max-size", type=float, metavar="MB", help="The largest ONNX file.")
@click.option("--precision", default="int8", show_default=True, help="The one that is mixed in.")
@click.option("--runtime", help="Where candidates run. Default: the profile's first that can here.")
@weights_option
@weights_key_option
@inputs_option
@classes_option
@click.option("--calibration", help="A .npy file, or what --data takes.")
@data_option
@click.option(
    "--validation",
    type=click.IntRange(8),
    default=128,
    show_default=True,
    help="Training images, not calibrated on, that candidates are judged by.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, 10_000),
    default=5.0,
    show_default=True,
    help="How long, about: an unfinished search goes on when it is called again.",
)
@click.option("--restart", is_flag=True, help="Begin anew where a search was begun before.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As for the export.")
@click.pass_context
def tune(ctx: click.Context, /, **asked: Any) -> None:
    """Search which layers of MODEL to keep in float within a budget, and write a profile of it.

    Each layer's sensitivity, and each candidate's accuracy, SQNR, latency and size, are measured on
    this machine; the choice is confirmed on the evaluation samples. An interrupted search goes on
    when it is called again.
    """
    from exporter.profile import load_profile
    from exporter.records import Budget
    from exporter.strict import read

    limits = ("max_drop", "min_sqnr", "max_latency", "max_size")
    budget = read(Budget, {k: asked[k] for k in ("objective", *limits)}, where="the budget")
    overrides = _overrides({"target": (), "batch": None, "settings": asked["settings"]})
    profile = load_profile(asked["profile"], overrides)
    weights = weights_of(asked["weights"], asked["weights_key"])
    ctx.meta[_LEFT] = "the same command goes on where it stopped"
    with _bars() as progress:
        with progress("load PyTorch", None):
            from rich.console import Console

            from exporter.renderers import tuning
            from exporter.tune import tune_model
        options = ("precision", "runtime", "classes", "calibration")
        report = tune_model(
            network_of(asked["model"], profile.model.args, asked["input_shape"]),
            profile,
            asked["out"],
            budget,
            weights=weights,
            input_shape=size_of(asked["input_shape"]),
            **{key: asked[key] for key in (*options, "data", "validation", "minutes", "restart")},
            progress=progress,
        )
    width = None if sys.stdout.isatty() else 120
    Console(width=width, soft_wrap=True).print(tuning.render(report, asked["out"]))
    ctx.exit(0 if report.verdict in ("pass", "not checked") else 1)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--runtime", default="ort-cpu", show_default=True, help="Where it is profiled.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Default: as many as the runtime likes.")
@click.option("--runs", type=click.IntRange(1, 100_000), default=100, show_default=True)
@click.option("--rows", type=click.IntRange(1), default=15, show_default=True, help="Of the table.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw it there, as SVG.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def roofline(
    file: Path,
    runtime: str,
    batch: int,
    threads: int | None,
    runs: int,
    rows: int,
    plot: Path | None,
    *,
    as_json: bool,
) -> None:
    """Say where the time of an ONNX FILE goes, and what is left to win on this machine.

    Each kernel's time beside the least that its arithmetic and its bytes can take, by ceilings that
    are measured here. Give one --threads: what several do is not one kernel's.
    """
    from exporter.files import write_text
    from exporter.renderers import roofline as renderer
    from exporter.roofline import measure_roofline

    with _bars() as progress:
        found = measure_roofline(
            file,
            runtime=runtime,
            batch=batch,
            threads=threads,
            runs=runs,
            progress=progress,
        )
    if plot is not None:
        write_text(plot, renderer.plot(found))
    click.echo(renderer.as_json(found) if as_json else renderer.table(found, rows=rows))


def _export(profile: Any, asked: dict[str, Any]) -> Any:
    with _bars() as progress:
        with progress("load PyTorch", None):
            from rich.console import Console

            from exporter import pipeline
            from exporter.renderers import terminal
        shape = asked["input_shape"]
        report = pipeline.run(
            start_of(asked, profile.model.args),
            profile,
            asked["out"],
            weights=weights_of(asked["weights"], asked["weights_key"]),
            input_shape=size_of(shape) if asked["onnx"] is None else shape,
            classes=asked["classes"],
            calibration=asked["calibration"],
            data=asked["data"],
            allow_overlap=asked["allow_overlap"],
            progress=progress,
        )
    width = None if sys.stdout.isatty() else 120
    Console(width=width, soft_wrap=True).print(terminal.render(report, asked["out"]))
    return report


def _overrides(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the options that replace keys of a profile, as dotted keys and values."""
    found: dict[str, Any] = {}
    if asked["target"]:
        found["runtime.tensorrt-rtx.targets"] = _split(asked["target"])
    if asked["batch"] is not None:
        sizes = asked["batch"].split(",")
        if len(sizes) != 3 or not all(re.fullmatch(" *-?[0-9]+ *", size) for size in sizes):
            raise ProfileError(f"--batch {asked['batch']}: expected MIN,OPT,MAX, say 1,8,32")
        found |= zip(("batch.min", "batch.opt", "batch.max"), map(int, sizes), strict=True)
    for setting in asked["settings"]:
        key, equals, value = setting.partition("=")
        if not (equals and key.strip()):
            raise ProfileError(f"--set {setting}: expected KEY=VALUE, say timing.runs=50")
        found[key.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    """Return the text as a TOML value; bare words are strings."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _split(values: tuple[str, ...]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def _show(what: RenderableType, width: int) -> None:
    """Print what rich can print; so wide where there is no terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else width, soft_wrap=True).print(what)


@contextmanager
def _bars() -> Iterator[Progress]:
    """Show a bar for each step on a terminal, and one line for each step elsewhere; on stderr."""
    if not sys.stderr.isatty():
        yield _line
        return
    from rich.console import Console

    from exporter.bars import bars

    with bars(Console(stderr=True)) as progress:
        yield progress


@contextmanager
def _line(what: str, total: int | None = None) -> Iterator[Advance]:  # noqa: ARG001 - a Progress
    start = perf_counter()
    yield lambda: None
    click.echo(f"{perf_counter() - start:6.1f} s  {what}", err=True)
