"""How long a whole export takes, beside the sum of its peers' steps for the same artefacts.

    ours     resnet-export                FP32, FP16 and INT8 in ONNX, with parity and latency
    peers    torch.onnx.export            FP32
             ModelOpt AutoCast            FP16, from that file
             ModelOpt quantize            INT8, from that file, entropy calibration

Both export the document's network, and calibrate INT8 on the same images. Each step is a process of
its own. Ours and theirs take turns, in a random order each round, after one round of both that is
not counted. The peers' steps make files and show nothing of them, so beside the whole there are
ratios of like with like: what in ours is conversion, by its stage table.

n rounds hold a median between the least and the most of them with a probability of 1 − 2^(1 − n),
whatever the distribution.

Run: ``make pipeline``, or python benchmarks/pipeline.py --help.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import keep
import msgspec
import numpy as np
from quantization import peers

import exporter
from exporter.cores import usable_cores
from exporter.environment import OtherLoad, capture
from exporter.records import Report, Stage
from exporter.renderers import _stages as stages
from exporter.renderers import record
from exporter.samples import draw, load_split

GOAL = 0.5  # of the peers' time, for the whole export
ARTEFACTS = ("fp32", "fp16", "int8")
STEPS = ("torch.onnx.export", "ModelOpt AutoCast", "ModelOpt INT8, entropy")

_EXPORT = """
import json, sys, torch, torch.onnx, onnxscript, exporter
from time import perf_counter
from safetensors.torch import load_file
out, pixels = sys.argv[1], int(sys.argv[2])
model = exporter.load_model("resnet18")
module = model.module().eval()
module.load_state_dict(load_file(model.weights))
began = perf_counter()
torch.onnx.export(module, (torch.zeros(2, 1, pixels, pixels),), out, dynamo=True, verbose=False,
                  dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=32)},),
                  input_names=["input"], output_names=["logits"])
print(json.dumps({"seconds": perf_counter() - began}))
"""


class Took(NamedTuple):
    """Seconds of a process, and of what it does once it has started and imported."""

    process: float
    work: float


class Round(NamedTuple):
    """One export of ours and its report, and the peers' steps by name."""

    ours: float
    report: Report
    peers: dict[str, Took]


class Line(NamedTuple):
    """A row of the table: how to read ours and theirs from a round, in seconds."""

    what: str
    ours: Callable[[Round], float]
    theirs: Callable[[Round], float]


class Spread(NamedTuple):
    """The median of a few values, between the least and the most of them."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = sorted(values)
        return cls(median(found), found[0], found[-1])

    def text(self, form: str) -> str:
        return f"{self.middle:{form}} ({self.low:{form}} to {self.high:{form}})"


def artefact_of(stage: Stage) -> str | None:
    """Return the artefact that a stage converts to, or None where it shows or times something.

    Calibration is one pass for FP16 and INT8 both, and counts as INT8's.
    """
    if stage.part != "conversion":
        return None
    precision = stage.name.partition(":")[0]
    if precision in ARTEFACTS:
        return precision
    return "int8" if stage.name.startswith("calibrate ") else "fp32"


def converting(one: Round, *artefacts: str) -> float:
    return sum(stage.seconds for stage in one.report.stages if artefact_of(stage) in artefacts)


def _work(one: Round, *steps: str) -> float:
    return sum(one.peers[step].work for step in steps)


LINES = (
    Line(
        "**the whole export, as a command**",
        lambda one: one.ours,
        lambda one: sum(took.process for took in one.peers.values()),
    ),
    Line(
        "the whole export, started and imported",
        lambda one: one.report.seconds,
        lambda one: _work(one, *STEPS),
    ),
    Line(
        "the same without timing latency, which no peer does",
        lambda one: one.report.seconds - one.report.seconds_by_part["latency"],
        lambda one: _work(one, *STEPS),
    ),
    Line(
        "**like with like: conversion alone**",
        lambda one: converting(one, *ARTEFACTS),
        lambda one: _work(one, *STEPS),
    ),
    Line("- FP32, folded", lambda one: converting(one, "fp32"), lambda one: _work(one, STEPS[0])),
    Line("- FP16", lambda one: converting(one, "fp16"), lambda one: _work(one, STEPS[1])),
    Line(
        "- INT8, with the calibration",
        lambda one: converting(one, "int8"),
        lambda one: _work(one, STEPS[2]),
    ),
)


# ── Running both ────────────────────────────────────────────────────────────────────


def export_ours(folder: Path, asked: argparse.Namespace) -> tuple[float, Report]:
    """Export with the command line, and return the seconds of its process and its report.

    A missed gate, exit code 1, is an export all the same: at fewer pixels than it was trained at
    the network labels nothing right.
    """
    out = folder / "ours"
    settings = {
        "calibration.images": asked.images,
        "runtime.ort-cpu.threads": asked.threads,
        "timing.pytorch_threads": asked.threads,
    }
    command: list[object] = [sys.executable, "-m", "exporter", "--profile", folder / "profile.toml"]
    command += ["--input", f"1x{asked.pixels}x{asked.pixels}", "--out", out]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    seconds, _ = _run(command, asked, codes=(0, 1))
    return seconds, record.parse((out / "report.json").read_bytes())


def run_peers(folder: Path, asked: argparse.Namespace) -> dict[str, Took]:
    """Run the peers' steps one after the other, each a process, and return what each took."""
    source, images = folder / "default.onnx", folder / "calibration.npy"
    worker: list[object] = [peers.PYTHON, peers.WORKER]
    fp16, int8, threads = folder / "fp16.onnx", folder / "int8.onnx", asked.threads
    commands: tuple[list[object], ...] = (
        [sys.executable, "-c", _EXPORT, source, asked.pixels],
        [*worker, "halve", source, fp16, threads],
        [*worker, "quantise", "modelopt-entropy", source, images, int8, threads],
    )
    found = {}
    for step, command in zip(STEPS, commands, strict=True):
        seconds, said = _run(command, asked)
        found[step] = Took(seconds, json.loads(said.splitlines()[-1])["seconds"])
    return found


def _run(
    command: Sequence[object], asked: argparse.Namespace, *, codes: tuple[int, ...] = (0,)
) -> tuple[float, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads)}
    began = perf_counter()
    done = subprocess.run(
        [*map(str, command)], check=False, capture_output=True, text=True, env=environment
    )
    seconds = perf_counter() - began
    if done.returncode not in codes:
        raise SystemExit(f"{done.stderr}\nexit code {done.returncode}: {command[:3]}")
    return seconds, done.stdout


def rounds(folder: Path, asked: argparse.Namespace) -> list[Round]:
    """Return what both took in each round; the first, which warms the caches, is left out."""
    order = random.Random(0)
    found = []
    for turn in range(asked.rounds + 1):
        if order.random() < 0.5:
            ours, report = export_ours(folder, asked)
            theirs = run_peers(folder, asked)
        else:
            theirs = run_peers(folder, asked)
            ours, report = export_ours(folder, asked)
        found.append(Round(ours, report, theirs))
        total = sum(took.process for took in theirs.values())
        kept = f"round {turn}" if turn else "warm-up"
        print(f"{kept}: ours {ours:.1f} s, peers {total:.1f} s", file=sys.stderr, flush=True)
    return found[1:]


# ── The page ────────────────────────────────────────────────────────────────────────


def as_markdown(
    found: Sequence[Round], sizes: dict[str, int], versions: dict[str, str], asked: Any
) -> str:
    whole = median(LINES[0].ours(one) / LINES[0].theirs(one) for one in found)
    goal = f"{'met' if whole <= GOAL else 'missed'}: {whole:.2f} where {GOAL} is the goal"
    certain = 1 - 2 ** (1 - len(found))
    here = ", ".join(f"{key} {value}" for key, value in capture().items())
    threads = "1 thread" if asked.threads == 1 else f"{asked.threads} threads"
    lines = [
        f"# Time of the whole export at 1x{asked.pixels}x{asked.pixels}, {threads}",
        "",
        f"Seconds, medians of {len(found)} rounds in turn, in brackets the least and the most, "
        f"which hold the median with {certain:.1%}. FP32, FP16 and INT8 of the document's "
        f"network, INT8 calibrated on {asked.images} images. The peers' steps are "
        f"{', '.join(STEPS)}. The goal for the whole is {goal}.",
        "",
        *_table(("", "ours", "sum of the peers' steps", "ours / peers"), _against(found)),
        "Each of the peers' steps is a process; what they come to once started and imported is "
        "held against what ours takes between start and report. Calibration is one pass for "
        "FP16 and INT8 both, and counts as INT8's. The peers make files alone: parity in "
        "float64, fidelity layer by layer, the question what ran, and latency are ours only.",
        "",
        *_table(("the peers' step", "process, s", "started and imported, s"), _steps(found)),
        *_table(("ours, by what it is for", "s"), _parts(found)),
        "## Our stages",
        "",
        "Medians of time, the largest of peak memory.",
        "",
        *_table(stages.HEADS, stages.rows(typical(found))),
        "## What with",
        "",
        *_doubts(asked.others),
        "- files, MB: " + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.items()),
        "- peers: " + ", ".join(f"{tool} {number}" for tool, number in versions.items()),
        f"- here: resnet-export {exporter.__version__}, {here}",
        "",
    ]
    return "\n".join(lines)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        *(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)),
        "",
    ]


def _against(found: Sequence[Round]) -> Iterator[tuple[str, ...]]:
    for line in LINES:
        ours, theirs = [line.ours(one) for one in found], [line.theirs(one) for one in found]
        ratio = Spread.of(a / b for a, b in zip(ours, theirs, strict=True))
        spreads = (Spread.of(ours).text(".1f"), Spread.of(theirs).text(".1f"), ratio.text(".2f"))
        yield (line.what, *spreads)


def _steps(found: Sequence[Round]) -> Iterator[tuple[str, ...]]:
    for step in STEPS:
        took = [one.peers[step] for one in found]
        process, work = Spread.of(t.process for t in took), Spread.of(t.work for t in took)
        yield step, process.text(".1f"), work.text(".1f")


def _parts(found: Sequence[Round]) -> Iterator[tuple[str, ...]]:
    for part in found[0].report.seconds_by_part:
        yield part, Spread.of(one.report.seconds_by_part[part] for one in found).text(".1f")


def _doubts(others: float | None) -> list[str]:
    if others is None or others <= keep.BUSY:
        return []
    return [f"- in doubt: other processes took {others:.0%} of the processors meanwhile"]


def typical(found: Sequence[Round]) -> list[Stage]:
    """Return each stage with its median time and its largest peak, over the rounds."""
    made = []
    for at, stage in enumerate(found[0].report.stages):
        every = [one.report.stages[at] for one in found]
        peaks = [other.peak_bytes for other in every if other.peak_bytes is not None]
        made.append(
            msgspec.structs.replace(
                stage,
                seconds=median(other.seconds for other in every),
                peak_bytes=max(peaks, default=None),
            )
        )
    return made


def as_json(
    found: Sequence[Round], sizes: dict[str, int], versions: dict[str, str], asked: Any
) -> str:
    plain = {
        "environment": capture(),
        "resnet-export": exporter.__version__,
        "versions": versions,
        "pixels": asked.pixels,
        "images": asked.images,
        "threads": asked.threads,
        "others": asked.others,
        "bytes": sizes,
        "rounds": [
            {
                "ours_s": one.ours,
                "stages": msgspec.to_builtins(one.report.stages),
                "peers_s": {step: took._asdict() for step, took in one.peers.items()},
            }
            for one in found
        ],
        "ratios": {
            line.what.strip("*- "): Spread.of(
                line.ours(r) / line.theirs(r) for r in found
            )._asdict()
            for line in LINES
        },
    }
    return json.dumps(plain, indent=1) + "\n"


def main() -> None:
    asked = _arguments()
    versions = peers.install()
    with TemporaryDirectory() as name:
        folder = Path(name)
        shape = (1, asked.pixels, asked.pixels)
        images = draw(load_split("digits", shape, "train"), count=asked.images, seed=0).inputs
        np.save(folder / "calibration.npy", images)
        (folder / "profile.toml").write_text(_profile().to_toml(), "utf-8")
        others = OtherLoad()
        found = rounds(folder, asked)
        asked.others = others.share()
        files = {f"ours {p}": f"ours/resnet18.{p}.onnx" for p in ARTEFACTS}
        files |= {
            "peers fp32": "default.onnx",
            "peers fp16": "fp16.onnx",
            "peers int8": "int8.onnx",
        }
        sizes = {what: _size(folder / file) for what, file in files.items()}
    result = (found, sizes, versions, asked)
    keep.keep("pipeline", as_markdown(*result), as_json(*result), asked)


def _profile() -> Any:
    """Return the default profile without TensorRT, since no peer builds engines."""
    profile = exporter.load_profile("default").only(ARTEFACTS)
    return msgspec.structs.replace(profile, runtime={"ort-cpu": profile.runtime["ort-cpu"]})


def _size(path: Path) -> int:
    """Return a file's bytes, with the weights that an exporter may have put beside it."""
    return sum(file.stat().st_size for file in (path, *path.parent.glob(f"{path.name}.data")))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--images", type=int, default=256, help="that INT8 is calibrated on")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=usable_cores())
    keep.add_options(parser)
    asked = parser.parse_args()
    if asked.rounds < 2:
        parser.error(f"--rounds must be 2 or more, found {asked.rounds}")
    return asked


if __name__ == "__main__":
    main()
