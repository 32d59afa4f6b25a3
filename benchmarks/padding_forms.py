"""How fast are the exact forms of a BatchNorm in front of a zero-padded convolution, end to end?

Each form is one block, dense (many channels in, few out) or residual (as many out as in), written
differently; what joins its layers keeps a runtime from fusing the BatchNorm into the convolution in
front of it. All are timed in turn, on one thread, in
PyTorch and in ONNX Runtime; what is shown is each run over the unfolded run of its turn: the
median, and the quartiles.
Run: ``python benchmarks/padding_forms.py``.
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
from exporter.records import TensorSpec

CHANNELS, GROWTH, LAYERS, SIZE, RUNS = 64, 32, 6, 28, 100
SHAPE = (CHANNELS, SIZE, SIZE)


class Border(nn.Module):
    """Add what the shift makes behind the convolution: it differs at the borders."""

    def __init__(self, shift: torch.Tensor, convolution: nn.Conv2d) -> None:
        super().__init__()
        constant = shift.view(1, -1, 1, 1).expand(1, -1, SIZE, SIZE)
        with torch.inference_mode():
            added = nn.functional.conv2d(constant, convolution.weight, padding=1)
        self.register_buffer("added", added.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.added


class Block(nn.Module):
    def __init__(self, form: str, activation: type[nn.Module], growth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.growth = growth
        self.layers = nn.ModuleList(
            self._layer(form, activation, CHANNELS + i * growth, growth or CHANNELS)
            for i in range(LAYERS)
        )

    @staticmethod
    def _layer(form: str, activation: type[nn.Module], channels: int, outputs: int) -> nn.Module:
        convolution = nn.Conv2d(channels, outputs, 3, padding=1)
        shift = torch.randn(channels, 1, 1)
        in_front = {
            "BatchNorm": [nn.BatchNorm2d(channels)],
            "shift": [ChannelShift(shift)],
            "±1 → shift": [ChannelScale(torch.sign(shift)), ChannelShift(shift)],
        }
        behind = [Border(shift, convolution)] if form == "border" else []
        return nn.Sequential(*in_front.get(form, []), activation(), convolution, *behind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1) if self.growth else x + layer(x)
        return x.mean(dim=(2, 3))


FORMS = {
    "BatchNorm → conv (not folded)": ("BatchNorm", nn.Identity),
    "shift → conv (chosen)": ("shift", nn.Identity),
    "±1 or 0 → shift → conv (some γ = 0)": ("±1 → shift", nn.Identity),
    "conv → border map (one size of picture only)": ("border", nn.Identity),
    "conv (no BatchNorm at all: the floor)": ("", nn.Identity),
    "BatchNorm → ReLU → conv (not folded)": ("BatchNorm", nn.ReLU),
    "shift → ReLU → conv (chosen)": ("shift", nn.ReLU),
    "±1 → shift → ReLU → conv (chosen where some γ < 0)": ("±1 → shift", nn.ReLU),
    "ReLU → conv (no BatchNorm at all: the floor)": ("", nn.ReLU),
}


def main() -> None:
    torch.set_num_threads(1)
    for block, growth in (("dense", GROWTH), ("residual", 0)):
        compare(block, growth)
    print("\n" + ", ".join(f"{key} {value}" for key, value in capture().items()))


def compare(block: str, growth: int) -> None:
    given, found = TensorSpec("input", SHAPE), TensorSpec("output", (CHANNELS + LAYERS * growth,))
    runtime = exporter.load_runtime("ort-cpu", {"threads": 1})
    sessions: dict[str, object] = {}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        for i, (name, (form, activation)) in enumerate(FORMS.items()):
            module = Block(form, activation, growth).eval()
            onnx_model = exporter.export_onnx(
                module,
                Path(folder, f"{i}.onnx"),
                input=given,
                output=found,
                batch=exporter.BatchRange(1, 1, 8),
            )
            sessions[f"ONNX Runtime | {name}"] = stack.enter_context(runtime.open(onnx_model.path))
            sessions[f"PyTorch | {name}"] = exporter.TorchSession.of(module, found.name)
        feed = {given.name: torch.randn(1, *SHAPE).numpy()}
        timing = exporter.Timing(batches=(1,), warmup=10, runs=RUNS, settle_ms=0, pytorch_threads=1)
        latencies = exporter.measure_latency(sessions, {1: feed}, timing)
    for where in ("ONNX Runtime", "PyTorch"):
        print(f"\n{block} block, {where}, batch 1, {RUNS} runs in turn: median ratio (quartiles)")
        first: tuple[float, ...] = ()
        for latency in (found for found in latencies if found.name.startswith(where)):
            name = latency.name.split(" | ")[1]
            first = latency.samples_ms if "not folded" in name else first
            pairs = zip(latency.samples_ms, first, strict=True)
            ratios = sorted(one / other for one, other in pairs)
            low, middle, high = (ratios[len(ratios) * k // 4] for k in (1, 2, 3))
            print(f"{latency.p50_ms:8.2f} ms  {middle:5.3f} × ({low:.3f} to {high:.3f})  {name}")


if __name__ == "__main__":
    main()
