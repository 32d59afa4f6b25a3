"""Which files of a folder are images, and what their folders say of their class.

Either every folder in it is a class, its index that of its name among the sorted ones, as
torchvision's ImageFolder has it; or there are none, and no labels. Nothing is opened here.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from exporter.errors import InputRefused

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


class Listing(NamedTuple):
    """Paths within the folder, sorted; ``labels`` beside them and ``classes`` by index, or None."""

    names: list[str]
    labels: list[int] | None
    classes: list[str] | None
    notes: dict[str, int]


def list_images(folder: Path) -> Listing:
    """Return what there is to decode. Raises `InputRefused` if that is nothing, or two things."""
    notes: Counter[str] = Counter()
    top = _visible(folder, notes)
    folders = [e for e in top if _is_folder(e) and Path(e.name).suffix.lower() not in SUFFIXES]
    others = [e for e in top if e not in folders]
    images = [e for e in others if Path(e.name).suffix.lower() in SUFFIXES]
    if others and all(_is_folder(e) for e in images) and folders:
        folders, images = folders + images, []  # classes whose names look like files'
    if folders and images:
        raise InputRefused(
            f"{folder.name}: both images, as {_plain(images[0].name)}, and folders, as "
            f"{_plain(folders[0].name)}: neither classes nor one heap",
            hint="give a folder whose folders are the classes, or one of images alone",
        )
    if folders:
        notes.update({"not named as an image": len(others) - len(images)})
        found = _classes(folder, folders, notes)
    else:
        notes.update({"not named as an image": len(others) - len(images)})
        found = Listing(sorted(e.name for e in images), None, None, {})
    if not found.names:
        raise InputRefused(
            f"{folder.name}: no images in it",
            hint=f"their names end in {', '.join(sorted(SUFFIXES))}",
        )
    return found._replace(notes={what: count for what, count in notes.items() if count})


def _classes(folder: Path, folders: list[os.DirEntry[str]], notes: Counter[str]) -> Listing:
    names: list[str] = []
    labels: list[int] = []
    classes = sorted(entry.name for entry in folders)
    for index, kind in enumerate(classes):
        inside = _visible(folder / kind, notes)
        images = sorted(e.name for e in inside if Path(e.name).suffix.lower() in SUFFIXES)
        deeper = sorted(e.name for e in inside if e.name not in images and _is_folder(e))
        if deeper:
            raise InputRefused(
                f"{folder.name}: {_plain(f'{kind}/{deeper[0]}')} is a folder in a class's folder, "
                "and nothing says which of them are classes",
                hint="give the folder that holds the classes' folders, and move what lies deeper",
            )
        notes["not named as an image"] += len(inside) - len(images)
        notes["class without images"] += not images
        names += [f"{kind}/{name}" for name in images]
        labels += [index] * len(images)
    return Listing(names, labels, classes, {})


def _visible(folder: Path, notes: Counter[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            every = list(entries)
    except OSError as error:
        raise InputRefused(f"{folder.name}: {(error.strerror or str(error)).lower()}") from error
    shown = [entry for entry in every if not entry.name.startswith(".")]
    notes["hidden"] += len(every) - len(shown)
    return shown


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere
        return False


def order_doubt(classes: list[str]) -> tuple[str, ...]:
    """Return what to think of numbers as names: sorted by their characters, 10 is before 2."""
    if not all(name.isascii() and name.isdigit() for name in classes):
        return ()
    if classes == sorted(classes, key=int):
        return ()
    shown = ", ".join(classes[:3])
    return (
        f"the class folders are numbers, and labels follow their characters ({shown}, …), as "
        "torchvision has it",
    )


def _plain(name: str) -> str:
    return repr(name.encode(errors="surrogateescape").decode(errors="replace"))
