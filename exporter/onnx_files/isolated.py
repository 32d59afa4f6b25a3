"""An ONNX file parsed, checked, and where it is to run, run once, in a process that may fall over.

See `exporter.isolation`. Nothing comes back but words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, TypeAlias

from exporter.errors import InputRefused
from exporter.isolation import run_isolated
from exporter.words import plain, quoted

MEMORY = 512 << 20  # what parsing takes besides the file
RUN_MEMORY = 4 << 30  # what one run of a batch of one may take besides the weights
_COPIES = 6  # of the file: parsed, stripped, written, parsed, inferred, written
SECONDS = 60
_SLOWEST = 10 << 20  # bytes per second
Sizes: TypeAlias = Mapping[str, tuple[int, ...]]  # of inputs, by their names
_CHILD = Path(__file__).with_name("_child.py")


def check_isolated(
    stream: BinaryIO,
    size: int,
    *,
    run: Path | None,
    outside: int,
    sizes: Sizes,
) -> None:
    """Parse the model, infer its shapes, and run it once where it is the file ``run``.

    ``outside`` are the bytes of its external data, ``sizes`` what the sizes of inputs behind their
    batch axes are, by name, that it leaves open: 1 where nothing is said. Raises `InputRefused` for
    what the checker refuses, what makes a tensor of over 4 GiB, and what ends or outlasts the
    process, and `OutOfMemory` for what takes more than such a file can need.
    """
    memory = MEMORY + _COPIES * size + (RUN_MEMORY + _COPIES * outside if run else 0)
    seconds = SECONDS + (size + outside) // _SLOWEST
    with TemporaryDirectory() as name:
        path = str(run.resolve()) if run else ""
        said = (path, json.dumps(dict(sizes)))
        outcome = run_isolated(_CHILD, stream, Path(name), memory, seconds, *said, verb="check")
    if "error" in outcome:
        raise InputRefused(f"not a sound ONNX model: {_said(outcome['error'])}")
    if "not run" in outcome and outcome["unknown"]:
        # Another runtime might run it, and then nothing would bound what it makes.
        raise InputRefused(
            f"ONNX Runtime cannot run it ({_said(outcome['not run'])}), and the shape of "
            f"{quoted(outcome['unknown'][0])} does not follow from the graph"
        )


def _said(error: object) -> str:
    """Return what a library says is wrong, on one line, without its name or where the file is."""
    line = " ".join(str(error).partition(": ")[2].split()).rpartition(" failed:")[2]
    return plain(line, most=200).rstrip(".")
