"""No line of the package can run what is in a file: seen in its source, not in its behaviour."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "exporter"
MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"),
    *("runpy", "torch.hub", "torch.package", "onnx.hub", "onnx.reference", "pandas"),
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.jit.load", "torch.export.load", "torch.serialization.load", "torch.ops.load_library"),
    *("torch.serialization.add_safe_globals", "torch.serialization.safe_globals"),
    *("shutil.unpack_archive", "numpy.fromregex", "numpy.memmap"),
}
NEEDS = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
METHODS = {"extract", "extractall"}  # of zip and tar archives
FLAGS = (("shell", True), ("allow_pickle", True), ("weights_only", False))


def unsafe(source: str) -> Iterator[str]:
    """Yield what in a module could run a file's contents, by dotted name."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                yield from _of_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names[alias.asname or alias.name] = whole
                yield from _of_module(whole)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _of_call(node, names)
        elif isinstance(node, ast.Attribute | ast.Name) and id(node) not in called:
            name = _dotted(node, names)
            if name in CALLS - {"compile", "eval", "exec"} or name in NEEDS:
                yield f"{name}, passed on"


def _of_module(name: str) -> Iterator[str]:
    if any(name == module or name.startswith(f"{module}.") for module in MODULES):
        yield name


def _of_call(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    name = _dotted(call.func, names)
    given = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
    if name in CALLS or any(name.startswith(f"{module}.") for module in MODULES):
        yield name
    if name in NEEDS:
        flag, wanted = NEEDS[name]
        if given.get(flag) is not wanted:
            yield f"{name} without {flag}={wanted}"
    if isinstance(call.func, ast.Attribute) and call.func.attr in METHODS:
        yield call.func.attr
    yield from (f"{flag}={value}" for flag, value in FLAGS if given.get(flag) is value)
    if name == "getattr" and len(call.args) > 1 and not isinstance(call.args[0], ast.Call):
        module = _dotted(call.args[0], names)
        what = call.args[1].value if isinstance(call.args[1], ast.Constant) else "?"
        if f"{module}.{what}" in CALLS | NEEDS.keys():
            yield f"{module}.{what}, by getattr"


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return ""


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_a_module_calls_no_unsafe_loader(path):
    assert list(unsafe(path.read_text("utf-8"))) == []


def test_torch_load_is_called_in_one_place():
    where = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and _dotted(node.func, {}) == "torch.load"
    ]
    assert where == ["checkpoints/_child.py"]


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(f)",
        "import torch; torch.load(f, weights_only=flag)",
        "import torch; torch.load(f, weights_only=False)",
        "import torch as t; t.load(f)",
        "from torch import load; load(f)",
        "from torch import load as read; read(f)",
        "import torch; read = torch.load",
        "import torch; getattr(torch, 'load')(f)",
        "import torch; torch.jit.load(f)",
        "from torch import jit; jit.load(f)",
        "import torch; torch.export.load(f)",
        "from torch.export import load; load(f)",
        "import torch; torch.hub.load('a', 'b')",
        "from torch import hub",
        "import torch.package",
        "import torch; torch.serialization.add_safe_globals([x])",
        "import pickle",
        "from pickle import loads",
        "import dill",
        "from joblib import load",
        "import numpy as np; np.load(f)",
        "import numpy as np; np.load(f, allow_pickle=True)",
        "import numpy; numpy.load(f, allow_pickle=flag)",
        "from numpy import load; load(f, allow_pickle=True)",
        "import yaml",
        "eval(x)",
        "exec(x)",
        "__import__('os')",
        "import os; os.system(x)",
        "import subprocess; subprocess.run(x, shell=True)",
        "archive.extractall(folder)",
        "from onnx import hub",
        "import onnx.reference",
    ],
)
def test_what_could_run_a_file_is_seen(source):
    assert list(unsafe(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(f, weights_only=True)",
        "import numpy as np; np.load(f, allow_pickle=False)",
        "from safetensors.torch import load_file; load_file(f)",
        "import json; json.load(f)",
        "import subprocess; subprocess.run(x)",
        "import pickletools",
        "import re; re.compile(x)",
        "import torch; torch.compile(module)",
        "module.eval()",
    ],
)
def test_what_cannot_is_let_through(source):
    assert list(unsafe(source)) == []
