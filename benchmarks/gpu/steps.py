"""Steps that run one after another, each in a process of its own and in so much time.

A vendor's library may crash, hang or be missing, and none of that may cost what the other steps
find. So a step ends in one of three ways, each but the first with its reason, and nothing else
happens: done, skipped (the machine lacks something), failed. What it found until then is kept.

Nothing but Python's own library is imported here, so that a machine that lacks everything is told
so, step by step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Literal

State = Literal["done", "skipped", "failed"]
ROOT = Path(__file__).parents[2]
LEAST = 5.0  # seconds, under which no step is begun
REASON = 300  # characters of a reason that are shown


class Skip(Exception):
    """What the machine lacks for a step, in words."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step: ``call`` is ``module:function``, which is given a `Here` and returns what it found.

    It may take ``seconds``, and is skipped unless each step that it ``needs`` is done.
    """

    name: str
    about: str
    call: str
    seconds: float
    argument: str | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a step ended, after how many seconds, and what it found: plain data, as JSON has it."""

    name: str
    about: str
    state: State
    reason: str | None = None
    seconds: float = 0.0
    found: Any = None

    def __str__(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"{self.name}: {self.state}{why}"


@dataclass(slots=True)
class Here:
    """What a step is given: the folder that all share, the settings, and how long it has."""

    folder: Path
    argument: str | None
    settings: Mapping[str, Any]
    seconds: float
    path: Path
    began: float = field(default_factory=monotonic)

    def left(self) -> float:
        """Return how many seconds are left."""
        return self.seconds - (monotonic() - self.began)

    def earlier(self, step: str) -> dict[str, Any]:
        """Return how an earlier step ended: its ``state``, ``reason`` and what it ``found``.

        One whose process broke off is ``broken``, and found nothing that may be relied upon.
        """
        return read(self.folder / f"{_slug(step)}.json")

    def keep(self, found: Any, *, failed: str | None = None) -> Any:
        """Keep what was found so far, also if the step ends in any other way; and return it."""
        state = "failed" if failed else "done"
        write(self.path, {"state": state, "reason": failed, "found": found})
        return found


def run_steps(
    steps: Sequence[Step],
    run: Callable[[Step, float], Outcome],
    *,
    seconds: float,
    lacking: str | None = None,
    only: Collection[str] = (),
    say: Callable[[Outcome], object] = str,
    clock: Callable[[], float] = monotonic,
) -> list[Outcome]:
    """Run each step in no more than all of them may take, and return how each ended.

    ``lacking`` is what none of them can do without; then all are skipped for it, and those that
    are not among ``only``, if it names some, are in any case.
    """
    end, ended = clock() + seconds, dict[str, Outcome]()
    for step in steps:
        left = end - clock()
        unmet = next((ended[n] for n in step.needs if ended[n].state != "done"), None)
        if lacking:
            outcome = Outcome(step.name, step.about, "skipped", lacking)
        elif only and step.name not in only:
            outcome = Outcome(step.name, step.about, "skipped", "it was not asked for")
        elif unmet:
            why = f"it needs {unmet.name!r}, which was {unmet.state}"
            outcome = Outcome(step.name, step.about, "skipped", why)
        elif left < LEAST:
            why = f"the {seconds:g} s that all steps may take are over"
            outcome = Outcome(step.name, step.about, "skipped", why)
        else:
            outcome = run(step, min(step.seconds, left))
        ended[step.name] = outcome
        say(outcome)
    return list(ended.values())


# ── A process for each ──────────────────────────────────────────────────────────────


def in_process(folder: Path, settings: Mapping[str, Any]) -> Callable[[Step, float], Outcome]:
    """Return what runs a step in a process of its own, and ends that when its time is over."""

    def run(step: Step, seconds: float) -> Outcome:
        place = folder / _slug(step.name)
        asked = {"step": asdict(step), "settings": dict(settings), "seconds": seconds}
        write(place.with_suffix(".asked"), asked)
        command = [sys.executable, "-m", "gpu.child", str(place)]
        paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        began = monotonic()
        with place.with_suffix(".log").open("wb") as log:
            child = subprocess.Popen(
                command, stdout=log, stderr=log, env=environ, start_new_session=True
            )
            try:
                code: int | None = child.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(child)
        took = monotonic() - began
        told = read(place.with_suffix(".json"))
        found = told.get("found")
        if code == 0 and told:
            return Outcome(step.name, step.about, told["state"], told["reason"], took, found)
        why = (
            f"it took longer than its {seconds:.0f} s"
            if code is None
            else f"its process ended with {_ending(code)}{_last_line(place.with_suffix('.log'))}"
        )
        kept = {"found": found} if code is None else {"broken": True}
        write(place.with_suffix(".json"), {"state": "failed", "reason": why, **kept})
        return Outcome(step.name, step.about, "failed", why, took, found)

    return run


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the process, and those that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def said(folder: Path, step: str) -> list[str]:
    """Return the lines that the process of a step has printed."""
    return _lines(folder / f"{_slug(step)}.log")


def _last_line(log: Path) -> str:
    lines = _lines(log)
    return f": {lines[-1].strip()[:REASON]}" if lines else ""


def _lines(log: Path) -> list[str]:
    if not log.is_file():
        return []
    return [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def write(path: Path, value: Any) -> None:
    """Write JSON into a file that is whole, also if the process ends while it does."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value), "utf-8")
    partial.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Return what `write` wrote, nothing if it did not."""
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found
