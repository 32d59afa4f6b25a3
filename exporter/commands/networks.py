"""``flops``, ``compare`` and ``claims``: what networks cost, without exporting one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.commands.options import classes_option, input_option, network_of
from exporter.errors import OutputError

_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the record as JSON instead of the tables."
)


@click.command()
@click.argument("networks", metavar="MODEL|FILE…", nargs=-1, required=True)
@input_option
@classes_option
@_json_option
@click.pass_obj
def flops(
    terminal: Any,
    networks: tuple[str, ...],
    input_shape: tuple[int, ...] | None,
    classes: int | None,
    *,
    as_json: bool,
) -> None:
    """Count what one sample costs in each MODEL or ONNX FILE, layer by layer.

    MACs and FLOPs, parameters, bytes of weights and activations, the peak of the activations that
    exist at once, and FLOPs for each byte moved. A MODEL, built in or package.module:factory or
    file.py:factory, is counted as it is written and folded.
    """
    from exporter.counting import count_all
    from exporter.renderers import costs

    with terminal.bars() as progress:
        things = [
            one if Path(one).exists() else network_of(one, {}, input_shape) for one in networks
        ]
        found = count_all(things, input_shape=input_shape, classes=classes, progress=progress)
    click.echo(costs.render_json(found) if as_json else costs.render(found), nl=False)


@click.command()
@click.argument("networks", metavar="MODEL…", nargs=-1, required=True)
@input_option
@classes_option
@click.option(
    "--runs",
    type=click.IntRange(2, 100_000),
    default=20,
    show_default=True,
    help="Timed runs of each.",
)
@click.option(
    "--threads", type=click.IntRange(0, 256), default=0, show_default=True, help="0: one per core."
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("compare.svg"),
    show_default=True,
    help="The figure to write.",
)
@_json_option
@click.pass_context
def compare(
    ctx: click.Context,
    networks: tuple[str, ...],
    input_shape: tuple[int, ...] | None,
    classes: int | None,
    runs: int,
    threads: int,
    plot: Path,
    *,
    as_json: bool,
) -> None:
    """Set networks side by side: FLOPs, parameters, bytes, peak memory and latency.

    A MODEL is built in, or package.module:factory or file.py:factory.

    Each is folded, exported to ONNX, counted there, and timed in ONNX Runtime, all in turn; at its
    own input and classes, or at the same ones for all.
    """
    if not plot.parent.is_dir():
        raise OutputError(f"cannot write {str(plot)!r}: there is no folder {str(plot.parent)!r}")
    with ctx.obj.bars() as progress:
        with progress("load PyTorch", None):
            from exporter.compare import compare_networks
            from exporter.files import write_text
            from exporter.renderers import contest
        found = compare_networks(
            [network_of(one, {}, input_shape) for one in networks],
            input_shape=input_shape,
            classes=classes,
            runs=runs,
            threads=threads,
            progress=progress,
        )
    write_text(plot, contest.plot(found))
    click.echo(contest.render_json(found) if as_json else contest.render(found, plot), nl=False)
    ctx.exit(1 if any(one.refused for one in found.networks) else 0)


@click.command()
@_json_option
@click.pass_obj
def claims(terminal: Any, *, as_json: bool) -> None:
    """Check what the document behind this project claims, and print its network's layer table.

    Every figure is measured here and now, within a minute, and the verdicts follow from them.
    """
    with terminal.bars() as progress:
        with progress("load PyTorch", None):
            from exporter.claims import check_claims
            from exporter.renderers import claims as renderer
        found = check_claims(progress=progress)
    click.echo(renderer.render_json(found) if as_json else renderer.render(found), nl=False)
