"""8-bit integers, as explicit quantise/dequantise pairs: the form that TensorRT 11 takes.

    activations  per tensor,       q = clip(rint(x / s), −128, 127),  s = amax / 127
    weights      per out channel,  q = clip(rint(w / s), −127, 127),  s = max |w| / 127

What is never negative, or reaches further on one side, uses all 256 steps, with an offset taken off
in one bias and put back in the next (`_offset`). Zero point 0, biases left in float. Pairs stand
where TensorRT documents them ("Working with quantized types", explicit quantisation): on the input
and the weights of every convolution, not on its output, and on the identity branch of a residual
sum, so that convolution, bias, sum and ReLU can become one integer kernel. Linear layers are left
in float unless asked for: they are a negligible part of the work and cost accuracy. (TensorRT
fuses; whether a runtime gains speed from INT8 is measured, not assumed.)

That is the form "tensorrt". ONNX Runtime runs few layers of it in integers; "onnxruntime" is the
form that it runs in integers throughout (`_integers`), which TensorRT does not take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from exporter.calibrators import PERCENTILE, threshold
from exporter.contracts import (
    Converted,
    Plugin,
    Progress,
    Statistics,
    TensorStatistics,
    silent,
)
from exporter.errors import GraphError
from exporter.onnx_edits import replace_constants
from exporter.precisions._half import check_half_io, in_halves
from exporter.precisions._integers import Integers
from exporter.precisions._offset import Offsets
from exporter.precisions._qdq import (
    INT8,
    Pairs,
    check_sums,
    coverage,
    layers_to_quantise,
    sound_scale,
)
from exporter.records import Array, Ranges
from exporter.steps import LOW, Held, levels, steps_for

if TYPE_CHECKING:
    import onnx

    from exporter.quantisation.plan import Plan


# ONNX Runtime's documentation, "Quantize ONNX models".
NO_VNNI = (
    "on x86 CPUs without VNNI, ONNX Runtime adds up pairs of products in 16 bits, which may "
    "saturate; there, judge this graph on that machine"
)


class Int8(Plugin, frozen=True):
    """Symmetric INT8: weights per channel, activations calibrated per tensor.

    ``calibrator`` is one of `exporter.calibrators` (``percentile`` % for the one of that name), or
    ``"auto"``: the maximum, but where another is measurably better for a tensor. ``equalise``,
    ``rounding`` and ``bias_correction`` allow the repairs of `exporter.quantisation`, each used
    where it measurably helps. ``form`` is the runtime whose integer kernels the pairs are placed
    for: ``"onnxruntime"`` has UINT8 activations, and quantises all that its operators read.
    ``around`` is the type of what is not quantised; ``linear`` quantises linear layers too,
    ``residual`` the identity branch of a residual sum. ``offset`` says in front of what a tensor
    whose range does not have 0 in its middle uses all steps: also of convolutions that pad
    (``"padded"``), only where no pad has to be added (``"free"``), or ``"none"``; UINT8 has no need
    of it. ``keep`` names
    layers, as in the PyTorch module, that stay in float; ``half_io`` makes input and output half
    where ``around`` is.
    """

    calibrator: Literal["auto", "max", "percentile", "mse", "entropy"] = "auto"
    percentile: float = 99.999
    equalise: bool = True
    rounding: bool = True
    bias_correction: bool = True
    form: Literal["tensorrt", "onnxruntime"] = "tensorrt"
    around: Literal["fp32", "fp16"] = "fp32"
    linear: bool = False
    residual: bool = True
    offset: Literal["none", "free", "padded"] = "padded"
    keep: tuple[str, ...] = ()
    half_io: bool = False

    needs_calibration: ClassVar[bool] = True

    RANGES: ClassVar[Ranges] = {"percentile": PERCENTILE}

    def __post_init__(self) -> None:
        Plugin.__post_init__(self)
        check_half_io(self.around, half_io=self.half_io)
        if self.form == "onnxruntime" and self.around != "fp32":
            raise ValueError(f'form = "onnxruntime" needs around = "fp32", found {self.around!r}')
        if self.form == "onnxruntime" and not self.residual:
            raise ValueError('form = "onnxruntime" quantises every sum: residual cannot be false')

    def convert(
        self,
        model: onnx.ModelProto,
        statistics: Statistics,
        samples: Array,
        *,
        progress: Progress = silent,
    ) -> Converted:
        import onnx

        layers = layers_to_quantise(model.graph, linear=self.linear, keep=self.keep)
        places = self._places(model, layers)
        plan = self._plan(model, places, statistics, samples, progress)
        quantised = onnx.ModelProto()
        quantised.CopyFrom(model if plan is None else plan.model)
        chosen = {node.name: node for node in quantised.graph.node if node.name in places.layers}
        writer = self._places(quantised, chosen)
        if isinstance(writer, Integers):
            self._quantise_all(writer, plan, statistics)
        else:
            self._quantise(writer, plan, statistics)
        writer.write()
        notes: tuple[str, ...] = (coverage(model.graph, writer.layers, INT8.name, self.around),)
        if self.form == "onnxruntime":
            notes += (NO_VNNI,)
        offsets = writer.computed if isinstance(writer, Offsets) else {}
        made = Converted(quantised, notes, offsets=offsets)
        if plan is not None:
            made = made._replace(repairs=plan.repairs, tensors=plan.tensors, divisors=plan.divisors)
        known = statistics if plan is None else plan.statistics
        return in_halves(
            made,
            self.around,
            half_io=self.half_io,
            statistics={**known, **_less_offsets(known, offsets)},
            samples=samples,
        )

    def _places(self, model: onnx.ModelProto, layers: dict[str, onnx.NodeProto]) -> Pairs:
        """Return where the pairs stand, in the form asked for."""
        from exporter.calibration import watched_tensors

        if self.form == "tensorrt":
            if self.offset == "none":
                return Pairs(model.graph, layers, INT8, residual=self.residual)
            pad = self.offset == "padded"
            return Offsets(model.graph, layers, residual=self.residual, pad=pad)
        return Integers(model.graph, layers, watched_tensors(model))

    def _quantise(self, writer: Pairs, plan: Plan | None, statistics: Statistics) -> None:
        for name in writer.activations():
            held = self._steps(writer, name, statistics[name]) if plan is None else plan.steps[name]
            scale = sound_scale(name, held.width, statistics[name].amax)
            writer.quantise_activation(name, scale)
            if isinstance(writer, Offsets):
                writer.offset(name, held._replace(width=scale))
        for layer, whole in writer.quantise_weights(None if plan is None else plan.stored).items():
            check_sums(layer, whole, 128)
        if plan is not None:
            replace_constants(writer.graph, plan.biases)

    def _steps(self, writer: Pairs, name: str, seen: TensorStatistics) -> Held:
        """Return a tensor's steps where nothing is chosen by measurement."""
        import numpy as np

        kind = writer.kinds.get(name, "signed")
        if self.calibrator == "max":
            return steps_for(kind, seen.channel_low, seen.channel_high, seen.samples)
        above = levels(kind)
        reached = threshold(self.calibrator, seen, self.percentile, levels=above)
        return Held(reached / above, np.array(-LOW if kind == "unsigned" else 0))

    def _quantise_all(self, writer: Integers, plan: Plan | None, statistics: Statistics) -> None:
        def reach(name: str) -> float | None:
            above = levels(writer.kinds.get(name, "signed"))
            if plan is not None:
                return plan.steps[name].width * above if name in plan.steps else None
            return threshold(self.calibrator, statistics[name], self.percentile, levels=above)

        if plan is None:
            writer.quantise(reach, {}, {})
        else:
            writer.quantise(reach, plan.stored, plan.biases)

    def _plan(
        self,
        model: onnx.ModelProto,
        places: Pairs,
        statistics: Statistics,
        samples: Array,
        progress: Progress,
    ) -> Plan | None:
        """Return how to quantise with repairs, or None where nothing is to be chosen."""
        from exporter.calibration import calibrate, divided
        from exporter.packing import inputs_of_graph
        from exporter.quantisation.network import Network
        from exporter.quantisation.plan import ENOUGH, Switches, make_plan
        from exporter.samples import feeds

        repairs = self.equalise or self.rounding or self.bias_correction
        if not (repairs or self.calibrator == "auto") or not places.layers:
            return None
        if len(samples) < ENOUGH:
            raise GraphError(
                f"{len(samples)} calibration samples are too few to choose by, {ENOUGH} are needed",
                hint='give more, or set calibrator = "max" and equalise, rounding and '
                "bias_correction to false",
            )

        def recalibrate(
            counted: Array, equalised: onnx.ModelProto, divisors: Mapping[str, Array]
        ) -> Statistics:
            given = feeds(counted, inputs_of_graph(equalised), size=1)
            with progress("int8: calibrate the equalised network", len(counted)) as advance:
                return divided(statistics, calibrate(equalised, given, advance=advance), divisors)

        return make_plan(
            Network.of(model, places.sites(), list(places.layers), places.kinds),
            statistics,
            samples,
            Switches(
                calibrator=self.calibrator,
                percentile=self.percentile,
                equalise=self.equalise,
                rounding=self.rounding,
                bias_correction=self.bias_correction,
            ),
            recalibrate=recalibrate,
            progress=progress,
        )


def _less_offsets(
    statistics: Statistics, offsets: Mapping[str, tuple[str, Array]]
) -> dict[str, TensorStatistics]:
    """Return the ranges of tensors that are another less a constant."""
    import numpy as np

    from exporter.calibration import Range

    found: dict[str, TensorStatistics] = {}
    for name, (old, constant) in offsets.items():
        if old in statistics:
            low, high = statistics[old].channel_low, statistics[old].channel_high
            below, above = ((side - constant).astype(np.float32)[None] for side in (low, high))
            found[name] = Range(below, above, statistics[old].samples)
    return found


PLUGIN = Int8
