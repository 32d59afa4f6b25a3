"""Folders of images: each odd one is taken as it is meant, or named and left out; no guesses."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from PIL import Image

from exporter.data import pictures
from exporter.data.pictures import gather_images
from exporter.errors import InputRefused
from exporter.records import DataChoice, Preprocess

SIZE = 12
RGB, GREY = (3, SIZE, SIZE), (1, SIZE, SIZE)
PLAIN = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
ONE = Preprocess(mean=(0.5,), std=(0.25,))


def picture(seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    """Return random pixels, height × width × 3."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def rgb(seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    return Image.fromarray(picture(seed, size))


def as_input(pixels: np.ndarray, mean, std) -> np.ndarray:
    """Return H×W×C pixels of 0 to 255 as inputs, in float64."""
    scaled = pixels.astype(np.float64).reshape(*pixels.shape[:2], -1) / 255
    return ((scaled - mean) / std).transpose(2, 0, 1)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder of two images of the input's own size."""
    where = tmp_path / "heap"
    where.mkdir()
    for seed in (100, 101):
        (where / f"{seed}.png").write_bytes(encoded(rgb(seed)))
    return where


def gathered(folder: Path, shape=RGB, preprocess=PLAIN, **choice):
    """Gather with every unfit image left out, in one process."""
    choice = {"max_bad": 0.9, "workers": 1, **choice}
    return gather_images(folder, shape, preprocess, DataChoice(**choice))


# ── What is taken as it is meant ────────────────────────────────────────────────────


def palette() -> Image.Image:
    return rgb().quantize(16)


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def with_alpha(values: np.ndarray | int) -> Image.Image:
    image = rgb().convert("RGBA")
    alpha = np.broadcast_to(np.uint8(values), (SIZE, SIZE))
    image.putalpha(Image.fromarray(np.ascontiguousarray(alpha)))
    return image


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return one part of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def interlaced() -> bytes:
    """Return a PNG in Adam7's seven passes, written by hand: Pillow writes none."""
    pixels = picture()
    passes = [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]
    rows = b"".join(
        b"\0" + row.tobytes() for x, y, dx, dy in passes for row in pixels[y::dy, x::dx] if row.size
    )
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 8, 2, 0, 0, 1)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# File name, content, the pixels that are meant, and what is counted.
TAKEN = {
    "plain": ("a.png", encoded(rgb()), picture(), {}),
    "interlaced PNG": ("a.png", interlaced(), picture(), {}),
    "BMP": ("a.bmp", encoded(rgb(), "BMP"), picture(), {}),
    "lossless WebP": ("a.webp", encoded(rgb(), "WEBP", lossless=True), picture(), {}),
    "TIFF, compressed": ("a.tiff", encoded(rgb(), "TIFF", compression="tiff_lzw"), picture(), {}),
    "PPM": ("a.ppm", encoded(rgb(), "PPM"), picture(), {}),
    "wrong extension": ("a.jpg", encoded(rgb()), picture(), {"named otherwise than PNG": 1}),
    "upper-case extension": ("A.PNG", encoded(rgb()), picture(), {}),
    "unicode name": ("é 模型 🚀.png", encoded(rgb()), picture(), {}),
    "a name that is no UTF-8": (os.fsdecode(b"\xff\xfe.png"), encoded(rgb()), picture(), {}),
    "a name with a newline": ("a\nb.png", encoded(rgb()), picture(), {}),
    "a name like an option": ("--help.png", encoded(rgb()), picture(), {}),
    "grey": ("a.png", encoded(rgb().convert("L")), np.asarray(rgb().convert("L"))[..., None].repeat(3, 2), {"L to RGB": 1}),
    "black and white": ("a.png", encoded(Image.fromarray(picture()[..., 0] > 99)), ((picture()[..., :1] > 99) * 255).repeat(3, 2), {"1 to RGB": 1}),
    "palette": ("a.png", encoded(palette()), np.array(palette().getpalette()).reshape(-1, 3)[np.asarray(palette())], {"P to RGB": 1}),
    "GIF of one frame": ("a.gif", encoded(palette(), "GIF"), np.array(palette().getpalette()).reshape(-1, 3)[np.asarray(palette())], None),
    "opaque alpha": ("a.png", encoded(with_alpha(255)), picture(), {"opaque alpha dropped": 1}),
    "opaque grey alpha": ("a.png", encoded(Image.merge("LA", (rgb().getchannel(0), Image.new("L", (SIZE, SIZE), 255)))), picture()[..., :1].repeat(3, 2), {"opaque alpha dropped": 1, "L to RGB": 1}),
    "upright EXIF": ("a.png", encoded(rgb(), exif=orientation(1)), picture(), {}),
    "absurd EXIF": ("a.png", encoded(rgb(), exif=orientation(77)), picture(), {}),
    "colour profile": ("a.png", encoded(rgb(), icc_profile=b"not even one"), picture(), {"colour profile ignored": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN.values(), ids=TAKEN)
def test_an_image_is_taken_pixel_for_pixel_and_what_was_done_is_counted(folder, case):
    name, data, pixels, notes = case
    (folder / name).write_bytes(data)
    found = gathered(folder)
    assert found.unfit == ()
    names = sorted(path.name for path in folder.iterdir())
    got = found.samples[names.index(name)]
    want = as_input(np.asarray(pixels), PLAIN.mean, PLAIN.std)
    assert np.abs(got - want).max() < 1e-5
    assert notes is None or found.notes == notes


def test_a_progressive_jpeg_gives_what_a_baseline_one_gives(folder):
    (folder / "a.jpg").write_bytes(encoded(rgb(), "JPEG", quality=95))
    (folder / "b.jpg").write_bytes(encoded(rgb(), "JPEG", quality=95, progressive=True))
    found = gathered(folder)
    assert found.digests[2] == found.digests[3]


def test_a_cmyk_jpeg_is_converted_and_counted(folder):
    cyan = Image.new("CMYK", (SIZE, SIZE), (255, 0, 0, 0))
    (folder / "a.jpg").write_bytes(encoded(cyan, "JPEG", quality=100))
    found = gathered(folder)
    assert found.notes == {"CMYK to RGB": 1}
    want = as_input(np.broadcast_to([0, 255, 255], (SIZE, SIZE, 3)), PLAIN.mean, PLAIN.std)
    assert np.abs(found.samples[2] - want).max() < 0.1


def test_colours_become_luma_for_a_network_that_takes_grey(folder):
    found = gathered(folder, GREY, ONE)
    luma = picture(100) @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    assert np.abs(found.samples[0] - as_input(luma[..., None], 0.5, 0.25)).max() < 0.51 / 255 / 0.25
    assert found.notes == {"RGB to L": 2}


def test_bgr_turns_the_channels_round_before_mean_and_deviation(folder):
    found = gathered(folder, preprocess=Preprocess(mean=PLAIN.mean, std=PLAIN.std, order="bgr"))
    want = as_input(picture(100)[..., ::-1], PLAIN.mean, PLAIN.std)
    assert np.abs(found.samples[0] - want).max() < 1e-5


# EXIF's own words for where the first row and column are; 1 is top-left.
TURNED = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p),
}


@pytest.mark.parametrize(("number", "turn"), TURNED.items())
def test_exif_orientation_counts_where_the_profile_says_so(folder, number, turn):
    (folder / "a.png").write_bytes(encoded(rgb(), exif=orientation(number)))
    said = {"mean": PLAIN.mean, "std": PLAIN.std}
    applied = gathered(folder, preprocess=Preprocess(**said, orientation="apply"))
    ignored = gathered(folder, preprocess=Preprocess(**said, orientation="ignore"))
    want = as_input(turn(picture()), PLAIN.mean, PLAIN.std)
    assert np.abs(applied.samples[2] - want).max() < 1e-5
    assert np.abs(ignored.samples[2] - as_input(picture(), PLAIN.mean, PLAIN.std)).max() < 1e-5
    assert (applied.notes, ignored.notes) == (
        {"turned upright": 1},
        {"EXIF orientation ignored": 1},
    )


def test_transparent_pixels_show_the_background_where_the_profile_says_which(folder):
    (folder / "a.png").write_bytes(encoded(with_alpha(51)))  # a fifth
    said = Preprocess(mean=PLAIN.mean, std=PLAIN.std, background=(255, 0, 10))
    want = 0.2 * picture() + 0.8 * np.array([255, 0, 10])
    found = gathered(folder, preprocess=said)
    assert np.abs(found.samples[2] - as_input(want, PLAIN.mean, PLAIN.std)).max() < 1 / 255 / 0.2
    assert found.notes == {"laid on the background": 1}


# ── What is unfit ───────────────────────────────────────────────────────────────────


def animated(kind: str) -> bytes:
    return encoded(rgb(), kind, save_all=True, append_images=[rgb(1), rgb(2)])


def deep_rgb() -> bytes:
    """Return a PNG of three channels of 16 bits."""
    rows = b"".join(b"\0" + bytes(6 * SIZE) for _ in range(SIZE))
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


UNFIT = {
    "zero bytes": ("a.png", b"", "empty: 0 bytes"),
    "truncated PNG": ("a.png", encoded(rgb())[:200], "cannot be decoded"),
    "truncated JPEG": ("a.jpg", encoded(rgb(0, (99, 99)), "JPEG")[:-900], "cannot be decoded"),
    "a header alone": ("a.png", encoded(rgb())[:8], "cannot be decoded|none of"),
    "damaged in the middle": ("a.png", encoded(rgb())[:60] + b"\0" * 20 + encoded(rgb())[80:], "cannot be decoded"),
    "HTML": ("a.jpg", b"<!DOCTYPE html><p>404", "none of .*DOCTYPE"),
    "SVG": ("a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "none of .*svg"),
    "PostScript, which is a program": ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of"),
    "text": ("a.png", b"no image", "none of"),
    "16-bit grey": ("a.png", encoded(Image.fromarray(np.full((SIZE, SIZE), 4095, np.uint16))), "more than 8 bits"),
    "16-bit colour": ("a.png", deep_rgb(), "more than 8 bits"),
    "32-bit integers": ("a.tiff", encoded(Image.fromarray(np.full((SIZE, SIZE), 7, np.int32)), "TIFF"), "more than 8 bits"),
    "float TIFF": ("a.tiff", encoded(Image.fromarray(np.full((SIZE, SIZE), 0.5, np.float32)), "TIFF"), "more than 8 bits"),
    "animated GIF": ("a.gif", animated("GIF"), "3 frames"),
    "animated PNG": ("a.png", animated("PNG"), "3 frames"),
    "animated WebP": ("a.webp", animated("WEBP"), "3 frames"),
    "TIFF of several pages": ("a.tif", animated("TIFF"), "3 frames"),
    "half transparent": ("a.png", encoded(with_alpha(128)), "partly transparent.*preprocess.background"),
    "one transparent pixel": ("a.png", encoded(with_alpha(255 - np.eye(SIZE))), "partly transparent"),
    "palette with transparency": ("a.png", encoded(palette(), transparency=0), "partly transparent"),
    "EXIF-rotated": ("a.jpg", encoded(rgb(), "JPEG", exif=orientation(6)), "orientation 6.*preprocess.orientation"),
    "1 × 1": ("a.png", encoded(rgb(0, (1, 1))), "1 × 1 pixels.*preprocess.resize"),
    "extreme aspect": ("a.png", encoded(rgb(0, (4000, 1))), "4000 × 1 pixels.*preprocess.resize"),
    "another colour space": ("a.tif", encoded(Image.new("LAB", (SIZE, SIZE)), "TIFF"), "colours in mode LAB"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT.values(), ids=UNFIT)
def test_an_image_that_would_be_guessed_at_is_left_out_by_name_with_the_reason(folder, case):
    import re

    name, data, reason = case
    (folder / name).write_bytes(data)
    found = gathered(folder)
    (unfit,) = found.unfit
    assert unfit.name == name
    assert re.search(reason, unfit.reason), unfit.reason
    assert len(found.samples) == len(found.digests) == 2
    assert found.notes["unfit, left out"] == 1
    assert gathered(folder, max_bad=0.34)
    with refused(
        InputRefused, "heap: 1 of 3 images are unfit", f"{name}: {unfit.reason}", hint=("max_bad",)
    ):
        gathered(folder, max_bad=0.3)


def not_files(folder: Path) -> dict[str, str]:
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere")
    return {"folder.png": "a folder", "pipe.png": "a named pipe", "loop.png": "symbolic links", "dangling.png": "no such file"}  # fmt: skip


def test_what_is_no_file_is_named_and_never_opened(folder):
    want = not_files(folder)
    found = gathered(folder)
    said = {unfit.name: unfit.reason for unfit in found.unfit}
    assert set(said) == set(want)
    assert all(words in said[name] for name, words in want.items())


def test_a_link_to_an_image_is_an_image(folder):
    (folder / "link.png").symlink_to("100.png")
    found = gathered(folder)
    assert found.digests[0] == found.digests[2]


def test_hidden_files_and_files_of_other_names_are_counted_and_not_opened(folder):
    for name in (".DS_Store", "._100.png", "Thumbs.db", "labels.txt"):
        (folder / name).write_bytes(b"?")
    assert gathered(folder).notes == {"hidden": 2, "not named as an image": 2}


def bomb(kind: str) -> bytes:
    """Return a small file that declares 50,000 × 50,000 pixels."""
    if kind == "BMP":
        return struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54) + struct.pack(
            "<IiiHHIIiiII", 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0
        )
    data = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", data) + chunk(b"IDAT", zlib.compress(bytes(99)))


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_a_decompression_bomb_ends_the_run_whatever_may_be_unfit(folder, kind):
    (folder / f"bomb.{kind.lower()}").write_bytes(bomb(kind))
    said = ("heap", f"bomb.{kind.lower()}", "2,500,000,000 pixels", "bomb")
    with refused(InputRefused, *said, hint=("data.max_pixels",)):
        gathered(folder)


def test_an_image_of_more_pixels_than_allowed_is_a_bomb_too(folder):
    with refused(InputRefused, "100.png", "144 pixels, and 143 are allowed"):
        gathered(folder, max_pixels=SIZE * SIZE - 1)
    assert len(gathered(folder, max_pixels=SIZE * SIZE).samples) == 2


def test_an_image_that_resizing_would_blow_up_is_unfit(folder):
    (folder / "a.png").write_bytes(encoded(rgb(0, (50_000, 1))))
    resize = Preprocess(mean=PLAIN.mean, std=PLAIN.std, resize=SIZE)
    (unfit,) = gathered(folder, preprocess=resize, max_pixels=100_000).unfit
    assert "would be 600000 × 12 when resized" in unfit.reason


# ── Resizing ────────────────────────────────────────────────────────────────────────


def area_mean(pixels: np.ndarray, factor: int) -> np.ndarray:
    height, width = (side // factor for side in pixels.shape[:2])
    return pixels.reshape(height, factor, width, factor, 3).astype(np.float64).mean(axis=(1, 3))


@pytest.mark.parametrize("size", [(36, 24), (24, 36), (24, 24)])
def test_the_shorter_side_is_resized_and_the_middle_cut_out(tmp_path, size):
    (tmp_path / "a.png").write_bytes(encoded(rgb(1, size)))
    (tmp_path / "b.png").write_bytes(encoded(rgb(2, size)))
    half = Preprocess(mean=PLAIN.mean, std=PLAIN.std, resize=SIZE, interpolation="box")
    small = area_mean(picture(1, size), 2)
    top, left = ((side - SIZE) // 2 for side in small.shape[:2])
    want = as_input(small[top : top + SIZE, left : left + SIZE], PLAIN.mean, PLAIN.std)
    got = gathered(tmp_path, preprocess=half).samples[0]
    assert np.abs(got - want).max() < 1.01 / 255 / min(PLAIN.std)  # a rounding in each direction


def test_both_sides_are_resized_where_both_are_given(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(rgb(1, (36, 24))))
    (tmp_path / "b.png").write_bytes(encoded(rgb(2, (36, 24))))
    both = Preprocess(mean=PLAIN.mean, std=PLAIN.std, resize=(SIZE, SIZE), interpolation="box")
    pixels = picture(1, (36, 24)).astype(np.float64)
    want = pixels.reshape(SIZE, 2, SIZE, 3, 3).mean(axis=(1, 3))
    got = gathered(tmp_path, preprocess=both).samples[0]
    assert np.abs(got - as_input(want, PLAIN.mean, PLAIN.std)).max() < 1.01 / 255 / min(
        PLAIN.std
    )  # a rounding in each direction


@pytest.mark.parametrize("resize", [SIZE - 1, (SIZE, SIZE - 1), (SIZE - 1, 99)])
def test_a_size_that_leaves_too_little_to_cut_out_is_refused(folder, resize):
    said = Preprocess(mean=PLAIN.mean, std=PLAIN.std, resize=resize)
    with refused(InputRefused, "preprocess.resize", "leaves less than the input's 12 × 12"):
        gathered(folder, preprocess=said)


def test_nothing_is_guessed_where_mean_and_deviation_are_not_said(folder):
    with refused(InputRefused, "preprocess.mean", "missing", hint=("--set", "[preprocess]")):
        gathered(folder, preprocess=Preprocess())


def test_a_mean_of_another_number_of_channels_is_refused(folder):
    with refused(InputRefused, "preprocess.mean has 3 values, and the input has 1 channels"):
        gathered(folder, GREY)


def test_images_are_no_input_of_two_channels(folder):
    with refused(InputRefused, "1 channel or 3", "2 × 12 × 12", hint=("array",)):
        gathered(folder, (2, SIZE, SIZE), ONE)


# ── Classes ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def classes(tmp_path) -> Path:
    """Return a folder of three classes of two images each."""
    for kind, seeds in {"cat": (1, 2), "ant": (3, 4), "bee.jpg": (5, 6)}.items():
        (tmp_path / kind).mkdir()
        for seed in seeds:
            (tmp_path / kind / f"{seed}.png").write_bytes(encoded(rgb(seed)))
    return tmp_path


def test_a_class_is_the_place_of_its_folder_among_the_sorted_names(classes):
    found = gathered(classes)
    assert (found.kind, found.classes) == ("class folders", 3)
    order = [3, 4, 5, 6, 1, 2]
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for sample, seed in zip(found.samples, order, strict=True):
        assert np.abs(sample - as_input(picture(seed), PLAIN.mean, PLAIN.std)).max() < 1e-5


def test_labels_stay_beside_their_images_where_others_are_left_out(classes):
    (classes / "ant" / "3.png").write_bytes(b"")
    assert gathered(classes).labels.tolist() == [0, 1, 1, 2, 2]


def test_images_beside_folders_are_neither_classes_nor_a_heap(classes):
    (classes / "a.png").write_bytes(encoded(rgb()))
    with refused(InputRefused, "both images, as 'a.png', and folders, as"):
        gathered(classes)


def test_a_folder_in_a_class_is_refused_by_name(classes):
    (classes / "ant" / "queens").mkdir()
    with refused(InputRefused, "'ant/queens' is a folder in a class's folder"):
        gathered(classes)


def test_numbers_as_names_of_classes_are_doubted_where_characters_order_them_otherwise(tmp_path):
    for kind in range(11):
        (tmp_path / str(kind)).mkdir()
        (tmp_path / str(kind) / "a.png").write_bytes(encoded(rgb(kind)))
    (doubt,) = gathered(tmp_path).doubts
    assert "(0, 1, 10, …)" in doubt
    (tmp_path / "10").rename(tmp_path / "9a")
    assert gathered(tmp_path).doubts == ()


@pytest.mark.parametrize("name", ["a.txt", ".a.png"])
def test_a_folder_without_images_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"?")
    with refused(InputRefused, "no images in it", hint=(".png",)):
        gathered(tmp_path)


# ── The same image ──────────────────────────────────────────────────────────────────


def test_an_image_is_the_same_in_whatever_format_it_is_stored(folder):
    (folder / "a.bmp").write_bytes(encoded(rgb(100), "BMP"))
    (folder / "b.png").write_bytes(encoded(rgb(100).convert("RGBA"), compress_level=0))
    found = gathered(folder)
    assert len(set(found.digests)) == 2
    assert found.digests[0] == found.digests[2] == found.digests[3]
    want = hashlib.sha256(b"RGB 12 12 " + picture(100).tobytes()).hexdigest()
    assert found.digests[0] == want
    assert "2 of the 4 samples of heap are there already" in found.repeated()[0]


def test_an_image_under_two_labels_is_named_as_that(classes):
    (classes / "cat" / "again.png").write_bytes(encoded(rgb(3)))
    first, second = gathered(classes).repeated()
    assert "1 of the 7 samples" in first
    assert "1 samples of" in second
    assert "different labels" in second


# ── Decoders that fall over ─────────────────────────────────────────────────────────


BROKEN = """
import os, signal, struct, sys, time, json
sys.path.insert(0, {folder!r})
import _decoder
real = _decoder.decode
def decode(data, settings):
    if data == b"crash": os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"hang":
        while True: pass
    if data == b"asleep":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(60)
    if data == b"leave": os._exit(3)
    if data == b"greedy": bytearray(1 << 33)
    return real(data, settings)
_decoder.decode = decode
_decoder.main(json.loads(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("crash", "its decoder crashed (SIGSEGV)"),
        ("hang", "its decoder took more than 0.5 seconds"),
        ("asleep", "its decoder took more than 0.5 seconds"),
        ("leave", "its decoder crashed (exit code 3)"),
        ("greedy", "decoding it takes more memory than its pixels can need"),
    ],
)
def test_a_decoder_that_falls_over_costs_one_image_and_is_named_by_it(
    folder, tmp_path, monkeypatch, what, reason
):
    from exporter.data import decoding

    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(folder=str(decoding._DECODER.parent)), "utf-8")
    monkeypatch.setattr(decoding, "_DECODER", script)
    monkeypatch.setattr(decoding, "_GRACE", 0.5)
    (folder / "100a.png").write_bytes(what.encode())
    found = gathered(folder, seconds=0.5)
    assert [(one.name, one.reason) for one in found.unfit] == [("100a.png", reason)]
    assert np.abs(found.samples[1] - as_input(picture(101), PLAIN.mean, PLAIN.std)).max() < 1e-5


def test_decoders_end_with_what_they_decode_for(folder):
    found = gathered(folder, workers=2)
    decoders = found.samples._fetch.__self__._decoders
    running = list(decoders._running)
    assert running
    assert all(process.poll() is None for process in running)
    del found, decoders
    assert all(process.wait(5) is not None for process in running)


def test_an_image_that_changes_during_the_run_is_refused(folder):
    found = gathered(folder)
    (folder / "101.png").write_bytes(encoded(rgb(7)))
    assert found.samples[0].shape == RGB
    with refused(InputRefused, "101.png is not what it was", "its pixels are others"):
        found.samples[1]
    (folder / "101.png").unlink()
    with refused(InputRefused, "101.png is not what it was", "no such file"):
        found.samples[1]


# ── Many ────────────────────────────────────────────────────────────────────────────

PEAK = """
import resource, sys
from pathlib import Path
from exporter.data import lazy
from exporter.data.pictures import gather_images
from exporter.records import DataChoice, Preprocess
import numpy as np
lazy.IN_MEMORY = 0
said = Preprocess(mean=(0.5,), std=(0.5,), resize=128)
found = gather_images(Path(sys.argv[1]), (3, 128, 128), said, DataChoice())
part = found.samples.part(np.arange(len(found.digests)))
for start in range(0, len(part), 32):
    part.take(np.arange(start, start + 32), axis=0, mode="wrap")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_many_images_take_no_more_memory_than_few(tmp_path):
    import subprocess
    import sys

    peaks = {}
    for count in (100, 1000):  # 20 and 197 MB as inputs
        where = tmp_path / str(count)
        where.mkdir()
        for seed in range(count):
            (where / f"{seed}.png").write_bytes(encoded(rgb(seed)))
        run = [sys.executable, "-c", PEAK, str(where)]
        said = subprocess.run(run, capture_output=True, text=True, check=True)
        peaks[count] = int(said.stdout) / 1024
    assert peaks[1000] - peaks[100] < 30


def test_the_suffixes_that_are_looked_for_are_those_of_formats_that_are_decoded():
    from exporter.data import _decoder
    from exporter.data.folders import SUFFIXES

    named = {suffix for kind in _decoder.FORMATS for suffix in pictures._suffixes(kind)}
    assert named == SUFFIXES
