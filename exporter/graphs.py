"""The graphs that were asked for: the FP32 one, and then in every precision of a job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.axes import grows_with_size
from exporter.calibration import calibrate, convergence
from exporter.contracts import Converted, Precision, Progress
from exporter.errors import GraphError
from exporter.job import Job
from exporter.records import Array, OnnxModel
from exporter.samples import feeds
from exporter.start import FoldedStart
from exporter.topk import with_top_k

if TYPE_CHECKING:
    import onnx


def export_source(job: Job, folded: FoldedStart, path: Path) -> OnnxModel:
    """Write what was folded to ``path`` as the FP32 graph. Raises `GraphError`."""
    return folded.write(
        path,
        inputs=job.input_specs,
        outputs=job.output_specs,
        batch=job.profile.batch,
        opset=job.profile.opset,
    )


def as_shipped(job: Job, graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph as its artefacts are made of it: with a top-k behind it if one is asked for.

    It is put there once the graph is in its precision, so that no precision touches its labels.
    """
    return graph if job.top is None else with_top_k(graph, job.top)


def convert_all(job: Job, graph: onnx.ModelProto) -> Iterator[tuple[str, Converted | GraphError]]:
    """Yield each precision's name and graph, or why there is none; ``graph`` is left as it was.

    ``graph`` is the FP32 one, and those that come back are `as_shipped`. Calibration runs once,
    before the first precision that needs it.
    """
    statistics: Mapping[str, Any] = {}
    grows = grows_with_size(graph)
    for name, precision in job.precisions.items():
        try:
            if precision.needs_calibration and grows:
                raise GraphError(
                    f"{grows!r} sums over height and width, so that its values grow with the "
                    f"picture, and {name} takes its ranges from one size",
                    hint="take the mean in its place, leave out [size], or export fp32",
                )
            if precision.needs_calibration and not statistics:
                statistics = statistics_of(job, graph)
            samples = job.held_out.inputs[:0] if job.calibration is None else job.calibration.inputs
            with job.stages.quietly(f"{name}: convert"):
                made = convert(name, precision, graph, statistics, samples, progress=job.stage)
                shipped = made._replace(model=as_shipped(job, made.model))
        except GraphError as error:
            yield name, error
        else:
            yield name, shipped


def statistics_of(job: Job, graph: onnx.ModelProto) -> Mapping[str, Any]:
    """Return what one pass of the FP32 graph over the calibration samples sees, as a stage."""
    assert job.calibration is not None  # Job.resolve saw to it
    inputs = job.calibration.inputs
    with job.stage(f"calibrate on {len(inputs)} samples", len(inputs)) as advance:
        found = calibrate(graph, feeds(inputs, job.input_specs, size=1), advance=advance)
        job.calibrated = convergence(found)
    return found


def convert(
    name: str,
    precision: Precision,
    graph: onnx.ModelProto,
    statistics: Mapping[str, Any],
    samples: Array,
    *,
    progress: Progress,
) -> Converted:
    """Return the graph in one precision, known to be valid. Raises `GraphError`."""
    import onnx

    converted = precision.convert(graph, statistics, samples, progress=progress)
    try:
        onnx.checker.check_model(converted.model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the {name} graph is not valid ONNX: {error}") from error
    return converted
