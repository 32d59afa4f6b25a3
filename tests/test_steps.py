"""The steps hold what was seen, and 0 where a convolution pads with it."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.steps import Held, reach, steps_for

MANY = 10**9  # samples, so that nothing is to spare


def sides(low, high) -> tuple[np.ndarray, np.ndarray]:
    return np.array(low, np.float32), np.array(high, np.float32)


def edges(held: Held) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that round to the first and to the last step, at their far ends."""
    return held.width * (held.zero - 128.5), held.width * (held.zero + 127.5)


@pytest.mark.parametrize(
    ("kind", "low", "high", "width", "zero"),
    [
        ("signed", [-1, 0], [0.5, 127], 1.0, 0),
        ("signed", [-254, 0], [0, 1], 2.0, 0),
        ("unsigned", [0, 0], [255, 3], 1.0, 128),
        ("tensor", [-55, 0], [10, 200], 1.0, 73),  # (200 − 55) / 2 + ½
        ("tensor", [100, 110], [120, 255], 1.0, 128),  # 0 is held as well
        ("tensor", [-255, -90], [-200, -10], 1.0, -127),
        ("tensor", [-100, 0], [0, 101], 101 / 127, 0),  # not worth it
        ("channel", [1000, -50], [1255, -40], 1.0, [1128, -44]),  # −44.5 to the even one
        ("channel", [5, 7], [5, 7], 7 / 127, 0),  # constants have no width
        ("channel", [0, 0], [0, 0], 0.0, 0),
    ],
)
def test_the_steps_of_a_range_by_hand(kind, low, high, width, zero):
    held = steps_for(kind, *sides(low, high), MANY)
    assert held.width == pytest.approx(width)
    assert held.zero.tolist() == zero


@pytest.mark.parametrize("headroom", [1.0, 1.2, 1.5])
@pytest.mark.parametrize("kind", ["tensor", "channel"])
def test_nothing_that_was_seen_is_cut_off_by_more_than_half_a_step(kind, headroom):
    generator = np.random.default_rng(0)
    for _ in range(200):
        middle, half = generator.normal(0, 3, 4), generator.uniform(0.01, 2, 4)
        low, high = sides(middle - half, middle + half)
        held = steps_for(kind, low, high, MANY, headroom)
        first, last = edges(held)
        assert (low >= first - 1e-5).all()
        assert (high <= last + 1e-5).all()
        if kind == "tensor":
            assert -128 <= -held.zero <= 127  # what stands for 0


def test_few_samples_get_room_for_what_they_did_not_show():
    low, high = sides([0], [255])
    few, many = (steps_for("tensor", low, high, n).width for n in (12, MANY))
    assert few == pytest.approx(1.5 * many)
    assert steps_for("signed", low, high, 12) == steps_for("signed", low, high, MANY)


def test_how_far_a_channel_goes_is_from_the_middle_of_its_steps():
    low, high = sides([-1, 2], [3, 6])
    assert reach("channel", low, high).tolist() == [2, 2]
    assert reach("tensor", low, high).tolist() == [3, 6]
