"""The report as JSON: the record itself, and beside it the figures that follow from it.

Reading ignores those, so that a figure has one source: `parse(render(report)) == report`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from exporter.errors import InputRefused
from exporter.records import (
    SCHEMA,
    Artefact,
    Cost,
    Execution,
    Fidelity,
    Found,
    Parity,
    Report,
    Rung,
    SizeCheck,
)
from exporter.renderers import _latency


def render(report: Report) -> str:
    """Return the report as JSON, with verdicts, shares, percentiles and totals written out."""
    table = msgspec.to_builtins(report)
    table = {"schema": table.pop("schema"), "verdict": report.verdict, **table}
    table["failures"] = list(report.failures)
    table["seconds"] = report.seconds
    table["seconds_by_part"] = report.seconds_by_part
    table["unproven"] = list(report.unproven)
    table["comparisons"] = [{**c._asdict(), "speed": c.speed} for c in report.comparisons]
    recommended = report.recommendation
    table["recommendation"] = recommended._asdict() if recommended else None
    for parity, entry in zip(report.pytorch, table["pytorch"], strict=True):
        entry |= _parity(parity)
    for variant, entry in zip(report.variants, table["variants"], strict=True):
        if variant.cost:
            entry["cost"] |= cost_figures(variant.cost)
        for artefact, part in zip(variant.artefacts, entry["artefacts"], strict=True):
            part |= _artefact(artefact, part)
    for rung, entry in zip(report.rungs, table["rungs"], strict=True):
        _rung(rung, entry)
    for size, entry in zip(report.sizes, table["sizes"], strict=True):
        entry["failures"] = list(size.failures)
    for latency, entry in zip(report.latency, table["latency"], strict=True):
        entry |= _latency.to_builtins(latency)
    if report.calibrated:
        table["calibrated"]["settled"] = report.calibrated.settled
    return msgspec.json.format(msgspec.json.encode(table), indent=2).decode() + "\n"


def parse(text: str | bytes) -> Report:
    """Return the report that `render` wrote. Raises `InputRefused` for anything else."""
    try:
        found = msgspec.json.decode(text, type=_Schema).schema
        if found != SCHEMA:
            raise InputRefused(f"a report of schema {found}, where {SCHEMA} can be read")
        return msgspec.json.decode(text, type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputRefused(f"not a report of this tool: {error}") from error


class _Schema(Found, frozen=True):
    """What says how to read the rest."""

    schema: int


def _artefact(artefact: Artefact, part: dict[str, Any]) -> dict[str, Any]:
    for parity, entry in zip(artefact.parity, part["parity"], strict=True):
        entry |= _parity(parity)
    if artefact.rung:
        _rung(artefact.rung, part["rung"])
    if artefact.execution:
        part["execution"] |= _execution(artefact.execution)
    for size, entry in zip(artefact.sizes, part["sizes"], strict=True):
        _size(size, entry)
    return {
        "name": artefact.name,
        "verdict": artefact.verdict,
        "fidelity": artefact.fidelity,
        "quality": artefact.quality,
        "failures": list(artefact.failures),
        "unproven": list(artefact.unproven),
    }


def _execution(execution: Execution) -> dict[str, Any]:
    return {
        "hint": execution.hint,
        "counts": execution.counts,
        "missed": [layer.layer for layer in execution.missed],
        "untold": [layer.layer for layer in execution.untold],
    }


def _parity(parity: Parity) -> dict[str, Any]:
    return {
        "verdict": parity.verdict,
        "sqnr_db": parity.sqnr_db,  # infinite where exact, which JSON has as null
        "noise_multiple": parity.noise_multiple,
        "agreement": parity.agreement,
        "agreement_proven": parity.agreement_proven,
        "agreement_possible": parity.agreement_possible,
        "accuracy": parity.accuracy,
        "reference_accuracy": parity.reference_accuracy,
        "accuracy_drop": parity.accuracy_drop,
        "accuracy_drop_bounds": parity.accuracy_drop_bounds,
    }


def _rung(rung: Rung, entry: dict[str, Any]) -> None:
    if rung.fidelity:
        entry["fidelity"] |= _fidelity(rung.fidelity)


def _fidelity(fidelity: Fidelity) -> dict[str, Any]:
    return {
        "verdict": fidelity.verdict,
        "multiple": fidelity.multiple,
        "failures": list(fidelity.failures),
    }


def _size(size: SizeCheck, entry: dict[str, Any]) -> None:
    for parity, part in zip(size.parity, entry["parity"], strict=True):
        part |= _parity(parity)
    if size.fidelity:
        entry["fidelity"] |= _fidelity(size.fidelity)
    entry |= {
        "faithful": size.faithful,
        "quality": size.quality,
        "failures": list(size.failures),
    }


def cost_figures(cost: Cost) -> dict[str, Any]:
    """Return what follows from a cost's layers."""
    return {
        "macs": cost.macs,
        "flops": cost.flops,
        "parameters": cost.parameters,
        "weight_bytes": cost.weight_bytes,
        "activation_bytes": cost.activation_bytes,
        "moved_bytes": cost.moved_bytes,
        "intensity": cost.intensity,
        "peak_bytes": cost.peak_bytes,
        "peak_layer": cost.peak_layer,
    }
