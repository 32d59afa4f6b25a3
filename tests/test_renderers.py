"""One record, three views: JSON that reads back, Markdown that shows any name, and a terminal."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import msgspec
import pytest
from conftest import refused
from markdown_it import MarkdownIt
from rich.console import Console
from scipy.stats import binomtest

from exporter.errors import InputRefused
from exporter.profile import load_profile
from exporter.records import (
    SCHEMA,
    Artefact,
    Convergence,
    Cost,
    Curve,
    Fate,
    Fidelity,
    File,
    FoldRecord,
    Latency,
    LayerCost,
    LayerError,
    Parity,
    Report,
    Rung,
    Source,
    Stage,
    TensorSpec,
    Tolerance,
    Variant,
)
from exporter.renderers import _figures as figures
from exporter.renderers import markdown, record, terminal

NO_GPU = "no NVIDIA GPU (no driver)"
ODD = [
    "a|b",
    "a||b|",
    "`code`",
    "``",
    "<script>alert(1)</script>",
    "<b>",
    "<!-- gone -->",
    "*bold* and **more**",
    "a\\|b",
    "back\\slash\\",
    "\\`",
    "_emphasis_",
    "__init__",
    "~~gone~~",
    "[text](https://example.com)",
    "![image](x.png)",
    "[text]",
    "&lt;&amp;&copy;",
    "<https://example.com>",
    "$x$",
    "[bold]rich[/bold]",
    "漢字 ü ×",
    "block1.0/Relu",
]


def parity(**changed) -> Parity:
    plain = Parity(
        inputs="360 held-out digits",
        samples=360,
        max_abs=0.125,
        rel_l2=0.01,
        cosine=0.9999,
        margin_used=0.25,
        noise_floor=2e-7,
        agreeing=351,
        undecided=0,
        classes=9,
        labels=10,
        reference_correct=351,
        lost=10,
        gained=1,
        constant=(),
        nonfinite_reference=0,
        nonfinite_candidate=0,
        tolerance=Tolerance(),
    )
    return msgspec.structs.replace(plain, **changed)


def rung(name: str, *, error: float = 0.01, first: LayerError | None = None) -> Rung:
    """A step whose outputs are at 0.5 times the noise floor, or wherever ``error`` puts them."""
    fidelity = Fidelity(
        against="PyTorch float64",
        samples=12,
        error=error,
        floor=0.02,
        limit=4.0,
        layers=50,
        worst=LayerError("block3.1", "Add", "add_1", 1.73, 2e-8, "channel 3 of 128"),
        first=first,
    )
    return Rung(name, "folded", 360, 0.001, 0.01, 2, 3, fidelity)


GOOD = parity(tolerance=Tolerance(sqnr_db=30.0, agreement=0.5))
BAD = parity(tolerance=Tolerance(sqnr_db=50.0, agreement=0.5))
PASSED = Artefact(
    "fp32",
    "ort-cpu",
    File("n.fp32.onnx", "ab" * 32, 1234567),
    parity=(GOOD,),
    rung=rung("fp32 on ort-cpu"),
)
FAILED = Artefact(
    "int8",
    "ort-cpu",
    File("n.int8.onnx", "cd" * 32, 345678),
    parity=(BAD,),
    rung=rung("int8 on ort-cpu"),
)
UNSHOWN = Artefact(
    "fp16",
    "ort-cpu",
    File("n.fp16.onnx", "ab" * 32, 2345678),
    parity=(parity(agreeing=360, lost=0, gained=0, tolerance=Tolerance(agreement=0.999)),),
    rung=rung("fp16 on ort-cpu"),
)
TOO_FEW = (
    "fp16 on ort-cpu: 360 of 360 agree on the 360 held-out digits, which proves 99.17%; 99.9% "
    "would need 2,995 samples without a disagreement"
)
NOT_RUN = Artefact(
    "fp16",
    "tensorrt-rtx",
    File("n.fp16.engine", "ef" * 32, 2345678),
    targets=("sm86", "sm89"),
    build_seconds=12.34,
    not_run=NO_GPU,
)
REFUSED = Artefact("int8", "tensorrt", None, refused="TensorRT refused n.int8.onnx: no kernel")
COST = Cost(
    (
        LayerCost(
            *("block1.0", "Conv", (1, 64, 75, 75), 17640000, 3200, 12800, 1440000),
            read_bytes=213504,
            alive_bytes=1640704,
        ),
        LayerCost(
            *("block1.1/Relu", "Relu", (1, 64, 75, 75), 0, 0, 0, 1440000),
            read_bytes=1440000,
            alive_bytes=2880000,
        ),
    ),
    {"Erf": 2},
)


def report(*artefacts: Artefact, **changed) -> Report:
    plain = Report(
        schema=SCHEMA,
        tool="resnet-export 1.0",
        source=Source(
            model="resnet18",
            weights_sha256="12" * 32,
            weights="resnet18.safetensors",
            parameters=11178378,
            input=TensorSpec("input", (1, 224, 224)),
            output=TensorSpec("logits", (10,)),
            opset=20,
        ),
        profile=json.loads(msgspec.json.encode(load_profile("default"))),
        environment={"python": "3.11.7", "cpu": "A CPU @ 2 GHz"},
        calibration="256 of the 1437 train digits, seed 0",
        fold=FoldRecord((Fate("block1.2", "Conv → BatchNorm", True, "into block1.0"),), 1.5e-15),
        pytorch=(parity(rel_l2=2e-7), parity(inputs="32 noise samples", rel_l2=3e-7)),
        rungs=(Rung("PyTorch float32", "PyTorch float64", 360, 1e-7, 1e-7, 0, 0),),
        variants=tuple(Variant(a.precision, a.file, COST, artefacts=(a,)) for a in artefacts),
        latency=(
            Latency("PyTorch eager, fp32", 1, 2, 10, (8.0, 6.0, 7.0)),
            Latency("fp32 on ort-cpu", 1, 1, 10, (2.0, 4.0, 3.5)),
        ),
        doubts=(),
        stages=(Stage("fold BatchNorm", 0.25),),
    )
    return msgspec.structs.replace(plain, **changed)


def odd_report(name: str) -> Report:
    """Return a report with that name for all that a user, a layer or a library can name."""
    failed = msgspec.structs.replace(FAILED, notes=(name,))
    not_run = msgspec.structs.replace(NOT_RUN, not_run=name)
    refused = msgspec.structs.replace(REFUSED, refused=name)
    cost = Cost((LayerCost(name, name, (1,), 1, 1, 4, 4, 8, 8),), {name: 1})
    return report(
        source=Source(
            *("net", "12" * 32, name, 1, TensorSpec(name, (1,)), TensorSpec(name, (1,)), 20),
            weights_format=name,
            weights_changes=(name,),
        ),
        environment={"cpu": name},
        fold=FoldRecord((Fate(name, name, False, name),), None),
        variants=(
            Variant("int8", failed.file, cost, (name,), (failed, refused)),
            Variant("fp16", not_run.file, cost, (name,), (not_run,)),
        ),
        stages=(Stage(name, 1.0),),
    )


CALIBRATED = Convergence(
    30,
    (1, 2, 4, 8, 1024),
    (
        Curve("max", (0.5, 0.2, 0.1, 0.06, 0.0), (0.1, 0.1, 0.1, 0.0, 0.0)),
        Curve("percentile 99.999", (0.5, 0.125, 0.04, 0.03, 0.0), (0.1, 0.0, 0.0, 0.0, 0.0)),
    ),
)


# ── JSON ────────────────────────────────────────────────────────────────────────────


def loads(text: str):
    """Parse JSON as the standard has it: NaN and Infinity are no numbers."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    "artefacts",
    [(), (PASSED,), (FAILED,), (NOT_RUN,), (REFUSED,), (UNSHOWN,), (PASSED, FAILED, NOT_RUN)],
)
def test_a_report_reads_back_as_it_was_written(artefacts):
    one = report(*artefacts)
    assert record.parse(record.render(one)) == one
    assert record.parse(record.render(one).encode()) == one


@pytest.mark.parametrize("name", [*ODD, "line\nbreak", 'quote"d', "\u2028", "\x00", "🙂"])
def test_a_report_of_odd_names_reads_back_as_it_was_written(name):
    one = odd_report(name)
    assert record.parse(record.render(one)) == one


def test_what_could_not_be_computed_and_what_is_exact_read_back_too():
    broken = parity(
        max_abs=None,
        rel_l2=None,
        cosine=None,
        margin_used=None,
        agreeing=None,
        reference_correct=None,
        lost=None,
        gained=None,
        nonfinite_candidate=3,
    )
    exact = parity(rel_l2=0.0, max_abs=0.0)
    artefact = msgspec.structs.replace(PASSED, parity=(broken, exact))
    one = report(artefact, pytorch=(exact, broken), latency=())
    text = record.render(one)
    assert record.parse(text) == one
    found = loads(text)["variants"][0]["artefacts"][0]["parity"]
    assert [entry["sqnr_db"] for entry in found] == [None, None]
    assert [entry["verdict"] for entry in found] == ["fail", "not checked"]


def test_the_json_has_every_figure_that_follows_from_the_record():
    table = loads(record.render(report(PASSED, FAILED)))
    assert (table["schema"], table["verdict"]) == (2, "fail")
    assert table["failures"] == [
        "int8 on ort-cpu: sqnr_db 40 < 50 on the 360 held-out digits",
    ]
    passed, failed = (variant["artefacts"][0] for variant in table["variants"])
    assert (passed["name"], passed["verdict"]) == ("fp32 on ort-cpu", "pass")
    assert passed["failures"] == []
    assert (failed["name"], failed["verdict"]) == ("int8 on ort-cpu", "fail")
    assert failed["failures"] == ["sqnr_db 40 < 50 on the 360 held-out digits"]
    figures = passed["parity"][0]
    assert figures["sqnr_db"] == pytest.approx(40.0)
    assert figures["noise_multiple"] == pytest.approx(50_000)
    assert figures["accuracy_drop"] == pytest.approx(9 / 360)
    assert (figures["lost"], figures["gained"]) == (10, 1)
    assert figures["accuracy"] == pytest.approx(342 / 360)
    assert figures["reference_accuracy"] == pytest.approx(351 / 360)
    assert figures["agreement"] == pytest.approx(351 / 360)
    least, most = (
        getattr(binomtest(351, 360, alternative=side).proportion_ci(0.95, "exact"), end)
        for side, end in (("greater", "low"), ("less", "high"))
    )
    assert figures["agreement_proven"] == pytest.approx(least)
    assert figures["agreement_possible"] == pytest.approx(most)
    least, most = figures["accuracy_drop_bounds"]
    assert 0 < least < 9 / 360 < most < 0.05
    assert (figures["margin_used"], figures["classes"], figures["labels"]) == (0.25, 9, 10)
    assert table["unproven"] == passed["unproven"] == []
    cost = table["variants"][0]["cost"]
    assert (cost["macs"], cost["flops"], cost["parameters"]) == (17640000, 35280000, 3200)
    assert (cost["weight_bytes"], cost["activation_bytes"]) == (12800, 2880000)
    assert (cost["peak_bytes"], cost["peak_layer"]) == (2880000, "block1.1/Relu")
    assert cost["moved_bytes"] == 213504 + 3 * 1440000
    assert cost["intensity"] == pytest.approx(35280000 / 4533504)
    assert cost["uncounted"] == {"Erf": 2}
    latency = table["latency"][0]
    assert (latency["p50_ms"], latency["p90_ms"], latency["p99.9_ms"]) == (7.0, None, None)
    assert latency["missing"] == {"p50": 8, "p90": 61, "p99": 659, "p99.9": 6633}
    assert latency["per_second"] == pytest.approx(1000 / 7)
    assert (latency["samples"], latency["samples_ms"]) == (3, [8.0, 6.0, 7.0])


@pytest.mark.parametrize("artefact", [NOT_RUN, PASSED, FAILED, REFUSED, UNSHOWN])
def test_the_json_says_what_became_of_each_artefact(artefact):
    entry = loads(record.render(report(artefact)))["variants"][0]["artefacts"][0]
    verdicts = {NOT_RUN: "not checked", PASSED: "pass", FAILED: "fail", REFUSED: "fail"}
    verdicts[UNSHOWN] = "not enough evidence"
    assert entry["verdict"] == verdicts[artefact]
    assert entry["not_run"] == artefact.not_run
    assert entry["refused"] == artefact.refused


def test_the_schema_and_the_verdict_come_first():
    assert list(loads(record.render(report(PASSED))))[:2] == ["schema", "verdict"]


def test_keys_of_a_newer_version_are_ignored():
    table = loads(record.render(report(PASSED)))
    table["invented"] = 1
    table["variants"][0]["artefacts"][0]["invented"] = {"x": 1}
    assert record.parse(json.dumps(table)) == report(PASSED)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "null", "not json", '{"schema": 2', '{"schema": 2}', '{"schema": "2"}'),
        *(b"\xff", b'{"schema": 2, "tool": "\xff"}'),
    ],
)
def test_what_is_no_report_is_refused(text):
    with refused(InputRefused, "not a report"):
        record.parse(text)


def test_a_report_that_nests_without_end_is_refused():
    with refused(InputRefused, "not a report"):
        record.parse('{"profile": ' + "[" * 100_000)


@pytest.mark.parametrize("schema", [0, 1, 3, 99])
def test_a_report_of_another_schema_is_refused_whatever_else_is_in_it(schema):
    for text in (record.render(report(PASSED, schema=schema)), f'{{"schema": {schema}}}'):
        with refused(InputRefused, f"schema {schema}", "2 can be read"):
            record.parse(text)


# ── Markdown ────────────────────────────────────────────────────────────────────────


def page(one: Report):
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown.render(one))


def literal(token) -> str:
    """Return an inline's text as a reader sees it; code is text, and other markup is marked."""
    seen = []
    for child in token.children:
        if child.type in ("text", "code_inline", "text_special"):
            seen.append(child.content)
        elif child.type not in ("strong_open", "strong_close", "softbreak"):
            seen.append(f"⟦{child.type}⟧")
    return "".join(seen)


def tables(one: Report) -> dict[str, list[list[str]]]:
    """Return every table's rows by its first head."""
    found: dict[str, list[list[str]]] = {}
    rows: list[list[str]] | None = None
    for token in page(one):
        if token.type == "table_open":
            rows = []
        elif token.type == "table_close":
            found[rows[0][0]] = rows[1:]
            rows = None
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows is not None:
            rows[-1].append(literal(token))
    return found


def items(one: Report) -> list[str]:
    """Return what a reader sees of every list item, in order."""
    found, inside = [], False
    for token in page(one):
        if token.type in ("list_item_open", "list_item_close"):
            inside = token.type == "list_item_open"
        elif token.type == "inline" and inside:
            found.append(literal(token))
    return found


def text_of(one: Report) -> str:
    return "\n".join(literal(token) for token in page(one) if token.type == "inline")


def test_the_markdown_is_a_page_with_the_verdict_at_its_top():
    for artefacts, verdict in (
        ((PASSED,), "PASS"),
        ((PASSED, FAILED), "FAIL"),
        ((PASSED, UNSHOWN), "NOT ENOUGH EVIDENCE"),
        ((NOT_RUN,), "NOT CHECKED"),
        ((), "NOT CHECKED"),
    ):
        assert markdown.render(report(*artefacts)).startswith(f"# resnet18: {verdict}\n")


def test_the_main_table_has_pytorch_and_each_artefact_with_its_figures():
    rows = {row[0]: row[1:] for row in tables(report(PASSED, FAILED, NOT_RUN))["artefact"]}
    assert rows["PyTorch eager, fp32"] == [
        "",
        "the reference",
        "is its float64",
        "134.0 dB",  # −20 log₁₀ 2e-7
        "97.50%",
        "95.00%",
        "7.00 ms",
        "1.00 ×",
    ]
    assert rows["fp32 on ort-cpu"] == [
        "1.2 MB",
        "pass",
        "pass",
        "40.0 dB",
        "97.50%",
        "95.00%",
        "3.50 ms",
        "2.00 ×",
    ]
    assert rows["int8 on ort-cpu"] == [
        "0.3 MB",
        "pass",
        "FAIL",
        "40.0 dB",
        "97.50%",
        "95.00%",
        "",
        "",
    ]


@pytest.mark.parametrize("others", [(), (PASSED,), (PASSED, FAILED)])
def test_what_was_not_run_is_said_not_to_be_checked_and_never_passes(others):
    one = report(*others, NOT_RUN)
    rows = {row[0]: row[1:] for row in tables(one)["artefact"]}
    said = rows["fp16 on tensorrt-rtx"]
    assert said == ["2.3 MB", *[f"not checked: built, not run: {NO_GPU}"] * 2, "", "", "", "", ""]
    lines = [line for line in markdown.render(one).splitlines() if "fp16 on tensorrt-rtx" in line]
    assert not any("pass" in line.lower() for line in lines)
    want = f"fp16 on tensorrt-rtx: built, not run: {NO_GPU}. Its numbers are not checked."
    assert want in items(one)


def test_what_was_built_for_several_targets_says_for_which():
    want = "fp16 on tensorrt-rtx: one engine for sm86, sm89, built in 12.3 s"
    assert want in items(report(NOT_RUN))


def test_what_could_not_be_made_fails_with_its_reason():
    one = report(REFUSED)
    rows = {row[0]: row[1:] for row in tables(one)["artefact"]}
    assert rows["int8 on tensorrt"] == ["", *["FAIL: not made"] * 2, "", "", "", "", ""]
    assert "int8 on tensorrt: TensorRT refused n.int8.onnx: no kernel" in items(one)


def test_a_missed_gate_is_shown_with_artefact_figure_and_limit():
    want = "int8 on ort-cpu: sqnr_db 40 < 50 on the 360 held-out digits"
    assert want in items(report(PASSED, FAILED))
    assert not any("sqnr_db" in item for item in items(report(PASSED)))


def test_the_parity_table_shows_gates_and_verdicts_beside_every_figure():
    rows = tables(report(PASSED, FAILED))["compared with float64 PyTorch"]
    assert [row[0] for row in rows] == [
        "PyTorch float32",
        "PyTorch float32",
        "fp32 on ort-cpu",
        "int8 on ort-cpu",
    ]
    assert rows[2] == [
        "fp32 on ort-cpu",
        "360 held-out digits",
        "0.125",
        "0.01",
        "40.0 dB",
        "1.0e-04",
        "97.50%",
        "≥ 95.67%",  # of 351 in 360, 0.956780 by scipy.stats.binomtest
        "25%",
        "9 of 10",
        "95.00%",
        "2.50% (1.01% to 4.35%)",
        "5e+04",
        "sqnr_db ≥ 30, agreement ≥ 0.5",
        "pass",
    ]
    assert rows[3][-2:] == ["sqnr_db ≥ 50, agreement ≥ 0.5", "fail"]
    assert rows[0][-2:] == ["", ""]


def test_an_artefact_without_gates_is_shown_as_not_checked():
    artefact = msgspec.structs.replace(PASSED, parity=(parity(),))
    rows = tables(report(artefact))
    assert rows["compared with float64 PyTorch"][-1][-2:] == ["none", "not checked"]
    assert rows["artefact"][-1][2:4] == ["pass", "not checked"]
    assert artefact.verdict == "not checked"


def test_an_exact_candidate_is_called_exact_and_a_broken_one_has_no_figures():
    exact = msgspec.structs.replace(PASSED, parity=(parity(rel_l2=0.0),))
    assert tables(report(exact))["artefact"][-1][4] == "exact"
    distances = ("max_abs", "rel_l2", "cosine", "margin_used")
    nothing = dict.fromkeys((*distances, "agreeing", "reference_correct", "lost", "gained"))
    broken = parity(**nothing, nonfinite_candidate=9)
    one = report(msgspec.structs.replace(PASSED, parity=(broken,)))
    row = tables(one)["compared with float64 PyTorch"][-1]
    assert row[2:] == ["", "", "", "", "", "", "", "9 of 10", "", "", "", "none", "fail"]
    assert any("9 outputs of the candidate are NaN or infinite" in item for item in items(one))


def test_an_artefact_that_leaves_the_graph_fails_and_the_layer_is_named():
    first = LayerError("block4.1.conv2", "Conv", "conv2d_9", 839.0, 1e-3, "channel 17 of 256")
    one = report(
        msgspec.structs.replace(PASSED, rung=rung("fp32 on ort-cpu", error=1.0, first=first))
    )
    rows = {row[0]: row for row in tables(one)["artefact"]}
    assert rows["fp32 on ort-cpu"][2:4] == ["FAIL", "pass"]
    steps = {row[0]: row for row in tables(one)["step"]}
    assert steps["fp32 on ort-cpu"][-3:] == ["50.00 (at most 4)", "not block4.1.conv2", "FAIL"]
    want = (
        "fp32 on ort-cpu: it leaves the graph at block4.1.conv2 (Conv), off by 839 times its "
        "rounding in channel 17 of 256"
    )
    assert want in items(one)
    assert one.verdict == "fail"


def test_the_ladder_says_what_each_step_adds():
    steps = {row[0]: row for row in tables(report(PASSED, NOT_RUN))["step"]}
    assert list(steps) == [
        "PyTorch float64",
        "PyTorch float32",
        "fp32 on ort-cpu",
        "fp16 on tensorrt-rtx",
    ]
    assert steps["fp32 on ort-cpu"][1:3] == ["folded", "1.0e-03 60 dB"]
    assert steps["fp32 on ort-cpu"][4:] == [
        "1.0e-02 40 dB",
        "2",
        "3",
        "0.50 (at most 4)",
        "all 50, worst 1.73",
        "pass",
    ]
    assert steps["fp16 on tensorrt-rtx"][1:] == [*[""] * 8, "not checked"]


def test_the_costs_are_totalled_and_what_was_not_counted_is_named():
    found = tables(report(PASSED))
    assert found["graph"] == [
        [
            *("fp32", "17,640,000", "35,280,000", "3,200", "12,800", "2,880,000"),
            *("2,880,000 at block1.1/Relu", "7.8", "2 × Erf"),
        ]
    ]
    assert found["layer"] == [
        ["block1.0", "Conv", "1×64×75×75", "17,640,000", "3,200", "12,800", "1,440,000"],
        ["block1.1/Relu", "Relu", "1×64×75×75", "0", "0", "0", "1,440,000"],
    ]


def test_the_latency_table_says_of_each_percentile_how_many_samples_it_lacks():
    one = report(PASSED)
    lacks = ["needs 61 more", "needs 659 more", "needs 6,633 more", "0"]
    assert tables(one)["candidate"] == [
        ["PyTorch eager, fp32", "1", "2", "3", "7.00 (needs 8 more)", *lacks, "142.9"],
        ["fp32 on ort-cpu", "1", "1", "3", "3.50 (needs 8 more)", *lacks, "285.7"],
    ]


def test_a_percentile_stands_beside_its_interval_and_nothing_is_left_out_of_it():
    """Of 8 and 9 in turn, 700 times, and one of 90: ranks 351, 631 and 694 of 701."""
    enough = Latency("PyTorch", 1, 2, 10, (8.0, 9.0) * 350 + (90.0,))
    (row,) = tables(report(PASSED, latency=(enough,)))["candidate"]
    assert row[3:6] == ["701", "9.00 (8.00 to 9.00)", "9.00 (9.00 to 9.00)"]
    assert row[6].startswith("9.00 (9.00 to ")
    assert row[7:] == ["needs 5,935 more", "1", "111.1"]
    page = text_of(report(PASSED, latency=(enough,)))
    assert "64, 662, 6,636 samples on for the last three" in page
    assert "in an order that is drawn anew each round" in page


@pytest.mark.parametrize("name", ODD)
def test_a_table_shows_any_name_as_it_is(name):
    found = tables(odd_report(name))
    assert found["layer"][0][:2] == [name, name]
    assert found["graph"][0][-1] == f"1 × {name}"
    assert found["graph"][0][-3] == f"8 at {name}"
    rows = {row[0]: row for row in found["artefact"]}
    assert rows["fp16 on tensorrt-rtx"][2] == f"not checked: built, not run: {name}"
    heads = {"artefact": 9, "step": 10, "compared with float64 PyTorch": 15, "graph": 9, "layer": 7}
    for head, columns in heads.items():
        assert {len(row) for row in found[head]} == {columns}


@pytest.mark.parametrize("name", ODD)
def test_a_list_shows_any_name_as_it_is(name):
    found = items(odd_report(name))
    assert f"int8: {name}" in found
    assert f"int8 on ort-cpu: {name}" in found
    assert f"int8 on tensorrt: {name}" in found
    assert f"{name}: {name}: kept: {name}" in found


@pytest.mark.parametrize("name", ODD)
def test_the_reason_why_something_was_not_run_is_shown_as_it_is(name):
    want = f"fp16 on tensorrt-rtx: built, not run: {name}. Its numbers are not checked."
    assert want in items(odd_report(name))


@pytest.mark.parametrize("name", ODD)
def test_the_head_shows_the_names_of_files_and_tensors_as_they_are(name):
    text = text_of(odd_report(name))
    assert f"weights {name}, SHA-256" in text
    assert f"input {name} N×1 float32, output {name} N×1" in text
    assert f"{'12' * 32} ({name})" in text
    assert f"weights: {name}" in items(odd_report(name))


@pytest.mark.parametrize("name", ["A *CPU* of 2 <GHz>", "x|y", "_one_ & `two`"])
def test_the_foot_shows_the_machine_and_the_stages_as_they_are(name):
    text = text_of(odd_report(name))
    assert f"cpu {name}." in text
    assert tables(odd_report(name))["stage"] == [
        [name, "other", "1.00 s", "100.0%", "not measured"]
    ]


def test_a_line_break_in_a_name_breaks_no_table():
    found = tables(odd_report("line\nbreak"))
    assert found["layer"][0][0] == "line break"
    assert {len(row) for row in found["artefact"]} == {9}


def test_no_scripts_get_into_the_page():
    html = (
        MarkdownIt("commonmark")
        .enable("table")
        .render(markdown.render(odd_report("<script>alert(1)</script>")))
    )
    assert "<script" not in html


@pytest.mark.parametrize("view", [markdown.render, record.render])
def test_the_same_record_always_renders_the_same(view):
    one = report(PASSED, FAILED, NOT_RUN)
    assert view(one) == view(one)
    assert one == report(PASSED, FAILED, NOT_RUN)


def test_a_report_of_nothing_but_a_fold_still_renders():
    nothing = report(latency=(), calibration=None, fold=FoldRecord((), None))
    assert "0 of 0 folded" in text_of(nothing)
    assert "not calibrated" in items(nothing)
    assert "No graph was made" in text_of(nothing)


# ── Terminal ────────────────────────────────────────────────────────────────────────


def printed(one: Report, width: int = 240) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(terminal.render(one, Path("build")))
    return stream.getvalue()


def test_the_terminal_shows_verdicts_failures_and_where_the_rest_is():
    text = printed(report(PASSED, FAILED, NOT_RUN))
    assert "missed: int8 on ort-cpu: sqnr_db 40 < 50 on the 360 held-out digits" in text
    assert f"not checked: built, not run: {NO_GPU}" in text
    assert text.rstrip().splitlines()[-1] == "fail: build/report.md"
    assert "1 of 1 BatchNorms folded" in text


def test_what_is_not_shown_is_said_with_what_it_would_take():
    one = report(PASSED, UNSHOWN)
    text = printed(one)
    assert f"not enough evidence: {TOO_FEW}" in text
    assert text.rstrip().splitlines()[-1] == "not enough evidence: build/report.md"
    assert f"Not enough evidence: {TOO_FEW}" in items(one)
    rows = {row[0]: row[1:] for row in tables(one)["artefact"]}
    assert rows["fp16 on ort-cpu"][1:3] == ["pass", "not enough evidence"]
    table = loads(record.render(one))
    assert (table["verdict"], table["unproven"]) == ("not enough evidence", [TOO_FEW])


def test_the_terminal_says_what_the_samples_show_of_each_artefact():
    said = next(x for x in printed(report(PASSED)).splitlines() if "351 of 360 agree" in x)
    assert said.startswith(
        "fp32 on ort-cpu: 351 of 360 agree, proven ≥ 95.67%; accuracy drop 2.50%"
    )
    assert said.rstrip().endswith("margin used 25%; classes 9 of 10")


def test_every_verdict_has_a_colour_of_its_own():
    shown = {"PASSED": PASSED, "FAILED": FAILED, "UNSHOWN": UNSHOWN, "NOT_RUN": NOT_RUN}
    last = {}
    for name, artefact in shown.items():
        stream = io.StringIO()
        console = Console(file=stream, width=240, force_terminal=True, color_system="standard")
        console.print(terminal.render(report(artefact), Path("build")))
        last[name] = stream.getvalue().rstrip().splitlines()[-1].partition("m")[0]
    assert len(set(last.values())) == 4


def test_the_terminal_never_says_pass_of_what_was_not_run():
    lines = printed(report(PASSED, NOT_RUN)).splitlines()
    said = [line for line in lines if "fp16 on tensorrt-rtx" in line]
    assert said
    assert not any("pass" in line for line in said)
    assert "pass" in next(line for line in lines if "fp32 on ort-cpu" in line)


@pytest.mark.parametrize("name", ODD)
def test_the_terminal_shows_any_name_as_it_is(name):
    text = printed(odd_report(name))
    assert f"{name}: {name}: kept: {name}" in text
    assert f"missed: int8 on tensorrt: {name}" in text
    assert f"not checked: built, not run: {name}" in text


# ── Words for figures ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "words"), [(None, ""), (math.inf, "exact"), (40.04, "40.0 dB"), (-3.0, "-3.0 dB")]
)
def test_decibels_in_words(value, words):
    assert figures.decibels(value) == words


@pytest.mark.parametrize(
    ("cosine", "words"),
    [(None, ""), (1.0, "0.0e+00"), (1.0000000000000002, "0.0e+00"), (0.75, "2.5e-01")],
)
def test_one_minus_a_cosine_in_words(cosine, words):
    assert figures.one_minus(cosine) == words


@pytest.mark.parametrize(
    ("used", "undecided", "words"),
    [
        (None, 0, ""),
        (None, 4, "4 undecided"),
        (0.0, 0, "0%"),
        (0.000031, 0, "0.0031%"),
        (0.0521, 2, "5.2%, 2 undecided"),
        (0.996, 0, "100%"),
        (1.424, 0, "142%"),
        (1e300, 0, "1000% or more"),
    ],
)
def test_the_margin_used_in_words(used, undecided, words):
    assert figures.margin(parity(margin_used=used, undecided=undecided)) == words


def test_what_samples_prove_in_words_still_holds():
    assert figures.proven(parity(agreeing=360)) == "≥ 99.17%"  # 0.05 ** (1/360) = 0.991713
    assert figures.proven(parity(agreeing=None)) == ""
    assert figures.drop(parity(lost=0, gained=0)) == "0.00% (-0.83% to 0.83%)"  # 0.0082869
    assert figures.drop(parity(lost=None, gained=None)) == ""


def test_gates_in_words():
    gates = parity(tolerance=Tolerance(max_abs=1e-3, sqnr_db=50.0, agreement=0.99))
    assert figures.gates(gates) == "max_abs ≤ 0.001, sqnr_db ≥ 50, agreement ≥ 0.99"
    assert figures.gates(parity()) == "none"


def test_a_precision_that_could_not_be_made_fails_and_says_why():
    unmade = Variant("fp16", refused="'w' does not fit FP16 (export this network in fp32)")
    failed = report(PASSED, variants=(*report(PASSED).variants, unmade))
    assert failed.verdict == "fail"
    assert failed.failures == ("fp16: 'w' does not fit FP16 (export this network in fp32)",)
    rows = {row[0]: row[1:] for row in tables(failed)["artefact"]}
    assert rows["fp16"][1] == "FAIL: not made"
    assert "export this network in fp32" in text_of(failed)


def test_doubts_about_the_figures_are_shown_beside_them():
    doubtful = report(PASSED, doubts=("other processes took 40% of the processors",))
    assert "In doubt: other processes took 40% of the processors." in text_of(doubtful)
    assert doubtful.verdict == "pass"


# ── Calibration ─────────────────────────────────────────────────────────────────────


def test_the_page_says_from_when_on_the_scales_stood_still_and_where_that_is_drawn():
    text = text_of(report(calibrated=CALIBRATED))
    assert (
        "1,024 samples, 30 tensors. Settled: max not within these; percentile 99.999 from 4" in text
    )
    assert "calibration.svg" in text
    assert "12.50%" in text
    assert "calibration.svg" not in text_of(report())


def test_the_record_of_the_scales_reads_back_and_says_when_they_settled():
    one = report(calibrated=CALIBRATED)
    text = record.render(one)
    assert record.parse(text) == one
    assert loads(text)["calibrated"]["settled"] == {"max": None, "percentile 99.999": 4}
    assert loads(record.render(report()))["calibrated"] is None
