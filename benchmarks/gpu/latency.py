"""How long a batch takes on the GPU: all that answers, in turn, by the wall and by CUDA events.

The method is `exporter.latency`'s: candidates in a random order each round, warmed up until they
are steady, nothing left out, and outputs of timed runs held against untimed ones. Batch sizes share
the time that is left, and one for which it is too short is not timed, and said to be so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any

import msgspec

from exporter.bench.real import Wanted, Watch
from exporter.bench.ways import ways
from exporter.contracts import Session
from exporter.errors import with_hint
from exporter.intervals import FEWEST_PAIRS
from exporter.latency import Entrant, time_in_turn
from exporter.records import Feed, Gpu, Timing
from exporter.runtimes._nvml import Sensors
from exporter.samples import load_split, varied
from gpu import parity
from gpu.candidates import OUTPUT, RUNTIMES, Candidate, candidates, graph
from gpu.steps import Here, Skip

WINDOW = 3  # rounds of warm-up, at least two such windows
ROUNDS = 200  # about, at most: a p90 needs 64, and a p99 more than there is time for
SETTLE_MS = 5.0
_SHARED = 0.85  # of the time left, as a warm-up may take longer than the shortest one
_SENSED = 10  # rounds from one look at the sensors to the next


def measure(here: Here) -> dict[str, Any]:
    """Return the latencies at each batch size, and what was not timed with the reason."""
    found: dict[str, Any] = {"at": [], "not timed": {}}
    with ExitStack() as stack:
        sessions = _opened(here, stack, found["not timed"])
        if not sessions:
            reasons = dict.fromkeys(found["not timed"].values())
            raise Skip("nothing can be timed: " + "; ".join(reasons))
        batches = here.settings["batches"]
        for done, size in enumerate(batches):
            seconds = _SHARED * here.left() / (len(batches) - done)
            time = _Time(here.settings["pixels"], size, sessions)
            found["at"].append(msgspec.to_builtins(time.within(seconds)))
            here.keep(found)
    return found


def _opened(
    here: Here, stack: ExitStack, refused: dict[str, str]
) -> dict[str, tuple[Candidate, Session]]:
    """Open what the step before found to answer; note why the others are not timed."""
    sessions = {}
    for name in RUNTIMES:
        judged = here.earlier(parity.step(name))
        rows = {row["precision"]: row for row in judged.get("found") or []}
        for candidate in candidates(name):
            row = rows.get(candidate.precision, {"refused": judged.get("reason")})
            if reason := parity.unfit(row):
                refused[candidate.title] = reason
                continue
            try:
                model = graph(here.folder, candidate.precision, here.settings["pixels"])
                runtime = candidate.tries[row["try"]]
                session = stack.enter_context(runtime.open(runtime.build(model, here.folder)))
            except Exception as error:  # whatever it is, the others are timed
                refused[candidate.title] = _said(error)
                continue
            sessions[candidate.title] = candidate, session
    return sessions


class _Time:
    """One batch size."""

    def __init__(self, pixels: int, size: int, sessions: dict[str, tuple[Candidate, Session]]):
        held_out = load_split("digits", (1, pixels, pixels), "held-out")
        self.size, self.sessions = size, sessions
        self.feeds: list[Feed] = varied(held_out.inputs, "input", size=size)
        self.entrants: dict[str, Entrant] = {}
        self.watch = Watch(seed=0)
        self.refused: dict[str, str] = {}
        self.silent: str | None = "the GPU's sensors could not be asked"
        self.sensors: Sensors | None = None
        with self._asking():
            self.sensors = Sensors.open()

    def within(self, seconds: float) -> dict[str, Any]:
        """Time it in so many seconds, or say why not."""
        start = perf_counter()
        for title, (_, session) in self.sessions.items():
            self._enter(title, session)
        round_s = self._round() if self.entrants else 0.0
        fewest = 2 * WINDOW + FEWEST_PAIRS
        left = seconds - (perf_counter() - start)
        found: dict[str, Any] = {"batch": self.size, "not timed": self.refused}
        if not self.entrants or fewest * round_s > left:
            why = (
                f"{fewest} rounds of {round_s:.1f} s do not fit into the {max(left, 0):.0f} s left"
            )
            why = why if self.entrants else "nothing ran at this batch size"
            return found | {"latency": [], "gpu": self._sensed(), "why": why}
        timing = Timing((self.size,), WINDOW, FEWEST_PAIRS, settle_ms=SETTLE_MS)
        timed = time_in_turn(
            self.entrants,
            self.size,
            timing,
            seconds=min(left - 3 * WINDOW * round_s, ROUNDS * round_s),
            seen=self._seen,
        )
        gpu = self._sensed()
        return found | {
            "latency": timed,
            "farthest": {name: max(apart) for name, apart in self.watch.found.items()},
            "gpu": gpu,
            "doubts": [
                *(why for one in timed for why in one.doubts),
                *(gpu.doubts if gpu else (self.silent,)),
            ],
        }

    def _enter(self, title: str, session: Session) -> None:
        """Try a candidate in every way it can be timed, and let in those that work."""
        import numpy as np

        try:
            expected = [np.array(session(feed)[OUTPUT.name]) for feed in self.feeds]
        except Exception as error:  # whatever it is, the others are timed
            self.refused[title] = _said(error)
            return
        try:
            own = ways(title, [session], self.feeds)
        except Exception as error:  # the wall clock may do where the device's does not
            self.refused[f"{title}, by CUDA events"] = _said(error)
            own = {title: Entrant(session, self.feeds)}
        for way, entrant in own.items():
            try:
                entrant.clock(entrant.bind(0))
            except Exception as error:  # as above
                self.refused[way] = _said(error)
                continue
            self.entrants[way] = entrant
            self.watch.wanted[way] = Wanted(title, OUTPUT.name, expected)

    def _round(self) -> float:
        """Return how long one round takes, in seconds."""
        start = perf_counter()
        for entrant in self.entrants.values():
            entrant.clock(entrant.bind(1))
        return perf_counter() - start + len(self.entrants) * SETTLE_MS / 1e3

    def _seen(self, name: str, turn: int, step: Callable[[], Any]) -> None:
        self.watch(name, turn, step)
        if self.sensors and turn % _SENSED == 0:
            with self._asking():
                self.sensors.read()

    def _sensed(self) -> Gpu | None:
        with self._asking():
            return self.sensors.close() if self.sensors else None
        return None

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Go on without the sensors where a card does not tell what it is asked."""
        try:
            yield
        except Exception as error:  # NVML has a class of its own for each thing that it cannot tell
            self.sensors, self.silent = None, f"the GPU's sensors did not answer: {_said(error)}"


def _said(error: Exception) -> str:
    from exporter.errors import ExportError

    if isinstance(error, ExportError):
        return with_hint(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
