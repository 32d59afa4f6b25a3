"""The benchmarks' own arithmetic: what is held against what; and a failure costs one part."""

from __future__ import annotations

import argparse
import json
import sys

import keep
import pipeline
import pytest
import suite
from test_renderers import report

from exporter.records import Stage

PEERS = {
    "torch.onnx.export": pipeline.Took(10.0, 6.0),
    "ModelOpt AutoCast": pipeline.Took(5.0, 2.0),
    "ModelOpt INT8, entropy": pipeline.Took(25.0, 22.0),
}
STAGES = (
    Stage("look at what was asked for", 1.0, "other", 100_000_000),
    Stage("fold BatchNorm", 2.0, "conversion", 200_000_000),
    Stage("export to ONNX", 4.0, "conversion", 300_000_000),
    Stage("run PyTorch in float64", 8.0, "evidence", 400_000_000),
    Stage("fp32: write", 0.5, "conversion", 300_000_000),
    Stage("calibrate on 256 samples", 3.0, "conversion", 300_000_000),
    Stage("fp16: convert", 1.5, "conversion", 300_000_000),
    Stage("int8: round weights to second order", 9.0, "conversion", 900_000_000),
    Stage("int8 on ort-cpu: compare every layer", 5.0, "evidence", 500_000_000),
    Stage("time 4 candidates at batch 1", 16.0, "latency", 500_000_000),
)
ASKED = argparse.Namespace(pixels=224, images=256, threads=2, others=0.25)


def one(ours: float = 60.0, *, slower: float = 1.0) -> pipeline.Round:
    stages = tuple(
        Stage(s.name, slower * s.seconds, s.part, int(slower * s.peak_bytes)) for s in STAGES
    )
    return pipeline.Round(ours, report(stages=stages), PEERS)


def ratios(rounds: list[pipeline.Round]) -> dict[str, float]:
    found = json.loads(pipeline.as_json(rounds, {}, {}, ASKED))
    return {what: spread["middle"] for what, spread in found["ratios"].items()}


# ── The time of an export ───────────────────────────────────────────────────────────


def test_like_is_held_against_like_and_the_whole_against_the_whole():
    """By hand: 60 / 40 of processes, 50 / 30 at work, 34 / 30 untimed; 6.5 + 1.5 + 12 convert."""
    found = ratios([one()])
    assert found["the whole export, as a command"] == pytest.approx(60 / 40)
    assert found["the whole export, started and imported"] == pytest.approx(50 / 30)
    untimed = next(ratio for what, ratio in found.items() if "without timing latency" in what)
    assert untimed == pytest.approx(34 / 30)
    assert found["like with like: conversion alone"] == pytest.approx(20 / 30)
    assert found["FP32, folded"] == pytest.approx(6.5 / 6)
    assert found["FP16"] == pytest.approx(1.5 / 2)
    assert found["INT8, with the calibration"] == pytest.approx(12 / 22)


def test_every_stage_of_conversion_is_some_artefacts_and_no_evidence_is():
    converting = [s for s in STAGES if s.part == "conversion"]
    assert sum(pipeline.converting(one(), name) for name in pipeline.ARTEFACTS) == sum(
        s.seconds for s in converting
    )
    assert pipeline.artefact_of(STAGES[8]) is None


def test_the_page_says_the_goal_the_certainty_and_what_disturbed():
    page = pipeline.as_markdown([one(), one(80.0, slower=2.0), one(30.0)], {}, {}, ASKED)
    assert "The goal for the whole is missed: 1.50 where 0.5 is the goal" in page
    assert "hold the median with 75.0%" in page  # 1 − 2^(1 − 3)
    assert "| 60.0 (30.0 to 80.0) | 40.0 (40.0 to 40.0) | 1.50 (0.75 to 2.00) |" in page
    assert "| latency | 16.0 (16.0 to 32.0) |" in page
    assert "| fold BatchNorm | conversion | 2.00 s | 4.0% | 400 MB |" in page  # the largest peak
    assert "in doubt: other processes took 25% of the processors" in page
    met = pipeline.as_markdown([one(10.0)], {}, {}, ASKED)
    assert "met: 0.25 where 0.5 is the goal" in met


def test_a_quiet_machine_is_in_no_doubt():
    for others in (None, 0.05):
        asked = argparse.Namespace(**{**vars(ASKED), "others": others})
        assert "in doubt" not in pipeline.as_markdown([one()], {}, {}, asked)


# ── The one report ──────────────────────────────────────────────────────────────────

WRITES = """
import argparse, keep
parser = argparse.ArgumentParser()
keep.add_options(parser)
record = '{"versions": {"peer": "1.2"}, "x": 3}'
keep.keep("good", "# Good\\n\\n## Part\\n", record, parser.parse_args())
"""
PARTS = (
    suite.Part("bad", ("-c", "import sys; print('why it failed', file=sys.stderr); sys.exit(3)")),
    suite.Part("silent", ("-c", "")),
    suite.Part("good", ("-c", WRITES)),
)


@pytest.fixture(scope="module")
def found() -> tuple[suite.Done, ...]:
    return tuple(suite.run_all(PARTS, quick=False))


def test_a_part_that_fails_is_named_and_does_not_stop_the_others(found):
    said = {part.name: part.failed for part in found}
    assert said == {
        "bad": "exit code 3: why it failed",
        "silent": "it ended well and left no result",
        "good": None,
    }
    page = suite.as_markdown(found, "2026-01-02", quick=False)
    assert "## bad: failed\n\nexit code 3: why it failed\n" in page
    assert "**failed**: it ended well and left no result" in page
    assert "\n## Good\n\n### Part\n" in page


def test_the_report_has_the_machine_and_every_version(found):
    record = json.loads(suite.as_json(found, "2026-01-02", quick=False))
    assert record["peers"] == {"peer": "1.2"}
    assert record["parts"]["good"]["record"]["x"] == 3
    assert record["parts"]["bad"]["failed"] == "exit code 3: why it failed"
    assert record["packages"]["numpy"] == record["environment"]["numpy"]
    page = suite.as_markdown(found, "2026-01-02", quick=False)
    for word in (
        "- machine: system ",
        "cpu ",
        f"python {sys.version.split()[0]}",
        "- peers: peer 1.2",
    ):
        assert word in page


def test_a_quick_report_says_that_its_figures_say_nothing(found):
    assert "Its figures say nothing" in suite.as_markdown(found, "2026-01-02", quick=True)
    assert "Its figures say nothing" not in suite.as_markdown(found, "2026-01-02", quick=False)


def test_a_result_is_kept_where_it_is_asked_for_and_nowhere_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(keep, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    parser = argparse.ArgumentParser()
    keep.add_options(parser)
    keep.keep("x", "page", "{}", parser.parse_args([]))
    assert capsys.readouterr().out == "page\n"
    assert list(tmp_path.rglob("*.md")) == []
    keep.keep("x", "page", "{}", parser.parse_args(["--write", "--into", str(tmp_path)]))
    dated = tmp_path / "results" / f"{keep.today()}-x"
    for stem in (dated, tmp_path / "x"):
        assert stem.with_name(f"{stem.name}.md").read_text("utf-8") == "page"
        assert stem.with_name(f"{stem.name}.json").read_text("utf-8") == "{}"
