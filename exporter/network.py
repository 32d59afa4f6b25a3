"""The network of a run: which one, with which weights, whether it takes the input, and folded.

A built-in is asked for by name, a factory's network or any other `Model` is given; values that
nobody trained are only taken where they are asked for. A run starts at it (`exporter.start`) in
PyTorch: that computes it in float64 and float32, and torch.onnx writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from exporter.checkpoints import read_checkpoint
from exporter.contracts import Ends, Model, Session
from exporter.errors import InputRefused
from exporter.factories import FactoryModel, check_output
from exporter.fold import fold_batchnorm
from exporter.initial import INITIAL, SEED, Initial, digest, from_seed
from exporter.plugins import load_model
from exporter.records import Array, BatchRange, Fate, Feed, OnnxModel, TensorSpec
from exporter.reference import TorchSession
from exporter.to_onnx import export_onnx
from exporter.weights import Loaded, fit_weights

if TYPE_CHECKING:
    import torch
    from torch import nn


class Network(NamedTuple):
    """A network and what it is called, in the report and in the names of its files."""

    name: str
    model: Model

    @classmethod
    def choose(
        cls,
        model: str | Model,
        args: Mapping[str, Any],
        input_shape: tuple[int, ...] | None,
        classes: int | None,
    ) -> Network:
        """Return it with the ends and the arguments asked for.

        Raises `UnknownName`, `ProfileError` and `InputRefused` as `load_model`.
        """
        if isinstance(model, str):
            chosen = load_model(model, input_shape=input_shape, classes=classes, args=args)
            return cls(model, chosen)
        is_made = isinstance(model, FactoryModel)
        name = model.name if isinstance(model, FactoryModel) else type(model).__name__.lower()
        if args != (model.args if isinstance(model, FactoryModel) else {}):
            raise InputRefused(
                f"{name} is not built with the profile's model.args",
                hint="build it with them, or leave them out",
            )
        if input_shape and is_made and input_shape != model.input.shape:
            wanted, found = (" × ".join(map(str, s)) for s in (input_shape, model.input.shape))
            raise InputRefused(f"{name} was made for an input of {found}, not {wanted}")
        if classes is not None and model.output.shape != (classes,):
            raise InputRefused(
                f"{name} has {' × '.join(map(str, model.output.shape))} outputs, not {classes}",
                hint="how many is an argument of its factory, say --set model.args.num_classes=10"
                if is_made
                else None,
            )
        return cls(name, model)

    def start(self, weights: Path | Initial | None, spec: TensorSpec) -> NetworkStart:
        """Return it with its weights, as the top of a run. Raises `InputRefused`."""
        module, origin, loaded = self.build(weights)
        self.check(module, spec)
        return NetworkStart(module, self.model.output.name, (origin, loaded))

    def build(self, weights: Path | Initial | None) -> tuple[nn.Module, str, Loaded]:
        """Return the module with its weights, where they are from in words, and what was loaded.

        Its digest is of the file, or of the values where there is none. Raises `InputRefused`
        where there are no weights, or they do not fit.
        """
        code = code_of(self.model)
        if weights is None and self.model.weights is None:
            other = "factory keeps those that it made" if code else "random takes untrained ones"
            raise InputRefused(
                f"{self.name} ships without weights, and there is nothing to export without",
                hint=f"name a file of weights with --weights; --weights {other}",
            )
        if weights == "factory" and not code:
            raise InputRefused(
                f"{self.name} is built in, so that no factory made weights that could be kept",
                hint="--weights random takes untrained ones",
            )
        if weights in INITIAL:
            module = from_seed(self.model.module)
            origin = f"as {code} made them" if code else "as PyTorch initialises them"
            kind = "random, " if weights == "random" else ""
            loaded = Loaded(digest(module, name=self.name), "")
            return module, f"{kind}{origin}, from seed {SEED}", loaded
        path = weights if isinstance(weights, Path) else self.model.weights
        assert path is not None
        checkpoint = read_checkpoint(path)  # before the network is there, which takes memory too
        module = self.model.module()
        loaded = fit_weights(module, checkpoint)
        return module, path.name.encode(errors="replace").decode(), loaded  # names may be any bytes

    def check(self, module: nn.Module, spec: TensorSpec) -> None:
        """Raise `InputRefused` unless it makes the output of the input.

        On torch's meta device, for free; what a factory made has run for real already.
        """
        import torch

        if isinstance(self.model, FactoryModel):
            return
        shape = " × ".join(map(str, spec.shape))
        if min(spec.shape) < 1:
            raise InputRefused(
                f"{self.name} cannot take an input of {shape}: every size must be 1 or more"
            )
        try:
            with torch.inference_mode():
                found = deepcopy(module).to("meta")(torch.empty(1, *spec.shape, device="meta"))
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise InputRefused(f"{self.name} cannot take an input of {shape}: {reason}") from error
        gives = check_output(found, name=self.name, batch=1)
        if gives != self.model.output.shape:
            wanted = " × ".join(map(str, self.model.output.shape))
            raise InputRefused(f"{self.name} says that it gives {wanted} values, not {gives[0]}")


@dataclass(frozen=True, slots=True)
class NetworkStart:
    """A network in PyTorch, where a run starts."""

    module: nn.Module
    output: str
    origin: tuple[str, Loaded]
    file: None = None
    timed: ClassVar[str] = "PyTorch eager, fp32"

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    def double(self) -> Session:
        return TorchSession.of(self.module, self.output, double=True)

    def single(self) -> AbstractContextManager[Session]:
        return nullcontext(TorchSession.of(self.module, self.output))

    def fold(self, example: torch.Tensor, *, double: bool = False) -> FoldedNetwork:
        module = deepcopy(self.module).double() if double else self.module
        folded = fold_batchnorm(module, example)
        return FoldedNetwork(folded.module, self.output, folded.fates)


@dataclass(frozen=True, slots=True)
class FoldedNetwork:
    """A network in PyTorch with its BatchNorms folded, and what became of each."""

    module: nn.Module
    output: str
    fates: tuple[Fate, ...] = ()
    writer: ClassVar[str] = "torch.onnx"

    def session(self, *, double: bool = False) -> Session:
        return TorchSession.of(self.module, self.output, double=double)

    def write(
        self, path: Path, *, input: TensorSpec, output: TensorSpec, batch: BatchRange, opset: int
    ) -> OnnxModel:
        return export_onnx(self.module, path, input=input, output=output, batch=batch, opset=opset)

    def layer_outputs(self, feed: Feed) -> dict[str, Array]:
        import torch

        found: dict[str, Array] = {}
        double = deepcopy(self.module).double()
        for name, layer in double.named_modules():

            def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                if isinstance(output, torch.Tensor):
                    found.setdefault(name, output.numpy())

            layer.register_forward_hook(keep)
        with torch.inference_mode():
            double(*(torch.from_numpy(value).double() for value in feed.values()))
        return found


def code_of(model: Ends) -> str | None:
    """Return the factory that made it, and with what, or None for a network that none made."""
    return model.code if isinstance(model, FactoryModel) else None
