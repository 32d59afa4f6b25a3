"""What this machine can do at most: arithmetic and bandwidth, through the libraries at hand.

    peak         2 n³ / t of an n × n product by torch (oneDNN, MKL): FP32, BF16, and INT8 to INT32
    bandwidth    bytes read and written / t of copies over arrays of 2¹⁵ … 2²⁸ bytes

Each is the best of several rounds, since whatever else the machine does can only make them worse;
the rounds take turns, so that a spell of other work does not fall on one of them alone. A copy
counts each byte twice, read and written; that the processor reads what it overwrites is not
counted (J. McCalpin, STREAM, 1995).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from exporter.contracts import Progress, silent
from exporter.records import Bandwidth, Ceilings

if TYPE_CHECKING:
    from torch import Tensor

_SIZE = 1536
_SETS = tuple(1 << power for power in (15, 17, 19, 21, 23, 25, 28))
_MOVED = 1 << 26  # bytes per copying round, so that a small array is copied often
_ROUNDS = 7


def measure_ceilings(threads: int, *, progress: Progress = silent) -> Ceilings:
    """Return the ceilings for so many threads. Takes some seconds, and half a gigabyte."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            products = _products()
            copies = {size: _copies(size) for size in _SETS}
            times: dict[Any, float] = {}
            with progress("measure the machine's ceilings", _ROUNDS) as advance:
                for _ in range(_ROUNDS):
                    for key, step in (*products.items(), *copies.items()):
                        times[key] = min(times.get(key, float("inf")), _seconds(step))
                    advance()
    finally:
        torch.set_num_threads(before)
    return Ceilings(
        threads,
        {kind: 2 * _SIZE**3 / times[kind] / 1e9 for kind in products},
        tuple(Bandwidth(size, 2 * _moved(size) / times[size] / 1e9) for size in _SETS),
    )


def _products() -> dict[str, Callable[[], Any]]:
    import torch

    whole = torch.randint(-127, 128, (_SIZE, _SIZE), dtype=torch.int8)
    wide = whole.float()
    half = wide.bfloat16()
    return {
        "fp32": partial(torch.mm, wide, wide, out=torch.empty_like(wide)),
        "bf16": partial(torch.mm, half, half, out=torch.empty_like(half)),
        "int8": partial(torch._int_mm, whole, whole),  # noqa: SLF001 # torch has no other product of whole numbers
    }


def _copies(size: int) -> Callable[[], None]:
    """Return what copies between two halves of a working set, again and again."""
    import torch

    source = torch.zeros(size // 8)  # float32: half of the bytes
    target = torch.empty_like(source)
    times = _moved(size) // (size // 2)

    def copy(source: Tensor = source, target: Tensor = target) -> None:
        for _ in range(times):
            target.copy_(source)

    return copy


def _moved(size: int) -> int:
    """Return how many bytes one round of copies writes."""
    return max(1, _MOVED // (size // 2)) * (size // 2)


def _seconds(step: Callable[[], Any]) -> float:
    start = perf_counter()
    step()
    return perf_counter() - start
