"""The process that opens a checkpoint: it may crash, hang and eat, and takes nothing with it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import hostile
import pytest
import torch
from conftest import refused

from exporter.checkpoints import _child, isolated
from exporter.errors import InputRefused, OutOfMemory

SAYS = "import pathlib, sys; folder = pathlib.Path(sys.argv[1]); say = (folder / 'outcome.json').write_text\n"


@pytest.fixture
def scratch(tmp_path) -> Path:
    """Return the folder that temporary ones are made in."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def process(scratch, tmp_path, monkeypatch):
    """Return a function that loads a file in a process which does this instead."""

    def load(code: str) -> object:
        child = tmp_path / "child.py"
        child.write_text(SAYS + code, "utf-8")
        monkeypatch.setattr(isolated, "_CHILD", child)
        monkeypatch.setattr(tempfile, "tempdir", str(scratch))
        path = tmp_path / "net.pth"
        path.write_bytes(b"the checkpoint")
        with path.open("rb") as stream:
            return isolated.load_isolated(stream, 14)

    return load


# ── What it says ────────────────────────────────────────────────────────────────────


def test_it_is_given_the_file_and_an_empty_folder_and_no_other_open_file(process, tmp_path):
    seen = tmp_path / "seen"
    code = f"""
import os
held = [os.stat(n).st_ino for n in range(3, 64) if os.path.exists(f"/proc/self/fd/{{n}}")]
listed = sorted(p.name for p in folder.iterdir())
pathlib.Path({str(seen)!r}).write_text(
    repr((sys.stdin.read(), listed, held, os.getcwd() == str(folder), os.getsid(0) == os.getpid()))
)
say('{{"refused": "enough"}}')
"""
    with refused(InputRefused, "enough"):
        process(code)
    assert seen.read_text("utf-8") == repr(("the checkpoint", ["stderr.txt"], [], True, True))


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("say('{\"refused\": \"a cake\"}')", InputRefused, "a cake"),
        ("say('{\"memory\": \"MemoryError\"}')", OutOfMemory, "more than the 268 MB that a file of"),
        ("raise MemoryError", OutOfMemory, "more than the 268 MB that a file of its size can need"),
        ("raise OSError('no room')", InputRefused, "ended with exit code 1: OSError: no room"),
        ("import os; os.abort()", InputRefused, "the process that loads it ended with SIGABRT"),
        ("import os; os.kill(os.getpid(), 11)", InputRefused, "that loads it ended with SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", InputRefused, "that loads it ended with SIGKILL"),
        ("say('{')", InputRefused, "the process that loads it ended with exit code 0"),
        ("raise OSError('\\x1b[31m' + 'x' * 999)", InputRefused, "OSError: \\x1b[31mxxx"),
    ],
)  # fmt: skip
def test_however_it_ends_that_is_said_and_its_folder_goes(process, scratch, code, kind, words):
    with refused(kind, words, hint=("weights.safetensors",)):
        process(code)
    assert list(scratch.iterdir()) == []


PYTORCH = "Weights only load failed. In PyTorch 2.6, we changed the default of `weights_only`.\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (f"UnpicklingError: {PYTORCH} WeightsUnpickler error: Unsupported operand 149\n", "(Unsupported operand 149)"),
        (f"UnpicklingError: {PYTORCH}", "(UnpicklingError)"),
        ("RuntimeError: Cannot use ``weights_only=True`` with TorchScript", "(RuntimeError)"),
        ("RuntimeError: numel: overflow\nmore", "(RuntimeError: numel: overflow)"),
    ],
)  # fmt: skip
def test_pytorchs_advice_to_load_unsafely_is_not_passed_on(error, words):
    assert f"({isolated._said(error)})" == words


# ── What it can take ────────────────────────────────────────────────────────────────


def test_one_that_hangs_is_ended(process, monkeypatch):
    monkeypatch.setattr(isolated, "SECONDS", 0.5)
    start = time.perf_counter()
    with refused(InputRefused, "after 0.5 seconds it was not loaded"):
        process("import time; time.sleep(60)")
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_and_leaves_nothing(process, scratch, tmp_path, signum):
    pid = tmp_path / "pid"
    code = (
        f"import os, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )

    def interrupt() -> None:
        while not (pid.is_file() and pid.read_text("ascii")):
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signum, stop)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            process(code)
    finally:
        signal.signal(signum, handler)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text("ascii")), 0)
    assert list(scratch.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the system says no sizes")
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("bytearray(48 << 20)", "done"),
        ("bytearray(80 << 20)", "MemoryError"),
        ("open('large', 'wb').write(bytes(1 << 20)) and open('large', 'ab').write(bytes(65 << 20))", "MemoryError"),
        ("open('large', 'wb').truncate(65 << 20)", "OSError"),
        ("[open('/dev/null') for _ in range(99)]", "OSError"),
        ("sum(0 for _ in iter(int, 1))", ""),
    ],
)  # fmt: skip
def test_memory_files_and_time_have_limits(tmp_path, code, said):
    program = (
        f"import sys; sys.path.insert(0, {str(Path(_child.__file__).parent)!r}); import _child\n"
        "_child.limit(64 << 20, written=64 << 20, seconds=1, files=64)\n"
        f"try:\n    {code}\n    print('done')\nexcept Exception as error:\n"
        "    print(type(error).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == said
    assert (done.returncode < 0) == (not said)


def test_a_dict_that_is_in_many_places_is_walked_once():
    held: dict[str, object] = {"a": torch.ones(1)}
    for _ in range(5):
        held = {f"{i:04}": held for i in range(1000)}
    ((path, _),) = _child.named_tensors(held, 100)
    assert path == ["0000"] * 5 + ["a"]


def test_tensors_larger_than_the_file_could_hold_are_refused_before_they_are_copied():
    data = hostile.saved({"a": torch.ones(1000), "b": torch.ones(1).expand(1 << 40)})
    with pytest.raises(_child.Refused, match=r"its tensors up to 'b', of shape \(1099511627776,\)"):
        _child.named_tensors(_child.load(io.BytesIO(data)), len(data))


@pytest.mark.parametrize(
    "tensor", [torch.ones(2).to_sparse(), torch.empty(2, device="meta"), torch.ones(1).to_mkldnn()]
)
def test_a_tensor_without_plain_numbers_is_refused_by_name(tensor):
    with pytest.raises(_child.Refused, match=r"its tensor 'net\.a' is no plain tensor of numbers"):
        _child.named_tensors({"net": {"a": tensor}}, 1000)
