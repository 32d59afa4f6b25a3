"""A checkpoint's tensors into a network, or a refusal that names what does not fit.

The names must be the network's own, or become so by what wrappers are known to do to them, which is
then stated:

    {"state_dict": …}, {"model": …}, {"ema": …}    a dict in the file that holds the weights
    module.  model.  _orig_mod.  ema.              in front of every name: DataParallel, Lightning,
                                                   torch.compile, averaged models
    denselayer1.norm.1 → denselayer1.norm1         torchvision's older DenseNet files
    num_batches_tracked                            not there in files of before PyTorch 0.4.1; no
                                                   inference reads it, so it is 0
    aux1.  aux2.  AuxLogits.  n_averaged           there, and read in training alone: left out

Whatever else differs is refused, and so is a file in which the weights are twice, as those of
training and their average are, unless a key says which are meant: the dicts that they are in and
what is in front of every name, outermost first, joined with dots, or just the outer ones of those.

    state_dict_ema      {"state_dict": …, "state_dict_ema": …}
    ema, ema.module     {"ema": {"module": …}}, or "ema.module." in front of every name
    .                   as they are: in no dict, with nothing in front

Half-precision storage is fine: every float16 and bfloat16 value is a float32 value, so loading is
exact. float64 is refused, since rounding it would change the network that was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from exporter.checkpoints import Checkpoint, quoted, read_checkpoint
from exporter.errors import InputRefused
from exporter.initial import Initial

if TYPE_CHECKING:
    import torch
    from torch import nn

    State = Mapping[str, torch.Tensor]

_SHOWN = 20  # differences
_ALIKE, _COMPARED, _LONG = 3, 500, 200  # names to find others for, among so many of such a length
_PREFIXES = ("module.", "model.", "_orig_mod.", "ema.", "ema_model.", "state_dict.")
_GROUPS = 16  # dicts with tensors in a file
_DEEPEST = 4  # prefixes, one behind the other
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
_AS_THEY_ARE = "."
_UNTRACKED = "num_batches_tracked"
_TRAINING_ALONE = re.compile(r"(aux1|aux2|AuxLogits)\..*", re.DOTALL)
_DOTTED = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)", re.DOTALL)
_FLOATS = (("float32", "float16", "bfloat16"), "float32, float16 or bfloat16")
_INTEGERS = (("int64", "int32", "int16", "int8", "uint8"), "int64")


class WeightsFile(NamedTuple):
    """A file of weights, and by its key which of those in it are meant."""

    path: Path
    key: str | None = None


AskedWeights: TypeAlias = Path | WeightsFile | Initial


@dataclass(frozen=True, slots=True)
class Loaded:
    """Where a network's weights came from: the file's digest, its format, and what was renamed.

    ``key`` is that of the weights in the file where one was asked for, in full.
    """

    sha256: str
    format: str
    changes: tuple[str, ...] = ()
    key: str | None = None


def load_weights(module: nn.Module, path: Path, *, key: str | None = None) -> Loaded:
    """Load a file into ``module``, and return what it was.

    ``key`` says which are meant where the file has the weights more than once, say "ema".

    Raises `InputRefused` for a file that `read_checkpoint` refuses or `fit_weights` does, and
    leaves ``module`` as it was then.
    """
    return fit_weights(module, read_checkpoint(path), key=key)


def fit_weights(module: nn.Module, checkpoint: Checkpoint, *, key: str | None = None) -> Loaded:
    """Load a checkpoint into ``module``, and return what it was.

    Raises `InputRefused` if its names, shapes or types are not the network's, if the weights are in
    it more than once and no ``key`` says which are meant, if there are none by that key, or if it
    holds NaN or infinite values.
    """
    import torch

    wanted, name = module.state_dict(), checkpoint.name
    chosen = _choose(wanted, checkpoint, key)
    _check_shapes(wanted, chosen.tensors, name)
    for own, value in wanted.items():
        kinds, words = _FLOATS if value.is_floating_point() else _INTEGERS
        if (kind := _dtype(chosen.tensors[own])) not in kinds:
            raise InputRefused(
                f"{name}: tensor {own!r} is {kind}, which does not fit {_dtype(value)} exactly",
                hint=f"save it as {words}",
            )
    for own, value in chosen.tensors.items():
        if value.is_floating_point() and (bad := int((~torch.isfinite(value)).sum())):
            raise InputRefused(
                f"{name}: tensor {own!r} holds {bad} values that are NaN or infinite"
            )
    module.load_state_dict(chosen.tensors, strict=True)
    asked = None if key is None else chosen.key
    return Loaded(checkpoint.sha256, checkpoint.format, chosen.changes, asked)


# ── Which of the names are the network's ────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Reading:
    """One way to read a checkpoint: its tensors by these names, and what was done to get them.

    ``way`` are the dicts that they were in and the prefixes that they had, outermost first.
    """

    tensors: dict[str, torch.Tensor]
    changes: tuple[str, ...] = ()
    way: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return ".".join(self.way) or _AS_THEY_ARE

    def has_key(self, key: str) -> bool:
        """Return whether that is its key, or the outer part of it."""
        return self.key == key or (key != "" and self.key.startswith(f"{key}."))

    def fits(self, wanted: State) -> bool:
        return self.tensors.keys() == wanted.keys()

    def missing(self, wanted: State) -> list[str]:
        return [key for key in wanted if key not in self.tensors]

    def unknown(self, wanted: State) -> list[str]:
        return [key for key in self.tensors if key not in wanted]

    def then(self, tensors: dict[str, torch.Tensor], change: str, *way: str) -> _Reading:
        return _Reading(tensors, (*self.changes, change), (*self.way, *way))


def _choose(wanted: State, checkpoint: Checkpoint, key: str | None) -> _Reading:
    """Return the one reading whose names are the network's, of those with the key if one is given.

    Its changes say then which others there would have been.
    """
    every = [_settled(reading, wanted) for reading in _readings(checkpoint.tensors)]
    readings = every if key is None else [reading for reading in every if reading.has_key(key)]
    if key is not None and not readings:
        raise _no_such_key(wanted, every, checkpoint.name, key)
    fitting = [reading for reading in readings if reading.fits(wanted)]
    if not fitting:
        raise _unfit(wanted, readings, checkpoint.name)
    named = [reading for reading in fitting if reading.key == key] or fitting
    if len(named) > 1:
        raise _twice(named, checkpoint.name, key)
    (chosen,) = named
    if key is None:
        return chosen
    others = [one.key for one in every if one.fits(wanted) and one is not chosen]
    passed = f", and not {_some(others, _SHOWN)}, which would fit as well" if others else ""
    asked = f"{quoted(chosen.key)} was asked for{passed}"
    return replace(chosen, changes=(asked, *chosen.changes))


def _readings(tensors: Mapping[tuple[str, ...], torch.Tensor]) -> Iterator[_Reading]:
    """Yield every way to read a checkpoint by known wrappers, the largest dicts first."""
    groups: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    for (*dicts, key), value in tensors.items():
        groups.setdefault(tuple(dicts), {})[key] = value
    largest = sorted(groups.items(), key=lambda item: -len(item[1]))[:_GROUPS]
    for outer, group in largest:
        inside = "".join(f"[{quoted(key)}]" for key in outer)
        changes = (f"taken from its {inside}",) if outer else ()
        yield from _unwrapped(_Reading(group, changes, outer), _DEEPEST)
    if not groups:
        yield _Reading({})


def _unwrapped(reading: _Reading, deepest: int) -> Iterator[_Reading]:
    yield reading
    for prefix in _PREFIXES if deepest else ():
        inner = {
            k.removeprefix(prefix): v for k, v in reading.tensors.items() if k.startswith(prefix)
        }
        outside = [key for key in reading.tensors if not key.startswith(_PREFIXES)]
        if inner and set(outside) <= {_COUNTER}:
            change = f"{prefix!r} taken off {len(inner)} names"
            change += f", {_COUNTER} left out" if outside else ""
            yield from _unwrapped(reading.then(inner, change, prefix[:-1]), deepest - 1)


def _settled(reading: _Reading, wanted: State) -> _Reading:
    """Return a reading with the names of older files, and of what training alone reads, settled.

    Where that does not make it fit, it is returned as it was.
    """
    import torch

    found = reading
    dotted = {_DOTTED.sub(r"\1\2", key): value for key, value in found.tensors.items()}
    if len(dotted) == len(found.tensors) and (
        renamed := sum(key not in found.tensors for key in dotted)
    ):
        found = found.then(dotted, f"{renamed} names of torchvision's older DenseNet renamed")
    if left := [key for key in found.unknown(wanted) if _TRAINING_ALONE.fullmatch(key)]:
        rest = {key: value for key, value in found.tensors.items() if key not in left}
        change = f"{len(left)} tensors left out, that training alone reads: {_some(left, 3)}"
        found = found.then(rest, change)
    missing = found.missing(wanted)
    if missing and all(key.rpartition(".")[2] == _UNTRACKED for key in missing):
        zeros = {key: torch.zeros_like(wanted[key]) for key in missing}
        change = f"it lacks {_UNTRACKED}, which no inference reads: 0 in {len(missing)} layers"
        found = found.then({**found.tensors, **zeros}, change)
    return found if found.fits(wanted) else reading


# ── What is said of what does not fit ───────────────────────────────────────────────


def _twice(fitting: list[_Reading], name: str, key: str | None) -> InputRefused:
    """Return the refusal that names each of several readings, and the key to tell them apart."""
    ways = "; or ".join(", ".join(reading.changes) or "as they are" for reading in fitting)
    keys = [reading.key for reading in fitting]
    under = "" if key is None else f" by the key {quoted(key)}"
    return InputRefused(
        f"{name}: this network's weights are in it {len(fitting)} times{under}: {ways}",
        hint=f"say which are meant with --weights-key, {_or(keys)}"
        if len(set(keys)) == len(keys)
        else "save the ones that are meant alone, with safetensors.torch.save_file",
    )


def _no_such_key(wanted: State, every: list[_Reading], name: str, key: str) -> InputRefused:
    """Return the refusal of a key that nothing has: it names those there are, the fitting first."""
    there = sorted(every, key=lambda reading: not reading.fits(wanted))
    keys = list(dict.fromkeys(reading.key for reading in there))
    near = get_close_matches(key[:_LONG], [one for one in keys if len(one) < _LONG], n=1)
    return InputRefused(
        f"{name}: no weights in it have the key {quoted(key)}, only {_some(keys, _SHOWN)}",
        hint=f"did you mean {quoted(near[0])}?" if near else None,
    )


def _unfit(wanted: State, readings: list[_Reading], name: str) -> InputRefused:
    """Return the refusal that names the first differences of the reading that comes closest."""
    nearest = max(readings, key=lambda r: len(wanted.keys() & r.tensors.keys()))
    missing, extra = nearest.missing(wanted), nearest.unknown(wanted)
    half = _SHOWN // 2
    parts = []
    if missing:
        parts.append(f"lacks {_some(missing, max(half, _SHOWN - len(extra)))}")
    if extra:
        parts.append(f"has unknown {_some(extra, max(half, _SHOWN - len(missing)))}")
    read = f" ({', '.join(nearest.changes)})" if nearest.changes else ""
    return InputRefused(
        f"{name}: not this network's weights{read}: it {' and '.join(parts)}",
        hint=_alike(missing, extra),
    )


def _alike(missing: list[str], extra: list[str]) -> str | None:
    """Return which unknown names come nearest to the first missing ones."""
    known = [key for key in extra if len(key) < _LONG][:_COMPARED]
    near = [
        f"{quoted(key)} may be its {quoted(close[0])}"
        for key in missing[:_ALIKE]
        if (close := get_close_matches(key, known, n=1))
    ]
    return "; ".join(near) or None


def _check_shapes(wanted: State, found: State, name: str) -> None:
    shapes = [
        f"{key} is {tuple(found[key].shape)}, needs {tuple(wanted[key].shape)}"
        for key in wanted
        if found[key].shape != wanted[key].shape
    ]
    if shapes:
        shown = "; ".join(shapes[:_SHOWN]) + _more(shapes, _SHOWN)
        raise InputRefused(f"{name}: not this network's weights: {shown}")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _or(keys: list[str]) -> str:
    return " or ".join(map(quoted, keys[:_SHOWN])) + _more(keys, _SHOWN)


def _some(keys: list[str], most: int) -> str:
    return ", ".join(map(quoted, keys[:most])) + _more(keys, most)


def _more(items: list[str], most: int) -> str:
    return f" and {len(items) - most} more" if len(items) > most else ""
