"""Free height and width: whose they are, at which sizes they are checked, what depends on them.

A network is run once at each of those sizes before anything is exported, on zeros. What it gives
says which axes of its outputs are free; a network that fixes the size fails here, by the name of
the layer. So does a pool into a number of windows above one: PyTorch lets these differ in size, as
no operator of ONNX does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from exporter.errors import InputRefused
from exporter.outputs import flatten
from exporter.packing import in_words, pack, unpack
from exporter.records import SIDES, Array, FreeAxis, SizeRange, TensorSpec


class Size(NamedTuple):
    """The height and the width of an input."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height} × {self.width}"


def free_sides(
    inputs: tuple[TensorSpec, ...], size: SizeRange, *, channels_last: bool = False
) -> tuple[TensorSpec, ...]:
    """Return the inputs with the sides of the range free: those of pictures, which all share it.

    An input of another number of axes than (C, H, W) stays as it is. Raises `InputRefused` where no
    input is a picture, pictures are of several sizes, or theirs is not within the range.
    """
    if size.min is None or size.max is None:
        return inputs
    first = 0 if channels_last else 1
    pictures = [spec for spec in inputs if len(spec.shape) == 3]
    found = {spec.shape[first : first + 2] for spec in pictures}
    if len(found) != 1:
        said = ", ".join(f"{one.name!r} {in_words([one.shape])}" for one in inputs)
        raise InputRefused(
            f"size is of one height and width that all pictures share, and the inputs are {said}",
            hint="leave out [size]",
        )
    (sides,) = found
    for name, side, low, high in zip(SIDES, sides, size.min, size.max, strict=True):
        if not low <= side <= high or side % size.multiple:
            raise InputRefused(
                f"the input's {name} of {side} is none of size, {size}",
                hint="engines are tuned for the input's own size, which --input says",
            )
    axes = tuple(
        FreeAxis(first + i, name, low, high, size.multiple)
        for i, (name, low, high) in enumerate(zip(SIDES, size.min, size.max, strict=True))
        if low < high
    )
    return tuple(
        msgspec.structs.replace(spec, free=axes) if len(spec.shape) == 3 else spec
        for spec in inputs
    )


def checked_sizes(size: SizeRange, optimum: Size) -> tuple[Size, ...]:
    """Return where everything is checked beside the optimum: smallest, one between, largest.

    The one between has a third of the range in its height and two thirds in its width, so that it
    is no square where both have the same range; sides are odd where they can be.
    """
    if size.min is None or size.max is None:
        return ()
    between = (
        _between(low, high, size.multiple, third)
        for low, high, third in zip(size.min, size.max, (1, 2), strict=True)
    )
    every = (Size(*size.min), Size(*between), Size(*size.max))
    return tuple(one for one in dict.fromkeys(every) if one != optimum)


def _between(low: int, high: int, multiple: int, thirds: int) -> int:
    side = low + (high - low) * thirds // 3 // multiple * multiple
    if side % 2 == 0 and multiple % 2 and side + multiple < high:
        side += multiple
    return side


def size_of(inputs: Sequence[TensorSpec]) -> Size:
    """Return the height and width that the free inputs have now."""
    return Size(*next(spec.sides for spec in inputs if spec.sides))


def at_size(inputs: Sequence[TensorSpec], size: Size) -> tuple[TensorSpec, ...]:
    """Return the inputs of one size, nothing of which is free."""
    return tuple(_at(spec, size) for spec in inputs)


def _at(spec: TensorSpec, size: Size) -> TensorSpec:
    first, shape = spec.first_side, spec.shape
    if first is None:
        return spec
    sized = (*shape[:first], *size, *shape[first + 2 :])
    return msgspec.structs.replace(spec, shape=sized, free=())


def resized(rows: Array, inputs: Sequence[TensorSpec], size: Size) -> Array:
    """Return samples in another size: bilinear, with what is finer smoothed away.

    Pixels (uint8) are rounded.
    """
    found = unpack(rows, inputs)
    for spec in inputs:
        if spec.first_side is not None:
            found[spec.name] = _resized(found[spec.name], size, channels_last=spec.first_side == 0)
    return pack(list(found.values()))


def _resized(values: Array, size: Size, *, channels_last: bool) -> Array:
    given = torch.from_numpy(values)
    pictures = (given.permute(0, 3, 1, 2) if channels_last else given).float()
    found = nn.functional.interpolate(pictures, size, mode="bilinear", antialias=True)
    if given.dtype == torch.uint8:
        found = found.round().clamp(0, 255).to(torch.uint8)
    return (found.permute(0, 2, 3, 1) if channels_last else found).contiguous().numpy()


# ── What the network makes of them ──────────────────────────────────────────────────


def free_outputs(
    network: nn.Module,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    size: SizeRange,
    *,
    name: str,
) -> tuple[TensorSpec, ...]:
    """Return the outputs with the axes free that depend on the size of the inputs.

    An axis that is as high or wide as the input is called so, and another by its output and its
    place, counted with the batch axis. Raises `InputRefused`, by the layer where that is known, for
    a network that does not take every size, or gives another number of axes or values of none.
    """
    optimum = size_of(inputs)
    sizes = (optimum, *checked_sizes(size, optimum))
    shapes = [_shapes_at(network, inputs, one, size, name=name) for one in sizes]
    found = []
    for at, spec in enumerate(outputs):
        own = [shape[at] for shape in shapes]
        if len({len(shape) for shape in own}) > 1 or not all(map(min, filter(None, own))):
            said = " and ".join(f"{shape} at {one}" for shape, one in zip(own, sizes, strict=True))
            raise InputRefused(f"{name} gives {spec.name!r} of {said}", hint="leave out [size]")
        free = [
            FreeAxis(axis, _axis_name(spec, axis, lengths, sizes), min(lengths), max(lengths))
            for axis, lengths in enumerate(zip(*own, strict=True))
            if len(set(lengths)) > 1
        ]
        found.append(msgspec.structs.replace(spec, free=tuple(free)))
    return tuple(found)


def _axis_name(spec: TensorSpec, axis: int, lengths: Sequence[int], sizes: Sequence[Size]) -> str:
    for name, sides in zip(SIDES, zip(*sizes, strict=True), strict=True):
        if tuple(lengths) == sides:
            return name
    return f"{spec.name}_{axis + 1}"


def _shapes_at(
    network: nn.Module, inputs: Sequence[TensorSpec], size: Size, asked: SizeRange, *, name: str
) -> list[tuple[int, ...]]:
    """Return the shapes of a network's outputs for inputs of one size, without the batch axis."""
    given = [
        torch.zeros(1, *spec.shape, dtype=getattr(torch, spec.dtype))
        for spec in at_size(inputs, size)
    ]
    running: list[str] = []
    try:
        with torch.inference_mode(), _told(network, running), _Pools(running):
            found = network(*given)
    except _Windows as error:
        raise InputRefused(
            f"{name} cannot take every size of {asked}: {error}, which are of one size each only "
            "where that divides",
            hint="pool into 1 × 1, or leave out [size]",
        ) from error
    except Exception as error:  # of the network's own forward()
        where = f"{_layer(network, running)}: " if running else ""
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputRefused(
            f"{name} cannot take an input of {size}, and size is {asked}: {where}{reason}",
            hint="a layer behind flatten() fixes the size, where none pools globally before it; "
            "networks with skips take multiples of a size, as size.multiple says",
        ) from error
    return [tuple(value.shape[1:]) for value in flatten(found).values()]


@contextmanager
def _told(network: nn.Module, running: list[str]) -> Iterator[None]:
    """Let ``running`` be the names of the layers that run, the innermost last."""

    def enter(name: str) -> Any:
        return lambda *_: running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    hooks = []
    for name, layer in network.named_modules():
        if name:
            hooks.append(layer.register_forward_pre_hook(enter(name)))
            hooks.append(layer.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layer(network: nn.Module, running: Sequence[str]) -> str:
    layer = network.get_submodule(running[-1])
    return f"its layer {running[-1]!r} ({type(layer).__name__})"


class _Windows(Exception):
    """What pools into windows of several sizes; never leaves this file."""


class _Pools(TorchFunctionMode):
    """Stops at an adaptive pool into more than one window a side."""

    def __init__(self, running: Sequence[str]) -> None:
        super().__init__()
        self.running = running

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.startswith("adaptive_") and "pool" in name:
            windows = given.get("output_size", args[1] if len(args) > 1 else 1)
            each = windows if isinstance(windows, tuple | list) else (windows,)
            if any(count not in (1, None) for count in each):
                where = f"its layer {self.running[-1]!r}" if self.running else "its forward()"
                said = " × ".join(map(str, each if len(each) > 1 else each * 2))
                raise _Windows(f"{where} pools into {said} windows ({name})")
        return func(*args, **given)
