"""Is what was timed real? Outputs of timed runs, held against those of untimed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

from exporter.bench.candidates import Candidate
from exporter.contracts import Bound, Session
from exporter.errors import BuildError, InputRefused
from exporter.parity import collect_outputs
from exporter.records import Array, Checked, Feed, Outputs
from exporter.samples import feeds

_SHARE = 0.25  # of the timed runs, whose outputs are read


class Wanted(NamedTuple):
    """Of which candidate a timed run is, and what it computes, called untimed on each batch."""

    candidate: str
    batches: Sequence[Outputs]


@dataclass(slots=True)
class Watch:
    """Compares a random sample of all timed runs at one batch size, the first round among it."""

    seed: int
    wanted: dict[str, Wanted] = field(default_factory=dict)
    found: dict[str, list[float]] = field(default_factory=dict)
    _draws: Any = None

    def __call__(self, name: str, turn: int, step: Callable[[], Any]) -> None:
        """Read what a timed run computed, and note how far it is from what it should be."""
        import numpy as np

        self._draws = self._draws or np.random.RandomState(self.seed)
        if (self._draws.random_sample() >= _SHARE and turn) or not isinstance(step, Bound):
            return
        wanted = self.wanted[name]
        got, batch = step.outputs(), wanted.batches[turn % len(wanted.batches)]
        apart = max(distance(want, got[name]) for name, want in batch.items())
        self.found.setdefault(wanted.candidate, []).append(apart)


def distance(want: Array, got: Array) -> float:
    """Return ‖got − want‖ / ‖want‖, infinite where the shapes differ or a value is not finite."""
    import numpy as np

    a, b = np.asarray(want, np.float64), np.asarray(got, np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    if np.array_equal(a, b):
        return 0.0
    scale = float(np.linalg.norm(a))
    return float(np.linalg.norm(b - a)) / scale if scale else float("inf")


def first_run(candidate: Candidate, session: Session, feed: Feed) -> float:
    """Return how long the first call takes, in ms. Raises as `untimed`."""
    with _taking(candidate, feed):
        start = perf_counter()
        session(feed)
        return 1e3 * (perf_counter() - start)


def untimed(candidate: Candidate, session: Session, batches: Sequence[Feed]) -> list[Outputs]:
    """Return the outputs of each batch. Raises `InputRefused` if the model does not take it."""
    import numpy as np

    names = [spec.name for spec in candidate.bundle.report.source.graph_outputs]
    found: list[Outputs] = []
    with _taking(candidate, batches[0]):
        for feed in batches:
            given = session(feed)
            found.append({name: np.array(given[name]) for name in names})
    return found


@contextmanager
def _taking(candidate: Candidate, feed: Feed) -> Iterator[None]:
    try:
        yield
    except BuildError as error:
        size = len(next(iter(feed.values())))
        raise InputRefused(f"{candidate.name} does not take a batch of {size}: {error}") from error


def check_accuracy(candidate: Candidate, session: Session) -> Checked:
    """Return how many labelled samples a candidate labels correctly, beside what is recorded."""
    bundle, recorded = candidate.bundle, candidate.recorded
    source = bundle.report.source
    if recorded is None or recorded.lost is None or recorded.gained is None:
        return Checked()
    assert recorded.reference_correct is not None  # it has labels
    top = source.top_k
    outputs = collect_outputs(
        session,
        feeds(bundle.held_out.inputs, source.inputs, size=bundle.profile.batch.opt),
        top.labels.name if top else recorded.output or source.output.name,
        samples=recorded.samples,
    )
    first = outputs[:, 0] if top else outputs.argmax(axis=1)
    correct = int((first == bundle.held_out.labels).sum())
    before = recorded.reference_correct - recorded.lost + recorded.gained
    return Checked(correct=correct, recorded=before, samples=recorded.samples)
