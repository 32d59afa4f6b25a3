"""What folding takes a copy of, and what it refuses before that.

A graph keeps the calls that forward() makes, and nothing of what Python would do around them: hooks
of anything but a layer, methods put on an instance, a mode that changes later. Wrappers that change
no value, of torch.compile and both kinds of data parallelism, come off.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from types import MappingProxyType

import torch
from torch import fx, nn
from torch.nn.modules import module as every_module
from torch.nn.parameter import is_lazy

from exporter.errors import GraphError
from exporter.fold.lifting import has_hooks
from exporter.fold.same import first_line

NONE: Mapping[int, torch.Tensor] = MappingProxyType({})
OF_TORCH = ("OptimizedModule", "GuardsFn")  # whose instances have a forward() each, by design


def refuse_unfit(module: nn.Module) -> None:
    """Raise `GraphError` for what a traced copy would not do, or not do in the same way."""
    kind, exported = type(module).__name__, is_exported(module)
    if module.training and not exported:
        raise GraphError("cannot fold a network in training mode", hint="call module.eval() first")
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:  # noqa: SLF001 - no public view
        raise GraphError("there are global module hooks, which a traced copy would not run")
    for name, child in module.named_modules():
        label = name or kind
        if child.training and not exported:
            raise GraphError(f"{label} is in training mode", hint="call module.eval() first")
        if any(base.__name__ == "ScriptModule" for base in type(child).__mro__):
            hint = "fold the network that the TorchScript was made from"
            raise GraphError(f"{label} is TorchScript, which cannot be traced", hint=hint)
        tensors = (*child.parameters(recurse=False), *child.buffers(recurse=False))
        if any(map(is_lazy, tensors)):
            hint = "run one batch through the network first"
            raise GraphError(f"{label} has no weights yet: it waits for its first input", hint=hint)
        if _is_quantised(child):
            hint = "fold the network before it is quantised"
            raise GraphError(f"{label} is quantised, and folding would change it", hint=hint)
        if replaced := [key for key in vars(child) if _replaces(child, key)]:
            hint = "override it in a class"
            raise GraphError(f"{label}.{replaced[0]} was replaced on the instance", hint=hint)
    if has_hooks(module) and not (exported and _hooked_by_export(module)):
        raise GraphError(f"{kind} has hooks of its own, which a traced copy would not run")


def _is_quantised(module: nn.Module) -> bool:
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    by_kind = ".quantized." in type(module).__module__ and "torch.ao." in type(module).__module__
    return by_kind or any(tensor.is_quantized for tensor in tensors)


def _replaces(module: nn.Module, key: str) -> bool:
    """Return whether the instance has its own in place of a method that forward() may use."""
    found = inspect.getattr_static(type(module), key, None)
    is_method = inspect.isfunction(found) or isinstance(found, staticmethod | classmethod)
    used = key == "forward" or not hasattr(nn.Module, key)  # whose others compute nothing
    return is_method and used and type(module).__name__ not in OF_TORCH


def is_exported(module: nn.Module) -> bool:
    """Return whether torch.export made it, which writes the mode into each call and keeps none."""
    return isinstance(module, fx.GraphModule) and "eval" in vars(module)


def _hooked_by_export(module: nn.Module) -> bool:
    """Return whether all hooks are torch.export's, which check and unpack the input."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())  # noqa: SLF001 - no public view
    return all(getattr(hook, "__module__", "") == "torch.export._unlift" for hook in hooks)


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule"


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what a wrapper that changes no value has inside."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif _is_compiled(module):
            module = module.get_submodule("_orig_mod")
        else:
            return module


def copy_of(module: nn.Module, tensors: Mapping[int, torch.Tensor] = NONE) -> nn.Module:
    """Return a copy without the wrappers inside; ``tensors`` take the places of those of the ids.

    Raises `GraphError` for what cannot be copied.
    """
    try:
        copy = deepcopy(module, dict(tensors))
    except Exception as error:  # of whatever the module holds, like old parametrisations' tensors
        raise GraphError(f"cannot copy {type(module).__name__}: {first_line(error)}") from error
    for parent in list(copy.modules()):
        for name, child in list(parent.named_children()):
            if (inside := unwrapped(child)) is not child:
                setattr(parent, name, inside)
        parent._compiled_call_impl = None  # noqa: SLF001 - no public view
    return copy
