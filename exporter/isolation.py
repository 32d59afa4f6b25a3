"""A file opened in a process set apart for it, which can fall over alone.

That runs a script of ours, gets the open file and an empty folder, has limits on memory, time, and
what it may write and open (`exporter.limits`), and is killed when the caller is interrupted. It
leaves ``outcome.json`` in the folder.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

from exporter.errors import InputRefused, OutOfMemory
from exporter.words import plain


def run_isolated(
    script: Path,
    stream: BinaryIO,
    folder: Path,
    memory: int,
    seconds: int,
    *arguments: str,
    verb: str,
    hint: str | None = None,
) -> dict[str, Any]:
    """Return what the process says of the file. It is gone when this returns or raises.

    The script is called as ``script FOLDER MEMORY SECONDS ARGUMENTS… < FILE``; ``verb`` says in
    refusals what it does with the file. Raises `InputRefused` for what it refuses, and what ends or
    outlasts it, and `OutOfMemory` for what takes more than ``memory`` bytes.
    """
    said = folder / "stderr.txt"
    with said.open("wb") as stderr:
        process = subprocess.Popen(  # noqa: S603 - our own script, and a file that it only reads
            [sys.executable, "-P", str(script), str(folder), str(memory), str(seconds), *arguments],
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
            f"made to do harm, or the machine is busy: after {seconds} seconds it was not {verb}ed",
            hint=hint,
        ) from error
    finally:
        process.kill()
        process.wait()
    too_large = OutOfMemory(
        f"{verb}ing it takes more than the {memory / 1e6:,.0f} MB that a file of its size can need",
        hint=hint,
    )
    try:
        outcome = dict(json.loads((folder / "outcome.json").read_bytes()))
    except (OSError, ValueError) as error:
        last = said.read_text("utf-8", "replace").strip().rpartition("\n")[2]
        if "bad_alloc" in last or "MemoryError" in last:
            raise too_large from error
        ended = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        raise InputRefused(
            f"the process that {verb}s it ended with {ended}{': ' if last else ''}{plain(last)}",
            hint=hint,
        ) from error
    if "memory" in outcome:
        raise too_large
    if "refused" in outcome:
        raise InputRefused(str(outcome["refused"]), hint=hint)
    return outcome
