"""The networks without weights: published figures, and what can be done with them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import refused
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from exporter.contracts import Model
from exporter.errors import InputRefused, ProfileError
from exporter.flops import count_module
from exporter.job import Job
from exporter.models._inception import BLOCKS
from exporter.models.googlenet import GoogLeNet
from exporter.models.vgg16 import Vgg16
from exporter.models.vgg19 import Vgg19
from exporter.plugins import load_model
from exporter.profile import load_profile
from exporter.samples import digits, load_split
from exporter.weights import load_weights

# Parameters as published with torchvision's weights (there with GFLOPs of 15.47, 19.63 and 1.50,
# which are multiply-accumulates); for one channel and ten classes, less what those take away.
PUBLISHED = {
    "vgg16": (138_357_544, 15.47, 138_357_544 - 2 * 64 * 9 - 990 * 4097),
    "vgg19": (143_667_240, 19.63, 143_667_240 - 2 * 64 * 9 - 990 * 4097),
    "googlenet": (6_624_904, 1.50, 6_624_904 - 2 * 64 * 49 - 990 * 1025),
}


def on_meta(model: Model) -> nn.Module:
    with torch.device("meta"):
        return model.module()


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_published_parameters_and_arithmetic(name):
    parameters, gmacs, _ = PUBLISHED[name]
    model = load_model(name)
    assert (model.input.shape, model.output.shape) == ((3, 224, 224), (1000,))
    cost = count_module(on_meta(model), model.input.shape)
    assert cost.parameters == parameters
    assert round(cost.macs / 1e9, 2) == gmacs
    assert cost.uncounted == {}


@pytest.mark.parametrize("name", PUBLISHED)
def test_torchs_own_counter_finds_as_many(name):
    module = on_meta(load_model(name))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.empty(1, 3, 224, 224, device="meta"))
    assert count_module(module, (3, 224, 224)).flops == counter.get_total_flops()


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_can_be_made_for_grey_pictures_of_ten_classes(name):
    model = load_model(name, input_shape=(1, 224, 224), classes=10)
    assert (model.input.shape, model.output.shape) == ((1, 224, 224), (10,))
    assert model.data == "digits"
    module = on_meta(model)
    assert sum(p.numel() for p in module.parameters()) == PUBLISHED[name][2]
    with torch.no_grad():
        assert module(torch.empty(2, 1, 224, 224, device="meta")).shape == (2, 10)


def test_the_peak_of_a_vgg_is_its_first_two_maps():
    """64 maps of 224×224 floats, read and written by the first ReLU."""
    for model in (Vgg16(), Vgg19()):
        cost = count_module(on_meta(model), model.input.shape)
        assert cost.peak_bytes == 2 * 64 * 224 * 224 * 4
        assert cost.peak_layer == "features.1/relu"


def test_an_average_in_place_of_the_linear_layers_takes_any_size():
    module = on_meta(Vgg16(channels=1, classes=10, head="average"))
    convolutions = 14_714_688 - 2 * 64 * 9
    assert sum(p.numel() for p in module.parameters()) == convolutions + 512 * 10 + 10
    with torch.no_grad():
        for size in ((32, 32), (96, 160), (224, 224)):
            assert module(torch.empty(2, 1, *size, device="meta")).shape == (2, 10)


@pytest.mark.parametrize(
    ("module", "keys"),
    [
        (Vgg16(), {"features.0.weight": (64, 3, 3, 3), "classifier.6.bias": (1000,)}),
        (Vgg19(), {"features.34.weight": (512, 512, 3, 3), "classifier.0.weight": (4096, 25088)}),
        (
            GoogLeNet(),
            {
                "conv1.conv.weight": (64, 3, 7, 7),
                "conv1.bn.running_var": (64,),
                "inception4d.branch2.1.conv.weight": (288, 144, 3, 3),
                "inception5b.branch4.1.bn.bias": (128,),
                "fc.weight": (1000, 1024),
            },
        ),
    ],
)
def test_its_weights_are_named_as_in_torchvision(module, keys):
    state = on_meta(module).state_dict()
    assert {key: tuple(state[key].shape) for key in keys} == keys


def test_the_blocks_of_googlenet_fit_into_each_other():
    blocks = list(BLOCKS.values())
    for block, following in itertools.pairwise(blocks):
        assert block.one + block.three + block.five + block.pooled == following.in_channels


def test_googlenet_computes_what_its_paper_and_torchvision_say():
    """The same arithmetic, written as functions of the state dict alone, in float64."""
    torch.manual_seed(0)
    network = load_model("googlenet", input_shape=(1, 224, 224), classes=10).module()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 1.5)
    w = {key: value.double() for key, value in network.state_dict().items()}

    def conv(x, name, stride=1, padding=0):
        y = functional.conv2d(x, w[f"{name}.conv.weight"], None, stride, padding)
        deviation = torch.sqrt(w[f"{name}.bn.running_var"] + 1e-3).view(-1, 1, 1)
        unit = (y - w[f"{name}.bn.running_mean"].view(-1, 1, 1)) / deviation
        scale, shift = (w[f"{name}.bn.{key}"].view(-1, 1, 1) for key in ("weight", "bias"))
        return (unit * scale + shift).clamp(min=0)

    def pool(x, size, stride, padding=0):
        return functional.max_pool2d(x, size, stride, padding, ceil_mode=True)

    x = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    y = pool(conv(x, "conv1", 2, 3), 3, 2)
    y = pool(conv(conv(y, "conv2"), "conv3", 1, 1), 3, 2)
    for name in BLOCKS:
        if name in ("inception4a", "inception5a"):
            y = pool(y, *((3, 2) if name == "inception4a" else (2, 2)))
        parts = [
            conv(y, f"{name}.branch1"),
            conv(conv(y, f"{name}.branch2.0"), f"{name}.branch2.1", 1, 1),
            conv(conv(y, f"{name}.branch3.0"), f"{name}.branch3.1", 1, 1),
            conv(pool(y, 3, 1, 1), f"{name}.branch4.1"),
        ]
        y = torch.cat(parts, 1)
    want = y.mean(dim=(2, 3)) @ w["fc.weight"].T + w["fc.bias"]
    with torch.inference_mode():
        got = network.double()(x)
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-10)


# ── Without weights ─────────────────────────────────────────────────────────────────


def resolve(model, tmp_path, *, weights=None, input_shape=None) -> Job:
    profile = load_profile("default").only(("fp32",))
    return Job.resolve(
        model,
        profile,
        weights=weights,
        input_shape=input_shape,
        calibration=None,
        progress=lambda *_: None,
        builds=False,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_not_exported_without_weights(name, tmp_path):
    with refused(InputRefused, name, "without weights", hint=("--weights",)):
        resolve(name, tmp_path)


@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_exported_with_weights_at_as_many_channels_as_are_asked_for(channels, tmp_path):
    model = GoogLeNet(channels=channels)
    save_file(model.module().state_dict(), path := tmp_path / "googlenet.safetensors")
    job = resolve("googlenet", tmp_path, weights=path, input_shape=(channels, 64, 64))
    assert job.held_out.inputs.shape == (360, channels, 64, 64)
    assert job.module.get_parameter("conv1.conv.weight").shape == (64, channels, 7, 7)


def test_weights_of_another_network_are_refused(tmp_path):
    save_file(GoogLeNet().module().state_dict(), path := tmp_path / "w.safetensors")
    with refused(InputRefused, "not this network's weights"):
        load_weights(Vgg16(classes=10, head="average").module(), path)


def test_colour_digits_are_the_grey_ones_three_times():
    grey, colour = digits((1, 16, 16), "train"), load_split("rgb-digits", (3, 16, 16), "train")
    assert colour.inputs.shape == (1437, 3, 16, 16)
    assert np.array_equal(colour.labels, grey.labels)
    for channel in range(3):
        assert np.array_equal(colour.inputs[:, channel], grey.inputs[:, 0])
    with refused(InputRefused, "3 channels", "asks for 1"):
        load_split("rgb-digits", (1, 16, 16), "train")


@pytest.mark.parametrize("options", [{"channels": 4}, {"classes": 0}])
def test_ends_that_it_cannot_have_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Vgg16(**options)


def test_an_input_of_four_channels_is_refused_by_name():
    with refused(ProfileError, "vgg16", "channels must be 1 or 3, found 4"):
        load_model("vgg16", input_shape=(4, 224, 224))


def test_a_network_of_ten_classes_is_refused_another_number_and_given_its_own():
    assert load_model("resnet18", classes=10).output.shape == (10,)
    with refused(InputRefused, "resnet18 has 10 outputs", "cannot have 1000"):
        load_model("resnet18", classes=1000)
