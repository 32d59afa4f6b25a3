"""Kernels, what they compute and move, and what the machine could do at best."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import refused
from quantisation import PLAIN, alive, exported, images, inverted, residual, statistics_of

from exporter import ceilings, roofline
from exporter.cli import main
from exporter.errors import BuildError, InputRefused, ProfileError, RuntimeMissing, UnknownName
from exporter.flops import count_flops
from exporter.precisions.int8 import Int8
from exporter.records import Bandwidth, Ceilings, Kernel, Roofline
from exporter.renderers import roofline as renderer
from exporter.roofline import measure_roofline
from exporter.runtimes._ort_kernels import kernel_times


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ceilings, "_SIZE", 64)
    monkeypatch.setattr(ceilings, "_SETS", (1 << 12, 1 << 16))
    monkeypatch.setattr(ceilings, "_MOVED", 1 << 16)


@pytest.fixture(scope="module", params=[residual, inverted], ids=["residual", "inverted"])
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    exported(alive(request.param()), path)
    return path


def by_hand() -> Roofline:
    """Ceilings of 100 and 400 GFLOP/s, 50 GB/s up to 1 MB and 10 beyond."""
    found = Ceilings(
        1, {"fp32": 100.0, "int8": 400.0}, (Bandwidth(1_000_000, 50.0), Bandwidth(10**9, 10.0))
    )
    kernels = (
        Kernel("dense", "Conv", "fp32", 500_000_000, 1_000_000, 20.0),  # 10 ms at the peak
        Kernel("whole", "QLinearConv", "int8", 500_000_000, 1_000_000, 5.0),  # 2.5 ms
        Kernel("wide", "Gemm", "fp32", 1_000_000, 100_000_000, 11.0),  # 10 ms from memory
        Kernel("add", "Add", "fp32", 0, 500_000, 0.02),  # 0.01 ms from a cache
    )
    return Roofline("net.onnx", "ort-cpu", 1, 9, found, kernels)


def test_the_least_time_is_that_of_the_arithmetic_or_of_the_bytes():
    found = by_hand()
    assert [found.bound_ms(k) for k in found.kernels] == pytest.approx([10, 2.5, 10, 0.01])
    assert [found.is_memory_bound(k) for k in found.kernels] == [False, False, True, True]
    assert [found.achieved(k) for k in found.kernels] == pytest.approx([0.5, 0.5, 10 / 11, 0.5])


def test_what_has_most_to_win_comes_first_and_nothing_is_won_beyond_a_ceiling():
    found = by_hand()
    assert [k.name for k in found.ranked] == ["dense", "whole", "wide", "add"]
    assert found.total_ms - found.least_ms == pytest.approx(10 + 2.5 + 1 + 0.01)
    fast = Kernel("fast", "Conv", "fp32", 500_000_000, 0, 1.0)
    assert found.left_ms(fast) == 0
    assert "faster than the ceilings" in renderer.table(
        Roofline("a", "b", 1, 1, found.ceilings, (fast,))
    )


def test_a_type_that_was_not_measured_is_held_against_fp32():
    assert by_hand().ceilings.peak("fp16") == 100
    assert by_hand().ceilings.peak(None) == 100


# ── Kernels ─────────────────────────────────────────────────────────────────────────


def event(name: str, op: str, reads, writes, dur: int = 10):
    args = {"op_name": op, "input_type_shape": reads, "output_type_shape": writes}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": args}


def test_a_kernel_is_counted_from_the_shapes_in_its_profile():
    scalar = {"float": []}
    events = [
        event("a", "Conv", [{"float": [2, 6, 9, 9]}, {"float": [8, 3, 3, 3]}, {"float": [8]}],
              [{"float": [2, 8, 7, 7]}]),
        event("b", "QLinearConv", [{"uint8": [1, 4, 5, 5]}, scalar, {"uint8": []},
              {"int8": [6, 4, 1, 1]}, {"float": [6]}, {"int8": [6]}, scalar, {"uint8": []}],
              [{"uint8": [1, 6, 5, 5]}]),
        event("c", "Gemm", [{"float": [3, 5]}, {"float": [7, 5]}], [{"float": [3, 7]}]),
        event("d", "Relu", [{"float": [10]}], [{"float": [10]}]),
    ]  # fmt: skip
    a, b, c, d = kernel_times(events, {}, skip=0)
    assert (a.macs, a.bytes, a.type) == (784 * 27, 4 * (972 + 216 + 8 + 784), "fp32")
    assert (b.macs, b.type) == (150 * 4, "int8")
    assert b.bytes == 100 + 4 + 1 + 24 + 24 + 6 + 4 + 1 + 150
    assert (c.macs, c.flops) == (21 * 5, 210)
    assert (d.macs, d.intensity, d.bytes) == (0, 0.0, 80)


def test_the_time_is_the_median_without_the_first_runs():
    spans = [900, 800, 3, 1, 2, 50, 2]
    found = kernel_times([event("a", "Relu", [], [], dur) for dur in spans], {}, skip=2)
    assert found[0].milliseconds == 2 / 1000
    (few,) = kernel_times([event("a", "Relu", [], [], 7)], {}, skip=5)
    assert few.milliseconds == 7 / 1000  # a single run is better than nothing


@pytest.mark.parametrize("quantised", [False, True], ids=["fp32", "int8"])
def test_the_kernels_of_a_file_add_up_to_its_cost_and_have_its_layers_names(
    file, quantised, tmp_path
):
    model = onnx.load(file)
    path = file
    if quantised:
        x = images(8)
        asked = Int8(**PLAIN | {"form": "onnxruntime"})
        path = tmp_path / "int8.onnx"
        onnx.save(asked.convert(model, statistics_of(model, x), x).model, path)
    found = measure_roofline(path, threads=1, runs=3)
    macs = count_flops(model).macs  # in FP32 channels are filled up to blocks of 16
    assert macs <= sum(k.macs for k in found.kernels) <= (1 if quantised else 1.6) * macs
    weighted = {n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm")}
    assert weighted <= {k.name for k in found.kernels if k.macs}
    assert {k.type for k in found.kernels if "Conv" in k.op} == {"int8" if quantised else "fp32"}
    assert found.ceilings.threads == 1
    assert found.total_ms > 0


def test_a_batch_is_counted_as_a_batch(file):
    one, four = (measure_roofline(file, threads=1, runs=2, batch=batch) for batch in (1, 4))
    assert sum(k.macs for k in four.kernels) == 4 * sum(k.macs for k in one.kernels)


# ── Ceilings ────────────────────────────────────────────────────────────────────────


def test_ceilings_are_of_what_was_timed(monkeypatch):
    clock = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr(ceilings, "perf_counter", lambda: float(next(clock)))
    found = ceilings.measure_ceilings(1)
    assert found.peaks == dict.fromkeys(("fp32", "bf16", "int8"), 2 * 64**3 / 0.5 / 1000000000.0)
    assert [b.working_set for b in found.bandwidths] == [1 << 12, 1 << 16]
    assert {b.gigabytes for b in found.bandwidths} == {2 * (1 << 16) / 0.5 / 1e9}


def test_the_number_of_torchs_threads_is_what_it_was():
    import torch

    before = torch.get_num_threads()
    ceilings.measure_ceilings(before + 1)
    assert torch.get_num_threads() == before


# ── The command ─────────────────────────────────────────────────────────────────────


def test_the_command_prints_a_table_draws_a_plot_and_gives_json(file, tmp_path):
    plot = tmp_path / "roofline.svg"
    given = ["roofline", str(file), "--threads", "1", "--runs", "3"]
    said = CliRunner().invoke(main, [*given, "--plot", str(plot), "--rows", "2"])
    assert said.exit_code == 0, said.output
    assert "GFLOP/s" in said.output
    assert "are left to win" in said.output
    assert ET.fromstring(plot.read_text()).tag.endswith("svg")
    printed = CliRunner().invoke(main, [*given, "--json"])
    record = json.loads(printed.stdout)
    assert record["runtime"] == "ort-cpu"
    assert {"least_ms", "left_ms", "achieved"} <= record["kernels"][0].keys()


def test_what_cannot_be_profiled_is_refused(file, tmp_path):
    with refused(InputRefused, "is not a file"):
        measure_roofline(tmp_path / "none.onnx")
    text = tmp_path / "text.onnx"
    text.write_text("no graph")
    with pytest.raises((InputRefused, BuildError)):
        measure_roofline(text)
    with refused(InputRefused, "batch and runs must be 1 or more, found 0"):
        measure_roofline(file, batch=0)
    with pytest.raises(ProfileError, match="threads"):
        measure_roofline(file, threads=-1)
    with refused(UnknownName, "no runtime named 'ort-cup'", hint=("'ort-cpu'",)):
        measure_roofline(file, runtime="ort-cup")


def test_a_runtime_that_tells_no_kernels_is_refused(file, monkeypatch):
    class Silent:
        def missing(self, action):
            return None

    monkeypatch.setattr(roofline, "load_runtime", lambda name, options: Silent())
    with refused(RuntimeMissing, "does not tell how long its kernels take"):
        measure_roofline(file)


def test_a_graph_of_a_fixed_batch_takes_no_other(file, tmp_path):
    model = onnx.load(file)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    path = tmp_path / "fixed.onnx"
    onnx.save(model, path)
    with refused(InputRefused, "takes a batch of 2, not of 1"):
        measure_roofline(path, threads=1, runs=1)
