"""Count a PyTorch module, call by call, as one sample runs through it.

Every function that PyTorch is called with is seen once, by whatever module calls it, so that a
network need not be traced. A call that gives a view of what it was given moves nothing, and one
that computes in place holds nothing new: storages tell. A function of several steps that PyTorch
calls as one, say multi-head attention, is one call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

from exporter.errors import InputRefused
from exporter.flops import formulas
from exporter.flops.liveness import Step, alive_bytes
from exporter.records import Cost, LayerCost

if TYPE_CHECKING:
    import torch
    from torch import nn

Formula: TypeAlias = "Callable[[list[torch.Tensor], torch.Tensor], int]"


def _convolution(read: list[torch.Tensor], output: torch.Tensor) -> int:
    return formulas.convolution(tuple(output.shape), tuple(read[1].shape))


def _transposed(read: list[torch.Tensor], _: torch.Tensor) -> int:
    return formulas.transposed_convolution(tuple(read[0].shape), tuple(read[1].shape))


def _product(read: list[torch.Tensor], output: torch.Tensor) -> int:
    """Return the MACs of x·y, or of x·Wᵀ + b."""
    return formulas.product(tuple(output.shape), read[0].shape[-1])


def _biased_product(read: list[torch.Tensor], output: torch.Tensor) -> int:
    """Return the MACs of b + x·y."""
    return formulas.product(tuple(output.shape), read[1].shape[-1])


MACS: dict[str, Formula] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **{f"conv_transpose{n}d": _transposed for n in (1, 2, 3)},
    **dict.fromkeys(("linear", "matmul", "mm", "bmm"), _product),
    **dict.fromkeys(("addmm", "baddbmm"), _biased_product),
}

# Moves, comparisons, or at most a few operations per element.
# fmt: off
FREE = frozenset({
    "abs", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool2d", "add", "amax", "amin", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "batch_norm", "cat", "channel_shuffle", "clamp", "clone", "concat", "contiguous", "copy",
    "div", "dropout", "elu", "empty", "eq", "fill", "flatten", "full", "getitem", "group_norm",
    "gt", "hardsigmoid", "hardswish", "hardtanh", "iadd", "imul", "instance_norm",
    "interpolate", "isub", "itruediv", "layer_norm", "leaky_relu", "log_softmax", "lt",
    "max_pool1d", "max_pool2d", "max_pool3d", "maximum", "mean", "minimum", "mul", "neg",
    "ones", "pad", "permute", "pixel_shuffle", "pixel_unshuffle", "prelu", "radd", "relu",
    "relu6", "repeat", "reshape", "rmul", "rsub", "rtruediv", "setitem", "sigmoid", "silu",
    "softmax", "split", "stack", "sub", "sum", "tanh", "to", "transpose", "truediv", "where",
    "zero", "zeros",
})
# fmt: on


def count_module(module: nn.Module, input_shape: tuple[int, ...], *, name: str = "network") -> Cost:
    """Return each call's multiply-accumulates, parameters and bytes, for a batch of one.

    The module runs once in eval mode, on zeros of (1, *input_shape), on the device that it is on;
    on torch's meta device nothing is computed. Layers are named as in `export_onnx`, operators as
    PyTorch's functions; figures are as in `count_flops`, and buffers that are read are weights
    that are no parameters. Raises `InputRefused` if it cannot take the shape.
    """
    import torch

    tensors = (*module.parameters(), *module.buffers())
    device = tensors[0].device if tensors else None
    kind = next((t.dtype for t in tensors if t.is_floating_point()), None)
    given = torch.zeros(1, *input_shape, device=device, dtype=kind)
    calls = _Calls()
    training = [part for part in module.modules() if part.training]
    try:
        with torch.no_grad(), _named(module.eval(), calls.inside), calls.mode():
            result = module(given)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        shape = " × ".join(map(str, input_shape))
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputRefused(f"{name} cannot take an input of {shape}: {reason}") from error
    finally:
        for part in training:
            part.training = True
    return _cost(module, calls, given, list(_tensors(result)))


@dataclass(frozen=True, slots=True)
class _Call:
    """One function that PyTorch was called with: what it read, gave, and wrote of that."""

    layer: str
    op: str
    read: list[torch.Tensor]
    gave: list[torch.Tensor]
    wrote: list[torch.Tensor]


@dataclass(slots=True)
class _Calls:
    """What was called, in order, and inside which modules; it keeps all tensors alive."""

    seen: list[_Call] = field(default_factory=list)
    inside: list[str] = field(default_factory=lambda: [""])

    def mode(self) -> Any:
        """Return what notes every call while it is entered."""
        from torch.overrides import TorchFunctionMode

        calls = self

        class Mode(TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                read = list(_tensors((args, kwargs or {})))
                before = [_version(tensor) for tensor in read]
                given = func(*args, **(kwargs or {}))
                pairs = zip(read, before, strict=True)
                changed = [tensor for tensor, version in pairs if _version(tensor) != version]
                calls.note(func.__name__, read, list(_tensors(given)), changed)
                return given

        return Mode()

    def note(
        self,
        function: str,
        read: list[torch.Tensor],
        gave: list[torch.Tensor],
        changed: list[torch.Tensor],
    ) -> None:
        held = {_storage(tensor) for tensor in read}
        wrote = [tensor for tensor in gave if _storage(tensor) not in held]
        wrote += [tensor for tensor in changed if not any(tensor is one for one in wrote)]
        if wrote:
            op = function.strip("_")
            self.seen.append(_Call(self.inside[-1], op, read, gave, wrote))


def _cost(
    module: nn.Module, calls: _Calls, given: torch.Tensor, wanted: list[torch.Tensor]
) -> Cost:
    parameters = {_storage(p): p.numel() for p in module.parameters()}
    stored = {_storage(tensor) for tensor in (*module.parameters(), *module.buffers())}
    size = {
        _storage(tensor): tensor.untyped_storage().nbytes()
        for call in calls.seen
        for tensor in (*call.read, *call.wrote)
        if _storage(tensor) not in stored
    }
    steps = [
        Step(tuple(map(_storage, call.read)), tuple(map(_storage, call.wrote)))
        for call in calls.seen
    ]
    alive = alive_bytes(steps, size, given=[_storage(given)], wanted=map(_storage, wanted))
    counted, uncounted, taken = [], Counter[str](), Counter[str]()
    new = set(stored)
    for call, held in zip(calls.seen, alive, strict=True):
        if call.op not in MACS and call.op not in FREE:
            uncounted[call.op] += 1
        formula = MACS.get(call.op)
        read = {id(tensor): tensor for tensor in call.read}.values()
        brought = [tensor for tensor in read if _storage(tensor) in new]
        new.difference_update(map(_storage, brought))
        counted.append(
            LayerCost(
                name=_layer(call, taken),
                op=call.op,
                output_shape=tuple(call.wrote[0].shape),
                macs=formula(call.read, call.wrote[0]) if formula else 0,
                parameters=sum(parameters.get(_storage(tensor), 0) for tensor in brought),
                weight_bytes=sum(map(_nbytes, brought)),
                activation_bytes=sum(map(_nbytes, call.wrote)),
                read_bytes=sum(map(_nbytes, read)),
                alive_bytes=held,
            )
        )
    return Cost(tuple(counted), dict(uncounted))


def _layer(call: _Call, taken: Counter[str]) -> str:
    """Return a call's name, unique, after the innermost module that makes it."""
    name = call.layer or call.op
    if call.op not in MACS:
        name = f"{name}/{call.op}"
    taken[name] += 1
    return name if taken[name] == 1 else f"{name}.{taken[name]}"


def _storage(tensor: torch.Tensor) -> int:
    return id(tensor.untyped_storage())


def _version(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written to in place."""
    return tensor._version  # noqa: SLF001 - documented, and there is no other way


def _nbytes(tensor: torch.Tensor) -> int:
    return prod(tensor.shape) * tensor.element_size()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in what a function takes or gives."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@contextmanager
def _named(module: nn.Module, inside: list[str]) -> Iterator[None]:
    """Keep the name of the innermost module that runs on top of ``inside``."""
    hooks = []
    for name, part in module.named_modules():
        hooks.append(part.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        hooks.append(part.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
