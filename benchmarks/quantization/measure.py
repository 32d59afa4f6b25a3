"""How close a quantised graph's logits are to the float64 network's, on the held-out digits.

    SQNR = 10·log₁₀(Σ y² / Σ (ŷ − y)²)      y float64 PyTorch before any fold, ŷ the graph

ONNX Runtime runs the graph as it is written, each pair as a pair, so that the figure is the graph's
and not that of what a runtime makes of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

from exporter.records import Array
from quantization.networks import CACHE, Network

BATCH = 8


class Score(NamedTuple):
    """``sqnr`` in dB; ``agreement``, the share of labels that are the float64 network's."""

    sqnr: float
    agreement: float


def score(logits: Array, network: Network) -> Score:
    truth = network.logits
    error = np.square(logits.astype(np.float64) - truth).sum()
    sqnr = float(10 * np.log10(np.square(truth).sum() / error)) if error else float("inf")
    return Score(sqnr, float((logits.argmax(axis=1) == truth.argmax(axis=1)).mean()))


def score_graph(model: onnx.ModelProto, network: Network) -> Score:
    """Return a graph's score, from the cache if it was measured before."""
    return _cached(model.SerializeToString(), network, lambda: run(model, network.held_out))


def score_file(path: Path, network: Network, run_it: Callable[[Path, Array], Array]) -> Score:
    """Return the score of a file that something else runs."""
    content = path.read_bytes() + path.with_suffix(".bin").read_bytes()
    return _cached(content, network, lambda: run_it(path, network.held_out))


def _cached(content: bytes, network: Network, run_it: Callable[[], Array]) -> Score:
    digest = hashlib.sha256(content)
    digest.update(network.held_out.tobytes() + network.logits.tobytes())
    said = CACHE / "scores" / f"{digest.hexdigest()[:16]}.json"
    if not said.exists():
        said.parent.mkdir(parents=True, exist_ok=True)
        said.write_text(json.dumps(score(run_it(), network)), "utf-8")
    return Score(*json.loads(said.read_text("utf-8")))


def run(model: onnx.ModelProto, inputs: Array) -> Array:
    """Return the logits of a graph, its Q/DQ pairs computed as they are written."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    batches = (inputs[start : start + BATCH] for start in range(0, len(inputs), BATCH))
    return np.concatenate([session.run(None, {name: batch})[0] for batch in batches])
