"""Where the time of a file goes, kernel by kernel, under the ceilings of this machine.

    file ─▶ profile of many runs ─▶ kernels: time, FLOPs, bytes ┐
    machine ─▶ ceilings: peaks, bandwidths ─────────────────────┴─▶ least times, what is left to win

Kernels are those that the runtime really ran, its fusions and layouts included, so that what a
conversion between layouts costs is a row like any other.
"""

from __future__ import annotations

from pathlib import Path

from exporter.ceilings import measure_ceilings
from exporter.contracts import Progress, TellsKernels, silent
from exporter.errors import BuildError, InputRefused, RuntimeMissing
from exporter.onnx_files import check_onnx
from exporter.plugins import load_runtime
from exporter.records import Roofline

WARMUP = 5


def measure_roofline(
    path: Path,
    *,
    runtime: str = "ort-cpu",
    batch: int = 1,
    threads: int | None = None,
    runs: int = 100,
    progress: Progress = silent,
) -> Roofline:
    """Run an ONNX file ``runs`` times and return its kernels beside the machine's ceilings.

    Raises `RuntimeMissing` where the runtime cannot run here or cannot tell its kernels, and
    `InputRefused` or `BuildError` for a file that is none or cannot be run.
    """
    if batch < 1 or runs < 1:
        raise InputRefused(f"batch and runs must be 1 or more, found {batch} and {runs}")
    if not path.is_file():
        raise InputRefused(f"{str(path)!r} is not a file")
    found = load_runtime(runtime, {} if threads is None else {"threads": threads})
    if reason := found.missing("run"):
        raise RuntimeMissing(f"{runtime} cannot run here: {reason}")
    if not isinstance(found, TellsKernels):
        raise RuntimeMissing(f"{runtime} does not tell how long its kernels take")
    with progress(f"check {path.name}", None):
        check_onnx(path, runs=True)
    with progress(f"profile {runs} runs", None):
        used, kernels = found.kernels(path, batch=batch, runs=runs, warmup=WARMUP)
    if not kernels:
        raise BuildError(f"the profile of {path.name} on {runtime} has no kernels")
    ceilings = measure_ceilings(used, progress=progress)
    return Roofline(path.name, runtime, batch, runs, ceilings, kernels)
