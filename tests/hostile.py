"""Checkpoints made to do harm, written by hand: none is kept, each test makes its own.

A canary is a file: whatever runs code from one of these leaves ``canaries/<name>`` behind.
"""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

# ── Containers ──────────────────────────────────────────────────────────────────────


def zipped(
    data: bytes, storages: dict[str, bytes] | None = None, *, folder: str = "archive", **more: bytes
) -> bytes:
    """Return a zip archive of these as torch.save lays it out; ``more`` are other entries."""
    entries = {"data.pkl": data, "version": b"3\n", **more}
    entries |= {f"data/{key}": storage for key, storage in (storages or {}).items()}
    return archive({f"{folder}/{name}": entry for name, entry in entries.items()})


def archive(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as packed:
        for name, data in entries.items():
            packed.writestr(name, data)
    return stream.getvalue()


def saved(held: Any, **options: Any) -> bytes:
    """Return what torch.save writes."""
    stream = io.BytesIO()
    torch.save(held, stream, **options)
    return stream.getvalue()


def legacy(data: bytes) -> bytes:
    """Return a checkpoint of before PyTorch 1.6 with this pickle."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = (0x1950A86A20F9469CFC6C, 1001, system)
    return b"".join(pickle.dumps(part, 2) for part in parts) + data + pickle.dumps([], 2)


def tarred(data: bytes) -> bytes:
    """Return a checkpoint of before PyTorch 0.2 with this pickle."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:", format=tarfile.PAX_FORMAT) as packed:
        for name, part in (
            ("sys_info", b""),
            ("pickle", data),
            ("tensors", data),
            ("storages", data),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(part)
            packed.addfile(member, io.BytesIO(part))
    return stream.getvalue()


# ── Instructions ────────────────────────────────────────────────────────────────────


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(name: str) -> bytes:
    """Import ``package.module:name``."""
    module, _, attribute = name.partition(":")
    return f"c{module}\n{attribute}\n".encode()


def value(held: Any) -> bytes:
    """Return the instructions that push a plain value, or bytes as they are."""
    return held if isinstance(held, bytes) else pickle.dumps(held, 2)[2:-1]


def called(function: str | bytes, *arguments: Any) -> bytes:
    """Push what calling a name, or what is pushed, gives."""
    pushed = named(function) if isinstance(function, str) else function
    return pushed + b"(" + b"".join(map(value, arguments)) + b"tR"


def whole(instructions: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + instructions + b"."


# ── Gadgets ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Gadget:
    """A malicious file. ``pickle`` is the part that harms, ``live`` whether it does in pickle.

    ``imports`` is a name that a refusal must say.
    """

    name: str
    data: bytes
    pickle: bytes
    live: bool
    imports: str | None


def gadgets(canaries: Path) -> Iterator[Gadget]:
    """Yield every malicious pickle, the ones in odd containers last."""
    for name, live, imports, make in _CALLS:
        harm = whole(make(str(canaries / name)))
        yield Gadget(name, zipped(harm), harm, live, imports)
    for name, live, imports, make_whole in _TRICKS:
        harm = make_whole(str(canaries / name))
        yield Gadget(name, zipped(harm), harm, live, imports)
    for name, pack in _CONTAINERS.items():
        harm = whole(called("os:mkdir", str(canaries / name)))
        yield Gadget(name, pack(harm), harm, True, None)


def _python(path: str) -> str:
    return f"__import__('os').mkdir({path!r})"


def _bound(kind: str, method: str, *made: Any) -> Callable[[bytes], bytes]:
    """Return a call of a method of what a class gives, through getattr."""
    return lambda arguments: called(
        called("builtins:getattr", called(kind, *made), method), arguments
    )


def _nested(path: str) -> bytes:
    return whole(called("os:mkdir", path))


_CALLS: list[tuple[str, bool, str, Callable[[str], bytes]]] = [
    ("os-system", True, "os.system", lambda p: called("os:system", f"mkdir {p}")),
    ("posix-system", True, "posix.system", lambda p: called("posix:system", f"mkdir {p}")),
    ("os-mkdir", True, "os.mkdir", lambda p: called("os:mkdir", p)),
    ("os-popen", True, "os.popen", lambda p: called("os:popen", f"mkdir {p}")),
    ("os-spawn", True, "os.spawnlp", lambda p: called("os:spawnlp", 0, "mkdir", "mkdir", p)),
    ("os-putenv", False, "os.putenv", lambda p: called("os:putenv", "CANARY", p)),
    ("nt-system", False, "nt.system", lambda p: called("nt:system", f"mkdir {p}")),
    ("subprocess-run", True, "subprocess.run", lambda p: called("subprocess:run", ["mkdir", p])),
    ("subprocess-call", True, "subprocess.call", lambda p: called("subprocess:call", ["mkdir", p])),
    ("subprocess-popen", True, "subprocess.Popen", lambda p: called("subprocess:Popen", ["mkdir", p])),
    ("subprocess-output", True, "subprocess.getoutput", lambda p: called("subprocess:getoutput", f"mkdir {p}")),
    ("pty-spawn", True, "pty.spawn", lambda p: called("pty:spawn", ["mkdir", p])),
    ("eval", True, "builtins.eval", lambda p: called("builtins:eval", _python(p))),
    ("exec", True, "builtins.exec", lambda p: called("builtins:exec", _python(p))),
    ("eval-of-python-2", True, "__builtin__.eval", lambda p: called("__builtin__:eval", _python(p))),
    ("open", True, "builtins.open", lambda p: called("builtins:open", p, "w")),
    ("io-open", True, "io.open", lambda p: called("io:open", p, "w")),
    ("getattr", True, "builtins.getattr", lambda p: called(called("builtins:getattr", called("builtins:__import__", "os"), "mkdir"), p)),
    ("map", True, "builtins.map", lambda p: called("builtins:list", called("builtins:map", named("os:mkdir"), [p]))),
    ("importlib", True, "importlib.import_module", lambda p: called(called("builtins:getattr", called("importlib:import_module", "os"), "mkdir"), p)),
    ("resolve-name", True, "pkgutil.resolve_name", lambda p: called(called("pkgutil:resolve_name", "os:mkdir"), p)),
    ("methodcaller", True, "operator.methodcaller", lambda p: called(called("operator:methodcaller", "mkdir", p), called("builtins:__import__", "os"))),
    ("attrgetter", True, "operator.attrgetter", lambda p: called(called(called("operator:attrgetter", "mkdir"), called("builtins:__import__", "os")), p)),
    ("partial", True, "functools.partial", lambda p: called(called("functools:partial", named("os:mkdir"), p))),
    ("reduce", True, "functools.reduce", lambda p: called("functools:reduce", named("os:mkdir"), [p, 0o777])),
    ("interpreter", True, "code.InteractiveInterpreter", lambda p: _bound("code:InteractiveInterpreter", "runcode")(value(_python(p)))),
    ("bdb", True, "bdb.Bdb", lambda p: _bound("bdb:Bdb", "run")(value(_python(p)))),
    ("timeit", True, "timeit.timeit", lambda p: called("timeit:timeit", _python(p), "pass", named("time:perf_counter"), 1)),
    ("profile", False, "cProfile.run", lambda p: called("cProfile:run", _python(p))),
    ("runpy", False, "runpy.run_path", lambda p: called("runpy:run_path", p)),
    ("ctypes", False, "ctypes.CDLL", lambda p: called("ctypes:CDLL", p)),
    ("shutil-copy", True, "shutil.copy", lambda p: called("shutil:copy", "/proc/self/status", p)),
    ("pathlib-mkdir", True, "pathlib.Path", lambda p: _bound("pathlib:Path", "mkdir", p)(b"")),
    ("sqlite", True, "sqlite3.connect", lambda p: called("sqlite3:connect", p)),
    ("socket", False, "socket.create_connection", lambda p: called("socket:create_connection", ("127.0.0.1", 9))),
    ("logging", True, "logging.FileHandler", lambda p: called("logging:FileHandler", p)),
    ("zip-writer", True, "zipfile.ZipFile", lambda p: called("zipfile:ZipFile", p, "w")),
    ("pickle-loads", True, "_pickle.loads", lambda p: called("_pickle:loads", value(_nested(p)))),
    ("marshal", False, "marshal.loads", lambda p: called("marshal:loads", "")),
    ("torch-load", False, "torch.serialization.load", lambda p: called("torch.serialization:load", p)),
    ("torch-hub", False, "torch.hub.load", lambda p: called("torch.hub:load", p, "net")),
    ("torch-script", False, "torch.jit._serialization.load", lambda p: called("torch.jit._serialization:load", p)),
    ("torch-library", False, "torch.ops.load_library", lambda p: called("torch.ops:load_library", p)),
    ("torch-extension", False, "torch.utils.cpp_extension.load", lambda p: called("torch.utils.cpp_extension:load", "x", [p])),
    ("numpy-load", False, "numpy.load", lambda p: called("numpy:load", p, None, True)),
    ("numpy-object", False, "numpy._core.multiarray._reconstruct", lambda p: called("numpy._core.multiarray:_reconstruct", named("numpy:ndarray"), (0,), "b")),
    ("joblib", False, "joblib.load", lambda p: called("joblib:load", p)),
    ("whole-module", False, "torch.nn.modules.linear.Linear", lambda p: called("torch.nn.modules.linear:Linear", 1, 1)),
    ("bytearray", False, "builtins.bytearray", lambda p: called("builtins:bytearray", 1 << 40)),
]  # fmt: skip


def _stack_global(p: str, *, memo: bool = False) -> bytes:
    module, name = text("os"), text("mkdir")
    if memo:
        return whole(
            module + b"q\x000" + name + b"q\x010" + b"h\x00h\x01\x93" + value((p,)) + b"R", 4
        )
    return whole(module + name + b"\x93" + value((p,)) + b"R", 4)


_TRICKS: list[tuple[str, bool, str | None, Callable[[str], bytes]]] = [
    ("stack-global", True, "os.mkdir", _stack_global),
    ("stack-global-memo", True, None, lambda p: _stack_global(p, memo=True)),
    ("inst", True, "os.mkdir", lambda p: whole(b"(" + value(p) + b"ios\nmkdir\n")),
    ("obj", True, "os.mkdir", lambda p: whole(b"(" + named("os:mkdir") + value(p) + b"o")),
    ("newobj", False, "os.mkdir", lambda p: whole(named("os:mkdir") + value((p,)) + b"\x81")),
    ("protocol-0", True, "os.mkdir", lambda p: b"cos\nmkdir\n(V" + p.encode() + b"\ntR."),
    ("memo-overwritten", True, "os.mkdir", lambda p: whole(named("collections:OrderedDict") + b"q\x000" + named("os:mkdir") + b"q\x000h\x00" + value((p,)) + b"R")),
    ("popped", True, "os.mkdir", lambda p: whole(called("os:mkdir", p) + b"0" + called("collections:OrderedDict"))),
    ("build", True, "os.mkdir", lambda p: whole(called("collections:OrderedDict") + b"}" + text("a") + called("os:mkdir", p) + b"sb")),
    ("behind-a-dict", True, "os.mkdir", lambda p: whole(b"}" + called("os:mkdir", p) + b"0")),
    ("dotted-name", True, "pathlib.os.mkdir", lambda p: whole(text("pathlib") + text("os.mkdir") + b"\x93" + value((p,)) + b"R", 4)),
    ("extension", False, "extension 7", lambda p: whole(b"\x82\x07" + value((p,)) + b"R")),
    ("persistent-id", False, "os.mkdir", lambda p: whole(b"(" + text("module") + called("os:mkdir", p) + b"tQ")),
]  # fmt: skip


def _twice(harm: bytes) -> bytes:
    """Return an archive with two directories: one of a good checkpoint, one of a bad one."""
    return saved(OrderedDict(a=torch.ones(1))) + zipped(harm)


def _flagged(harm: bytes) -> bytes:
    """Return an archive whose entries are said to be encrypted."""
    data = bytearray(zipped(harm))
    data[6] |= 1
    at = data.index(b"PK\1\2")
    data[at + 8] |= 1
    return bytes(data)


def _wrong_crc(harm: bytes) -> bytes:
    data = bytearray(zipped(harm))
    for at in (14, data.index(b"PK\1\2") + 16):
        data[at] ^= 1
    return bytes(data)


_CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "raw-pickle": lambda harm: harm,
    "legacy": legacy,
    "legacy-first": lambda harm: harm + legacy(pickle.dumps({}, 2)),
    "legacy-keys": lambda harm: legacy(pickle.dumps({}, 2))[: -len(pickle.dumps([], 2))] + harm,
    "tar": tarred,
    "torchscript": lambda harm: zipped(harm, **{"constants.pkl": harm}),
    "other-case": lambda harm: archive(
        {
            "archive/data.pkl": pickle.dumps({}, 2),
            "archive/DATA.PKL": harm,
            "archive/version": b"3\n",
        }
    ),
    "two-folders": lambda harm: archive(
        {"a/data.pkl": pickle.dumps({}, 2), "a/version": b"3\n", "b/data.pkl": harm}
    ),
    "compressed": lambda harm: archive({"archive/data.pkl": harm}, zipfile.ZIP_DEFLATED),
    "two-directories": _twice,
    "encrypted": _flagged,
    "wrong-crc": _wrong_crc,
    "behind-its-end": lambda harm: zipped(pickle.dumps({}, 2) + harm),
}


# ── Zip bombs ───────────────────────────────────────────────────────────────────────


@dataclass
class Entry:
    """An entry of a zip archive, whose headers can be made to lie."""

    name: str
    data: bytes = b""
    size: int | None = None  # as the directory says it
    packed: int | None = None
    local_size: int | None = None
    method: int = 0
    offset: int | None = None
    extra: bytes = b""

    def header(self) -> bytes:
        size = len(self.data) if self.local_size is None else self.local_size
        name = self.name.encode()
        crc = zlib.crc32(self.data)
        fixed = (b"PK\3\4", 20, 0, self.method, 0, 33, crc, size, size, len(name), 0)
        return struct.pack("<4s5H3L2H", *fixed) + name

    def listed(self, offset: int) -> bytes:
        size = len(self.data) if self.size is None else self.size
        packed = size if self.packed is None else self.packed
        name, crc = self.name.encode(), zlib.crc32(self.data)
        place = offset if self.offset is None else self.offset
        fixed = (b"PK\1\2", 20, 20, 0, self.method, 0, 33, crc, packed, size)
        ends = (len(name), len(self.extra), 0, 0, 0, 0, place)
        return struct.pack("<4s6H3L5H2L", *fixed, *ends) + name + self.extra


def laid_out(entries: list[Entry], *, count: int | None = None, end: bytes | None = None) -> bytes:
    """Return an archive of these, whose end says ``count`` entries, or is ``end``."""
    body, listing = bytearray(), bytearray()
    for entry in entries:
        listing += entry.listed(len(body))
        body += entry.header() + entry.data
    said = min(0xFFFF, len(entries)) if count is None else count
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, said, said, len(listing), len(body), 0)
    return bytes(body + listing + (last if end is None else end))


def _end_64(count: int, length: int, offset: int, at: int) -> bytes:
    """Return the three records that end a large archive, the first of them being ``at``."""
    return (
        struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, offset)
        + struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
        + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *[0xFFFF] * 2, *[0xFFFFFFFF] * 2, 0)
    )


def many(count: int) -> bytes:
    """Return an archive of so many entries, all of them the same bytes."""
    entry = Entry("archive/data.pkl", b".")
    body, listing = entry.header() + b".", entry.listed(0) * count
    return body + listing + _end_64(count, len(listing), len(body), len(body) + len(listing))


@cache
def bombs() -> dict[str, bytes]:
    """Return zip archives that say more than they hold, or hold more than they say."""
    good = Entry("archive/data.pkl", b"\x80\x02}.")
    nested = laid_out([good])
    for _ in range(20):
        nested = laid_out([Entry("archive/data.pkl", nested)])
    big = struct.pack("<2HQQ", 1, 16, 1 << 60, 1 << 60)
    listing = good.listed(0)
    body = good.header() + good.data
    inner = Entry("archive/data/1", b"x" * 8)
    outer = Entry("archive/data/0", inner.header() + inner.data)
    hidden = len(body) + len(outer.header())
    return {
        "compressed 1,000 to 1": archive(
            {"archive/data.pkl": good.data, "archive/data/0": bytes(64 << 20)}, zipfile.ZIP_DEFLATED
        ),
        "stored, of 4 GB": laid_out([good, Entry("archive/data/0", b"xx", size=0xFFFFFFFE)]),
        "larger than it is stored": laid_out([good, Entry("archive/data/0", b"x", 1 << 30, 1)]),
        "another size in front": laid_out(
            [good, Entry("archive/data/0", b"xx", local_size=1 << 30)]
        ),
        "one entry twice": laid_out([good, Entry("archive/data/0", good.data, offset=0)]),
        "an entry in an entry": laid_out(
            [good, outer, Entry("archive/data/1", inner.data, offset=hidden)]
        ),
        "an entry behind the end": laid_out([good, Entry("archive/data/0", b"xx", offset=1 << 30)]),
        "a million entries": many(1_000_000),
        "more entries than it says": laid_out([good] * 60_000, count=1),
        "archives in archives": nested,
        "an entry of 64 bits": laid_out(
            [good, Entry("archive/data/0", b"x", 0xFFFFFFFF, extra=big)]
        ),
        "an end that lies": body + listing + _end_64(1, 1 << 40, 1 << 40, len(body) + len(listing)),
        "two ends": body
        + listing
        + _end_64(1, len(listing), len(body), len(body) + len(listing))[:-22]
        + laid_out([good])[-22:-6]
        + struct.pack("<LH", 7, 0),
        "names of 64 KB": laid_out([Entry(f"a/{i}".ljust(65_535, "x"), b"") for i in range(600)]),
        "a comment": laid_out([good])[:-2] + b"\xff\xff" + bytes(65_535),
    }


# ── Giants ──────────────────────────────────────────────────────────────────────────


def tensor(
    numel: int, sizes: tuple[int, ...], strides: tuple[int, ...], *, old: bool = False
) -> bytes:
    """Push a float32 tensor of a storage that is said to have so many elements."""
    last = (None,) if old else ()
    pid = b"(" + b"".join(
        value(part) for part in ("storage", named("torch:FloatStorage"), "0", "cpu", numel, *last)
    )
    made = called("collections:OrderedDict")
    return called("torch._utils:_rebuild_tensor_v2", pid + b"tQ", 0, sizes, strides, False, made)


def held(tensors: dict[str, bytes]) -> bytes:
    """Return the pickle of a dict of these."""
    items = b"".join(text(name) + pushed for name, pushed in tensors.items())
    return whole(b"}(" + items + b"u")


def giants() -> dict[str, bytes]:
    """Return small checkpoints that say that they hold much."""
    one = {"0": struct.pack("<f", 1.0)}
    depth = 100_000
    return {
        "repeated by its strides": zipped(held({"a": tensor(1, (1 << 30,), (0,))}), one),
        "more sizes than 64 bits": zipped(held({"a": tensor(1, (1 << 31,) * 3, (0,) * 3)}), one),
        "a storage of a terabyte": zipped(held({"a": tensor(1 << 38, (1,), (1,))}), one),
        "a storage of a terabyte, legacy": legacy(
            held({"a": tensor(1 << 38, (1,), (1,), old=True)})
        ),
        "no values": saved({"a": torch.empty(1 << 40, device="meta")}),
        "bytes": zipped(whole(called("builtins:bytearray", 1 << 40))),
        "a hundred thousand tensors": many(100_000),
        "dicts in dicts": zipped(whole(b"}" + (text("a") + b"}") * depth + b"s" * depth)),
        "a header of 100 MB": (100_000_000).to_bytes(8, "little") + b"{" + b" " * 100_000_000,
    }
