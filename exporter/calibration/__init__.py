"""What the activations are like: one streaming pass over the calibration samples.

Every sample runs alone through the FP32 graph in ONNX Runtime, so the result cannot depend on a
batch size, and everything kept is a maximum, a count or an exact sum, so it cannot depend on the
order either; nor can the fold whose maxima a sample counts among, which its bytes decide. The
exception is the history of the scales, which shows how they came about.

Every float tensor of the graph gets a `Range`, and those that convolutions, products, sums and
averages read (`READERS`) get `Magnitudes`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from exporter.calibration.convergence import convergence
from exporter.calibration.statistics import FOLDS, Magnitudes, Range
from exporter.contracts import Advance, Statistics
from exporter.cores import usable_cores
from exporter.digests import folds
from exporter.errors import GraphError, InputRefused
from exporter.packing import pack
from exporter.records import Array, Feed

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

READERS = (  # of the tensors that are counted
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Concat", "LeakyRelu"),
    *("AveragePool", "GlobalAveragePool", "ReduceMean", "Sigmoid", "HardSigmoid", "HardSwish"),
)

__all__ = [
    "READERS",
    "Magnitudes",
    "Range",
    "calibrate",
    "convergence",
    "divided",
    "watched_tensors",
]


def watched_tensors(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the activations whose magnitudes matter: what convolutions, products and sums read."""
    constants = {tensor.name for tensor in model.graph.initializer}
    read = (name for node in model.graph.node if node.op_type in READERS for name in node.input)
    return tuple(dict.fromkeys(name for name in read if name and name not in constants))


def calibrate(
    model: onnx.ModelProto, feeds: Iterable[Feed], *, advance: Advance = lambda: None
) -> dict[str, Magnitudes | Range]:
    """Run the FP32 graph on every sample and return what each float tensor is like.

    A feed may have any number of samples; each runs alone, and ``advance`` is called after it. The
    first entries are the `watched_tensors`. The model is left as it was.

    Raises `InputRefused` if there is no sample or one is not finite, `GraphError` if an activation
    is not.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # samples run side by side instead
    session = ort.InferenceSession(
        _giving_all(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given, told = (
        [value.name for value in values if value.type == "tensor(float)"]
        for values in (session.get_inputs(), session.get_outputs())
    )
    written = [name for name in _written(model) if name in told]  # in the nodes' order
    floats = {*given, *written}
    watched = {name: Magnitudes() for name in watched_tensors(model) if name in floats}
    found: dict[str, Magnitudes | Range] = {**watched}
    found |= {name: Range() for name in (*given, *written) if name not in watched}
    count = 0
    for count, (sample, given_back) in enumerate(_given(session, written, feeds), 1):
        values = {name: sample[name] for name in given}
        values |= zip(written, given_back, strict=True)
        (fold,) = folds(pack(list(sample.values())), FOLDS)
        for name, value in values.items():
            found[name].add(value, fold)
            if not found[name].finite:
                raise _not_finite(model, name, count - 1)
        if count & (count - 1) == 0:
            _mark(watched)
        advance()
    if not count:
        raise InputRefused("there is no calibration data")
    if count & (count - 1):
        _mark(watched)
    return found


def divided(
    whole: Statistics, counted: Mapping[str, Magnitudes | Range], divisors: Mapping[str, Array]
) -> dict[str, Magnitudes | Range]:
    """Return what the tensors are like that were divided channel by channel, by (C,) numbers.

    Largest magnitudes and powers are those that ``whole`` knows of the undivided tensors, and the
    counts, which cannot be had from its, are ``counted`` on some of the samples.
    """
    return {
        name: seen.divided(whole[name], divisors.get(name, 1.0)) if name in whole else seen
        for name, seen in counted.items()
    }


def _giving_all(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every tensor that a node writes among its outputs."""
    import onnx

    giving = onnx.ModelProto()
    giving.CopyFrom(model)
    known = {value.name for value in giving.graph.output}
    giving.graph.output.extend(
        onnx.ValueInfoProto(name=name)  # the type is ONNX Runtime's to find
        for name in _written(model)
        if name not in known
    )
    return giving


def _written(model: onnx.ModelProto) -> list[str]:
    """Return the tensors that nodes write, each after those it is computed from."""
    return [name for node in model.graph.node for name in node.output if name]


def _one_by_one(feeds: Iterable[Feed]) -> Iterator[Feed]:
    """Yield each sample of each feed as a feed of its own."""
    for feed in feeds:
        sizes = {len(values) for values in feed.values()}
        if len(sizes) > 1:
            raise InputRefused(f"the inputs of one feed have {sorted(sizes)} samples")
        for index in range(*sizes):
            yield {name: values[index : index + 1] for name, values in feed.items()}


def _given(
    session: ort.InferenceSession, wanted: list[str], feeds: Iterable[Feed]
) -> Iterator[tuple[Feed, list[Array]]]:
    """Yield each sample and what the session gives for it, while the next ones run.

    Twice as many wait as run, so that none idles while one is looked at.
    """
    workers = usable_cores()
    running: deque[tuple[Feed, Future[list[Array]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for sample in _one_by_one(feeds):
            running.append((sample, pool.submit(session.run, wanted, dict(sample))))
            if len(running) > 2 * workers:
                before, made = running.popleft()
                yield before, made.result()
        for before, made in running:
            yield before, made.result()


def _mark(watched: Mapping[str, Magnitudes]) -> None:
    for seen in watched.values():
        seen.mark()


def _not_finite(model: onnx.ModelProto, name: str, index: int) -> GraphError | InputRefused:
    layer = next((node.name for node in model.graph.node if name in node.output), None)
    if layer is None:
        return InputRefused(f"calibration sample {index} holds NaN or infinite values")
    return GraphError(
        f"in float32 the network's {layer!r} gives NaN or infinite values on calibration sample "
        f"{index}"
    )
