"""What a machine has and what each runtime did on it, as text and as JSON: ``doctor``."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from exporter.records import Checkup, Diagnosis, Trial


def render(diagnosis: Diagnosis) -> str:
    """Return the machine, then each runtime: two lines on what is missing, and what it ran."""
    return "\n".join(_lines(diagnosis)) + "\n"


def to_json(diagnosis: Diagnosis) -> str:
    """Return the same as JSON, with whether each runtime is ready written out."""
    table = msgspec.to_builtins(diagnosis)
    for found, entry in zip(diagnosis.runtimes, table["runtimes"], strict=True):
        entry["ready"] = found.ready
    return msgspec.json.format(msgspec.json.encode(table), indent=2).decode() + "\n"


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    cores = "1 core" if diagnosis.cores == 1 else f"{diagnosis.cores} cores"
    yield f"{diagnosis.cpu}, {cores}"
    for precision in ("fp32", "fp16", "bf16", "int8"):
        names = diagnosis.native.get(precision)
        yield f"  {precision.upper():5} {', '.join(names or ('no instructions of its own',))}"
    for found in diagnosis.runtimes:
        yield ""
        yield from _runtime(found)


def _runtime(found: Checkup) -> Iterator[str]:
    version = f"version {found.version}" if found.version else "not found"
    yield f"{found.runtime:19} {version}{f', on {found.device}' if found.device else ''}"
    yield f"  build  {found.build or 'ready'}"
    yield f"  run    {found.run or found.failed or 'ready'}"
    if found.remedy:
        yield f"  hint   {found.remedy}"
    said: dict[str, list[str]] = {}
    for trial in found.trials:
        said.setdefault(_trial(trial), []).append(trial.precision)
    for words, precisions in said.items():
        yield f"    {', '.join(precisions)}: {words}"


def _trial(trial: Trial) -> str:
    if trial.refused:
        return f"refused: {trial.refused}"
    if not trial.asked:
        return "runs"
    count = {0: "no layer runs", trial.asked: "every layer runs"}.get(
        trial.ran, f"{trial.ran} of {trial.asked} layers run"
    )
    return f"{count} in it; {trial.reason}" if trial.reason else f"{count} in it"
