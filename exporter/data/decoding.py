"""Processes that decode images, each of which may fall over without harm to another.

An image whose decoder crashes or hangs is unfit, and the process is replaced. They are given bytes
and hand back bytes, so that they need no file; they end when their input does, so that none
outlives the run.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Timer
from typing import Any, NamedTuple
from weakref import finalize

_DECODER = Path(__file__).with_name("_decoder.py")
_LARGEST = 256 << 20  # bytes of a file
_GRACE = 2.0  # seconds that a process has to end itself in
_BLOCK = 256  # files in flight


class Decoded(NamedTuple):
    """What became of one image: ``refused`` says why nothing did."""

    name: str
    refused: str | None = None
    bomb: bool = False
    digest: str = ""
    format: str = ""
    notes: tuple[str, ...] = ()
    pixels: bytes = b""


class NotRead(Exception):
    """Why a file was not read, in words."""


class Decoders:
    """As many processes as asked for, started when they are needed."""

    def __init__(self, settings: dict[str, Any], workers: int) -> None:
        self._settings = settings
        self._workers = workers
        self._idle: SimpleQueue[subprocess.Popen[bytes] | None] = SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self.close = finalize(self, _end, self._threads, self._running)

    def decode(self, folder: Path, names: Iterable[str], *, pixels: bool) -> Iterator[Decoded]:
        """Yield what becomes of each file, in order; with ``pixels`` those too."""
        names = list(names)
        for start in range(0, len(names), _BLOCK):
            block = names[start : start + _BLOCK]
            yield from self._threads.map(lambda n: self._one(folder, n, pixels=pixels), block)

    def _one(self, folder: Path, name: str, *, pixels: bool) -> Decoded:
        try:
            data = read_file(folder / name)
        except NotRead as error:
            return Decoded(name, refused=str(error))
        process, kept = self._idle.get(), None
        try:
            process = process or self._start()
            found = self._ask(process, name, data, pixels=pixels)
            kept = process if process.poll() is None else None
        finally:
            if process is not None and kept is None:
                _kill(process)
                with self._lock:
                    self._running.discard(process)
            self._idle.put(kept)
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, "-P", str(_DECODER), json.dumps(self._settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C comes to this process, which then ends that one
        )
        with self._lock:
            self._running.add(process)
        return process

    def _ask(
        self, process: subprocess.Popen[bytes], name: str, data: bytes, *, pixels: bool
    ) -> Decoded:
        """Return a process's answer, or how it ended without one."""
        seconds = self._settings["seconds"]
        assert process.stdin is not None
        assert process.stdout is not None
        overdue = Event()

        def end() -> None:
            overdue.set()
            process.kill()

        timer = Timer(seconds + _GRACE, end)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write((b"p" if pixels else b"d") + struct.pack(">Q", len(data)))
            process.stdin.write(data)
            process.stdin.flush()
            (size,) = struct.unpack(">I", _exactly(process.stdout, 4))
            said = json.loads(_exactly(process.stdout, size))
            if "refused" in said:
                return Decoded(name, refused=said["refused"], bomb=said.get("bomb", False))
            count = int(self._settings["bytes"]) if pixels else 0
            return Decoded(
                name,
                digest=said["digest"],
                format=said["format"],
                notes=tuple(said["notes"]),
                pixels=_exactly(process.stdout, count),
            )
        except (OSError, EOFError, ValueError, struct.error):
            code = _kill(process)
            if overdue.is_set() or code == -getattr(signal, "SIGALRM", 0):
                return Decoded(name, refused=f"its decoder took more than {seconds:g} seconds")
            ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Decoded(name, refused=f"its decoder crashed ({ended})")
        finally:
            timer.cancel()


def read_file(path: Path) -> bytes:
    """Return what is in a file. Raises `NotRead`; nothing but a regular file is ever read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: a pipe has a writer
            raise NotRead(f"it is {_kind(path.stat().st_mode)}, and no regular file")
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as stream:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise NotRead("it is no regular file")
            if found.st_size > _LARGEST:
                raise NotRead(f"the file has {found.st_size:,} bytes, and {_LARGEST:,} are allowed")
            return stream.read(_LARGEST)
    except OSError as error:
        raise NotRead((error.strerror or str(error)).lower()) from error


def _kind(mode: int) -> str:
    kinds: dict[str, Callable[[int], bool]] = {
        "a folder": stat.S_ISDIR,
        "a named pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a device": lambda m: stat.S_ISCHR(m) or stat.S_ISBLK(m),
    }
    return next((kind for kind, matches in kinds.items() if matches(mode)), "something else")


def _exactly(stream: Any, count: int) -> bytes:
    found: bytes = stream.read(count)
    if len(found) < count:
        raise EOFError
    return found


def _kill(process: subprocess.Popen[bytes]) -> int:
    """End a process that failed, and return how it ended by itself if it had."""
    try:
        code = process.wait(_GRACE / 10)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # what was not taken is not missed
                continue
    return code


def _end(threads: ThreadPoolExecutor, running: set[subprocess.Popen[bytes]]) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    for process in list(running):
        process.kill()
        _kill(process)
    running.clear()
