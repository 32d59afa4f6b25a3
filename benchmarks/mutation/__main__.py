"""Print how many seeded bugs the gate catches, and how many honest runs it fails."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from exporter.environment import capture
from mutation.bugs import CATALOGUE
from mutation.honest import Run, onnx_runs, torch_runs
from mutation.judge import cases
from mutation.nets import FAMILIES, Net
from mutation.score import Outcome, alarms, caught, honest_score, score, seeded, try_bug

RESULTS = Path(__file__).parents[1] / "results"
ENOUGH = 0.99


def outcomes(nets: Sequence[str], *, seeds: Sequence[int], every: int) -> Iterator[Outcome]:
    """Yield what becomes of the catalogue, or of every n-th bug of it, in each network.

    A seed chooses the networks' weights, and the places of the bugs.
    """
    chosen = list(CATALOGUE.values())[::every]
    for seed in seeds:
        for name in nets:
            for case in cases(Net.of(name, seed=seed)):
                for bug in chosen:
                    if case.precision in bug.precisions:
                        yield try_bug(case, bug, seed=seed)


def honest(nets: Sequence[str], *, seeds: Sequence[int], quick: bool) -> Iterator[Run]:
    """Yield honest runs of each network, with weights from each seed."""
    few = {"threads": (2,), "batches": (1, 7)} if quick else {}
    for seed in seeds:
        for name in nets:
            for case in cases(Net.of(name, seed=seed)):
                yield from onnx_runs(case, **few)
                if case.precision == "fp32":
                    yield from torch_runs(case, **few)


def main() -> None:
    parser = argparse.ArgumentParser(prog="mutation", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two networks and every fifth bug")
    parser.add_argument("--write", action="store_true", help="keep the result, dated, in results/")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    nets = list(FAMILIES)[::4] if asked.quick else list(FAMILIES)
    start = time.perf_counter()
    seeds = (0,) if asked.quick else (0, 1)
    bugs = list(outcomes(nets, seeds=seeds, every=5 if asked.quick else 1))
    runs = list(honest(nets, seeds=seeds, quick=asked.quick))
    took = time.perf_counter() - start
    count = len({outcome.bug for outcome in bugs})
    today = datetime.now(UTC).date().isoformat()
    said = [
        f"benchmarks/mutation, {today}",
        f"{count} bugs, {len(nets)} networks ({', '.join(nets)}), seeds {seeds}, {took:.0f} s",
        *("", score(bugs), "", honest_score(runs), ""),
        ", ".join(f"{key} {value}" for key, value in capture().items()),
    ]
    print("\n".join(said))
    if asked.write:
        (RESULTS / f"{today}-mutation.txt").write_text("\n".join([*said, ""]), "utf-8")
    if alarms(runs) or len(caught(bugs)) < ENOUGH * len(seeded(bugs)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
