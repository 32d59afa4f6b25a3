"""Turn a module into a graph: by torch.fx, or by torch.export where an example input is given.

    torch.fx       runs forward() on a stand-in for the input. What it cannot follow is a decision
                   that depends on the input, even on its shape
    torch.export   runs forward() on a tensor without values, whose shapes are known except for the
                   batch. It follows any decision that values have no part in

torch.export's graph is lifted back to layers (see `exporter.fold.lifting`). With an example at
hand, either graph is run beside the module before it is believed: torch.fx takes the other branch
of ``isinstance(x, Tensor)`` without a word, and torch.export keeps the branch of one batch size.
"""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from exporter.errors import GraphError
from exporter.fold.exported import Axes, by_export, exported
from exporter.fold.lifting import BATCHNORM, has_hooks, lift, own_forward
from exporter.fold.same import Example, check_same, first_line, run
from exporter.fold.shapes import note_shapes
from exporter.fold.unfit import copy_of, is_exported, refuse_unfit, unwrapped
from exporter.records import Fate

OWN = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parent}/", "<")
STDLIB = sysconfig.get_path("stdlib")

_Way = Callable[[], fx.GraphModule]


def trace(
    module: nn.Module, example: Example | None = None, free: Sequence[Axes] = ()
) -> tuple[fx.GraphModule, tuple[Fate, ...]]:
    """Return a traced copy, and the fates of the BatchNorms that its graph does not call.

    ``free`` are the axes of each input that are free beside the batch.

    Raises `GraphError` if the network is in training mode, is in a form that tracing would not do
    justice to, cannot be copied, or cannot be traced; then with the line that is in the way.
    """
    module = unwrapped(module)
    kind = type(module).__name__
    refuse_unfit(module)
    copy = copy_of(module)
    if example is not None:
        run(copy, example, kind)
    if is_exported(module):
        traced = exported(copy, module.range_constraints, kind)
    else:
        traced = _traced(copy, kind, example, free)
    return traced, tuple(_uncalled(copy, traced))


def _traced(
    copy: nn.Module, kind: str, example: Example | None, free: Sequence[Axes]
) -> fx.GraphModule:
    """Return the first graph that comes about and computes the same."""
    ways: list[_Way] = [partial(_by_fx, copy, example, kind, set())]
    said = f"torch.fx cannot trace {kind}"
    hint: str | None = "give an example input, and torch.export will try"
    if example is not None:
        ways.append(lambda: by_export(copy_of(copy), example, kind, free))
        said, hint = f"neither torch.fx nor torch.export can trace {kind}", None
    ways.append(partial(_around, copy, example, kind))
    failures = []
    for way in ways:
        try:
            return way()
        except GraphError:
            raise
        except Exception as error:  # tracing runs the user's own forward(), which may raise any
            failures.append(error)
    last = failures[-2]  # of `_around` says what torch.fx did
    raise GraphError(f"{said}: {_place(last)}", hint=hint) from last


# ── torch.fx ────────────────────────────────────────────────────────────────────────


class _Tracer(fx.Tracer):
    """torch.fx's tracer that goes into torch.nn's containers for BatchNorms."""

    def __init__(self, whole: set[str], inputs: int = 1) -> None:
        super().__init__(param_shapes_constant=True)
        self.whole, self.inputs = whole, inputs

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Return forward() and its inputs. All else has its default, as when the module is run."""
        names = [
            name
            for name, given in inspect.signature(root_fn).parameters.items()
            if given.kind in (given.POSITIONAL_ONLY, given.POSITIONAL_OR_KEYWORD)
        ]
        several = self.inputs > 1
        free = [f"input_{i}" if several else "input" for i in range(self.inputs)]
        given = [*names[1:], *free[len(names) - 1 :]][: self.inputs]
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in given]
        return root_fn, [self.root, *inputs]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            raise RuntimeError("torch.fx would lose its autocast")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.whole:
            return True
        if isinstance(m, BATCHNORM):
            return not _can_be_gone_into(m)
        return super().is_leaf_module(m, module_qualified_name) and not _holds_batchnorm(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        if has_hooks(m):
            raise GraphError(f"{name} has hooks, which a traced copy would not run")
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # of its forward()
            if super().is_leaf_module(m, name) and not hasattr(error, "inside"):
                error.inside = name  # type: ignore[attr-defined]  # for `_around` to take it whole
            raise


def _can_be_gone_into(module: nn.Module) -> bool:
    """Return whether a BatchNorm has arithmetic of its own, say with an activation, in the open."""
    if type(module).__module__.startswith("torch.nn") or own_forward(module) is not None:
        return False
    try:
        _Tracer(set()).trace(module)
    except Exception:  # of its forward(), which may raise anything
        return False
    return True


def _holds_batchnorm(module: nn.Module) -> bool:
    return any(isinstance(child, BATCHNORM) for child in module.modules())


def _by_fx(copy: nn.Module, example: Example | None, kind: str, whole: set[str]) -> fx.GraphModule:
    tracer = _Tracer(whole, 1 if example is None else len(example))
    graph = tracer.trace(copy)
    traced = fx.GraphModule(tracer.root, graph, kind)
    if example is None:
        return lift(traced)
    with torch.no_grad():
        note_shapes(traced, tuple(one.clone() for one in example))
    lifted = lift(traced)
    check_same(copy, lifted, example, kind)
    return lifted


def _around(copy: nn.Module, example: Example | None, kind: str) -> fx.GraphModule:
    """Trace, and take torch.nn's containers that cannot be gone into as one."""
    whole: set[str] = set()
    while True:
        try:
            return _by_fx(copy, example, kind, whole)
        except Exception as error:  # of the user's own forward()
            inside = getattr(error, "inside", None)
            if inside is None or inside in whole:
                raise
            whole.add(inside)


def _uncalled(copy: nn.Module, traced: fx.GraphModule) -> Iterator[Fate]:
    """Yield the fates of BatchNorms that a graph does not show."""
    nodes = traced.graph.nodes
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    means = (getattr(traced.get_submodule(name), "running_mean", None) for name in called)
    lifted = {mean.data_ptr() for mean in means if mean is not None}
    readers = {str(n.target).rpartition(".")[0]: n.users for n in nodes if n.op == "get_attr"}
    for name, child in copy.named_modules():
        users = [
            str(getattr(user.target, "__name__", user.target)) for user in readers.get(name, ())
        ]
        if not isinstance(child, BATCHNORM) or name in called or "batch_norm" in users:
            continue
        if child.running_mean is not None and child.running_mean.data_ptr() in lifted:
            continue  # its forward() was gone into, and a layer in it holds its tensors
        holder = next((target for target in called if name.startswith(f"{target}.")), None)
        why = f"inside {holder}, which cannot be traced into" if holder else "never called"
        if users:
            why = f"its tensors go into {users[0]}, which is no BatchNorm"
        yield Fate(name, type(child).__name__, False, why)


# ── What to say ─────────────────────────────────────────────────────────────────────


def _place(error: Exception) -> str:
    """Return which line of the model is in the way, and why."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if _is_of_the_model(frame.filename)
    ]
    if not frames:
        return first_line(error)
    frame = frames[-1]
    source = f', "{frame.line}"' if frame.line else ""
    return f"{Path(frame.filename).name}, line {frame.lineno}{source}: {first_line(error)}"


def _is_of_the_model(filename: str) -> bool:
    installed = "site-packages" in filename or "dist-packages" in filename
    return not filename.startswith(OWN) and (installed or not filename.startswith(STDLIB))
