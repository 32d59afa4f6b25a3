"""A run's time is split among its stages with nothing left over, and its memory as well."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from exporter import memory, stages
from exporter.contracts import silent
from exporter.memory import Peak, PeakMemory
from exporter.records import Stage
from exporter.renderers import _stages as shown
from exporter.stages import REST, Stages

MB = 1_000_000


class Machine:
    """A clock that stands still until told, and a peak of memory from one look to the next."""

    def __init__(self) -> None:
        self.now = 100.0
        self.resident = self.peak = 10

    def works(self, seconds: float, *, holding: int = 10) -> None:
        self.now += seconds
        self.peak = max(self.peak, holding)

    def look(self) -> Peak:
        peak, self.peak = self.peak, self.resident
        return Peak(peak, so_far=False)


@pytest.fixture
def machine(monkeypatch):
    found = Machine()
    monkeypatch.setattr(stages, "perf_counter", lambda: found.now)
    monkeypatch.setattr(stages, "PeakMemory", lambda: found)
    return found


def test_each_moment_belongs_to_the_innermost_stage_and_all_add_up(machine):
    run = Stages(silent)
    machine.works(1)
    with run.announced("convert"):
        machine.works(2)
        with run.announced("calibrate", 8):
            machine.works(4)
        machine.works(8)
    machine.works(16)
    with run.quietly("time", part="latency"):
        machine.works(32)
    found = {stage.name: (stage.seconds, stage.part) for stage in run.so_far}
    assert found == {
        "convert": (10, "conversion"),
        "calibrate": (4, "conversion"),
        "time": (32, "latency"),
        REST: (17, "other"),
    }
    assert sum(stage.seconds for stage in run.so_far) == 63


def test_a_peak_is_of_the_stage_that_it_was_reached_in(machine):
    run = Stages(silent)
    with run.quietly("outer"):
        machine.works(1, holding=50)
        with run.quietly("inner"):
            machine.works(1, holding=900)
        machine.works(1, holding=70)
    found = {stage.name: stage.peak_bytes for stage in run.so_far}
    assert found == {"outer": 70, "inner": 900, REST: 10}


def test_a_stage_that_fails_keeps_its_time_and_is_over(machine):
    run = Stages(silent)
    with suppress(KeyError), run.announced("fails"):
        machine.works(3)
        raise KeyError
    machine.works(5)
    assert {stage.name: stage.seconds for stage in run.so_far} == {"fails": 3, REST: 5}


def test_what_was_in_no_stage_can_be_named_afterwards(machine):
    run = Stages(silent)
    machine.works(7)
    run.name_what_was("look")
    machine.works(1)
    assert [(stage.name, stage.seconds) for stage in run.so_far] == [("look", 7), (REST, 1)]


def test_progress_is_told_of_what_is_announced_and_of_nothing_else():
    told = []

    def progress(what, total=None):
        told.append((what, total))
        return silent(what, total)

    run = Stages(progress)
    with run.announced("one", 3), run.quietly("two"):
        pass
    assert told == [("one", 3)]


# ── Memory ──────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not memory._begin_anew(), reason="this system begins no peak anew")
def test_memory_that_was_freed_is_in_the_peak_of_its_own_stage_alone():
    run = Stages(silent)
    with run.quietly("before"):
        pass
    with run.quietly("holds 256 MB"):
        np.ones(32 * MB)  # float64
    with run.quietly("after"):
        pass
    before, held, after, _ = (stage.peak_bytes for stage in run.so_far)
    assert held - before == pytest.approx(256 * MB, rel=0.1)
    assert after < before + 64 * MB
    assert not any(stage.so_far for stage in run.so_far)


def test_a_system_that_begins_no_peak_anew_says_so_far(monkeypatch):
    monkeypatch.setattr(memory, "_CLEAR", Path("/nonexistent/clear_refs"))
    found = PeakMemory().look()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert found == Peak(kilobytes * (1 if sys.platform == "darwin" else 1024), so_far=True)


def test_a_system_that_tells_no_peak_gives_none(monkeypatch):
    monkeypatch.setattr(memory, "_CLEAR", Path("/nonexistent/clear_refs"))
    monkeypatch.setitem(sys.modules, "resource", None)
    assert PeakMemory().look() is None


# ── The table ───────────────────────────────────────────────────────────────────────

TAKEN = (
    Stage("fold", 0.005, "conversion", 300 * MB),
    Stage("export", 4.0, "conversion", 500 * MB),
    Stage("write", 0.005, "conversion", 800 * MB),
    Stage("compare", 5.99, "evidence", 1_200 * MB),
)


def test_the_table_has_every_stage_with_its_share_and_peak():
    assert shown.rows(TAKEN)[1] == ("export", "conversion", "4.00 s", "40.0%", "500 MB")
    assert [row.stage for row in shown.rows(TAKEN)] == ["fold", "export", "write", "compare"]
    assert shown.rows(TAKEN)[3].peak == "1,200 MB"


def test_where_room_is_scarce_small_stages_are_one_line_with_the_largest_peak_of_them():
    assert [tuple(row) for row in shown.summed(TAKEN)] == [
        ("export", "conversion", "4.00 s", "40.0%", "500 MB"),
        ("compare", "evidence", "5.99 s", "59.9%", "1,200 MB"),
        ("2 stages below 1%", "", "0.01 s", "0.1%", "800 MB"),
    ]
    assert shown.summed(TAKEN[1:]) == shown.rows(TAKEN[1:])  # one small one is no crowd


def test_a_peak_that_is_not_of_the_stage_says_so_and_what_is_not_measured_is_no_figure():
    assert shown.peak(Stage("x", 1.0, "other", 5 * MB, so_far=True)) == "5 MB so far"
    assert shown.peak(Stage("x", 1.0)) == "not measured"
    assert shown.SO_FAR in shown.notes([Stage("x", 1.0, "other", 5 * MB, so_far=True)])
    assert shown.SO_FAR not in shown.notes(TAKEN)


def test_a_run_of_no_time_can_be_shown():
    assert shown.rows([Stage("x", 0.0)])[0].share == "0.0%"
