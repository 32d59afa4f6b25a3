"""The shape of the package, checked."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import exporter
from exporter import plugins
from exporter.contracts import Plugin
from exporter.errors import UnknownName

ROOT = Path(__file__).resolve().parents[1]
AXES = ("models", "precisions", "runtimes")
HEAVY = {
    *("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"),
    *("numpy", "rich", "sklearn"),
}


def test_imports_point_down(monkeypatch):
    from importlinter.cli import lint_imports

    monkeypatch.chdir(ROOT)
    assert lint_imports() == 0


def test_public_names_are_exactly_the_documented_ones():
    assert exporter.__all__ == sorted(exporter.__all__)
    assert set(exporter.__all__) == {*exporter._HOME, "__version__"}
    assert all(getattr(exporter, name) is not None for name in exporter.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fold_batchnorms'"):
        _ = exporter.fold_batchnorms


@pytest.mark.parametrize(
    "code",
    [
        "import exporter",
        "import exporter.cli, exporter.contracts",
        "import exporter; exporter.load_profile('default')",
        "from exporter import plugins; [plugins.names(axis) for axis in ('models', 'runtimes')]",
    ],
)
def test_what_needs_no_framework_imports_none(code):
    probe = f"{code}\nimport sys, json; print(json.dumps(sorted({HEAVY} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=True, text=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(
    ("axis", "name"), [(axis, name) for axis in AXES for name in plugins.names(axis)]
)
def test_a_plugin_is_one_frozen_documented_record_that_takes_no_unknown_key(axis, name):
    kind = plugins._plugin(axis, name)
    assert issubclass(kind, Plugin)
    assert kind.__struct_config__.frozen
    assert kind.__struct_config__.forbid_unknown_fields
    assert (kind.__doc__ or "").strip()


def test_every_runtime_has_an_extra_of_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(plugins.names("runtimes")) <= set(project["optional-dependencies"])


def test_every_dependency_is_pinned_in_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["tensorrt-rtx"]]
    names = {item.split(">=")[0].split("[")[0].replace("_", "-") for item in wanted}
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    }
    assert names <= pinned


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownName, match="no runtime named 'ort-cpuu'") as error:
        plugins.load_runtime("ort-cpuu", {})
    assert "'ort-cpu'" in (error.value.hint or "")


@pytest.mark.parametrize(
    ("word", "where"),
    [("print(", "cli.py"), ("sys.exit", "cli.py"), ("SystemExit", "cli.py factories.py")],
)
def test_one_module_prints_and_exits_and_one_refuses_code_that_does(word, where):
    found = {p.name for p in (ROOT / "exporter").rglob("*.py") if word in p.read_text("utf-8")}
    assert found <= set(where.split())


def test_nothing_is_read_from_the_environment():
    found = [p.name for p in (ROOT / "exporter").rglob("*.py") if "os.environ" in p.read_text()]
    assert found == []


def test_the_wheel_carries_profiles_weights_and_types(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {
        "exporter/py.typed",
        "exporter/models/resnet18.safetensors",
        *(f"exporter/profiles/{p.name}" for p in (ROOT / "profiles").glob("*.toml")),
        *(p.relative_to(ROOT).as_posix() for p in (ROOT / "exporter").rglob("*.py")),
    } <= names
    assert not any(name.startswith("tests/") for name in names)
