"""Factories of small networks that take pictures of several sizes, or do not."""

from __future__ import annotations

import torch
from conftest import disturb
from torch import nn
from torch.nn import functional


class Sized(nn.Module):
    """Two convolutions with BatchNorm, of pictures of any size."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(channels, 8, 3, 2, 1, bias=False)
        self.b1 = nn.BatchNorm2d(8)
        self.c2 = nn.Conv2d(8, 16, 3, 2, 1, bias=False)
        self.b2 = nn.BatchNorm2d(16)

    def half(self, x):
        return torch.relu(self.b1(self.c1(x)))

    def quarter(self, x):
        return torch.relu(self.b2(self.c2(self.half(x))))


class Maps(Sized):
    """A label, a map as large as the picture, and one of a quarter of its sides."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__(channels)
        self.last, self.fc = nn.Conv2d(16, 3, 1), nn.Linear(16, 10)

    def forward(self, x):
        y = self.quarter(x)
        small = self.last(y)
        large = functional.interpolate(small, size=x.shape[2:], mode="bilinear")
        return {"label": self.fc(y.mean((2, 3))), "map": large, "small": small}


class Skips(Sized):
    """A U-Net of one step down, which takes even sides alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(16, 2, 2, 2)

    def forward(self, x):
        half = self.half(x)
        deep = torch.relu(self.b2(self.c2(half)))
        return self.last(torch.cat([half, self.up(deep)], dim=1))


class Asserting(Skips):
    """The same, which says so."""

    def forward(self, x):
        if x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError("sides must be multiples of 4")
        return super().forward(x)


class Flat(Sized):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16 * 8 * 8, 10)

    def forward(self, x):
        return self.fc(self.quarter(x).flatten(1))


class Windows(Sized):
    """Pools into 4 × 4 windows, as a layer or as a function."""

    def __init__(self, called: bool = False) -> None:
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(4), nn.Linear(16 * 16, 10)
        self.called = called

    def forward(self, x):
        y = self.quarter(x)
        pooled = functional.adaptive_avg_pool2d(y, (4, 4)) if self.called else self.pool(y)
        return self.fc(pooled.flatten(1))


class Labels(Sized):
    """A label of a picture of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.quarter(x).mean((2, 3)))


class Deciding(Sized):
    """Takes another way for pictures of more than 20 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        y = self.quarter(x)
        return self.fc(y.mean((2, 3)) if x.shape[2] > 20 else y.amax((2, 3)))


class Adding(Sized):
    """Sums over the picture, so that its values grow with that."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.quarter(x).sum((2, 3)) / 64)


class Both(nn.Module):
    """Two pictures of one size, and a map of what they have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Sized(3), Sized(2)
        self.fc = nn.Linear(16, 5)

    def forward(self, picture, flow):
        y = self.left.quarter(picture) * self.right.quarter(flow)
        return {"label": self.fc(y.mean((2, 3))), "map": y}


def make(name: str, **args) -> nn.Module:
    """Return a network by its class, its BatchNorms with statistics that matter."""
    torch.manual_seed(0)
    return disturb(globals()[name](**args)).eval()
