"""What quantising did, as rows: what each repair brought, and what each tensor came to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exporter.records import Quantised, Repair, Report, Variant
from exporter.renderers import _figures as figures

REPAIRS = ("precision", "step", "SQNR so far", "kept", "detail")
TENSORS = (
    *("", "read by", "largest", "scale", "saturated", "dead channels", "SQNR"),
    "part in the output's error",
)


def quantised(report: Report) -> list[Variant]:
    """Return the precisions that were quantised with a plan."""
    return [variant for variant in report.variants if variant.tensors]


def repairs(report: Report) -> Iterator[Sequence[str]]:
    """Yield a row for each step of each precision."""
    for variant in report.variants:
        for step in variant.repairs:
            yield _repair(variant.precision, step)


def tensors(variant: Variant) -> Iterator[Sequence[str]]:
    """Yield a row for each tensor and each layer's weights, the costliest first."""
    for tensor in sorted(variant.tensors, key=lambda tensor: -tensor.share):
        yield _tensor(tensor)


def _repair(precision: str, step: Repair) -> Sequence[str]:
    said = "not tried" if step.sqnr_db is None else figures.decibels(step.sqnr_db)
    return precision, step.name, said, "yes" if step.kept else "no", step.detail or ""


def _tensor(tensor: Quantised) -> Sequence[str]:
    return (
        tensor.name,
        ", ".join(tensor.layers) if not tensor.is_weights else "weights",
        f"{tensor.largest:.4g}",
        f"{tensor.scale:.3g}",
        "" if tensor.is_weights else f"{tensor.saturated:.2g}",
        str(tensor.dead) if tensor.dead else "",
        figures.decibels(tensor.sqnr_db),
        f"{tensor.share:.1%}",
    )
