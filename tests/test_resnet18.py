"""The document's network, pinned figure by figure and against one written down independently."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from exporter.plugins import load_model
from exporter.weights import load_weights


@pytest.fixture(scope="module")
def network() -> nn.Module:
    model = load_model("resnet18")
    module = model.module()
    load_weights(module, model.weights)
    return module


def test_it_has_the_documents_parameters_batchnorms_and_convolutions(network):
    assert sum(p.numel() for p in network.parameters()) == 11_178_378
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == 17
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == 20


@pytest.mark.parametrize(("size", "macs"), [(224, 839_269_952), (64, 90_668_288)])
def test_it_does_the_documents_multiply_accumulates(network, size, macs):
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 1, size, size))
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize(
    ("block", "shape"),
    [
        ("block1", (64, 38, 38)),
        ("block2", (64, 38, 38)),
        ("block3", (128, 19, 19)),
        ("block4", (256, 10, 10)),
        ("block5", (512, 5, 5)),
        ("block6", (10,)),
    ],
)
def test_its_stages_have_the_documents_shapes(network, block, shape):
    x = torch.zeros(1, 1, 224, 224)
    with torch.inference_mode():
        for name, stage in network.named_children():
            x = stage(x)
            if name == block:
                break
    assert tuple(x.shape[1:]) == shape


def test_it_computes_what_the_document_says(network):
    """The same arithmetic, written as functions of the state dict alone."""
    w = {key: value.double() for key, value in network.state_dict().items()}

    def conv(x, name, stride=1, padding=0):
        return functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding)

    def norm(x, name):
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        unit = (x - mean.view(-1, 1, 1)) / torch.sqrt(var + 1e-5).view(-1, 1, 1)
        return unit * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)

    x = torch.randn(2, 1, 224, 224, dtype=torch.float64)
    y = functional.max_pool2d(norm(conv(x, "block1.0", 3, 3).clamp(min=0), "block1.2"), 3, 2, 1)
    for stage in range(2, 6):
        for block in range(2):
            name = f"block{stage}.{block}"
            stride = 2 if stage > 2 and block == 0 else 1
            z = norm(conv(y, f"{name}.conv1", stride, 1), f"{name}.bn1").clamp(min=0)
            z = norm(conv(z, f"{name}.conv2", 1, 1), f"{name}.bn2")
            y = (z + (conv(y, f"{name}.conv3", stride) if stride == 2 else y)).clamp(min=0)
    want = y.mean(dim=(2, 3)) @ w["block6.2.weight"].T + w["block6.2.bias"]
    with torch.inference_mode():
        got = network.double()(x)
        network.float()
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-10)


def test_the_shipped_weights_know_the_held_out_digits(network):
    from exporter.samples import digits

    inputs, labels, _ = digits((1, 224, 224), "held-out")
    with torch.inference_mode():
        logits = torch.cat([network(x) for x in torch.from_numpy(inputs).split(40)])
    assert (logits.argmax(1).numpy() == labels).mean() >= 0.99
