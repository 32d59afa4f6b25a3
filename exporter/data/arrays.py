"""Arrays as samples: ``.npy``, ``.npz`` and safetensors files, read a few samples at a time.

Inputs are (N, C, H, W), float32 as the network takes them, or uint8 pixels that `preprocess.mean`
and `preprocess.std` say the meaning of; with `preprocess.fuse` they are pixels as the artefact
takes them. An ``.npz`` or safetensors file may have labels beside them, (N,) integers, under the
names ``inputs`` and ``labels``. A network of several inputs takes an array for each, float32, under
its own name. Pickled objects are never loaded.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from exporter.data.gathered import Gathered
from exporter.data.lazy import CHUNK, Fetch, Lazy
from exporter.data.pictures import check_scale_said, normalise
from exporter.errors import ExportError, InputRefused
from exporter.packing import pack, packed_shape
from exporter.records import Array, Preprocess, TensorSpec

if TYPE_CHECKING:
    import numpy as np

_LARGEST = 2 << 30  # bytes of an .npz, unpacked; an .npy may have any size, since it is mapped
_TIGHTEST = 200  # times that an .npz may unpack to; pictures do not come near
_SMALL = 1 << 20  # bytes for which nobody minds
_HEADER = 10_000  # bytes of an array's description
_TYPES = {"F32": "float32", "U8": "uint8", "I64": "int64", "I32": "int32", "F64": "float64"}


class Stored(NamedTuple):
    """An array that is there, and how to read some rows of it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rows: Callable[[Array], Array]


class Asked(NamedTuple):
    """What samples must be: the network's inputs, the number of classes, and what pixels mean.

    Where there are no classes, labels are left alone.
    """

    inputs: tuple[TensorSpec, ...]
    classes: int | None
    preprocess: Preprocess

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one sample, several inputs side by side."""
        return packed_shape(self.inputs)


def gather_npy(path: Path, asked: Asked) -> Gathered:
    """Return the samples of an ``.npy`` file, which is mapped and not loaded."""
    import numpy as np

    with _reading(path, "numpy.save(path, array)"):
        check_one(path.name, asked)
        with path.open("rb") as stream:
            shape, dtype = _header(stream, path.name)
            needed = prod(shape) * dtype.itemsize
            there = os.fstat(stream.fileno()).st_size - stream.tell()
        check_inputs(path.name, shape, dtype, asked)
        if there < needed:
            raise InputRefused(
                f"{path.name}: cut short: {there:,} bytes of the {needed:,} that its header says"
            )
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    stored = Stored(array.shape, array.dtype, lambda chosen: array[chosen])
    return gather(path.name, "an .npy file", stored, None, asked)


def gather_npz(path: Path, asked: Asked) -> Gathered:
    """Return the samples of an ``.npz`` file, and their labels if it has some."""
    import numpy as np

    with _reading(path, "numpy.savez(path, inputs=…, labels=…)"):
        with zipfile.ZipFile(path) as archive:
            described = {
                member.filename.removesuffix(".npy"): _member(archive, member, path.name)
                for member in archive.infolist()
            }
            size = sum(member.file_size for member in archive.infolist())
        inputs, labels = _names(path.name, described, asked)
        check_each(path.name, [described[name] for name in inputs], asked)
        packed = path.stat().st_size
        if size > _LARGEST or size > max(_SMALL, _TIGHTEST * packed):
            raise InputRefused(
                f"{path.name}: {packed:,} bytes that unpack to {size:,}, and {_LARGEST:,} or "
                f"{_TIGHTEST} times as many are allowed",
                hint="give large data as an .npy file, which is not unpacked",
            )
        with np.load(path, allow_pickle=False) as loaded:
            arrays = [loaded[name] for name in inputs]
            beside = None if labels is None else loaded[labels]
    return gather(path.name, "an .npz file", joined(arrays), beside, asked)


def gather_safetensors(path: Path, asked: Asked) -> Gathered:
    """Return the samples of a safetensors file, and their labels if it has some."""
    import numpy as np
    from safetensors import safe_open

    with _reading(path, "safetensors.numpy.save_file({'inputs': …, 'labels': …}, path)"):
        file: Any = safe_open(path, framework="np")
        described: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        for key in file.keys():  # noqa: SIM118 - not a dict
            part = file.get_slice(key)
            if part.get_dtype() not in _TYPES:
                raise InputRefused(
                    f"{path.name}: {key!r} is {part.get_dtype()}",
                    hint="save inputs as float32 or uint8, and labels as int64",
                )
            described[key] = (tuple(part.get_shape()), np.dtype(_TYPES[part.get_dtype()]))
        inputs, labels = _names(path.name, described, asked)
        check_each(path.name, [described[name] for name in inputs], asked)
        beside = None if labels is None else file.get_tensor(labels)
        parts = [file.get_slice(name) for name in inputs]
    if len(inputs) > 1:
        stored = joined([file.get_tensor(name) for name in inputs])
    else:
        stored = Stored(*described[inputs[0]], lambda chosen: _slices(parts[0], chosen))
    return gather(path.name, "a safetensors file", stored, beside, asked)


def gather(name: str, kind: str, stored: Stored, labels: Array | None, asked: Asked) -> Gathered:
    """Return stored rows as samples, each looked at once. Raises `InputRefused`."""
    check_inputs(name, stored.shape, stored.dtype, asked)
    pixels, fused = stored.dtype.kind == "u", asked.preprocess.fuse is not None
    normalises = pixels and not fused
    prepare = (lambda rows: normalise(rows, asked.preprocess)) if normalises else _as_they_are
    samples = Lazy(
        lambda chosen: prepare(stored.rows(chosen)),
        *(stored.shape[0], asked.shape, "uint8" if fused else "float32"),
    )
    digests = look(name, samples, raw=None if pixels else stored.rows)
    classes = None if labels is None else asked.classes
    if labels is not None and classes is not None:
        labels = check_labels(name, labels, len(samples), classes)
    return Gathered(
        kind=kind,
        name=name,
        samples=samples,
        digests=digests,
        by="inputs",
        labels=None if classes is None else labels,
        classes=classes,
        preprocessing=_in_words(asked.preprocess) if pixels else "none: as they are stored",
    )


def joined(arrays: Sequence[Array]) -> Stored:
    """Return inputs that are there as rows to be read."""
    shape = arrays[0].shape
    if len(arrays) > 1:
        shape = (shape[0], sum(array[:1].size for array in arrays))
    return Stored(shape, arrays[0].dtype, lambda chosen: pack([array[chosen] for array in arrays]))


def check_each(
    name: str, described: Sequence[tuple[tuple[int, ...], np.dtype[Any]]], asked: Asked
) -> None:
    """Raise `InputRefused` unless there is an array for each input, all of as many samples."""
    if len(asked.inputs) == 1:
        check_inputs(name, *described[0], asked)
        return
    for spec, (shape, dtype) in zip(asked.inputs, described, strict=True):
        if dtype != "float32":
            raise InputRefused(
                f"{name}: {spec.name!r} is {dtype}, and several inputs must be float32",
                hint="normalise it, and convert it with array.astype(numpy.float32)",
            )
        check_inputs(f"{name}: {spec.name!r}", shape, dtype, asked._replace(inputs=(spec,)))
        if shape[0] != described[0][0][0]:
            raise InputRefused(
                f"{name}: {shape[0]} samples of {spec.name!r}, and {described[0][0][0]} of "
                f"{asked.inputs[0].name!r}"
            )


def _in_words(preprocess: Preprocess) -> str:
    where = " in the graph" if preprocess.fuse else ""
    return f"uint8, (p/255 − {preprocess.mean}) / {preprocess.std}{where}"


def _as_they_are(rows: Array) -> Array:
    import numpy as np

    return np.ascontiguousarray(rows)


def look(name: str, samples: Lazy, *, raw: Fetch | None) -> tuple[str, ...]:
    """Return every sample's digest. Raises `InputRefused` for values no network was made for.

    Those are ones that are not finite, one and the same value throughout, and, where samples are
    ``raw``, whole numbers of 0 to 255.
    """
    import numpy as np

    digests: list[str] = []
    low, high, whole = np.inf, -np.inf, raw is not None
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        fit = np.isfinite(chunk).reshape(len(chunk), -1).all(axis=1)
        if not fit.all():
            first = start + int(np.flatnonzero(~fit)[0])
            raise InputRefused(f"{name}: sample {first} holds values that are NaN or infinite")
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
        whole = whole and low >= 0 and high <= 255 and bool((chunk == np.floor(chunk)).all())
        digests += [hashlib.sha256(sample.tobytes()).hexdigest() for sample in chunk]
    if low == high:
        raise InputRefused(f"{name}: every value of every sample is {low:g}")
    if whole and high > 1:
        raise InputRefused(
            f"{name}: every value is a whole number of {low:g} to {high:g}: pixels that nobody "
            "normalised",
            hint="save them as uint8 and say preprocess.mean and preprocess.std, or normalise them",
        )
    return tuple(digests)


def check_inputs(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], asked: Asked) -> None:
    """Raise `InputRefused` unless an array can be the network's inputs, with how to make it so."""
    import numpy as np

    fused = asked.preprocess.fuse
    kinds = "uint8" if fused else "float32 or uint8"
    wanted = f"(N, {', '.join(map(str, asked.shape))}) {kinds}"
    found = f"{tuple(shape)} {dtype}"
    if dtype.hasobject:
        raise InputRefused(
            f"{name}: pickled Python objects, which are never loaded", hint="save numbers"
        )
    if len(shape) != 1 + len(asked.shape) or shape[1:] != asked.shape:
        raise InputRefused(
            f"{name}: the samples must be {wanted}, found {found}",
            hint=_as_asked(shape, asked.shape, channels_last=fused == "nhwc"),
        )
    if not shape[0]:
        raise InputRefused(f"{name}: no samples in it")
    if dtype == np.uint8:
        if not fused:
            check_scale_said(asked.shape, asked.preprocess)
    elif fused:
        raise InputRefused(
            f"{name}: the samples must be {wanted}, found {found}",
            hint="give the pixels, which the graph normalises, or leave out preprocess.fuse",
        )
    elif dtype != np.float32:
        other = " or, if they are pixels, numpy.uint8" if dtype.kind in "iu" else ""
        raise InputRefused(
            f"{name}: the samples must be {wanted}, found {found}",
            hint=f"convert them with array.astype(numpy.float32){other}",
        )


def _as_asked(
    shape: tuple[int, ...], wanted: tuple[int, ...], *, channels_last: bool
) -> str | None:
    """Return what would make the shape the wanted one, where something simple does."""
    if shape == wanted:
        return "one sample is a batch of one: array[None]"
    if channels_last:
        first = (wanted[-1], *wanted[:-1])
        return "channels come last: array.transpose(0, 2, 3, 1)" if shape[1:] == first else None
    channels, *size = wanted
    if shape[1:] == (*size, channels):
        return "channels come first: array.transpose(0, 3, 1, 2)"
    if channels == 1 and shape[1:] == tuple(size):
        return "the channel has an axis of its own: array[:, None]"
    if len(shape) == 4 and shape[2:] == tuple(size):
        return f"the network takes {channels} channels; --input says otherwise"
    if len(shape) == 4 and shape[1] == channels:
        return "--input says which size the network is given"
    return None


def check_labels(name: str, labels: Array, count: int, classes: int) -> Array:
    """Return labels as (N,) int64. Raises `InputRefused` unless there is one of 0 to C-1 each."""
    import numpy as np

    if labels.shape == (count, classes) and classes > 1:
        hint = "labels are numbers of classes: labels.argmax(axis=1)"
        raise InputRefused(f"{name}: the labels are {labels.shape}, not ({count},)", hint=hint)
    if labels.shape != (count,):
        raise InputRefused(f"{name}: {count} samples, and labels of shape {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise InputRefused(
            f"{name}: the labels are {labels.dtype}, where whole numbers are needed",
            hint="convert them with labels.astype(numpy.int64)",
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputRefused(
            f"{name}: labels of {low} to {high}, and the network's outputs are 0 to {classes - 1}"
        )
    return labels.astype(np.int64)


@contextmanager
def _reading(path: Path, how: str) -> Iterator[None]:
    """Turn whatever a library raises for a damaged file into `InputRefused`."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:  # damage takes numpy to tokenize, zipfile and malloc
        raise InputRefused(
            f"{path.name}: damaged, or no {path.suffix} file of numbers",
            hint=f"write it with {how}",
        ) from error


def _header(stream: BinaryIO | Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and type that an array's description says, without reading the array."""
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream, max_header_size=_HEADER)
    if min(shape, default=0) < 0:
        raise InputRefused(f"{name}: its header says {shape}")
    return shape, dtype


def _member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return what one array of an archive is. Raises `InputRefused` if its sizes do not agree."""
    with archive.open(member) as stream:
        shape, dtype = _header(stream, name)
        start = stream.tell()
    if not dtype.hasobject and start + prod(shape) * dtype.itemsize != member.file_size:
        raise InputRefused(
            f"{name}: {member.filename!r} says {shape} {dtype}, and has {member.file_size:,} bytes"
        )
    return shape, dtype


def _names(
    name: str, found: Mapping[str, object], asked: Asked
) -> tuple[tuple[str, ...], str | None]:
    """Return which arrays are inputs and labels. Raises `InputRefused` where it would be guessed.

    One array alone is the inputs, whatever its name; those of several inputs have theirs.
    """
    if len(asked.inputs) > 1:
        return check_names(name, found, asked), "labels" if "labels" in found else None
    if len(found) == 1 and "labels" not in found:
        return tuple(found), None
    if set(found) == {"inputs", "labels"}:
        return ("inputs",), "labels"
    keys = ", ".join(map(repr, list(found)[:5])) + (", …" if len(found) > 5 else "")
    raise InputRefused(
        f"{name}: arrays named {keys or 'nothing at all'}, and nothing says which are the inputs",
        hint="save one array, or two named 'inputs' and 'labels'",
    )


def check_names(name: str, found: Iterable[str], asked: Asked) -> tuple[str, ...]:
    """Return the inputs' names. Raises `InputRefused` unless they are those found, but labels."""
    wanted = tuple(spec.name for spec in asked.inputs)
    if {*found} - {"labels"} != {*wanted}:
        raise InputRefused(
            f"{name}: arrays named {', '.join(map(repr, found)) or 'nothing at all'}, and the "
            f"network takes {' and '.join(map(repr, wanted))}",
            hint=f"save one array for each: {', '.join(wanted)}, and labels where there are some",
        )
    return wanted


def check_one(name: str, asked: Asked) -> None:
    """Raise `InputRefused` for one array where a network takes several."""
    if len(asked.inputs) > 1:
        wanted = [spec.name for spec in asked.inputs]
        raise InputRefused(
            f"{name}: one array, and the network takes {' and '.join(map(repr, wanted))}",
            hint=f"give one array for each, by its name: {', '.join(wanted)}",
        )


def _slices(part: Any, chosen: Array) -> Array:
    import numpy as np

    first, last = int(chosen[0]), int(chosen[-1])
    if len(chosen) == last - first + 1 and (np.diff(chosen) == 1).all():
        return np.asarray(part[first : last + 1])
    return np.stack([np.asarray(part[int(index) : int(index) + 1])[0] for index in chosen])
