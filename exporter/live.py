"""A network that a program holds, say in a notebook, as a `Model`.

    the module, on any device, in any mode ── copy ──▶ float32 on the CPU, in eval mode

The module itself is never run and never changed: its tensors are read once, and everything else is
done to the copy. float16 and bfloat16 become float32, which is exact; float64 is refused, since
rounding would change the network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from exporter.errors import GraphError, InputRefused
from exporter.factories import (
    GivenModel,
    Shapes,
    inputs_of_network,
    names_taken,
    outputs_of_network,
)
from exporter.fold.unfit import copy_of, is_exported, refuse_unfit, unwrapped
from exporter.samples import fitting_all

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NAME = re.compile(r"\w[\w.-]{0,63}")  # of files
_HINT = "the example says what it takes"


def live_model(module: nn.Module, input_shape: Shapes, *, name: str | None = None) -> GivenModel:
    """Return a copy of the module as the network of its inputs. The module is left alone.

    Wrappers of torch.compile and of data parallelism come off. Raises `GraphError` for a module
    that cannot be copied, or that a graph cannot hold, as one with hooks; `InputRefused` for
    tensors that are not float32 or half of it, or have no values, and for one that does not make
    float32 tensors (N, …) of (N, C, H, W).
    """
    inside = _inside(module)
    kind = type(inside).__name__
    chosen = kind.lower() if name is None else name
    if not _NAME.fullmatch(chosen):
        raise InputRefused(
            f"{chosen!r} cannot be the name of a network, which its files are called after",
            hint="letters, digits, '.', '-' and '_', 64 at most",
        )
    copy, changes = _copy(inside, kind)
    refuse_unfit(copy)
    _refuse_hooks(copy)
    specs = inputs_of_network(copy, input_shape, kind, hint=_HINT)
    output, *more = outputs_of_network(copy, specs, kind, hint=_HINT)
    return GivenModel(
        name=chosen,
        kind=f"{type(inside).__module__}.{type(inside).__qualname__}",
        input=specs[0],
        output=output,
        data=fitting_all(specs),
        changes=changes,
        network=copy,
        more_inputs=specs[1:],
        more_outputs=tuple(more),
    )


def shapes_of(example_inputs: object, module: nn.Module) -> Shapes:
    """Return what an example says of the inputs: tensors (N, C, H, W) in a tuple, or by name.

    A tensor alone is the one input. Those of a tuple have the names that the module's forward() has
    for them. Raises `InputRefused` for anything else; values are not looked at.
    """
    if isinstance(example_inputs, Mapping) and example_inputs:
        return {str(name): shape_of(one) for name, one in example_inputs.items()}
    if not isinstance(example_inputs, tuple | list):
        return shape_of(example_inputs)
    if len(example_inputs) == 1:
        return shape_of(example_inputs[0])
    names = names_taken(_inside(module))
    if not 0 < len(example_inputs) <= len(names):
        raise InputRefused(
            f"the example has {len(example_inputs)} inputs, and the module's forward() takes "
            f"{', '.join(names) or 'none by name'}",
            hint="give one tensor (N, C, H, W) for each",
        )
    return dict(zip(names, map(shape_of, example_inputs), strict=False))


def shape_of(given: object) -> tuple[int, ...]:
    """Return the (C, H, W) of a tensor (N, C, H, W).

    Raises `InputRefused` for anything else; its values are not looked at.
    """
    if not isinstance(given, torch.Tensor):
        hint = "torch.from_numpy(array)" if hasattr(given, "__array__") else None
        raise InputRefused(
            f"the example is an object of type {type(given).__name__}, and no tensor", hint=hint
        )
    if given.dtype not in _FLOATS:
        raise InputRefused(
            f"the example is {_words(given.dtype)}, and networks take float32 so far",
            hint="example.float(), as the network was trained to take it",
        )
    if given.ndim != 4 or not given.numel():
        raise InputRefused(
            f"the example must be (N, C, H, W), found {tuple(given.shape)}",
            hint="one sample is a batch of one: example[None]" if given.ndim == 3 else None,
        )
    return tuple(given.shape[1:])


@contextmanager
def usual_torch() -> Iterator[None]:
    """Put what PyTorch does by default in place of what a program has chosen, and back afterwards.

    That is: the CPU, float32 at its full precision, no autocast, gradients where they are asked
    for, and a generator of its own.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        yield


def _inside(module: object) -> nn.Module:
    """Return a module without what wraps it. Raises `InputRefused` for anything else."""
    if not isinstance(module, nn.Module):
        raise InputRefused(
            f"an object of type {type(module).__name__} was given, and no torch.nn.Module",
            hint="of what torch.export made, give program.module()"
            if isinstance(module, torch.export.ExportedProgram)
            else None,
        )
    return unwrapped(module)


def _copy(module: nn.Module, kind: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy in eval mode, in float32 on the CPU, and what is otherwise in it."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    plain = {k: t for k, t in tensors.items() if not (is_lazy(t) or t.is_quantized)}
    for key, tensor in plain.items():
        _check_tensor(tensor, f"{kind}: tensor {key!r}")
    copy = copy_of(module, {id(tensor): _on_cpu(tensor) for tensor in plain.values()})
    changes = []
    if others := sorted({str(t.device) for t in plain.values()} - {"cpu"}):
        changes.append(f"copied from {', '.join(others)}")
    kinds = {t.dtype for t in plain.values() if t.is_floating_point()} - {torch.float32}
    if halves := sorted(map(_words, kinds)):
        changes.append(f"{', '.join(halves)} read as float32, which is exact")
    if not is_exported(copy):  # whose mode is written into its calls
        if any(child.training for child in module.modules()):
            changes.append("given in training mode, and exported in eval mode")
        copy.eval()
    for child in copy.modules():  # what gradients alone would run
        child._backward_hooks.clear()  # noqa: SLF001 - no public view
        child._backward_pre_hooks.clear()  # noqa: SLF001 - no public view
    return copy, tuple(changes)


def _check_tensor(tensor: torch.Tensor, said: str) -> None:
    """Raise `InputRefused` unless its values can be read, and be float32 without rounding."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        raise InputRefused(f"{said} is a {type(tensor).__name__}, and no plain tensor")
    if tensor.is_meta:
        raise InputRefused(f"{said} is on meta, where it has no values")
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in _FLOATS):
        raise InputRefused(
            f"{said} is {_words(tensor.dtype)}, and the reference computes in float32",
            hint="give copy.deepcopy(module).float(), which rounds its weights",
        )


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of the values, channels first in memory, with no gradient."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    order = torch.contiguous_format
    value = tensor.detach().to("cpu", dtype, copy=True, memory_format=order)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value


def _refuse_hooks(module: nn.Module) -> None:
    """Raise `GraphError` for a hook of a program's own: it would run, and no artefact runs it."""
    for name, child in module.named_modules():
        hooks = (*child._forward_hooks.values(), *child._forward_pre_hooks.values())  # noqa: SLF001 - no public view
        if any(not getattr(hook, "__module__", "").startswith("torch.") for hook in hooks):
            raise GraphError(
                f"{name or type(module).__name__} has a hook, which would run in PyTorch and in no "
                "artefact",
                hint="take it off: handle.remove(), with what register_forward_hook returned",
            )


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
