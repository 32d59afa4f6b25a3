"""A data set in its two splits: which sample is in which follows from its content alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias

from exporter import samples
from exporter.data.arrays import Asked, gather_npy, gather_npz, gather_safetensors
from exporter.data.factory import gather_made
from exporter.data.gathered import By, Gathered
from exporter.data.held import Items, gather_held
from exporter.data.pictures import as_taken, gather_images
from exporter.digests import digests as digests_of
from exporter.errors import InputRefused
from exporter.given_code import is_code
from exporter.profile import Profile
from exporter.records import DataRecord, Preprocess, TensorSpec
from exporter.samples import SPLITS, Samples, Split, load_split, pixels

KINDS = "digits, a folder of images, .npy, .npz, .safetensors, or module:factory"
_FEWEST = 2  # held-out samples: one alone shows nothing
_FILES = {".npy": gather_npy, ".npz": gather_npz, ".safetensors": gather_safetensors}


@dataclass(frozen=True, slots=True)
class Part:
    """Samples and what tells each apart."""

    samples: Samples
    digests: tuple[str, ...]
    by: By


class BuiltIn:
    """A model's own samples, in the splits that they have."""

    record = None

    def __init__(self, name: str, shape: tuple[int, ...], preprocess: Preprocess) -> None:
        self._name = name
        self._shape = preprocess.channels_first(shape)
        self._preprocess = preprocess

    def load(self, split: Split) -> Samples:
        """Return one split. Raises `UnknownName`, `InputRefused`."""
        import numpy as np

        found = load_split(self._name, self._shape, split)
        if self._preprocess.fuse is None:
            return found
        taken = as_taken(np.moveaxis(pixels(found.inputs), 1, -1), self._preprocess)
        return found._replace(inputs=taken, origin=f"{found.origin} as pixels")

    def part(self, split: Split) -> Part:
        """Return one split, with what tells its samples apart."""
        found = self.load(split)
        return Part(found, tuple(digests_of(found.inputs)), "inputs")


@dataclass(frozen=True, slots=True)
class Given:
    """Data that a user gave, split by content."""

    gathered: Gathered
    record: DataRecord
    numbers: dict[Split, list[int]]

    def load(self, split: Split) -> Samples:
        """Return one split, which may be empty."""
        return self.part(split).samples

    def part(self, split: Split) -> Part:
        """Return one split, with what tells its samples apart."""
        import numpy as np

        chosen = np.array(self.numbers[split], np.int64)
        found, name = self.gathered, f"{len(chosen)} {split} samples of {self.gathered.name}"
        labels = None if found.labels is None else found.labels[chosen]
        kept = Samples(found.samples.part(chosen), labels, name)
        return Part(kept, tuple(found.digests[index] for index in chosen), found.by)


DataSet = BuiltIn | Given
Data: TypeAlias = Path | str | Items


def is_built_in(given: Data) -> bool:
    """Return whether data are words for samples that come with the package."""
    return isinstance(given, Path | str) and str(given) in SPLITS


def open_data(
    given: Data | None,
    model_data: str,
    inputs: Sequence[TensorSpec],
    output: TensorSpec | None,
    profile: Profile,
    *,
    whole: Split | None = None,
) -> DataSet:
    """Return the data that words name or a program holds, or the model's own.

    ``output`` is the classification that labels are of, None where there is none, and ``whole`` the
    split that all samples go to, where they are not to be divided. Raises
    `InputRefused` for data that cannot be read, or do not fit the network's input and classes.
    """
    if given is None or is_built_in(given):
        if len(inputs) > 1:
            raise needs_several(str(given or "the built-in digits"), inputs)
        own = given is None or (str(given) == "digits" and model_data in SPLITS)
        return BuiltIn(model_data if own else str(given), inputs[0].shape, profile.preprocess)
    gathered = gather(given, inputs, output, profile)
    numbers = divide(gathered.digests, profile.data.held_out)
    if whole:
        numbers = {"train": [], "held-out": []}
        numbers[whole] = list(range(len(gathered.digests)))
    elif len(numbers["held-out"]) < _FEWEST:
        raise InputRefused(
            f"{gathered.name}: of {len(gathered.digests)} samples {len(numbers['held-out'])} would "
            "be held out, and fewer than 2 show nothing",
            hint="give more, raise data.held_out, or give calibration data of their own",
        )
    return Given(gathered, _record(gathered, numbers), numbers)


def gather(
    given: Data, inputs: Sequence[TensorSpec], output: TensorSpec | None, profile: Profile
) -> Gathered:
    """Return the samples that words name or a program holds, undivided. Raises `InputRefused`."""
    classes = None if output is None else prod(output.shape)
    asked = Asked(tuple(inputs), classes, profile.preprocess)
    if not isinstance(given, Path | str):
        return gather_held(given, asked)
    words = str(given)
    path = Path(os.path.abspath(words))  # noqa: PTH100 - its name, and resolve() would follow a link
    if is_code(words):
        return gather_made(words, asked)
    if path.is_dir():
        if len(inputs) > 1:
            raise needs_several(path.name, inputs)
        shape = profile.preprocess.channels_first(inputs[0].shape)
        found = gather_images(path, shape, profile.preprocess, profile.data)
        if classes is not None and found.classes not in (None, classes):
            raise InputRefused(
                f"{found.name}: {found.classes} class folders, and the network has "
                f"{classes} outputs",
                hint="give one folder for each class, or a folder of images alone",
            )
        return found
    if path.suffix.lower() in _FILES and path.is_file():
        return _FILES[path.suffix.lower()](path, asked)
    if path.exists():
        raise InputRefused(f"{path.name}: no data that can be read", hint=f"known: {KINDS}")
    raise InputRefused(f"{path.name}: no such file or folder", hint=f"known: {KINDS}")


def needs_several(what: str, inputs: Sequence[TensorSpec]) -> InputRefused:
    """Return why data of one input are not enough, and which are."""
    names = ", ".join(spec.name for spec in inputs)
    return InputRefused(
        f"{what}: samples of one input, and the network takes {len(inputs)}: {names}",
        hint="give --data an .npz or .safetensors file with an array for each, or code that makes "
        "a dict of them",
    )


def divide(digests: Sequence[str], held_out: float) -> dict[Split, list[int]]:
    """Return which samples are in which split, by their digests alone."""
    numbers: dict[Split, list[int]] = {"train": [], "held-out": []}
    for index, digest in enumerate(digests):
        below = int(digest[:13], 16) < held_out * 16**13  # 52 bits: exact in float64
        numbers["held-out" if below else "train"].append(index)
    return numbers


def shared_samples(some: Part, others: Part) -> tuple[int, ...]:
    """Return which of some samples are among the others.

    By their pixels where both are images, and else byte for byte as the network takes them.
    """
    if some.by == others.by:
        known = set(others.digests)
        return tuple(index for index, digest in enumerate(some.digests) if digest in known)
    return samples.overlap(some.samples.inputs, others.samples.inputs)


def _record(found: Gathered, numbers: dict[Split, list[int]]) -> DataRecord:
    return DataRecord(
        kind=found.kind,
        name=found.name,
        samples=len(found.digests),
        held_out=len(numbers["held-out"]),
        for_calibration=len(numbers["train"]),
        sha256=found.sha256(),
        classes=found.classes,
        preprocessing=found.preprocessing,
        unfit=found.unfit,
        notes=found.notes,
        doubts=(*found.repeated(), *found.doubts),
    )
