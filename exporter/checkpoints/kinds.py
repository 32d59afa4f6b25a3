"""What a file is, by what it begins with and, for a zip archive, by the names in it.

Its own name says nothing: half of all ``.pth`` files that do not load are something else, and an
error is of use only where it says what. Nothing is opened, unpacked or imported to find out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import BinaryIO, Literal, NamedTuple

Format = Literal["safetensors", "zip", "legacy"]

HEAD = 1024  # bytes that tell
_LONGEST_HEADER = 1 << 40  # of safetensors; eight bytes of text would be a larger number
SAVE = (
    "save the weights alone, where they were trained: "
    "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)
FETCH = "fetch it again, and compare its size and digest with those that its source states"
UNPACK = "unpack it, and name the file of weights that is in it"
_TRUSTED = (
    "it is a program: where you trust who made it, load it there and save its state_dict() with "
    "safetensors"
)


class Kind(NamedTuple):
    """A file's kind in words, with its article; the ``format`` that is read, or what to do."""

    what: str
    hint: str = SAVE
    format: Format | None = None


SAFETENSORS = Kind("a safetensors file", format="safetensors")
CHECKPOINT = Kind("a PyTorch checkpoint", format="zip")
LEGACY = Kind("a PyTorch checkpoint in the format of before 1.6", format="legacy")
PICKLE = Kind("a pickle that torch.save did not write")
TAR = Kind("a tar archive", UNPACK)
TORCH_TAR = Kind("a PyTorch checkpoint in the tar format of PyTorch 0.1", _TRUSTED)
TORCHSCRIPT = Kind("a TorchScript archive, which is a program, and not weights", _TRUSTED)
EXPORTED = Kind("a program of torch.export (.pt2), and not weights", _TRUSTED)
ENCRYPTED = Kind("an encrypted zip archive", UNPACK)
EMPTY = Kind("an empty file", FETCH)
UNKNOWN = Kind("truncated, damaged or of no format that is known here")

_PICKLED = b"\x80[\x02-\x05]"
_LEGACY_MAGIC = b"\x80[\x02-\x05]\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\\."
_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (_LEGACY_MAGIC, LEGACY),
    (_PICKLED, PICKLE),
    (rb"\(?[ci][a-z_][\w.]*\n\w+\n|\([dl]p?[0-9]+\n", PICKLE),
    (b".{257}ustar", TAR),
    (b"\x1f\x8b", Kind("a gzip file", UNPACK)),
    (b"BZh[1-9]", Kind("a bzip2 file", UNPACK)),
    (b"\xfd7zXZ\0", Kind("an xz file", UNPACK)),
    (b"\\(\xb5/\xfd", Kind("a zstd file", UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", UNPACK)),
    (b"Rar!\x1a\x07", Kind("a RAR archive", UNPACK)),
    (b"\x89HDF\r\n\x1a\n", Kind("an HDF5 file, as Keras writes")),
    (b"GGUF|tjgg|lmgg|fmgg", Kind("a GGUF file of llama.cpp")),
    (b".{4}TFL3", Kind("a TensorFlow Lite model")),
    (b"[fpv]trt", Kind("a TensorRT engine, which is a program, and not weights")),
    (b"\x93NUMPY", Kind("a NumPy array")),
    (b"\x08\x01\x12", Kind("a TensorFlow SavedModel")),
    (b"\x08[\x03-\x20][\x12\x1a\x22\x2a\x32\x3a\x42]", Kind("an ONNX file")),
    (b"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|BM.{4}\0{4}|II\\*\0|MM\0\\*", Kind("an image")),
    (b"RIFF.{4}WEBP", Kind("an image")),
    (b"%PDF-", Kind("a PDF document")),
    (b"\x7fELF|MZ|\xcf\xfa\xed\xfe|\xca\xfe\xba\xbe", Kind("a program or library")),
    (b"SQLite format 3\0", Kind("an SQLite database")),
    (b"version https://git-lfs\\.github\\.com", Kind("a Git LFS pointer", "git lfs pull")),
    (
        rb"(?i)(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype html|html|head)",
        Kind("a web page", FETCH),
    ),
    (rb"(\xef\xbb\xbf)?\s*<(\?xml|Error)", Kind("an XML document", FETCH)),
    (b"#!", Kind("a script")),
)
_INDEX = Kind(
    "the index of a checkpoint in several files",
    "join them where they were made: load each with safetensors.torch.load_file, and save all in "
    "one file",
)
_ARCHIVES: tuple[tuple[str, Kind], ...] = (
    (r"model\.weights\.h5", Kind("a Keras model")),
    (r"(.*/)?saved_model\.pb", Kind("a TensorFlow SavedModel in a zip archive")),
    (r"\[Content_Types\]\.xml", Kind("an Office document")),
    (r"META-INF/MANIFEST\.MF", Kind("a Java archive")),
    (r"(.*/)?Manifest\.json", Kind("a Core ML package")),
    (r".*\.npy", Kind("a NumPy archive (.npz)")),
    (r".*\.(safetensors|pth|pt|bin|ckpt)", Kind("a zip archive that weights were put in", UNPACK)),
)


def kind_of(stream: BinaryIO) -> Kind:
    """Return what a file is; any zip archive is a `CHECKPOINT` until its names are looked at."""
    stream.seek(0)
    head = stream.read(HEAD)
    if not head:
        return EMPTY
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return CHECKPOINT
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _LONGEST_HEADER:
        return SAFETENSORS
    for magic, kind in _MAGIC:
        if re.match(magic, head, re.DOTALL):
            return TORCH_TAR if kind is TAR and _is_torchs(head) else kind
    if not head.strip(b"\0"):
        return Kind("nothing but zeros at its beginning, as a broken download leaves it", FETCH)
    return _text(head) or UNKNOWN


def archive_kind(names: Iterable[str]) -> Kind:
    """Return what a zip archive with these entries is."""
    whole = list(names)
    inner = {name.partition("/")[2] for name in whole}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return TORCHSCRIPT
    if "archive_format" in inner or "serialized_exported_program.json" in {*whole, *inner}:
        return EXPORTED
    if "data.pkl" in inner:
        return CHECKPOINT
    for pattern, kind in _ARCHIVES:
        if any(re.fullmatch(pattern, name) for name in whole):
            return kind
    return Kind("a zip archive, and not one that torch.save wrote", UNPACK)


def _is_torchs(head: bytes) -> bool:
    """Return whether a tar archive's first member is one of those that PyTorch 0.1 wrote."""
    return head[:100].rstrip(b"\0") in (b"sys_info", b"pickle", b"tensors", b"storages")


def _text(head: bytes) -> Kind | None:
    """Return what kind of text it is, or None."""
    if b"\0" in head:
        return None
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(head) < HEAD or error.start < HEAD - 3:  # not a letter that the head's end cut
            return None
        text = head[: error.start].decode("utf-8-sig")
    if any(ord(letter) < 32 and letter not in "\t\n\r\f\x1b" for letter in text):
        return None
    if text.lstrip().startswith(("{", "[")):
        return _INDEX if '"weight_map"' in text else Kind("a JSON file")
    return Kind("a text file")
