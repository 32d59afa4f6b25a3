"""How fast is what a bundle holds, on this machine? ``resnet-export bench``.

Every file of every bundle in every runtime that can run it here, all timed in turn
(`exporter.latency`), and whether that was real: the inputs are held-out samples that change from
round to round; outputs of timed runs are compared with those of the same session called untimed;
and each artefact must label as many samples correctly as the bundle's record says it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import msgspec

from exporter import environment
from exporter.bench.candidates import (
    Candidate,
    Found,
    check_loads,
    check_memory,
    doubts_of_data,
    find_candidates,
    read_bundles,
)
from exporter.bench.real import Wanted, Watch, check_accuracy, first_run, untimed
from exporter.bench.ways import ways
from exporter.contracts import Model, Progress, Session, silent
from exporter.cores import usable_cores
from exporter.data import Data
from exporter.errors import BuildError, ProfileError, with_hint
from exporter.latency import Entrant, time_in_turn
from exporter.plugins import options_of
from exporter.records import (
    SCHEMA,
    BenchAsked,
    BenchReport,
    Checked,
    Feed,
    Gpu,
    Latency,
    Noise,
    NotTimed,
    Outputs,
    Timed,
    Timing,
)
from exporter.runtimes._nvml import Sensors
from exporter.samples import varied
from exporter.version import TOOL

_RUNS = 100
_SENSED = 10  # rounds from one look at a GPU's sensors to the next


def bench_bundles(
    folders: Sequence[Path],
    asked: BenchAsked = BenchAsked(),  # noqa: B008 - frozen
    *,
    models: Sequence[Model | None] | None = None,
    data: Data | None = None,
    progress: Progress = silent,
) -> BenchReport:
    """Time all that the bundles hold, in turn, and return the record of it. Nothing is written.

    ``models`` are what the bundles were exported from, where they were not the built-in ones, and
    ``data`` the samples that they were judged on, where those were not the networks' own.

    Raises `InputRefused` for a folder that is no bundle, a file that is gone or altered, other data
    than a bundle was judged on, or a batch that a model does not take; `UnknownName` for an unknown
    runtime; `RuntimeMissing` for one that cannot run here; `ProfileError` for threads where no
    runtime has any.
    """
    bundles = read_bundles(folders, models or [None] * len(folders), data)
    asked = msgspec.structs.replace(
        asked, batches=asked.batches or bundles[0].profile.timing.batches
    )
    check_memory(bundles, asked.batches)
    timing = Timing(batches=asked.batches, runs=asked.runs or _RUNS, seed=asked.seed)
    with TemporaryDirectory() as scratch, ExitStack() as sessions:
        found = find_candidates(bundles, asked, Path(scratch))
        check_loads(found.candidates, asked.loads)
        doubts = tuple(_doubts_of_threads(asked, found))
        bench = _Bench(asked, timing, found, sessions, progress)
        bench.open()
        times = bench.time()
    return BenchReport(
        schema=SCHEMA,
        tool=TOOL,
        environment=environment.capture(),
        asked=asked,
        timing=timing,
        samples=tuple(dict.fromkeys(bundle.fed for bundle in bundles)),
        timed=tuple(bench.timed.values()),
        not_timed=tuple(found.not_timed),
        latency=times.latency,
        noise=times.noise,
        doubts=(
            *doubts_of_data(bundles, data),
            *doubts,
            *times.doubts,
            *(why for one in (*times.latency, *times.on_device) for why in one.doubts),
        ),
        on_device=times.on_device,
        gpu=times.gpu,
    )


def _doubts_of_threads(asked: BenchAsked, found: Found) -> Iterator[str]:
    """Yield where thread counts mean nothing, or more than there is. Raises `ProfileError`."""
    if not asked.threads:
        return
    names = dict.fromkeys(candidate.runtime_name for candidate in found.candidates)
    without = [name for name in names if "threads" not in options_of("runtimes", name)]
    if len(without) == len(names):
        raise ProfileError(f"the runtime {without[0]!r} has no threads to set")
    if without:
        yield f"the thread counts mean nothing to {', '.join(without)}"
    cores = usable_cores()
    if max(asked.threads) > cores:
        yield f"{max(asked.threads)} threads share {cores} processors"


class Times(NamedTuple):
    """Latencies by the wall clock and by devices' own, and why not to trust them."""

    latency: tuple[Latency, ...]
    on_device: tuple[Latency, ...]
    noise: Noise
    gpu: Gpu | None
    doubts: tuple[str, ...]


@dataclass(slots=True)
class _Bench:
    """The open sessions, and what is known of each."""

    asked: BenchAsked
    timing: Timing
    found: Found
    sessions: ExitStack
    progress: Progress
    timed: dict[str, Timed] = field(default_factory=dict)
    opened: dict[str, tuple[Candidate, list[Session]]] = field(default_factory=dict)

    def open(self) -> None:
        """Open every candidate, and hold it against the bundle's record.

        Raises the first `BuildError` if none can be opened.
        """
        refused: list[BuildError] = []
        what = f"load {len(self.found.candidates)} candidates, and hold them against the record"
        with self.progress(what, len(self.found.candidates)) as advance:
            for candidate in self.found.candidates:
                try:
                    self._open(candidate)
                except BuildError as error:
                    refused.append(error)
                    self.found.not_timed.append(NotTimed(candidate.name, with_hint(error)))
                advance()
        if not self.timed:
            raise refused[0]

    def _open(self, candidate: Candidate) -> None:
        start = perf_counter()
        session = self._load(candidate)
        loaded = perf_counter()
        first = first_run(candidate, session, self._feeds(candidate, self.timing.batches[0])[0])
        self.timed[candidate.name] = Timed(
            name=candidate.name,
            bundle=candidate.bundle.label,
            precision=candidate.precision,
            runtime=candidate.runtime_name,
            threads=session.threads,
            file=candidate.file.name,
            sha256=candidate.file.sha256,
            load_ms=1e3 * (loaded - start),
            first_ms=first,
            checked=check_accuracy(candidate, session),
            notes=candidate.runtime.describe(candidate.path),
        )
        more = [self._load(candidate) for _ in range(1, self.asked.loads)]
        self.opened[candidate.name] = candidate, [session, *more]

    def _load(self, candidate: Candidate) -> Session:
        return self.sessions.enter_context(candidate.runtime.open(candidate.path))

    def time(self) -> Times:
        """Return all latencies, and what the machine was like meanwhile."""
        expected = {size: self._untimed(size) for size in self.timing.batches}
        load, others = environment.load_average(), environment.OtherLoad()
        before = environment.involuntary_switches()
        sensors = Sensors.open()
        latency: list[Latency] = []
        for size in self.timing.batches:
            latency += self._time(size, expected[size], sensors)
        after = environment.involuntary_switches()
        noise = Noise(
            cores=usable_cores(),
            load_average=load,
            others=others.share(),
            switches=None if before is None or after is None else after - before,
            turns=sum(len(one.samples_ms) + one.warmup for one in latency),
        )
        gpu = sensors.close() if sensors else None
        return Times(
            tuple(one for one in latency if one.name in self.timed),
            tuple(one for one in latency if one.name not in self.timed),
            noise,
            gpu,
            (*others.doubt(), *noise.doubts, *(gpu.doubts if gpu else ())),
        )

    def _untimed(self, size: int) -> dict[str, list[Outputs]]:
        """Return every candidate's outputs on what it will be timed on, before anything is."""
        return {
            name: untimed(candidate, sessions[0], self._feeds(candidate, size))
            for name, (candidate, sessions) in self.opened.items()
        }

    def _time(
        self, size: int, expected: dict[str, list[Outputs]], sensors: Sensors | None
    ) -> list[Latency]:
        """Time all at one batch size, and note how far timed outputs are from untimed ones."""
        entrants: dict[str, Entrant] = {}
        watch = Watch(seed=self.timing.seed)
        for name, (candidate, sessions) in self.opened.items():
            own = ways(name, sessions, self._feeds(candidate, size))
            entrants |= own
            for way in own:
                watch.wanted[way] = Wanted(name, expected[name])

        def seen(name: str, turn: int, step: Callable[[], Any]) -> None:
            watch(name, turn, step)
            if sensors and turn % _SENSED == 0:
                sensors.read()

        seconds = self.asked.seconds
        rounds = None if seconds is not None else self.timing.runs
        what = f"time {len(entrants)} candidates at batch {size}"
        with self.progress(what, rounds) as advance:
            found = time_in_turn(
                entrants, size, self.timing, seconds=seconds, seen=seen, advance=advance
            )
        for name, distances in watch.found.items():
            self._note(name, distances)
        return found

    def _note(self, name: str, distances: list[float]) -> None:
        timed = self.timed[name]
        checked: Checked = msgspec.structs.replace(
            timed.checked,
            timed=timed.checked.timed + len(distances),
            farthest=max(timed.checked.farthest, *distances),
        )
        self.timed[name] = msgspec.structs.replace(timed, checked=checked)

    def _feeds(self, candidate: Candidate, size: int) -> list[Feed]:
        bundle = candidate.bundle
        return varied(bundle.held_out.inputs, bundle.report.source.inputs, size=size)
