"""What a benchmark does with its result: print it, and keep it where that is asked for."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from exporter.files import write_text

RESULTS = Path(__file__).parent / "results"
BUSY = 0.1  # other processes' share of the processors from which times are in doubt


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help="keep the result, dated, in results/")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="and as it is, in this folder")


def keep(name: str, markdown: str, record: str, asked: argparse.Namespace) -> None:
    """Print the page; write page and JSON record, dated and as they are, as far as asked for."""
    print(markdown, flush=True)
    stems = [RESULTS / f"{today()}-{name}"] if asked.write else []
    stems += [asked.into / name] if asked.into else []
    for stem in stems:
        write(stem, markdown, record)


def write(stem: Path, markdown: str, record: str) -> None:
    """Write ``stem``.md and ``stem``.json, each whole or not at all."""
    write_text(stem.with_name(f"{stem.name}.md"), markdown)
    write_text(stem.with_name(f"{stem.name}.json"), record)
