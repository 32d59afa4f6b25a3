"""Arrays and code as data: each odd one is refused by name, with what makes it fit."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from safetensors.numpy import save_file

from exporter.data import Given, open_data, shared_samples
from exporter.data.calibration import by_content, choose_calibration
from exporter.data.sets import divide
from exporter.errors import InputRefused, UnknownName
from exporter.profile import Profile, read_profile
from exporter.records import TensorSpec

INPUT, OUTPUT = TensorSpec("input", (3, 4, 5)), TensorSpec("logits", (10,))
GOOD = np.random.default_rng(0).standard_normal((100, 3, 4, 5)).astype(np.float32)
LABELS = np.arange(100) % 10


def profile(**tables) -> Profile:
    plain = {
        "about": "a test",
        "runtime": {"ort-cpu": {}},
        "precision": {"fp32": {}},
        "calibration": {"images": 8},
    }
    return read_profile({**plain, **tables}, where="test")


def opened(path: Path | str, **tables) -> Given:
    found = open_data(path, "digits", [INPUT], OUTPUT, profile(**tables))
    assert isinstance(found, Given)
    return found


def saved(folder: Path, array: np.ndarray, **options) -> Path:
    np.save(folder / "a.npy", array, **options)
    return folder / "a.npy"


def every(data: Given) -> np.ndarray:
    """Return all samples in the order they are stored in."""
    return data.gathered.samples[:]


# ── What fits ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_taken_as_it_is_in_either_order(tmp_path, order):
    data = opened(saved(tmp_path, np.asarray(GOOD, order=order)))
    assert np.array_equal(every(data), GOOD)
    assert every(data)[:1].flags.c_contiguous
    assert data.record.preprocessing == "none: as they are stored"
    assert (data.record.kind, data.record.name, data.record.classes) == (
        "an .npy file",
        "a.npy",
        None,
    )


def test_an_array_is_mapped_and_not_loaded(tmp_path):
    rows = opened(saved(tmp_path, GOOD)).gathered.samples._fetch
    cells = [cell.cell_contents for cell in rows.__closure__]
    (stored,) = (cell for cell in cells if hasattr(cell, "rows"))
    assert isinstance(stored.rows.__closure__[0].cell_contents, np.memmap)


def test_pixels_become_inputs_as_the_profile_says(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 5), dtype=np.uint8)
    said = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    mean, std = (np.array(values)[:, None, None] for values in said.values())
    data = opened(saved(tmp_path, pixels), preprocess=said)
    assert np.abs(every(data) - (pixels / 255 - mean) / std).max() < 1e-5


def as_npz(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez_compressed(folder / "a.npz", **arrays)
    return folder / "a.npz"


def as_safetensors(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    save_file(arrays, folder / "a.safetensors")
    return folder / "a.safetensors"


BOXES = {"npz": as_npz, "safetensors": as_safetensors}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_inputs_and_labels_lie_in_one_file(tmp_path, box):
    data = opened(box(tmp_path, {"inputs": GOOD, "labels": LABELS}))
    assert np.array_equal(every(data), GOOD)
    assert data.gathered.labels.tolist() == LABELS.tolist()
    assert data.record.classes == 10


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_one_array_alone_is_the_inputs_whatever_its_name(tmp_path, box):
    data = opened(box(tmp_path, {"whatever": GOOD}))
    assert np.array_equal(every(data), GOOD)
    assert np.array_equal(data.gathered.samples[[7, 3, 4]], GOOD[[7, 3, 4]])


# ── What does not ───────────────────────────────────────────────────────────────────


NAN, INF = GOOD.copy(), GOOD.copy()
NAN[41, 2, 3, 4], INF[99] = np.nan, np.inf
PIXELS = np.random.default_rng(0).integers(0, 256, GOOD.shape)
ODD = {
    "wrong rank": (GOOD[0], "must be (N, 3, 4, 5) float32", "array[None]"),
    "flattened": (GOOD.reshape(100, -1), "found (100, 60) float32", None),
    "channels last": (GOOD.transpose(0, 2, 3, 1), "found (100, 4, 5, 3) float32", "transpose(0, 3, 1, 2)"),
    "wrong channels": (GOOD[:, :1], "found (100, 1, 4, 5) float32", "takes 3 channels"),
    "another size": (GOOD[..., :4], "found (100, 3, 4, 4) float32", "--input"),
    "float64": (GOOD.astype(np.float64), "found (100, 3, 4, 5) float64", "astype(numpy.float32)"),
    "float16": (GOOD.astype(np.float16), "float16", "astype(numpy.float32)"),
    "big-endian": (GOOD.astype(">f4"), ">f4", "astype(numpy.float32)"),
    "int64": (PIXELS, "int64", "numpy.uint8"),
    "complex": (GOOD.astype(np.complex64), "complex64", "astype(numpy.float32)"),
    "pixels nobody explains": (PIXELS.astype(np.uint8), "preprocess.mean", "[preprocess]"),
    "pixels as floats": (PIXELS.astype(np.float32), "every value is a whole number of 0 to 255", "uint8"),
    "NaN": (NAN, "sample 41 holds values that are NaN or infinite", None),
    "Inf": (INF, "sample 99 holds values that are NaN or infinite", None),
    "empty": (GOOD[:0], "no samples in it", None),
    "constant": (np.full_like(GOOD, 0.25), "every value of every sample is 0.25", None),
    "one sample": (GOOD[:1], "of 1 samples", "data.held_out"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD.values(), ids=ODD)
def test_an_odd_array_is_refused_with_what_would_make_it_fit(tmp_path, case):
    array, said, hint = case
    with refused(
        InputRefused,
        "a.npy" if "preprocess" not in said else "",
        said,
        hint=(hint,) if hint else (),
    ):
        opened(saved(tmp_path, array))


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize(
    ("labels", "said", "hint"),
    [
        (LABELS[:99], "100 samples, and labels of shape (99,)", ()),
        (LABELS.astype(np.float64), "the labels are float64", ("astype(numpy.int64)",)),
        (np.eye(10, dtype=np.int64)[LABELS], "(100, 10)", ("argmax",)),
        (LABELS + 1, "labels of 1 to 10, and the network's outputs are 0 to 9", ()),
        (LABELS - 1, "labels of -1 to 8", ()),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, box, labels, said, hint):
    with refused(InputRefused, "a.", said, hint=hint):
        opened(box(tmp_path, {"inputs": GOOD, "labels": labels}))


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("names", [("x", "y"), ("inputs", "targets"), ("labels",)])
def test_nothing_is_guessed_from_names(tmp_path, box, names):
    with refused(
        InputRefused, "nothing says which are the inputs", repr(names[0]), hint=("'inputs'",)
    ):
        opened(box(tmp_path, dict.fromkeys(names, GOOD)))


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_pickled_objects_are_refused_and_never_run(tmp_path, kind):
    canary = tmp_path / "sang"
    array = np.array([Canary(canary)] * 100, dtype=object)
    path = tmp_path / f"a.{kind}"
    np.save(path, array, allow_pickle=True) if kind == "npy" else np.savez(path, a=array)
    with refused(InputRefused, path.name, "pickled Python objects, which are never loaded"):
        opened(path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # it would have


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    make = {"npy": saved, "npz": as_npz, "safetensors": as_safetensors}[kind]
    whole = make(tmp_path, GOOD if kind == "npy" else {"a": GOOD}).read_bytes()
    for keep in (0, 1, 8, 60, 127, 128, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with refused(InputRefused, path.name, ""):
            opened(path)


def test_a_map_of_a_truncated_file_says_how_much_is_there(tmp_path):
    path = saved(tmp_path, GOOD)
    path.write_bytes(path.read_bytes()[:-1000])
    with refused(InputRefused, "cut short: 23,000 bytes of the 24,000 that its header says"):
        opened(path)


def test_an_archive_that_unpacks_to_far_more_is_refused_before_it_does(tmp_path):
    zeros = np.zeros((100_000, 3, 4, 5), np.float32)
    path = as_npz(tmp_path, {"inputs": zeros})
    assert path.stat().st_size < zeros.nbytes / 500
    with refused(InputRefused, "a.npz", "bytes that unpack to 24,000,", hint=(".npy",)):
        opened(path)


def test_an_archive_that_lies_about_its_size_is_refused(tmp_path):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 3, 4, 5)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("inputs.npy", stream.getvalue() + b"\0" * 64)
    with refused(InputRefused, "a.npz", "'inputs.npy' says (1000000000, 3, 4, 5)"):
        opened(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["a.pt", "a.csv", "a"])
def test_a_file_of_another_kind_is_refused_with_the_kinds_there_are(tmp_path, name):
    (tmp_path / name).write_bytes(b"?")
    with refused(InputRefused, name, "no data that can be read", hint=(".npz", "module:factory")):
        opened(tmp_path / name)


def test_what_is_not_there_is_refused_by_its_name_alone(tmp_path):
    with refused(InputRefused, "none.npy: no such file or folder", hint=("folder of images",)):
        opened(tmp_path / "none.npy")


# ── Code ────────────────────────────────────────────────────────────────────────────


CODE = """
import numpy as np
rng = np.random.default_rng(0)
inputs = rng.standard_normal((100, 3, 4, 5)).astype(np.float32)
labels = np.arange(100) % 10
def plain(): return inputs
def pair(): return inputs, labels
class Data:
    def __len__(self): return 100
    def __getitem__(self, index): return inputs[index], int(labels[index])
def dataset(): return Data()
def tensors():
    import torch
    return torch.utils.data.TensorDataset(torch.from_numpy(inputs), torch.from_numpy(labels))
class Random(Data):
    def __getitem__(self, index): return rng.standard_normal((3, 4, 5)).astype(np.float32), 0
def random(): return Random()
def number(): return 7
def broken(): raise KeyError("oh")
def leave(): raise SystemExit(5)
"""


@pytest.fixture
def code(tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE, "utf-8")
    return path


@pytest.mark.parametrize("name", ["plain", "pair", "dataset", "tensors"])
def test_a_factory_gives_inputs_or_pairs_or_a_dataset(code, name):
    data = opened(f"{code}:{name}")
    assert np.array_equal(every(data), GOOD)
    assert data.record.name == f"mine.py:{name}"
    assert data.record.classes == (None if name == "plain" else 10)
    if name != "plain":
        assert data.gathered.labels.tolist() == LABELS.tolist()


def test_a_factory_in_a_module_is_imported(code, monkeypatch):
    monkeypatch.syspath_prepend(str(code.parent))
    assert opened("mine:pair").record.name == "mine:pair"
    sys.modules.pop("mine")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("random", "sample 0 is another each time"),
        ("number", "gives an object of type int"),
        ("broken", "mine.py:broken raised KeyError: 'oh'"),
        ("leave", "mine.py:leave raised SystemExit: 5"),
    ],
)
def test_code_that_makes_no_samples_is_refused_in_a_line(code, words, said):
    with refused(InputRefused, said):
        opened(f"{code}:{words}")


def test_a_misspelt_factory_gets_the_nearest_name(code):
    with refused(UnknownName, "no factory in mine.py named 'plane'", hint=("'plain'",)):
        opened(f"{code}:plane")


@pytest.mark.parametrize(
    "words", ["no such module:f", ":f", "json:", "none.py:f", "nobody_has_it:f"]
)
def test_words_that_name_no_code_are_refused(words):
    with refused(InputRefused, ""):
        opened(words)


@pytest.mark.parametrize("key", ["source", "factory", "path"])
def test_no_profile_names_data_or_code(key):
    from exporter.errors import ProfileError

    with refused(ProfileError, f"unknown key {key!r}"):
        profile(data={key: "os:getcwd"})


# ── Splits ──────────────────────────────────────────────────────────────────────────


def test_each_sample_is_in_one_split_and_with_those_labels(tmp_path):
    data = opened(as_npz(tmp_path, {"inputs": GOOD, "labels": LABELS}))
    parts = [data.part(split).samples for split in ("held-out", "train")]
    pairs = [(x.tobytes(), int(label)) for part in parts for x, label in zip(part.inputs, part.labels, strict=True)]  # fmt: skip
    assert sorted(pairs) == sorted((x.tobytes(), int(label)) for x, label in zip(GOOD, LABELS, strict=True))  # fmt: skip
    counts = (data.record.held_out, data.record.for_calibration)
    assert counts == tuple(len(part.inputs) for part in parts)
    assert min(counts) > 30
    assert parts[0].origin == f"{counts[0]} held-out samples of a.npz"


def test_a_sample_stays_in_its_split_whatever_the_order_and_the_others(tmp_path):
    def held_out(array):
        return {x.tobytes() for x in opened(saved(tmp_path, array)).part("held-out").samples.inputs}

    first = held_out(GOOD)
    assert held_out(GOOD[::-1].copy()) == first
    assert held_out(GOOD[:50]) == {x.tobytes() for x in GOOD[:50]} & first


def test_the_digest_of_the_data_does_not_depend_on_their_order(tmp_path):
    def digest(inputs, labels):
        return opened(as_npz(tmp_path, {"inputs": inputs, "labels": labels})).record.sha256

    first = digest(GOOD, LABELS)
    assert digest(GOOD[::-1].copy(), LABELS[::-1].copy()) == first
    assert digest(GOOD, LABELS[::-1].copy()) != first
    assert digest(GOOD[1:], LABELS[1:]) != first


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_is_kept_within_chance(share):
    digests = [f"{value:064x}" for value in np.random.default_rng(0).integers(0, 1 << 62, 4000)]
    digests = [digest[::-1] for digest in digests]
    found = len(divide(digests, share)["held-out"]) / 4000
    assert abs(found - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_with_calibration_data_of_their_own_all_samples_are_judged_on(tmp_path):
    data = open_data(saved(tmp_path, GOOD), "digits", [INPUT], OUTPUT, profile(), whole="held-out")
    assert len(data.part("held-out").samples.inputs) == 100
    assert data.part("held-out").samples.labels is None


def test_digits_are_the_models_own():
    found = open_data("digits", "digits", [TensorSpec("x", (1, 8, 8))], OUTPUT, profile())
    assert found.record is None
    assert found.part("held-out").samples.origin == "360 held-out digits"


# ── Calibration ─────────────────────────────────────────────────────────────────────


def calibrated(given, judged, **tables):
    return choose_calibration(given, judged, "digits", [INPUT], OUTPUT, profile(**tables))


def test_calibration_draws_by_content_from_what_is_not_judged_on(tmp_path):
    data = opened(saved(tmp_path, GOOD))
    first = calibrated(None, data)
    assert len(first.samples.inputs) == 8
    assert shared_samples(first, data.part("held-out")) == ()
    again = calibrated(None, opened(saved(tmp_path, GOOD[::-1].copy())))
    assert {x.tobytes() for x in again.samples.inputs} == {
        x.tobytes() for x in first.samples.inputs
    }
    other = calibrated(None, data, calibration={"images": 8, "seed": 1})
    assert {x.tobytes() for x in other.samples.inputs} != {
        x.tobytes() for x in first.samples.inputs
    }
    assert data.record.sha256[:12] in first.samples.origin


def test_more_than_there_are_for_calibration_are_refused_with_the_way_out(tmp_path):
    data = opened(saved(tmp_path, GOOD))
    have = data.record.for_calibration
    said = ("asks for 99 samples", f"a.npy has {have} for it")
    hint = (f"at most {have}", "data.held_out", "--calibration")
    with refused(InputRefused, *said, hint=hint):
        calibrated(None, data, calibration={"images": 99})


def test_a_shared_sample_is_found_between_two_files_of_different_kinds(tmp_path):
    judged = open_data(
        saved(tmp_path, GOOD), "digits", [INPUT], OUTPUT, profile(), whole="held-out"
    )
    other = np.random.default_rng(1).standard_normal((8, 3, 4, 5)).astype(np.float32)
    other[3] = GOOD[77]
    found = calibrated(as_npz(tmp_path, {"inputs": other}), judged)
    index = [i for i, x in enumerate(found.samples.inputs) if np.array_equal(x, GOOD[77])]
    assert list(shared_samples(found, judged.part("held-out"))) == index


def test_calibration_data_on_another_scale_than_the_data_are_refused(tmp_path):
    judged = opened(saved(tmp_path, GOOD))
    with refused(InputRefused, "the given array", "another scale"):
        calibrated(GOOD[:20] * np.float32(100), judged)


def test_the_order_by_content_is_a_permutation_that_a_seed_changes():
    digests = tuple(f"{value:064x}" for value in range(50))
    first, other = by_content(digests, 0), by_content(digests, 1)
    assert sorted(first) == sorted(other) == list(range(50))
    assert first != other
