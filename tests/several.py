"""Factories of small networks with several outputs, and with maps for outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from conftest import disturb
from torch import Tensor, nn
from torch.nn import functional


class Heads(NamedTuple):
    label: Tensor
    box: Tensor


@dataclass
class Found:
    label: Tensor
    maps: tuple[Tensor, ...]


class Trunk(nn.Module):
    """Two convolutions with BatchNorm, at a half and at a quarter of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, 8, 3, 2, 1, bias=False)
        self.b1 = nn.BatchNorm2d(8)
        self.c2 = nn.Conv2d(8, 16, 3, 2, 1, bias=False)
        self.b2 = nn.BatchNorm2d(16)
        self.fc, self.box = nn.Linear(16, 10), nn.Linear(16, 4)

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = torch.relu(self.b1(self.c1(x)))
        return half, torch.relu(self.b2(self.c2(half)))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.of_map(self.maps(x)[1])

    def of_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = x.mean((2, 3))
        return self.fc(pooled), 1000 * self.box(pooled)


class InTuple(Trunk):
    def forward(self, x):
        return self.heads(x)


class InDict(Trunk):
    """Its keys are not in the alphabet's order, and are what PyTorch calls tensors inside."""

    def forward(self, x):
        label, box = self.heads(x)
        return {"relu": label, "c1": box}


class Named(Trunk):
    def forward(self, x):
        return Heads(*self.heads(x))


class Nested(Trunk):
    def forward(self, x):
        half, quarter = self.maps(x)
        label, box = self.of_map(quarter)
        return {"heads": [label, {"box": box}], "map": half}


class AsDataclass(Trunk):
    def forward(self, x):
        maps = self.maps(x)
        return Found(self.of_map(maps[1])[0], maps)


class Twice(Trunk):
    """Gives one tensor twice, and what it was given."""

    def forward(self, x):
        label = self.heads(x)[0]
        return label, label, x


class Pyramid(Trunk):
    """A feature pyramid: maps at a half and a quarter of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral, self.top = nn.Conv2d(8, 4, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        half, quarter = self.maps(x)
        top = self.top(quarter)
        return {"p1": self.lateral(half) + functional.interpolate(top, scale_factor=2.0), "p2": top}


class Segments(Trunk):
    """A U-Net of one step down: a map of three classes as large as the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(16, 8, 2, 2, bias=False)
        self.b3 = nn.BatchNorm2d(8)
        self.last = nn.ConvTranspose2d(16, 3, 2, 2)

    def forward(self, x):
        half, quarter = self.maps(x)
        return self.last(torch.cat([half, torch.relu(self.b3(self.up(quarter)))], dim=1))


class Pair(nn.Module):
    """A network of two inputs, of one size each: what both have in common decides."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.c = Trunk(), nn.Conv2d(2, 16, 3, bias=False)
        self.b, self.fc = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, picture, flow, scale: float = 1.0):
        return self.fc(scale * (self.trunk.maps(picture)[1].mean((2, 3)) + self.second(flow)))

    def second(self, flow):
        return torch.relu(self.b(self.c(flow))).mean((2, 3))


class Siamese(Trunk):
    """The same weights on two pictures, traced by torch.export alone."""

    def forward(self, left, right):
        if left.shape[2] < 2:
            return left
        one, other = (self.maps(x)[1].mean((2, 3)) for x in (left, right))
        return {"label": self.fc(one - other), "apart": (one - other).abs().mean(1, keepdim=True)}


class Whole(Trunk):
    def forward(self, x):
        return {"label": (found := self.heads(x)[0]), "class": found.argmax(1)}


class Odd(Trunk):
    """Gives under one key what it is asked for."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x):
        label = self.heads(x)[0]
        return {
            "nothing": {},
            "none": {"label": label, "aux": None},
            "input": {"input": label},
            "unnamed": {"": label},
            "alike": {"a": {"b": label}, "a.b": label},
            "few": {"label": label[:1]},
            "flat": {"label": label.flatten()},
        }[self.what]


def make(name: str, **args) -> nn.Module:
    """Return a network by its class, its BatchNorms with statistics that matter."""
    torch.manual_seed(0)
    return disturb(globals()[name](**args)).eval()


def made_pair() -> nn.Module:
    return make("Pair")


def made_siamese() -> nn.Module:
    return make("Siamese")


# ── Samples of several inputs ───────────────────────────────────────────────────────

MADE: dict = {}


def as_dict():
    return {name: MADE[name] for name in ("flow", "picture")}, MADE["labels"]


def as_items():
    names = ("flow", "picture")
    every = zip(MADE["flow"], MADE["picture"], MADE["labels"], strict=True)
    return [(dict(zip(names, one[:2], strict=True)), one[2]) for one in every]
