"""The NVIDIA driver, asked through ctypes; and GPU memory, through NVIDIA's cuda-python bindings.

The question comes first: several NVIDIA libraries crash, or fail without a word, where there is no
driver. It costs nothing and needs no package.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from exporter.errors import RuntimeMissing

NO_GPU = "no NVIDIA GPU"


@lru_cache(maxsize=1)
def missing_gpu() -> str | None:
    """Return why no GPU can be used here, or None if the driver has one."""
    try:
        driver = ctypes.CDLL(_library())
    except OSError:
        return f"{NO_GPU} (no driver)"
    if code := driver.cuInit(0):
        return f"{NO_GPU} (cuInit gave error {code})"
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return f"{NO_GPU} (the driver has none)"
    return None


def missing_to_run() -> str | None:
    """Return why no engine can be run here: no GPU, or no bindings to its memory."""
    if reason := missing_gpu():
        return reason
    try:
        runtime_api()
    except RuntimeMissing as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def compute_capability() -> str:
    """Return the first GPU's compute capability, say ``sm89``. `missing_gpu` must be None."""
    driver = ctypes.CDLL(_library())
    device, found = ctypes.c_int(), []
    driver.cuDeviceGet(ctypes.byref(device), 0)
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        found.append(value.value)
    return f"sm{found[0]}{found[1]}"


@lru_cache(maxsize=1)
def device_name() -> str:
    """Return the first GPU's name. `missing_gpu` must be None."""
    driver = ctypes.CDLL(_library())
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)
    return name.value.decode(errors="replace")


def _library() -> str:
    return "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def runtime_api() -> Any:
    """Return the bindings to the CUDA runtime. Raises `RuntimeMissing` without the package."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise RuntimeMissing(
            f"running an engine needs cuda-python: {error}", hint="pip install cuda-python"
        ) from error
    return runtime


def call(function: Any, *arguments: Any) -> Any:
    """Call a CUDA runtime function and return its result.

    Raises `RuntimeMissing` naming the function and the error, since the device is what failed.
    """
    status, *results = function(*arguments)
    if int(status):
        name = getattr(function, "__name__", "a CUDA call")
        raise RuntimeMissing(f"{name} failed: {getattr(status, 'name', status)}")
    return results[0] if len(results) == 1 else tuple(results)


@contextmanager
def stream() -> Iterator[Any]:
    """Yield a CUDA stream that waits for no other, not even the default one.

    TensorRT synchronises more on that, and a capture fails where it has to wait for it.
    """
    cuda = runtime_api()
    made = call(cuda.cudaStreamCreateWithFlags, cuda.cudaStreamNonBlocking)
    try:
        yield made
    finally:
        call(cuda.cudaStreamDestroy, made)


class Buffers:
    """Named blocks of GPU memory that are freed together."""

    def __init__(self) -> None:
        self._cuda = runtime_api()
        self._blocks: dict[str, tuple[int, int]] = {}

    def at(self, name: str, size: int) -> int:
        """Return the address of a block of at least ``size`` bytes."""
        address, has = self._blocks.get(name, (0, 0))
        if has < size:
            if address:
                call(self._cuda.cudaFree, address)
            address = call(self._cuda.cudaMalloc, size)
            self._blocks[name] = (address, size)
        return address

    def free(self) -> None:
        for address, _ in self._blocks.values():
            call(self._cuda.cudaFree, address)
        self._blocks.clear()
