"""Files that are either whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from exporter.errors import OutputError

PARTIAL = ".partial"  # how the name of what a killed run may leave ends


def write_text(path: Path, text: str, *, partial: str = PARTIAL) -> None:
    """Write a file in one step: beside its name, and renamed. Raises `OutputError`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}{partial}")
    try:
        with beside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)
