"""A network of one's own, as a `Model`: ``package.module:factory``, or ``net.py:factory``.

The words come from a command line, or from a program that calls `load_factory`; nothing that was
read from a file is ever given to it. The factory is called once, with keyword arguments, and its
network runs once on zeros: what it gives says which outputs there are, and of which shapes. One
that a program gives as a module (`exporter.live`) is a `Model` beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from exporter.errors import InputRefused, ProfileError, nearest
from exporter.given_code import Words, refusing
from exporter.initial import from_seed
from exporter.outputs import check_outputs
from exporter.packing import in_words
from exporter.records import TensorSpec
from exporter.samples import fitting_all

if TYPE_CHECKING:
    from torch import nn

# Of one input, (C, H, W), or of several by the names that forward() has for them.
Shapes: TypeAlias = "tuple[int, ...] | Mapping[str, tuple[int, ...]]"

_BATCH = 2
_NAMES = "give the first of these, each as --input NAME=CxHxW"
_HINT = "--input says what it takes, several inputs as --input NAME=CxHxW each"


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
    more_inputs: tuple[TensorSpec, ...] = ()
    more_outputs: tuple[TensorSpec, ...] = ()
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
    more_inputs: tuple[TensorSpec, ...] = ()
    more_outputs: tuple[TensorSpec, ...] = ()
    weights: None = None

    def module(self) -> nn.Module:
        return deepcopy(self.network)


def load_factory(
    code: str,
    args: Mapping[str, Any] = MappingProxyType({}),
    *,
    input_shape: Shapes | None,
) -> FactoryModel:
    """Import ``package.module:factory`` or ``file.py:factory``, and return what it makes.

    ``args`` are the factory's keyword arguments, ``input_shape`` is (C, H, W), or those of several
    inputs by the names that the network's forward() has for them.

    Raises `UnknownName` if there is no such factory, `ProfileError` for an argument that it does
    not take or lacks, and `InputRefused` for all else: code that raises, what is no network, and
    one that does not make float32 tensors (N, …) of (N, *input_shape), or has no such inputs.
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
    specs = inputs_of_network(network, input_shape, said, hint=_NAMES)
    given = ", ".join(f"{key}={value!r}" for key, value in args.items())
    output, *more = outputs_of_network(network.eval(), specs, said, hint=_HINT)
    return FactoryModel(
        name=attribute.rpartition(".")[2],
        code=f"{said}({given})",
        args=dict(args),
        input=specs[0],
        output=output,
        data=fitting_all(specs),
        network=network,
        more_inputs=specs[1:],
        more_outputs=tuple(more),
    )


def check_sizes(inputs: Sequence[TensorSpec], said: str) -> str:
    """Return the inputs' sizes in words. Raises `InputRefused` if one is below 1."""
    shape = in_words(spec.shape for spec in inputs)
    if min(size for spec in inputs for size in spec.shape) < 1:
        raise InputRefused(f"{said} cannot take an input of {shape}: every size must be 1 or more")
    return shape


def outputs_of_network(
    network: nn.Module, inputs: Sequence[TensorSpec], said: str, *, hint: str | None = None
) -> tuple[TensorSpec, ...]:
    """Return what a network in eval mode gives for its inputs, in its order.

    It runs once, on zeros. Raises `InputRefused` where it raises anything, with that hint, or gives
    what `check_outputs` refuses.
    """
    import torch

    shape = check_sizes(inputs, said)
    several = "one input" if len(inputs) == 1 else f"{len(inputs)} inputs"
    taking = refusing(f"{said} cannot take {several} of {shape}:", hint=hint)
    with taking, torch.inference_mode():
        found = network(*(torch.zeros(_BATCH, *spec.shape) for spec in inputs))
    return check_outputs(found, name=said, batch=_BATCH, taken=[spec.name for spec in inputs])


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


def names_taken(network: nn.Module) -> list[str]:
    """Return what a network's forward() calls what it takes by its place."""
    parameters = inspect.signature(network.forward).parameters.values()
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in places]


def inputs_of_network(
    network: nn.Module, shape: Shapes, said: str, *, hint: str | None = None
) -> tuple[TensorSpec, ...]:
    """Return the inputs in forward()'s order.

    Raises `InputRefused`, with that hint, for others than it takes.
    """
    if not isinstance(shape, Mapping):
        return (TensorSpec("input", shape),)
    taken = names_taken(network)
    if set(shape) != set(taken[: len(shape)]):
        raise InputRefused(
            f"{said} was given the inputs {', '.join(shape)}, and its forward() takes "
            f"{', '.join(taken) or 'none by name'}",
            hint=hint,
        )
    return tuple(TensorSpec(name, shape[name]) for name in taken[: len(shape)])
