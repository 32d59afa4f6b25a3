"""Which modules, functions and methods compute the same thing."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from exporter.fold.affine import CONVOLUTIONS, TRANSPOSED


class Kinds(NamedTuple):
    """The modules, functions and methods that compute one thing."""

    modules: tuple[type[nn.Module], ...]
    functions: tuple[object, ...] = ()


RELU = Kinds(
    (nn.ReLU,), (functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_")
)
LEAKY = Kinds((nn.LeakyReLU,), (functional.leaky_relu,))
PRELU = Kinds((nn.PReLU,))
MAXPOOL = Kinds(
    (
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    ),
    (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d),
)
IDENTITY = Kinds((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d))
AVGPOOL = Kinds(
    (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d),
)
ADAPTIVE = Kinds(
    (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d),
)
MEAN = Kinds((), (torch.mean, "mean"))
RESIZE = Kinds(  # every value a weighted mean of values of its channel
    (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), (functional.interpolate,)
)
ZERO_PAD = Kinds((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d))
FLATTEN = Kinds((nn.Flatten,), (torch.flatten, "flatten"))
SUM = Kinds((), (operator.add, operator.iadd, torch.add, "add", "add_"))
CONCATENATION = Kinds((), (torch.cat, torch.concat))
LAYERS = Kinds((*CONVOLUTIONS, *TRANSPOSED, nn.Linear))
HOMOGENEOUS = (RELU, LEAKY, PRELU, MAXPOOL)

# fmt: off
IN_PLACE = frozenset({  # of Python's operators
    "iadd", "iand", "ifloordiv", "imatmul", "imod", "imul", "ior", "ipow", "isub", "itruediv",
    "setitem",
})
REARRANGEMENTS = frozenset({  # their results hold values of what they read, and nothing else
    "channel_shuffle", "chunk", "clone", "contiguous", "detach", "flatten", "flip",
    "getitem", "moveaxis", "movedim", "narrow", "permute", "pixel_shuffle", "pixel_unshuffle",
    "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims",
    "tensor_split", "transpose", "unflatten", "unsqueeze", "view",
})
# fmt: on
REARRANGING = (nn.ChannelShuffle, nn.Flatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.Unflatten)


def name_of(node: fx.Node) -> str:
    """Return the bare name of the function or method that a node calls, without its overload."""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def is_rearrangement(node: fx.Node) -> bool:
    """Return whether a function or method of torch is one that only moves values."""
    if node.op not in ("call_function", "call_method") or name_of(node) not in REARRANGEMENTS:
        return False
    home = str(getattr(node.target, "__module__", None) or "torch")
    return node.op == "call_method" or home.partition(".")[0] in ("torch", "_operator", "operator")


def is_batch_norm(node: fx.Node) -> bool:
    """Return whether a node calls batch normalisation as a function."""
    functions = (functional.batch_norm, torch.batch_norm)
    return node.op == "call_function" and node.target in functions


def asks_for_shape(node: fx.Node) -> bool:
    """Return whether a node reads no values, which a fold changes, but what it leaves alone."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    asks = node.target is getattr and len(node.args) > 1
    return asks and node.args[1] in ("shape", "ndim", "dtype", "device")
