"""Bugs of the conversion to FP8, made in graphs that are converted already."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import torch

from exporter.precisions._qdq import FP8, INT8, e4m3_widths
from exporter.records import Array
from mutation.bugs.precision import requantise, weights_of
from mutation.bugs.site import DoesNotApply, Site, bug, set_attribute

FLOAT8 = ("fp8", "fp8 around fp16")


def _rounded_otherwise(site: Site, change: Callable[[Array], Array]) -> None:
    requantise(site, change, FP8.stored)


@bug(*FLOAT8)
def float8_weights_rounded_toward_zero(site: Site) -> None:
    """Weights are cut to four significant bits, where they should be rounded."""
    _rounded_otherwise(site, lambda w: np.trunc(w / e4m3_widths(w)) * e4m3_widths(w))


@bug(*FLOAT8)
def float8_weights_that_were_e5m2(site: Site) -> None:
    """Weights have the three significant bits of the other FP8."""
    _rounded_otherwise(site, lambda w: torch.from_numpy(w).to(torch.float8_e5m2).double().numpy())


@bug(*FLOAT8)
def float8_weights_that_were_int8(site: Site) -> None:
    """Weights went through INT8, whose steps are the same everywhere."""

    def change(weights: Array) -> Array:
        steps = INT8.largest / FP8.largest
        return INT8.stored(weights * steps).astype(np.float64) / steps

    _rounded_otherwise(site, change)


@bug(*FLOAT8)
def float8_weights_without_subnormals(site: Site) -> None:
    """Weights below 2⁻⁶ of their scale are taken for zero."""
    _rounded_otherwise(site, lambda weights: np.where(np.abs(weights) < 2.0**-6, 0, weights))


@bug(*FLOAT8)
def one_float8_off_by_one(site: Site) -> None:
    """One weight is the next number of FP8."""
    name = weights_of(site).input[0]

    def change(weights: Array) -> Array:
        codes = weights.view(np.uint8)
        place = site.random.randrange(weights.size)
        codes.flat[place] ^= 1
        return codes.view(weights.dtype)

    site.edit(name, change)


@bug(*FLOAT8)
def float8_scale_for_240(site: Site) -> None:
    """A scale is amax/240, for the FP8 of other makers, whose largest number that is."""
    first = site.node("QuantizeLinear")
    site.edit(first.input[1], lambda scale: scale.astype(np.float64) * (448 / 240))


@bug(*FLOAT8)
def float8_activations_in_e5m2(site: Site) -> None:
    """A tensor is quantised to the other FP8."""
    first = site.node("QuantizeLinear")
    kind = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.FLOAT8E5M2)
    site.put(first.input[2], np.zeros((), kind))


@bug(*FLOAT8)
def float8_does_not_saturate(site: Site) -> None:
    """What lies beyond 448 is no number; on the samples that are judged, there is some."""
    first = site.node("QuantizeLinear", where=lambda node: _overflows(site, node))
    set_attribute(first, "saturate", 0)


@bug("fp8")
def float8_run_by_default_optimisations(site: Site) -> None:
    """ONNX Runtime's default optimisations drop the ReLUs in front of quantisers."""
    if not site.nodes("Relu", where=lambda n: _is_quantised(site, n.output[0])):
        raise DoesNotApply
    site.as_written = False


def _is_quantised(site: Site, name: str) -> bool:
    return any(reader.op_type == "QuantizeLinear" for reader in site.readers(name))


def _overflows(site: Site, node: onnx.NodeProto) -> bool:
    """Return whether a node reads more than 500 of its steps.

    What rounds to 480 ONNX Runtime holds as 448, told to saturate or not.
    """
    feed = {"input": torch.from_numpy(site.case.truth.inputs)}
    values = site.case.emulator.run(feed, watch=[node.input[0]])[node.input[0]]
    steps = float(values.abs().max()) / float(site.value(node.input[1]).max())
    return steps > 500
