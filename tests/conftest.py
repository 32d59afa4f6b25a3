"""What tests share: small networks whose batch norms do something, and what an error must be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from exporter.contracts import Plugin
from exporter.errors import ExportError
from exporter.fold import fold_batchnorm
from exporter.models._residual import residual_network
from exporter.profile import Profile, load_profile
from exporter.records import BatchRange, OnnxModel, TensorSpec
from exporter.samples import digits
from exporter.to_onnx import export_onnx


def disturb(module: nn.Module, seed: int = 0, *, negative: bool = True) -> nn.Module:
    """Give every BatchNorm statistics that matter, with γ of both signs and one γ = 0."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            size = layer.running_mean.shape
            gamma = torch.rand(size, generator=generator) + 0.5
            if negative:
                gamma[1::2] *= -1
                gamma[0] = 0
            if layer.affine:
                layer.weight.data = gamma
                layer.bias.data = torch.randn(size, generator=generator)
            layer.running_mean = torch.randn(size, generator=generator)
            layer.running_var = torch.rand(size, generator=generator) + 0.1
    return module


class TinyModel(Plugin, frozen=True):
    """A residual network of two stages at 32×32, on the digits."""

    input: ClassVar[TensorSpec] = TensorSpec("input", (1, 32, 32))
    output: ClassVar[TensorSpec] = TensorSpec("logits", (10,))
    data: ClassVar[str] = "digits"
    weights: ClassVar[Path]

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return residual_network(in_channels=1, widths=(8, 16), depth=1, classes=10)


@pytest.fixture(scope="session")
def tiny_module() -> nn.Module:
    """Return the network of `TinyModel`, disturbed, that gives two classes, far from each other."""
    module = disturb(TinyModel().module())
    held_out = torch.from_numpy(digits(TinyModel.input.shape, "held-out").inputs)
    with torch.no_grad():
        outputs = module(held_out)
        first, second = outputs.mean(dim=0).topk(2).indices
        lead = (outputs[:, first] - outputs[:, second]).sort().values
        widest = lead.diff().argmax()
        module.get_submodule("block4.2").bias[second] += lead[widest : widest + 2].mean()
    return module


@pytest.fixture(scope="session")
def tiny_model(tiny_module, tmp_path_factory):
    from safetensors.torch import save_file

    TinyModel.weights = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(tiny_module.state_dict(), TinyModel.weights)
    return TinyModel()


@pytest.fixture(scope="session")
def tiny_onnx(tiny_module, tmp_path_factory) -> OnnxModel:
    return export_onnx(
        fold_batchnorm(tiny_module).module,
        Path(tmp_path_factory.mktemp("onnx"), "tiny.fp32.onnx"),
        input=TinyModel.input,
        output=TinyModel.output,
        batch=BatchRange(1, 2, 8),
    )


@pytest.fixture
def quick_profile() -> Profile:
    """The default profile, quick and without gates that a network of random weights cannot meet."""
    return load_profile(
        "default",
        {
            "batch.max": 8,
            "timing.runs": 3,
            "timing.warmup": 1,
            "calibration.images": 16,
            "precision.int8.tolerance": {"sqnr_db": 10.0},
        },
    )


HASTE = {  # of a profile: little of everything that a test does not look at
    "batch.max": 8,
    "timing.runs": 2,
    "timing.warmup": 0,
    "timing.settle_ms": 0.0,
    "timing.pytorch_threads": 1,
    "runtime.ort-cpu.threads": 1,
    "parity.random": 8,
    "calibration.images": 16,
}
HASTY = [word for key, value in HASTE.items() for word in ("--set", f"{key}={value}")]

DOCUMENTED = {
    "ProfileError": 2,
    "UnknownName": 2,
    "InputRefused": 3,
    "GraphError": 3,
    "RuntimeMissing": 4,
    "BuildError": 4,
    "OutOfMemory": 5,
    "OutputError": 5,
    "ParityError": 1,
}


@contextmanager
def refused(
    kind: type[ExportError], *words: str, hint: tuple[str, ...] | None = ()
) -> Iterator[None]:
    """Expect exactly this error, one sentence that has the words; ``hint=None``: and no hint."""
    with pytest.raises(ExportError) as caught:
        yield
    error = caught.value
    said = str(error)
    assert type(error) is kind, said
    assert error.exit_code == DOCUMENTED[kind.__name__]
    assert said
    assert said == said.strip()
    assert "\n" not in said
    assert not said.endswith(".")
    missing = [word for word in words if word not in said]
    assert not missing, f"{said!r} does not say {missing}"
    if hint is None:
        assert error.hint is None
    else:
        unsaid = [word for word in hint if word not in (error.hint or "")]
        assert not unsaid, f"the hint {error.hint!r} does not say {unsaid}"


def pytest_collection_modifyitems(items):
    """Let files of many tests come first, and what loads OpenVINO last.

    So workers are busy to the end; and an interrupt in a process that has used OpenVINO ends it.
    pytest-xdist keeps that order with --no-loadscope-reorder.
    """
    counts = Counter(item.path for item in items)
    late = ("test_doctor.py", "test_openvino.py")
    items.sort(key=lambda item: (item.path.name in late, -counts[item.path], item.path))
