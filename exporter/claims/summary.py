"""A network's layer table, as torchsummary 1.5.1 prints it, whose figures it also has.

That counts a row for each module that runs, containers of nothing but layers left out, and the
weights and biases of each; running statistics are none. "Forward/backward" is all outputs twice,
and a MB is 1024² bytes. An Identity, which computes nothing, has no row.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn

_LINE, _DOUBLE = "-" * 64, "=" * 64
_MB = 1024**2


class Row(NamedTuple):
    """One module that ran."""

    kind: str
    output: tuple[int, ...]
    parameters: int
    trainable: int


def rows(module: nn.Module, shape: tuple[int, ...]) -> list[Row]:
    """Return the modules as they run on an input of ``shape``, without its batch axis."""
    import torch
    from torch import nn

    found: list[Row] = []

    def note(part: nn.Module, _: object, output: torch.Tensor) -> None:
        own = [getattr(part, name, None) for name in ("weight", "bias")]
        sizes = [(one.numel(), one.requires_grad) for one in own if isinstance(one, torch.Tensor)]
        found.append(
            Row(
                type(part).__name__,
                tuple(output.shape[1:]),
                sum(size for size, _ in sizes),
                sum(size for size, trains in sizes if trains),
            )
        )

    skipped = (nn.Sequential, nn.ModuleList, nn.Identity)
    hooks = [
        part.register_forward_hook(note)
        for part in module.modules()
        if part is not module and not isinstance(part, skipped)
    ]
    with torch.no_grad():
        module(torch.zeros(2, *shape))
    for hook in hooks:
        hook.remove()
    return found


def summarise(module: nn.Module, shape: tuple[int, ...]) -> str:
    """Return the table for a network of float32 weights, with torchsummary's own sums below."""
    found = rows(module, shape)
    lines = [_LINE, f"{'Layer (type)':>20}  {'Output Shape':>25} {'Param #':>15}", _DOUBLE]
    for number, row in enumerate(found, 1):
        name, sizes = f"{row.kind}-{number}", str([-1, *row.output])
        lines.append(f"{name:>20}  {sizes:>25} {row.parameters:>15,}")
    total, trainable = sum(r.parameters for r in found), sum(r.trainable for r in found)
    given = prod(shape) * 4 / _MB
    passed = 2 * sum(prod(row.output) for row in found) * 4 / _MB
    kept = total * 4 / _MB
    lines += [
        _DOUBLE,
        f"Total params: {total:,}",
        f"Trainable params: {trainable:,}",
        f"Non-trainable params: {total - trainable:,}",
        _LINE,
        f"Input size (MB): {given:0.2f}",
        f"Forward/backward pass size (MB): {passed:0.2f}",
        f"Params size (MB): {kept:0.2f}",
        f"Estimated Total Size (MB): {given + passed + kept:0.2f}",
        _LINE,
    ]
    return "\n".join(lines) + "\n"
