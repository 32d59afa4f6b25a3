"""Export convolutional networks, and prove that the export still computes the same thing.

    import exporter
    from pathlib import Path

    report = exporter.run("resnet18", exporter.load_profile("default"), Path("build"))
    report.raise_for_parity()
    exporter.check_bundle(Path("build")).raise_for_parity()
    exporter.bench_bundles([Path("build")])

A module that a program holds, say in a notebook, in one call:

    exporter.export(module, torch.zeros(1, 3, 224, 224), data=(images, labels))

Or stage by stage, each a function: `fold_batchnorm`, `export_onnx`, `calibrate`, a precision's
``convert``, a runtime's ``build`` and ``open``, `collect_outputs`, `compare_outputs`,
`measure_latency`, `count_flops`. And beside it: `compare_networks`, `check_claims`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from exporter.version import __version__

if TYPE_CHECKING:
    from exporter.bench import bench_bundles
    from exporter.calibration import calibrate
    from exporter.claims import check_claims
    from exporter.compare import compare_networks
    from exporter.errors import ExportError, ParityError
    from exporter.factories import load_factory
    from exporter.flops import count_flops, count_module
    from exporter.fold import fold_batchnorm
    from exporter.latency import measure_latency
    from exporter.notebook import Exported, export
    from exporter.parity import collect_outputs, compare_outputs
    from exporter.pipeline import run
    from exporter.plugins import load_model, load_precision, load_runtime
    from exporter.profile import Profile, load_profile
    from exporter.recheck import check_bundle
    from exporter.records import (
        BatchRange,
        BenchAsked,
        Budget,
        FreeAxis,
        OnnxModel,
        Report,
        TensorSpec,
        Timing,
        Tolerance,
    )
    from exporter.reference import TorchSession
    from exporter.to_onnx import export_onnx
    from exporter.tune import tune_model
    from exporter.weights import WeightsFile, load_weights
    from exporter.worst_case import Search

# Where each public name lives. It is loaded on first use, so `import exporter` is instant.
_HOME = {
    "BatchRange": "records",
    "BenchAsked": "records",
    "Budget": "records",
    "ExportError": "errors",
    "Exported": "notebook",
    "FreeAxis": "records",
    "OnnxModel": "records",
    "ParityError": "errors",
    "Profile": "profile",
    "Report": "records",
    "Search": "worst_case",
    "TensorSpec": "records",
    "Timing": "records",
    "Tolerance": "records",
    "TorchSession": "reference",
    "WeightsFile": "weights",
    "bench_bundles": "bench",
    "calibrate": "calibration",
    "check_bundle": "recheck",
    "check_claims": "claims",
    "collect_outputs": "parity",
    "compare_networks": "compare",
    "compare_outputs": "parity",
    "count_flops": "flops",
    "count_module": "flops",
    "export": "notebook",
    "export_onnx": "to_onnx",
    "fold_batchnorm": "fold",
    "load_factory": "factories",
    "load_model": "plugins",
    "load_precision": "plugins",
    "load_profile": "profile",
    "load_runtime": "plugins",
    "load_weights": "weights",
    "measure_latency": "latency",
    "run": "pipeline",
    "tune_model": "tune",
}

__all__ = [
    "BatchRange",
    "BenchAsked",
    "Budget",
    "ExportError",
    "Exported",
    "FreeAxis",
    "OnnxModel",
    "ParityError",
    "Profile",
    "Report",
    "Search",
    "TensorSpec",
    "Timing",
    "Tolerance",
    "TorchSession",
    "WeightsFile",
    "__version__",
    "bench_bundles",
    "calibrate",
    "check_bundle",
    "check_claims",
    "collect_outputs",
    "compare_networks",
    "compare_outputs",
    "count_flops",
    "count_module",
    "export",
    "export_onnx",
    "fold_batchnorm",
    "load_factory",
    "load_model",
    "load_precision",
    "load_profile",
    "load_runtime",
    "load_weights",
    "measure_latency",
    "run",
    "tune_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'exporter' has no attribute {name!r}")
    value = getattr(import_module(f"exporter.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
