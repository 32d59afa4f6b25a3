"""A document's claims beside what was measured, as text and as JSON: ``resnet-export claims``."""

from __future__ import annotations

from itertools import zip_longest

import msgspec

from exporter.records import Claims, Gradients
from exporter.renderers import _text as text

HEADS = ("claim", "measured", "verdict")
_WIDTHS = (40, 78, 13)


def render(found: Claims) -> str:
    """Return the claims, the gradients by depth, and the network's layer table."""
    rows = ((claim.says, claim.measured, claim.verdict) for claim in found.claims)
    parts = (
        text.wrapped(HEADS, rows, _WIDTHS),
        "Norm of the gradient at the output of each weighted layer, at initialisation, by depth",
        _gradients(found.gradients),
        "The document's network, as torchsummary prints it",
        found.summary,
    )
    return "\n\n".join(parts)


def render_json(found: Claims) -> str:
    """Return the record as JSON, with each network's ratio of gradients written out."""
    table = msgspec.to_builtins(found)
    for one, entry in zip(found.gradients, table["gradients"], strict=True):
        entry["first_to_last"] = one.first_to_last
    return msgspec.json.format(msgspec.json.encode(table), indent=2).decode() + "\n"


def _gradients(networks: tuple[Gradients, ...]) -> str:
    columns = [[f"{norm:.1e}" for norm in one.norms] for one in networks]
    rows = [(str(depth), *row) for depth, row in enumerate(zip_longest(*columns, fillvalue=""), 1)]
    heads = ("layer", *(f"({number})" for number in range(1, len(networks) + 1)))
    last = ("first/last", *(f"{one.first_to_last:.1e}" for one in networks))
    names = [f"({number}) {one.network}" for number, one in enumerate(networks, 1)]
    return text.table(heads, [*rows, last]) + "\n\n" + "\n".join(names)
