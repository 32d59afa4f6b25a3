"""What the card can do at most, through PyTorch, by CUDA events.

    peak         2 n³ / t of an n × n product by cuBLAS: FP32 without and with TF32, FP16, BF16,
                 and INT8 to INT32
    memory       bytes read and written / t of copies within the card's memory
    host         bytes / t of copies from and to pageable and page-locked host memory

Each is the best of several rounds, since nothing makes a card faster than it is, and the factors
are random numbers: a card that multiplies zeros draws less power, and clocks higher.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gpu.steps import Here, Skip

PLACE = "cuda"
SIZE = 8192
SETS = tuple(1 << power for power in (24, 26, 28, 30, 32))  # bytes; the last is beyond any cache
HOST = 1 << 28
ROUNDS = 7
_SPARE = 3  # of the card's free memory, what is used at once at most


def measure(here: Here) -> dict[str, Any]:
    """Return the ceilings in 10⁹ FLOPs or bytes per second."""
    import torch

    from exporter.runtimes._torch_cuda import TorchTimer

    if not torch.cuda.is_available():
        raise Skip(f"PyTorch {torch.__version__} cannot use the GPU")
    timer = TorchTimer.of_cuda()
    before = torch.get_float32_matmul_precision()
    found: dict[str, Any] = {"peaks": {}, "bandwidths": {}, "host": {}, "refused": {}}
    try:
        for name, make in products(torch, PLACE, SIZE).items():
            ms = _best(timer, make, found["refused"], name)
            if ms is not None:
                found["peaks"][name] = 2 * SIZE**3 / ms / 1e6
            here.keep(found)
    finally:
        torch.set_float32_matmul_precision(before)
    free, _ = torch.cuda.mem_get_info()
    for size in SETS:
        if size * _SPARE > free:
            found["refused"][f"copies of {size} bytes"] = f"the card has {free} bytes free"
            continue
        ms = _best(timer, partial(copies, torch, PLACE, size), found["refused"], f"{size} bytes")
        if ms is not None:
            found["bandwidths"][str(size)] = size / ms / 1e6
        here.keep(found)
    for name, make in host_copies(torch, PLACE, HOST).items():
        ms = _best(timer, make, found["refused"], name)
        if ms is not None:
            found["host"][name] = HOST / ms / 1e6
    return found


def _best(
    timer: Any, make: Callable[[], Callable[[], Any]], refused: dict[str, str], name: str
) -> float | None:
    """Return the least ms of some rounds after one untimed, or note why there is none."""
    try:
        work = make()
        work()
        return min(timer.ms(work) for _ in range(ROUNDS))
    except RuntimeError as error:  # an old card has no BF16, say, or too little memory
        refused[name] = str(error).strip().partition("\n")[0]
        return None


def products(torch: Any, place: str, size: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Return what makes each product of two square matrices, by the type of its factors."""

    def drawn(kind: Any) -> Any:
        return torch.randn(size, size, device=place).to(kind)

    def floats(kind: Any, precision: str = "highest") -> Callable[[], Any]:
        torch.set_float32_matmul_precision(precision)
        a, b = drawn(kind), drawn(kind)
        return partial(torch.mm, a, b, out=torch.empty_like(a))

    def whole() -> Callable[[], Any]:
        a, b = (
            torch.randint(-127, 128, (size, size), dtype=torch.int8, device=place) for _ in range(2)
        )
        return partial(torch._int_mm, a, b.t())  # noqa: SLF001 # torch has no other one of integers

    return {
        "fp32": partial(floats, torch.float32),
        "tf32": partial(floats, torch.float32, "high"),
        "fp16": partial(floats, torch.float16),
        "bf16": partial(floats, torch.bfloat16),
        "int8": whole,
    }


def copies(torch: Any, place: str, size: int) -> Callable[[], Any]:
    """Return a copy that reads one half of so many bytes, and writes the other."""
    source = torch.randint(0, 255, (size // 2,), dtype=torch.uint8, device=place)
    return partial(torch.empty_like(source).copy_, source)


def host_copies(torch: Any, place: str, size: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Return what makes each copy between the host's memory and the card's."""

    def copy(way: str, *, locked: bool) -> Callable[[], Any]:
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=locked)
        card = torch.zeros(size, dtype=torch.uint8, device=place)
        target, source = (card, host) if way == "in" else (host, card)
        return partial(target.copy_, source, non_blocking=locked)

    return {
        f"{way}, {'page-locked' if locked else 'pageable'}": partial(copy, way, locked=locked)
        for way in ("in", "out")
        for locked in (False, True)
    }
