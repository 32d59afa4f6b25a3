"""The input, near a real sample, on which an artefact disagrees most with the network.

Random inputs miss what happens close to a decision or where a branch is rarely taken. So a few real
samples are moved by signed gradient steps (A. Mądry et al., "Towards Deep Learning Models Resistant
to Adversarial Attacks", 2018), inside the box that the data fill and no further than ``radius`` of
its width from where they began, each towards one of four ends, with r the network's outputs, y the
artefact's, d = y − r, t the sample's label and j its rival, and σ signs drawn once for each lane:

    gap       Σ dᵢ²           further apart, wherever they are apart already
    drift     Σ σᵢ·dᵢ         apart where they still agree: this pulls even at d = 0; in pairs of ±σ
    flip      y_j − y_t       over the nearest boundary, where the least error flips the label
    extreme   σ_j·r_j         where ranges are used that calibration never saw

Gradients are taken through emulations of both graphs in PyTorch, with operators that never go flat
(`exporter.emulation.leaky`), so that a branch which only the artefact has pulls even while it is
off. What counts is confirmed: every input is run through the artefact itself, and through PyTorch
in float64; and between a sample and where it crossed the boundary, halving finds the place at which
the network itself is undecided, so that the artefact has to decide.

Several outputs stand side by side, each divided by its root mean square on the samples. Labels are
those of the first that may be a classification, and without one there are no boundaries, and
`drift` and `gap` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from exporter.contracts import Advance
from exporter.emulation import Emulator, Values
from exporter.packing import unpack
from exporter.records import Array, Flip, Outputs, TensorSpec, WorstCase

Run = Callable[[Array], Outputs]
Box = tuple[float, float] | tuple[Tensor, Tensor]

KINDS = ("drift", "gap", "flip", "extreme")
_CONFIRM_EVERY = 5
_HALVINGS = 30
_KEPT = 4  # inputs of each kind
_UNDECIDED = 16 * 2.0**-24  # of the largest output: a margin that float32 may lose


class Search(NamedTuple):
    """How far and how long to search: ``lanes`` samples at once, ``steps`` gradient steps each.

    ``radius`` is the largest change of an input element, as a share of the data's range.
    """

    steps: int = 60
    lanes: int = 12
    radius: float = 0.1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to, and the inputs (K, C, H, W) float32 that show it, widest gap first."""

    record: WorstCase
    inputs: Array


def search_worst_case(
    artefact: str,
    *,
    reference: Emulator,
    surrogate: Emulator,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    samples: Array,
    on_samples: tuple[Outputs, Outputs],
    run_reference: Run,
    run_artefact: Run,
    search: Search = Search(),  # noqa: B008 - immutable
    advance: Advance = lambda: None,
) -> Found:
    """Search near ``samples`` (N, C, H, W) float32 for the largest disagreement.

    ``reference`` and ``surrogate`` are the network's graph and the artefact's, for gradients;
    ``on_samples`` has what the network and the artefact give on the samples themselves, and
    ``run_reference`` and ``run_artefact`` take (n, C, H, W) float32 and give (n, values) float64 of
    each of the ``outputs``; several ``inputs`` lie side by side, as `exporter.packing` has them.
    ``advance`` is called after each step.
    """
    view = _View.of(outputs, on_samples[0])
    witness = _Witness(view, run_reference, run_artefact)
    want, got = map(view.join, on_samples)
    witness.note(samples, samples, want, got, step=0)
    started, flipped = witness.gap, witness.flips
    lanes = _Lanes.choose(samples, want, view, search, box=_box(samples, inputs))
    climb = _Climb(reference.in_float32(), surrogate.in_float32(), inputs, view, lanes, search)
    x = torch.from_numpy(lanes.origins)
    for step in range(1, search.steps + 1):
        x = climb.step(x, step)
        if step % _CONFIRM_EVERY == 0 or step == search.steps:
            witness.see(x.numpy(), lanes.origins, step=step)
        advance()
    witness.halve(x.numpy(), lanes.origins, search.steps)
    record = WorstCase(
        artefact=artefact,
        tried=witness.tried,
        steps=search.steps,
        radius=search.radius,
        gap_on_samples=started,
        gap=witness.gap,
        flips_on_samples=flipped,
        flips=witness.flips - flipped,
        first_flip=witness.first_flip,
        nonfinite=witness.nonfinite,
        has_classes=view.classes is not None,
        is_relative=len(outputs) > 1,
    )
    return Found(record, witness.inputs())


def _box(samples: Array, inputs: Sequence[TensorSpec]) -> Box:
    """Return the smallest and the largest value; of several inputs each one's own, (values,)."""
    if len(inputs) == 1:
        return float(samples.min()), float(samples.max())
    parts = [torch.from_numpy(part).flatten(1) for part in unpack(samples[:], inputs).values()]
    low, high = (
        torch.cat([side(part).expand(part.shape[1]) for part in parts])
        for side in (torch.min, torch.max)
    )
    return low, high


class _View(NamedTuple):
    """The outputs side by side: what each is divided by, and where the one with labels stands."""

    scales: dict[str, float]
    classes: slice | None

    @classmethod
    def of(cls, outputs: Sequence[TensorSpec], want: Outputs) -> _View:
        import numpy as np

        scales, classes, start = {}, None, 0
        for spec in outputs:
            values = want[spec.name]
            size = float(np.sqrt(np.square(values).mean())) if len(outputs) > 1 else 1.0
            scales[spec.name] = size if 0 < size < np.inf else 1.0
            stop = start + values.shape[1]
            if spec.has_classes and classes is None:
                classes = slice(start, stop)
            start = stop
        return cls(scales, classes)

    def join(self, found: Outputs) -> Array:
        """Return outputs as (samples, values)."""
        import numpy as np

        return np.concatenate([found[name] / size for name, size in self.scales.items()], axis=1)

    def joined(self, found: Values) -> Tensor:
        """Return a graph's outputs as (batch, values)."""
        parts = [found[name].reshape(len(found[name]), -1) / s for name, s in self.scales.items()]
        return torch.cat(parts, dim=1)

    def margins(self, values: Array) -> Array:
        """Return by how much each sample's largest class exceeds the next, (samples,)."""
        import numpy as np

        if self.classes is None:
            return np.full(len(values), np.inf)
        return _margins(values[:, self.classes])

    def labels(self, values: Array) -> Array:
        """Return each sample's largest class, (samples,); 0 where there are none."""
        import numpy as np

        if self.classes is None:
            return np.zeros(len(values), np.int64)
        found: Array = values[:, self.classes].argmax(axis=1)
        return found


@dataclass(frozen=True, slots=True)
class _Lanes:
    """Where each lane starts, what it climbs towards, and the box it stays in."""

    origins: Array
    labels: Tensor
    kinds: tuple[str, ...]
    signs: Tensor
    low: Tensor
    high: Tensor
    reach: float | Tensor

    @classmethod
    def choose(cls, samples: Array, want: Array, view: _View, search: Search, box: Box) -> _Lanes:
        """Begin at the samples that the network is least sure of, and at others by chance."""
        import numpy as np

        generator = np.random.default_rng(search.seed)
        unsure = np.argsort(view.margins(want), kind="stable")[: -(-search.lanes // 2)]
        others = generator.permutation(len(samples))[: search.lanes - len(unsure)]
        chosen = np.concatenate([unsure, others])
        origins = samples[chosen]
        low, high = box
        reach = search.radius * (high - low)
        start = torch.from_numpy(origins)
        pairs = generator.choice([-1.0, 1.0], (len(chosen), want.shape[1]))
        kinds = KINDS if view.classes is not None else KINDS[:2]
        rounds = np.arange(len(chosen)) // len(kinds)  # each kind again: two rounds make a pair
        signs = pairs[rounds // 2] * np.where(rounds % 2, -1.0, 1.0)[:, None]
        return cls(
            origins=origins,
            labels=torch.from_numpy(view.labels(want[chosen])),
            kinds=tuple(kinds[i % len(kinds)] for i in range(len(chosen))),
            signs=torch.from_numpy(signs).float(),
            low=(start - reach).clamp(min=low),
            high=(start + reach).clamp(max=high),
            reach=reach,
        )


@dataclass(frozen=True, slots=True)
class _Climb:
    """Signed gradient steps on every lane at once."""

    reference: Emulator
    surrogate: Emulator
    inputs: Sequence[TensorSpec]
    view: _View
    lanes: _Lanes
    search: Search

    def step(self, x: Tensor, number: int) -> Tensor:
        """Return the inputs one step further; steps shorten from a quarter of the reach to 1 %."""
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self._height(x).sum(), x)
        share = 0.25 * 0.04 ** ((number - 1) / max(1, self.search.steps - 1))
        moved = x.detach() + share * self.lanes.reach * slope.nan_to_num().sign()
        return torch.minimum(torch.maximum(moved, self.lanes.low), self.lanes.high)

    def _height(self, x: Tensor) -> Tensor:
        given = unpack(x, self.inputs)
        r = self.view.joined(self.reference.run(given, "leaky"))
        y = self.view.joined(self.surrogate.run(given, "leaky"))
        d, label, signs = y - r, self.lanes.labels[:, None], self.lanes.signs
        ends = {"gap": d.square().sum(dim=1), "drift": (signs * d).sum(dim=1)}
        if self.view.classes is not None:
            r, y, signs = (side[:, self.view.classes] for side in (r, y, signs))
            rival = r.detach().scatter(1, label, -torch.inf).argmax(dim=1, keepdim=True)
            ends["flip"] = (y.gather(1, rival) - y.gather(1, label)).flatten()
            ends["extreme"] = (signs * r).gather(1, rival).flatten()
        return torch.stack([ends[kind][i] for i, kind in enumerate(self.lanes.kinds)])


@dataclass(slots=True)
class _Witness:
    """Runs inputs through the network and the artefact themselves, and keeps the worst."""

    view: _View
    run_reference: Run
    run_artefact: Run
    tried: int = 0
    gap: float = 0.0
    flips: int = 0
    nonfinite: int = 0
    first_flip: Flip | None = None
    _widest: list[tuple[float, Array]] = field(default_factory=list)
    _flipped: list[Array] = field(default_factory=list)

    def see(self, inputs: Array, origins: Array, step: int) -> Array:
        """Confirm inputs, of which ``origins`` are the real samples, and return the network's."""
        want = self.view.join(self.run_reference(inputs))
        self.note(inputs, origins, want, self.view.join(self.run_artefact(inputs)), step)
        return want

    def note(self, inputs: Array, origins: Array, want: Array, got: Array, step: int) -> None:
        """Keep what is worst among inputs of which both outputs are known.

        A flip is one only where the network itself is decided: by more than float32 can lose.
        """
        import numpy as np

        self.tried += len(inputs)
        finite = np.isfinite(want).all(axis=1) & np.isfinite(got).all(axis=1)
        self.nonfinite += int((~finite).sum())
        gaps = np.where(finite, np.abs(got - want).max(axis=1), np.inf)
        self.gap = max(self.gap, float(gaps[finite].max(initial=0.0)))
        margins, before, after = self.view.margins(want), *map(self.view.labels, (want, got))
        sizes = np.abs(want[:, self.view.classes or slice(None)]).max(axis=1)
        decided = finite & (margins > _UNDECIDED * sizes)
        flipped = np.flatnonzero(decided & (before != after))
        self.flips += len(flipped)
        if len(flipped) and self.first_flip is None:
            i = int(flipped[0])
            self.first_flip = Flip(
                step=step,
                distance=float(np.abs(inputs[i] - origins[i]).max()),
                margin=float(margins[i]),
                reference=int(before[i]),
                artefact=int(after[i]),
            )
        self._flipped += [inputs[i].copy() for i in flipped[: _KEPT - len(self._flipped)]]
        self._widest += [(float(gaps[i]), inputs[i].copy()) for i in np.argsort(-gaps)[:_KEPT]]
        self._widest.sort(key=lambda pair: -pair[0])
        del self._widest[_KEPT:]

    def halve(self, inputs: Array, origins: Array, step: int) -> None:
        """Halve the way from each sample to where the network's label has changed."""
        import numpy as np

        before, behind = (
            self.view.labels(self.view.join(self.run_reference(side))) for side in (origins, inputs)
        )
        crossed = behind != before
        if not crossed.any():
            return
        near, far, label = origins[crossed], inputs[crossed], before[crossed]
        start = near
        for _ in range(_HALVINGS):
            middle = ((near + far) / 2).astype(inputs.dtype)
            same = self.view.labels(self.see(middle, start, step)) == label
            same = same.reshape(-1, *[1] * (middle.ndim - 1))
            near, far = np.where(same, middle, near), np.where(same, far, middle)

    def inputs(self) -> Array:
        """Return the inputs with the widest gaps, and then the first that flipped."""
        import numpy as np

        kept: Array = np.stack([*(pair[1] for pair in self._widest), *self._flipped])
        return kept


def _margins(outputs: Array) -> Array:
    """Return by how much each sample's largest output exceeds the next, (samples,)."""
    import numpy as np

    if outputs.shape[1] < 2:
        return np.full(len(outputs), np.inf)
    two = np.partition(outputs, -2, axis=1)[:, -2:]
    margins: Array = two[:, 1] - two[:, 0]
    return margins
