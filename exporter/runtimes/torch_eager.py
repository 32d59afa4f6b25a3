"""PyTorch, one operator after another."""

from __future__ import annotations

from exporter.runtimes._torch import PyTorch


class TorchEager(PyTorch, frozen=True):
    """PyTorch eager: ``threads``, 0 for as many as PyTorch has; ``channels_last`` in memory."""


PLUGIN = TorchEager
