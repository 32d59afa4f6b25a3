"""Ours against the peers: as they come, at the same tensors, with few images, and in time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import onnx

import exporter
from exporter.records import BatchRange, OnnxModel, TensorSpec
from exporter.samples import draw, load_split
from quantization import ours, peers
from quantization.measure import Score, score_file, score_graph
from quantization.networks import CACHE, Network
from quantization.sites import placement, problems, reduced

FEW = 16
TARGETS = ("sm80", "sm86", "sm89", "sm120")


class Peer(NamedTuple):
    """A peer's file as it comes. ``quantised`` is where, ``invalid`` why TensorRT is out."""

    network: str
    setting: str
    seconds: float | None = None
    score: Score | None = None
    quantised: str = ""
    invalid: tuple[str, ...] = ()
    built: str = ""
    refused: str | None = None


class Versus(NamedTuple):
    """A row of ours and the best peer at its set of quantised tensors; none has all of them."""

    network: str
    setting: str
    quantised: str
    seconds: float
    score: Score
    built: str
    peer: str | None = None
    peer_score: Score | None = None
    peer_built: str = ""

    @property
    def gain(self) -> float | None:
        return None if self.peer_score is None else self.score.sqnr - self.peer_score.sqnr


class Few(NamedTuple):
    """One draw of few calibration images: ours, and ONNX Runtime's min-max at the same tensors."""

    network: str
    setting: str
    seed: int
    score: Score
    peer_score: Score


class Race(NamedTuple):
    """Seconds of whole conversions, one after the other in turn."""

    network: str
    setting: str
    peer: str
    seconds: tuple[float, ...]
    peer_seconds: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Return the median of ours / the peer's, round by round."""
        pairs = zip(self.seconds, self.peer_seconds, strict=True)
        return median(mine / theirs for mine, theirs in pairs)


def judge_peers(
    network: Network,
    settings: Sequence[str],
    versions: dict[str, str],
    *,
    threads: int,
    build: bool,
) -> Iterator[tuple[Peer, onnx.ModelProto | None]]:
    """Yield each peer's row, and its graph where that can be compared with ours."""
    for setting in settings:
        made = peers.make(setting, network, versions, threads=threads)
        row = Peer(network.name, setting, made.seconds, refused=made.refused)
        if made.path is None:
            yield row, None
        elif made.path.suffix == ".xml":
            score = score_file(made.path, network, peers.evaluate)
            yield row._replace(score=score, invalid=("an OpenVINO model",)), None
        else:
            model = onnx.load(made.path)
            why = problems(model)
            row = row._replace(
                score=score_graph(model, network),
                quantised=str(placement(model)),
                invalid=why,
                built=try_build(model, network) if build and not why else "",
            )
            yield row, None if why else model


def versus(
    network: Network,
    setting: ours.Setting,
    candidates: dict[str, onnx.ModelProto],
    *,
    build: bool,
) -> Versus:
    """Return a row of ours beside the best of the candidates at the same tensors.

    The best is chosen on the held-out images, which favours the peer.
    """
    mine = ours.converted(setting, network)
    where = placement(mine.model)
    float32 = onnx.load(network.graph)
    same = {
        name: reduced(model, where.places, float32)
        for name, model in candidates.items()
        if placement(model).places >= where.places
    }
    scores = {name: score_graph(model, network) for name, model in same.items()}
    row = Versus(
        network.name,
        setting.name,
        str(where),
        mine.seconds,
        score_graph(mine.model, network),
        try_build(mine.model, network) if build else "",
    )
    if not scores:
        return row
    best = max(scores, key=lambda name: scores[name].sqnr)
    built = try_build(same[best], network) if build else ""
    return row._replace(peer=best, peer_score=scores[best], peer_built=built)


def with_few_images(
    network: Network,
    setting: ours.Setting,
    versions: dict[str, str],
    *,
    seeds: Sequence[int],
    threads: int,
) -> Iterator[Few]:
    """Yield ours against ONNX Runtime's min-max, both calibrated on the same few images."""
    training = load_split("digits", network.input.shape, "train")
    float32 = onnx.load(network.graph)
    for seed in seeds:
        images = draw(training, count=FEW, seed=seed).inputs
        mine = ours.converted(setting, network, images).model
        given = network._replace(calibration=images)
        made = peers.make("ort-minmax-in+add", given, versions, threads=threads)
        if made.path is None:
            raise SystemExit(f"onnxruntime cannot quantise {network.name}: {made.refused}")
        theirs = reduced(onnx.load(made.path), placement(mine).places, float32)
        yield Few(
            network.name,
            setting.name,
            seed,
            score_graph(mine, network),
            score_graph(theirs, network),
        )


def race(network: Network, setting: ours.Setting, peer: str, *, rounds: int) -> Race:
    """Return the seconds of both, in turn, so that other load meets both alike."""
    mine, theirs = [], []
    with TemporaryDirectory() as folder:
        for _ in range(rounds):
            mine.append(ours.convert(setting, network).seconds)
            said = peers.quantise(peer, network, Path(folder, "out.onnx"))
            if "refused" in said:
                raise SystemExit(f"{peer} cannot quantise {network.name}: {said['refused']}")
            theirs.append(said["seconds"])
    return Race(network.name, setting.name, peer, tuple(mine), tuple(theirs))


def try_build(model: onnx.ModelProto, network: Network) -> str:
    """Return "yes" if TensorRT-RTX builds the graph for every target, or what it said, cached."""
    content = model.SerializeToString()
    key = hashlib.sha256(content + repr((TARGETS, exporter.__version__)).encode()).hexdigest()[:16]
    said = CACHE / "built" / f"{key}.txt"
    if not said.exists():
        said.parent.mkdir(parents=True, exist_ok=True)
        said.write_text(_build(content, network), "utf-8")
    return said.read_text("utf-8")


def _build(content: bytes, network: Network) -> str:
    runtime = exporter.load_runtime("tensorrt-rtx", {"targets": list(TARGETS)})
    if reason := runtime.missing("build"):
        return f"not checked: {reason}"
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(content)
        output = TensorSpec("logits", network.logits.shape[1:])
        asked = OnnxModel(path, "int8", network.input, output, BatchRange(1, 8, 32))
        try:
            runtime.build(asked, Path(folder))
        except exporter.ExportError as error:
            return f"no: {error}"
    return "yes"
