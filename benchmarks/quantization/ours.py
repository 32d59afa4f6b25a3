"""What this project makes of a network, through its public precision ``int8``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import onnx

import exporter
from exporter.records import Array
from exporter.samples import feeds
from quantization.networks import CACHE, Network


class Setting(NamedTuple):
    """A name for the table, and the options of the precision as a profile sets them."""

    name: str
    options: dict[str, Any]


# What is compared. Each is held against the best peer at its own set of quantised tensors.
PLAIN = {
    "calibrator": "max",
    "equalise": False,
    "rounding": False,
    "bias_correction": False,
    "offset": "none",
}
SETTINGS = (
    Setting("auto", {}),
    Setting("auto, identity in float", {"residual": False}),
    Setting("auto, linear too, identity in float", {"residual": False, "linear": True}),
    Setting("auto, pads nowhere", {"offset": "free"}),
    Setting("auto, signed steps alone", {"offset": "none"}),
    Setting("max, no repairs", PLAIN),
)
_CODE = (
    *("quantisation/*.py", "precisions/*.py", "calibration/*.py", "emulation/*.py"),
    *("calibrators.py", "digests.py", "onnx_edits.py", "steps.py"),
)
RECIPE = SETTINGS[0]  # the one that is timed, and that is tried with few images


class Made(NamedTuple):
    """The INT8 graph, and the seconds for calibration and conversion together."""

    model: onnx.ModelProto
    seconds: float


def convert(setting: Setting, network: Network, images: Array | None = None) -> Made:
    """Convert now. ``images`` replaces the network's own calibration images."""
    samples = network.calibration if images is None else images
    precision = exporter.load_precision("int8", setting.options)
    graph = onnx.load(network.graph)
    began = perf_counter()
    statistics = exporter.calibrate(graph, feeds(samples, network.input.name, size=1))
    model = precision.convert(graph, statistics, samples).model
    return Made(model, perf_counter() - began)


def converted(setting: Setting, network: Network, images: Array | None = None) -> Made:
    """Return the same from the cache, if this code converted it before."""
    samples = network.calibration if images is None else images
    digest = hashlib.sha256(network.graph.read_bytes() + samples.tobytes() + _code())
    digest.update(json.dumps(setting.options, sort_keys=True).encode())
    path = CACHE / "ours" / f"{network.name}-{digest.hexdigest()[:16]}.onnx"
    said = path.with_suffix(".json")
    if not said.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = convert(setting, network, images)
        onnx.save(made.model, path)
        said.write_text(json.dumps(made.seconds), "utf-8")
    return Made(onnx.load(path), json.loads(said.read_text("utf-8")))


def _code() -> bytes:
    """Return the code that a conversion depends on."""
    folder = Path(exporter.__file__).parent
    files = sorted(file for pattern in _CODE for file in folder.glob(pattern))
    return b"".join(file.read_bytes() for file in files)
