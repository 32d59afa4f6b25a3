"""TensorRT-RTX: engines for Turing to Blackwell cards, built on any machine, GPU or not."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from exporter.contracts import Action
from exporter.errors import BuildError, UnknownName
from exporter.runtimes._cuda import compute_capability, missing_gpu, missing_to_run
from exporter.runtimes._graph import float32_products, has_float8, is_quantised
from exporter.runtimes._trt import TensorRt, listen

if TYPE_CHECKING:
    import onnx

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
WITH_FP8 = ("sm89", "sm120", "sm121")
CURRENT = "current"


class Validity(NamedTuple):
    """What the library says of an engine's header on this machine, and the reasons that it has.

    ``said`` is valid, suboptimal, or invalid; without a GPU it is invalid for no reason at all.
    """

    said: str
    reasons: tuple[str, ...]


class TensorRtRtx(TensorRt, frozen=True):
    """TensorRT-RTX, ahead of time: one engine for all ``targets``.

    ``targets`` are compute capabilities (sm75, sm80, sm86, sm89, sm120, sm121), or ``"current"``
    alone for the GPU in this machine.
    """

    targets: tuple[str, ...] = ("sm80", "sm86", "sm89", "sm120")

    package: ClassVar[str] = "tensorrt_rtx"

    def __post_init__(self) -> None:
        TensorRt.__post_init__(self)
        if not self.targets:
            raise ValueError(f"targets is empty: name some of {', '.join((*TARGETS, CURRENT))}")
        for target in self.targets:
            if target not in (*TARGETS, CURRENT):
                raise UnknownName("target", target, (*TARGETS, CURRENT))
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets names one twice: {', '.join(self.targets)}")
        if CURRENT in self.targets and len(self.targets) > 1:
            raise ValueError(f'targets: "{CURRENT}" stands alone, found {", ".join(self.targets)}')

    def missing(self, action: Action) -> str | None:
        """Return what is missing: to build, a GPU only for ``current``; to run, one of a target."""
        if reason := self._missing_package():
            return reason
        if action == "build" and CURRENT not in self.targets:
            return None
        if reason := missing_gpu() if action == "build" else missing_to_run():
            return reason
        here = compute_capability()
        if CURRENT in self.targets or here in self.targets:
            return None
        return f"the NVIDIA GPU here is {here}, and not a target"

    def refuse(self, graph: onnx.GraphProto, name: str) -> None:
        """Raise `BuildError` for a graph that the library would refuse, or spoil in silence."""
        without = [target for target in self.targets if target not in (*WITH_FP8, CURRENT)]
        if without and has_float8(graph):
            raise BuildError(
                f"{name}: FP8 does not exist on {', '.join(without)}, and one engine serves all "
                "targets",
                hint=f"choose among {', '.join(WITH_FP8)}, say --target sm89,sm120, or use the "
                "profile 'ada'",
            )
        if "sm75" not in self.targets:
            return
        if is_quantised(graph) and len(self.targets) > 1:
            raise BuildError(
                f"{name}: with sm75 among the targets, TensorRT-RTX turns INT8 activations off for "
                "all of them",
                hint="build sm75 in a run of its own",
            )
        if products := float32_products(graph):
            raise BuildError(
                f"{name}: TensorRT-RTX has no FP32 matrix multiply for sm75 ({products[0]!r})",
                hint="leave sm75 out of this precision's targets, or export fp16",
            )

    def validity(self, path: Path) -> Validity:
        """Ask the library whether an engine can run on this machine; it reads the header alone."""
        trt = import_module(self.package)
        said = listen(trt)
        runtime = trt.Runtime(said.logger)
        with path.open("rb") as file:
            found, reasons = runtime.get_engine_validity(file.read(runtime.engine_header_size))
        known = trt.EngineInvalidityDiagnostics.__members__
        told = [name.lower().replace("_", " ") for name, bit in known.items() if reasons & int(bit)]
        return Validity(found.name.lower(), tuple(told))


PLUGIN = TensorRtRtx
