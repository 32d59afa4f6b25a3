"""The data of one's own that figures come from, as lines of a list."""

from __future__ import annotations

from collections.abc import Iterator

from exporter.records import DataRecord

_SHOWN = 20


def data_lines(found: DataRecord | None) -> Iterator[str]:
    """Yield what was used, done and left out; nothing for built-in data."""
    if found is None:
        return
    labels = "no labels" if found.classes is None else f"labels of {found.classes} classes"
    yield (
        f"data: {found.name}, {found.kind}: {found.samples:,} samples, {labels}; "
        f"{found.held_out:,} judged on, {found.for_calibration:,} for calibration; SHA-256 "
        f"{found.sha256}"
    )
    yield f"preprocessing: {found.preprocessing}"
    if found.notes:
        yield "of the files: " + ", ".join(f"{n:,} {what}" for what, n in found.notes.items())
    for one in found.unfit[:_SHOWN]:
        yield f"left out: {one.name}: {one.reason}"
    if len(found.unfit) > _SHOWN:
        yield f"left out: {len(found.unfit) - _SHOWN} more, in report.json"
