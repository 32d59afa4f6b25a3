"""What a GPU's own sensors say: clocks, temperature, power, and what holds it back.

Asked through NVML, by NVIDIA's cuda-python bindings, between timed runs and never in one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from exporter.records import Gpu
from exporter.runtimes._cuda import missing_gpu

# nvmlClocksEventReasons: of those, what slows a GPU that has work to do.
_SLOWS = {
    0x4: "its power limit",
    0x8: "a slowdown by hardware",
    0x10: "sync boost",
    0x20: "its temperature, by software",
    0x40: "its temperature, by hardware",
    0x80: "the power brake",
}
_SM, _MEMORY, _DIE = 1, 2, 0  # nvmlClockType, nvmlTemperatureSensors


class Reading(NamedTuple):
    """One look at the sensors."""

    sm_mhz: int
    memory_mhz: int
    celsius: int
    watts: float
    reasons: int


@dataclass(slots=True)
class Sensors:
    """The sensors of the first GPU, and what was read of them so far."""

    nvml: Any
    handle: Any
    readings: list[Reading] = field(default_factory=list)

    @classmethod
    def open(cls) -> Sensors | None:
        """Return them, or None without a GPU or the bindings."""
        if missing_gpu():
            return None
        try:
            from cuda.bindings import nvml
        except ImportError:
            return None
        nvml.init_v2()
        return cls(nvml, nvml.device_get_handle_by_index_v2(0))

    def read(self) -> None:
        """Look once."""
        nvml, gpu = self.nvml, self.handle
        self.readings.append(
            Reading(
                int(nvml.device_get_clock_info(gpu, _SM)),
                int(nvml.device_get_clock_info(gpu, _MEMORY)),
                int(nvml.device_get_temperature_v(gpu, _DIE)),
                nvml.device_get_power_usage(gpu) / 1000,
                int(nvml.device_get_current_clocks_event_reasons(gpu)),
            )
        )

    def close(self) -> Gpu | None:
        """Return what was read, None if nothing was, and let go of the library."""
        name = str(self.nvml.device_get_name(self.handle))
        self.nvml.shutdown()
        if not self.readings:
            return None
        sm, memory, celsius, watts, reasons = zip(*self.readings, strict=True)
        return Gpu(
            name=name,
            readings=len(self.readings),
            sm_mhz=(min(sm), max(sm)),
            memory_mhz=(min(memory), max(memory)),
            celsius=(min(celsius), max(celsius)),
            watts=(min(watts), max(watts)),
            slowed={
                why: count
                for bit, why in _SLOWS.items()
                if (count := sum(bool(seen & bit) for seen in reasons))
            },
        )
