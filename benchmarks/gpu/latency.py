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
from exporter.runtimes._device import COPIES
from exporter.runtimes._nvml import Sensors
from exporter.samples import load_split, varied
from gpu import parity
from gpu.candidates import OUTPUT, RUNTIMES, Candidate, candidates
from gpu.steps import Here, Skip

WINDOW = 3  # rounds of warm-up, at least two such windows
FEWEST = 2 * WINDOW + FEWEST_PAIRS  # rounds
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
                runtime = candidate.tries[row["try"]]
                session = stack.enter_context(runtime.open(here.folder / row["file"]))
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
        costs = {name: self._cost(entrant) for name, entrant in self.entrants.items()}
        left = seconds - (perf_counter() - start)
        self._leave_out(costs, left)
        round_s = sum(costs.values())
        found: dict[str, Any] = {"batch": self.size, "not timed": self.refused}
        if not self.entrants or FEWEST * round_s > left:
            why = (
                f"{FEWEST} rounds of {round_s:.1f} s do not fit into the {max(left, 0):.0f} s left"
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
            name = OUTPUT.name
            expected = [{name: np.array(session(feed)[name])} for feed in self.feeds]
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
            self.watch.wanted[way] = Wanted(title, expected)

    def _cost(self, entrant: Entrant) -> float:
        """Return how many seconds an entrant takes of a round."""
        start = perf_counter()
        entrant.clock(entrant.bind(1))
        return perf_counter() - start + SETTLE_MS / 1e3

    def _leave_out(self, costs: dict[str, float], left: float) -> None:
        """Leave out what is least of interest until the fewest rounds fit, if that helps."""
        by_device = {name.partition(", ")[0] for name in costs if ", " in name}
        copies = [name for name in costs if name.endswith(COPIES)]
        walls = [name for name in costs if name in by_device]
        for names in (copies, walls):
            if FEWEST * sum(costs.values()) <= left:
                return
            for name in names:
                self.refused[name] = "left out, so that the others fit into the time"
                del costs[name], self.entrants[name]

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
