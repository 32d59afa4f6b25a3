"""``resnet-export bench``: time what bundles hold, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class Numbers(click.ParamType[tuple[int, ...]]):
    """``1,8,32``."""

    name = "N,…"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):  # the default
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            return self.fail(f"{value!r} is not a list of numbers such as 1,8,32", param, ctx)


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-r",
    "--runtime",
    multiple=True,
    help="Repeatable, or a,b. Default: the bundle's, those that can run here.",
)
@click.option(
    "--batch", "batches", type=Numbers(), default=(), help="Batch sizes. Default: the profile's."
)
@click.option(
    "--threads",
    type=Numbers(),
    default=(),
    help="Thread counts, each a candidate. Default: the profile's.",
)
@click.option(
    "--data", metavar="DATA", help="What --data was of the export: the samples to run on."
)
@click.option("--runs", type=int, help="Rounds at each batch size. Default: 100.")
@click.option("--seconds", type=float, help="In place of --runs: how long at each batch size.")
@click.option(
    "--budget",
    "budget_ms",
    type=float,
    metavar="MS",
    help="Also say the largest batch whose p90 is within so many ms.",
)
@click.option(
    "--loads", type=int, default=5, show_default=True, help="Loads of each file, taken in turn."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order in each round.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="A folder to write bench.json, bench.md and throughput.svg into.",
)
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    bundles: tuple[Path, ...],
    runtime: tuple[str, ...],
    data: str | None,
    out: Path | None,
    *,
    as_json: bool,
    **asked: Any,
) -> None:
    """Time all that BUNDLES hold on this machine, in turn, with intervals.

    Each artefact in each runtime that can run here. Inputs are held-out samples that change from
    run to run; outputs of timed runs are compared with those of untimed ones, and accuracy with
    the bundle's record. Ends with 1 where either differs.
    """
    from exporter.records import BenchAsked
    from exporter.renderers import benching
    from exporter.strict import read

    names = [part.strip() for value in runtime for part in value.split(",") if part.strip()]
    request = read(BenchAsked, {**asked, "runtimes": list(dict.fromkeys(names))}, where="bench")
    if out is not None:
        benching.check_folder(out)
    with ctx.obj.bars() as progress:
        with progress("load", None):
            from exporter.bench import bench_bundles
        report = bench_bundles(bundles, request, data=data, progress=progress)
    if out is not None:
        benching.write(report, out)
    if as_json:
        click.echo(benching.to_json(report), nl=False)
    else:
        ctx.obj.show(benching.render(report), 180)
    ctx.exit(1 if report.verdict == "fail" else 0)
