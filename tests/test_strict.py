"""Tables into records: every refusal names the place, the value and what is allowed."""

from __future__ import annotations

from collections import ChainMap
from types import MappingProxyType
from typing import Literal

import pytest
from conftest import refused

from exporter.errors import ProfileError
from exporter.records import Asked
from exporter.strict import read


class Wheel(Asked, frozen=True):
    size: int = 16
    tyre: Literal["summer", "winter"] = "summer"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be 1 or more, found {self.size}")


class Car(Asked, frozen=True):
    name: str
    wheel: Wheel = Wheel()
    doors: tuple[int, ...] = ()
    weight: float | None = None


@pytest.mark.parametrize("kind", [dict, MappingProxyType, ChainMap])
def test_any_mapping_becomes_a_record(kind):
    table = {"name": "a", "wheel": {"size": 3}, "doors": [1, 2], "weight": 2}
    assert read(Car, kind(table), where="x") == Car("a", Wheel(3), (1, 2), 2.0)


def test_the_table_is_left_as_it_was():
    table = {"name": "a", "wheel": {"size": 3}, "doors": [1, 2]}
    read(Car, table, where="x")
    assert table == {"name": "a", "wheel": {"size": 3}, "doors": [1, 2]}


@pytest.mark.parametrize(
    ("table", "said", "hint"),
    [
        ({}, ["car.toml: the key 'name' is missing"], None),
        ({"name": 1}, ["car.toml: name: expected str, got int, found 1"], None),
        ({"name": "a", "nam": 1}, ["car.toml: unknown key 'nam'"], ("did you mean 'name'?",)),
        ({"name": "a", "Doors": 1}, ["unknown key 'Doors'"], ("did you mean 'doors'?",)),
        ({"name": "a", "": 1}, ["unknown key ''"], ("doors, name, weight, wheel",)),
        ({"name": "a", "wheel": {"sice": 1}}, ["car.toml: wheel: unknown key 'sice'"], ("'size'",)),
        ({"name": "a", "wheel": 5}, ["car.toml: wheel: expected", "found 5"], None),
        ({"name": "a", "wheel": {"size": "b"}}, ["car.toml: wheel.size", "int", "'b'"], None),
        ({"name": "a", "wheel": {"size": 0}}, ["car.toml: wheel: size must be", "found 0"], None),
        ({"name": "a", "wheel": {"size": True}}, ["wheel.size: expected int", "True"], None),
        ({"name": "a", "wheel": {"size": 1.5}}, ["wheel.size: expected int", "1.5"], None),
        ({"name": "a", "doors": [1, "b"]}, ["car.toml: doors[1]: expected int", "'b'"], None),
        ({"name": "a", "doors": "b"}, ["car.toml: doors: expected array", "'b'"], None),
        ({"name": "a", "weight": "b"}, ["car.toml: weight: expected float", "'b'"], None),
    ],
)
def test_a_wrong_table_is_refused_by_place_value_and_nearest_key(table, said, hint):
    with refused(ProfileError, *said, hint=hint):
        read(Car, table, where="car.toml")


def test_a_word_that_is_not_one_of_the_allowed_is_told_which_are():
    with pytest.raises(ProfileError) as caught:
        read(Car, {"name": "a", "wheel": {"tyre": "wimter"}}, where="car.toml")
    assert "car.toml: wheel.tyre" in str(caught.value)
    assert "'wimter'" in str(caught.value)
    assert "winter" in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize("doors", [(1, "b"), [1, "b"]])
def test_a_wrong_item_is_named_in_a_tuple_as_in_a_list(doors):
    with refused(ProfileError, "car.toml: doors[1]: expected int", "'b'"):
        read(Car, {"name": "a", "doors": doors}, where="car.toml")


def test_a_key_with_dots_and_brackets_is_an_unknown_key_like_any_other():
    with refused(ProfileError, "unknown key 'a.b[0]'"):
        read(Car, {"name": "a", "a.b[0]": 1}, where="car.toml")
