"""Does a runtime compute the network on this GPU? Judged on the digits, against float64."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from exporter.contracts import Runtime
from gpu.candidates import OUTPUT, PRECISIONS, candidates, graph
from gpu.steps import Here, Skip


def step(runtime: str) -> str:
    """Return the name of the step that judges a runtime."""
    return f"parity on {runtime}"


def unfit(row: dict[str, Any]) -> str | None:
    """Return why a row's artefact is not to be timed, or None if it is."""
    if "refused" in row:
        return row["refused"] or "it was not reached"
    return f"it failed: {row['missed'][0]}" if row["verdict"] == "fail" else None


def judge(here: Here) -> list[dict[str, Any]]:
    """Return one row for each precision: a verdict and its figures, or why there are none."""
    import msgspec

    from exporter.errors import ExportError, with_hint

    assert here.argument is not None  # the runtime
    rows: list[dict[str, Any]] = []
    for candidate in candidates(here.argument):
        for action in ("build", "run"):
            if reason := candidate.tries[0].missing(action):
                raise Skip(reason)
        row: dict[str, Any] = {"precision": candidate.precision}
        refusals: list[str] = []
        for number, runtime in enumerate(candidate.tries):
            try:
                row |= {"try": number, **_judged(here, candidate.precision, runtime)}
                row["notes"] += [f"with other options it was refused: {why}" for why in refusals]
                break
            except ExportError as error:
                refusals.append(with_hint(error))
        else:
            row["refused"] = refusals[-1]
        rows.append(msgspec.to_builtins(row))
        here.keep(rows, failed=_failure(rows))
    return rows


def _judged(here: Here, precision: str, runtime: Runtime) -> dict[str, Any]:
    import numpy as np

    import exporter
    from exporter.samples import feeds, load_split

    model = graph(here.folder, precision, here.settings["pixels"])
    held_out = load_split("digits", model.input.shape, "held-out")
    with ExitStack() as stack:
        path = runtime.build(model, here.folder)
        session = stack.enter_context(runtime.open(path))
        got = exporter.collect_outputs(
            session,
            feeds(held_out.inputs, model.input.name, size=model.batch.opt),
            OUTPUT.name,
            samples=len(held_out.inputs),
        )
    parity = exporter.compare_outputs(
        np.load(here.folder / "truth.npy"),
        got,
        inputs=held_out.origin,
        tolerance=exporter.load_profile("default").precision[precision].tolerance,
        labels=held_out.labels,
    )
    return {
        "file": path.name,
        "verdict": parity.verdict,
        "sqnr_db": parity.sqnr_db,
        "agreeing": parity.agreeing,
        "samples": parity.samples,
        "agreement_proven": parity.agreement_proven,
        "accuracy": parity.accuracy,
        "missed": [*parity.failures, *parity.unproven],
        "executed": _executed(runtime, model, path),
        "notes": list(runtime.describe(path)),
    }


def _executed(runtime: Runtime, model: Any, path: Any) -> str | None:
    """Return how many layers ran as their graph asks, in words; None where it asks nothing."""
    from exporter.errors import ExportError

    try:
        execution = runtime.executed(model, path)
    except ExportError as error:
        return f"not told: {error}"
    if execution is None:
        return None
    if execution.unknown:
        return f"not told: {execution.unknown}"
    counts = execution.counts.items()
    return ", ".join(f"{ran} of {total} layers in {kind.upper()}" for kind, (ran, total) in counts)


def _failure(rows: list[dict[str, Any]]) -> str | None:
    """Return what is wrong: a verdict that is a failure, or nothing that could be judged."""
    for row in rows:
        if row.get("verdict") == "fail":
            return f"{row['precision']}: {row['missed'][0]}"
    if len(rows) == len(PRECISIONS) and all("refused" in row for row in rows):
        return f"{rows[0]['precision']}: {rows[0]['refused']}"
    return None
