"""Options that several commands take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.initial import INITIAL, Initial

if TYPE_CHECKING:
    from exporter.factories import FactoryModel


class Shape(click.ParamType[tuple[int, ...]]):
    """``1x224x224``: channels, height, width."""

    name = "CxHxW"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        parts = str(value).lower().replace("×", "x").split("x")
        if len(parts) != 3 or not all(re.fullmatch("[0-9]+", part) for part in parts):
            self.fail(f"{value!r} is not a shape such as 1x224x224", param, ctx)
        return tuple(map(int, parts))


input_option = click.option(
    "--input", "input_shape", type=Shape(), help="Input shape, say 1x224x224."
)


class Weights(click.ParamType[Path | Initial]):
    """``random`` or ``factory``, or a file; one of such a name is ``./random``."""

    name = "FILE|random|factory"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path | Initial:
        return next((word for word in INITIAL if value == word), Path(value))


weights_option = click.option(
    "-w",
    "--weights",
    type=Weights(),
    help="A safetensors file, or a .pth of a state dict; random: untrained values, from a seed; "
    "factory: those that the factory made. Default: what ships with the network.",
)
classes_option = click.option(
    "--classes", type=click.IntRange(1), help="Outputs, of networks that can have any number."
)
model_option = click.option(
    "-m",
    "--model",
    default="resnet18",
    show_default=True,
    help="A built-in network, or code: package.module:factory, or file.py:factory.",
)


def network_of(
    model: str, args: dict[str, Any], input_shape: tuple[int, ...] | None
) -> str | FactoryModel:
    """Return a built-in network's name as it is, and what a factory makes that was named."""
    from exporter.factories import is_code, load_factory

    return load_factory(model, args, input_shape=input_shape) if is_code(model) else model
