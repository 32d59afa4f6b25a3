"""How fast what this project makes of the document's network is, beside its peers' artefacts.

Everything is timed in one run, in turn and in a random order each round, by `exporter.latency`: on
this machine, at batch 1, from handing over to having the outputs. Every artefact's accuracy stands
beside its time: SQNR and agreement with the unfolded network in float64 on held-out digits. The
peers' files are made in an environment of their own (`quantization.peers`), and run here, in the
same versions of ONNX Runtime and OpenVINO as ours.

Run: python benchmarks/latency.py [--pixels 224] [--threads 1] [--rounds 100] [--write]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import keep
import numpy as np
import onnx
import torch
from quantization import peers
from safetensors.torch import load_file

import exporter
from exporter.contracts import Session
from exporter.environment import capture
from exporter.intervals import ratio_interval
from exporter.latency import measure_latency
from exporter.records import Array, BatchRange, Feed, Latency, Outputs, TensorSpec, Timing
from exporter.samples import draw, feeds, load_split

IMAGES, JUDGED, VARIED = 256, 120, 8
EAGER, DEFAULT = "PyTorch eager, the module", "default torch.onnx.export in ONNX Runtime"

_PEERS = """
import sys, numpy as np, onnx
from pathlib import Path
folder = Path(sys.argv[1])
source, images = folder / "default.onnx", np.load(folder / "calibration.npy")
import onnxslim
onnx.save(onnxslim.slim(str(source)), folder / "slim.onnx")
import onnxruntime.quantization as q
from onnxruntime.quantization.shape_inference import quant_pre_process
quant_pre_process(source, folder / "prepared.onnx")
class Reader:
    def __init__(self):
        self.feeds = iter([{"input": image[None]} for image in images])
    def get_next(self):
        return next(self.feeds, None)
q.quantize_static(folder / "prepared.onnx", folder / "ort-int8.onnx", Reader(),
                  quant_format=q.QuantFormat.QDQ, per_channel=True,
                  activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8)
import nncf, openvino as ov
model = ov.convert_model(source)
ov.save_model(model, folder / "openvino.xml", compress_to_fp16=False)
data = nncf.Dataset([image[None] for image in images])
ov.save_model(nncf.quantize(model, data, subset_size=len(images)), folder / "nncf.xml")
"""


@dataclass(frozen=True, slots=True)
class OpenVino:
    """An OpenVINO model as its users run it: with no options but the number of threads."""

    compiled: Any
    threads: int

    @classmethod
    def open(cls, path: Path, threads: int) -> OpenVino:
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads}
        return cls(openvino.Core().compile_model(path, "CPU", options), threads)

    def __call__(self, feed: Feed) -> Outputs:
        (value,) = feed.values()
        return {"logits": self.compiled(value)[0].copy()}

    def bind(self, feed: Feed) -> Callable[[], Any]:
        import openvino

        (value,) = feed.values()
        request = self.compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(value, shared_memory=True))

        def step(kept: Any = value) -> None:  # noqa: ARG001 - OpenVINO does not own it
            request.start_async()
            request.wait()

        return step


def main() -> None:
    asked = _arguments()
    versions = peers.install()
    spec = TensorSpec("input", (1, asked.pixels, asked.pixels))
    held_out = load_split("digits", spec.shape, "held-out").inputs
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        module = _module()
        truth = _logits(exporter.TorchSession.of(module, "logits", double=True), held_out[:JUDGED])
        _make(folder, module, spec)
        torch.set_num_threads(asked.threads)
        sessions = dict(_sessions(folder, module, asked.threads, stack))
        scores = {n: _score(_logits(s, held_out[:JUDGED]), truth) for n, s in sessions.items()}
        given = {1: [{"input": held_out[i : i + 1]} for i in range(VARIED)]}
        timing = Timing(runs=asked.rounds, pytorch_threads=asked.threads)
        found = {latency.name: latency for latency in measure_latency(sessions, given, timing)}
    record = {
        "environment": capture(),
        "versions": versions,
        "pixels": asked.pixels,
        "threads": asked.threads,
        "artefacts": {
            n: {"samples_ms": latency.samples_ms, "sqnr_db": scores[n][0]}
            for n, latency in found.items()
        },
    }
    text = _table(found, scores, asked, versions)
    keep.keep("latency", text, json.dumps(record, indent=1) + "\n", asked)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    keep.add_options(parser)
    return parser.parse_args()


def _module() -> torch.nn.Module:
    model = exporter.load_model("resnet18")
    module = model.module().eval()
    module.load_state_dict(load_file(model.weights))
    return module


def _make(folder: Path, module: torch.nn.Module, spec: TensorSpec) -> None:
    """Write the peers' files and ours into the folder."""
    images = draw(load_split("digits", spec.shape, "train"), count=IMAGES, seed=0).inputs
    np.save(folder / "calibration.npy", images)
    batch = torch.export.Dim("batch", min=1, max=32)
    torch.onnx.export(
        *(module, (torch.from_numpy(images[:2]),), folder / "default.onnx"),
        dynamo=True,
        dynamic_shapes=({0: batch},),
        input_names=["input"],
        output_names=["logits"],
    )
    subprocess.run([peers.PYTHON, "-c", _PEERS, folder], check=True, stdout=sys.stderr)
    folded = exporter.fold_batchnorm(module, torch.from_numpy(images[:2])).module
    output = TensorSpec("logits", (10,))
    exporter.export_onnx(
        folded, folder / "fp32.onnx", input=spec, output=output, batch=BatchRange(1, 8, 32)
    )
    graph = onnx.load(folder / "fp32.onnx")
    seen = exporter.calibrate(graph, feeds(images, "input", size=1))
    options = {"bf16": {}, "int8": {"form": "onnxruntime"}}
    for name, chosen in options.items():
        made = exporter.load_precision(name, chosen).convert(graph, seen, images)
        onnx.save(made.model, folder / f"{name}.onnx")


def _sessions(
    folder: Path, module: torch.nn.Module, threads: int, stack: ExitStack
) -> Iterator[tuple[str, Session]]:
    def run(runtime: str, file: str, **options: Any) -> Session:
        found = exporter.load_runtime(runtime, {"threads": threads, **options})
        session: Session = stack.enter_context(found.open(folder / file))
        return session

    yield EAGER, exporter.TorchSession.of(module, "logits")
    yield "PyTorch eager, channels last", run("torch-eager", "default.onnx", channels_last=True)
    yield "torch.compile, frozen", run("torch-compile", "default.onnx", freezing=True)
    yield DEFAULT, run("ort-cpu", "default.onnx")
    yield "onnxslim in ONNX Runtime", run("ort-cpu", "slim.onnx")
    yield "ONNX Runtime's own INT8 (U8S8, per channel)", run("ort-cpu", "ort-int8.onnx")
    yield "OpenVINO's converter, its defaults", OpenVino.open(folder / "openvino.xml", threads)
    yield "NNCF INT8 in OpenVINO", OpenVino.open(folder / "nncf.xml", threads)
    for name in ("fp32", "int8"):
        yield f"ours, {name} in ONNX Runtime", run("ort-cpu", f"{name}.onnx")
    for name in ("fp32", "bf16", "int8"):
        yield f"ours, {name} in OpenVINO", run("openvino", f"{name}.onnx")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _logits(session: Session, inputs: Array) -> Array:
    with _threads(2):
        found = [session({"input": inputs[i : i + 1]})["logits"] for i in range(len(inputs))]
    return np.concatenate(found).astype(np.float64)


def _score(logits: Array, truth: Array) -> tuple[float, float]:
    sqnr = 10 * np.log10((truth**2).sum() / ((logits - truth) ** 2).sum())
    return float(sqnr), float((logits.argmax(axis=1) == truth.argmax(axis=1)).mean())


def _table(
    found: dict[str, Latency],
    scores: dict[str, tuple[float, float]],
    asked: argparse.Namespace,
    versions: dict[str, str],
) -> str:
    def against(name: str, other: str) -> str:
        slow, fast = found[other].samples_ms, found[name].samples_ms
        low, high = ratio_interval(slow, fast)
        return f"{found[other].p50_ms / found[name].p50_ms:.2f} ({low:.2f} to {high:.2f})"

    rows = [
        f"| {name} | {latency.p50_ms:.2f} | {against(name, EAGER)} | {against(name, DEFAULT)} "
        f"| {scores[name][0]:.1f} | {scores[name][1]:.2%} |"
        for name, latency in sorted(found.items(), key=lambda pair: pair[1].p50_ms)
    ]
    where = ", ".join(f"{key} {value}" for key, value in capture().items())
    doubts = [f"- in doubt: {name}: {why}" for name, x in found.items() for why in x.doubts]
    threads = "1 thread" if asked.threads == 1 else f"{asked.threads} threads"
    return "\n".join(
        [
            f"# Latency of the document's network at 1x{asked.pixels}x{asked.pixels}, {threads}",
            "",
            f"p50 of {asked.rounds} rounds at batch 1, wall clock; ratios of p50s with their 95 % "
            f"intervals; SQNR and agreement on {JUDGED} held-out digits, against float64 PyTorch.",
            "",
            "| artefact | p50, ms | times as fast as eager | as the default export | SQNR, dB "
            "| agreement |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            *doubts,
            "- peers: " + ", ".join(f"{tool} {number}" for tool, number in versions.items()),
            f"- here: {where}",
            "",
        ]
    )


if __name__ == "__main__":
    main()
