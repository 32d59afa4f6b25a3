"""Bugs of weights and biases: lost, permuted, rounded, or in somebody else's layout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import torch

from exporter.records import Array
from mutation.bugs.site import DoesNotApply, Site, attribute, bug, floats, upstream


def _convolution(site: Site, where: Callable[[Array], bool] = lambda _: True) -> onnx.NodeProto:
    """Return one of the convolutions whose weights pass ``where``."""
    return site.node("Conv", where=lambda node: where(site.value(node.input[1])))


def _is_spatial(weights: Array) -> bool:
    return weights.ndim == 4 and min(weights.shape[2:]) > 1


def _biased(site: Site) -> onnx.NodeProto:
    return site.node("Conv", where=lambda node: len(node.input) > 2)


def _two(site: Site, count: int) -> list[int]:
    """Return two of so many channels, changed over."""
    if count < 2:
        raise DoesNotApply
    one, other = site.random.sample(range(count), 2)
    order = list(range(count))
    order[one], order[other] = other, one
    return order


@upstream()
def bias_lost(site: Site) -> None:
    """A convolution has no bias any more."""
    node = _biased(site)
    del node.input[2:]


@upstream()
def logit_bias_lost(site: Site) -> None:
    """The last layer adds zeros: an exporter took its bias for an optional input."""
    node = site.nodes("Gemm")[-1]
    site.own(node, 2, np.zeros_like(site.value(node.input[2])))


@upstream()
def bias_added_twice(site: Site) -> None:
    """A bias stands in the layer and in an Add that was once split from it."""
    node = _biased(site)
    site.edit(node.input[2], lambda bias: 2 * bias)


@upstream()
def two_biases_swapped(site: Site) -> None:
    """Two channels have each other's bias."""
    node = _biased(site)
    site.edit(node.input[2], lambda bias: bias[_two(site, len(bias))])


@upstream()
def two_output_channels_swapped(site: Site) -> None:
    """Two channels of a layer have changed places, and who reads them does not know."""
    node = _convolution(site, lambda weights: len(weights) > 1)
    order = _two(site, len(site.value(node.input[1])))
    for name in node.input[1:]:
        site.edit(name, lambda values: values[order])


@upstream()
def two_input_channels_swapped(site: Site) -> None:
    """A layer reads two channels in each other's place."""
    node = _convolution(site, lambda weights: weights.shape[1] > 1)
    site.edit(node.input[1], lambda weights: weights[:, _two(site, weights.shape[1])])


@upstream()
def two_classes_swapped(site: Site) -> None:
    """The labels are in another order than the network's."""
    node = site.nodes("Gemm")[-1]
    order = _two(site, len(site.value(node.input[2])))
    for name in node.input[1:]:
        site.edit(name, lambda values: values[order])


@upstream()
def bgr_for_rgb(site: Site) -> None:
    """The first layer's channels are reversed, for pictures that another library loaded."""
    node = site.nodes("Conv")[0]
    site.edit(node.input[1], lambda weights: weights[:, ::-1])


@upstream()
def kernel_flipped(site: Site) -> None:
    """True convolution, with the kernel turned around, where cross-correlation was meant."""
    node = _convolution(site, _is_spatial)
    site.edit(node.input[1], lambda weights: weights[:, :, ::-1, ::-1])


@upstream()
def kernel_transposed(site: Site) -> None:
    """A kernel's height and width have changed places."""
    node = _convolution(site, _is_spatial)
    site.edit(node.input[1], lambda weights: weights.transpose(0, 1, 3, 2))


@upstream()
def weights_in_another_layout(site: Site) -> None:
    """A buffer in the order (in, height, width, out) is read as (out, in, height, width)."""
    node = _convolution(site, lambda weights: weights[0].size > 1 and len(weights) > 1)
    site.edit(node.input[1], lambda weights: weights.transpose(1, 2, 3, 0).reshape(weights.shape))


@upstream()
def square_weights_transposed(site: Site) -> None:
    """Where a convolution has as many inputs as outputs, they have changed places unnoticed."""
    node = _convolution(site, lambda weights: weights.shape[0] == weights.shape[1] > 1)
    site.edit(node.input[1], lambda weights: weights.transpose(1, 0, 2, 3))


@upstream()
def linear_weights_transposed(site: Site) -> None:
    """A linear layer's buffer in the order (in, out) is read as (out, in)."""
    node = site.node("Gemm", where=lambda node: attribute(node, "transB") == 1)
    site.edit(node.input[1], lambda weights: weights.T.reshape(weights.shape))


@upstream()
def flattened_in_the_order_of_nhwc(site: Site) -> None:
    """A linear layer behind a flattened picture reads it with the channels last."""
    shapes = site.shapes()
    places = []
    for node in site.nodes("Gemm"):
        writer = site.writer(node.input[0])
        before = shapes.get(writer.input[0], ()) if writer is not None else ()
        if len(before) == 3 and before[0] > 1 and before[1] * before[2] > 1:
            places.append((node, before))
    node, shape = site.pick(places)
    order = np.arange(int(np.prod(shape))).reshape(shape).transpose(1, 2, 0).reshape(-1)
    site.edit(node.input[1], lambda weights: weights[:, order])


@upstream()
def weights_of_another_layer(site: Site) -> None:
    """Two layers of one shape have each other's weights."""
    found = list(floats(site, "Conv"))
    pairs = [
        (one, other)
        for i, (_, one) in enumerate(found)
        for _, other in found[:i]
        if one != other and site.value(one).shape == site.value(other).shape
    ]
    one, other = site.pick(pairs)
    mine, theirs = site.value(one), site.value(other)
    site.put(one, theirs)
    site.put(other, mine)


@upstream()
def depthwise_kernels_in_reverse(site: Site) -> None:
    """A depthwise layer's kernels stand in another order than its channels."""
    node = site.node("Conv", where=lambda node: attribute(node, "group", 1) > 1)
    site.edit(node.input[1], lambda weights: weights[::-1])


@bug("fp32", "fp16")
def nan_in_one_channel(site: Site) -> None:
    """One channel's weights are NaN, from a division by a zero scale."""
    _set_one_channel(site, _convolution(site).input[1], np.nan)


@bug("fp32", "fp16", "int8")
def infinite_bias(site: Site) -> None:
    """One channel's bias is beyond every float."""
    _set_one_channel(site, _biased(site).input[2], -np.inf)


def _set_one_channel(site: Site, name: str, value: float) -> None:
    def change(values: Array) -> Array:
        values[site.random.randrange(len(values))] = value
        return values

    site.edit(name, change)


@upstream()
def one_weight_of_the_other_sign(site: Site) -> None:
    """One bit of one weight is wrong: its sign."""
    node = _convolution(site)

    def change(weights: Array) -> Array:
        place = site.random.randrange(weights.size)
        weights.flat[place] *= -1
        return weights

    site.edit(node.input[1], change)


@upstream()
def one_weight_of_another_exponent(site: Site) -> None:
    """One bit of one weight is wrong: the last of its exponent."""
    node = _convolution(site)

    def change(weights: Array) -> Array:
        bits = weights.reshape(-1).view(np.uint32)
        bits[site.random.randrange(weights.size)] ^= np.uint32(1 << 23)
        return bits.view(np.float32).reshape(weights.shape)

    site.edit(node.input[1], change)


@upstream("fp32", "int8")
def one_channel_off_by_a_thousandth(site: Site) -> None:
    """One channel's weights are a thousandth too large."""
    node = _convolution(site)
    place = site.random.randrange(len(site.value(node.input[1])))

    def change(weights: Array) -> Array:
        weights[place] *= 1.001
        return weights

    site.edit(node.input[1], change)


@upstream()
def one_channel_off_by_a_hundredth(site: Site) -> None:
    """One channel's weights and bias are a hundredth too large."""
    node = _convolution(site)
    place = site.random.randrange(len(site.value(node.input[1])))

    def change(values: Array) -> Array:
        values[place] *= 1.01
        return values

    for name in node.input[1:]:
        site.edit(name, change)


def _as(kind: torch.dtype) -> Callable[[Array], Array]:
    return lambda values: torch.from_numpy(values).to(kind).float().numpy()


@upstream("fp32", "int8")
def weights_rounded_to_bfloat16(site: Site) -> None:
    """A layer's weights went through bfloat16, as checkpoints of mixed training do."""
    _, name = site.pick(list(floats(site)))
    site.edit(name, _as(torch.bfloat16))


@upstream("fp32", "int8")
def weights_rounded_to_half(site: Site) -> None:
    """A layer's weights went through half, as checkpoints that were made small do."""
    _, name = site.pick(list(floats(site)))
    site.edit(name, _as(torch.float16))


@upstream("fp32", "int8")
def weights_cut_to_tensorfloat32(site: Site) -> None:
    """A layer's weights lost the 13 bits that TF32 does not read."""

    def change(weights: Array) -> Array:
        kept = weights.reshape(-1).view(np.uint32) & np.uint32(0xFFFFE000)
        return kept.view(np.float32).reshape(weights.shape)

    _, name = site.pick(list(floats(site)))
    site.edit(name, change)


@upstream("fp32", "fp16")
def weights_left_on_the_integer_grid(site: Site) -> None:
    """A layer's weights are those of the simulated quantisation, in a graph that has none."""

    def change(weights: Array) -> Array:
        step = np.abs(weights).max() / 127
        return np.rint(weights / step) * step

    _, name = site.pick(list(floats(site)))
    site.edit(name, change)


@upstream()
def weights_pruned(site: Site) -> None:
    """A layer's smallest tenth of weights is gone, by an optimisation that nobody asked for."""

    def change(weights: Array) -> Array:
        return np.where(np.abs(weights) < np.quantile(np.abs(weights), 0.1), 0, weights)

    _, name = site.pick(list(floats(site)))
    site.edit(name, change)
