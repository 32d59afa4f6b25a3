"""What a pickle would do, read from its instructions without following one.

The names that it would import are held against the few that a state dict needs, which are fewer
than `torch.load(weights_only=True)` lets through: no `bytearray` of any length, no quantised,
sparse, nested or meta tensor, no tensor subclass. So a refusal names all that is foreign at once,
and PyTorch's own unpickler, the second wall, only sees what passed the first. A name that is put
together at run time is refused for being so.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from exporter.checkpoints.kinds import PICKLE, SAVE, UNKNOWN
from exporter.errors import InputRefused
from exporter.words import plain

LARGEST_PICKLE = 64 << 20
MOST_INSTRUCTIONS = 4_000_000  # two hundred for each tensor of the largest networks
_SHOWN = 5

_ALLOWED = re.compile(
    r"collections\.(OrderedDict|Counter)|torch\.Size|torch\.device|(__builtin__|builtins)\.set"
    r"|torch\._utils\._rebuild_(tensor(_v[23])?|parameter)"
    r"|torch\.(storage\.)?(Untyped|Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool|Complex"
    r"Float|ComplexDouble)Storage"
    r"|torch\.(u?int(8|16|32|64)|float(16|32|64)|bfloat16|double|half|float|bool|complex(64|128)"
    r"|float8_\w{1,12})"
)
_INSTRUCTIONS = frozenset(
    (
        *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
        *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET"),
        *("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
    )
)
_IMPORTS = frozenset(("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"))
_TENSORS = {
    "_rebuild_qtensor": "quantised tensors",
    "_rebuild_sparse_tensor": "sparse tensors",
    "_rebuild_nested_tensor": "nested tensors",
    "_rebuild_meta_tensor_no_storage": "tensors without values, of the meta device",
    "_rebuild_wrapper_subclass": "tensors of a subclass",
    "_rebuild_from_type_v2": "tensors of a subclass",
}
_LEGACY_PARTS = 5  # magic number, protocol, system, the object, the keys of its storages


def check_pickle(data: bytes) -> None:
    """Raise `InputRefused` unless the pickle builds nothing but a state dict, and what is in it."""
    stream = io.BytesIO(data)
    _check(stream)
    if stream.read(1):
        raise InputRefused("its pickle goes on behind its end", hint=SAVE)


def check_legacy(stream: BinaryIO) -> None:
    """Check the pickles that a checkpoint of before PyTorch 1.6 begins with, as `check_pickle`."""
    stream.seek(0)
    for _ in range(_LEGACY_PARTS):
        _check(stream)


def refuse_pickle(stream: BinaryIO) -> InputRefused:
    """Return the refusal of a pickle that is no checkpoint, with what it would import."""
    stream.seek(0)
    try:
        names = dict.fromkeys(name for _, name in _instructions(stream) if name)
    except InputRefused:  # it is damaged, too
        names = {}
    needs = f", which needs {_some(list(names))}" if names else ""
    return InputRefused(f"{PICKLE.what}{needs}", hint=PICKLE.hint)


def _check(stream: BinaryIO) -> None:
    names: dict[str, None] = {}
    unknown: dict[str, None] = {}
    for name, imported in _instructions(stream):
        if imported is not None and not _ALLOWED.fullmatch(imported):
            names[imported] = None
        elif name not in _INSTRUCTIONS:
            unknown[name] = None
    if names:
        raise _foreign(list(names))
    if unknown:
        raise InputRefused(
            f"its pickle has the instruction {next(iter(unknown))}, which torch.save does not "
            "write for weights",
            hint=f"save it with PyTorch's default pickle_protocol, or {SAVE}",
        )


def _instructions(stream: BinaryIO) -> Iterator[tuple[str, str | None]]:
    """Yield each instruction up to the end of one pickle, and the name that it imports, if any."""
    texts: list[str] = []  # the last two, which STACK_GLOBAL mostly takes
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MOST_INSTRUCTIONS:
                raise InputRefused(
                    f"its pickle has more than {MOST_INSTRUCTIONS:,} instructions, and no "
                    "network's weights need so many",
                    hint=SAVE,
                )
            yield opcode.name, _imported(opcode.name, argument, texts)
            if isinstance(argument, str):
                texts = [*texts[-1:], argument]
    except (ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise InputRefused(UNKNOWN.what, hint=UNKNOWN.hint) from error


def _imported(instruction: str, argument: Any, texts: list[str]) -> str | None:
    if instruction not in _IMPORTS:
        return None
    if instruction == "STACK_GLOBAL":
        return ".".join(texts) or "a name put together at run time"
    if instruction.startswith("EXT"):
        return f"extension {argument}"
    return str(argument).replace(" ", ".", 1)


def _foreign(names: list[str]) -> InputRefused:
    """Return the refusal of a pickle that imports these, in words for what they are together."""
    shown = _some(names)
    for name in names:
        if what := _TENSORS.get(name.rpartition(".")[2]):
            return InputRefused(f"it holds {what} ({plain(name)}), which no weights fit", hint=SAVE)
    if any(name.startswith("torch.nn.modules.") for name in names):
        return InputRefused(
            f"a whole pickled module, which is a program, and not weights: it needs {shown}",
            hint=SAVE,
        )
    if all(re.match(r"(numpy|_codecs)\b", name) for name in names):
        return InputRefused(
            f"it holds NumPy values beside the weights, and needs {shown} to load them",
            hint=f"turn them into numbers, or {SAVE}",
        )
    return InputRefused(
        f"it holds more than weights: it needs {shown}, and no code that a file names is run",
        hint=SAVE,
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(plain, names[:_SHOWN])) + more
