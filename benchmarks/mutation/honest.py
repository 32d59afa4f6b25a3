"""Runs in which nothing is wrong: every one that the gate fails is a false alarm.

The graphs asked for themselves are run, in all precisions, by ONNX Runtime at both extremes of its
optimisations, with several thread counts and batch sizes; and the folded network by PyTorch in
float32, with its two memory layouts, with oneDNN, without, and by NNPACK. All are judged end to
end and layer by layer, each run on samples of its own; but NNPACK, whose convolutions are
Winograd's for batches of 16 and more, end to end alone, as the ladder judges PyTorch: its layers
are off by up to ten times what sums lose (`exporter.emulation.rounding`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from exporter.contracts import Session
from exporter.fidelity import expose
from exporter.fold import fold_batchnorm
from exporter.parity import collect_outputs
from exporter.records import Array, Feed, Fidelity, Outputs
from exporter.samples import feeds
from mutation.judge import JUDGED, OUTPUT, Case, Truth, open_session, verdict
from mutation.nets import SHAPE, pictures

THREADS = (1, 2, 4)
BATCHES = (1, 2, 7, 8, 32)
DRAWS = 3  # sets of samples whose outputs are emulated, taken in turn


@dataclass(frozen=True, slots=True)
class Run:
    """One run, by what, and what the gate says of it."""

    net: str
    precision: str
    by: str
    fidelity: Fidelity


def onnx_runs(
    case: Case, *, threads: Sequence[int] = THREADS, batches: Sequence[int] = BATCHES
) -> Iterator[Run]:
    """Yield the graph asked for, run by ONNX Runtime in every way."""
    draws = _draws(case)
    for number, (optimise, count) in enumerate(product((False, True), threads)):
        whole = open_session(case.model, optimise=optimise, threads=count)
        every = open_session(expose(case.model), optimise=optimise, threads=count)
        level = "all" if optimise else "no"
        for size in batches:
            by = f"ONNX Runtime, {level} optimisations, {count} threads, batch {size}"
            truth = draws[(number + size) % len(draws)]
            yield _run(case, truth, whole, every, size=size, seed=97 * number + size, by=by)


def torch_runs(
    case: Case, *, threads: Sequence[int] = THREADS, batches: Sequence[int] = BATCHES
) -> Iterator[Run]:
    """Yield the folded network, run by PyTorch in float32 in every way."""
    draws = _draws(case)
    module = fold_batchnorm(case.net.module, torch.zeros(1, *SHAPE)).module.eval()
    layouts = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    before = torch.get_num_threads()
    try:
        ways = product(layouts, ("oneDNN", "plain loops", "NNPACK"), threads)
        for number, (layout, library, count) in enumerate(ways):
            torch.set_num_threads(count)
            run = _torch_session(case, module, layouts[layout], library)
            for size in batches:
                by = f"PyTorch, {layout}, {library}, {count} threads, batch {size}"
                seed = 3000 + 97 * number + size
                truth = draws[(number + size) % len(draws)]
                yield _run(case, truth, run, run, size=size, seed=seed, by=by)
    finally:
        torch.set_num_threads(before)


def _draws(case: Case) -> list[Truth]:
    return [case.truth, *(case.draw(seed) for seed in range(2, DRAWS + 1))]


def _run(
    case: Case, truth: Truth, whole: Session, every: Session, *, size: int, seed: int, by: str
) -> Run:
    batches = feeds(truth.inputs, "input", size=size)
    candidate = collect_outputs(whole, batches, OUTPUT.name, samples=JUDGED)
    feed = {"input": pictures(size, seed=10_000 + seed)}
    found = every(feed)
    by_layer = {**feed, **found} if len(found) > 1 else {}
    fidelity = verdict(case, truth, candidate, by_layer)
    return Run(case.net.name, case.precision, by, fidelity)


def _torch_session(
    case: Case, module: nn.Module, layout: torch.memory_format, library: str
) -> Callable[[Feed], Outputs]:
    """Return PyTorch as a session that also gives what each weighted layer does, by its tensor."""
    placed = module.to(memory_format=layout)
    layers = {} if library == "NNPACK" else dict(placed.named_modules())
    watched = {
        step.writes[0]: layers[step.name]
        for step in case.emulator.steps
        if step.name in layers and isinstance(layers[step.name], nn.Conv2d | nn.Linear)
    }

    def run(feed: Feed) -> Outputs:
        found: dict[str, Array] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _, __, output: found.__setitem__(name, output.numpy())

        hooks = [layer.register_forward_hook(keep(name)) for name, layer in watched.items()]
        with torch.inference_mode(), _only(library):
            x = torch.from_numpy(feed["input"]).to(memory_format=layout)
            found[OUTPUT.name] = placed(x).numpy()
        for hook in hooks:
            hook.remove()
        return found

    return run


@contextmanager
def _only(library: str) -> Iterator[None]:
    """Let PyTorch convolve with one of its libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reading oneDNN's flags warns of GPUs that are not there
        with (
            torch.backends.mkldnn.flags(enabled=library == "oneDNN"),
            torch.backends.nnpack.flags(enabled=library == "NNPACK"),
        ):
            yield
