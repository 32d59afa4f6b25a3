"""A plug-in is a file. ``exporter/runtimes/ort_cpu.py`` *is* the runtime ``ort-cpu``.

Each such file defines one frozen `Plugin` and binds it to ``PLUGIN``: its fields are the keys a
profile may set, its methods are the axis's contract, and its docstring's first line describes it.
Files that start with an underscore are helpers, not plug-ins.

A file in ``exporter/models`` may be a family instead: it binds to ``FAMILY`` one `Plugin` for each
network's name, whose values are what is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType, ModuleType
from typing import Any, Literal, TypeAlias, cast

from msgspec import structs

from exporter.contracts import Model, Plugin, Precision, Runtime
from exporter.errors import InputRefused, UnknownName
from exporter.strict import read

Axis: TypeAlias = Literal["models", "precisions", "runtimes"]
Options: TypeAlias = Mapping[str, Any]


def names(axis: Axis) -> tuple[str, ...]:
    """Return the plug-ins in a folder; of the networks alone, which are light, any is imported."""
    return tuple(sorted(_files(axis)))


def load_model(
    name: str,
    *,
    input_shape: tuple[int, ...] | None = None,
    classes: int | None = None,
    args: Options = MappingProxyType({}),
) -> Model:
    """Return the built-in network of a name, for as many input channels and classes where it can.

    ``args`` are its fields' values, by name. Raises `UnknownName`; `ProfileError` for a field that
    it has not, or a value that it cannot have; and `InputRefused` where it cannot give so many
    classes, or ``args`` ask for others.
    """
    fields = options_of("models", name)
    asked = {"channels": input_shape[0] if input_shape else None, "classes": classes}
    options = dict(args)
    for field, value in asked.items():
        if value is None or field not in fields:
            continue
        if args.get(field, value) != value:
            raise InputRefused(
                f"{name} is asked for {value} {field}, and model.args.{field} is {args[field]!r}"
            )
        options[field] = value
    model = cast(
        "Model", _load("models", name, options, where=f"{name}: model.args" if args else name)
    )
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


@cache
def _files(axis: Axis) -> Mapping[str, str]:
    """Return the file of each plug-in, by the plug-in's name."""
    folder = import_module(f"exporter.{axis}").__path__
    files = [found.name for found in iter_modules(folder) if not found.name.startswith("_")]
    return {name: file for file in files for name in _names_in(axis, file)}


def _names_in(axis: Axis, file: str) -> Iterable[str]:
    """Return the names of a family's members, or the one that a file's own name says."""
    family = getattr(_file(axis, file), "FAMILY", None) if axis == "models" else None
    return family or (file.replace("_", "-"),)


def _file(axis: Axis, file: str) -> ModuleType:
    return import_module(f"exporter.{axis}.{file}")


def _bound(axis: Axis, name: str) -> Plugin | type[Plugin]:
    """Return the plug-in that a file binds, or the member of its family."""
    files = _files(axis)
    if name not in files:
        raise UnknownName(axis.removesuffix("s"), name, files)
    file = _file(axis, files[name])
    family = getattr(file, "FAMILY", None)
    return cast("Plugin | type[Plugin]", family[name] if family else file.PLUGIN)


def _plugin(axis: Axis, name: str) -> type[Plugin]:
    bound = _bound(axis, name)
    return bound if isinstance(bound, type) else type(bound)


def _load(axis: Axis, name: str, options: Options, *, where: str) -> Plugin:
    bound = _bound(axis, name)
    if not isinstance(bound, type):
        options = {**structs.asdict(bound), **options}
    return read(_plugin(axis, name), options, where=where)
