"""PyTorch on an NVIDIA GPU, one operator after another."""

from __future__ import annotations

from exporter.runtimes._torch_cuda import PyTorchCuda


class TorchEagerCuda(PyTorchCuda, frozen=True):
    """PyTorch eager on CUDA; ``channels_last`` in memory. Timed as it is, and as a CUDA graph."""


PLUGIN = TorchEagerCuda
