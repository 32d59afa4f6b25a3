"""Bugs of the conversion to halves and to integers, made in graphs that are converted already."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import torch

from exporter.records import Array
from mutation.bugs.site import DoesNotApply, Site, bug, floats, set_attribute

INT8 = ("int8", "int8 around fp16")
WEIGHTS = (*INT8, "int8-weights")
PAIRS = (*INT8, "fp8", "fp8 around fp16")
SCALES = (*PAIRS, "int8-weights")


# ── Halves ──────────────────────────────────────────────────────────────────────────


@bug("fp16")
def half_weights_that_were_bfloat16(site: Site) -> None:
    """A layer's weights went through bfloat16 on their way to half, and lost three bits there."""
    _, name = site.pick(list(floats(site)))
    site.edit(name, lambda w: torch.from_numpy(w.astype(np.float32)).bfloat16().float().numpy())


@bug("fp16")
def half_weights_clamped(site: Site) -> None:
    """A layer's weights are clamped to a range that is too small for its largest hundredth."""
    _, name = site.pick(list(floats(site)))

    def change(weights: Array) -> Array:
        bound = np.quantile(np.abs(weights.astype(np.float32)), 0.99)
        return np.clip(weights, -bound, bound)

    site.edit(name, change)


@bug("fp16")
def half_weights_flushed_to_zero(site: Site) -> None:
    """A converter takes weights below 2⁻⁸ for zero; its users' layers had some."""
    _, name = site.pick(list(floats(site, "Conv")))
    site.edit(name, lambda weights: np.where(np.abs(weights) < 2.0**-8, 0, weights))


@bug("fp16")
def half_activations_saturate(site: Site) -> None:
    """A layer's output is clipped where its largest values lie."""
    shapes = site.shapes()
    node = site.node("Conv", where=lambda n: len(shapes.get(n.input[0], ())) == 3)
    for name, bound in (("lowest", -1.0), ("highest", 1.0)):
        site.put(name, np.array(bound, dtype=np.float16))
    site.insert("Clip", node, 0, "lowest", "highest")


@bug("fp16")
def activations_went_through_bfloat16(site: Site) -> None:
    """A layer reads its input in bfloat16."""
    node = site.node("Conv")
    site.insert("Cast", node, 0, to=onnx.TensorProto.BFLOAT16)
    site.insert("Cast", node, 0, to=onnx.TensorProto.FLOAT16)


# ── Scales and zero points ──────────────────────────────────────────────────────────


def _quantised_activation(site: Site) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """Return an activation's pair."""
    first = site.node("QuantizeLinear")
    (second, *_) = site.readers(first.output[0])
    return first, second


def weights_of(site: Site) -> onnx.NodeProto:
    """Return the node that dequantises a layer's weights."""
    return site.node("DequantizeLinear", where=lambda node: site.has(node.input[0]))


@bug(*PAIRS)
def activation_scale_off_by_a_hundredth(site: Site) -> None:
    """A scale is a hundredth too large, on both sides of the pair: calibrated on other pictures."""
    first, _ = _quantised_activation(site)
    site.edit(first.input[1], lambda scale: scale * 1.01)


@bug(*PAIRS)
def dequantised_with_another_scale(site: Site) -> None:
    """A scale is a hundredth too large on one side of the pair."""
    _, second = _quantised_activation(site)
    site.own(second, 1, (site.value(second.input[1]) * 1.01).astype(_kind(site, second)))


@bug(*PAIRS)
def scale_of_the_neighbour(site: Site) -> None:
    """A tensor has the scale of the one before it."""
    found = site.nodes("QuantizeLinear")
    if len(found) < 2:
        raise DoesNotApply
    place = site.random.randrange(1, len(found))
    site.put(found[place].input[1], site.value(found[place - 1].input[1]))


@bug(*PAIRS)
def scale_of_half_the_range(site: Site) -> None:
    """A scale is half of what it should be, so that the largest values saturate."""
    first, _ = _quantised_activation(site)
    site.edit(first.input[1], lambda scale: scale / 2)


@bug(*INT8)
def zero_point_off_by_one(site: Site) -> None:
    """A tensor's zero point is 1 where it is dequantised, and 0 where it is quantised."""
    _, second = _quantised_activation(site)
    site.own(second, 2, np.array(1, dtype=np.int8))


@bug(*INT8)
def zero_point_off_by_one_on_both_sides(site: Site) -> None:
    """A tensor's zero point is 1 on both sides: the same, but for the largest value there is."""
    first, _ = _quantised_activation(site)
    site.edit(first.input[2], lambda zero: zero + 1)


@bug(*WEIGHTS)
def weights_zero_point_off_by_one(site: Site) -> None:
    """One channel's weights have the zero point 1."""
    node = weights_of(site)

    def change(zero: Array) -> Array:
        zero[site.random.randrange(len(zero))] = 1
        return zero

    site.edit(node.input[2], change)


@bug(*SCALES)
def weights_scale_off_by_one_step(site: Site) -> None:
    """One channel's scale is amax/128 where it should be amax/127."""
    node = weights_of(site)

    def change(scale: Array) -> Array:
        scale[site.random.randrange(len(scale))] *= 127 / 128
        return scale

    site.edit(node.input[1], change)


@bug(*SCALES)
def weights_scales_for_127_and_128_steps(site: Site) -> None:
    """All of a layer's scales are amax/128 where they should be amax/127."""
    site.edit(weights_of(site).input[1], lambda scale: scale * (127 / 128))


@bug(*SCALES)
def weights_scales_swapped(site: Site) -> None:
    """Two channels have each other's scale."""
    name = weights_of(site).input[1]
    count = len(site.value(name))
    if count < 2:
        raise DoesNotApply
    one, other = site.random.sample(range(count), 2)

    def change(scale: Array) -> Array:
        scale[[one, other]] = scale[[other, one]]
        return scale

    site.edit(name, change)


@bug(*SCALES)
def scales_along_the_wrong_axis(site: Site) -> None:
    """Scales go along the input channels where a layer has as many of both."""
    square = lambda v: v.ndim > 1 and v.shape[0] == v.shape[1] > 1  # noqa: E731 - said once
    node = site.node(
        "DequantizeLinear",
        where=lambda n: site.has(n.input[0]) and square(site.value(n.input[0])),
    )
    set_attribute(node, "axis", 1)


# ── Integers ────────────────────────────────────────────────────────────────────────


def requantise(
    site: Site, change: Callable[[Array], Array], stored: Callable[[Array], Array]
) -> None:
    """Change a layer's weights in their steps, before they are rounded and ``stored`` again.

    They are taken from the FP32 graph, since what they were is lost.
    """
    node = weights_of(site)
    layer = site.readers(node.output[0])[0]
    source = next(n for n in site.case.source.graph.node if n.name == layer.name)
    tensors = {t.name: t for t in site.case.source.graph.initializer}
    weights = onnx.numpy_helper.to_array(tensors[source.input[1]]).astype(np.float64)
    scale = site.value(node.input[1]).astype(np.float64).reshape(-1, *[1] * (weights.ndim - 1))
    site.put(node.input[0], stored(change(weights / scale)))


def _requantised(site: Site, change: Callable[[Array], Array]) -> None:
    requantise(site, change, lambda steps: np.clip(steps, -128, 127).astype(np.int8))


@bug(*WEIGHTS)
def weights_rounded_toward_zero(site: Site) -> None:
    """Weights are cut to integers, where they should be rounded."""
    _requantised(site, np.trunc)


@bug(*WEIGHTS)
def weights_rounded_down(site: Site) -> None:
    """Weights are rounded down, which moves every sum the same way."""
    _requantised(site, np.floor)


@bug(*WEIGHTS)
def weights_saturate_at_63(site: Site) -> None:
    """Weights have 7 bits, as processors without VNNI want them, and scales for 8."""
    _requantised(site, lambda steps: np.clip(np.rint(steps), -64, 63))


@bug(*WEIGHTS)
def weights_wrap_around(site: Site) -> None:
    """The largest weights become the smallest: 128 does not fit, and wraps to −128."""

    def change(steps: Array) -> Array:
        whole = np.rint(steps * (128 / 127))
        return (whole + 128) % 256 - 128

    _requantised(site, change)


@bug(*WEIGHTS)
def weights_of_4_bits(site: Site) -> None:
    """Weights keep the upper four of their eight bits."""
    _requantised(site, lambda steps: np.rint(steps / 16) * 16)


@bug(*WEIGHTS)
def one_scale_for_all_channels(site: Site) -> None:
    """A layer's weights are quantised per tensor where they should be per channel."""
    node = weights_of(site)
    scale = site.value(node.input[1])
    largest = scale.max()

    def change(steps: Array) -> Array:
        return np.rint(
            steps * (scale.astype(np.float64) / largest).reshape(-1, *[1] * (steps.ndim - 1))
        )

    _requantised_at(site, node, change)
    site.put(node.input[1], np.full_like(scale, largest))


@bug(*WEIGHTS)
def one_integer_off_by_one(site: Site) -> None:
    """One integer weight is the next one."""
    node = weights_of(site)

    def change(weights: Array) -> Array:
        place = site.random.randrange(weights.size)
        weights.flat[place] += 1 if weights.flat[place] < 127 else -1
        return weights

    site.edit(node.input[0], change)


@bug(*SCALES)
def integers_of_two_channels_swapped(site: Site) -> None:
    """Two channels have each other's integers, and scales of their own."""
    name = weights_of(site).input[0]
    count = len(site.value(name))
    if count < 2:
        raise DoesNotApply
    one, other = site.random.sample(range(count), 2)

    def change(weights: Array) -> Array:
        weights[[one, other]] = weights[[other, one]]
        return weights

    site.edit(name, change)


@bug(*PAIRS)
def pair_missing(site: Site) -> None:
    """A layer reads its input as it is, unquantised."""
    first, second = _quantised_activation(site)
    source = first.input[0]
    for reader in site.readers(second.output[0]):
        reader.input[:] = [source if n == second.output[0] else n for n in reader.input]
    site.graph.node.remove(second)
    site.graph.node.remove(first)


@bug(*INT8)
def unsigned_where_signed(site: Site) -> None:
    """A tensor with negative values is quantised to UINT8, and loses them."""
    zeros = [n for n in site.nodes("QuantizeLinear") if _reads_signed(site, n)]
    first = site.pick(zeros)
    site.put(first.input[2], np.array(0, dtype=np.uint8))


@bug(*INT8)
def biases_in_steps_of_256(site: Site) -> None:
    """A layer's bias is held in 24 bits too few, and loses what is below 256 steps."""
    places = list(_quantised_layers(site))
    layer, steps = site.pick(places)
    wide = 256 * steps
    site.edit(layer.input[2], lambda bias: np.rint(bias / wide) * wide)


@bug("int8 around fp16")
def halves_run_by_default_optimisations(site: Site) -> None:
    """ONNX Runtime's default optimisations hold biases in steps of sₓ·s_w, and divide in half.

    Where a bias is more than 65504 steps, half has no such number, and it becomes infinite.
    """
    if not any((abs(site.value(n.input[2])) > 65504 * s).any() for n, s in _quantised_layers(site)):
        raise DoesNotApply
    site.as_written = False


# ── What they need ──────────────────────────────────────────────────────────────────


def _quantised_layers(site: Site) -> Iterator[tuple[onnx.NodeProto, Array]]:
    """Yield each quantised layer with a bias, and the steps sₓ·s_w of its sums."""
    for node in site.nodes("Conv"):
        pairs = [site.writer(name) for name in node.input[:2]]
        kinds = [pair is not None and pair.op_type == "DequantizeLinear" for pair in pairs]
        if all(kinds) and len(node.input) > 2:
            scales = [site.value(pair.input[1]).astype(np.float64) for pair in pairs if pair]
            yield node, scales[0] * scales[1]


def _reads_signed(site: Site, node: onnx.NodeProto) -> bool:
    """Return whether what a node reads is negative anywhere on the samples that are judged."""
    feed = {"input": torch.from_numpy(site.case.truth.inputs)}
    values = site.case.emulator.run(feed, watch=[node.input[0]])
    return bool(values[node.input[0]].min() < 0)


def _requantised_at(site: Site, node: onnx.NodeProto, change: Callable[[Array], Array]) -> None:
    """Change the integers of one layer's weights, in their steps."""
    site.edit(node.input[0], lambda weights: change(weights.astype(np.float64)))


def _kind(site: Site, node: onnx.NodeProto) -> np.dtype[np.generic]:
    """Return the type of a node's scale."""
    return site.value(node.input[1]).dtype
