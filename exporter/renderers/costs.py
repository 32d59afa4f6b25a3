"""What networks cost, as text and as JSON: ``resnet-export flops``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from exporter.records import Cost, Counted, LayerCost
from exporter.renderers import _text as text
from exporter.renderers.record import cost_figures

HEADS = (
    *("network", "input", "MACs", "FLOPs", "parameters", "weight bytes", "activation bytes"),
    *("peak bytes", "FLOPs/byte"),
)
LAYER_HEADS = (
    *("layer", "operator", "output", "MACs", "share", "parameters", "weight bytes"),
    *("activation bytes", "alive bytes", "FLOPs/byte"),
)
WORDS = """\
One sample; one multiply-accumulate (MAC) is two FLOPs. Bytes are those of the stored types: of
weights, of what all layers write, and, at the peak, of the activations that exist at once, inputs
and outputs of a layer both. FLOPs/byte: for each byte that a layer reads, be it of weights, or
writes. All is as the graph says: a runtime that fuses layers moves and holds less."""


def render(found: Sequence[Counted]) -> str:
    """Return the totals side by side, then each network layer by layer, the deployed form alone."""
    parts = [
        text.table(HEADS, map(_row, found), left=2),
        "\n".join([*_remarks(found), WORDS]),
    ]
    shown = [one for one in found if one.name + ", folded" not in {other.name for other in found}]
    parts += [f"{one.name}, layer by layer\n\n{layers(one.cost)}" for one in shown]
    return "\n\n".join(parts) + "\n"


def render_json(found: Sequence[Counted]) -> str:
    """Return the same as JSON, sums and ratios written out."""
    table = [{**msgspec.to_builtins(one), "cost": _cost(one.cost)} for one in found]
    return msgspec.json.format(msgspec.json.encode({"networks": table}), indent=2).decode() + "\n"


def layers(cost: Cost) -> str:
    """Return every layer that does, keeps or writes anything."""
    rows = (_layer(layer, cost.macs) for layer in cost.layers if layer.moved_bytes or layer.macs)
    return text.table(LAYER_HEADS, rows, left=2)


def ratio(number: float | None) -> str:
    """Return a ratio with one digit behind its point; nothing where there is none."""
    return "" if number is None else f"{number:.1f}"


def uncounted(cost: Cost) -> str:
    """Return the operators of unknown cost with their numbers; empty where there are none."""
    return ", ".join(f"{number} × {op}" for op, number in cost.uncounted.items())


def _row(one: Counted) -> tuple[str, ...]:
    cost = one.cost
    return (
        one.name,
        text.shape(one.input) if one.input else "its own",
        ("≥ " if cost.uncounted else "") + text.count(cost.macs),
        ("≥ " if cost.uncounted else "") + text.count(cost.flops),
        text.count(cost.parameters),
        text.count(cost.weight_bytes),
        text.count(cost.activation_bytes),
        text.count(cost.peak_bytes),
        ratio(cost.intensity),
    )


def _remarks(found: Sequence[Counted]) -> Iterator[str]:
    for one in found:
        for note in one.notes:
            yield f"{one.name}: {note}"
        if unknown := uncounted(one.cost):
            yield f"{one.name}: cost unknown, and in no figure: {unknown}"
        if one.cost.peak_layer:
            yield f"{one.name}: the peak is at {one.cost.peak_layer}"


def _layer(layer: LayerCost, macs: int) -> tuple[str, ...]:
    return (
        layer.name,
        layer.op,
        text.shape(layer.output_shape),
        text.count(layer.macs),
        f"{layer.macs / macs:.1%}" if macs else "",
        text.count(layer.parameters),
        text.count(layer.weight_bytes),
        text.count(layer.activation_bytes),
        text.count(layer.alive_bytes),
        ratio(layer.intensity),
    )


def _cost(cost: Cost) -> dict[str, object]:
    table: dict[str, object] = msgspec.to_builtins(cost)
    table["layers"] = [
        {**msgspec.to_builtins(layer), "flops": 2 * layer.macs, "intensity": layer.intensity}
        for layer in cost.layers
    ]
    return {**cost_figures(cost), **table}
