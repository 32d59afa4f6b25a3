"""Calls of functions: the layers that they are, and what torch.fx would have called for them.

A function here takes one `Call` and returns the `Layer` that it is, or None where it is none: where
weights are computed, or a setting is not a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from exporter.fold.affine import CONVOLUTIONS, TRANSPOSED

aten = torch.ops.aten
END = 2**63 - 1  # what aten writes for the end of an axis
RANKS: dict[int | None, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
CONVOLVED = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
NAMES: dict[Any, tuple[str, ...]] = {  # of arguments, for functions that cannot be asked
    functional.conv1d: CONVOLVED,
    functional.conv2d: CONVOLVED,
    functional.conv3d: CONVOLVED,
    functional.linear: ("input", "weight", "bias"),
    functional.prelu: ("self", "weight"),
    functional.batch_norm: (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    ),
    torch.batch_norm: (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("training", "momentum", "eps", "cudnn_enabled"),
    ),
}


class Layer(NamedTuple):
    """What a layer reads, how it is made, and the nodes of the tensors it holds, by name."""

    source: Any
    kind: type[nn.Module]
    options: dict[str, Any]
    tensors: dict[str, Any] = {}  # noqa: RUF012 - never changed


@dataclass(frozen=True, slots=True)
class Call:
    """A call in a graph, and its arguments by name."""

    node: fx.Node
    given: dict[str, Any]

    @property
    def name(self) -> str:
        return str(getattr(self.node.target, "__name__", self.node.target))

    def nodes(self, *names: str) -> dict[str, Any]:
        return {name: self.given.get(name) for name in names}

    def held(self, name: str) -> torch.Tensor | None:
        """Return the tensor given by a name, if it is the network's own."""
        value = self.given.get(name)
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        found = attribute(value.graph.owning_module, str(value.target))
        return found if isinstance(found, torch.Tensor) else None


def call_of(node: fx.Node) -> Call:
    """Return a call with its arguments by name; those of aten are complete, with defaults."""
    target: Any = node.target
    if target in NAMES:
        named = dict(zip(NAMES[target], node.args, strict=False))
        return Call(node, {**named, **node.kwargs})
    schema = target._schema.arguments  # noqa: SLF001 - no public view
    named = dict(zip((argument.name for argument in schema), node.args, strict=False))
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    return Call(node, {**defaults, **named, **node.kwargs})


def gives_several(node: fx.Node) -> bool:
    """Return whether an aten call gives several tensors."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and len(schema.returns) > 1


def others(node: fx.Node) -> list[fx.Node]:
    """Return what reads another than the first of several tensors that a call gives."""
    read = [user for user in node.users if user.users and user.args[1:] != (0,)]
    return read if gives_several(node) else []


def attribute(module: Any, path: str) -> Any:
    """Return what a path of names leads to, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def rank(node: fx.Node) -> int | None:
    """Return how many axes a node's tensor has, where an example or a convolution tells."""
    if node.op == "call_module":
        module = attribute(node.graph.owning_module, str(node.target))
        if type(module) in (*CONVOLUTIONS, *TRANSPOSED):
            return 2 + len(module.kernel_size)
    if shape := node.meta.get("shape"):
        return len(shape)
    value = node.meta.get("val")
    return value.ndim if isinstance(value, torch.Tensor) else None


def as_index(node: fx.Node) -> tuple[slice, ...] | None:
    """Return the index that an aten slice is, () if it is of all, None if it cannot be told."""
    given: tuple[Any, ...] = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    dim, start, end, step = given[1:]
    if not isinstance(dim, int) or dim < 0 or node.kwargs:
        return None
    if start in (0, None) and step == 1 and (end is None or (isinstance(end, int) and end >= END)):
        return ()
    return (*[slice(None)] * dim, slice(start, end, step))


# ── Layers with weights ─────────────────────────────────────────────────────────────


def _convolution(call: Call) -> Layer | None:
    weight = call.held("weight")
    if weight is None or weight.ndim not in (3, 4, 5):
        return None
    given, axes = call.given, weight.ndim - 2
    transposed = bool(given.get("transposed")) or "transpose" in call.name
    groups = given.get("groups", 1)
    into, out = weight.shape[1] * groups, weight.shape[0]
    if transposed:
        into, out = weight.shape[0], weight.shape[1] * groups
    options = {
        "in_channels": into,
        "out_channels": out,
        "kernel_size": tuple(weight.shape[2:]),
        "stride": _each(given.get("stride", 1), axes),
        "padding": _each(given.get("padding", 0), axes),
        "dilation": _each(given.get("dilation", 1), axes),
        "groups": groups,
        "device": "meta",
    }
    if transposed:
        options["output_padding"] = _each(given.get("output_padding", 0), axes)
    kind = (TRANSPOSED if transposed else CONVOLUTIONS)[axes - 1]
    return Layer(given["input"], kind, options, call.nodes("weight", "bias"))


def _each(value: Any, axes: int) -> Any:
    """Return one value per axis, or the name of a padding."""
    if isinstance(value, str):
        return value
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * axes if len(values) == 1 else values


def _addmm(call: Call) -> Layer | None:
    """Return the linear layer, where the matrix is a weight turned over."""
    turned = call.given["mat2"]
    plain = call.given["beta"] == call.given["alpha"] == 1
    if not plain or not isinstance(turned, fx.Node):
        return None
    swapped = (turned.target, turned.args[1:])  # as lifted before
    if swapped not in (("t", ()), ("permute", (1, 0)), ("transpose", (0, 1))):
        return None
    given = {"input": call.given["mat1"], "weight": turned.args[0], "bias": call.given["self"]}
    linear = Call(call.node, given)
    bias = linear.held("bias")
    return _linear(linear) if bias is not None and bias.ndim == 1 else None


def _linear(call: Call) -> Layer | None:
    weight = call.held("weight")
    if weight is None or weight.ndim != 2:
        return None
    options = {"in_features": weight.shape[1], "out_features": weight.shape[0], "device": "meta"}
    return Layer(call.given["input"], nn.Linear, options, call.nodes("weight", "bias"))


def _batchnorm(call: Call) -> Layer | None:
    given, mean, variance = call.given, call.held("running_mean"), call.held("running_var")
    kind = RANKS.get(rank(given["input"]))
    training = given.get("training", False) is not False
    if mean is None or variance is None or kind is None or training:
        return None
    options: dict[str, Any] = {"num_features": len(mean), "eps": given.get("eps", 1e-5)}
    tensors = call.nodes("running_mean", "running_var", "weight", "bias")
    if tensors["weight"] is tensors["bias"] is None:
        options["affine"] = False
    return Layer(given["input"], kind, options, tensors)


def _prelu(call: Call) -> Layer | None:
    weight = call.held("weight")
    if weight is None or weight.ndim > 1:
        return None
    options = {"num_parameters": weight.numel()}
    return Layer(call.given["self"], nn.PReLU, options, call.nodes("weight"))


# ── Layers without ──────────────────────────────────────────────────────────────────


def _pool(kind: type[nn.Module]) -> Callable[[Call], Layer | None]:
    names = ("kernel_size", "stride", "padding", "dilation")
    flags = ("ceil_mode", "count_include_pad", "divisor_override")

    def layer(call: Call) -> Layer | None:
        given = call.given
        options = {name: tuple(given[name]) for name in names if name in given}
        if not all(isinstance(value, int) for part in options.values() for value in part):
            return None
        flagged = {name: given[name] for name in flags if name in given}
        whole = {**options, "stride": options["stride"] or options["kernel_size"], **flagged}
        return Layer(given["self"], kind, whole)

    return layer


def _adaptive(kind: type[nn.Module]) -> Callable[[Call], Layer | None]:
    def layer(call: Call) -> Layer | None:
        size = tuple(call.given["output_size"])
        if not all(isinstance(part, int) for part in size):
            return None
        return Layer(call.given["self"], kind, {"output_size": size})

    return layer


def _hardtanh(call: Call) -> Layer | None:
    given = call.given
    low: Any = given.get("min_val", given.get("min"))
    high: Any = given.get("max_val", given.get("max"))
    numbers = isinstance(low, int | float) and isinstance(high, int | float)
    if not numbers or not low < high:
        return None
    options = {"min_val": low, "max_val": high, "inplace": "_." in call.name}
    return Layer(given["self"], nn.Hardtanh, options)


def _zero_pad(call: Call) -> Layer | None:
    kinds = {2: nn.ZeroPad1d, 4: nn.ZeroPad2d, 6: nn.ZeroPad3d}
    pad = tuple(call.given["pad"])
    over_last = rank(call.given["self"]) == 2 + len(pad) // 2
    zeros = over_last and call.given["mode"] == "constant" and call.given["value"] in (None, 0)
    if not zeros or len(pad) not in kinds or not all(isinstance(part, int) for part in pad):
        return None
    return Layer(call.given["self"], kinds[len(pad)], {"padding": pad})


def _leaky_in_place(call: Call) -> Layer:
    options = {"negative_slope": call.given["negative_slope"], "inplace": True}
    return Layer(call.given["self"], nn.LeakyReLU, options)


def _hardsigmoid_in_place(call: Call) -> Layer:
    return Layer(call.given["self"], nn.Hardsigmoid, {"inplace": True})


NATIVE = aten._native_batch_norm_legit_no_training.default  # noqa: SLF001 - its name
SLICE = aten.slice.Tensor
LAYERS: dict[Any, Callable[[Call], Layer | None]] = {
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), _convolution),
    **dict.fromkeys((functional.linear, aten.linear.default), _linear),
    aten.addmm.default: _addmm,
    **dict.fromkeys((functional.prelu, aten.prelu.default), _prelu),
    **dict.fromkeys((functional.batch_norm, torch.batch_norm, aten.batch_norm.default), _batchnorm),
    **dict.fromkeys((aten.conv1d.default, aten.conv1d.padding), _convolution),
    **dict.fromkeys((aten.conv2d.default, aten.conv2d.padding), _convolution),
    **dict.fromkeys((aten.conv3d.default, aten.conv3d.padding), _convolution),
    **dict.fromkeys((aten.conv_transpose1d.default, aten.conv_transpose2d.input), _convolution),
    **dict.fromkeys((aten.conv_transpose3d.input, aten.convolution.default), _convolution),
    NATIVE: _batchnorm,
    aten.max_pool2d_with_indices.default: _pool(nn.MaxPool2d),
    aten.max_pool3d_with_indices.default: _pool(nn.MaxPool3d),
    aten._adaptive_avg_pool2d.default: _adaptive(nn.AdaptiveAvgPool2d),  # noqa: SLF001 - its name
    aten._adaptive_avg_pool3d.default: _adaptive(nn.AdaptiveAvgPool3d),  # noqa: SLF001 - its name
    aten.max_pool1d.default: _pool(nn.MaxPool1d),
    aten.max_pool2d.default: _pool(nn.MaxPool2d),
    aten.max_pool3d.default: _pool(nn.MaxPool3d),
    aten.avg_pool1d.default: _pool(nn.AvgPool1d),
    aten.avg_pool2d.default: _pool(nn.AvgPool2d),
    aten.avg_pool3d.default: _pool(nn.AvgPool3d),
    aten.adaptive_avg_pool1d.default: _adaptive(nn.AdaptiveAvgPool1d),
    aten.adaptive_avg_pool2d.default: _adaptive(nn.AdaptiveAvgPool2d),
    aten.adaptive_avg_pool3d.default: _adaptive(nn.AdaptiveAvgPool3d),
    aten.adaptive_max_pool1d.default: _adaptive(nn.AdaptiveMaxPool1d),
    aten.adaptive_max_pool2d.default: _adaptive(nn.AdaptiveMaxPool2d),
    aten.adaptive_max_pool3d.default: _adaptive(nn.AdaptiveMaxPool3d),
    **dict.fromkeys((aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default), _hardtanh),
    aten.pad.default: _zero_pad,
    aten.leaky_relu_.default: _leaky_in_place,
    aten.hardsigmoid_.default: _hardsigmoid_in_place,
}
DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
NOTHING = (*DROPOUTS, aten.alias.default, aten.detach.default)
ASSERTIONS = (
    aten._assert_tensor_metadata.default,  # noqa: SLF001 - the names torch.export gives them
    aten._assert_scalar.default,  # noqa: SLF001 - the same
    *(aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default),
)
METHODS = {
    aten.view.default: "view",
    aten.reshape.default: "reshape",
    aten.permute.default: "permute",
    aten.transpose.int: "transpose",
    aten.t.default: "t",
    aten.contiguous.default: "contiguous",
    aten.clone.default: "clone",
    aten.chunk.default: "chunk",
    aten.split.Tensor: "split",
    aten.sym_size.int: "size",
    aten.split_with_sizes.default: "split_with_sizes",
    aten.squeeze.dim: "squeeze",
    aten.unsqueeze.default: "unsqueeze",
    aten.select.int: "select",
    aten.narrow.default: "narrow",
    aten.expand.default: "expand",
    aten.flip.default: "flip",
    aten.movedim.int: "movedim",
    aten.unflatten.int: "unflatten",
}
FUNCTIONS: dict[Any, Any] = {
    aten.relu.default: functional.relu,
    aten.relu_.default: torch.relu_,
    aten.relu6.default: functional.relu6,
    aten.leaky_relu.default: functional.leaky_relu,
    aten.hardsigmoid.default: functional.hardsigmoid,
    aten.sigmoid.default: torch.sigmoid,
    aten.flatten.using_ints: torch.flatten,
    aten.mean.dim: torch.mean,
    aten.cat.default: torch.cat,
    aten.pad.default: functional.pad,
    aten.pixel_shuffle.default: torch.pixel_shuffle,
    aten.pixel_unshuffle.default: torch.pixel_unshuffle,
    aten.channel_shuffle.default: torch.channel_shuffle,
    aten.add.Tensor: operator.add,
    aten.add_.Tensor: operator.iadd,
    aten.sub.Tensor: operator.sub,
    aten.mul.Tensor: operator.mul,
    aten.div.Tensor: operator.truediv,
    aten.batch_norm.default: torch.batch_norm,
}
