"""The bundle: whole or not at all, whatever happens; and nobody else's files are touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
from pathlib import Path
from time import sleep

import pytest
from conftest import refused

from exporter import bundle
from exporter.bundle import MANIFEST, new_bundle, read_manifest, write_manifest
from exporter.errors import OutputError


def publish(final: Path, text: str = "new", files: tuple[str, ...] = ("a.txt", "b/c.txt")) -> None:
    with new_bundle(final) as folder:
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, "utf-8")
        write_manifest(folder, tool="test 1", environment={"python": "3"})


def listing(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.txt")}


@pytest.fixture
def final(tmp_path) -> Path:
    return tmp_path / "out" / "build"


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def names(final: Path) -> list[str]:
    return inside(final.parent)


# ── What is published ───────────────────────────────────────────────────────────────


def test_a_bundle_gets_its_name_when_it_is_whole_and_not_before(final):
    with new_bundle(final) as folder:
        assert folder.parent == final.parent
        assert list(folder.iterdir()) == []
        (folder / "a.txt").write_text("1")
        write_manifest(folder, tool="t", environment={})
        assert not final.exists()
    assert inside(final) == ["a.txt", MANIFEST]
    assert names(final) == ["build"]


def test_the_manifest_pins_every_file_by_its_hash_and_size(final):
    publish(final, "hello")
    table = json.loads((final / MANIFEST).read_text("utf-8"))
    assert (table["schema"], table["tool"], table["environment"]) == (2, "test 1", {"python": "3"})
    digest = hashlib.sha256(b"hello").hexdigest()
    assert table["files"] == [
        {"name": "a.txt", "sha256": digest, "size": 5},
        {"name": "b/c.txt", "sha256": digest, "size": 5},
    ]


def test_the_manifest_reads_back_and_nothing_else_does(final, tmp_path):
    publish(final)
    manifest = read_manifest(final)
    assert [file.name for file in manifest.files] == ["a.txt", "b/c.txt"]
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"not json",
        b'{"schema": 1}',
        b'{"schema": 1, "tool": "\xff"}',
        b"[" * 10**5,
    ],
    ids=lambda data: repr(data[:12]),
)
def test_a_manifest_that_is_none_makes_no_bundle(tmp_path, data):
    (tmp_path / MANIFEST).write_bytes(data)
    assert read_manifest(tmp_path) is None


def test_a_newer_bundle_takes_the_place_of_an_older_one_whole(final):
    publish(final, "old", ("a.txt", "old.txt"))
    publish(final, "new", ("a.txt", "new.txt"))
    assert listing(final) == {"a.txt": "new", "new.txt": "new"}
    assert [file.name for file in read_manifest(final).files] == ["a.txt", "new.txt"]
    assert names(final) == ["build"]


def test_the_older_bundle_stands_while_the_newer_one_is_written(final):
    publish(final, "old")
    with new_bundle(final) as folder:
        (folder / "a.txt").write_text("new")
        write_manifest(folder, tool="t", environment={})
        assert listing(final) == {"a.txt": "old", "b/c.txt": "old"}


def test_an_empty_folder_may_be_where_the_bundle_goes(final):
    final.mkdir(parents=True)
    publish(final)
    assert listing(final) == {"a.txt": "new", "b/c.txt": "new"}


def test_missing_parents_are_made(tmp_path):
    publish(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c" / MANIFEST).is_file()


def test_a_relative_name_stays_where_it_was_meant_if_the_process_moves_on(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with new_bundle(Path("build")) as folder:
        (folder / "a.txt").write_text("1")
        write_manifest(folder, tool="t", environment={})
        os.chdir("elsewhere")
    assert (tmp_path / "build" / "a.txt").is_file()
    assert inside(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("name", ["build", "my build", "bündel", "build.v1", "build[1]", "-o"])
def test_any_name_will_do(tmp_path, name):
    publish(tmp_path / name, "1")
    publish(tmp_path / name, "2")
    assert listing(tmp_path / name) == {"a.txt": "2", "b/c.txt": "2"}
    assert inside(tmp_path) == [name]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_files_and_folders_get_the_modes_that_the_umask_grants(final, umask):
    before = os.umask(umask)
    try:
        with new_bundle(final) as folder:
            (folder / "b").mkdir()
            for name in ("a.txt", "b/c.txt"):
                os.close(os.open(folder / name, os.O_CREAT | os.O_WRONLY, 0o600))
            write_manifest(folder, tool="t", environment={})
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    for path in [final, *final.rglob("*")]:
        want = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == want, path


# ── What goes wrong on the way ──────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), OSError(errno.ENOENT, "x")]
)
@pytest.mark.parametrize("older", [False, True])
def test_after_any_exception_nothing_is_left_but_what_was_there(final, error, older):
    if older:
        publish(final, "old")

    def fail_half_way():
        with new_bundle(final) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "half.txt").write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        fail_half_way()
    assert caught.value is error
    assert names(final) == (["build"] if older else [])
    if older:
        assert listing(final) == {"a.txt": "old", "b/c.txt": "old"}


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "No space left"), (errno.EDQUOT, "quota"), (errno.EROFS, "Read-only")],
)
def test_a_disk_that_refuses_is_an_error_of_the_output(final, code, reason):
    publish(final, "old")
    with refused(OutputError, str(final), reason), new_bundle(final) as folder:
        (folder / "half.txt").write_text("half")
        raise OSError(code, os.strerror(code))
    assert names(final) == ["build"]
    assert listing(final) == {"a.txt": "old", "b/c.txt": "old"}


def test_a_disk_that_fills_up_at_the_last_moment_leaves_the_older_bundle(final, monkeypatch):
    publish(final, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bundle.os, "fsync", full)
    with refused(OutputError, str(final), "No space left"):
        publish(final, "new")
    assert names(final) == ["build"]
    assert listing(final) == {"a.txt": "old", "b/c.txt": "old"}


def test_where_two_folders_cannot_be_exchanged_the_older_one_steps_aside(final, monkeypatch):
    monkeypatch.setattr(bundle, "_exchange", lambda one, other: False)
    publish(final, "old", ("a.txt", "old.txt"))
    publish(final, "new")
    assert listing(final) == {"a.txt": "new", "b/c.txt": "new"}
    assert names(final) == ["build"]


def test_an_older_bundle_that_stepped_aside_comes_back_if_the_newer_cannot_enter(
    final, monkeypatch
):
    publish(final, "old")
    rename = Path.rename

    def refuses(self, target):
        if self.name.endswith(".partial") and Path(target) == final:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(bundle, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", refuses)
    with refused(OutputError, str(final)):
        publish(final, "new")
    assert listing(final) == {"a.txt": "old", "b/c.txt": "old"}
    assert names(final) == ["build"]


# ── What is not ours ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("manifest", [None, b"{}", b"not json"])
def test_a_folder_of_other_files_is_refused_before_any_work(final, manifest):
    final.mkdir(parents=True)
    (final / "thesis.txt").write_text("years of work")
    if manifest is not None:
        (final / MANIFEST).write_bytes(manifest)
    with refused(OutputError, "build", "not of a bundle", hint=("--out",)), new_bundle(final):
        pytest.fail("work was done")
    assert listing(final) == {"thesis.txt": "years of work"}
    assert names(final) == ["build"]


@pytest.mark.parametrize("name", ["notes.txt", "b/notes.txt", "new/deep/notes.txt", ".hidden"])
def test_a_bundle_with_one_file_of_someone_elses_is_refused_by_that_file(final, name):
    publish(final, "old")
    (final / name).parent.mkdir(parents=True, exist_ok=True)
    (final / name).write_text("mine")
    with refused(OutputError, "build", repr(name), hint=("move them away",)):
        publish(final)
    assert (final / name).read_text() == "mine"
    assert (final / "a.txt").read_text() == "old"


def test_a_manifest_of_another_tool_alone_is_not_ours(final):
    final.mkdir(parents=True)
    (final / MANIFEST).write_text('{"name": "web app"}')
    with refused(OutputError, repr(MANIFEST)):
        publish(final)


@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
def test_a_link_inside_a_bundle_is_someone_elses(final, tmp_path, target):
    publish(final, "old")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (final / "link").symlink_to(tmp_path / target)
    with refused(OutputError, "build", "'link'"):
        publish(final)
    assert (final / "link").is_symlink()


def test_a_file_where_the_folder_would_go_is_refused(final):
    final.parent.mkdir()
    final.write_text("mine")
    with refused(OutputError, "build is a file"):
        publish(final)
    assert final.read_text() == "mine"


@pytest.mark.parametrize("target", ["bundle", "folder", "file", "nothing"])
def test_a_symbolic_link_is_refused_and_what_it_points_to_is_left(final, tmp_path, target):
    publish(tmp_path / "bundle", "old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    final.parent.mkdir()
    final.symlink_to(tmp_path / target)
    with refused(OutputError, "build is a symbolic link", hint=("the folder it points to",)):
        publish(final)
    assert final.is_symlink()
    assert listing(tmp_path / "bundle") == {"a.txt": "old", "b/c.txt": "old"}


def test_a_folder_that_is_filled_while_we_work_is_not_replaced(final):
    with refused(OutputError, "'thesis.txt'"), new_bundle(final) as folder:
        write_manifest(folder, tool="t", environment={})
        final.mkdir()
        (final / "thesis.txt").write_text("years of work")
    assert listing(final) == {"thesis.txt": "years of work"}
    assert names(final) == ["build"]


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with refused(OutputError, str(tmp_path / "out" / "build")):
        publish(tmp_path / "out" / "build")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_too_long_for_the_disk_is_refused(tmp_path, length):
    with refused(OutputError, "too long"):
        publish(tmp_path / ("x" * length))
    assert inside(tmp_path) == []


# ── What a killed run leaves ────────────────────────────────────────────────────────


@pytest.fixture
def dead() -> int:
    """Return the id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave(final: Path, name: str) -> Path:
    leftover = final.parent / name
    (leftover / "deep").mkdir(parents=True)
    (leftover / "deep" / "half.onnx").write_text("half")
    return leftover


@pytest.mark.parametrize("name", ["build", "build.v1", "my build", "build[1]", "*"])
def test_what_a_dead_process_left_is_removed(tmp_path, dead, name):
    final = tmp_path / name
    leave(final, f".{name}.{dead}.partial")
    publish(final)
    assert inside(tmp_path) == [name]


def test_what_an_older_process_of_our_own_id_left_is_removed(final):
    leave(final, f".build.{os.getpid()}.partial")
    publish(final)
    assert names(final) == ["build"]
    assert listing(final) == {"a.txt": "new", "b/c.txt": "new"}


def test_what_a_dead_process_left_on_its_way_aside_is_removed(final, dead):
    publish(final, "old")
    leave(final, f".build.{dead}.partial.old")
    publish(final, "new")
    assert names(final) == ["build"]


def test_what_a_living_process_is_writing_is_left_alone(final):
    waits = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(waits, stdin=subprocess.PIPE) as living:
        leftover = leave(final, f".build.{living.pid}.partial")
        publish(final)
        assert (leftover / "deep" / "half.onnx").read_text() == "half"
        assert names(final) == [leftover.name, "build"]


@pytest.mark.parametrize(
    "name", [".build.partial", ".build.x.partial", ".other.1.partial", "build.1.partial", ".build"]
)
def test_what_only_looks_like_a_leftover_is_left_alone(final, name):
    leftover = leave(final, name)
    publish(final)
    assert (leftover / "deep" / "half.onnx").read_text() == "half"


PUBLISH_FOR_EVER = """
import sys
from itertools import count
from pathlib import Path
from exporter.bundle import new_bundle, write_manifest

for turn in count():
    with new_bundle(Path(sys.argv[1])) as folder:
        for index in range(8):
            (folder / f"{index}.txt").write_text(f"{turn}\\n" * 2000)
        write_manifest(folder, tool="t", environment={})
    if turn == 0:
        print("published once", flush=True)
"""


def test_a_process_killed_at_any_moment_leaves_an_old_or_a_new_bundle_whole(final):
    chance = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", PUBLISH_FOR_EVER, str(final)], stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"published once\n"
        sleep(0.1 * chance.random())
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        manifest = read_manifest(final)
        whole = {f"{index}.txt" for index in range(8)}
        assert {file.name for file in manifest.files} == whole
        assert set(inside(final)) == {*whole, MANIFEST}
        for file in manifest.files:
            data = (final / file.name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == file.sha256
            assert len(data) == file.size
        assert len({(final / name).read_text() for name in whole}) == 1  # of one turn
        assert len(names(final)) <= 2  # the bundle, and what this kill left
    publish_again = [sys.executable, "-c", PUBLISH_FOR_EVER.replace("count()", "range(1)")]
    subprocess.run([*publish_again, str(final)], check=True, stdout=subprocess.DEVNULL)
    assert names(final) == ["build"]
