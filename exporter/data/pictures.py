"""A folder of images as samples: each is looked at once at first, and decoded again when needed.

The first pass leaves of every image its digest and what is to be said of it, and nothing else, so
that a folder takes no more memory than its names. A pixel p of 0 to 255 becomes
(p / 255 − mean) / std in float32, as torchvision's ToTensor and Normalize compute it; or it stays
what it is, where `preprocess.fuse` has that in the graph.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from exporter.data.decoding import Decoded, Decoders
from exporter.data.folders import Listing, list_images, order_doubt
from exporter.data.gathered import Gathered
from exporter.data.lazy import Lazy
from exporter.errors import InputRefused
from exporter.records import Array, DataChoice, Preprocess, Unfit

_MODES = {1: "L", 3: "RGB"}
_SHOWN = 5
_ENOUGH = 100  # unfit images that are named in the record


def gather_images(
    folder: Path, shape: tuple[int, ...], preprocess: Preprocess, choice: DataChoice
) -> Gathered:
    """Return a folder's images as samples of ``shape`` = (C, H, W).

    Raises `InputRefused` if nothing says how pixels become inputs, if more images are unfit than
    ``choice`` allows, or if one declares more pixels than that.
    """
    settings = _settings(shape, preprocess, choice)
    listing = list_images(folder)
    decoders = Decoders(settings, choice.workers or os.cpu_count() or 1)
    fit: list[int] = []
    digests: list[str] = []
    unfit: list[Unfit] = []
    notes = Counter(listing.notes)
    for index, found in enumerate(decoders.decode(folder, listing.names, pixels=False)):
        if found.bomb:
            raise InputRefused(
                f"{folder.name}: {_plain(found.name)}: {found.refused}: a decompression bomb, or "
                "an image that is not for this network",
                hint="take it out, or raise data.max_pixels",
            )
        if found.refused is not None:
            unfit.append(Unfit(_plain(found.name), found.refused))
            continue
        fit.append(index)
        digests.append(found.digest)
        notes.update(found.notes)
        if Path(found.name).suffix.lower() not in _suffixes(found.format):
            notes[f"named otherwise than {found.format}"] += 1
    _check_unfit(folder, unfit, len(listing.names), choice)
    names = [listing.names[index] for index in fit]
    pictures = _Pictures(folder, names, digests, decoders, shape, preprocess)
    return Gathered(
        kind="flat folder" if listing.classes is None else "class folders",
        name=_plain(folder.name),
        samples=Lazy(
            *(pictures.fetch, len(names), preprocess.laid_out(shape)),
            "uint8" if preprocess.fuse else "float32",
        ),
        digests=tuple(digests),
        by="pixels",
        labels=_labels(listing, fit),
        classes=None if listing.classes is None else len(listing.classes),
        preprocessing=in_words(shape, preprocess),
        unfit=tuple(unfit[:_ENOUGH]),
        notes={"unfit, left out": len(unfit), **notes} if unfit else dict(notes),
        doubts=() if listing.classes is None else order_doubt(listing.classes),
    )


class _Pictures:
    """The images of a folder that are fit, decoded again when they are asked for."""

    def __init__(
        self,
        folder: Path,
        names: list[str],
        digests: list[str],
        decoders: Decoders,
        shape: tuple[int, ...],
        preprocess: Preprocess,
    ) -> None:
        self._folder = folder
        self._names = names
        self._digests = digests
        self._decoders = decoders
        self._shape = shape
        self._preprocess = preprocess

    def fetch(self, chosen: Array) -> Array:
        """Return images as inputs, (N, *input). Raises `InputRefused` if one has changed."""
        import numpy as np

        channels, height, width = self._shape
        fused = self._preprocess.fuse
        shape = (len(chosen), *self._preprocess.laid_out(self._shape))
        inputs = np.empty(shape, np.uint8 if fused else np.float32)
        names = [self._names[index] for index in chosen]
        found = self._decoders.decode(self._folder, names, pixels=True)
        for row, (index, image) in enumerate(zip(chosen, found, strict=True)):
            if image.digest != self._digests[index]:
                raise self._changed(image)
            pixels = np.frombuffer(image.pixels, np.uint8).reshape(height, width, channels)
            if fused:
                inputs[row] = as_taken(pixels, self._preprocess)
            else:
                inputs[row] = normalise(pixels.transpose(2, 0, 1), self._preprocess)
        return inputs

    def _changed(self, image: Decoded) -> InputRefused:
        why = image.refused or "its pixels are others"
        return InputRefused(
            f"{self._folder.name}: {_plain(image.name)} is not what it was when the run began: "
            f"{why}"
        )


def normalise(pixels: Array, preprocess: Preprocess) -> Array:
    """Return pixels of 0 to 255, (…, C, H, W), as the network takes them, in float32."""
    import numpy as np

    if preprocess.order == "bgr" and pixels.shape[-3] == 3:
        pixels = pixels[..., ::-1, :, :]
    mean = np.asarray(preprocess.mean, np.float32)[:, None, None]
    std = np.asarray(preprocess.std, np.float32)[:, None, None]
    found: Array = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return found


def as_taken(pixels: Array, preprocess: Preprocess) -> Array:
    """Return pixels in RGB, (…, H, W, C), in the layout and order that the artefact takes."""
    import numpy as np

    if preprocess.input_order == "bgr" and pixels.shape[-1] == 3:
        pixels = pixels[..., ::-1]
    return pixels if preprocess.fuse == "nhwc" else np.moveaxis(pixels, -1, -3)


def check_scale_said(shape: tuple[int, ...], preprocess: Preprocess) -> None:
    """Raise `InputRefused` unless mean and std are given, one each or one for each channel."""
    if preprocess.mean is None or preprocess.std is None:
        given = ", ".join(["0.5"] * shape[0])
        raise InputRefused(
            "nothing says how pixels become the network's inputs: preprocess.mean and "
            "preprocess.std are missing",
            hint="say what it was trained with, in [preprocess] of a profile or as "
            f"--set 'preprocess.mean=[{given}]' --set 'preprocess.std=[{given}]'",
        )
    for name, values in (("mean", preprocess.mean), ("std", preprocess.std)):
        if len(values) not in (1, shape[0]):
            raise InputRefused(
                f"preprocess.{name} has {len(values)} values, and the input has {shape[0]} channels"
            )


def in_words(shape: tuple[int, ...], preprocess: Preprocess) -> str:
    """Return what is done to an image, in one line."""
    channels, height, width = shape
    steps = []
    if preprocess.sides:
        to = "×".join(map(str, preprocess.sides))
        side = "shorter side " if len(preprocess.sides) == 1 else ""
        steps = [f"{side}resized to {to} ({preprocess.interpolation})", "middle cut out"]
    order = preprocess.input_order if preprocess.fuse else preprocess.order
    colours = {1: "grey", 3: order.upper()}[channels]
    mean, std = (_numbers(values or ()) for values in (preprocess.mean, preprocess.std))
    steps.append(f"{height}×{width} {colours}")
    if preprocess.fuse:
        turned = "channels turned round, " if channels == 3 and preprocess.is_turned else ""
        steps.append(f"uint8 as {preprocess.fuse.upper()}; in the graph: {turned}".rstrip(" "))
        return f"{', '.join(steps)} (p/255 − {mean}) / {std}"
    return ", ".join([*steps, f"(p/255 − {mean}) / {std}"])


def _numbers(values: tuple[float, ...]) -> str:
    said = ", ".join(f"{value:.10g}" for value in values)
    return said if len(values) == 1 else f"({said})"


def _settings(shape: tuple[int, ...], preprocess: Preprocess, choice: DataChoice) -> dict[str, Any]:
    """Return what a decoder needs to know. Raises `InputRefused` for what cannot be done."""
    if len(shape) != 3 or shape[0] not in _MODES:
        raise InputRefused(
            f"images have 1 channel or 3, and the input is {' × '.join(map(str, shape))}",
            hint="give the data as an array",
        )
    check_scale_said(shape, preprocess)
    size, sides = shape[1:], preprocess.sides
    if sides and (sides[0] < max(size) if len(sides) == 1 else any(map(int.__lt__, sides, size))):
        raise InputRefused(
            f"preprocess.resize {'×'.join(map(str, sides))} leaves less than the input's "
            f"{size[0]} × {size[1]} to cut out"
        )
    if preprocess.background and len(preprocess.background) > shape[0]:
        raise InputRefused("preprocess.background has 3 values, and the input has 1 channel")
    return {
        "mode": _MODES[shape[0]],
        "size": size,
        "bytes": shape[0] * shape[1] * shape[2],
        "resize": list(sides) or None,
        "interpolation": preprocess.interpolation,
        "orientation": preprocess.orientation,
        "background": preprocess.background,
        "max_pixels": choice.max_pixels,
        "seconds": choice.seconds,
    }


def _labels(listing: Listing, fit: list[int]) -> Array | None:
    import numpy as np

    if listing.labels is None:
        return None
    return np.array([listing.labels[index] for index in fit], np.int64)


def _check_unfit(folder: Path, unfit: list[Unfit], count: int, choice: DataChoice) -> None:
    """Raise `InputRefused` if too many images are unfit, or all; those that are, are named."""
    if len(unfit) <= choice.max_bad * count and len(unfit) < count:
        return
    raise InputRefused(
        f"{_plain(folder.name)}: {len(unfit)} of {count} images are unfit, and "
        f"{choice.max_bad:.4%} may be: {_by_reason(unfit)}",
        hint="take them out, say in [preprocess] what is missing, or raise data.max_bad: then they "
        "are left out and listed",
    )


def _by_reason(unfit: list[Unfit]) -> str:
    """Return every image that is unfit, or the first of each kind with how many more."""
    kinds: dict[str, list[str]] = {}
    for one in unfit:
        kinds.setdefault(one.reason, []).append(one.name)
    said = [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in list(kinds.items())[:_SHOWN]
    ]
    more = [f"and {len(kinds) - _SHOWN} more reasons"] if len(kinds) > _SHOWN else []
    return "; ".join([*said, *more])


def _suffixes(kind: str) -> tuple[str, ...]:
    return {
        "JPEG": (".jpg", ".jpeg", ".jfif"),
        "MPO": (".jpg", ".jpeg", ".jfif"),
        "TIFF": (".tif", ".tiff"),
        "PPM": (".ppm", ".pgm"),
    }.get(kind, (f".{kind.lower()}",))


def _plain(name: str) -> str:
    """Return a name that can be shown: it may be any bytes, and hold what moves a cursor."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
