"""Profiles: what the built-in one asks for, and what is said of each mistake in a user's own."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from copy import deepcopy

import pytest
from conftest import refused

from exporter.errors import ProfileError, UnknownName
from exporter.profile import OPSETS, load_profile, profile_names, read_profile
from exporter.records import BatchRange, Timing, Tolerance

TOP = 'about = "Here"\n'
REST = "[runtime.ort-cpu]\n[precision.fp32]\n"


@pytest.fixture
def written(tmp_path):
    """Return a function that loads a profile from its text or bytes."""

    def load(text: str | bytes, overrides=None):
        path = tmp_path / "mine.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_profile(path, overrides)

    return load


# ── What is right ───────────────────────────────────────────────────────────────────


def test_the_default_profile_asks_for_three_precisions_on_two_runtimes():
    profile = load_profile("default")
    assert tuple(profile.precision) == ("fp32", "fp16", "int8")
    assert tuple(profile.runtime) == ("ort-cpu", "tensorrt-rtx")
    assert profile.runtime["tensorrt-rtx"]["targets"] == ["sm86", "sm89", "sm120"]
    assert profile.batch == BatchRange(1, 8, 32)
    assert "default" in profile_names()


def test_the_default_profile_leaves_no_precision_without_gates():
    for choice in load_profile("default").precision.values():
        assert choice.tolerance.bounds()


@pytest.mark.parametrize("name", profile_names())
def test_every_built_in_profile_loads_and_comes_back_from_its_own_toml(name, written):
    profile = load_profile(name)
    assert written(profile.to_toml()) == profile


def test_a_profile_with_every_key_set_comes_back_from_its_own_toml(written):
    profile = written(
        'about = "Quotes \\" and \\\\ and 漢字"\nopset = 24\n'
        "[runtime.ort-cpu]\nthreads = 3\n"
        "[precision.int8]\n"
        "tolerance = { max_abs = 1e-3, rel_l2 = 0.5, cosine = -0.5, sqnr_db = -3.0 }\n"
        "random_tolerance = { agreement = 0.0, accuracy_drop = 1.0, noise_multiple = 0.0 }\n"
        'options = { calibrator = "max", keep = ["a.b", "c"], linear = true }\n'
        "[batch]\nmin = 2\nopt = 3\nmax = 4\n"
        "[timing]\nbatches = [2, 4]\nwarmup = 0\nruns = 2\npytorch_threads = 1\n"
        "[parity]\nrandom = 1\nseed = 7\n[calibration]\nimages = 8\nseed = 9\n"
    )
    assert written(profile.to_toml()) == profile
    assert profile.timing == Timing((2, 4), 0, 2, 1)
    assert profile.precision["int8"].tolerance == Tolerance(
        max_abs=1e-3, rel_l2=0.5, cosine=-0.5, sqnr_db=-3.0
    )


def test_a_page_of_two_lines_is_a_profile_with_every_default(written):
    profile = written(TOP + REST)
    assert (profile.about, profile.opset, profile.batch) == ("Here", 20, BatchRange(1, 1, 1))
    assert profile.timing.batches == (1,)
    assert profile.precision["fp32"].tolerance.bounds() == {}


def test_a_path_may_be_a_string_and_the_same_file_gives_the_same_profile(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(TOP + REST, "utf-8")
    assert load_profile(str(path)) == load_profile(path)


def test_a_profile_is_judged_without_importing_any_framework():
    code = (
        "import sys; from exporter.profile import load_profile; load_profile('default');"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'tensorrt_rtx'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ── What is wrong ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "place", "key", "near"),
    [
        (f"{TOP}runtimes = 1\n{REST}", "mine.toml: unknown", "runtimes", "'runtime'"),
        (f"{TOP}{REST}[timings]\n", "mine.toml: unknown", "timings", "'timing'"),
        (f"{TOP}{REST}[batch]\nmaximum = 1\n", "mine.toml: batch: ", "maximum", "max"),
        (f"{TOP}{REST}[timing]\nrun = 9\n", "mine.toml: timing: ", "run", "'runs'"),
        (f"{TOP}{REST}[parity]\nrandon = 9\n", "mine.toml: parity: ", "randon", "'random'"),
        (f"{TOP}{REST}[calibration]\nimage = 9\n", "calibration: ", "image", "'images'"),
        (f"{TOP}{REST}tolerence = {{}}\n", "precision.fp32: ", "tolerence", "'tolerance'"),
        (
            f"{TOP}{REST}tolerance = {{ maxabs = 1.0 }}\n",
            "mine.toml: precision.fp32: tolerance: ",
            "maxabs",
            "'max_abs'",
        ),
        (
            f"{TOP}{REST}random_tolerance = {{ sqnr = 1.0 }}\n",
            "mine.toml: precision.fp32: random_tolerance: ",
            "sqnr",
            "'sqnr_db'",
        ),
        (
            f"{TOP}{REST}options = {{ half_io = true }}\n",
            "fp32.options: ",
            "half_io",
            "known: none",
        ),
        (
            f"{TOP}{REST}[precision.int8.options]\ncalibrater = 'max'\n",
            "mine.toml: precision.int8.options: ",
            "calibrater",
            "'calibrator'",
        ),
        (
            f"{TOP}[precision.fp32]\n[runtime.ort-cpu]\nthread = 1\n",
            "mine.toml: runtime.ort-cpu: ",
            "thread",
            "'threads'",
        ),
        (
            f"{TOP}{REST}[runtime.tensorrt-rtx]\ntarget = ['sm86']\n",
            "mine.toml: runtime.tensorrt-rtx: ",
            "target",
            "'targets'",
        ),
    ],
)
def test_an_unknown_key_is_refused_at_every_level_with_the_nearest_one(
    written, text, place, key, near
):
    with refused(ProfileError, place, f"unknown key {key!r}", hint=(near,)):
        written(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"about = 3\n{REST}", ["about", "expected str", "found 3"]),
        (f"{TOP}opset = '20'\n{REST}", ["opset", "expected int", "'20'"]),
        (f"{TOP}opset = true\n{REST}", ["opset", "expected int", "True"]),
        (f"{TOP}opset = 2020-01-01\n{REST}", ["opset", "expected int"]),
        (f"{TOP}batch = 8\n{REST}", ["batch", "expected", "found 8"]),
        (f"{TOP}{REST}[batch]\nmin = '1'\n", ["batch.min", "expected int", "'1'"]),
        (f"{TOP}{REST}[batch]\nmax = true\n", ["batch.max", "expected int", "True"]),
        (f"{TOP}{REST}[timing]\nbatches = 1\n", ["timing.batches", "expected array", "found 1"]),
        (f"{TOP}{REST}[timing]\nbatches = [1, 'x']\n", ["timing.batches[1]", "'x'"]),
        (f"{TOP}{REST}[timing]\nbatches = [true]\n", ["timing.batches[0]", "True"]),
        (f"{TOP}{REST}[timing]\nruns = 10.5\n", ["timing.runs", "expected int", "10.5"]),
        (f"{TOP}{REST}[parity]\nseed = '0'\n", ["parity.seed", "expected int", "'0'"]),
        (f"{TOP}{REST}[calibration]\nimages = []\n", ["calibration.images", "found []"]),
        (f"{TOP}{REST}tolerance = 1.0\n", ["precision.fp32", "tolerance", "found 1.0"]),
        (f"{TOP}{REST}tolerance = {{ cosine = 'x' }}\n", ["tolerance.cosine", "float", "'x'"]),
        (f"{TOP}{REST}tolerance = {{ cosine = true }}\n", ["tolerance.cosine", "True"]),
        (f"{TOP}{REST}options = 4\n", ["precision.fp32", "options", "found 4"]),
        (f"{TOP}[runtime.ort-cpu]\n[precision]\nfp32 = 1\n", ["precision.fp32", "found 1"]),
        (f"{TOP}precision = 'fp32'\n[runtime.ort-cpu]\n", ["precision", "table", "'fp32'"]),
        (f"{TOP}runtime = ['ort-cpu']\n[precision.fp32]\n", ["runtime", "table", "['ort-cpu']"]),
        (f"{TOP}[runtime]\nort-cpu = 1\n[precision.fp32]\n", ["runtime.ort-cpu", "found 1"]),
        (f"{TOP}[precision.fp32]\n[runtime.ort-cpu]\nthreads = '2'\n", ["threads", "int", "'2'"]),
        (f"{TOP}[precision.fp32]\n[runtime.ort-cpu]\nthreads = -1\n", ["threads", "found -1"]),
        (f"{TOP}{REST}[runtime.tensorrt-rtx]\ntargets = 'sm86'\n", ["targets", "'sm86'"]),
        (f"{TOP}{REST}[runtime.tensorrt-rtx]\ntargets = []\n", ["targets is empty", "sm86"]),
        (f"{TOP}{REST}[runtime.tensorrt-rtx]\ntargets = ['sm86', 'sm86']\n", ["targets", "twice"]),
        (f"{TOP}{REST}[runtime.tensorrt-rtx]\ntargets = ['current', 'sm86']\n", ["alone", "sm86"]),
        (f"{TOP}{REST}[runtime.tensorrt-rtx]\nworkspace_mib = 0\n", ["workspace_mib", "found 0"]),
        (f"{TOP}{REST}[precision.int8.options]\nkeep = 'fc'\n", ["int8.options: keep", "'fc'"]),
        (f"{TOP}{REST}[precision.int8.options]\nkeep = [1]\n", ["keep[0]", "found 1"]),
        (f"{TOP}{REST}[precision.int8.options]\npercentile = 0\n", ["percentile", "found 0"]),
        (f"{TOP}{REST}[precision.int8.options]\npercentile = nan\n", ["percentile", "nan"]),
        (f"{TOP}{REST}[precision.int8.options]\npercentile = 100.1\n", ["percentile", "100.1"]),
        (f"{TOP}{REST}[precision.int8.options]\nhalf_io = true\n", ["half_io", "fp16"]),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_refused_by_key_and_value(written, text, said):
    with refused(ProfileError, "mine.toml", *said, hint=None):
        written(text)


@pytest.mark.parametrize("key", ["calibrator", "around"])
def test_an_option_with_a_few_allowed_words_says_which_they_are(written, key):
    allowed = {"calibrator": "percentile", "around": "fp16"}[key]
    with pytest.raises(ProfileError, match="'fp61'") as caught:
        written(f"{TOP}{REST}[precision.int8.options]\n{key} = 'fp61'\n")
    assert allowed in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ("min = 0", "0, 1, 1"),
        ("min = -1", "-1, 1, 1"),
        ("opt = 2", "1, 2, 1"),
        ("min = 2\nmax = 4", "2, 1, 4"),
        ("min = 3\nopt = 3\nmax = 2", "3, 3, 2"),
        ("max = 0", "1, 1, 0"),
    ],
)
def test_a_batch_range_out_of_order_is_refused_with_the_three_found(written, batch, found):
    with refused(ProfileError, "mine.toml: batch", "1 <= min <= opt <= max", found, hint=None):
        written(f"{TOP}{REST}[batch]\n{batch}\n")


@pytest.mark.parametrize(
    ("timing", "said"),
    [
        ("batches = [0]", ["batches", "from 1 to 65536", "[0]"]),
        ("batches = [-4]", ["batches", "[-4]"]),
        ("batches = []", ["batches", "[]"]),
        ("warmup = -1", ["warmup", "-1"]),
        ("runs = 1", ["runs must be from 2 to 1000000", "found 1"]),
        ("runs = 0", ["runs must be from 2 to 1000000", "found 0"]),
        ("pytorch_threads = -1", ["pytorch_threads", "-1"]),
    ],
)
def test_timing_that_measures_nothing_is_refused(written, timing, said):
    with refused(ProfileError, "mine.toml: timing", *said, hint=None):
        written(f"{TOP}{REST}[timing]\n{timing}\n")


@pytest.mark.parametrize(("batches", "first"), [("[1]", 1), ("[4, 9]", 9), ("[2, 1, 9]", 1)])
def test_a_batch_size_that_no_engine_serves_is_not_timed(written, batches, first):
    with refused(ProfileError, "timing.batches", "2 to 8", f"found {first}", hint=None):
        written(f"{TOP}{REST}[batch]\nmin = 2\nopt = 4\nmax = 8\n[timing]\nbatches = {batches}\n")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("[parity]\nrandom = 0", ["parity", "random must be from 1 to 1000000, found 0"]),
        ("[parity]\nseed = -1", ["parity", "seed must be from 0", "found -1"]),
        ("[calibration]\nimages = 7", ["calibration", "images must be from 8 to 1000000, found 7"]),
        ("[calibration]\nseed = -1", ["calibration", "seed must be from 0", "found -1"]),
    ],
)
def test_inputs_that_are_none_are_refused(written, table, said):
    with refused(ProfileError, *said, hint=None):
        written(f"{TOP}{REST}{table}\n")


@pytest.mark.parametrize("kind", ["tolerance", "random_tolerance"])
@pytest.mark.parametrize(
    ("gate", "value"),
    [
        *((gate, bad) for gate in (*Tolerance.UPPER, *Tolerance.LOWER) for bad in ("nan", "inf")),
        *((gate, "-0.001") for gate in Tolerance.UPPER),
        ("sqnr_db", "-inf"),
        ("agreement", "-0.1"),
        ("agreement", "1.1"),
        ("agreement", "1.0"),
        ("accuracy_drop", "1.1"),
        ("accuracy_drop", "0.0"),
        ("cosine", "1.1"),
        ("cosine", "-1.1"),
    ],
)
def test_a_gate_that_nothing_or_everything_passes_is_refused(written, kind, gate, value):
    with refused(ProfileError, "precision.fp32", kind, gate, f"found {value}"):
        written(f"{TOP}{REST}{kind} = {{ {gate} = {value} }}\n")


@pytest.mark.parametrize("opset", [OPSETS[0] - 1, OPSETS[-1] + 1, 0, -20])
def test_an_opset_outside_what_is_written_is_refused(written, opset):
    with refused(ProfileError, "opset", "19 to 24", f"found {opset}", hint=None):
        written(f"{TOP}opset = {opset}\n{REST}")


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_inside_is_taken(written, opset):
    assert written(f"{TOP}opset = {opset}\n{REST}").opset == opset


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (REST, "the key 'about' is missing"),
        ("", "the key 'about' is missing"),
        ("# nothing but a comment\n", "the key 'about' is missing"),
        (f"{TOP}[precision.fp32]\n", "no runtime: add a table such as [runtime.ort-cpu]"),
        (f"{TOP}[runtime]\n[precision.fp32]\n", "no runtime"),
        (f"{TOP}[runtime.ort-cpu]\n", "no precision: add a table such as [precision.fp32]"),
        (f"{TOP}[runtime.ort-cpu]\n[precision]\n", "no precision"),
    ],
)
def test_a_profile_that_leaves_out_what_it_must_say_is_refused(written, text, said):
    with refused(ProfileError, "mine.toml: ", said, hint=None):
        written(text)


@pytest.mark.parametrize(
    ("text", "kind", "name", "near"),
    [
        (f"{TOP}[runtime.ort-cpx]\n[precision.fp32]\n", "runtime", "ort-cpx", "'ort-cpu'"),
        (f"{TOP}[runtime.ort_cpu]\n[precision.fp32]\n", "runtime", "ort_cpu", "'ort-cpu'"),
        (f"{TOP}[runtime._ort]\n[precision.fp32]\n", "runtime", "_ort", "ort-cpu"),
        (f"{TOP}[runtime.ort-cpu]\n[precision.int-8]\n", "precision", "int-8", "'int8'"),
        (f"{TOP}[runtime.ort-cpu]\n[precision.tf32]\n", "precision", "tf32", "'fp32'"),
        (f"{TOP}[runtime.ort-cpu]\n[precision._half]\n", "precision", "_half", "fp16"),
        (f"{TOP}[runtime.ort-cpu]\n[precision.'../fp32']\n", "precision", "../fp32", "fp32"),
        (f"{TOP}{REST}[runtime.tensorrt-rtx]\ntargets = ['sm87']\n", "target", "sm87", "'sm86'"),
    ],
)
def test_an_unknown_plug_in_or_target_gets_the_nearest_name(written, text, kind, name, near):
    with refused(UnknownName, f"no {kind} named {name!r}", hint=(near,)):
        written(text)


@pytest.mark.parametrize(("name", "near"), [("defualt", "'default'"), ("Default", "'default'")])
def test_an_unknown_profile_gets_the_nearest_name(name, near):
    with refused(UnknownName, f"no profile named {name!r}", hint=(near,)):
        load_profile(name)


@pytest.mark.parametrize("name", ["", "zebra", "__init__", "default.tml"])
def test_what_is_no_profile_gets_the_known_names(name):
    with refused(UnknownName, f"no profile named {name!r}", hint=("default",)):
        load_profile(name)


# ── Files that are no profiles ──────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    [
        "about = ",
        "about = 'a",
        "[runtime",
        "a = 1\na = 2\n",
        "{}",
        "about: here",
        "a = 2020-13-41\n",
        "a = " + "[" * 100_000,
        "a = " + "{b = " * 100_000,
        "\ufeffabout = 'a byte order mark'",
        "a = " + "1" * 5_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_not_toml_is_refused_as_that(written, text):
    with refused(ProfileError, "mine.toml: not valid TOML", hint=None):
        written(text)


@pytest.mark.parametrize(
    ("data", "byte"), [(b"\xff\xfe", 0), (b"about = '\xe9'", 9), ("é".encode("utf-16-be"), 1)]
)
def test_what_is_not_utf_8_is_refused_at_its_first_wrong_byte(written, data, byte):
    with refused(ProfileError, "mine.toml: not UTF-8", f"byte {byte}", hint=None):
        written(data)


def test_a_file_much_larger_than_a_page_is_refused_and_not_parsed(written):
    with refused(ProfileError, "mine.toml: larger than 1048576 bytes", hint=None):
        written(TOP + REST + "#" * (1 << 20))


def test_a_file_that_is_just_not_too_large_is_read(written):
    text = TOP + REST
    assert written(text + "#" * ((1 << 20) - len(text))).about == "Here"


def test_a_missing_file_is_refused_and_the_built_in_names_are_offered(tmp_path):
    with refused(ProfileError, "none.toml: no such file", hint=("default",)):
        load_profile(tmp_path / "none.toml")


def test_a_folder_is_not_a_profile(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    with refused(ProfileError, "folder.toml: ", "directory", hint=None):
        load_profile(tmp_path / "folder.toml")


def test_a_name_that_no_file_can_have_is_refused():
    with refused(ProfileError, "xxx.toml: "):
        load_profile("x" * 300 + ".toml")


# ── Overrides ───────────────────────────────────────────────────────────────────────


def test_an_override_replaces_one_key_and_leaves_every_other():
    plain, changed = load_profile("default"), load_profile("default", {"timing.runs": 20})
    assert changed.timing.runs == 20
    want = tomllib.loads(plain.to_toml())
    want["timing"]["runs"] = 20
    assert tomllib.loads(changed.to_toml()) == want


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("about", "There", lambda p: p.about),
        ("opset", 21, lambda p: p.opset),
        ("batch.max", 64, lambda p: p.batch.max),
        ("timing.batches", [1, 8], lambda p: list(p.timing.batches)),
        ("runtime.ort-cpu.threads", 1, lambda p: p.runtime["ort-cpu"]["threads"]),
        (
            "runtime.tensorrt-rtx.targets",
            ["sm89"],
            lambda p: p.runtime["tensorrt-rtx"]["targets"],
        ),
        (
            "precision.int8.tolerance.sqnr_db",
            12.5,
            lambda p: p.precision["int8"].tolerance.sqnr_db,
        ),
        (
            "precision.int8.options.calibrator",
            "max",
            lambda p: p.precision["int8"].options["calibrator"],
        ),
    ],
)
def test_any_key_can_be_overridden_by_its_dotted_name(key, value, found):
    assert found(load_profile("default", {key: value})) == value


def test_an_override_makes_the_tables_on_its_way(written):
    profile = written(TOP + "[runtime.ort-cpu]\n", {"precision.fp16.tolerance.sqnr_db": 40.0})
    assert profile.precision["fp16"].tolerance.bounds() == {"sqnr_db": 40.0}
    added = load_profile("default", {"runtime.ort-cuda": {}})
    assert tuple(added.runtime) == ("ort-cpu", "tensorrt-rtx", "ort-cuda")


def test_a_whole_table_can_be_overridden_and_its_gates_do_not_linger():
    profile = load_profile("default", {"precision.int8.tolerance": {"sqnr_db": 10.0}})
    assert profile.precision["int8"].tolerance.bounds() == {"sqnr_db": 10.0}


def test_overrides_are_the_callers_and_are_left_as_they_were():
    overrides = {"precision.fp16": {"tolerance": {"sqnr_db": 1.0}}, "precision.fp16.options": {}}
    before = deepcopy(overrides)
    load_profile("default", overrides)
    assert overrides == before


def test_what_is_overridden_today_is_not_remembered_tomorrow():
    load_profile("default", {"timing.runs": 7})
    assert load_profile("default").timing.runs == 150


@pytest.mark.parametrize(
    ("overrides", "said", "hint"),
    [
        ({"timing.runs.x": 1}, ["timing.runs.x", "'runs' is a value, not a table"], None),
        ({"about.x.y": 1}, ["about.x.y", "'about' is a value"], None),
        ({"timing.run": 1}, ["timing", "unknown key 'run'"], ("'runs'",)),
        ({"timin.runs": 1}, ["unknown key 'timin'"], ("'timing'",)),
        ({"timing.runs": "many"}, ["timing.runs", "'many'"], None),
        ({"timing.runs": None}, ["timing.runs", "None"], None),
        ({"timing": 5}, ["timing", "found 5"], None),
        ({"precision": 5}, ["precision", "found 5"], None),
        ({"batch.max": 4}, ["batch", "1, 8, 4"], None),
        ({"timing.batches": [64]}, ["timing.batches", "1 to 32", "64"], None),
        ({"timing.batches": (1, "x")}, ["timing.batches[1]", "'x'"], None),
        ({"": 1}, ["unknown key ''"], ("timing",)),
        ({"timing..runs": 1}, ["timing", "unknown key ''"], ("runs",)),
    ],
)
def test_a_wrong_override_is_refused_like_a_wrong_line(overrides, said, hint):
    with refused(ProfileError, *said, hint=hint):
        load_profile("default", overrides)


@pytest.mark.parametrize(
    ("overrides", "name", "near"),
    [
        ({"runtime.tensorrt-rtx.targets": ["sm_86"]}, "sm_86", "'sm86'"),
        ({"runtime.tensor.x": 1}, "tensor", "'tensorrt'"),
        ({"precision.int4.tolerance.cosine": 0.5}, "int4", "'int8'"),
    ],
)
def test_an_override_that_names_something_unknown_gets_the_nearest(overrides, name, near):
    with refused(UnknownName, f"{name!r}", hint=(near,)):
        load_profile("default", overrides)


# ── Choosing precisions ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [
        (("int8",), ("int8",)),
        (("int8", "fp32"), ("fp32", "int8")),
        (("fp16", "fp16"), ("fp16",)),
    ],
)
def test_only_the_chosen_precisions_are_kept_with_their_gates(chosen, kept):
    profile = load_profile("default")
    only = profile.only(chosen)
    assert tuple(only.precision) == kept
    assert all(only.precision[name] == profile.precision[name] for name in kept)
    assert tuple(profile.precision) == ("fp32", "fp16", "int8")
    assert only.runtime == profile.runtime


def test_a_precision_that_the_profile_has_no_gates_for_is_refused():
    profile = load_profile("default").only(("fp32", "fp16"))
    with refused(ProfileError, "no table [precision.int8]", hint=("fp16, fp32",)):
        profile.only(("fp32", "int8"))


def test_choosing_no_precision_at_all_is_refused_and_not_a_crash():
    with refused(ProfileError, "precision"):
        load_profile("default").only(())


def test_a_table_is_read_as_a_file_is(written):
    text = TOP + REST + "[batch]\nmax = 8\n"
    assert read_profile(tomllib.loads(text), where="x") == written(text)
