"""The result as Markdown, and as JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any, NamedTuple

from quantization.compare import FEW, TARGETS, Few, Peer, Race, Versus
from quantization.measure import Score


class Result(NamedTuple):
    """Everything that was measured, on what, and with which versions."""

    date: str
    environment: dict[str, str]
    versions: dict[str, str]
    ours: dict[str, dict[str, Any]]
    versus: tuple[Versus, ...]
    peers: tuple[Peer, ...]
    few: tuple[Few, ...]
    races: tuple[Race, ...]


def as_json(result: Result) -> str:
    plain = {
        key: [_plain(row) for row in value] if isinstance(value, tuple) else value
        for key, value in result._asdict().items()
    }
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def _plain(row: Any) -> dict[str, Any]:
    named = {
        key: value._asdict() if isinstance(value, Score) else value
        for key, value in row._asdict().items()
    }
    return named | {key: getattr(row, key) for key in ("gain", "ratio") if hasattr(row, key)}


def as_markdown(result: Result) -> str:
    lines = [
        f"# INT8 against its peers, {result.date}",
        "",
        "SQNR of the logits against the float64 network in dB, and agreement of the labels with "
        "its, on 360 held-out digits. Symmetric INT8, weights per channel, biases in float. "
        "Graphs are run in ONNX Runtime as they are written, OpenVINO's in OpenVINO.",
        "",
        *_same_tensors(result.versus),
        *_as_they_come(result.peers),
        *(_few(result.few) if result.few else ()),
        *(_races(result.races) if result.races else ()),
        "## What with",
        "",
        *(f"- ours, `{name}`: {_options(options)}" for name, options in result.ours.items()),
        "- peers: " + ", ".join(f"{tool} {number}" for tool, number in result.versions.items()),
        "- here: " + ", ".join(f"{key} {value}" for key, value in result.environment.items()),
        "",
    ]
    return "\n".join(lines)


def _same_tensors(rows: Sequence[Versus]) -> Iterator[str]:
    yield "## At the same set of quantised tensors"
    yield ""
    yield (
        "The best peer is the best on the held-out images of all settings whose file TensorRT "
        "takes and whose pairs include ours; its other pairs are taken out. "
        f"Built: by TensorRT-RTX for {', '.join(TARGETS)}, ours / the peer's."
    )
    yield ""
    yield from _head(
        "network", "setting", "inputs quantised", "ours", "best peer", "", "gain", "built", "s"
    )
    for row in rows:
        gain = "–" if row.gain is None else f"**{row.gain:+.2f}**"
        yield _row(
            row.network,
            row.setting,
            row.quantised,
            _score(row.score),
            _score(row.peer_score),
            row.peer or "none quantises all of these",
            gain,
            f"{row.built or '–'} / {row.peer_built or '–'}",
            f"{row.seconds:.1f}",
        )
    yield ""


def _as_they_come(rows: Sequence[Peer]) -> Iterator[str]:
    yield "## The peers as they come"
    yield ""
    yield "Seconds are calibration and quantisation, imports not counted; one thread, shared cores."
    yield ""
    yield from _head("network", "setting", "SQNR / agreement", "inputs quantised", "TensorRT", "s")
    for row in rows:
        valid = "; ".join(row.invalid) or row.built or "not built"
        yield _row(
            row.network,
            row.setting,
            _score(row.score) if row.refused is None else f"refused: {row.refused}",
            row.quantised or "–",
            valid if row.refused is None else "–",
            "–" if row.seconds is None else f"{row.seconds:.1f}",
        )
    yield ""


def _few(rows: Sequence[Few]) -> Iterator[str]:
    yield f"## With {FEW} calibration images"
    yield ""
    yield "Against ONNX Runtime's min-max at the same tensors, on the same draws."
    yield ""
    yield from _head("network", "setting", "draws", "ours", "min-max", "worst difference")
    for key in dict.fromkeys((row.network, row.setting) for row in rows):
        draws = [row for row in rows if (row.network, row.setting) == key]
        yield _row(
            *key,
            str(len(draws)),
            _spread([row.score.sqnr for row in draws]),
            _spread([row.peer_score.sqnr for row in draws]),
            f"{min(row.score.sqnr - row.peer_score.sqnr for row in draws):+.2f}",
        )
    yield ""


def _races(rows: Sequence[Race]) -> Iterator[str]:
    yield "## Time of a whole conversion, calibration included"
    yield ""
    yield "In turn, so that other load meets both alike; the ratio is the median of the rounds."
    yield ""
    yield from _head("network", "setting", "ours, s", "peer", "peer, s", "ours / peer")
    for row in rows:
        yield _row(
            row.network,
            row.setting,
            ", ".join(f"{second:.1f}" for second in row.seconds),
            row.peer,
            ", ".join(f"{second:.1f}" for second in row.peer_seconds),
            f"{row.ratio:.2f}",
        )
    yield ""


def _head(*names: str) -> tuple[str, str]:
    return _row(*names), _row(*("---" for _ in names))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _score(score: Score | None) -> str:
    return "–" if score is None else f"{score.sqnr:.2f} / {score.agreement:.4f}"


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.2f} (worst {min(values):.2f})"


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in options.items()) or "defaults"
