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
import logging
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as every_module
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from exporter.errors import GraphError
from exporter.fold.graph import note_shapes
from exporter.fold.lifting import BATCHNORM, has_hooks, lift, plain
from exporter.records import Fate

BATCHES = (1, 2, 3)  # sizes at which torch.export's graph is held against the module
OF_TORCH = ("OptimizedModule", "GuardsFn")  # whose instances have a forward() each, by design
LARGEST = 2**31  # bounds from here on are torch.export's own
OWN = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parent}/", "<")
STDLIB = sysconfig.get_path("stdlib")


class _Differs(Exception):
    """A graph computes something else than its module; never leaves this file."""


def trace(
    module: nn.Module, example: torch.Tensor | None = None
) -> tuple[fx.GraphModule, tuple[Fate, ...]]:
    """Return a traced copy, and the fates of the BatchNorms that its graph does not call.

    Raises `GraphError` if the network is in training mode, is in a form that tracing would not do
    justice to, cannot be copied, or cannot be traced; then with the line that is in the way.
    """
    module = _unwrapped(module)
    kind = type(module).__name__
    _refuse_unfit(module)
    copy = _copy(module)
    if example is not None:
        _run(copy, example, kind)
    if _is_exported(module):
        traced = _exported(copy, module.range_constraints, kind)
    else:
        traced = _traced(copy, kind, example)
    return traced, tuple(_uncalled(copy, traced))


# ── What is refused, and what is taken off ──────────────────────────────────────────


def _refuse_unfit(module: nn.Module) -> None:
    """Raise `GraphError` for what a traced copy would not do, or not do in the same way."""
    kind, exported = type(module).__name__, _is_exported(module)
    if module.training and not exported:
        raise GraphError("cannot fold a network in training mode", hint="call module.eval() first")
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:  # noqa: SLF001 - no public view
        raise GraphError("there are global module hooks, which a traced copy would not run")
    for name, child in module.named_modules():
        label = name or kind
        if child.training and not exported:
            raise GraphError(f"{label} is in training mode", hint="call module.eval() first")
        if any(base.__name__ == "ScriptModule" for base in type(child).__mro__):
            hint = "fold the network that the TorchScript was made from"
            raise GraphError(f"{label} is TorchScript, which cannot be traced", hint=hint)
        tensors = (*child.parameters(recurse=False), *child.buffers(recurse=False))
        if any(map(is_lazy, tensors)):
            hint = "run one batch through the network first"
            raise GraphError(f"{label} has no weights yet: it waits for its first input", hint=hint)
        if _is_quantised(child):
            hint = "fold the network before it is quantised"
            raise GraphError(f"{label} is quantised, and folding would change it", hint=hint)
        if replaced := [key for key in vars(child) if _replaces(child, key)]:
            hint = "override it in a class"
            raise GraphError(f"{label}.{replaced[0]} was replaced on the instance", hint=hint)
    if has_hooks(module) and not (exported and _hooked_by_export(module)):
        raise GraphError(f"{kind} has hooks of its own, which a traced copy would not run")


def _is_quantised(module: nn.Module) -> bool:
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    by_kind = ".quantized." in type(module).__module__ and "torch.ao." in type(module).__module__
    return by_kind or any(tensor.is_quantized for tensor in tensors)


def _replaces(module: nn.Module, key: str) -> bool:
    """Return whether the instance has its own in place of a method that forward() may use."""
    found = inspect.getattr_static(type(module), key, None)
    is_method = inspect.isfunction(found) or isinstance(found, staticmethod | classmethod)
    used = key == "forward" or not hasattr(nn.Module, key)  # whose others compute nothing
    return is_method and used and type(module).__name__ not in OF_TORCH


def _is_exported(module: nn.Module) -> bool:
    """Return whether torch.export made it, which writes the mode into each call and keeps none."""
    return isinstance(module, fx.GraphModule) and "eval" in vars(module)


def _hooked_by_export(module: nn.Module) -> bool:
    """Return whether all hooks are torch.export's, which check and unpack the input."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())  # noqa: SLF001 - no public view
    return all(getattr(hook, "__module__", "") == "torch.export._unlift" for hook in hooks)


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule"


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return what a wrapper that changes no value has inside."""
    while True:
        if isinstance(module, nn.DataParallel):
            module = module.module
        elif _is_compiled(module):
            module = module.get_submodule("_orig_mod")
        else:
            return module


def _copy(module: nn.Module) -> nn.Module:
    """Return a copy without the wrappers inside."""
    try:
        copy = deepcopy(module)
    except Exception as error:  # of whatever the module holds, like old parametrisations' tensors
        raise GraphError(f"cannot copy {type(module).__name__}: {first_line(error)}") from error
    for parent in list(copy.modules()):
        for name, child in list(parent.named_children()):
            if (inside := _unwrapped(child)) is not child:
                setattr(parent, name, inside)
        parent._compiled_call_impl = None  # noqa: SLF001 - no public view
    return copy


# ── Tracing ─────────────────────────────────────────────────────────────────────────


def _traced(copy: nn.Module, kind: str, example: torch.Tensor | None) -> fx.GraphModule:
    """Return the first graph that comes about and computes the same."""
    try:
        return _by_fx(copy, example, kind)
    except GraphError:
        raise
    except Exception as error:  # tracing runs the user's own forward(), which may raise anything
        failed, by_fx = "torch.fx", error
    if example is not None:
        try:
            return _by_export(_copy(copy), example, kind)
        except GraphError:
            raise
        except Exception as error:  # the same
            failed, by_fx = "neither torch.fx nor torch.export", error
    whole: set[str] = set()
    while True:
        try:
            return _by_fx(copy, example, kind, whole)
        except GraphError:
            raise
        except Exception as error:  # the same
            inside = getattr(error, "inside", None)
            if inside is None or inside in whole:
                break
            whole.add(inside)
    verb = "can" if failed.startswith("neither") else "cannot"
    hint = None if example is not None else "give an example input, and torch.export will try"
    raise GraphError(f"{failed} {verb} trace {kind}: {_place(by_fx)}", hint=hint) from by_fx


class _Tracer(fx.Tracer):
    """torch.fx's tracer, given one input, that goes into torch.nn's containers for BatchNorms."""

    def __init__(self, whole: set[str]) -> None:
        super().__init__(param_shapes_constant=True)
        self.whole = whole

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Return forward() and one input. All else has its default, as when the module is run."""
        names = [
            name
            for name, given in inspect.signature(root_fn).parameters.items()
            if given.kind in (given.POSITIONAL_ONLY, given.POSITIONAL_OR_KEYWORD)
        ]
        name = names[1] if len(names) > 1 else "input"
        return root_fn, [self.root, self.create_proxy("placeholder", name, (), {})]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            raise RuntimeError("torch.fx would lose its autocast")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, BATCHNORM) or module_qualified_name in self.whole:
            return True
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
                error.inside = name  # type: ignore[attr-defined]  # for `_traced` to take it whole
            raise


def _holds_batchnorm(module: nn.Module) -> bool:
    return any(isinstance(child, BATCHNORM) for child in module.modules())


def _by_fx(
    copy: nn.Module, example: torch.Tensor | None, kind: str, whole: set[str] | None = None
) -> fx.GraphModule:
    tracer = _Tracer(whole or set())
    graph = tracer.trace(copy)
    traced = fx.GraphModule(tracer.root, graph, kind)
    if example is None:
        return lift(traced)
    with torch.no_grad():
        note_shapes(traced, example.clone())
    lifted = lift(traced)
    _check_same(copy, lifted, example, kind)
    return lifted


def _by_export(copy: nn.Module, example: torch.Tensor, kind: str) -> fx.GraphModule:
    """Trace with a free batch axis."""
    for name, child in copy.named_modules():
        if has_hooks(child):
            raise GraphError(f"{name} has hooks, which a traced copy would not run")
    if len(example) == 1:  # which would be taken for a constant
        example = torch.cat([example, example])
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]  # torch's
    shapes[example] = {0: torch.export.Dim.AUTO}
    with _quiet(), torch.no_grad(), _len_of_tensors(copy):
        program = torch.export.export(copy, (example,), dynamic_shapes=shapes, strict=False)
    traced = plain(program.module(check_guards=False), copy, kind)
    _check_free(traced, program.range_constraints, kind)
    lifted = lift(traced)
    _check_same(copy, lifted, example, kind)
    for batch in BATCHES:
        repeated = example.repeat(-(-batch // len(example)), *[1] * (example.ndim - 1))[:batch]
        try:
            _check_same(copy, lifted, repeated, kind)
        except _Differs as error:
            raise GraphError(
                f"{kind} takes another way for a batch of {batch} than for {len(example)}, "
                "and a graph has one way"
            ) from error
    return lifted


def _exported(copy: Any, ranges: Any, kind: str) -> fx.GraphModule:
    """Return the graph that torch.export made of a network before, without its guards."""
    for node in list(copy.graph.nodes):
        if node.target == "_guards_fn":
            copy.graph.erase_node(node)
    traced = plain(copy, copy, kind)
    _check_free(traced, ranges, kind)
    return lift(traced)


def _check_free(traced: fx.GraphModule, ranges: dict[Any, Any], kind: str) -> None:
    """Raise `GraphError` if a graph is for some sizes of batch alone."""
    node = next(node for node in traced.graph.nodes if node.op == "placeholder")
    size = node.meta["val"].shape[0]
    asks = "as its code asks for the batch's size"
    if str(size).isdecimal():
        hint = "write x.shape[0] without int(), and do not go over the pictures in a loop"
        said = f"{kind} was traced by torch.export for a batch of {size} alone, {asks}"
        raise GraphError(said, hint=hint)
    largest = str(ranges[size.node.expr].upper)
    if largest.isdecimal() and int(largest) < LARGEST:
        raise GraphError(f"{kind} was traced by torch.export for at most {largest} at once, {asks}")


@contextmanager
def _len_of_tensors(module: nn.Module) -> Iterator[None]:
    """Let ``len(x)`` in any forward() be ``x.shape[0]``, which need not be a number yet."""

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, torch.Tensor) else len(value)

    forwards = (type(child).forward for child in module.modules())
    spaces = {id(found): found for f in forwards if (found := getattr(f, "__globals__", None))}
    own = [space for space in spaces.values() if not space["__name__"].startswith("torch.")]
    used = [space for space in own if "len" not in space]
    try:
        for space in used:
            space["len"] = length
        yield
    finally:
        for space in used:
            del space["len"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export from printing: what it fails at is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# ── Is it the same network? ─────────────────────────────────────────────────────────


def _run(module: nn.Module, example: torch.Tensor, kind: str) -> Any:
    """Return the module's answer, with the same random numbers each time."""
    try:
        with _quiet(), torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            forward = module.forward if isinstance(module, fx.GraphModule) else module
            return forward(example.clone())  # a GraphModule's own call prints where it fails
    except Exception as error:  # of the network's own forward()
        raise GraphError(f"{kind} does not take the example: {first_line(error)}") from error


def _check_same(copy: nn.Module, traced: nn.Module, example: torch.Tensor, kind: str) -> None:
    """Raise `_Differs` unless the graph computes what the module does, where that runs at all."""
    try:
        want = _run(copy, example, kind)
    except GraphError:  # a batch of this size is not for this network
        return
    try:
        got = _run(traced, example, kind)
    except GraphError as error:
        raise _Differs(f"its graph does not run: {error.__cause__}") from error
    found, expected = (dict(pytree.tree_flatten_with_path(answer)[0]) for answer in (got, want))
    if found.keys() != expected.keys() or not all(_same(expected[k], found[k]) for k in found):
        raise _Differs("its graph computes something else than forward()")


def _same(want: object, got: object) -> bool:
    if not isinstance(want, torch.Tensor) or not isinstance(got, torch.Tensor):
        return want == got
    if want.shape != got.shape or want.dtype != got.dtype:
        return False
    if not want.is_floating_point() or torch.equal(want, got):
        return torch.equal(want, got)
    tolerance = 1000 * torch.finfo(want.dtype).eps
    finite = want[torch.isfinite(want)]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(want, got, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def _uncalled(copy: nn.Module, traced: fx.GraphModule) -> Iterator[Fate]:
    """Yield the fates of BatchNorms that a graph does not show."""
    nodes = traced.graph.nodes
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    readers = {str(n.target).rpartition(".")[0]: n.users for n in nodes if n.op == "get_attr"}
    for name, child in copy.named_modules():
        users = [
            str(getattr(user.target, "__name__", user.target)) for user in readers.get(name, ())
        ]
        if not isinstance(child, BATCHNORM) or name in called or "batch_norm" in users:
            continue
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


def first_line(error: BaseException) -> str:
    """Return an error's first line, as the end of a sentence."""
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return "which way it goes depends on the values of the input"
    line = next(iter(str(error).strip().splitlines()), repr(error))
    return line.rstrip(". ")
