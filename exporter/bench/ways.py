"""In which ways a session is timed: by the wall clock, and by its device's own where it has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from exporter.contracts import OnDevice, Session
from exporter.latency import Entrant
from exporter.records import Feed, Outputs


@dataclass(frozen=True, slots=True)
class _Way:
    """A session that runs in one of the ways that its device can be timed."""

    session: Session
    device: OnDevice
    name: str

    @property
    def threads(self) -> int:
        return self.session.threads

    def __call__(self, feed: Feed) -> Outputs:
        return self.session(feed)

    def bind(self, feed: Feed) -> Callable[[], float]:
        return self.device.on_device(feed)[self.name]


def ways(name: str, sessions: Sequence[Session], feeds: Sequence[Feed]) -> dict[str, Entrant]:
    """Return what to time of one file's loads, by name: under its own, the wall clock."""
    first, *others = sessions
    found = {name: Entrant(first, feeds, others=others)}
    if isinstance(first, OnDevice):
        for way in first.on_device(feeds[0]):
            timed, *more = (_Way(s, s, way) for s in sessions if isinstance(s, OnDevice))
            found[f"{name}, {way}"] = Entrant(timed, feeds, clock=_by_device, others=more)
    return found


def _by_device(step: Callable[[], float]) -> float:
    return step()
