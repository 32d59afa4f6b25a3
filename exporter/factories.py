"""A network of one's own, as a `Model`: ``package.module:factory``, or ``net.py:factory``.

The words come from a command line, or from a program that calls `load_factory`; nothing that was
read from a file is ever given to it. The factory is called once, with keyword arguments, and its
network runs once on zeros: what it gives says how many outputs there are. One that a program gives
as a module (`exporter.live`) is a `Model` beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from exporter.errors import InputRefused, ProfileError, nearest
from exporter.given_code import Words, refusing
from exporter.initial import from_seed
from exporter.records import TensorSpec
from exporter.samples import fitting

if TYPE_CHECKING:
    from torch import nn

_BATCH = 2
_HINT = "--input says what it takes; networks of several inputs are not supported so far"


@dataclass(frozen=True, slots=True)
class FactoryModel:
    """What a factory made; ``code`` says which and with what, and names no folder."""

    name: str
    code: str
    args: Mapping[str, Any]
    input: TensorSpec
    output: TensorSpec
    data: str
    network: nn.Module = field(repr=False)
    weights: None = None

    def module(self) -> nn.Module:
        return deepcopy(self.network)


@dataclass(frozen=True, slots=True)
class GivenModel:
    """What a program gave, copied; ``kind`` is its class, ``changes`` what the copy has otherwise.

    ``name`` is the network's in the report and in the names of its files.
    """

    name: str
    kind: str
    input: TensorSpec
    output: TensorSpec
    data: str
    changes: tuple[str, ...]
    network: nn.Module = field(repr=False)
    weights: None = None

    def module(self) -> nn.Module:
        return deepcopy(self.network)


def load_factory(
    code: str,
    args: Mapping[str, Any] = MappingProxyType({}),
    *,
    input_shape: tuple[int, ...] | None,
) -> FactoryModel:
    """Import ``package.module:factory`` or ``file.py:factory``, and return what it makes.

    ``args`` are the factory's keyword arguments, ``input_shape`` is (C, H, W).

    Raises `UnknownName` if there is no such factory, `ProfileError` for an argument that it does
    not take or lacks, and `InputRefused` for all else: code that raises, what is no network, and
    one that does not make one float32 tensor (N, classes) of (N, *input_shape).
    """
    words = Words.of(code)
    if input_shape is None:
        raise InputRefused(
            f"{code} does not say what its network takes", hint="say it, as --input 3x224x224"
        )
    said, attribute = words.said, words.attribute
    factory = from_seed(words.load)
    _check_factory(factory, said, attribute)
    _check_args(factory, args, said)
    with refusing(f"{said} raised"):
        network = from_seed(lambda: factory(**args))
    _check_network(network, said)
    spec = TensorSpec("input", input_shape)
    given = ", ".join(f"{key}={value!r}" for key, value in args.items())
    return FactoryModel(
        name=attribute.rpartition(".")[2],
        code=f"{said}({given})",
        args=dict(args),
        input=spec,
        output=TensorSpec("output", outputs_of(network.eval(), spec, said, hint=_HINT)),
        data=fitting(input_shape[0]),
        network=network,
    )


def outputs_of(
    network: nn.Module, spec: TensorSpec, said: str, *, hint: str | None = None
) -> tuple[int, ...]:
    """Return the shape of what a network in eval mode gives for an input, without the batch axis.

    It runs once, on zeros. Raises `InputRefused` where it raises anything, with that hint, or gives
    what `check_output` refuses.
    """
    import torch

    shape = " × ".join(map(str, spec.shape))
    if min(spec.shape) < 1:
        raise InputRefused(f"{said} cannot take an input of {shape}: every size must be 1 or more")
    with refusing(f"{said} cannot take one input of {shape}:", hint=hint), torch.inference_mode():
        found = network(torch.zeros(_BATCH, *spec.shape))
    return check_output(found, name=said, batch=_BATCH)


def check_output(found: object, *, name: str, batch: int) -> tuple[int, ...]:
    """Return the shape of what a network gives, without the batch axis.

    Raises `InputRefused` unless that is one float32 tensor, (batch, classes).
    """
    import torch

    if isinstance(found, Mapping):
        keys = ", ".join(map(repr, found))
        what = f"{len(found)} outputs ({type(found).__name__}: {keys})"
    elif isinstance(found, list | tuple):
        what = f"{len(found)} outputs ({type(found).__name__})"
    elif not isinstance(found, torch.Tensor):
        what = f"an object of type {type(found).__name__}"
    elif found.dtype != torch.float32:
        what = f"a tensor of {str(found.dtype).removeprefix('torch.')}"
    elif found.ndim != 2 or found.shape[0] != batch or not found.numel():
        what = f"a tensor of {' × '.join(map(str, found.shape))} for a batch of {batch}"
    else:
        return tuple(found.shape[1:])
    raise InputRefused(
        f"{name} gives {what}; only networks that give one float32 tensor, (N, classes), can be "
        "judged so far",
        hint="export a module of your own that calls it and returns one such tensor",
    )


# ── Its arguments ───────────────────────────────────────────────────────────────────


def _check_factory(found: object, said: str, attribute: str) -> None:
    from torch import nn

    if isinstance(found, nn.Module):
        raise InputRefused(
            f"{said} is a network, where a factory is needed that makes one",
            hint=f"write a function that returns it, and name that in place of {attribute}",
        )
    if not callable(found):
        raise InputRefused(f"{said} is an object of type {type(found).__name__}, and no factory")


def _check_args(factory: Any, args: Mapping[str, Any], said: str) -> None:
    """Raise `ProfileError` for an argument that a factory has not, or does not get."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some that are written in C have none
        return
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = [p.name for p in parameters if p.kind in named]
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    for key in () if free else args:
        if key not in taken:
            raise ProfileError(f"{said}: model.args: unknown key {key!r}", hint=nearest(key, taken))
    for parameter in parameters:
        needed = parameter.default is inspect.Parameter.empty and parameter.kind in named
        if needed and parameter.name not in args:
            raise ProfileError(
                f"{said}: model.args: the key {parameter.name!r} is missing",
                hint=f"say --set model.args.{parameter.name}=…, or [model.args] in a profile",
            )


# ── Its network ─────────────────────────────────────────────────────────────────────


def _check_network(network: object, said: str) -> None:
    """Raise `InputRefused` unless it is a module of float32 numbers on the CPU."""
    import torch
    from torch import nn

    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise InputRefused(f"{said} gives an object of type {kind}, and no torch.nn.Module")
    for key, tensor in network.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise InputRefused(f"{said}: {key!r} of its state dict is no tensor")
        if tensor.device.type != "cpu":
            raise InputRefused(f"{said}: tensor {key!r} is on {tensor.device}, not on the CPU")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputRefused(
                f"{said}: tensor {key!r} is {kind}, and the reference computes in float32",
                hint="return network.float()",
            )
