"""What is quantised how: chosen on samples that did not set the ranges it is judged with.

    1. channel factors (`equalisation`)  none, or p = 4, 8; and headroom h above the ranges
    2. thresholds, tensor by tensor      h · max, percentile, mean squared error, entropy
    3. weights (`repair`)                rounded to the nearest step, or to second order
    4. biases (`repair`)                 as they are, or corrected

1 is chosen by cross-validation: the samples are dealt into four folds, and each fold's outputs are
compared with the float network's under the ranges of the three others, so that what unseen inputs
do is in the choice. 2 to 4 are judged on samples that 3 and 4 do not see. Nothing
replaces the plainer form unless it is better by 0.1 dB, thresholds by 1 dB, and below 32 samples by
more than chance explains (one standard error of the paired differences).

The samples are taken in the order of their SHA-256, so that the order they come in does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from exporter.calibrators import CALIBRATORS, threshold
from exporter.contracts import Progress, Statistics
from exporter.digests import digests
from exporter.quantisation.equalisation import Factors, equalise
from exporter.quantisation.folds import Folds
from exporter.quantisation.groups import Groups
from exporter.quantisation.judge import CUT_GAIN, Judge, costs_less, nearest_weights
from exporter.quantisation.network import Network, Reference
from exporter.quantisation.observe import Observed, describe, measured_error, observe, peak
from exporter.quantisation.repair import Repaired, affordable, repair, rounded
from exporter.records import Quantised, Repair
from exporter.steps import Held, Steps, levels

if TYPE_CHECKING:
    import onnx

    from exporter.records import Array

Recalibrate: TypeAlias = Callable[["Array", "onnx.ModelProto", Mapping[str, "Array"]], Statistics]

ENOUGH = 8  # samples below which nothing can be chosen by measurement
_MOST = 256  # samples looked at, beside what calibration saw of all
_JUDGED = 32  # samples that every choice but the first is judged on; a quarter, if those are fewer
_PROBED = 16  # samples that are run backwards
_DESCRIBED = 8  # samples that the result is described on
_FITTED = 32  # samples that weights and biases are fitted to
_COUNTED = 16  # samples whose magnitudes are counted anew where channels were divided


@dataclass(frozen=True, slots=True)
class Switches:
    """What may be used: the options of the same names of `exporter.precisions.int8`."""

    calibrator: str
    percentile: float
    equalise: bool
    rounding: bool
    bias_correction: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """A float graph to be quantised, and how.

    ``model`` is the FP32 graph, equalised or as it was, ``statistics`` are its own, ``divisors``
    what each of its tensors was divided by, (C,); ``steps`` are the activations', ``weights``
    whole numbers with ``scales`` (O,) per output channel, and ``biases`` replace the graph's.
    """

    model: onnx.ModelProto
    statistics: Statistics
    divisors: Mapping[str, Array]
    steps: Mapping[str, Held]
    weights: Mapping[str, Array]
    scales: Mapping[str, Array]
    biases: Mapping[str, Array]
    repairs: tuple[Repair, ...]
    tensors: tuple[Quantised, ...]

    @property
    def stored(self) -> dict[str, tuple[Array, Array]]:
        """Return weights and their scales, by name."""
        return {name: (weights, self.scales[name]) for name, weights in self.weights.items()}


def make_plan(
    network: Network,
    statistics: Statistics,
    samples: Array,
    switches: Switches,
    *,
    recalibrate: Recalibrate,
    progress: Progress,
) -> Plan:
    """Return the plan that is closest to the float network on samples it was not made from."""
    chosen = _in_order(samples)
    judged = min(_JUDGED, len(chosen) // 4)
    held, fit = chosen[:judged], chosen[judged:]
    reference = Reference(network, chosen)
    judge = Judge(held, reference.outputs(range(judged)))
    observed = observe(network, statistics, chosen[:_PROBED], progress=progress)
    state = _State(network, statistics, {}, {}, 1.0)
    state = replace(state, steps=state.largest())
    judge.first(network, state.steps)
    if switches.equalise:
        counted = chosen[:_COUNTED] if switches.calibrator in ("auto", "max") else samples
        again = partial(recalibrate, counted)
        state = _equalised(state, observed, chosen, reference, judge, again, progress)
    state = _thresholds(state, switches, held[:_PROBED], judge, progress)
    return _repaired(state, observed, fit, switches, judge, progress)


@dataclass(frozen=True, slots=True)
class _State:
    network: Network
    statistics: Statistics
    divisors: Mapping[str, Tensor]
    steps: Mapping[str, Steps]
    headroom: float

    def largest(self) -> dict[str, Steps]:
        """Return the steps that hold all that was seen, with the headroom."""
        return {
            name: self.network.steps(name, self.statistics[name], self.headroom)
            for name in self.network.tensors
        }


# ── Channel factors ─────────────────────────────────────────────────────────────────


def _equalised(
    state: _State,
    observed: Observed,
    samples: Array,
    reference: Reference,
    judge: Judge,
    recalibrate: Callable[[onnx.ModelProto, Mapping[str, Array]], Statistics],
    progress: Progress,
) -> _State:
    network = state.network
    groups = Groups.find(network, observed.shapes)
    if not any(groups.of(name) for name in network.tensors):
        judge.skips("equalise", "no tensor can be scaled by channel")
        return state
    factors = Factors(network, observed, groups)
    folds = Folds(network, observed, samples, groups, factors, reference)
    norm, headroom = folds.best(progress)
    if norm is None and headroom == 1:
        judge.skips("equalise", "no factors were better on the folds they were not taken from")
        return state
    detail = f"headroom {headroom:g}"
    divisors: dict[str, Tensor] = {}
    statistics = state.statistics
    if norm is not None:
        peaks = {
            name: peak(network, name, low.amin(dim=0), observed.high[name].amax(dim=0))
            for name, low in observed.low.items()
        }
        by_group = factors.best(peaks, norm)
        model, divisors = equalise(network, groups, by_group, observed.shapes)
        statistics = recalibrate(model, {n: s.numpy() for n, s in divisors.items()})
        names = [layer.name for layer in network.layers]
        network = Network.of(model, network.sites, names, network.kinds)
        detail = f"p = {norm:g}, {detail}, {len(by_group)} groups"
    new = _State(network, statistics, divisors, {}, headroom)
    new = replace(new, steps=new.largest())
    taken = judge.takes(
        "equalise", detail, judge.errors(network, new.steps, nearest_weights(network))
    )
    return new if taken else state


# ── Thresholds ──────────────────────────────────────────────────────────────────────


def _thresholds(
    state: _State, switches: Switches, samples: Array, judge: Judge, progress: Progress
) -> _State:
    """Return the state with the thresholds asked for, or each tensor's cheapest.

    Steps that do not have 0 in the middle, or at their end, are not cut short.
    """

    def cut(calibrator: str, tensor: str) -> Steps:
        above = levels(state.network.kind(tensor))
        seen = state.statistics[tensor]
        reached = threshold(calibrator, seen, switches.percentile, levels=above)
        return state.steps[tensor]._replace(width=reached / above)

    if switches.calibrator == "max":
        return state
    tensors = [name for name, steps in state.steps.items() if _is_plain(state.network, name, steps)]
    if switches.calibrator != "auto":
        return replace(
            state, steps={**state.steps, **{n: cut(switches.calibrator, n) for n in tensors}}
        )
    names = [name for name in CALIBRATORS if name != "max"]
    candidates = {
        tensor: [state.steps[tensor], *(cut(name, tensor) for name in names)] for tensor in tensors
    }
    steps, changed = dict(state.steps), []
    errors = measured_error(state.network, samples, candidates, progress=progress)
    for tensor, rows in errors.items():
        best = int(rows.mean(dim=1).argmin())
        if best and costs_less(rows[best], rows[0]):
            steps[tensor] = candidates[tensor][best]
            changed.append(f"{names[best - 1]} for {tensor}")
    if not changed:
        judge.skips("thresholds", "the largest magnitude is best for every tensor")
        return state
    now = judge.errors(state.network, steps, nearest_weights(state.network))
    taken = judge.takes("thresholds", ", ".join(changed), now, least=CUT_GAIN)
    return replace(state, steps=steps) if taken else state


def _is_plain(network: Network, tensor: str, steps: Steps) -> bool:
    return network.kind(tensor) == "unsigned" or (isinstance(steps.zero, int) and steps.zero == 0)


# ── Weights and biases ──────────────────────────────────────────────────────────────


def _repaired(
    state: _State,
    observed: Observed,
    samples: Array,
    switches: Switches,
    judge: Judge,
    progress: Progress,
) -> Plan:
    network = state.network
    samples = samples[: min(_FITTED, affordable(observed.shapes))]
    found = rounded(network)

    def attempt(what: str, *, rounding: bool) -> Repaired:
        with progress(f"int8: {what}", len(network.layers)) as advance:
            return repair(network, state.steps, samples, rounding=rounding, advance=advance)

    def takes(name: str, made: Repaired, *, biases: bool) -> bool:
        errors = judge.errors(network, state.steps, made.constants(biases=biases))
        return judge.takes(name, f"on {len(samples)} samples", errors)

    if switches.rounding:
        made = attempt("round weights to second order", rounding=True)
        if takes("rounding", made, biases=False):
            found = made
        if switches.bias_correction and takes("bias correction", made, biases=True):
            return _plan(state, made, judge, progress, biases=True)
    if switches.bias_correction and not found.biases:
        made = attempt("correct biases", rounding=False)
        if takes("bias correction alone", made, biases=True):
            return _plan(state, made, judge, progress, biases=True)
    return _plan(state, found, judge, progress, biases=False)


def _plan(
    state: _State, found: Repaired, judge: Judge, progress: Progress, *, biases: bool
) -> Plan:
    import numpy as np

    tensors = describe(
        state.network,
        judge.samples[:_DESCRIBED],
        state.steps,
        found.constants(biases=False),
        found.scales,
        statistics=state.statistics,
        progress=progress,
    )
    return Plan(
        model=state.network.model,
        statistics=state.statistics,
        divisors={name: s.numpy() for name, s in state.divisors.items()},
        steps={name: _held(steps) for name, steps in state.steps.items()},
        weights={name: w.numpy().astype(np.int8) for name, w in found.whole.items()},
        scales={name: s[:, 0].numpy() for name, s in found.scales.items()},
        biases={n: b.numpy() for n, b in found.biases.items()} if biases else {},
        repairs=tuple(judge.repairs),
        tensors=tensors,
    )


def _held(steps: Steps) -> Held:
    import numpy as np

    return Held(float(steps.width), np.asarray(steps.zero))


def _in_order(samples: Array) -> Array:
    """Return at most 256 samples in the order of their SHA-256."""
    found = digests(samples)
    return samples[sorted(range(len(samples)), key=found.__getitem__)[:_MOST]]
