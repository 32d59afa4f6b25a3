"""Profiles from strangers: what they cannot name, and what is said of each that is malformed."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from conftest import refused

from exporter import plugins
from exporter.errors import ExportError, ProfileError
from exporter.profile import Profile, load_profile

TOP = 'about = "Here"\n'
REST = "[runtime.ort-cpu]\n[precision.fp32]\n"
INT8 = f"{TOP}{REST}[precision.int8.options]\n"
RTX = f"{TOP}[precision.fp32]\n[runtime.tensorrt-rtx]\n"
CPU = f"{TOP}[precision.fp32]\n[runtime.ort-cpu]\n"
VINO = f"{TOP}[precision.fp32]\n[runtime.openvino]\n"
SEEDS, WORDS = "from 0 to 4294967295", "'auto', 'max', 'percentile', 'mse', 'entropy'"
NESTED = "[" * 10_000 + "]" * 10_000


def gate(text: str) -> str:
    return f"{TOP}{REST}tolerance = {{ {text} }}\n"


def said_of(tmp_path, text: str | bytes) -> str:
    """Return what is said of a profile: the error, and its hint in brackets."""
    path = tmp_path / "p.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ExportError) as caught:
        load_profile(path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return f"{caught.value} [{caught.value.hint}]" if caught.value.hint else str(caught.value)


# ── Malformed ───────────────────────────────────────────────────────────────────────

MALFORMED = {
    # numbers that are none, or far out
    f"{TOP}opset = nan\n{REST}": (
        "opset: expected int, got float, found nan (allowed: from 19 to 24)"
    ),
    f"{TOP}opset = 1e308\n{REST}": (
        "opset: expected int, got float, found 1e+308 (allowed: from 19 to 24)"
    ),
    f"{TOP}opset = -1\n{REST}": "opset must be from 19 to 24, found -1",
    f"{TOP}opset = {1 << 63}\n{REST}": "opset must be from 19 to 24, found 9223372036854775808",
    f"{TOP}opset = true\n{REST}": (
        "opset: expected int, got bool, found True (allowed: from 19 to 24)"
    ),
    f"{TOP}{REST}[timing]\nruns = inf\n": (
        "timing.runs: expected int, got float, found inf (allowed: from 2 to 1000000)"
    ),
    f"{TOP}{REST}[timing]\nruns = 1\n": "timing: runs must be from 2 to 1000000, found 1",
    f"{TOP}{REST}[timing]\nruns = {1 << 63}\n": (
        "timing: runs must be from 2 to 1000000, found 9223372036854775808"
    ),
    f"{TOP}{REST}[timing]\nruns = 'many'\n": (
        "timing.runs: expected int, got str, found 'many' (allowed: from 2 to 1000000)"
    ),
    f"{TOP}{REST}[timing]\nwarmup = -1\n": "timing: warmup must be from 0 to 100000, found -1",
    f"{TOP}{REST}[timing]\nsettle_ms = nan\n": (
        "timing: settle_ms must be from 0 to 1000, found nan"
    ),
    f"{TOP}{REST}[timing]\nsettle_ms = 1e308\n": (
        "timing: settle_ms must be from 0 to 1000, found 1e+308"
    ),
    f"{TOP}{REST}[timing]\nseed = -1\n": f"timing: seed must be {SEEDS}, found -1",
    f"{TOP}{REST}[timing]\nseed = {1 << 32}\n": f"timing: seed must be {SEEDS}, found 4294967296",
    f"{TOP}{REST}[timing]\npytorch_threads = 257\n": (
        "timing: pytorch_threads must be from 0 to 256, found 257"
    ),
    f"{TOP}{REST}[timing]\nbatches = []\n": ("timing: batches must be one or more sizes, found []"),
    f"{TOP}{REST}[timing]\nbatches = [{1 << 63}]\n": (
        "timing: batches must be from 1 to 65536, found [9223372036854775808]"
    ),
    f"{TOP}{REST}[timing]\nbatches = [1, true]\n": (
        "timing.batches[1]: expected int, got bool, found True (allowed: from 1 to 65536)"
    ),
    f"{TOP}{REST}[timing]\nbatches = 4\n": (
        "timing.batches: expected array, got int, found 4 (allowed: from 1 to 65536)"
    ),
    f"{TOP}{REST}[batch]\nmin = 2\nmax = 1\n": "batch: need 1 <= min <= opt <= max, found 2, 1, 1",
    f"{TOP}{REST}[batch]\nmax = {1 << 40}\n": (
        "batch: max must be from 1 to 65536, found 1099511627776"
    ),
    f"{TOP}{REST}[parity]\nrandom = 0\n": "parity: random must be from 1 to 1000000, found 0",
    f"{TOP}{REST}[parity]\nrandom = 1e3\n": (
        "parity.random: expected int, got float, found 1000.0 (allowed: from 1 to 1000000)"
    ),
    f"{TOP}{REST}[calibration]\nimages = {1 << 63}\n": (
        "calibration: images must be from 8 to 1000000, found 9223372036854775808"
    ),
    # gates
    gate("cosine = nan"): "precision.fp32: tolerance: cosine must be from -1 to 1, found nan",
    gate("sqnr_db = inf"): "precision.fp32: tolerance: sqnr_db must be a finite number, found inf",
    gate("max_abs = -1"): "precision.fp32: tolerance: max_abs must be 0 or more, found -1.0",
    gate("max_abs = true"): (
        "precision.fp32: tolerance.max_abs: expected float, got bool, found True "
        "(allowed: 0 or more)"
    ),
    gate("agreement = 98"): (
        "precision.fp32: tolerance: agreement must be from 0 to 1, found 98.0"
    ),
    gate("accuracy_drop = '2%'"): (
        "precision.fp32: tolerance.accuracy_drop: expected float, got str, found '2%' "
        "(allowed: from 0 to 1)"
    ),
    gate(f"rel_l2 = 1{'0' * 400}"): (
        "precision.fp32: tolerance.rel_l2: number out of range, found "
        f"1{'0' * 79}… (allowed: 0 or more)"
    ),
    # options of plug-ins
    f"{INT8}percentile = nan\n": (
        "precision.int8.options: percentile must be above 0 and at most 100, found nan"
    ),
    f"{INT8}percentile = 'all'\n": (
        "precision.int8.options: percentile: expected float, got str, found 'all' "
        "(allowed: above 0 and at most 100)"
    ),
    f"{INT8}calibrator = 5\n": (
        f"precision.int8.options: calibrator: expected str, got int, found 5 (allowed: {WORDS})"
    ),
    f"{INT8}calibrator = 'maximum'\n": (
        "precision.int8.options: calibrator: 'maximum' is not allowed [did you mean 'max'?]"
    ),
    f"{INT8}linear = 1\n": (
        "precision.int8.options: linear: expected bool, got int, found 1 (allowed: true, false)"
    ),
    f"{TOP}{REST}[precision.fp16.options]\nmargin = 0.5\n": (
        "precision.fp16.options: margin must be 1 or more, found 0.5"
    ),
    f"{CPU}threads = -1\n": "runtime.ort-cpu: threads must be from 0 to 256, found -1",
    f"{CPU}threads = 2.5\n": (
        "runtime.ort-cpu: threads: expected int, got float, found 2.5 (allowed: from 0 to 256)"
    ),
    f"{RTX}workspace_mib = {1 << 63}\n": (
        "runtime.tensorrt-rtx: workspace_mib must be from 1 to 1048576, found 9223372036854775808"
    ),
    f"{VINO}device = 'AUTO'\n": (
        "runtime.openvino: device 'AUTO' chooses by itself where to run: name one"
    ),
    # keys
    f"{TOP}schema = 99\n{REST}": (
        "unknown key 'schema' [known: about, batch, calibration, data, model, opset, parity, "
        "postprocess, precision, preprocess, runtime, size, timing]"
    ),
    f'{TOP}{REST}[timing]\n"\\u202eruns" = 9\n': (
        "timing: unknown key '\\u202eruns' [did you mean 'runs'?]"
    ),
    f"{TOP}{'k' * 100_000} = 9\n{REST}": (
        f"unknown key '{'k' * 80}'… [known: about, batch, calibration, data, model, opset, parity, "
        "postprocess, precision, preprocess, runtime, size, timing]"
    ),
    f"{TOP}batch = {'[' * 40}{']' * 40}\n{REST}": (
        f"batch: expected table, got array, found {'[' * 40}{']' * 40}"
    ),
    # text that is no TOML
    f"{TOP}{TOP}{REST}": "not valid TOML: Cannot overwrite a value (at line 2, column 15)",
    f"{TOP}{REST}{REST}": "not valid TOML: Cannot declare ('runtime', 'ort-cpu') twice (at line 4",
    f"a = {NESTED}\n": "not valid TOML: ",
    f"\ufeff{TOP}{REST}": "not valid TOML: Invalid statement (at line 1, column 1)",
    f"{TOP}opset = 1{'0' * 5000}\n{REST}": "not valid TOML: Exceeds the limit (4300 digits)",
    "": "the key 'about' is missing",
}


@pytest.mark.parametrize(("text", "words"), MALFORMED.items(), ids=range(len(MALFORMED)))
def test_a_malformed_profile_is_told_the_key_what_was_found_and_what_is_allowed(
    tmp_path, text, words
):
    said = said_of(tmp_path, text)
    if "not valid TOML" in words:  # the rest is Python's
        assert said.startswith(f"p.toml: {words}")
        assert len(said) < 300
    else:
        assert said == f"p.toml: {words}"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((TOP + REST).encode("utf-16"), "p.toml: not UTF-8 text (byte 0)"),
        (b"about = '\xc3\x28'", "p.toml: not UTF-8 text (byte 9)"),
        (b"#" * (10 << 20), "p.toml: larger than 1048576 bytes, so not a profile"),
    ],
)
def test_what_is_no_text_or_no_page_is_refused_before_it_is_parsed(tmp_path, data, words):
    assert said_of(tmp_path, data) == words


def test_there_are_forty_malformed_profiles_and_more():
    assert len(MALFORMED) >= 40


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    with refused(ProfileError, "pipe.toml: a pipe, socket or device", hint=None):
        load_profile(tmp_path / "pipe.toml")


def test_a_device_is_not_read(tmp_path):
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    with refused(ProfileError, "zero.toml: a pipe, socket or device", hint=None):
        load_profile(tmp_path / "zero.toml")


# ── What a profile cannot name ──────────────────────────────────────────────────────

# A key that may be any text, and what limits it. One that is not here is a list of words or none.
TEXTS = {
    "Profile.about": "shown, and nothing else",
    "ModelChoice.args": "given to the code that the command line names",
    "Profile.runtime": "names of files in exporter/runtimes",
    "Profile.precision": "names of files in exporter/precisions",
    "keep": "names of layers of the network",
    "targets": "a list of known GPUs",
    "device": "letters and a number",
}


def texts(kind: Any, name: str) -> Iterator[str]:
    """Yield the keys at and below a type that may be any text."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for field, inner in typing.get_type_hints(kind).items():
            if field in kind.__struct_fields__:
                yield from texts(inner, f"{kind.__name__}.{field}")
        return
    assert kind is not Any, name
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is str or origin is dict:
        yield name
    elif origin is not typing.Literal:
        for one in inside:
            yield from texts(one, name)


def test_every_key_of_a_profile_that_may_be_any_text_is_known_and_limited():
    assert set(texts(Profile, "Profile")) == {name for name in TEXTS if "." in name}
    free = set()
    for axis in ("runtimes", "precisions"):
        for name in plugins.names(axis):
            kind = plugins._plugin(axis, name)
            free |= {text.rpartition(".")[2] for text in texts(kind, name)}
    assert free == {name for name in TEXTS if "." not in name}


HOSTILE = [
    *(
        "../secret",
        "../../etc/passwd",
        "/etc/passwd",
        "~/secret",
        "~root/x",
        "$HOME/x",
        "${HOME}/x",
    ),
    *(
        "%USERPROFILE%\\x",
        "a\\u0000b",
        "..\\\\secret",
        "file:///etc/passwd",
        "\\\\\\\\host\\\\share",
    ),
    *("http://host/x", "https://host/x.so", "ftp://host/x", "x.", "caf\\u00e9", "cafe\\u0301"),
    *("\\u202etxt.exe", "/proc/self/environ", "/dev/zero", "lib/plugin.so", "os:system"),
    *("os.system", "`id`", "$(id)", "; rm -rf /", "| id", "env:HOME"),
]
PLACES = {
    "a runtime": f'{TOP}[precision.fp32]\n[runtime."{{}}"]\n',
    "a precision": f'{TOP}[runtime.ort-cpu]\n[precision."{{}}"]\n',
    "a target": f'{RTX}targets = ["{{}}"]\n',
    "a device": f'{VINO}device = "{{}}"\n',
    "a calibrator": f'{INT8}calibrator = "{{}}"\n',
    "a form": f'{INT8}form = "{{}}"\n',
    "a number": f'{CPU}threads = "{{}}"\n',
    "samples": f'{TOP}{REST}[calibration]\nimages = "{{}}"\n',
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", HOSTILE)
def test_no_path_command_variable_or_address_is_taken_anywhere(tmp_path, place, value):
    said = said_of(tmp_path, PLACES[place].format(value))
    assert said.isprintable()


KEYS = [
    *("path", "file", "weights", "data", "factory", "module", "plugin", "plugins"),
    *("library", "command", "run", "env", "environment", "url", "include", "extends", "import"),
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "table",
    [
        f"{TOP}{{}}\n{REST}",
        f"{CPU}{{}}\n",
        f"{RTX}targets = ['sm86']\n{{}}\n",
        f"{INT8}{{}}\n",
        f"{TOP}{REST}{{}}\n",
        f"{TOP}{REST}[calibration]\n{{}}\n",
    ],
)
def test_no_key_names_a_file_code_a_command_a_variable_or_an_address(tmp_path, key, table):
    said = said_of(tmp_path, table.format(f'{key} = "x"'))
    assert f"unknown key {key!r}" in said or f"{key}: expected table, got str" in said
