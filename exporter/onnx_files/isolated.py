"""An ONNX file parsed, checked, and where it is to run, run once, in a process that may fall over.

As for a checkpoint (`exporter.checkpoints.isolated`), with limits on memory, time, and what it may
write and open. Nothing comes back but words.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from exporter.errors import InputRefused, OutOfMemory
from exporter.words import plain, quoted

MEMORY = 512 << 20  # what parsing takes besides the file
RUN_MEMORY = 4 << 30  # what one run of a batch of one may take besides the weights
_COPIES = 6  # of the file: parsed, stripped, written, parsed, inferred, written
SECONDS = 60
_SLOWEST = 10 << 20  # bytes per second
_CHILD = Path(__file__).with_name("_child.py")


def check_isolated(stream: BinaryIO, size: int, *, run: Path | None, outside: int) -> None:
    """Parse the model, infer its shapes, and run it once where it is the file ``run``.

    ``outside`` are the bytes of its external data. Raises `InputRefused` for what the checker
    refuses, what makes a tensor of over 4 GiB, and what ends or outlasts the process, and
    `OutOfMemory` for what takes more than such a file can need.
    """
    memory = MEMORY + _COPIES * size + (RUN_MEMORY + _COPIES * outside if run else 0)
    seconds = SECONDS + (size + outside) // _SLOWEST
    with TemporaryDirectory() as name:
        outcome = _run(stream, Path(name), memory, seconds, str(run.resolve()) if run else "")
    if "memory" in outcome:
        raise _too_large(memory)
    if "refused" in outcome:
        raise InputRefused(str(outcome["refused"]))
    if "error" in outcome:
        raise InputRefused(f"not a sound ONNX model: {_said(outcome['error'])}")
    if "not run" in outcome and outcome["unknown"]:
        # Another runtime might run it, and then nothing would bound what it makes.
        raise InputRefused(
            f"ONNX Runtime cannot run it ({_said(outcome['not run'])}), and the shape of "
            f"{quoted(outcome['unknown'][0])} does not follow from the graph"
        )


def _run(stream: BinaryIO, folder: Path, memory: int, seconds: int, run: str) -> dict[str, Any]:
    """Return what the process says of the file. It is gone when this returns or raises."""
    said = folder / "stderr.txt"
    with said.open("wb") as stderr:
        process = subprocess.Popen(  # noqa: S603 - our own script, and a file that it only reads
            [sys.executable, "-P", str(_CHILD), str(folder), str(memory), str(seconds), run],
            stdin=stream,  # which it reads from the beginning, and shares the position of
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            cwd=folder,
            start_new_session=True,  # Ctrl-C comes to this process, which then ends that one
        )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired as error:
        raise InputRefused(
            f"made to do harm, or the machine is busy: after {seconds} seconds it was not checked"
        ) from error
    finally:
        process.kill()
        process.wait()
    try:
        return dict(json.loads((folder / "outcome.json").read_bytes()))
    except (OSError, ValueError) as error:
        last = said.read_text("utf-8", "replace").strip().rpartition("\n")[2]
        if "bad_alloc" in last or "MemoryError" in last:
            raise _too_large(memory) from error
        ended = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        raise InputRefused(
            f"the process that checks it ended with {ended}{': ' if last else ''}{plain(last)}"
        ) from error


def _said(error: object) -> str:
    """Return what a library says is wrong, on one line and without the exception's name."""
    return plain(" ".join(str(error).partition(": ")[2].split()), most=200).rstrip(".")


def _too_large(memory: int) -> OutOfMemory:
    return OutOfMemory(
        f"checking it takes more than the {memory / 1e6:,.0f} MB that a file of its size can need"
    )
