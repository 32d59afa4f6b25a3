"""A checkpoint opened in a process set apart for it, which can fall over alone.

That gets the open file and an empty folder, has a limit on memory that follows from the file's
size, on time, on what it may write and open, and is killed when the caller is interrupted. What it
hands back is a safetensors file and a list of names: data that cannot run.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO

from exporter.checkpoints.kinds import SAVE
from exporter.errors import InputRefused, OutOfMemory
from exporter.words import plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

MEMORY = 256 << 20  # what loading takes besides the tensors
_COPIES = 3  # read from the file, in order, and once more where tensors share their numbers
SECONDS = 120
_SLOWEST = 10 << 20  # bytes per second
_CHILD = Path(__file__).with_name("_child.py")

Named = dict[tuple[str, ...], "torch.Tensor"]


def load_isolated(stream: BinaryIO, size: int) -> Named:
    """Return the tensors of a checkpoint by the keys of the dicts that they are in.

    Raises `InputRefused` for what PyTorch refuses, or what ends or outlasts the process, and
    `OutOfMemory` for what takes more than a file of ``size`` bytes can need.
    """
    from safetensors.torch import load_file

    memory, seconds = MEMORY + _COPIES * size, SECONDS + size // _SLOWEST
    with TemporaryDirectory() as name:
        folder = Path(name)
        outcome = _run(stream, folder, memory, seconds)
        if "memory" in outcome:
            raise _too_large(memory)
        if "refused" in outcome:
            raise InputRefused(str(outcome["refused"]), hint=SAVE)
        if "error" in outcome:
            raise InputRefused(
                f"damaged, or made to do harm: PyTorch refuses it ({_said(outcome['error'])})",
                hint=SAVE,
            )
        tensors = load_file(folder / "tensors.safetensors")
        return {tuple(path): tensors[str(i)] for i, path in enumerate(outcome["names"])}


def _run(stream: BinaryIO, folder: Path, memory: int, seconds: int) -> Mapping[str, Any]:
    """Return what the process says of the file. It is gone when this returns or raises."""
    said = folder / "stderr.txt"
    with said.open("wb") as stderr:
        process = subprocess.Popen(  # noqa: S603 - our own script, and a file that it only reads
            [sys.executable, "-P", str(_CHILD), str(folder), str(memory), str(seconds)],
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
            f"made to do harm, or the machine is busy: after {seconds} seconds it was not loaded",
            hint=SAVE,
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
            f"the process that loads it ended with {ended}{': ' if last else ''}{plain(last)}",
            hint=SAVE,
        ) from error


def _too_large(memory: int) -> OutOfMemory:
    return OutOfMemory(
        f"loading it takes more than the {memory / 1e6:,.0f} MB that a file of its size can need",
        hint=SAVE,
    )


def _said(error: str) -> str:
    """Return what PyTorch says is wrong, without its advice to load the file unsafely."""
    kind, _, text = error.partition(": ")
    cause = re.search(r"WeightsUnpickler error: (.*)", text)
    if cause:
        return plain(cause[1])
    return kind if re.search(r"weights.only", text, re.IGNORECASE) else plain(error.split("\n")[0])
