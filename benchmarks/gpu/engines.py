"""Which targets TensorRT-RTX builds for here, what it says of each engine, and whether it runs."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from gpu.candidates import PRECISIONS, graph
from gpu.steps import Here, Skip


def targets() -> tuple[str, ...]:
    """Return this card, and each target that engines can be built for ahead of time."""
    from exporter.runtimes.tensorrt_rtx import CURRENT, TARGETS

    return (CURRENT, *TARGETS)


def build_for_targets(here: Here) -> list[dict[str, Any]]:
    """Return one row for each target and precision: built or refused, valid or not, run or not."""
    from exporter.errors import ExportError, with_hint
    from exporter.plugins import load_runtime
    from exporter.runtimes.tensorrt_rtx import TensorRtRtx

    rows: list[dict[str, Any]] = []
    for target in targets():
        runtime = load_runtime("tensorrt-rtx", {"targets": [target]})
        assert isinstance(runtime, TensorRtRtx)
        if reason := runtime.missing("build"):
            raise Skip(reason)
        folder = here.folder / f"engines-{target}"
        folder.mkdir()
        for precision in PRECISIONS:
            row: dict[str, Any] = {"target": target, "precision": precision}
            model = graph(here.folder, precision, here.settings["pixels"])
            try:
                start = perf_counter()
                path = runtime.build(model, folder)
                row |= {"seconds": perf_counter() - start, "bytes": path.stat().st_size}
                said, reasons = runtime.validity(path)
                row["validity"] = ", ".join((said, *reasons))
                row["ran"] = _run(runtime, path, model)
                path.unlink()
            except ExportError as error:
                row["refused"] = with_hint(error)
            rows.append(row)
            here.keep(rows)
    return rows


def _run(runtime: Any, path: Any, model: Any) -> str:
    """Return whether an engine gives numbers on this GPU, in words; the library has the say."""
    import numpy as np

    from exporter.errors import ExportError

    try:
        with runtime.open(path) as session:
            zeros = np.zeros((model.batch.min, *model.input.shape), np.float32)
            found = session({model.input.name: zeros})[model.output.name]
    except ExportError as error:
        return f"no: {error}"
    return "yes" if np.isfinite(found).all() else "no: its outputs are not finite"
