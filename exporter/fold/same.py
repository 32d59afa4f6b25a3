"""Does a graph compute what its module does? Both are run and compared."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from exporter.errors import GraphError

Example: TypeAlias = tuple[torch.Tensor, ...]  # what forward() is given, each a batch


class Differs(Exception):
    """A graph computes something else than its module; never leaves this package."""


def run(module: nn.Module, example: Example, kind: str) -> Any:
    """Return the module's answer, with the same random numbers each time."""
    try:
        with quiet(), torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            forward = module.forward if isinstance(module, fx.GraphModule) else module
            given = [one.clone() for one in example]
            return forward(*given)  # a GraphModule's own call prints where it fails
    except Exception as error:  # of the network's own forward()
        raise GraphError(f"{kind} does not take the example: {first_line(error)}") from error


def check_same(copy: nn.Module, traced: nn.Module, example: Example, kind: str) -> None:
    """Raise `Differs` unless the graph computes what the module does, where that runs at all."""
    try:
        want = run(copy, example, kind)
    except GraphError:  # a batch of this size is not for this network
        return
    try:
        got = run(traced, example, kind)
    except GraphError as error:
        raise Differs(f"its graph does not run: {error.__cause__}") from error
    found, expected = (dict(pytree.tree_flatten_with_path(answer)[0]) for answer in (got, want))
    if found.keys() != expected.keys() or not all(_same(expected[k], found[k]) for k in found):
        raise Differs("its graph computes something else than forward()")


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


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch.export from printing: what it fails at is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def first_line(error: BaseException) -> str:
    """Return an error's first line, as the end of a sentence."""
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return "which way it goes depends on the values of the input"
    line = next(iter(str(error).strip().splitlines()), repr(error))
    return line.rstrip(". ")
