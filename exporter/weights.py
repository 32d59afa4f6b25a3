"""Weights from a safetensors file into a network, or a refusal that names what does not fit.

Half-precision storage is fine: every float16 and bfloat16 value is a float32 value, so loading is
exact. float64 is refused, since rounding it would change the network that was asked for.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import InputRefused

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

_SHOWN = 5
_FLOATS = (("F32", "F16", "BF16"), "float32, float16 or bfloat16")
_INTEGERS = (("I64", "I32", "I16", "I8", "U8"), "int64")


def load_weights(module: nn.Module, path: Path) -> str:
    """Load ``path`` into ``module``, strictly, and return the file's SHA-256.

    Raises `InputRefused` for a file that is missing, truncated or not safetensors, whose keys,
    shapes or types are not the network's, or that holds NaN or infinite values.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not path.exists():
        raise InputRefused(f"{path}: no such weights file")
    if not path.is_file():
        raise InputRefused(f"{path}: not a file, so it holds no weights")
    try:
        with safe_open(path, framework="pt") as header:
            types = {key: header.get_slice(key).get_dtype() for key in header.keys()}  # noqa: SIM118 - not a dict
        loaded = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputRefused(
            f"{path.name}: truncated, damaged or not a safetensors file",
            hint="write it with safetensors.torch.save_file(model.state_dict(), path)",
        ) from error
    _check_keys(module.state_dict(), loaded, path.name)
    for key, wanted in module.state_dict().items():
        kinds, words = _FLOATS if wanted.is_floating_point() else _INTEGERS
        if types[key] not in kinds:
            kind = str(wanted.dtype).removeprefix("torch.")
            raise InputRefused(
                f"{path.name}: tensor {key!r} is {types[key]}, which does not fit {kind} exactly",
                hint=f"save it as {words}",
            )
    for key, value in loaded.items():
        if value.is_floating_point() and (bad := int((~torch.isfinite(value)).sum())):
            raise InputRefused(
                f"{path.name}: tensor {key!r} holds {bad} values that are NaN or infinite"
            )
    module.load_state_dict(loaded, strict=True)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_keys(
    wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], name: str
) -> None:
    missing = [key for key in wanted if key not in found]
    extra = [key for key in found if key not in wanted]
    if missing or extra:
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"has unknown {_some(extra)}"] if extra else []
        raise InputRefused(f"{name}: not this network's weights: it {' and '.join(parts)}")
    shapes = [
        f"{key} is {tuple(found[key].shape)}, needs {tuple(wanted[key].shape)}"
        for key in wanted
        if found[key].shape != wanted[key].shape
    ]
    if shapes:
        raise InputRefused(
            f"{name}: not this network's weights: {'; '.join(shapes[:_SHOWN])}{_more(shapes)}"
        )


def _some(keys: list[str]) -> str:
    return ", ".join(map(repr, keys[:_SHOWN])) + _more(keys)


def _more(items: list[str]) -> str:
    return f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
