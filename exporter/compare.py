"""Networks side by side: what each costs, and how long it takes: ``resnet-export compare``.

Each is folded, exported to ONNX, counted there, and timed in one runtime, all in turn. Neither
figure depends on the values of the weights, so that networks which ship without any get the ones
that PyTorch initialises them with, from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from msgspec import structs

from exporter import environment
from exporter.contracts import Model, Progress, Session, outputs_of, silent
from exporter.errors import ExportError, with_hint
from exporter.factories import FactoryModel
from exporter.flops import count_flops, count_module, read_file
from exporter.fold import fold_batchnorm
from exporter.initial import SEED, from_seed
from exporter.latency import measure_latency
from exporter.network import Network
from exporter.plugins import load_runtime
from exporter.records import (
    BatchRange,
    Contender,
    Contest,
    Feed,
    Latency,
    Outputs,
    TensorSpec,
    Timing,
)
from exporter.samples import noise
from exporter.to_onnx import export_onnx
from exporter.version import TOOL
from exporter.weights import load_weights

if TYPE_CHECKING:
    from torch import nn

RUNTIME = "ort-cpu"
RUNS = 20
INITIALISED = f"as initialised from seed {SEED}: no figure depends on their values"


def compare_networks(
    networks: Sequence[str | FactoryModel],
    *,
    input_shape: tuple[int, ...] | None = None,
    classes: int | None = None,
    runs: int = RUNS,
    threads: int = 0,
    progress: Progress = silent,
) -> Contest:
    """Return each network's cost and latency for a batch of one, at its own input.

    With ``input_shape``, (C, H, W), and ``classes`` all have those; one that cannot is in the
    result with the reason. Raises `UnknownName`.
    """
    named = {one if isinstance(one, str) else one.code: one for one in networks}
    own = {name: Network.choose(one, {}, None, None).model.input for name, one in named.items()}
    runtime = load_runtime(RUNTIME, {"threads": threads})
    found: dict[str, Contender] = {}
    with TemporaryDirectory() as folder, ExitStack() as sessions:
        timed: dict[str, Session] = {}
        for name, network in named.items():
            path = Path(folder, f"{len(found)}.onnx")
            try:
                with progress(f"export {name}", None):
                    model = Network.choose(network, {}, input_shape, classes).model
                    found[name] = _export(name, model, input_shape, path)
                session = sessions.enter_context(runtime.open(path))
            except ExportError as error:
                asked = input_shape or own[name].shape
                found[name] = Contender(name, asked, (), "", refused=with_hint(error))
                continue
            path.unlink()  # some are half a gigabyte
            sample = noise(found[name].input, count=1, seed=SEED)
            timed[name] = _OwnInput(session, {model.input.name: sample})
        others = environment.OtherLoad()
        latency = _time(timed, runs, progress)
    measured = (structs.replace(c, latency=latency.get(c.name)) for c in found.values())
    return Contest(TOOL, RUNTIME, environment.capture(), tuple(measured), others.doubt())


def _export(name: str, model: Model, input_shape: tuple[int, ...] | None, path: Path) -> Contender:
    """Write the folded network to ``path``, and return what it costs there."""
    import torch

    spec = TensorSpec(model.input.name, input_shape or model.input.shape)
    with torch.device("meta"):  # where a shape that does not fit costs nothing
        count_module(model.module(), spec.shape, name=name)
    module, weights = _module(model)
    output, *more = outputs_of(model)
    export_onnx(
        fold_batchnorm(module).module,
        path,
        input=spec,
        output=output,
        more_outputs=more,
        batch=BatchRange(),
    )
    return Contender(
        name, spec.shape, model.output.shape, weights, cost=count_flops(read_file(path))
    )


def _module(model: Model) -> tuple[nn.Module, str]:
    module = from_seed(model.module)
    if model.weights is None:
        return module, INITIALISED
    load_weights(module, model.weights)
    return module, model.weights.name


def _time(timed: dict[str, Session], runs: int, progress: Progress) -> dict[str, Latency]:
    if not timed:
        return {}
    timing = Timing(batches=(1,), runs=runs)
    return {one.name: one for one in measure_latency(timed, {1: {}}, timing, progress=progress)}


@dataclass(frozen=True, slots=True)
class _OwnInput:
    """A session that takes its own sample, whatever it is fed: networks differ in their inputs."""

    session: Session
    sample: Feed

    @property
    def threads(self) -> int:
        return self.session.threads

    def __call__(self, feed: Feed) -> Outputs:
        return self.session(self.sample)

    def bind(self, feed: Feed) -> Callable[[], Any]:
        return self.session.bind(self.sample)
