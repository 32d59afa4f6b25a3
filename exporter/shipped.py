"""A bundle as it lies there: its record, and whether its files are still those that were made."""

from __future__ import annotations

from pathlib import Path

from exporter.bundle import Manifest, read_manifest
from exporter.errors import InputRefused
from exporter.records import DataRecord, File, Report
from exporter.renderers import record


def read_bundle(folder: Path) -> tuple[Manifest, Report]:
    """Return a bundle's manifest and its record. Raises `InputRefused` if there is none."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputRefused(
            f"{str(folder)!r} is not a bundle: it has no readable manifest.json",
            hint="name the folder that --out named",
        )
    try:
        return manifest, record.parse((folder / "report.json").read_bytes())
    except OSError as error:
        raise InputRefused(f"{folder.name}/report.json: {error.strerror}") from error
    except InputRefused as error:
        raise InputRefused(f"{folder.name}/report.json: {error}") from error


def is_intact(file: File, folder: Path) -> bool:
    """Return whether a file of the manifest is there, and what it was."""
    path = folder / file.name
    return path.is_file() and File.of(path, folder) == file


def intact_file(manifest: Manifest, name: str, folder: Path) -> File:
    """Return a file of the bundle. Raises `InputRefused` unless it is there, and what it was."""
    file = next((file for file in manifest.files if file.name == name), None)
    if file is None:
        raise InputRefused(f"{folder.name}/{name}: the manifest does not list this file")
    if not (folder / name).is_file():
        raise InputRefused(f"{folder.name}/{name}: the bundle lacks this file")
    if not is_intact(file, folder):
        raise InputRefused(
            f"{folder.name}/{name} is not the file that the manifest lists",
            hint="export it anew",
        )
    return file


def check_data(found: DataRecord | None, before: DataRecord | None) -> None:
    """Raise `InputRefused` unless the samples are those that the bundle was judged on."""
    now, then = (
        f"{data.held_out} of the {data.samples} samples of {data.name!r}, SHA-256 "
        f"{data.sha256[:12]}…"
        if data
        else "the network's own samples"
        for data in (found, before)
    )
    if now != then:
        raise InputRefused(
            f"the bundle was judged on {then}, and this would be on {now}",
            hint="give the same with --data" if before else "leave out --data",
        )
