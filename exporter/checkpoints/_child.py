"""The process that opens a checkpoint, run as a script, and with nothing but this one file to give.

    python _child.py FOLDER MEMORY SECONDS < CHECKPOINT

It leaves FOLDER/tensors.safetensors, whose keys are numbers, and FOLDER/outcome.json, which has the
name of each: the keys of the dicts that it was in, outermost first. Or outcome.json says what was
refused. MEMORY is in bytes, beyond what PyTorch itself takes.

It imports nothing of the package but `exporter.limits`.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

sys.path.append(str(Path(__file__).parents[2]))  # where the package is

from exporter.limits import limit

if TYPE_CHECKING:
    import torch

_DEEPEST = 6  # dicts in dicts, as {"ema": {"state_dict": {…}}}
_LARGEST = 4  # times the file's size: tensors that share their numbers are written apart
_OPEN_FILES = 64


class Refused(Exception):
    """What the checkpoint is, or holds, that cannot be used."""


def load(stream: BinaryIO) -> Any:
    """Return what the checkpoint holds, as far as it is tensors and plain values."""
    import torch

    return torch.load(stream, map_location="cpu", weights_only=True)


def named_tensors(loaded: Any, size: int) -> list[tuple[list[str], torch.Tensor]]:
    """Return the tensors in nested dicts with text for keys, each a contiguous one of its own.

    What has other keys, as an optimizer's state has, is passed over. Raises `Refused` if there are
    none, if one is no plain tensor, or if they are larger than a file of ``size`` bytes can hold.
    """
    import torch

    found: list[tuple[list[str], torch.Tensor]] = []
    seen: set[int] = set()
    total = 0
    for path, value in _leaves(loaded, [], set()):
        name = ".".join(path)
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise Refused(f"its tensor {name[:80]!r} is no plain tensor of numbers")
        total += value.numel() * value.element_size()
        if total > _LARGEST * size:
            raise Refused(
                f"its tensors up to {name[:80]!r}, of shape {tuple(value.shape)}, come to "
                f"{total:,} bytes, and the file has {size:,}"
            )
        plain = value.detach().resolve_conj().resolve_neg().contiguous()
        storage = plain.untyped_storage().data_ptr()
        found.append((path, plain.clone() if storage in seen else plain))
        seen.add(storage)
    if not found:
        raise Refused(_in_words(loaded))
    return found


def _leaves(value: Any, path: list[str], seen: set[int]) -> Iterator[tuple[list[str], Any]]:
    """Yield the tensors with their names; a dict that is in several places counts in the first."""
    import torch

    if type(value) in (torch.Tensor, torch.nn.Parameter) and path:
        yield path, value
    if type(value) not in (dict, OrderedDict) or id(value) in seen or len(path) == _DEEPEST:
        return
    seen.add(id(value))
    if all(type(key) is str for key in value):
        for key, inner in value.items():
            yield from _leaves(inner, [*path, key], seen)


def _in_words(loaded: Any) -> str:
    """Return what a checkpoint without named tensors holds instead."""
    if type(loaded) in (dict, OrderedDict):
        if {"state", "param_groups"} <= set(loaded):
            return "an optimizer's state, and no weights"
        keys = ", ".join(repr(str(key)[:40]) for key in list(loaded)[:5])
        return f"no tensors in it have names; its keys are {keys}" if keys else "an empty dict"
    return f"it holds a {type(loaded).__name__}, and no tensors with names"


def _no_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def main(folder: Path, memory: int, seconds: int) -> None:
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    stream = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - it is the process's own
    size = stream.seek(0, 2)
    stream.seek(0)
    limit(memory, written=memory, seconds=seconds, files=_OPEN_FILES)
    outcome: dict[str, Any]
    try:
        found = named_tensors(load(stream), size)
        save_file(
            {str(i): value for i, (_, value) in enumerate(found)}, folder / "tensors.safetensors"
        )
        outcome = {"names": [path for path, _ in found]}
    except Refused as error:
        outcome = {"refused": str(error)}
    except Exception as error:  # a hostile file may raise anything
        kind = "memory" if _no_memory(error) else "error"
        outcome = {kind: f"{type(error).__name__}: {error}"}
    (folder / "outcome.json").write_text(json.dumps(outcome), "ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
