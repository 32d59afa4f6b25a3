"""Options that several commands take."""

from __future__ import annotations

import re
from typing import Any

import click


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
data_option = click.option(
    "--data",
    metavar="DATA",
    help="Judge on these samples, and calibrate on others of them: digits, a folder of images, "
    "which may lie in folders of their classes, an .npy, .npz or .safetensors file, or code of "
    "yours, as package.module:factory or file.py:factory.",
)
