"""The most memory that this process has held: its resident set, at its peak.

Linux keeps the peak (VmHWM in /proc/self/status) and begins it anew where "5" is written to
/proc/self/clear_refs (proc_pid_clear_refs(5)); with it begins anew what getrusage(2) tells. Other
systems tell the peak since the process began, or nothing. Memory of child processes and of devices
is in none of it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


class Peak(NamedTuple):
    """The largest resident set in bytes; ``so_far``: since the process began."""

    size: int
    so_far: bool


class PeakMemory:
    """The peak from one look to the next, where the system can begin it anew."""

    def __init__(self) -> None:
        self._anew = _begin_anew()

    def look(self) -> Peak | None:
        """Return the peak since the last look, and begin anew; None where no system tells."""
        size = _resident_peak() if self._anew else None
        found = Peak(size, so_far=False) if size is not None else _since_the_start()
        self._anew = _begin_anew()
        return found


def _begin_anew() -> bool:
    try:
        _CLEAR.write_text("5", "ascii")
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    try:
        found = _PEAK.search(_STATUS.read_text("ascii", "replace"))
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _since_the_start() -> Peak | None:
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    return Peak(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT, so_far=True)
