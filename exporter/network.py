"""The network of a run: which one, with which weights, whether it takes the input, and folded.

A built-in is asked for by name, a factory's network or any other `Model` is given; values that
nobody trained are only taken where they are asked for. A run starts at it (`exporter.start`) in
PyTorch: that computes it in float64 and float32, and torch.onnx writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from exporter.checkpoints import read_checkpoint
from exporter.contracts import Ends, Model, Session, outputs_of
from exporter.errors import InputRefused
from exporter.factories import FactoryModel, GivenModel, check_sizes
from exporter.fold import fold_batchnorm
from exporter.fused import RankedNetwork, fuse
from exporter.initial import INITIAL, SEED, Initial, digest, from_seed
from exporter.outputs import check_outputs
from exporter.packing import in_words
from exporter.plugins import load_model
from exporter.profile import Profile
from exporter.records import Array, BatchRange, Fate, Feed, OnnxModel, TensorSpec, TopK
from exporter.reference import TorchSession
from exporter.sizing import free_sides
from exporter.to_onnx import export_onnx
from exporter.weights import AskedWeights, Loaded, WeightsFile, fit_weights

if TYPE_CHECKING:
    from torch import nn

    from exporter.fold.same import Example


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
        own = model if isinstance(model, FactoryModel | GivenModel) else None
        name = own.name if own else type(model).__name__.lower()
        if args != (model.args if isinstance(model, FactoryModel) else {}):
            raise InputRefused(
                f"{name} is not built with the profile's model.args",
                hint="build it with them, or leave them out",
            )
        if input_shape and own and input_shape != model.input.shape:
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

    def start(
        self, weights: AskedWeights | None, inputs: tuple[TensorSpec, ...], profile: Profile
    ) -> NetworkStart:
        """Return it with its weights, and with what the profile fuses and leaves free.

        Raises `InputRefused`.
        """
        module, origin, loaded = self.build(weights)
        self.check(module, inputs)
        outputs = outputs_of(self.model)
        module, inputs = fuse(module, inputs, outputs, profile.preprocess, profile.postprocess)
        last = profile.preprocess.fuse == "nhwc"
        inputs = free_sides(inputs, profile.size, channels_last=last)
        names = tuple(output.name for output in outputs)
        return NetworkStart(module, inputs, names, (origin, loaded))

    def build(self, weights: AskedWeights | None) -> tuple[nn.Module, str, Loaded]:
        """Return the module with its weights, where they are from in words, and what was loaded.

        Its digest is of the file, or of the values where there is none. Raises `InputRefused`
        where there are no weights, or they do not fit.
        """
        code = code_of(self.model)
        file = WeightsFile(weights) if isinstance(weights, Path) else weights
        if isinstance(self.model, GivenModel) and not isinstance(file, WeightsFile):
            return self._as_given(self.model, file)
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
        path, key = file if isinstance(file, WeightsFile) else (self.model.weights, None)
        assert path is not None
        checkpoint = read_checkpoint(path)  # before the network is there, which takes memory too
        module = self.model.module()
        loaded = fit_weights(module, checkpoint, key=key)
        return module, path.name.encode(errors="replace").decode(), loaded  # names may be any bytes

    def _as_given(
        self, model: GivenModel, weights: Initial | None
    ) -> tuple[nn.Module, str, Loaded]:
        if weights is not None:
            raise InputRefused(
                f"{self.name} is a module that was given, so that there are no {weights} weights",
                hint="leave the weights out, and it keeps its own",
            )
        module = model.module()
        loaded = Loaded(digest(module, name=self.name), "in memory", model.changes)
        return module, f"as {model.kind} held them", loaded

    def check(self, module: nn.Module, inputs: Sequence[TensorSpec]) -> None:
        """Raise `InputRefused` unless it makes the outputs of the inputs.

        On torch's meta device, for free; what a factory made or a program gave has run already.
        """
        import torch

        if isinstance(self.model, FactoryModel | GivenModel):
            return
        shape = check_sizes(inputs, self.name)
        given = [torch.empty(1, *spec.shape, device="meta") for spec in inputs]
        try:
            with torch.inference_mode():
                found = deepcopy(module).to("meta")(*given)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise InputRefused(f"{self.name} cannot take an input of {shape}: {reason}") from error
        gives = check_outputs(found, name=self.name, batch=1, taken=[spec.name for spec in inputs])
        wanted, got = ([one.shape for one in side] for side in (outputs_of(self.model), gives))
        if wanted != got:
            said, found = map(in_words, (wanted, got))
            raise InputRefused(f"{self.name} says that it gives {said} values, not {found}")


@dataclass(frozen=True, slots=True)
class NetworkStart:
    """A network in PyTorch, where a run starts."""

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    origin: tuple[str, Loaded]
    file: None = None
    timed: ClassVar[str] = "PyTorch eager, fp32"

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    def double(self) -> Session:
        return TorchSession.of(self.module, *self.outputs, double=True)

    def single(self, top: TopK | None = None) -> AbstractContextManager[Session]:
        if top is None:
            return nullcontext(TorchSession.of(self.module, *self.outputs))
        place = self.outputs.index(top.scores.name)
        names = list(self.outputs)
        names[place : place + 1] = top.values.name, top.labels.name
        return nullcontext(TorchSession.of(RankedNetwork(self.module, place, top.k), *names))

    def fold(self, example: Example, *, double: bool = False) -> FoldedNetwork:
        module = deepcopy(self.module).double() if double else self.module
        free = tuple(spec.free for spec in self.inputs)
        folded = fold_batchnorm(module, example, free=free)
        return FoldedNetwork(folded.module, self.outputs, folded.fates)


@dataclass(frozen=True, slots=True)
class FoldedNetwork:
    """A network in PyTorch with its BatchNorms folded, and what became of each."""

    module: nn.Module
    outputs: tuple[str, ...]
    fates: tuple[Fate, ...] = ()
    writer: ClassVar[str] = "torch.onnx"

    def session(self, *, double: bool = False) -> Session:
        return TorchSession.of(self.module, *self.outputs, double=double)

    def write(
        self,
        path: Path,
        *,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        batch: BatchRange,
        opset: int,
    ) -> OnnxModel:
        return export_onnx(
            self.module,
            path,
            input=inputs[0],
            more_inputs=inputs[1:],
            output=outputs[0],
            more_outputs=outputs[1:],
            batch=batch,
            opset=opset,
        )

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


def kind_of(model: Ends) -> str | None:
    """Return the class of the module that a program gave, or None for a network that none did."""
    return model.kind if isinstance(model, GivenModel) else None
