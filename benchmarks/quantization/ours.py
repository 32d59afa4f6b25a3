"""What this project makes of a network, through its public precision ``int8``."""

from __future__ import annotations

from time import perf_counter
from typing import Any, NamedTuple

import onnx

import exporter
from exporter.records import Array
from exporter.samples import feeds
from quantization.networks import Network


class Setting(NamedTuple):
    """A name for the table, and the options of the precision as a profile sets them."""

    name: str
    options: dict[str, Any]


# What is compared. Each is held against the best peer at its own set of quantised tensors.
SETTINGS = (
    Setting("int8", {"calibrator": "percentile"}),
    Setting("int8, linear", {"calibrator": "percentile", "linear": True}),
)
RECIPE = SETTINGS[0]  # the one that is timed


class Converted(NamedTuple):
    model: onnx.ModelProto
    seconds: float


def convert(setting: Setting, network: Network, images: Array | None = None) -> Converted:
    """Return the INT8 graph, and the seconds for calibration and conversion together.

    ``images`` replaces the network's own calibration images.
    """
    samples = network.calibration if images is None else images
    precision = exporter.load_precision("int8", setting.options)
    graph = onnx.load(network.graph)
    began = perf_counter()
    statistics = exporter.calibrate(graph, feeds(samples, network.input.name, size=1))
    model = precision.convert(graph, statistics, samples).model
    return Converted(model, perf_counter() - began)
