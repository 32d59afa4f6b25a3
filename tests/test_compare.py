"""Networks counted and compared by command: tables, JSON, the figure, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import nullcontext
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from conftest import refused

from exporter.cli import main
from exporter.compare import compare_networks
from exporter.counting import count_all
from exporter.errors import GraphError, InputRefused, UnknownName
from exporter.records import Contest, Cost, LayerCost
from exporter.renderers import contest as renderer
from exporter.renderers import costs

MACS24 = 15_148_032  # of resnet18 at 24×24, by PyTorch's FlopCounterMode
SVG = "{http://www.w3.org/2000/svg}"


def run(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, args)
    return done.exit_code, done.output


# ── flops ───────────────────────────────────────────────────────────────────────────


def test_a_network_is_counted_as_written_and_folded():
    written, folded = count_all(["resnet18"], input_shape=(1, 224, 224))
    assert (written.name, folded.name) == ("resnet18 in PyTorch", "resnet18 in PyTorch, folded")
    assert written.cost.macs == folded.cost.macs == 839_269_952
    assert written.cost.parameters == 11_178_378
    ops = [[layer.op for layer in one.cost.layers] for one in (written, folded)]
    assert [names.count("batch_norm") for names in ops] == [17, 0]


def test_a_network_without_batchnorm_and_weights_is_counted_once():
    (one,) = count_all(["vgg16"], classes=10)
    assert one.cost.macs == 15_470_264_320 - 990 * 4096
    assert "no BatchNorm" in one.notes[0]


def test_a_network_without_weights_is_folded_as_it_is_initialised():
    written, folded = count_all(["googlenet"], input_shape=(3, 64, 64))
    assert written.cost.macs == folded.cost.macs
    assert "without weights" in folded.notes[0]


def test_a_file_is_counted_beside_a_network(tiny_onnx):
    file, *network = count_all([str(tiny_onnx.path), "resnet18"], input_shape=(1, 32, 32))
    assert (file.name, file.input) == ("tiny.fp32.onnx", (1, 32, 32))
    assert [one.name for one in network] == ["resnet18 in PyTorch", "resnet18 in PyTorch, folded"]


def test_the_table_has_the_totals_and_every_layer(tiny_onnx):
    code, said = run("flops", str(tiny_onnx.path))
    (one,) = count_all([str(tiny_onnx.path)])
    assert code == 0
    total = next(line for line in said.splitlines() if line.startswith("tiny.fp32.onnx  1×32×32"))
    figures = (one.cost.macs, one.cost.flops, one.cost.parameters, one.cost.peak_bytes)
    assert {f"{figure:,}" for figure in figures} <= set(total.split())
    for layer in one.cost.layers:
        if layer.macs:
            line = next(x for x in said.splitlines() if x.startswith(f"{layer.name} "))
            assert {f"{layer.macs:,}", f"{layer.alive_bytes:,}"} <= set(line.split())
    assert f"the peak is at {one.cost.peak_layer}" in said


def test_the_json_has_sums_and_ratios(tiny_onnx):
    done = CliRunner().invoke(main, ["flops", str(tiny_onnx.path), "--json"])
    (network,) = json.loads(done.stdout)["networks"]
    (one,) = count_all([str(tiny_onnx.path)])
    assert network["input"] == [1, 32, 32]
    assert network["cost"]["flops"] == one.cost.flops
    assert network["cost"]["peak_bytes"] == one.cost.peak_bytes
    assert network["cost"]["intensity"] == pytest.approx(one.cost.flops / one.cost.moved_bytes)
    assert len(network["cost"]["layers"]) == len(one.cost.layers)


def test_operators_of_unknown_cost_are_named_and_make_the_sums_lower_bounds(tmp_path, tiny_onnx):
    model = onnx.load(tiny_onnx.path)
    last = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == last else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Erf", ["before"], [last], "erf"))
    onnx.save(model, tmp_path / "net.onnx")
    _, said = run("flops", str(tmp_path / "net.onnx"))
    assert "net.onnx: cost unknown, and in no figure: 1 × Erf" in said
    assert re.search(r"net\.onnx +1×32×32 +≥ [\d,]+ +≥ [\d,]+", said)


def test_a_file_is_counted_without_pytorch(tiny_onnx):
    probe = (
        "import sys; from exporter.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: code = done.code\n"
        "heavy = {'torch', 'onnxruntime', 'rich', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, "flops", str(tiny_onnx.path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_neither_a_network_nor_a_file_is_refused(tmp_path):
    with refused(UnknownName, "no model named 'vgg17'", hint=("'vgg16'",)):
        count_all(["vgg17"])
    with refused(InputRefused, "net.onnx", "no such file"):
        count_all([str(tmp_path / "net.onnx")])
    (tmp_path / "a.onnx").touch()
    with refused(InputRefused, "a folder", hint=("a.onnx",)):
        count_all([str(tmp_path)])


def test_an_input_that_does_not_fit_is_refused(tiny_onnx):
    with refused(InputRefused, "resnet18 cannot take an input of 3 × 64 × 64"):
        count_all(["resnet18"], input_shape=(3, 64, 64))
    with refused(InputRefused, "vgg16 cannot take an input of 1 × 24 × 24"):
        count_all(["vgg16"], input_shape=(1, 24, 24))
    with refused(InputRefused, "N×1×32×32", "N×1×64×64"):
        count_all([str(tiny_onnx.path)], input_shape=(1, 64, 64))
    with refused(InputRefused, "tiny.fp32.onnx", "classes"):
        count_all([str(tiny_onnx.path)], classes=10)


def test_a_file_whose_shapes_are_open_is_refused_without_one_and_counted_with_it(
    tmp_path, tiny_onnx
):
    model = onnx.load(tiny_onnx.path)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    onnx.save(model, tmp_path / "open.onnx")
    path = str(tmp_path / "open.onnx")
    with refused(GraphError, "open.onnx", "infer the shapes", hint=("--input",)):
        count_all([path])
    (one,) = count_all([path], input_shape=(1, 32, 32))
    assert one.cost == count_all([str(tiny_onnx.path)])[0].cost


def test_layers_that_do_nothing_have_no_row():
    shape = LayerCost("view", "Reshape", (1,), 0, 0, 0, 0, 0, 8)
    conv = LayerCost("conv", "Conv", (1, 2), 50, 1, 4, 8, 12, 16)
    said = costs.layers(Cost((shape, conv), {}))
    assert "view" not in said
    assert said.splitlines()[1].split() == [
        *("conv", "Conv", "1×2", "50", "100.0%", "1", "4", "8", "16", "5.0")
    ]


# ── compare ─────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def found() -> Contest:
    return compare_networks(
        ["resnet18", "vgg16", "googlenet", "resnet18"], input_shape=(1, 24, 24), classes=10, runs=3
    )


def test_networks_are_counted_and_timed_side_by_side(found):
    assert [one.name for one in found.networks] == ["resnet18", "vgg16", "googlenet"]
    resnet, _, googlenet = found.networks
    assert resnet.cost.macs == MACS24
    assert (googlenet.input, googlenet.output) == ((1, 24, 24), (10,))
    for one in (resnet, googlenet):
        assert len(one.latency.samples_ms) == 3
        assert min(one.latency.samples_ms) > 0
        assert one.gflops_per_second == pytest.approx(one.cost.flops / one.latency.p50_ms / 1e6)
    assert resnet.weights == "resnet18.safetensors"
    assert "seed 0" in googlenet.weights


def test_a_batchnorm_is_folded_before_it_is_counted(found):
    assert all(
        layer.op != "BatchNormalization" for one in found.networks[::2] for layer in one.cost.layers
    )


def test_a_network_that_cannot_take_the_input_is_named_and_not_left_out(found):
    vgg = found.networks[1]
    assert (vgg.cost, vgg.latency, vgg.gflops_per_second) == (None, None, None)
    assert vgg.refused.startswith("vgg16 cannot take an input of 1 × 24 × 24")
    said = renderer.render(found, Path("compare.svg"))
    assert re.search(r"^vgg16 +1×24×24 +refused$", said, re.MULTILINE)
    assert f"vgg16: refused: {vgg.refused}" in said


def test_the_table_and_the_json_have_the_same_figures(found):
    said = renderer.render(found, Path("compare.svg"))
    table = json.loads(renderer.render_json(found))
    for one, entry in zip(found.networks, table["networks"], strict=True):
        if one.cost:
            line = next(x for x in said.splitlines() if x.startswith(f"{one.name} "))
            assert f"{one.cost.macs:,}" in line
            assert f"{one.latency.p50_ms:.1f} ms" in line
            assert entry["cost"]["macs"] == one.cost.macs
            assert entry["latency"]["p50_ms"] == one.latency.p50_ms
    assert said.endswith("compare.svg\n")


def test_the_figure_has_every_network_and_its_numbers_and_is_the_same_for_the_same_record(found):
    drawn = renderer.plot(found)
    assert drawn == renderer.plot(found)
    texts = {text.text for text in ET.fromstring(drawn).iter(f"{SVG}text")}
    resnet = found.networks[0]
    assert {"resnet18", "googlenet", "0.03", f"{resnet.latency.p50_ms:.1f}"} <= texts
    assert "vgg16" not in texts


def test_a_figure_of_nothing_can_be_drawn(found):
    nothing = Contest("t", "ort-cpu", {}, (found.networks[1],))
    assert "<svg" in renderer.plot(nothing)
    assert "refused" in renderer.render(nothing, Path("compare.svg"))


def test_an_unknown_network_is_refused_before_any_work():
    begun: list[str] = []

    def progress(what, total=None):
        begun.append(what)
        return nullcontext(lambda: None)

    with refused(UnknownName, "no model named 'resnet19'", hint=("'resnet18'",)):
        compare_networks(["resnet18", "resnet19"], progress=progress)
    assert begun == []


def test_a_figure_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    code, said = run("compare", "resnet18", "--plot", str(tmp_path / "no" / "c.svg"))
    assert code == 5
    assert "there is no folder" in said
    assert "export" not in said


def test_a_comparison_with_a_refusal_writes_its_figure_and_exits_1(tmp_path):
    plot = tmp_path / "c.svg"
    code, said = run("compare", "vgg16", "--input", "1x24x24", "--plot", str(plot))
    assert code == 1
    assert "refused" in said
    assert plot.read_text("utf-8").rstrip().endswith("</svg>")


def test_each_command_says_what_it_does():
    for command in ("flops", "compare", "claims"):
        code, said = run(command, "--help")
        assert code == 0
        assert "--json" in said
