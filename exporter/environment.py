"""What a number was measured on. A latency without this is a rumour."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
PACKAGES = (
    *("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "onnxruntime-gpu"),
    "openvino",
    *("tensorrt", "tensorrt-rtx", "cuda-python", "numpy", "scikit-learn", "safetensors"),
)
_VECTOR = re.compile(r"(avx|amx|sse4|fma|f16c|asimd|sve|bf16|i8mm).*|sme2?")
# Linux's names of the instructions that multiply and add in a type, in /proc/cpuinfo.
_INSTRUCTIONS = {
    "fp32": {"avx2": "AVX2", "avx512f": "AVX-512", "asimd": "NEON", "sve": "SVE"},
    "fp16": {"avx512_fp16": "AVX512-FP16", "amx_fp16": "AMX-FP16", "asimdhp": "NEON-FP16"},
    "bf16": {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "bf16": "NEON-BF16"},
    "int8": {
        "avx512_vnni": "AVX512-VNNI",
        "avx_vnni": "AVX-VNNI",
        "amx_int8": "AMX-INT8",
        "asimddp": "NEON-DOT",
        "i8mm": "I8MM",
    },
}
_BUSY = 0.1  # other processes' share of the processors from which latency is in doubt


def capture() -> dict[str, str]:
    """Return the machine, without its name, and the version of every package involved."""
    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "instructions": instructions(_cpuinfo()),
        "governor": governor(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def memory_bytes() -> int | None:
    """Return the machine's physical memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def load_average() -> float | None:
    """Return the load average of the last minute, or None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def involuntary_switches() -> int | None:
    """Return how often this process was put aside for another, None if the system is silent."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def native_precisions() -> dict[str, tuple[str, ...]]:
    """Return the instruction sets for each precision that Linux says this CPU has."""
    flags = _cpu_flags()
    found = {
        precision: tuple(name for flag, name in known.items() if flag in flags)
        for precision, known in _INSTRUCTIONS.items()
    }
    return {precision: names for precision, names in found.items() if names}


class OtherLoad:
    """How busy other processes keep the machine meanwhile; Linux tells, elsewhere it is None."""

    def __init__(self) -> None:
        self._start = _processor_seconds()

    def doubt(self) -> tuple[str, ...]:
        """Return why latency that was measured meanwhile may not hold, if so."""
        share = self.share()
        if share is None or share <= _BUSY:
            return ()
        return (
            f"other processes took {share:.0%} of the processors while latency was measured, so "
            "that it may not hold",
        )

    def share(self) -> float | None:
        """Return other processes' part of all processor time since this was made, 0 to 1."""
        if self._start is None or (now := _processor_seconds()) is None:
            return None
        busy, idle, own = (after - before for after, before in zip(now, self._start, strict=True))
        return max(0.0, busy - own) / (busy + idle) if busy + idle > 0 else None


def _processor_seconds() -> tuple[float, float, float] | None:
    """Return the seconds that all processors were busy and idle, and this process's own.

    Its own are also those of its children that have ended.
    """
    try:
        first = Path("/proc/stat").read_text("ascii").splitlines()[0]
        tick = os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError):
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, first.split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    own = sum(os.times()[:4])
    return busy / tick, (idle + iowait) / tick, own


def _cpu() -> str:
    return _field(_cpuinfo(), "model name") or platform.processor() or platform.machine()


def instructions(cpuinfo: str) -> str:
    """Return the vector instruction sets that inference uses, of those that the system lists."""
    listed = _field(cpuinfo, "flags") or _field(cpuinfo, "Features") or ""
    return " ".join(sorted(filter(_VECTOR.fullmatch, listed.split()))) or "not told"


def governor(root: Path = Path("/sys/devices/system/cpu")) -> str:
    """Return who sets the processors' frequency, say ``performance``; virtual ones seldom tell."""
    found = set()
    for path in root.glob("cpu[0-9]*/cpufreq/scaling_governor"):
        with suppress(OSError):
            found.add(path.read_text("ascii", "replace").strip())
    return ", ".join(sorted(found)) or "not told"


def _cpuinfo() -> str:
    try:
        return _CPUINFO.read_text("utf-8", "replace")
    except OSError:
        return ""


def _field(cpuinfo: str, name: str) -> str | None:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _cpu_flags() -> frozenset[str]:
    found = _cpuinfo()
    return frozenset((_field(found, "flags") or _field(found, "Features") or "").split())
