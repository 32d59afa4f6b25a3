"""What networks cost, by name or by file: ``resnet-export flops``.

A network by name is counted as it is written, in PyTorch, and after folding, which is what gets
exported; an ONNX file as it is. PyTorch is only loaded for the former.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exporter import plugins
from exporter.axes import shape_at_optimum
from exporter.contracts import Progress, silent
from exporter.errors import GraphError, InputRefused, UnknownName
from exporter.flops import count_flops, input_shape_of, read_file
from exporter.onnx_files import check_onnx
from exporter.records import Counted

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from exporter.contracts import Model
    from exporter.factories import FactoryModel


def count_all(
    things: Sequence[str | FactoryModel],
    *,
    input_shape: tuple[int, ...] | None = None,
    classes: int | None = None,
    progress: Progress = silent,
) -> tuple[Counted, ...]:
    """Return what each network or ONNX file costs, a network in each of its forms.

    ``input_shape`` is (C, H, W). Raises `UnknownName`, `InputRefused` or `GraphError`.
    """
    found: list[Counted] = []
    for thing in things:
        if not isinstance(thing, str) or thing in plugins.names("models"):
            from exporter.network import Network

            network = Network.choose(thing, {}, input_shape, classes)
            with progress(f"count {network.name}", None):
                found += _network(*network, input_shape)
            continue
        path = Path(thing)
        if path.suffix != ".onnx" and not path.exists():
            raise UnknownName("model", thing, plugins.names("models"))
        if path.is_dir():
            raise InputRefused(f"{thing}: a folder", hint=_files_in(path))
        if classes is not None:
            raise InputRefused(f"{path.name}: an ONNX file's classes cannot be chosen")
        with progress(f"count {path.name}", None):
            found.append(_file(path, input_shape))
    return tuple(found)


def _file(path: Path, input_shape: tuple[int, ...] | None) -> Counted:
    check_onnx(path, runs=False)
    graph = read_file(path)
    shape = input_shape or input_shape_of(graph)
    try:
        return Counted(path.name, shape, count_flops(graph, input_shape))
    except (GraphError, InputRefused) as error:
        hint = None if shape else _hint(graph)
        raise type(error)(f"{path.name}: {error}", hint=hint) from error


def _hint(graph: onnx.ModelProto) -> str:
    """Return what sizes to give, those that the graph is tuned for where it says so."""
    tuned = [shape_at_optimum(graph, value) for value in graph.graph.input]
    if len(tuned) == 1 and tuned[0] and all(tuned[0]):
        said = "x".join(map(str, tuned[0]))
        return f"its height and width are free: say --input {said}, which it is tuned for"
    return "give the shape of its input, say --input 3x224x224"


def _files_in(folder: Path) -> str:
    files = sorted(str(path) for path in folder.glob("*.onnx"))
    return f"name its files: {' '.join(files)}" if files else "there is no ONNX file in it"


def _network(name: str, model: Model, input_shape: tuple[int, ...] | None) -> Iterator[Counted]:
    from exporter.flops import count_module

    shape = input_shape or model.input.shape
    module, notes = _module(model)
    yield Counted(f"{name} in PyTorch", shape, count_module(module, shape, name=name), notes)
    if _has_batchnorm(module):
        from exporter.fold import fold_batchnorm

        folded = fold_batchnorm(module)
        kept = tuple(f"{fate}" for fate in folded.kept)
        cost = count_module(folded.module, shape, name=name)
        yield Counted(f"{name} in PyTorch, folded", shape, cost, (*notes, *kept))


def _module(model: Model) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the network with the weights that it ships with, and what to know where it has none.

    With neither weights nor a BatchNorm, numbers do not matter, and none are made.
    """
    import torch

    from exporter.weights import load_weights

    if model.weights:
        module = model.module()
        load_weights(module, model.weights)
        return module, ()
    with torch.device("meta"):
        module = model.module()
    if not _has_batchnorm(module):
        return module, ("no BatchNorm, so that nothing is folded",)
    return model.module(), ("ships without weights: folded as it is initialised",)


def _has_batchnorm(module: nn.Module) -> bool:
    from exporter.fold.affine import BATCHNORMS

    return any(isinstance(part, BATCHNORMS) for part in module.modules())
