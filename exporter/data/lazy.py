"""Samples that are made when they are asked for, a few at a time, as an array would give them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, cast

from exporter.records import Array

if TYPE_CHECKING:
    import numpy as np

Fetch = Callable[[Array], Array]

IN_MEMORY = 256 << 20  # bytes up to which samples are made once and kept
CHUNK = 64  # samples made at a time


class Lazy:
    """``count`` samples, each of ``shape``; ``fetch`` makes those of the given numbers.

    It has of an array what takes samples out of one, and never holds more than are asked for.
    """

    def __init__(
        self, fetch: Fetch, count: int, shape: tuple[int, ...], dtype: str = "float32"
    ) -> None:
        import numpy as np

        self._fetch = fetch
        self._count = count
        self.shape = (count, *shape)
        self.ndim = len(self.shape)
        self.dtype = np.dtype(dtype)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key: Any) -> Array:
        import numpy as np

        chosen = np.arange(self._count)[key]
        found = self._fetch(np.atleast_1d(chosen))
        return found if chosen.ndim else cast("Array", found[0])

    def __iter__(self) -> Iterator[Array]:
        for start in range(0, self._count, CHUNK):
            yield from self[start : start + CHUNK]

    def take(
        self, indices: Array, axis: Literal[0] = 0, mode: Literal["raise", "wrap"] = "raise"
    ) -> Array:
        """Return samples by number, as `numpy.take` does along the first axis."""
        import numpy as np

        return self._fetch(np.arange(self._count).take(indices, mode=mode))

    def min(self) -> np.number[Any]:
        return cast("np.number[Any]", min(sample.min() for sample in self))

    def max(self) -> np.number[Any]:
        return cast("np.number[Any]", max(sample.max() for sample in self))

    def part(self, numbers: Array) -> Array:
        """Return some of the samples: an array if that is small, else what stands for one."""
        import numpy as np

        lazy = Lazy(
            lambda chosen: self._fetch(numbers[chosen]),
            len(numbers),
            self.shape[1:],
            self.dtype.name,
        )
        if int(np.prod(lazy.shape, dtype=np.int64)) * self.dtype.itemsize > IN_MEMORY:
            return cast("Array", lazy)  # whoever takes samples cannot tell
        kept = np.empty(lazy.shape, self.dtype)
        for start in range(0, len(numbers), CHUNK):
            kept[start : start + CHUNK] = lazy[start : start + CHUNK]
        return kept
