"""The process that decodes images, run as a script: it may crash, hang and eat, and alone.

    python _decoder.py SETTINGS < REQUESTS > ANSWERS

A request is a byte, ``p`` for pixels or ``d`` for the digest alone, then 8 bytes with the image's
size, then the image. An answer is 4 bytes with the size of what follows, JSON, then the pixels if
they were asked for: height × width × channels, one byte each.

It imports nothing of the package but `exporter.limits`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

sys.path.append(str(Path(__file__).parents[2]))  # where the package is

from exporter.limits import limit

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none of them calls a program
_DEEP = re.compile(r"^(I|F|(RGB[AX]?|LA?|CMYK);16.*|I;16.*)$")
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"}
_ORIENTATION = 0x0112  # of EXIF; 1 is upright
_BYTES_PER_PIXEL = 16  # the decoded image, one converted, and what a decoder holds beside them
_MEMORY = 256 << 20  # what decoding takes whatever the image


class Refused(Exception):
    """What an image is that cannot be used, in words."""


class Bomb(Refused):
    """It declares more pixels than anyone asked for."""


def decode(data: bytes, settings: dict[str, Any]) -> tuple[Image.Image, dict[str, Any]]:
    """Return an image as the network takes it; its pixels' digest, its format, what was done.

    The digest is of the upright picture in the network's colours, before it is resized. Raises
    `Refused` where it would have to be guessed what the image means.
    """
    image = _open(data, settings["max_pixels"])
    kind, notes = image.format, list[str]()
    if image.info.get("icc_profile"):
        notes.append("colour profile ignored")
    image = _upright(image, settings["orientation"], notes)
    image = _opaque(image, settings["background"], notes)
    mode = settings["mode"]
    if image.mode != mode:
        notes.append(f"{image.mode} to {mode}")
        image = image.convert(mode)
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height} ".encode())
    digest.update(image.tobytes())
    said = {"digest": digest.hexdigest(), "format": kind, "notes": notes}
    return _sized(image, settings), said


def _open(data: bytes, most: int) -> Image.Image:
    if not data:
        raise Refused("empty: 0 bytes")
    Image.MAX_IMAGE_PIXELS = most
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # a JPEG with a preview of itself
            raise Refused(f"{frames} frames, and nothing says which is meant")
        deep = [mode for mode in (image.mode, *_raw_modes(image)) if _DEEP.match(mode)]
        if deep:
            raise Refused(
                f"more than 8 bits per channel ({deep[0]}), and nothing says which value is white"
            )
        if image.mode not in _MODES:
            raise Refused(f"colours in mode {image.mode}, which are not plainly grey or RGB")
        image.load()
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise Refused(f"none of {known}: it begins with {data[:12]!r}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"\((\d+) pixels\)", str(error))
        count = f"{int(found[1]):,}" if found else "too many"
        raise Bomb(f"it declares {count} pixels, and {most:,} are allowed") from error
    return image


def _raw_modes(image: Image.Image) -> list[str]:
    """Return how the file stores its pixels, where Pillow says so."""
    found = []
    for tile in getattr(image, "tile", ()):
        stored = tile[3] if isinstance(tile[3], str) else next(iter(tile[3] or ()), "")
        found.append(str(stored))
    return found


def _upright(image: Image.Image, wanted: str, notes: list[str]) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata of a sound image
        notes.append("unreadable EXIF ignored")
        return image
    if orientation not in range(2, 9):
        return image
    if wanted == "refuse":
        raise Refused(
            f"EXIF says that it lies turned (orientation {orientation}), and "
            "preprocess.orientation does not say whether that counts"
        )
    notes.append("turned upright" if wanted == "apply" else "EXIF orientation ignored")
    return ImageOps.exif_transpose(image) if wanted == "apply" else image


def _opaque(image: Image.Image, background: list[int] | None, notes: list[str]) -> Image.Image:
    if not image.has_transparency_data:
        return image
    mode = "L" if image.mode in ("LA", "La", "L", "1") else "RGB"
    layered = image.convert("RGBA")
    if layered.getchannel("A").getextrema() == (255, 255):
        notes.append("opaque alpha dropped")
        return layered.convert(mode)
    if background is None:
        raise Refused("partly transparent, and preprocess.background does not say on what")
    notes.append("laid on the background")
    colour = tuple(background if len(background) == 3 else background * 3)
    return Image.alpha_composite(Image.new("RGBA", layered.size, (*colour, 255)), layered).convert(
        mode
    )


def _sized(image: Image.Image, settings: dict[str, Any]) -> Image.Image:
    """Resize, then cut the middle out, as torchvision's Resize and CenterCrop do."""
    height, width = settings["size"]
    resize = settings["resize"]
    if resize is None:
        if image.size != (width, height):
            raise Refused(
                f"{image.width} × {image.height} pixels where the input is {width} × {height}, "
                "and preprocess.resize does not say how to resize"
            )
        return image
    if len(resize) == 1:
        short, long = sorted(image.size)
        longer = int(resize[0] * long / short)
        new = (resize[0], longer) if image.width <= image.height else (longer, resize[0])
    else:
        new = (resize[1], resize[0])
    if new[0] * new[1] > settings["max_pixels"]:
        raise Refused(
            f"{image.width} × {image.height} pixels would be {new[0]} × {new[1]} when resized, "
            f"and {settings['max_pixels']:,} pixels are allowed"
        )
    if new != image.size:
        kind = Image.Resampling[settings["interpolation"].upper()]
        image = image.resize(new, kind)
    left, top = round((new[0] - width) / 2), round((new[1] - height) / 2)
    return image.crop((left, top, left + width, top + height))


def answer(data: bytes, settings: dict[str, Any], *, pixels: bool) -> bytes:
    """Return the answer to one request; whatever a decoder raises is a refusal."""
    said: dict[str, Any]
    payload = b""
    try:
        image, said = decode(data, settings)
        payload = image.tobytes() if pixels else b""
    except Bomb as error:
        said = {"refused": str(error), "bomb": True}
    except Refused as error:
        said = {"refused": str(error)}
    except MemoryError:
        said = {"refused": "decoding it takes more memory than its pixels can need"}
    except Exception as error:  # a damaged image may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        said = {"refused": f"cannot be decoded: {reason}"}
    text = json.dumps(said).encode("ascii")
    return struct.pack(">I", len(text)) + text + payload


def alarm(seconds: float) -> None:
    """Have the system end this process after so long, even inside a decoder; 0 calls it off."""
    with suppress(ImportError, AttributeError):
        import signal

        signal.setitimer(signal.ITIMER_REAL, seconds)


def main(settings: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.init()
    limit(_MEMORY + _BYTES_PER_PIXEL * settings["max_pixels"], written=0)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while kind := requests.read(1):
        (size,) = struct.unpack(">Q", requests.read(8))
        data = requests.read(size)
        alarm(settings["seconds"])
        said = answer(data, settings, pixels=kind == b"p")
        alarm(0)
        answers.write(said)
        answers.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
