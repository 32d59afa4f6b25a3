"""Checkpoints: read as PyTorch reads them, and everything else named for what it is."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import socket
import sys
import warnings
from collections import Counter
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from conftest import disturb, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from exporter.checkpoints import _child, isolated, read_checkpoint
from exporter.checkpoints.archive import check_archive
from exporter.checkpoints.pickles import check_legacy, check_pickle
from exporter.errors import InputRefused
from exporter.weights import load_weights

WAY_OUT = "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return disturb(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))).eval()


def guarded(data: bytes) -> dict[tuple[str, ...], torch.Tensor]:
    """Return what a checkpoint holds, through every wall but that of the process."""
    stream = io.BytesIO(data)
    if data.startswith(b"PK"):
        check_pickle(check_archive(stream, len(data)))
    else:
        check_legacy(stream)
    stream.seek(0)
    found = _child.named_tensors(_child.load(stream), len(data))
    return {tuple(path): value for path, value in found}


# ── What is read ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_read_bit_for_bit_in_a_process_of_its_own(tmp_path, zipped):
    state = network().state_dict()
    path = tmp_path / "net.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert found.name == "net.pth"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.format == (
        "PyTorch checkpoint, CRC-32 checked"
        if zipped
        else "PyTorch checkpoint of before 1.6, which has no checksum"
    )
    assert list(found.tensors) == [(key,) for key in state]
    assert all(torch.equal(found.tensors[key,], value) for key, value in state.items())


def test_a_wrapped_checkpoint_of_a_training_script_loads_from_its_file(tmp_path):
    path, held = tmp_path / "net.pth", training()
    held["state_dict"] = {f"module.{key}": value for key, value in held["state_dict"].items()}
    torch.save(held, path)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    loaded = load_weights(module, path)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.format == "PyTorch checkpoint, CRC-32 checked"
    assert loaded.changes == ("taken from its ['state_dict']", "'module.' taken off 9 names")
    want = held["state_dict"]
    assert all(torch.equal(v, want[f"module.{k}"]) for k, v in module.state_dict().items())


DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
]
ZIPPED_ALONE = [torch.float8_e4m3fn, torch.uint16]  # as PyTorch itself reads them


@pytest.mark.parametrize(
    ("dtype", "zipped"),
    [*((d, True) for d in (*DTYPES, *ZIPPED_ALONE)), *((d, False) for d in DTYPES)],
)
def test_every_type_of_number_passes_the_guard(dtype, zipped):
    value = torch.tensor([0, 1, 1, 0]).to(dtype)
    data = hostile.saved({"a": value}, _use_new_zipfile_serialization=zipped)
    (found,) = guarded(data).values()
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))


def training() -> dict[str, object]:
    """Return a checkpoint as a training script writes it, after a step."""
    module = network()
    optimizer = torch.optim.Adam(module.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    module(torch.ones(1, 1, 6, 6)[..., :6, :6]).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "arch": "net",
        "best": 0.5,
        "done": False,
        "none": None,
        "classes": ["a", "b"],
        "size": torch.Size([1, 2]),
        "seen": {1, 2},
        "counts": Counter("aab"),
        "state_dict": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "type": torch.float32,
        "device": torch.device("cpu"),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_a_training_script_passes_with_all_that_is_beside_the_weights(zipped):
    data = hostile.saved(training(), _use_new_zipfile_serialization=zipped)
    found = guarded(data)
    state = network().state_dict()
    assert {path[-1] for path in found if path[0] == "state_dict"} == state.keys()
    assert {path for path in found if path[0] != "state_dict"} == {("rng",)}


def test_tensors_that_share_their_numbers_or_lie_in_another_order_come_apart_in_order():
    base = torch.arange(24.0).reshape(1, 2, 3, 4)
    tensors = {"a": base, "b": base, "c": base[0, 1], "d": base.transpose(1, 3), "e": base[:0]}
    for name, value in guarded(hostile.saved(tensors)).items():
        assert value.is_contiguous()
        assert torch.equal(value, tensors[name[0]])


def test_a_parameter_and_a_conjugate_are_what_they_say():
    tensors = {"a": nn.Parameter(torch.ones(2)), "b": torch.tensor([1 + 2j]).conj()}
    found = guarded(hostile.saved(tensors))
    assert torch.equal(found["a",], torch.ones(2))
    assert not found["a",].requires_grad
    assert found["b",].tolist() == [1 - 2j]


def test_large_checkpoints_keep_the_limits_that_follow_from_their_size(tmp_path):
    value = torch.arange(12 << 20, dtype=torch.float32)  # 48 MB, and two more names for it
    path = tmp_path / "net.pth"
    torch.save({"a": value, "b": value, "c": value.view(-1, 8)}, path)
    found = read_checkpoint(path).tensors
    assert [torch.equal(one.flatten(), value) for one in found.values()] == [True] * 3


# ── What is damaged ─────────────────────────────────────────────────────────────────


def test_every_flipped_bit_of_a_zip_checkpoint_is_found_or_changes_nothing():
    state = {"a": torch.arange(64.0), "b": torch.ones(3, 3)}
    whole = hostile.saved(state)
    caught = 0
    for bit in random.Random(0).sample(range(8 * len(whole)), 400):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        try:
            found = guarded(bytes(data))
        except (InputRefused, RuntimeError):
            caught += 1
        else:
            assert found.keys() == {("a",), ("b",)}
            assert all(torch.equal(found[key,], value) for key, value in state.items())
    assert caught > 200


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_cut_short_anywhere_is_refused(zipped, tmp_path):
    whole = hostile.saved(network().state_dict(), _use_new_zipfile_serialization=zipped)
    for length in range(1, len(whole), 97):
        with pytest.raises((InputRefused, RuntimeError, EOFError, pickle.UnpicklingError)):
            guarded(whole[:length])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_is_done_to_a_checkpoint_the_guard_says_it_in_its_own_words(data):
    whole = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    stream, said = io.BytesIO(whole), ""
    try:
        if whole.startswith(b"PK"):
            check_pickle(check_archive(stream, len(whole)))
        else:
            check_legacy(stream)
    except InputRefused as error:
        said = str(error)
    assert said.isprintable()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_is_done_to_a_safetensors_file_it_is_read_or_refused(data, tmp_path_factory):
    whole = bytearray(save(network().state_dict()))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, 700))
        whole[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path, said = tmp_path_factory.getbasetemp() / "fuzzed.safetensors", ""
    path.write_bytes(whole)
    try:
        read_checkpoint(path)
    except InputRefused as error:
        said = str(error)
    assert said.isprintable()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.utime(path, (1, 1)),
        lambda path: path.write_bytes(path.read_bytes()[:-4] + bytes(4)),
        lambda path: save_file({"a": torch.ones(1)}, path),
        lambda path: path.unlink(),
    ],
)
def test_a_file_that_changes_while_it_is_read_is_refused(change, tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    save_file(network().state_dict(), path)
    os.utime(path, (5, 5))
    digest = hashlib.file_digest

    def slow(stream, kind):
        change(path)
        return digest(stream, kind)

    monkeypatch.setattr(hashlib, "file_digest", slow)
    with refused(
        InputRefused, "net.safetensors: it was changed while it was read", hint=("again",)
    ):
        read_checkpoint(path)


WHOLE = [
    hostile.saved(network().state_dict()),
    hostile.saved(network().state_dict(), _use_new_zipfile_serialization=False),
]


# ── What it is instead ──────────────────────────────────────────────────────────────


def script() -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), stream)
    return stream.getvalue()


def program() -> bytes:
    stream = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), stream)
    return stream.getvalue()


def onnx_file() -> bytes:
    from onnx import helper

    return helper.make_model(helper.make_graph([], "g", [], [])).SerializeToString()


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(3))
    return stream.getvalue()


def npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.ones(3))
    return stream.getvalue()


def png() -> bytes:
    from matplotlib import image

    stream = io.BytesIO()
    image.imsave(stream, np.zeros((2, 2)), format="png")
    return stream.getvalue()


def tarball() -> bytes:
    return hostile.tarred(b"").replace(b"sys_info", b"README\0\0", 1)


def sparse_tensors() -> bytes:
    return hostile.saved({"a": torch.eye(2).to_sparse()})


def quantised_tensors() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hostile.saved({"a": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)})


ENTRY = {"net/weights.pth": b"x"}
KINDS = {
    "TorchScript": (script, "a TorchScript archive, which is a program", "where you trust who"),
    "pt2": (program, "a program of torch.export (.pt2)", "where you trust who"),
    "module": (lambda: hostile.saved(network()), "a whole pickled module, which is a", WAY_OUT),
    "old module": (
        lambda: hostile.saved(network(), _use_new_zipfile_serialization=False),
        "a whole pickled module, which is a program, and not weights: it needs torch.nn.modules.",
        WAY_OUT,
    ),
    "module beside": (
        lambda: hostile.saved({"model": network(), "epoch": 3}),
        "a whole pickled module",
        WAY_OUT,
    ),
    "numpy": (
        lambda: hostile.saved({"state_dict": network().state_dict(), "acc": np.float64(0.5)}),
        "it holds NumPy values beside the weights, and needs numpy._core.multiarray.scalar",
        "turn them into numbers",
    ),
    "other objects": (
        lambda: hostile.saved({"state_dict": {}, "args": Path("x")}),
        "it holds more than weights: it needs pathlib.",
        WAY_OUT,
    ),
    "pickle": (lambda: pickle.dumps({"a": np.ones(2)}), "a pickle that torch.save did not write, which needs numpy", WAY_OUT),
    "plain pickle": (lambda: pickle.dumps({"a": 1}), "a pickle that torch.save did not write", WAY_OUT),
    "protocol 4": (
        lambda: hostile.saved({"a": torch.ones(1)}, pickle_protocol=4),
        "its pickle has the instruction FRAME, which torch.save does not write for weights",
        "PyTorch's default pickle_protocol",
    ),
    "sparse": (sparse_tensors, "it holds sparse tensors (torch._utils._rebuild_sparse_tensor)", WAY_OUT),
    "quantised": (quantised_tensors, "it holds quantised tensors", WAY_OUT),
    "tar of PyTorch": (lambda: hostile.tarred(b"N."), "in the tar format of PyTorch 0.1", "trust"),
    "tar": (tarball, "a tar archive", "unpack it"),
    "gzip": (lambda: gzip.compress(b"x"), "a gzip file", "unpack it"),
    "zip of weights": (lambda: hostile.archive(ENTRY), "a zip archive that weights were put in", "unpack it"),
    "zip": (lambda: hostile.archive({"a/b.txt": b""}), "a zip archive, and not one that torch.save", "unpack"),
    "encrypted zip": (
        lambda: hostile._flagged(b"}."),
        "an encrypted zip archive",
        "unpack it",
    ),
    "npz": (npz, "a NumPy archive (.npz)", WAY_OUT),
    "npy": (npy, "a NumPy array", WAY_OUT),
    "keras": (lambda: hostile.archive({"config.json": b"", "model.weights.h5": b""}), "a Keras model", WAY_OUT),
    "office": (lambda: hostile.archive({"[Content_Types].xml": b""}), "an Office document", WAY_OUT),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file, as Keras writes", WAY_OUT),
    "ONNX": (onnx_file, "an ONNX file", WAY_OUT),
    "TFLite": (lambda: b"\x1c\0\0\0TFL3" + bytes(99), "a TensorFlow Lite model", WAY_OUT),
    "SavedModel": (lambda: b"\x08\x01\x12\xab\x01" + bytes(99), "a TensorFlow SavedModel", WAY_OUT),
    "GGUF": (lambda: b"GGUF\3\0\0\0" + bytes(99), "a GGUF file of llama.cpp", WAY_OUT),
    "engine": (lambda: b"ftrt\0\0\0\0" + bytes(99), "a TensorRT engine, which is a program", WAY_OUT),
    "PNG": (png, "an image", WAY_OUT),
    "SVG": (lambda: b"<?xml version='1.0'?><svg/>", "an XML document", "fetch"),
    "PDF": (lambda: b"%PDF-1.7\n", "a PDF document", WAY_OUT),
    "library": (lambda: Path(sys.executable).resolve().read_bytes()[:99], "a program or library", WAY_OUT),
    "web page": (lambda: b"\n<!DOCTYPE html>\n<html><title>Sign in</title>", "a web page", "fetch"),
    "LFS": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "a Git LFS pointer",
        "git lfs pull",
    ),
    "index": (
        lambda: json.dumps({"metadata": {}, "weight_map": {"a": "x-1.safetensors"}}).encode(),
        "the index of a checkpoint in several files",
        "join them",
    ),
    "JSON": (lambda: b'{"a": [1]}', "a JSON file", WAY_OUT),
    "script": (lambda: b"#!/bin/sh\n", "a script", WAY_OUT),
    "text": (lambda: "weights of the net, Größe 3\n".encode(), "a text file", WAY_OUT),
    "empty": (lambda: b"", "an empty file", "fetch it again"),
    "one byte": (lambda: b"\x80", "truncated, damaged or of no format that is known here", WAY_OUT),
    "zeros": (lambda: bytes(5000), "nothing but zeros at its beginning", "fetch it again"),
    "noise": (lambda: random.Random(1).randbytes(5000), "truncated, damaged or of no", WAY_OUT),
}  # fmt: skip


def test_at_least_22_kinds_of_file_are_told_apart():
    assert len({words for _, words, _ in KINDS.values()}) >= 22


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_named_for_what_it_is_whatever_it_is_called(
    kind, suffix, tmp_path
):
    make, words, way_out = KINDS[kind]
    path = tmp_path / f"net{suffix}"
    path.write_bytes(make())
    with refused(InputRefused, f"net{suffix}: ", words, hint=(way_out,)):
        read_checkpoint(path)


@pytest.mark.parametrize("held", ["safetensors", "zip"])
def test_a_file_of_weights_may_be_called_anything(held, tmp_path, monkeypatch):
    state, path = network().state_dict(), tmp_path / "net.onnx"
    if held == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
        monkeypatch.setattr(isolated, "run_isolated", loaded_here)
    assert read_checkpoint(path).tensors.keys() == {(key,) for key in state}


def loaded_here(script, stream, folder, *limits, **words):
    """Do what the process does, in this one, without limits."""
    stream.seek(0)
    found = _child.named_tensors(_child.load(stream), os.fstat(stream.fileno()).st_size)
    save_file({str(i): value for i, (_, value) in enumerate(found)}, folder / "tensors.safetensors")
    return {"names": [path for path, _ in found]}


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (torch.optim.Adam(network().parameters()).state_dict(), "an optimizer's state, and no"),
        ({"epoch": 3, "acc": 0.5}, "no tensors in it have names; its keys are 'epoch', 'acc'"),
        ({}, "an empty dict"),
        (torch.ones(2), "it holds a Tensor, and no tensors with names"),
        ([torch.ones(2)], "it holds a list, and no tensors with names"),
        ({0: torch.ones(2)}, "no tensors in it have names; its keys are '0'"),
    ],
)
def test_a_checkpoint_without_weights_is_named_for_what_it_holds(held, words):
    with pytest.raises(_child.Refused) as caught:
        guarded(hostile.saved(held))
    assert words in str(caught.value)


# ── What is no file ─────────────────────────────────────────────────────────────────


def pipe(path: Path) -> None:
    os.mkfifo(path)


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Path.mkdir, "a folder, not a file, so it holds no weights"),
        (pipe, "a pipe, not a file, so it holds no weights"),
        (socket_at, "a socket, not a file, so it holds no weights"),
        (lambda path: path.symlink_to("/dev/zero"), "a device, not a file, so it holds no weights"),
        (loop, "cannot be read: Too many levels of symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "no such weights file"),
        (lambda path: None, "no such weights file"),
    ],
)
def test_what_is_no_file_is_never_opened(make, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pth"
    make(path)
    with refused(InputRefused, "net.pth: ", words, hint=None):
        read_checkpoint(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = tmp_path / "net.pth"
    path.write_bytes(b"")
    path.chmod(0)
    with refused(InputRefused, "cannot be read: Permission denied", hint=None):
        read_checkpoint(path)


def test_a_sparse_file_of_5_gb_is_refused_by_its_head(tmp_path):
    path = tmp_path / "net.pth"
    with path.open("wb") as stream:
        stream.truncate(5 << 30)
    with refused(InputRefused, "nothing but zeros at its beginning"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "‮gnp.htp", "net\udcff", "a\0b", "x" * 300])
def test_a_files_own_name_is_shown_on_one_line_and_without_what_hides(tmp_path, name):
    with pytest.raises(InputRefused) as caught:
        read_checkpoint(tmp_path / name)
    assert str(caught.value).isprintable()
    assert "\n" not in str(caught.value)
