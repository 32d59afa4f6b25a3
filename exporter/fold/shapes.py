"""What one run of a network tells: shapes, numbers, and where rearranged values come from.

Whether views, transposes and chunks keep channels whole is not read off their arguments. They are
run on labels, ``labels[n, i, …] = i``: what they make of them says, for every value, which channel
it comes from, however the chain is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from exporter.fold.same import Example

SAMPLES = 3  # of the run that notes shapes: one would hide that samples are mixed, two may too


def enlarged(example: torch.Tensor, samples: int, seed: int = 0) -> torch.Tensor:
    """Return the first sample of ``example`` and seeded noise of its scale, ``samples`` in all."""
    first = example[:1]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((samples - 1, *first.shape[1:]), generator=generator, dtype=torch.float64)
    spread = float(first.double().std()) if first.numel() > 1 else 0.0
    added = noise * (spread or 1.0) + float(first.double().mean())
    return torch.cat([first, added.to(first)])


def on_example(run: Callable[..., Any], example: Example, samples: int) -> Any:
    """Return what ``run`` gives for so many samples, or for the example where they are refused.

    It is a copy that is run, since networks may change in place what they are given.
    """
    if all(one.ndim > 1 and one.numel() for one in example):
        try:
            return run(*(enlarged(one, samples, seed) for seed, one in enumerate(example)))
        except Exception:  # noqa: S110 - forward() may raise anything: it has the next word
            pass
    return run(*(one.detach().clone() for one in example))


def note_shapes(traced: fx.GraphModule, example: Example) -> None:
    """Run the network and note the shape of every tensor and the value of all that is none."""

    class Notes(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            found = super().run_node(node)
            for key in ("shape", "parts", "value"):
                node.meta.pop(key, None)
            if isinstance(found, torch.Tensor):
                node.meta["shape"] = tuple(found.shape)
            elif isinstance(found, tuple | list) and any(map(torch.is_tensor, found)):
                node.meta["parts"] = len(found)
            else:
                node.meta["value"] = found
            return found

    with torch.inference_mode():
        on_example(Notes(traced).run, example, SAMPLES)


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return a node's shape, if an example was run and the node gives one tensor."""
    found: tuple[int, ...] | None = node.meta.get("shape")
    return found


def label_channels(shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor of the shape in which every value is the number of its channel."""
    channels = torch.arange(shape[1], dtype=torch.float64)
    return channels.view(1, -1, *[1] * (len(shape) - 2)).expand(shape).clone()


def rearranged(module: Any, node: fx.Node, source: fx.Node, values: Any) -> Any:
    """Return what a node makes of ``values`` in place of what it reads from ``source``.

    Raises whatever the rearrangement does, and `KeyError` for an argument that is not known.
    """

    def known(argument: fx.Node) -> Any:
        return values if argument is source else argument.meta["value"]

    args: Any = fx.node.map_arg(node.args, known)
    kwargs: Any = fx.node.map_arg(node.kwargs, known)
    if node.op == "call_module":
        return module(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def origins(labels: torch.Tensor) -> list[int] | None:
    """Return, per channel, the one channel that all its values come from; None if there are more.

    A channel is what lies along the second axis.
    """
    if labels.ndim < 2 or not labels.numel():
        return None
    rows = labels.transpose(0, 1).flatten(1)
    return rows[:, 0].long().tolist() if bool((rows == rows[:, :1]).all()) else None


def destinations(labels: torch.Tensor) -> dict[int, int] | None:
    """Return, per channel of origin, the one channel it becomes; None if it becomes several."""
    if labels.ndim < 2 or not labels.numel():
        return None
    rows = labels.transpose(0, 1).flatten(1)
    found: dict[int, int] = {}
    for channel, row in enumerate(rows):
        for origin in row.unique().long().tolist():
            if found.setdefault(origin, channel) != channel:
                return None
    return found
