"""What is known of a graph's tensors, for whoever looks for the layer that a node is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, fx, nn

from exporter.emulation import Step
from exporter.emulation.operators import pads_of

Family: TypeAlias = dict[int, Callable[..., nn.Module]]  # a kind of layer, by a tensor's axes
_ZERO_PADS: Family = {3: nn.ZeroPad1d, 4: nn.ZeroPad2d, 5: nn.ZeroPad3d}


class Call(NamedTuple):
    """A function of torch, and its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]


class Padded(NamedTuple):
    """A layer with a padding of its own in front."""

    pad: nn.Module
    layer: nn.Module


Made: TypeAlias = nn.Module | Call | Padded | None


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a graph's tensors: sizes (None: free), constants, and what gives them."""

    sizes: dict[str, list[int | None]]
    constants: dict[str, Tensor]
    values: dict[str, fx.Node] = field(default_factory=dict)
    shared: dict[tuple[str, bool], nn.Parameter] = field(default_factory=dict)

    def reads(self, step: Step) -> list[fx.Node]:
        """Return what a step reads that is no constant, in order."""
        return [self.values[name] for name in step.reads if name in self.values]

    def is_unary(self, step: Step) -> bool:
        """Return whether a step's first input is computed, and all others are constants."""
        return len(self.reads(step)) == 1 and step.reads[0] in self.values

    def rank(self, step: Step) -> int:
        """Return how many axes a step's first input has, 0 where that is not known."""
        return len(self.sizes.get(step.reads[0], ()))

    def constant(self, step: Step, place: int) -> Tensor | None:
        """Return a step's constant input, None where it is left out."""
        name = step.reads[place] if len(step.reads) > place else ""
        return self.constants[name] if name else None

    def parameter(self, step: Step, place: int, *, turned: bool = False) -> nn.Parameter | None:
        """Return a constant as a parameter: the same one for all that read it."""
        value = self.constant(step, place)
        if value is None:
            return None
        key = (step.reads[place], turned)
        if key not in self.shared:
            held = value.T.contiguous() if turned else value
            self.shared[key] = nn.Parameter(held, requires_grad=False)
        return self.shared[key]

    def padding(self, step: Step, kernel: Sequence[int]) -> list[int] | None:
        """Return a step's padding, begins and then ends, None where it follows from the input."""
        sizes = self.sizes.get(step.reads[0], [])[2:]
        known = [size for size in sizes if size is not None]
        if len(known) != len(kernel):
            return None
        strides, dilations = (spatial(step, key, kernel) for key in ("strides", "dilations"))
        return pads_of(step.attributes, known, kernel, strides, dilations)


def spatial(step: Step, key: str, kernel: Sequence[int]) -> list[int]:
    """Return an attribute of a window, which is 1 along each axis unless said."""
    return list(step.attributes.get(key, [1] * len(kernel)))


# ── Layers ──────────────────────────────────────────────────────────────────────────


def zero_pad(begins: Sequence[int], ends: Sequence[int]) -> nn.Module:
    """Return a padding with zeros, by how many in front and behind along each axis."""
    sides = [n for side in zip(reversed(begins), reversed(ends), strict=True) for n in side]
    return _ZERO_PADS[len(begins) + 2](tuple(sides))
