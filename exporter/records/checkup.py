"""Checkup: what a machine has, and what each runtime did on it when it was tried."""

from __future__ import annotations

from exporter.records.base import Found


class Trial(Found, frozen=True):
    """One precision of a small network in one runtime: the layers' types, or why there are none.

    ``asked`` and ``ran`` are how many weighted layers ask for fewer bits than 32, and how many of
    them ran so; both are 0 for FP32. ``reason`` is the first layer's that did not.
    """

    precision: str
    asked: int = 0
    ran: int = 0
    reason: str | None = None
    refused: str | None = None


class Checkup(Found, frozen=True):
    """A runtime on this machine. What it lacks to build and to run is None where it lacks nothing.

    ``device`` is what a session really got, and ``error`` how far its answer was from float64, as
    relative L2; both None where nothing was run. ``failed`` says why it could not be run although
    nothing seemed to be missing.
    """

    runtime: str
    version: str | None
    device: str | None
    build: str | None
    run: str | None
    error: float | None = None
    failed: str | None = None
    trials: tuple[Trial, ...] = ()
    remedy: str | None = None

    @property
    def ready(self) -> bool:
        return self.run is None and self.failed is None


class Diagnosis(Found, frozen=True):
    """The machine, and every runtime on it.

    ``native`` are the precisions that the CPU has instructions for, and which those are.
    """

    tool: str
    cpu: str
    cores: int
    native: dict[str, tuple[str, ...]]
    runtimes: tuple[Checkup, ...]
