"""Inputs: the split that never moves, upsampling written out, and each array that is refused."""

from __future__ import annotations

import gc
import hashlib
import io
import pickle
import warnings

import numpy as np
import pytest
from conftest import refused
from scipy import stats

from exporter.errors import InputRefused, UnknownName
from exporter.records import TensorSpec
from exporter.samples import (
    MEAN,
    STD,
    Samples,
    check_calibration,
    check_scale,
    digits,
    draw,
    feeds,
    load_array,
    load_split,
    noise,
    overlap,
)

SPEC = TensorSpec("input", (1, 4, 4))


def pixels(samples: Samples) -> np.ndarray:
    """Return the scans' own 64 grey levels and the label, one row each, from 8×8 inputs."""
    levels = (samples.inputs.astype(np.float64) * STD + MEAN) * 16
    assert np.abs(levels - levels.round()).max() < 1e-5
    rows = levels.round().astype(np.uint8).reshape(len(levels), -1)
    return np.concatenate([rows, samples.labels[:, None].astype(np.uint8)], axis=1)


@pytest.fixture(scope="module")
def train() -> Samples:
    return digits((1, 8, 8), "train")


@pytest.fixture(scope="module")
def held_out() -> Samples:
    return digits((1, 8, 8), "held-out")


# ── The split ───────────────────────────────────────────────────────────────────────


def test_the_held_out_digits_are_the_same_360_for_ever(held_out):
    rows = sorted(bytes(row) for row in pixels(held_out))
    pinned = "73290aa1827317faa590d6fd18302441a745d4bd5f02c4a2c4a118c8527758a5"
    assert hashlib.sha256(b"".join(rows)).hexdigest() == pinned


def test_there_are_360_and_1437_digits_of_ten_kinds(train, held_out):
    assert (len(held_out.inputs), len(train.inputs)) == (360, 1437)
    assert (held_out.origin, train.origin) == ("360 held-out digits", "1437 train digits")
    for samples in (train, held_out):
        assert len(samples.inputs) == len(samples.labels)
        assert np.bincount(samples.labels, minlength=10).min() > 20
        assert set(samples.labels) == set(range(10))


def test_no_held_out_digit_is_also_a_training_digit(train, held_out):
    seen = {hashlib.sha256(bytes(row[:-1])).digest() for row in pixels(train)}
    assert not [row for row in pixels(held_out) if hashlib.sha256(bytes(row[:-1])).digest() in seen]


def test_the_two_splits_are_all_of_scikit_learns_digits_with_their_labels(train, held_out):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    every = np.column_stack([bunch.data, bunch.target]).astype(np.uint8)
    found = np.concatenate([pixels(train), pixels(held_out)])
    assert sorted(map(bytes, found)) == sorted(map(bytes, every))


def test_the_mean_and_the_deviation_are_those_of_the_training_digits(train):
    levels = pixels(train)[:, :-1].astype(np.float64) / 16
    assert round(float(levels.mean()), 4) == MEAN
    assert round(float(levels.std()), 4) == STD


def test_samples_are_float32_and_labels_int64(train):
    assert (train.inputs.dtype, train.labels.dtype) == (np.float32, np.int64)


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resample with pixel centres at halves and edges repeated, in float64, axis by axis."""

    def weights(old: int, new: int) -> np.ndarray:
        matrix = np.zeros((new, old))
        for i in range(new):
            at = max((i + 0.5) * old / new - 0.5, 0.0)
            low = int(at)
            matrix[i, low] += 1 - (at - low)
            matrix[i, min(low + 1, old - 1)] += at - low
        return matrix

    return weights(image.shape[0], height) @ image @ weights(image.shape[1], width).T


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (20, 13), (9, 31), (5, 3), (1, 1)])
def test_digits_are_upsampled_bilinearly(held_out, size):
    got = digits((1, *size), "held-out").inputs
    assert got.shape == (360, 1, *size)
    for index in (0, 1, 180, 359):
        small = pixels(held_out)[index, :-1].reshape(8, 8) / 16
        want = (bilinear(small, *size) - MEAN) / STD
        assert np.abs(got[index, 0] - want).max() < 1e-5


@pytest.mark.parametrize("channels", [0, 2, 3])
def test_digits_are_grey_and_refuse_other_channels(channels):
    with refused(InputRefused, "1 channel", f"asks for {channels}"):
        digits((channels, 8, 8), "held-out")


def test_a_model_finds_its_samples_by_name(held_out):
    found = load_split("digits", (1, 8, 8), "held-out")
    assert np.array_equal(found.inputs, held_out.inputs)


def test_an_unknown_data_set_gets_the_nearest_name():
    with refused(UnknownName, "no data set named 'digit'", hint=("'digits'",)):
        load_split("digit", (1, 8, 8), "train")


# ── Noise ───────────────────────────────────────────────────────────────────────────


def test_noise_is_the_same_for_a_seed_and_other_for_another():
    first = noise((1, 8, 8), count=4, seed=3)
    assert np.array_equal(first, noise((1, 8, 8), count=4, seed=3))
    assert not np.isclose(first, noise((1, 8, 8), count=4, seed=4)).any()
    assert (first.shape, first.dtype) == ((4, 1, 8, 8), np.float32)


def test_noise_is_unit_normal():
    values = noise((3, 16, 16), count=32, seed=0).ravel().astype(np.float64)
    assert stats.kstest(values, "norm").pvalue > 0.01
    assert len(np.unique(noise((3, 16, 16), count=32, seed=0), axis=0)) == 32


# ── Drawing ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [1, 256, 1437])
def test_a_draw_is_without_replacement_and_keeps_labels_beside_their_scans(train, count):
    rows = pixels(draw(train, count=count, seed=0))
    every = set(map(bytes, pixels(train)))
    assert len(set(map(bytes, rows))) == len(rows) == count
    assert set(map(bytes, rows)) <= every


def test_a_draw_is_the_same_for_a_seed_and_other_for_another(train):
    first, again, other = (draw(train, count=64, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(first.inputs, again.inputs)
    assert np.array_equal(first.labels, again.labels)
    assert set(map(bytes, pixels(first))) != set(map(bytes, pixels(other)))


def test_a_draw_is_not_the_first_ones_and_says_where_it_comes_from(train):
    drawn = draw(train, count=64, seed=0)
    assert not np.array_equal(drawn.inputs, train.inputs[:64])
    assert drawn.origin == "64 of the 1437 train digits, seed 0"


def test_a_draw_of_more_than_there_are_is_refused_with_the_most_there_can_be(train):
    said = ("1438 images", "1437 train digits", "only 1437")
    with refused(InputRefused, *said, hint=("calibration.images", "1437")):
        draw(train, count=1438, seed=0)


# ── A user's own array ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.zeros((0, 3), dtype=np.float64),
        np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3)),
    ],
)
def test_an_array_comes_back_as_it_was_saved(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    loaded = load_array(tmp_path / "a.npy")
    assert np.array_equal(loaded, array)
    assert loaded.dtype == array.dtype


def test_an_array_that_is_not_there_is_refused_by_name(tmp_path):
    with refused(InputRefused, "none.npy: no such file"):
        load_array(tmp_path / "none.npy")


def promising(shape: tuple[int, ...]) -> bytes:
    """Return a .npy file of a few bytes whose header promises that shape."""
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + b"\0" * 64


DAMAGED = {
    "empty": b"",
    "text": b"1, 2, 3\n",
    "magic alone": b"\x93NUMPY",
    "a pickle": pickle.dumps([1, 2, 3]),
    "too few bytes": promising((100,)),
    "more bytes promised than memory has": promising((1 << 50,)),
    "a negative size": promising((-1,)),
    "a header that is no header": promising((16,)).replace(b"(16,)", b"((16,"),
    "a header that is a program": promising((16,)).replace(b"(16,), }   ", b"len([1]*16)}"),
    "the start of a zip archive": b"PK\x03\x04" + b"\0" * 40,
}


@pytest.fixture
def open_files():
    """Return a function that says which files were left open, as Python's own warning does."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)

        def left() -> list[str]:
            gc.collect()
            return [str(w.message) for w in seen if issubclass(w.category, ResourceWarning)]

        yield left
        gc.collect()


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_array_is_refused_and_told_how_to_write_one(tmp_path, open_files, data):
    (tmp_path / "bad.npy").write_bytes(data)
    with refused(InputRefused, "bad.npy: not a readable .npy array", hint=("numpy.save",)):
        load_array(tmp_path / "bad.npy")
    assert open_files() == []


@pytest.mark.parametrize("keep", [0, 1, 6, 8, 10, 64, 127, 128, 129, 200, 527])
def test_an_array_that_is_cut_short_is_refused(tmp_path, keep):
    np.save(tmp_path / "a.npy", np.arange(100, dtype=np.float32))
    whole = (tmp_path / "a.npy").read_bytes()
    assert len(whole) == 528
    (tmp_path / "a.npy").write_bytes(whole[:keep])
    with refused(InputRefused, "a.npy: not a readable .npy array", hint=("numpy.save",)):
        load_array(tmp_path / "a.npy")


class Bomb:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemError('a pickle was loaded')",))


def test_pickled_objects_are_refused_and_never_run(tmp_path):
    np.save(tmp_path / "bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with refused(InputRefused, "bomb.npy: not a readable .npy array of numbers"):
        load_array(tmp_path / "bomb.npy")


def test_an_archive_of_arrays_is_refused_as_that_and_closed_again(tmp_path, open_files):
    np.savez(tmp_path / "many.npz", a=np.zeros(3))
    with refused(InputRefused, "many.npz: an .npz archive", "one .npy array"):
        load_array(tmp_path / "many.npz")
    assert open_files() == []


def test_a_folder_is_not_an_array(tmp_path):
    with refused(InputRefused, tmp_path.name):
        load_array(tmp_path)


def good(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).random((count, 1, 4, 4), dtype=np.float32)


@pytest.mark.parametrize("count", [8, 30])
def test_a_fit_array_is_returned_untouched(count):
    array = good(count)
    assert check_calibration(array, SPEC, origin="a.npy") is array


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (good()[:, 0], ["(N, 1, 4, 4) float32", "found (3, 4, 4) float32"]),
        (good()[0], ["found (1, 4, 4) float32"]),
        (good()[..., :3], ["found (3, 1, 4, 3) float32"]),
        (good().reshape(3, 4, 4, 1), ["found (3, 4, 4, 1) float32"]),
        (good().reshape(3, 16), ["found (3, 16) float32"]),
        (good()[None], ["found (1, 3, 1, 4, 4) float32"]),
        (np.float32(1.0).reshape(()), ["found () float32"]),
    ],
)
def test_an_array_of_another_shape_is_refused_with_both_shapes(array, said):
    with refused(InputRefused, "a.npy", "must be (N, 1, 4, 4) float32", *said):
        check_calibration(array, SPEC, origin="a.npy")


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int64", "bool", ">f4", "c8"])
def test_an_array_of_another_type_is_refused_and_told_how_to_convert(dtype):
    found = str(np.dtype(dtype))
    with refused(InputRefused, "a.npy", found, hint=("astype(numpy.float32)",)):
        check_calibration(np.ones((3, 1, 4, 4), dtype), SPEC, origin="a.npy")


def test_an_empty_array_is_refused():
    with refused(InputRefused, "a.npy", "empty"):
        check_calibration(good()[:0], SPEC, origin="a.npy")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_array_with_one_value_that_is_not_finite_is_refused_by_its_sample(bad):
    array = good()
    array[1, 0, 2, 3] = bad
    with refused(InputRefused, "a.npy", "1 values", "NaN or infinite", "first in sample 1"):
        check_calibration(array, SPEC, origin="a.npy")


def test_every_value_that_is_not_finite_is_counted():
    array = good(5)
    array[2] = np.nan
    array[4, 0, 0] = np.inf
    with refused(InputRefused, "20 values", "first in sample 2"):
        check_calibration(array, SPEC, origin="a.npy")


@pytest.mark.parametrize("value", [0.0, -1.5, 255.0])
def test_an_array_of_one_value_is_refused_with_the_value(value):
    array = np.full((3, 1, 4, 4), value, dtype=np.float32)
    with refused(InputRefused, "a.npy", "constant", f"every value is {value:g}"):
        check_calibration(array, SPEC, origin="a.npy")


@pytest.mark.parametrize("count", [1, 7])
def test_fewer_than_eight_samples_are_refused(count):
    with refused(InputRefused, "a.npy", f"{count} samples, and needs 8", hint=("256",)):
        check_calibration(good(count), SPEC, origin="a.npy")


def test_fewer_than_eight_that_differ_are_refused_however_often_they_come():
    with refused(InputRefused, "a.npy", "70 samples and 7 different ones, and needs 8 that differ"):
        check_calibration(np.tile(good(7), (10, 1, 1, 1)), SPEC, origin="a.npy")


def training(count: int = 50) -> Samples:
    inputs = np.random.default_rng(7).standard_normal((count, 1, 4, 4)).astype(np.float32)
    return Samples(inputs, np.zeros(count), "50 train samples")


@pytest.mark.parametrize("factor", [0.2, 1, 6])
def test_other_contrasts_are_not_another_scale(factor):
    check_scale(training().inputs[:20] * np.float32(factor), training(), origin="a.npy")


@pytest.mark.parametrize("factor", [0.05, 12, 255])
def test_another_scale_is_refused_with_both_figures(factor):
    array = training().inputs * np.float32(factor)
    said = (f"standard deviation is {array.std():.4g}", f"theirs is {training().inputs.std():.4g}")
    with refused(InputRefused, "a.npy", "another scale", *said, hint=("normalise",)):
        check_scale(array, training(), origin="a.npy")


def test_one_value_far_out_is_another_scale():
    array = training().inputs.copy()
    array[3, 0, 0, 0] = 40
    with refused(InputRefused, "largest magnitude is 40", hint=("normalise",)):
        check_scale(array, training(), origin="a.npy")


def test_pixels_that_nobody_normalised_are_another_scale_than_the_digits(train):
    raw = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8)).astype(np.float32)
    with refused(InputRefused, "another scale", hint=("pixels / 255",)):
        check_scale(raw, train, origin="a.npy")


def test_the_digits_two_splits_share_no_sample(train, held_out):
    assert overlap(train.inputs, held_out.inputs) == ()


def test_an_overlap_is_found_by_the_bytes_of_each_sample(train, held_out):
    inputs = train.inputs[:10].copy()
    inputs[4], inputs[7] = held_out.inputs[100], held_out.inputs[3]
    assert overlap(inputs, held_out.inputs) == (4, 7)
    inputs[4, 0, 0, 0] += 1
    assert overlap(inputs, held_out.inputs) == (7,)


# ── Batches ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("count", "size", "want"),
    [
        (4, 2, [[0, 1], [2, 3]]),
        (5, 2, [[0, 1], [2, 3], [4, 0]]),
        (5, 5, [[0, 1, 2, 3, 4]]),
        (2, 5, [[0, 1, 0, 1, 0]]),
        (1, 3, [[0, 0, 0]]),
        (3, 1, [[0], [1], [2]]),
        (0, 3, []),
    ],
)
def test_every_batch_is_full_and_the_last_begins_again_at_the_first(count, size, want):
    inputs = np.arange(count, dtype=np.float32)[:, None, None]
    batches = list(feeds(inputs, "x", size=size))
    assert [list(batch) for batch in batches] == [["x"]] * len(want)
    assert [batch["x"].ravel().tolist() for batch in batches] == want
    assert all(batch["x"].shape == (size, 1, 1) for batch in batches)
    assert all(batch["x"].dtype == np.float32 for batch in batches)
