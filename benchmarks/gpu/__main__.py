"""Run everything that needs an NVIDIA GPU, and keep it with the card's name. Run: ``make gpu``.

Each step ends as done, as skipped with what the machine lacks, or as failed with the reason. Where
there is no GPU all are skipped, nothing is written, and that is no failure.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu.steps import ROOT, Outcome, Step, in_process, run_steps, said

RESULTS = ROOT / "benchmarks" / "results"
RUNTIMES = ("torch-eager-cuda", "torch-compile-cuda", "ort-cuda", "tensorrt", "tensorrt-rtx")
SECONDS = 570.0
_TAIL = 20  # lines of what a failed step has printed
STEPS = (
    Step("card", "the card and what is installed beside it", "gpu.card:look", 40),
    Step("tests", "the tests that need a GPU", "gpu.marked:run_tests", 90),
    Step("graphs", "the network as FP32, FP16 and INT8", "gpu.graphs:make", 150),
    Step(
        "engines",
        "TensorRT-RTX engines for this card and each listed target, and what is said of them",
        "gpu.engines:build_for_targets",
        60,
        needs=("graphs",),
    ),
    *(
        Step(
            f"parity on {name}",
            f"the digits on {name}, against float64",
            "gpu.parity:judge",
            150 if name == "tensorrt" else 75,  # it tries its kernels while it builds
            argument=name,
            needs=("graphs",),
        )
        for name in RUNTIMES
    ),
    Step("ceilings", "the card's peaks and bandwidths", "gpu.ceilings:measure", 45),
    Step(
        "latency",
        "all of them in turn, batch after batch, beside the ceilings",
        "gpu.latency:measure",
        300,
        needs=("graphs",),
    ),
)


def main() -> int:
    """Return the exit code: 1 if a step failed."""
    asked = _arguments()
    settings = {"pixels": asked.pixels, "images": asked.images, "batches": asked.batches}
    with TemporaryDirectory() as name:
        folder = Path(name)
        ended = run_steps(
            STEPS,
            in_process(folder, settings),
            seconds=asked.seconds,
            lacking=_lacking(),
            only=asked.only,
            say=lambda outcome: _say(outcome, folder),
        )
        card = next(outcome.found for outcome in ended if outcome.name == "card")
        if not card:
            print("no results are kept: no NVIDIA GPU was asked for its name")
        else:
            _keep(_record(ended, card, settings, folder), asked.results)
    return int(any(outcome.state == "failed" for outcome in ended))


def _say(outcome: Outcome, folder: Path) -> None:
    """Print how a step ended, and the end of what it printed where that was badly."""
    print(f"{outcome} ({outcome.seconds:.0f} s)", flush=True)
    if outcome.state == "failed":
        for line in said(folder, outcome.name)[-_TAIL:]:
            print(f"    {line}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--images", type=int, default=64, help="to calibrate INT8 on")
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 32, 64, 256])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that all may take")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept")
    parser.add_argument(
        "--only",
        type=lambda said: said.split(","),
        default=[],
        metavar="STEP,…",
        help="these steps alone: " + ", ".join(step.name for step in STEPS),
    )
    asked = parser.parse_args()
    known = [step.name for step in STEPS]
    if unknown := [name for name in asked.only if name not in known]:
        parser.error(f"no step named {unknown[0]!r}, but {', '.join(known)}")
    if asked.only:
        asked.only.append("card")  # results bear its name
    return asked


def _numbers(said: str) -> list[int]:
    return [int(part) for part in said.split(",")]


def _lacking() -> str | None:
    """Return why there is no GPU, or None; the driver is asked, and needs no package for that."""
    sys.path.insert(0, str(ROOT))
    from exporter.runtimes._cuda import missing_gpu

    return missing_gpu()


def _record(
    ended: list[Outcome], card: dict[str, Any], settings: dict[str, Any], folder: Path
) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "card": card,
        **settings,
        "costs": _costs(folder),
        "steps": [asdict(outcome) for outcome in ended],
    }


def _costs(folder: Path) -> dict[str, Any]:
    """Return what each graph costs, if any was made."""
    try:
        import msgspec
        import onnx

        from exporter.flops import count_flops
    except ImportError:
        return {}
    paths = sorted(folder.glob("resnet18.*.onnx"))
    return {
        path.suffixes[-2].removeprefix("."): msgspec.to_builtins(count_flops(onnx.load(path)))
        for path in paths
    }


def _keep(record: dict[str, Any], results: Path) -> None:
    """Write the record, and the page that follows from it."""
    card = re.sub(r"[^a-z0-9]+", "-", record["card"]["name"].lower()).strip("-")
    path = results / f"{record['date']}-gpu-{card}.json"
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1), "utf-8")
    print(f"kept {path}")
    try:
        from gpu.page import render
    except ImportError as error:
        print(f"no page: {error}")
        return
    path.with_suffix(".md").write_text(render(record), "utf-8")
    print(f"kept {path.with_suffix('.md')}")


if __name__ == "__main__":
    sys.exit(main())
