"""A checkpoint opened in a process set apart for it (`exporter.isolation`).

What that hands back is a safetensors file and a list of names: data that cannot run. Its limit on
memory follows from the file's size.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, BinaryIO

from exporter.checkpoints.kinds import SAVE
from exporter.errors import InputRefused
from exporter.isolation import run_isolated
from exporter.words import plain

if TYPE_CHECKING:
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
        outcome = run_isolated(_CHILD, stream, folder, memory, seconds, verb="load", hint=SAVE)
        if "error" in outcome:
            raise InputRefused(
                f"damaged, or made to do harm: PyTorch refuses it ({_said(outcome['error'])})",
                hint=SAVE,
            )
        tensors = load_file(folder / "tensors.safetensors")
        return {tuple(path): tensors[str(i)] for i, path in enumerate(outcome["names"])}


def _said(error: str) -> str:
    """Return what PyTorch says is wrong, without its advice to load the file unsafely."""
    kind, _, text = error.partition(": ")
    cause = re.search(r"WeightsUnpickler error: (.*)", text)
    if cause:
        return plain(cause[1])
    return kind if re.search(r"weights.only", text, re.IGNORECASE) else plain(error.split("\n")[0])
