"""Where a network's time goes, beside what the machine could do at best."""

from __future__ import annotations

from exporter.records.base import Found


class Kernel(Found, frozen=True):
    """One kernel of a run: how long it took, what it computed and what it moved.

    ``type`` is that of its arithmetic, ``macs`` its multiply-accumulates, ``bytes`` those of all
    that it reads and writes; ``milliseconds`` is the median over runs, spans included that other
    work of the machine took.
    """

    name: str
    op: str
    type: str | None
    macs: int
    bytes: int
    milliseconds: float

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def intensity(self) -> float:
        """Return FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def gflops(self) -> float:
        """Return 10⁹ FLOPs per second."""
        return self.flops / self.milliseconds / 1e6 if self.milliseconds else 0.0


class Bandwidth(Found, frozen=True):
    """How fast so many bytes can be read and written over again, in 10⁹ bytes per second."""

    working_set: int
    gigabytes: float


class Ceilings(Found, frozen=True):
    """What a machine can do at most through the libraries at hand.

    ``peaks`` are 10⁹ FLOPs per second of a large matrix product, by the type of its factors;
    ``bandwidths`` go from the smallest working set to the largest, which is the memory's.
    """

    threads: int
    peaks: dict[str, float]
    bandwidths: tuple[Bandwidth, ...]

    def bandwidth(self, working_set: int) -> float:
        """Return that of the smallest working set that was measured and is no smaller."""
        fits = (b for b in self.bandwidths if b.working_set >= working_set)
        return next(fits, self.bandwidths[-1]).gigabytes

    def peak(self, kind: str | None) -> float:
        """Return the peak of a type, or FP32's where that was not measured."""
        return self.peaks.get(kind or "fp32", self.peaks["fp32"])


class Roofline(Found, frozen=True):
    """A file's kernels on a runtime, and the ceilings of the machine they ran on.

    A kernel takes at least as long as its arithmetic does at the peak of its type, and as its bytes
    do at the bandwidth of its own working set (S. Williams, A. Waterman, D. Patterson, "Roofline",
    CACM 52, 2009):  t ≥ max(flops / peak, bytes / bandwidth).
    """

    file: str
    runtime: str
    batch: int
    runs: int
    ceilings: Ceilings
    kernels: tuple[Kernel, ...]

    def bound_ms(self, kernel: Kernel) -> float:
        """Return the least time that a kernel can take."""
        ceilings = self.ceilings
        arithmetic = kernel.flops / ceilings.peak(kernel.type) / 1e6
        return max(arithmetic, kernel.bytes / ceilings.bandwidth(kernel.bytes) / 1e6)

    def is_memory_bound(self, kernel: Kernel) -> bool:
        """Return whether its bytes, and not its arithmetic, set the least time."""
        return self.bound_ms(kernel) * 1e6 > kernel.flops / self.ceilings.peak(kernel.type)

    def achieved(self, kernel: Kernel) -> float:
        """Return the least time over the time taken: 1 is the ceiling."""
        return self.bound_ms(kernel) / kernel.milliseconds if kernel.milliseconds else 0.0

    def left_ms(self, kernel: Kernel) -> float:
        """Return what is left to win in a kernel."""
        return max(0.0, kernel.milliseconds - self.bound_ms(kernel))

    @property
    def ranked(self) -> tuple[Kernel, ...]:
        """Return the kernels, most to win first."""
        return tuple(sorted(self.kernels, key=self.left_ms, reverse=True))

    @property
    def total_ms(self) -> float:
        return sum(kernel.milliseconds for kernel in self.kernels)

    @property
    def least_ms(self) -> float:
        """Return the time of all kernels at their ceilings."""
        return sum(min(k.milliseconds, self.bound_ms(k)) for k in self.kernels)
