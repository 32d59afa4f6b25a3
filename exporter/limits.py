"""What a process may take that opens files of others: for the scripts that such processes run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def limit(
    memory: int, *, written: int, seconds: int | None = None, files: int | None = None
) -> None:
    """Bound what this process can take from now on, where the system can.

    That is ``memory`` bytes beyond what it has, files of ``written`` bytes, ``seconds`` on the
    processor and so many open ``files``.
    """
    with suppress(ImportError):  # Windows has none of it
        import resource

        limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: written}
        if seconds is not None:
            limits[resource.RLIMIT_CPU] = seconds
        if files is not None:
            limits[resource.RLIMIT_NOFILE] = files
        with suppress(OSError):  # Linux alone says what is taken so far
            pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
            limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + memory
        for which, value in limits.items():
            with suppress(ValueError, OSError):  # a lower one is in force already
                resource.setrlimit(which, (value, value))
