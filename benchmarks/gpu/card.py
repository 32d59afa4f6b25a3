"""The card, its driver, and what is installed beside it."""

from __future__ import annotations

from typing import Any

from gpu.steps import Here


def look(here: Here) -> dict[str, Any]:
    """Return what figures of this run were taken on."""
    from exporter.environment import capture
    from exporter.runtimes._cuda import compute_capability, device_name

    found: dict[str, Any] = {
        "name": device_name(),
        "compute capability": compute_capability(),
        "environment": capture(),
    }
    here.keep(found)
    found |= _by_nvml()
    here.keep(found)
    return found | _by_torch()


def _by_nvml() -> dict[str, Any]:
    try:
        from cuda.bindings import nvml
    except ImportError as error:
        return {"NVML": f"not asked: {error}"}
    nvml.init_v2()
    try:
        gpu = nvml.device_get_handle_by_index_v2(0)
        return {
            "driver": str(nvml.system_get_driver_version()),
            "power limit, W": nvml.device_get_enforced_power_limit(gpu) / 1000,
            "most SM clock, MHz": int(nvml.device_get_max_clock_info(gpu, 1)),
        }
    except Exception as error:  # NVML has a class of its own for each thing that it cannot tell
        return {"NVML": f"told not all: {error}"}
    finally:
        nvml.shutdown()


def _by_torch() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"PyTorch": f"not asked: {error}"}
    if not torch.cuda.is_available():
        return {"PyTorch": f"{torch.__version__} cannot use this GPU"}
    seen = torch.cuda.get_device_properties(0)
    return {
        "CUDA of PyTorch": torch.version.cuda,
        "cuDNN of PyTorch": torch.backends.cudnn.version(),
        "multiprocessors": seen.multi_processor_count,
        "memory, bytes": seen.total_memory,
    }
