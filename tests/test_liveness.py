"""Bytes that are alive, against hand counts and against a machine that allocates and frees."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.flops.liveness import Step, alive_bytes

SIZE = {"x": 1, "a": 10, "b": 100, "c": 1000, "y": 10000}


def alive(*steps: tuple[str, str], given: str = "x", wanted: str = "y") -> tuple[int, ...]:
    made = [Step(tuple(reads), tuple(writes)) for reads, writes in steps]
    return alive_bytes(made, SIZE, given=given, wanted=wanted)


def test_a_chain_holds_two_tensors_at_a_time():
    assert alive(("x", "a"), ("a", "b"), ("b", "y")) == (11, 110, 10100)


def test_a_shortcut_is_held_until_it_is_read():
    assert alive(("x", "a"), ("a", "b"), ("b", "c"), ("xc", "y")) == (11, 111, 1101, 11001)


def test_branches_are_all_held_where_they_are_joined():
    assert alive(("x", "a"), ("x", "b"), ("x", "c"), ("abc", "y")) == (11, 111, 1111, 11110)


def test_what_nobody_reads_is_held_while_it_is_written():
    assert alive(("x", "ab"), ("a", "y")) == (111, 10010)


def test_an_output_is_held_from_where_it_is_written_to_the_end():
    assert alive(("x", "y"), ("y", "a"), ("a", "b")) == (10001, 10010, 10110)


def test_an_input_is_held_from_the_beginning_though_it_is_read_late():
    assert alive(("x", "b"), ("ab", "y"), given="xa") == (111, 10110)


def test_what_is_written_in_place_is_held_once():
    assert alive(("x", "a"), ("a", "a"), ("a", "y")) == (11, 10, 10010)


def test_a_graph_without_steps_holds_nothing():
    assert alive() == ()


@st.composite
def graphs(draw):
    """Return steps that read what was written before, sizes, and which tensors are wanted."""
    names = ["in"]
    steps = []
    for at in range(draw(st.integers(1, 12))):
        reads = tuple(draw(st.lists(st.sampled_from(names), max_size=3)))
        writes = tuple(f"{at}.{n}" for n in range(draw(st.integers(1, 2))))
        names += writes
        steps.append(Step(reads, writes))
    size = {name: draw(st.integers(0, 1000)) for name in names}
    return steps, size, draw(st.sets(st.sampled_from(names)))


def simulated(steps, size, wanted):
    """Run the graph on a machine that counts readers, and frees what has none left."""
    readers = {name: sum(name in step.reads for step in steps) for name in size}
    memory, seen = {"in"}, []
    for step in steps:
        memory.update(step.writes)
        seen.append(sum(size[name] for name in memory))
        for name in set(step.reads):
            readers[name] -= 1
        memory = {name for name in memory if readers[name] or name in wanted}
    return tuple(seen)


@settings(max_examples=300, deadline=None)
@given(graphs())
def test_a_machine_that_counts_readers_holds_the_same(made):
    steps, size, wanted = made
    assert alive_bytes(steps, size, given=["in"], wanted=wanted) == simulated(*made)
