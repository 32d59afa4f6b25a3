"""Files made to do harm: each is refused, no canary dies, and no memory is taken."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile
import pytest
from click.testing import CliRunner
from conftest import refused
from test_renderers import report

from exporter.bundle import write_manifest
from exporter.checkpoints import _child, read_checkpoint
from exporter.checkpoints.archive import MOST_ENTRIES
from exporter.cli import main
from exporter.errors import ExportError, InputRefused, OutOfMemory
from exporter.profile import load_profile
from exporter.renderers import record

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "export": ["--out", "out", "--input", "1x32x32", "-p", "fp32", "--weights"],
    "parity": ["parity", "bundle", "--weights"],
    "tune": ["tune", "--max-drop", "1%", "--weights"],
}
TRY = """
import json, sys, time
from pathlib import Path
{load}
said = {{}}
for path in sorted(Path(sys.argv[1]).iterdir()):
    start = time.process_time()
    try:
        said[path.name] = "loaded " + type(load(path)).__name__
    except BaseException as error:
        said[path.name] = type(error).__name__ + ": " + str(error)
    said[path.name] = (time.process_time() - start, said[path.name])
Path(sys.argv[2]).write_text(json.dumps(said))
"""


def each(files: Path, load: str) -> dict[str, tuple[float, str]]:
    """Return what a process that loads every file says of each, and the seconds that it computed.

    ``load`` is what defines a function of that name.
    """
    found = files.parent / "said.json"
    subprocess.run(
        [sys.executable, "-c", TRY.format(load=load), str(files), str(found)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    return {name: tuple(said) for name, said in json.loads(found.read_text("utf-8")).items()}


@pytest.fixture
def canaries(tmp_path) -> Path:
    folder = tmp_path / "canaries"
    folder.mkdir()
    return folder


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


# ── Malicious pickles ───────────────────────────────────────────────────────────────


def test_there_are_sixty_malicious_files_and_more_and_all_differ(canaries):
    found = list(hostile.gadgets(canaries))
    assert len({gadget.name for gadget in found}) == len(found) >= 60
    assert len({gadget.data for gadget in found}) == len(found)


def test_the_canaries_can_be_fired(canaries, files):
    live = [gadget for gadget in hostile.gadgets(canaries) if gadget.live]
    for gadget in live:
        (files / gadget.name).write_bytes(gadget.pickle)
    each(files, "import pickle\ndef load(path): return pickle.loads(path.read_bytes())")
    assert {path.name for path in canaries.iterdir()} == {gadget.name for gadget in live}
    assert len(live) >= 55


def bundle(folder: Path) -> Path:
    """Write what the parity command takes for a bundle until it looks at the weights."""
    folder.mkdir()
    profile = load_profile("default", {"precision.fp32.tolerance": {}}).only(("fp32",))
    (folder / "profile.toml").write_text(profile.to_toml(), "utf-8")
    (folder / "report.json").write_text(record.render(report()), "utf-8")
    write_manifest(folder, tool="resnet-export 1.0", environment={})
    return folder


def test_the_commands_that_load_weights_are_the_ones_tried_here():
    takes = {
        name
        for name, command in {"export": main, **main.commands}.items()
        if any(option.name in ("weights", "checkpoint") for option in command.params)
    }
    assert takes == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_what_is_in_a_malicious_file(command, canaries, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle(tmp_path / "bundle")
    (tmp_path / "tune").mkdir()
    before, environment = sorted(tmp_path.rglob("*")), dict(os.environ)
    path = tmp_path / "net.pth"
    for gadget in hostile.gadgets(canaries):
        path.write_bytes(gadget.data)
        done = CliRunner().invoke(main, [*COMMANDS[command], str(path)])
        path.unlink()
        assert done.exit_code == 3, f"{gadget.name}: {done.output}"
        assert (gadget.imports or "net.pth: ") in done.output, gadget.name
        assert "weights_only" not in done.output, gadget.name
        assert sorted(tmp_path.rglob("*")) == before, gadget.name
    assert dict(os.environ) == environment
    assert list(canaries.iterdir()) == []


def test_pytorch_alone_fires_no_canary_either(canaries, files):
    for gadget in hostile.gadgets(canaries):
        (files / gadget.name).write_bytes(gadget.data)
    said = each(files, UNGUARDED)
    assert list(canaries.iterdir()) == []
    loaded = sorted(name for name, (_, what) in said.items() if what.startswith("loaded"))
    assert loaded == HARMLESS_IN_PYTORCH


UNGUARDED = """
import torch
from exporter.checkpoints import _child
_child.limit(1 << 28, written=1 << 28, seconds=100, files=64)
def load(path): return _child.load(path.open("rb"))
"""
# In these PyTorch reads the good part, and nothing of the bad one: which one it takes is luck.
HARMLESS_IN_PYTORCH = ["behind-its-end", "other-case"]


# ── Zip bombs ───────────────────────────────────────────────────────────────────────


MEASURED = """
import resource
from exporter.checkpoints import read_checkpoint
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = rss()
def load(path):
    try:
        read_checkpoint(path)
    except Exception as error:
        raise type(error)(f"{rss() - before:.0f} MB {error}") from None
"""


def test_every_zip_bomb_is_refused_within_two_seconds_and_200_megabytes(files):
    bombs = hostile.bombs()
    assert len(bombs) >= 12
    for name, data in bombs.items():
        (files / name).write_bytes(data)
    said = each(files, MEASURED)
    assert said.keys() == bombs.keys()
    for name, (seconds, what) in said.items():
        kind, _, rest = what.partition(": ")
        grown, _, message = rest.partition(" MB ")
        assert kind == "InputRefused", f"{name}: {what}"
        assert name in message
        assert seconds < 2, f"{name} took {seconds:.1f} s"
        assert int(grown) < 200, f"{name} took {grown} MB"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("compressed 1,000 to 1", "its entry 'archive/data.pkl' is compressed"),
        ("stored, of 4 GB", "its entry 'archive/data/0' is larger than the file"),
        (
            "larger than it is stored",
            "its entry 'archive/data/0' is compressed, to 1 of 1,073,741,",
        ),
        ("another size in front", "the two headers of its entry 'archive/data/0' differ"),
        ("one entry twice", "its entry 'archive/data/0' overlaps another or is not there"),
        ("an entry in an entry", "its entry 'archive/data/1' overlaps another or is not there"),
        ("an entry behind the end", "its entry 'archive/data/0' overlaps another or is not there"),
        ("a million entries", "a zip archive of 1,000,000 entries"),
        ("more entries than it says", "its directory is longer than its entries"),
        ("archives in archives", "truncated, damaged or of no format"),
        ("an entry of 64 bits", "its entry 'archive/data/0' is larger than the file"),
        ("an end that lies", "its directory is not in front of its end"),
        ("two ends", "it has two ends, which do not say the same"),
        ("names of 64 KB", "a zip archive of 600 entries"),
        ("a comment", "a zip archive that is cut short, or has something behind its end"),
    ],
)
def test_a_bomb_is_refused_for_what_is_wrong_with_it(tmp_path, name, words):
    path = tmp_path / "net.pth"
    path.write_bytes(hostile.bombs()[name])
    with refused(InputRefused, "net.pth: ", words):
        read_checkpoint(path)


def test_as_many_entries_as_are_allowed_are_read():
    assert MOST_ENTRIES > 50 * 700  # what ResNet-152 has, many times over


# ── Giants ──────────────────────────────────────────────────────────────────────────


GIANTS: dict[str, tuple[type[ExportError], str]] = {
    "no values": (InputRefused, "tensors without values, of the meta device"),
    "bytes": (InputRefused, "builtins.bytearray"),
    "a hundred thousand tensors": (InputRefused, "a zip archive of 100,000 entries"),
    "a header of 100 MB": (InputRefused, "its header has 100,000,000 bytes"),
}
BEHIND_THE_GUARD = {
    "repeated by its strides": "come to 4,294,967,296 bytes",
    "more sizes than 64 bits": "integer multiplication overflow",
    "a storage of a terabyte": "record size .4 bytes. does not match expected size",
    "dicts in dicts": "no tensors in it have names; its keys are 'a'",
}


@pytest.mark.parametrize("name", GIANTS)
def test_a_giant_is_refused_before_a_process_is_started_for_it(name, tmp_path, monkeypatch):
    def start(*args: Any, **more: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(subprocess, "Popen", start)
    path = tmp_path / "net.pth"
    path.write_bytes(hostile.giants()[name])
    kind, words = GIANTS[name]
    with refused(kind, words):
        read_checkpoint(path)


@pytest.mark.parametrize("name", BEHIND_THE_GUARD)
def test_a_giant_that_passes_the_guard_is_refused_before_it_is_made(name):
    data = hostile.giants()[name]
    with pytest.raises((_child.Refused, RuntimeError), match=BEHIND_THE_GUARD[name]):
        _child.named_tensors(_child.load(io.BytesIO(data)), len(data))


def test_a_giant_that_takes_memory_ends_its_own_process_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pth"
    path.write_bytes(hostile.giants()["a storage of a terabyte, legacy"])
    done = CliRunner().invoke(main, [*COMMANDS["export"], str(path)])
    assert done.exit_code == OutOfMemory.exit_code == 5, done.output
    assert "net.pth: loading it takes more than the 268 MB that a file of its size" in done.output
    assert len(GIANTS) + len(BEHIND_THE_GUARD) + 1 == len(hostile.giants()) == 9
