"""Inputs: real scans with labels, seeded noise, and a user's own arrays for calibration.

The real data are scikit-learn's bundled handwritten digits: 1,797 scans of 8×8 pixels with 17 grey
levels (E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998). They are
split once and for all: 360 are held out for evaluation, 1,437 are for training, and calibration is
drawn from the training split alone. A pixel p in 0..16 becomes (p/16 − mean) / std, with mean and
std those of the training split, and is upsampled bilinearly to the network's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from exporter.digests import digests
from exporter.errors import ExportError, InputRefused, UnknownName
from exporter.packing import unpack
from exporter.records import LEAST_IMAGES, Array, Feed, TensorSpec

Split: TypeAlias = Literal["train", "held-out"]

HELD_OUT = 360
MOST = 1797
MEAN, STD = 0.3056, 0.3763
FEW, FEW_NOISE = 8, 4  # that fidelity is judged on: it is a figure of many values each
VARIED = 4  # batches that a timing takes in turn
_ANOTHER_SCALE = 8.0


class Samples(NamedTuple):
    """``inputs`` (N, C, H, W) float32, ``labels`` (N,) int64 or None, and where they come from."""

    inputs: Array
    labels: Array | None
    origin: str


def digits(shape: tuple[int, ...], split: Split) -> Samples:
    """Return one split of the digits, upsampled to ``shape`` = (1, H, W).

    Raises `InputRefused` for another number of channels.
    """
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    channels, *size = shape
    if channels != 1:
        raise InputRefused(f"the digits have 1 channel, and the input asks for {channels}")
    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))  # a stream numpy never changes
    chosen = order[:HELD_OUT] if split == "held-out" else order[HELD_OUT:]
    small = torch.from_numpy(bunch.images[chosen].astype(np.float32) / 16)[:, None]
    large = torch.nn.functional.interpolate(small, size=size, mode="bilinear", align_corners=False)
    origin = f"{len(chosen)} {split} digits"
    return Samples(((large - MEAN) / STD).numpy(), bunch.target[chosen].astype(np.int64), origin)


def repeated_digits(shape: tuple[int, ...], split: Split) -> Samples:
    """Return one split of the digits with every channel the same, for ``shape`` = (C, H, W)."""
    channels, *size = shape
    grey = digits((1, *size), split)
    origin = f"{grey.origin} in {channels} channels"
    return Samples(grey.inputs.repeat(channels, axis=1), grey.labels, origin)


def fitting(channels: int) -> str:
    """Return the name of the samples for a network that takes so many channels, and has none."""
    return "digits" if channels == 1 else "repeated-digits"


def fitting_all(inputs: Sequence[TensorSpec]) -> str:
    """Return the same for a network of these inputs: `NO_DATA` for several, which none fit."""
    return fitting(inputs[0].shape[0]) if len(inputs) == 1 else NO_DATA


NO_DATA = ""  # a model's own, where it has none
SPLITS = {"digits": digits, "repeated-digits": repeated_digits}


def load_split(data: str, shape: tuple[int, ...], split: Split) -> Samples:
    """Return a split of a model's own samples, by the name it gives. Raises `UnknownName`."""
    if data not in SPLITS:
        raise UnknownName("data set", data, SPLITS)
    return SPLITS[data](shape, split)


def pixels(inputs: Array) -> Array:
    """Return digits as what they were made from: pixels of 0 to 255, rounded to uint8."""
    import numpy as np

    return np.rint((inputs * STD + MEAN) * 255).clip(0, 255).astype(np.uint8)


def noise(shape: tuple[int, ...], *, count: int, seed: int, dtype: str = "float32") -> Array:
    """Return ``count`` samples of noise, (count, *shape), from a seed.

    It is unit-normal in float32, and of all values alike in uint8.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    if dtype == "uint8":
        return generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    return generator.standard_normal((count, *shape), dtype=np.float32)


def draw(samples: Samples, *, count: int, seed: int) -> Samples:
    """Return ``count`` of the samples, drawn without replacement from a seed.

    Raises `InputRefused` if there are fewer.
    """
    import numpy as np

    have = len(samples.inputs)
    if count > have:
        raise InputRefused(
            f"calibration asks for {count} images, and the {samples.origin} are only {have}",
            hint=f"calibration.images may be at most {have}",
        )
    chosen = np.random.RandomState(seed).permutation(have)[:count]
    origin = f"{count} of the {samples.origin}, seed {seed}"
    labels = None if samples.labels is None else samples.labels[chosen]
    return Samples(samples.inputs[chosen], labels, origin)


def load_array(path: Path) -> Array:
    """Return the array in a ``.npy`` file. Raises `InputRefused`; pickled objects never load."""
    import numpy as np

    try:
        with path.open("rb") as stream:
            loaded: object = np.load(stream, allow_pickle=False)
            if not isinstance(loaded, np.ndarray):
                raise InputRefused(f"{path.name}: an .npz archive, where one .npy array is needed")
    except FileNotFoundError as error:
        raise InputRefused(f"{path.name}: no such file") from error
    except ExportError:
        raise
    except Exception as error:  # a damaged header takes numpy to tokenize, zipfile and malloc
        raise InputRefused(
            f"{path.name}: not a readable .npy array of numbers",
            hint="write it with numpy.save(path, array)",
        ) from error
    return loaded


def check_calibration(array: Array, spec: TensorSpec, *, origin: str) -> Array:
    """Return the array if scales can be taken from it; ``origin`` says whose it is in errors.

    Raises `InputRefused` if it is of another shape or type than (N, *spec.shape) float32, not
    finite, constant, or of fewer than `LEAST_IMAGES` samples that differ.
    """
    import numpy as np

    wanted = f"(N, {', '.join(map(str, spec.shape))}) {spec.dtype}"
    found = f"{tuple(array.shape)} {array.dtype}"
    if array.ndim != 1 + len(spec.shape) or array.shape[1:] != spec.shape:
        raise InputRefused(f"{origin}: calibration data must be {wanted}, found {found}")
    if array.dtype != spec.dtype:
        raise InputRefused(
            f"{origin}: calibration data must be {wanted}, found {found}",
            hint=f"convert it with array.astype(numpy.{spec.dtype})"
            if spec.dtype == "float32"
            else "give the pixels, of 0 to 255: the graph normalises them",
        )
    if not len(array):
        raise InputRefused(f"{origin}: calibration data is empty")
    if bad := int((~np.isfinite(array)).sum()):
        first = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
        raise InputRefused(
            f"{origin}: calibration data holds {bad} values that are NaN or infinite, "
            f"the first in sample {first}"
        )
    if array.min() == array.max():
        raise InputRefused(
            f"{origin}: calibration data is constant: every value is {array.flat[0]:g}"
        )
    if (distinct := len(set(digests(array)))) < LEAST_IMAGES:
        repeated = f" and {distinct} different ones" if distinct < len(array) else ""
        raise InputRefused(
            f"{origin}: calibration data has {len(array)} samples{repeated}, and needs "
            f"{LEAST_IMAGES} that differ",
            hint="256 are a good number",
        )
    return array


def check_scale(array: Array, training: Samples, *, origin: str) -> None:
    """Raise `InputRefused` if the values are plainly not normalised as the training samples are.

    Plainly: their standard deviation or their largest magnitude is more than 8 times that of the
    training samples, or less than an eighth. Pixels of 0 to 255 are some hundred times off; a
    shift, or another contrast, is not told from other pictures.
    """
    figures = ("standard deviation", "largest magnitude")
    for what, found, usual in zip(figures, _spread(array), _spread(training.inputs), strict=True):
        if not usual / _ANOTHER_SCALE <= found <= usual * _ANOTHER_SCALE:
            raise InputRefused(
                f"{origin}: calibration data is on another scale than the network's training "
                f"samples: its {what} is {found:.4g}, and theirs is {usual:.4g}",
                hint="normalise it as the network's inputs are, say (pixels / 255 - mean) / std",
            )


def _spread(array: Array) -> tuple[float, float]:
    """Return the standard deviation and the largest magnitude, a sample at a time."""
    import numpy as np

    means = [float(sample.mean(dtype=np.float64)) for sample in array]
    mean = sum(means) / len(means)
    variance = sum(float(np.square(s - mean, dtype=np.float64).mean()) for s in array) / len(array)
    return variance**0.5, float(max(np.abs(sample).max() for sample in array))


def overlap(inputs: Array, held_out: Array) -> tuple[int, ...]:
    """Return which of the inputs are, byte for byte, among the held-out samples."""
    judged_on = set(digests(held_out))
    return tuple(index for index, digest in enumerate(digests(inputs)) if digest in judged_on)


Inputs: TypeAlias = str | Sequence[TensorSpec]


def feeds(inputs: Array, given: Inputs, *, size: int) -> Iterator[Feed]:
    """Yield the samples in order in full batches of ``size``; the last begins again at the first.

    ``given`` is the input's name, or the inputs that each sample has side by side. An engine may
    not take a smaller batch, so whoever collects the outputs drops what is over.
    """
    import numpy as np

    for start in range(0, len(inputs), size):
        yield _fed(inputs.take(np.arange(start, start + size), axis=0, mode="wrap"), given)


def varied(inputs: Array, given: Inputs, *, size: int, count: int = VARIED) -> list[Feed]:
    """Return ``count`` batches of ``size`` that begin at even distances among the samples."""
    import numpy as np

    starts = [part * len(inputs) // count for part in range(count)]
    return [_fed(inputs.take(np.arange(s, s + size), axis=0, mode="wrap"), given) for s in starts]


def _fed(batch: Array, given: Inputs) -> Feed:
    return {given: batch} if isinstance(given, str) else unpack(batch, given)
