"""A plug-in is a file. ``exporter/runtimes/ort_cpu.py`` *is* the runtime ``ort-cpu``.

Each such file defines one frozen `Plugin` and binds it to ``PLUGIN``: its fields are the keys a
profile may set, its methods are the axis's contract, and its docstring's first line describes it.
Files that start with an underscore are helpers, not plug-ins.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Literal, TypeAlias, cast

from exporter.contracts import Model, Plugin, Precision, Runtime
from exporter.errors import InputRefused, UnknownName
from exporter.strict import read

Axis: TypeAlias = Literal["models", "precisions", "runtimes"]
Options: TypeAlias = Mapping[str, Any]


def names(axis: Axis) -> tuple[str, ...]:
    """Return the plug-ins in a folder, without importing any of them."""
    folder = import_module(f"exporter.{axis}").__path__
    found = (module.name for module in iter_modules(folder))
    return tuple(sorted(name.replace("_", "-") for name in found if not name.startswith("_")))


def load_model(
    name: str, *, input_shape: tuple[int, ...] | None = None, classes: int | None = None
) -> Model:
    """Return the model ``models/<name>.py``, for as many input channels and classes where it can.

    Raises `UnknownName`, and `InputRefused` where it cannot give so many classes.
    """
    fields = options_of("models", name)
    options: dict[str, int] = {}
    if input_shape and "channels" in fields:
        options["channels"] = input_shape[0]
    if classes is not None and "classes" in fields:
        options["classes"] = classes
    model = cast("Model", _load("models", name, options, where=name))
    if classes is not None and model.output.shape != (classes,):
        has = " × ".join(map(str, model.output.shape))
        raise InputRefused(f"{name} has {has} outputs, and cannot have {classes}")
    return model


def load_precision(name: str, options: Options, *, where: str | None = None) -> Precision:
    """Return the precision ``precisions/<name>.py``. Raises `UnknownName`, `ProfileError`."""
    return cast("Precision", _load("precisions", name, options, where=where or name))


def load_runtime(name: str, options: Options, *, where: str | None = None) -> Runtime:
    """Return the runtime ``runtimes/<name>.py``. Raises `UnknownName`, `ProfileError`."""
    return cast("Runtime", _load("runtimes", name, options, where=where or name))


def options_of(axis: Axis, name: str) -> tuple[str, ...]:
    """Return the keys that a profile may set for a plug-in. Raises `UnknownName`."""
    return _plugin(axis, name).__struct_fields__


def remedy(runtime: str, reason: str) -> str:
    """Return what makes a runtime usable for which something is missing."""
    if "no device" in reason:
        return "choose a device that is there, or another profile"
    if "cannot use the NVIDIA GPU" in reason or "Triton" in reason:
        return "install a PyTorch that was built with CUDA for this driver; it brings Triton"
    if "GPU" in reason:
        return "choose another profile or target, or a machine with that GPU"
    if "compiler" in reason or "headers" in reason:
        return "install g++ and Python's development package, or choose another profile"
    return f"pip install 'resnet-export[{runtime}]', or choose another profile"


def _plugin(axis: Axis, name: str) -> type[Plugin]:
    if name not in names(axis):
        raise UnknownName(axis.removesuffix("s"), name, names(axis))
    module = import_module(f"exporter.{axis}.{name.replace('-', '_')}")
    return cast("type[Plugin]", module.PLUGIN)


def _load(axis: Axis, name: str, options: Options, *, where: str) -> Plugin:
    return read(_plugin(axis, name), options, where=where)
