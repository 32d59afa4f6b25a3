"""Every side-by-side benchmark, one after the other, and one dated report of them all.

A part that fails is named with the last thing it said, and the others go on; then the exit code
is 1. What a part kept from an earlier run (peers, trained networks, scores) is used again.

Run: ``make bench``, or ``make bench BENCH=--quick`` for small sizes that show no more than that all
of it works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import keep
from quantization import peers

import exporter
from exporter.environment import OtherLoad, capture

HERE = Path(__file__).parent
_PACKAGES = """
import json
from importlib.metadata import distributions
print(json.dumps({d.metadata["Name"]: d.version for d in distributions()}, sort_keys=True))
"""


class Part(NamedTuple):
    """A benchmark: the script or module, what it is asked in full, and what when it is quick."""

    name: str
    command: tuple[str, ...]
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()


class Done(NamedTuple):
    """What a part came to. ``failed`` says why there is no result.

    ``others`` is the share of the processors that other processes took meanwhile, None if the
    system does not tell.
    """

    name: str
    command: str
    seconds: float
    others: float | None
    failed: str | None = None
    page: str = ""
    record: Any = None


PARTS = (
    Part("latency", (str(HERE / "latency.py"),), (), ("--pixels", "64", "--rounds", "20")),
    Part("quantization", ("-m", "quantization"), ("--draws", "5", "--rounds", "3"), ("--quick",)),
    Part(
        "pipeline",
        (str(HERE / "pipeline.py"),),
        (),
        ("--pixels", "64", "--images", "32", "--rounds", "2"),
    ),
)


def run_all(parts: Sequence[Part], *, quick: bool) -> Iterator[Done]:
    """Yield what each part came to, as it ends."""
    for part in parts:
        arguments = (*part.command, *(part.quick if quick else part.full))
        command = " ".join(["python", *arguments]).replace(f"{HERE}{os.sep}", "benchmarks/")
        print(f"── {part.name}: {command}", file=sys.stderr, flush=True)
        others, began = OtherLoad(), perf_counter()
        with TemporaryDirectory() as folder:
            failed = _run((*arguments, "--into", folder))
            took = perf_counter() - began
            done = Done(part.name, command, took, others.share(), failed)
            yield done if failed else _read(done, Path(folder))


def _run(arguments: Sequence[str]) -> str | None:
    """Run one in a process of its own, and return why it failed, if it did."""
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stderr is not None
    last = "it said nothing"
    with process:
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
    return f"exit code {process.returncode}: {last}" if process.returncode else None


def _read(done: Done, folder: Path) -> Done:
    page, record = folder / f"{done.name}.md", folder / f"{done.name}.json"
    if not (page.exists() and record.exists()):
        return done._replace(failed="it ended well and left no result")
    return done._replace(page=page.read_text("utf-8"), record=json.loads(record.read_text("utf-8")))


# ── The report ──────────────────────────────────────────────────────────────────────


def as_markdown(found: Sequence[Done], date: str, *, quick: bool) -> str:
    lines = [
        f"# Benchmarks beside the peers, {date}",
        "",
        *(["Quick: at small sizes, to show that all of it works. Its figures say nothing.", ""])
        * quick,
        "| part | result | seconds | other processes took |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(_row(one))} |" for one in found),
        "",
        "- machine: " + _listed(_machine()),
        "- versions: " + _listed({"resnet-export": exporter.__version__, **_versions()}),
        *(["- peers: " + _listed(_peers(found))] if _peers(found) else []),
        *(f"- in doubt: {doubt}" for doubt in doubts(found)),
        "",
    ]
    for one in found:
        lines += _section(one)
    return "\n".join(lines)


def _row(one: Done) -> tuple[str, ...]:
    others = "not told" if one.others is None else f"{one.others:.0%} of the processors"
    said = f"**failed**: {one.failed}" if one.failed else "below"
    return (f"{one.name}: `{one.command}`", said.replace("|", "/"), f"{one.seconds:.0f}", others)


def _section(one: Done) -> Iterator[str]:
    """Yield a part's own page, each heading a level deeper, or that there is none."""
    if one.failed:
        yield from (f"## {one.name}: failed", "", one.failed, "")
        return
    for line in one.page.splitlines():
        yield f"#{line}" if line.startswith("#") else line
    yield ""


def doubts(found: Sequence[Done]) -> Iterator[str]:
    """Yield the parts in which the machine was busy with something else."""
    for one in found:
        if one.others is not None and one.others > keep.BUSY:
            yield (
                f"{one.name}: other processes took {one.others:.0%} of the processors meanwhile, "
                "so that its times may not hold"
            )


def as_json(found: Sequence[Done], date: str, *, quick: bool) -> str:
    plain = {
        "date": date,
        "quick": quick,
        "resnet-export": exporter.__version__,
        "environment": capture(),
        "packages": packages(sys.executable),
        "peers": _peers(found),
        "peers_packages": packages(peers.PYTHON) if peers.PYTHON.exists() else {},
        "parts": {one.name: _without_page(one) for one in found},
    }
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def packages(python: str | Path) -> dict[str, str]:
    """Return every package of an environment with its version."""
    done = subprocess.run([python, "-c", _PACKAGES], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _without_page(one: Done) -> dict[str, Any]:
    return {key: value for key, value in one._asdict().items() if key != "page"}


def _machine() -> dict[str, str]:
    every = capture()
    return {key: every[key] for key in ("system", "cpu", "cores", "instructions", "governor")}


def _versions() -> dict[str, str]:
    return {key: value for key, value in capture().items() if key not in _machine()}


def _peers(found: Sequence[Done]) -> dict[str, str]:
    """Return the peers' versions, as the parts that ran have them."""
    return {
        tool: number
        for one in found
        if one.record
        for tool, number in one.record["versions"].items()
    }


def _listed(named: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in named.items())


def _names(known: Sequence[Part]) -> Callable[[str], tuple[Part, ...]]:
    def names(text: str) -> tuple[Part, ...]:
        wanted = text.split(",")
        if unknown := set(wanted) - {part.name for part in known}:
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not known")
        return tuple(part for part in known if part.name in wanted)

    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", type=_names(PARTS), default=PARTS, help="some, as in a,b")
    parser.add_argument("--quick", action="store_true", help="small sizes: does all of it work?")
    asked = parser.parse_args()
    found = tuple(run_all(asked.only, quick=asked.quick))
    date, name = keep.today(), "bench-quick" if asked.quick else "bench"
    page = as_markdown(found, date, quick=asked.quick)
    stem = keep.RESULTS / f"{date}-{name}"
    keep.write(stem, page, as_json(found, date, quick=asked.quick))
    failed = [one for one in found if one.failed]
    for one in failed:
        print(f"{one.name} failed: {one.failed}", file=sys.stderr)
    print(f"{stem.relative_to(HERE.parent)}.md")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
