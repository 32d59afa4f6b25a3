"""How fast are the exact forms a BatchNorm behind a ReLU can take, end to end?

Each form is the document's ResNet-18 with the residual BatchNorms folded and the stem written
differently; all are timed in turn, in PyTorch and in ONNX Runtime, and shown as ratios to the
first. Run: ``make forms``.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import exporter
from exporter.environment import capture
from exporter.fold import ChannelScale, ChannelShift

BATCH = 1
RUNS = 100


class Clamp(nn.Module):
    """max(x, low) then min(x, high), per channel."""

    def __init__(self, low: torch.Tensor, high: torch.Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.maximum(x, self.low)
        return x if self.high is None else torch.minimum(x, self.high)


def forms() -> dict[str, list[nn.Module]]:
    """Return what stands between the stem's convolution and block2, by name."""
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(64, 1, 1, generator=generator)
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    sign = ChannelScale(torch.sign(c))
    return {
        "ReLU → BatchNorm → pool (not folded)": [nn.ReLU(), nn.BatchNorm2d(64).eval(), pool],
        "clamp → pool": [Clamp(c), pool],
        "pool → clamp": [pool, Clamp(c)],
        "pool → two-sided clamp (some γ < 0)": [pool, Clamp(c, c.abs() + 9)],
        "ReLU → shift → pool": [nn.ReLU(), ChannelShift(c), pool],
        "ReLU → pool → shift (chosen)": [nn.ReLU(), pool, ChannelShift(c)],
        "ReLU → ±1 → pool → shift (some γ < 0)": [nn.ReLU(), sign, pool, ChannelShift(c)],
        "ReLU → pool (no BatchNorm at all: the floor)": [nn.ReLU(), pool],
    }


def main() -> None:
    model = exporter.load_model("resnet18")
    network = model.module()
    assert isinstance(network, nn.Sequential)
    convolution = network[0][0]
    rest = exporter.fold_batchnorm(network[1:].eval()).module
    runtime = exporter.load_runtime("ort-cpu", {"threads": torch.get_num_threads()})
    sessions: dict[str, object] = {}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        for i, (name, stem) in enumerate(forms().items()):
            module = nn.Sequential(convolution, *stem, rest).eval()
            onnx_model = exporter.export_onnx(
                module,
                Path(folder, f"{i}.onnx"),
                input=model.input,
                output=model.output,
                batch=exporter.BatchRange(1, 1, 8),
            )
            sessions[f"ONNX Runtime | {name}"] = stack.enter_context(runtime.open(onnx_model.path))
            sessions[f"PyTorch | {name}"] = exporter.TorchSession.of(module, model.output.name)
        feed = {model.input.name: torch.randn(BATCH, *model.input.shape).numpy()}
        timing = exporter.Timing(batches=(BATCH,), warmup=10, runs=RUNS)
        found = exporter.measure_latency(sessions, {BATCH: feed}, timing)
    for where in ("ONNX Runtime", "PyTorch"):
        rows = [latency for latency in found if latency.name.startswith(where)]
        print(f"\n{where}, batch {BATCH}, {RUNS} runs in turn")
        for latency in rows:
            ratio = latency.p50_ms / rows[0].p50_ms
            print(f"{latency.p50_ms:8.2f} ms  {ratio:5.3f} ×  {latency.name.split(' | ')[1]}")
    print("\n" + ", ".join(f"{key} {value}" for key, value in capture().items()))


if __name__ == "__main__":
    main()
