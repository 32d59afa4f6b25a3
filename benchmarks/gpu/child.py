"""The process of one step: ``python -m gpu.child PLACE``, with PLACE.asked to say which."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from pathlib import Path

from gpu.steps import REASON, Here, Skip, State, read, write


def be(place: Path) -> None:
    """Run the step, and write how it ended and what it found into PLACE.json."""
    asked = read(place.with_suffix(".asked"))
    step, path = asked["step"], place.with_suffix(".json")
    here = Here(place.parent, step["argument"], asked["settings"], asked["seconds"], path)
    state: State = "done"
    reason = None
    try:
        module, _, function = step["call"].partition(":")
        found = getattr(import_module(module), function)(here)
        said = read(path)
        state, reason = said.get("state", state), said.get("reason")
    except (Skip, ImportError) as lack:
        state, reason, found = "skipped", str(lack), read(path).get("found")
    except Exception as error:  # whatever it is, the other steps go on
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0] or "no reason given"
        reason = f"{type(error).__name__}: {first}"[:REASON]
        state, found = "failed", read(path).get("found")
    write(path, {"state": state, "reason": reason, "found": found})


if __name__ == "__main__":
    be(Path(sys.argv[1]))
