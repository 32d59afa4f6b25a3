"""Which samples scales are calibrated on: somebody's own, or a draw that content decides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from exporter import samples
from exporter.data.held import as_array, is_array
from exporter.data.sets import BuiltIn, Data, DataSet, Part, needs_several, open_data
from exporter.digests import digests
from exporter.errors import InputRefused
from exporter.packing import unpack
from exporter.profile import Profile
from exporter.records import TensorSpec
from exporter.samples import Samples

_USUAL = 256  # samples that show on which scale the others are


def choose_calibration(
    given: Data | None,
    judged: DataSet,
    model_data: str,
    inputs: Sequence[TensorSpec],
    output: TensorSpec | None,
    profile: Profile,
) -> Part:
    """Return the samples that set the scales.

    Of one array or an ``.npy`` file that is ``given`` all are taken, of other data as many as the
    profile says, and without any as many of what is ``judged`` on other samples of. Raises
    `InputRefused` if they are too few, or nothing that scales can be taken from.
    """
    if given is None:
        return _draw(judged, inputs, profile)
    path = Path(given) if isinstance(given, Path | str) else None
    if not (path.suffix.lower() == ".npy" if path else is_array(given)):
        own = open_data(given, model_data, inputs, output, profile, whole="train")
        part = _draw(own, inputs, profile)
        origin = path.name if path else part.samples.origin
        samples.check_scale(part.samples.inputs, _others(judged), origin=origin)
        return part
    origin = path.name if path else "the given array"
    array = samples.load_array(path) if path else as_array(given)
    if len(inputs) > 1:
        raise needs_several(origin, inputs)
    samples.check_calibration(array, inputs[0], origin=origin)
    samples.check_scale(array, _others(judged), origin=origin)
    digest = hashlib.sha256(array.tobytes()).hexdigest()[:12]
    found = Samples(array, None, f"{len(array)} samples of {origin}, SHA-256 {digest}…")
    return Part(found, tuple(digests(array)), "inputs")


def _others(judged: DataSet) -> Samples:
    """Return samples that are on the network's scale."""
    if isinstance(judged, BuiltIn):
        return judged.load("train")
    found = judged.load("held-out")
    return found._replace(inputs=found.inputs[:_USUAL])


def _draw(data: DataSet, inputs: Sequence[TensorSpec], profile: Profile) -> Part:
    """Return so many samples for calibration: of built-in ones by position, else by content."""
    wanted = profile.calibration
    if isinstance(data, BuiltIn):
        drawn = samples.draw(data.load("train"), count=wanted.images, seed=wanted.seed)
        return Part(drawn, tuple(digests(drawn.inputs)), "inputs")
    part = data.part("train")
    have = len(part.digests)
    if wanted.images > have:
        raise InputRefused(
            f"calibration asks for {wanted.images} samples, and {data.gathered.name} has {have} "
            "for it",
            hint=f"calibration.images may be at most {have}; data.held_out says how many are kept "
            "for judging, or give calibration data of their own with --calibration",
        )
    chosen = by_content(part.digests, wanted.seed)[: wanted.images]
    rows = part.samples.inputs[chosen]
    for spec, values in zip(inputs, unpack(rows, inputs).values(), strict=True):
        samples.check_calibration(values, spec, origin=_of(data.gathered.name, spec, inputs))
    origin = (
        f"{len(chosen)} of the {part.samples.origin}, SHA-256 {data.record.sha256[:12]}…, seed "
        f"{wanted.seed}"
    )
    return Part(
        Samples(rows, None, origin), tuple(part.digests[index] for index in chosen), part.by
    )


def _of(name: str, spec: TensorSpec, inputs: Sequence[TensorSpec]) -> str:
    return name if len(inputs) == 1 else f"{name}: {spec.name!r}"


def by_content(found: tuple[str, ...], seed: int) -> list[int]:
    """Return samples' numbers in an order that a seed and their digests decide, and no names."""
    keys = [hashlib.sha256(f"{seed} {digest}".encode("ascii")).digest() for digest in found]
    return sorted(range(len(found)), key=lambda index: (keys[index], index))
