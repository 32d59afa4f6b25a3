"""What is drawn: the same bytes for the same record, and the figures where they belong."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from exporter.records import Convergence, Curve
from exporter.renderers import plots

FOUND = Convergence(
    3,
    (1, 2, 4, 5),
    (
        Curve("max", (0.4, 0.2, 0.1, 0.0), (0.2, 0.1, 0.0, 0.0)),
        Curve("percentile 99.999", (0.3, 0.04, 0.02, 0.0), (0.1, 0.0, 0.0, 0.0)),
    ),
)
SVG = "{http://www.w3.org/2000/svg}"


def test_the_same_record_gives_the_same_bytes_without_a_date():
    drawn = plots.calibration(FOUND)
    assert drawn == plots.calibration(FOUND)
    assert "dc:date" not in drawn


def test_every_curve_and_count_is_named_in_text():
    texts = {text.text for text in ET.fromstring(plots.calibration(FOUND)).iter(f"{SVG}text")}
    for curve in FOUND.curves:
        assert {f"{curve.calibrator}, largest", f"{curve.calibrator}, median"} <= texts
    assert {"1", "2", "4", "5", "Scales of 3 tensors"} <= texts


def test_a_pass_over_one_sample_can_be_drawn():
    one = Convergence(1, (1,), (Curve("max", (0.0,), (0.0,)),))
    assert plots.calibration(one).rstrip().endswith("</svg>")


def test_drawing_neither_follows_nor_changes_the_users_own_settings_of_matplotlib():
    import matplotlib as mpl

    drawn = plots.calibration(FOUND)
    users = {"svg.hashsalt": "mine", "svg.fonttype": "path", "font.size": 30, "axes.grid": True}
    with mpl.rc_context(users):
        assert plots.calibration(FOUND) == drawn
        assert {name: mpl.rcParams[name] for name in users} == users


@pytest.mark.parametrize("share", [0.0, 1.0, 40.0])
def test_any_distance_can_be_drawn(share):
    far = Convergence(1, (1, 2), (Curve("max", (share, 0.0), (share, 0.0)),))
    assert "<svg" in plots.calibration(far)
