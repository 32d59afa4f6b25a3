"""Options that several commands take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from exporter.errors import InputRefused
from exporter.initial import INITIAL, Initial

if TYPE_CHECKING:
    from exporter.factories import FactoryModel
    from exporter.weights import AskedWeights


InputShape: TypeAlias = tuple[int, ...] | Mapping[str, tuple[int, ...]] | None


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


class NamedShape(Shape):
    """``1x224x224``, or ``mask=1x224x224`` for one of several inputs."""

    name = "[NAME=]CxHxW"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        name, given, shape = str(value).rpartition("=")
        if given and not name:
            self.fail(f"{value!r} has no name in front of its =", param, ctx)
        return name, super().convert(shape, param, ctx)


def _together(ctx: Any, param: Any, given: tuple[Any, ...]) -> InputShape:
    """Return one shape as it is, and several by their names."""
    names = [name for name, _ in given]
    if len(given) == 1 and not names[0]:
        shape: tuple[int, ...] = given[0][1]
        return shape
    if len(set(names)) < len(names) or "" in names:
        raise click.BadParameter("several inputs need a name each, as a=1x8x8", ctx, param)
    return dict(given) or None


inputs_option = click.option(
    "--input",
    "input_shape",
    type=NamedShape(),
    multiple=True,
    callback=_together,
    help="Input shape, say 1x224x224; of several inputs of your own network each, as a=3x64x64, "
    "by the names that its forward() or its ONNX file has for them.",
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
weights_key_option = click.option(
    "--weights-key",
    metavar="KEY",
    help="Which of the weights in that file, where it has them more than once, say ema or "
    "state_dict_ema.",
)
classes_option = click.option(
    "--classes", type=click.IntRange(1), help="Outputs, of networks that can have any number."
)
data_option = click.option(
    "--data",
    metavar="DATA",
    help="Judge on these samples, and calibrate on others of them: digits, a folder of images, "
    "which may lie in folders of their classes, an .npy, .npz or .safetensors file, or code of "
    "yours, as package.module:factory or file.py:factory.",
)
model_option = click.option(
    "-m",
    "--model",
    default="resnet18",
    show_default=True,
    help="A built-in network, or code: package.module:factory, or file.py:factory.",
)


onnx_option = click.option(
    "--onnx",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Start from this ONNX file, in place of --model and --weights.",
)


def start_of(asked: dict[str, Any], args: dict[str, Any]) -> str | FactoryModel | Path:
    """Return what to start from: the path of an ONNX file, or as `network_of`.

    Raises `InputRefused` as that.
    """
    if asked["onnx"] is None:
        return network_of(asked["model"], args, asked["input_shape"])
    source = click.get_current_context().get_parameter_source
    for option in ("model", "weights", "weights-key", "classes"):
        if source(option.replace("-", "_")) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"--onnx is the network and its weights in one: leave out --{option}"
            )
    path: Path = asked["onnx"]
    return path


def weights_of(given: Path | Initial | None, key: str | None) -> AskedWeights | None:
    """Return what ``--weights`` gave, with the key of those in the file that are meant."""
    if key is None:
        return given
    if not isinstance(given, Path):
        raise click.UsageError(
            "--weights-key is of the weights in a file: name that with --weights"
        )
    from exporter.weights import WeightsFile

    return WeightsFile(given, key)


def network_of(model: str, args: dict[str, Any], input_shape: InputShape) -> str | FactoryModel:
    """Return a built-in network's name as it is, and what a factory makes that was named.

    Raises `InputRefused` as `load_factory`, and for inputs by name of a built-in network.
    """
    from exporter.factories import load_factory
    from exporter.given_code import is_code

    if is_code(model):
        return load_factory(model, args, input_shape=input_shape)
    if isinstance(input_shape, Mapping):
        raise InputRefused(
            f"{model} takes one input, and --input names {', '.join(input_shape)}",
            hint="leave out the name, as --input 1x224x224",
        )
    return model


def size_of(input_shape: InputShape) -> tuple[int, ...] | None:
    """Return the shape of an input alone; several are said to the factory."""
    return input_shape if isinstance(input_shape, tuple) else None
