"""The networks without weights: published figures, and what can be done with them."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch
from conftest import disturb, refused
from folding import EXACT, batchnorms
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from exporter.contracts import Model
from exporter.errors import InputRefused, ProfileError
from exporter.flops import count_module
from exporter.fold import fold_batchnorm
from exporter.job import Job
from exporter.models._inception import BLOCKS
from exporter.models.googlenet import GoogLeNet
from exporter.models.resnet import ResNet
from exporter.models.vgg import Vgg
from exporter.plugins import load_model, names
from exporter.profile import load_profile
from exporter.samples import digits, load_split
from exporter.weights import load_weights

# As torchvision publishes them with its weights: parameters, and what it calls GFLOPs, which are
# multiply-accumulates; and a digest of the names and shapes in torchvision 0.29's state dict.
PUBLISHED = {
    "densenet121": (7_978_856, 2.834, "7276922e3dc9be16"),
    "googlenet": (6_624_904, 1.498, "7ff7b678b9eb9a0a"),
    "mobilenet-v2": (3_504_872, 0.301, "a22969510520f2a3"),
    "resnet101": (44_549_160, 7.801, "13188e030a74089b"),
    "resnet152": (60_192_808, 11.514, "0dcb7c814afa5598"),
    "resnet18-imagenet": (11_689_512, 1.814, "46bd7814ec81a02c"),
    "resnet34": (21_797_672, 3.664, "31dac9343b6dc33c"),
    "resnet50": (25_557_032, 4.089, "eeb21a877a7592d7"),
    "resnext101-32x8d": (88_791_336, 16.414, "c8a00da5b30d14cb"),
    "resnext50-32x4d": (25_028_904, 4.23, "526e2c866246ec66"),
    "vgg11": (132_863_336, 7.609, "a3f84532904f6834"),
    "vgg11-bn": (132_868_840, 7.609, "56151fa574e72d7d"),
    "vgg13": (133_047_848, 11.308, "947aa70e5accdcf0"),
    "vgg13-bn": (133_053_736, 11.308, "f04e05f6d2a9bdc6"),
    "vgg16": (138_357_544, 15.47, "d246562dac8f4a2f"),
    "vgg16-bn": (138_365_992, 15.47, "95a80e0e7e870c24"),
    "vgg19": (143_667_240, 19.632, "fc0886ed4e002209"),
    "vgg19-bn": (143_678_248, 19.632, "76208eb404ecf84a"),
    "wide-resnet101-2": (126_886_696, 22.753, "7e118ad323f42380"),
    "wide-resnet50-2": (68_883_240, 11.398, "4cbebbaf8c97030d"),
}
# The convolution that reads the picture, and the layer that gives the classes: weights of each
# for a channel less, and parameters for a class less.
ENDS = {
    "densenet121": (64 * 49, 1024 + 1),
    "googlenet": (64 * 49, 1024 + 1),
    "mobilenet-v2": (32 * 9, 1280 + 1),
    "resnet18-imagenet": (64 * 49, 512 + 1),
    "resnet50": (64 * 49, 2048 + 1),
    "vgg16": (64 * 9, 4096 + 1),
}


def on_meta(model: Model) -> nn.Module:
    with torch.device("meta"):
        return model.module()


def test_every_network_without_weights_is_held_against_what_is_published():
    assert {*PUBLISHED, "resnet18"} == {*names("models")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_published_parameters_arithmetic_and_names(name):
    parameters, gmacs, digest = PUBLISHED[name]
    model = load_model(name)
    assert (model.input.shape, model.output.shape) == ((3, 224, 224), (1000,))
    module = on_meta(model)
    cost = count_module(module, model.input.shape)
    assert cost.parameters == parameters
    assert round(cost.macs / 1e9, 3) == gmacs
    assert cost.uncounted == {}
    state = sorted(module.state_dict().items())
    listed = "".join(f"{key} {tuple(tensor.shape)}\n" for key, tensor in state)
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", ENDS)
def test_torchs_own_counter_finds_as_many(name):
    module = on_meta(load_model(name))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.empty(1, 3, 224, 224, device="meta"))
    assert count_module(module, (3, 224, 224)).flops == counter.get_total_flops()


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize(
    ("shape", "classes"), [((1, 224, 224), 10), ((5, 96, 64), 3), ((3, 331, 299), 2)]
)
def test_it_can_be_made_for_any_channels_classes_and_size(name, shape, classes):
    model = load_model(name, input_shape=shape, classes=classes)
    assert (model.input.shape, model.output.shape) == ((shape[0], 224, 224), (classes,))
    module = on_meta(model)
    per_channel, per_class = ENDS[name]
    fewer = (3 - shape[0]) * per_channel + (1000 - classes) * per_class
    assert sum(p.numel() for p in module.parameters()) == PUBLISHED[name][0] - fewer
    with torch.no_grad():
        assert module(torch.empty(2, *shape, device="meta")).shape == (2, classes)


def test_the_peak_of_a_vgg_is_its_first_two_maps():
    """64 maps of 224×224 floats, read and written by the first ReLU."""
    for name in ("vgg16", "vgg19"):
        cost = count_module(on_meta(load_model(name)), (3, 224, 224))
        assert cost.peak_bytes == 2 * 64 * 224 * 224 * 4
        assert cost.peak_layer == "features.1/relu"


def test_an_average_in_place_of_the_linear_layers_takes_any_size():
    module = on_meta(Vgg(channels=1, classes=10, head="average"))
    convolutions = 14_714_688 - 2 * 64 * 9
    assert sum(p.numel() for p in module.parameters()) == convolutions + 512 * 10 + 10
    with torch.no_grad():
        for size in ((32, 32), (96, 160), (224, 224)):
            assert module(torch.empty(2, 1, *size, device="meta")).shape == (2, 10)


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


def by_hand(name: str, **args):
    """Return a network in float64, and convolution and BatchNorm as functions of its state dict."""
    torch.manual_seed(0)
    network = disturb(load_model(name, classes=7, args=args).module()).double()
    w = network.state_dict()

    def conv(x, name, stride=1, padding=0, groups=1):
        bias = w.get(f"{name}.bias")
        return functional.conv2d(x, w[f"{name}.weight"], bias, stride, padding, 1, groups)

    def norm(y, name):
        deviation = torch.sqrt(w[f"{name}.running_var"] + 1e-5).view(-1, 1, 1)
        unit = (y - w[f"{name}.running_mean"].view(-1, 1, 1)) / deviation
        return unit * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)

    return network, w, conv, norm


PICTURE = torch.randn(2, 3, 48, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def computes(network, y, w, head) -> bool:
    """Return whether a network gives the linear layer of the average of what is behind it."""
    want = y.mean(dim=(2, 3)) @ w[f"{head}.weight"].T + w[f"{head}.bias"]
    with torch.inference_mode():
        return torch.allclose(network(PICTURE), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["resnext50-32x4d", "resnet18-imagenet"])
def test_a_residual_network_computes_what_its_paper_and_torchvision_say(name):
    network, w, conv, norm = by_hand(name, stages=(2, 1, 1, 1))

    def block(x, name, stride):
        if f"{name}.conv3.weight" in w:
            y = norm(conv(x, f"{name}.conv1"), f"{name}.bn1").clamp(min=0)
            y = norm(conv(y, f"{name}.conv2", stride, 1, groups=32), f"{name}.bn2").clamp(min=0)
            y = norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
        else:
            y = norm(conv(x, f"{name}.conv1", stride, 1), f"{name}.bn1").clamp(min=0)
            y = norm(conv(y, f"{name}.conv2", 1, 1), f"{name}.bn2")
        if f"{name}.downsample.0.weight" in w:
            x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        return (y + x).clamp(min=0)

    y = norm(conv(PICTURE, "conv1", 2, 3), "bn1").clamp(min=0)
    y = functional.max_pool2d(y, 3, 2, 1)
    for name, stride in (("1.0", 1), ("1.1", 1), ("2.0", 2), ("3.0", 2), ("4.0", 2)):
        y = block(y, f"layer{name}", stride)
    assert computes(network, y, w, "fc")


def test_mobilenet_computes_what_its_paper_and_torchvision_say():
    network, w, conv, norm = by_hand("mobilenet-v2")

    def layer(x, name, stride=1, padding=0):
        groups = x.shape[1] if w[f"{name}.0.weight"].shape[1] == 1 else 1
        return norm(conv(x, f"{name}.0", stride, padding, groups), f"{name}.1").clamp(0, 6)

    y = layer(PICTURE, "features.0", 2, 1)
    for index in range(1, 18):
        name, x = f"features.{index}.conv", y
        wide = f"{name}.3.weight" in w  # the first is as narrow within as without
        if wide:
            y = layer(y, f"{name}.0")
        stride = 2 if index in (2, 4, 7, 14) else 1
        y = layer(y, f"{name}.{int(wide)}", stride, 1)
        y = norm(conv(y, f"{name}.{1 + wide}"), f"{name}.{2 + wide}")
        if y.shape == x.shape:
            y = y + x
    assert computes(network, layer(y, "features.18"), w, "classifier.1")


def test_densenet_computes_what_its_paper_and_torchvision_say():
    stages = (2, 3, 2, 2)
    network, w, conv, norm = by_hand("densenet121", stages=stages)
    y = norm(conv(PICTURE, "features.conv0", 2, 3), "features.norm0").clamp(min=0)
    y = functional.max_pool2d(y, 3, 2, 1)
    for stage, depth in enumerate(stages, 1):
        for index in range(1, depth + 1):
            name = f"features.denseblock{stage}.denselayer{index}"
            new = conv(norm(y, f"{name}.norm1").clamp(min=0), f"{name}.conv1")
            new = conv(norm(new, f"{name}.norm2").clamp(min=0), f"{name}.conv2", 1, 1)
            y = torch.cat([y, new], 1)
        if stage < 4:
            name = f"features.transition{stage}"
            y = conv(norm(y, f"{name}.norm").clamp(min=0), f"{name}.conv")
            y = functional.avg_pool2d(y, 2)
    assert computes(network, norm(y, "features.norm5").clamp(min=0), w, "classifier")


def test_vgg_computes_what_its_paper_and_torchvision_say():
    network, w, conv, norm = by_hand("vgg11-bn", head="average")
    y, index = PICTURE, 0
    for depth in (1, 1, 2, 2, 2):
        for _ in range(depth):
            y = norm(conv(y, f"features.{index}", 1, 1), f"features.{index + 1}").clamp(min=0)
            index += 3
        y, index = functional.max_pool2d(y, 2), index + 1
    assert computes(network, y, w, "classifier")


SMALL = {
    "resnet18-imagenet": {"stages": (1, 2, 1, 1)},
    "resnet50": {"stages": (2, 1, 1, 1)},
    "resnext50-32x4d": {"stages": (1, 1, 1, 1)},
    "wide-resnet50-2": {"stages": (1, 1, 1, 1)},
    "vgg11-bn": {"head": "average"},
    "googlenet": {},
    "mobilenet-v2": {},
    "densenet121": {"stages": (2, 3, 2, 2)},
}


@pytest.mark.parametrize("name", SMALL)
def test_every_batchnorm_of_every_family_goes_exactly(name):
    torch.manual_seed(0)
    module = disturb(load_model(name, classes=10, args=SMALL[name]).module()).double()
    x = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    folded = fold_batchnorm(module)
    assert len(folded.fates) == batchnorms(module) > 7
    assert [str(fate) for fate in folded.kept] == []
    assert batchnorms(folded.module) == 0
    with torch.inference_mode():
        want = module(x)
        assert (folded.module(x) - want).norm() <= EXACT * want.norm()


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
    assert job.start.module.get_parameter("conv1.conv.weight").shape == (64, channels, 7, 7)


def test_weights_of_another_network_are_refused(tmp_path):
    save_file(GoogLeNet().module().state_dict(), path := tmp_path / "w.safetensors")
    with refused(InputRefused, "not this network's weights"):
        load_weights(ResNet(classes=10).module(), path)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_repeated_digits_are_the_same_in_every_channel(channels):
    grey = digits((1, 16, 16), "train")
    repeated = load_split("repeated-digits", (channels, 16, 16), "train")
    assert repeated.inputs.shape == (1437, channels, 16, 16)
    assert repeated.origin == f"1437 train digits in {channels} channels"
    assert np.array_equal(repeated.labels, grey.labels)
    for channel in range(channels):
        assert np.array_equal(repeated.inputs[:, channel], grey.inputs[:, 0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Vgg, {"channels": 0}),
        (Vgg, {"classes": 0}),
        (Vgg, {"stages": (1, 1, 1, 1)}),
        (ResNet, {"stages": (2, 2, 0, 2)}),
        (ResNet, {"groups": 32}),
        (ResNet, {"width": 0, "bottleneck": True}),
    ],
)
def test_what_it_cannot_be_is_refused(kind, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        kind(**options)


def test_arguments_of_a_network_are_its_fields_and_no_others():
    assert load_model("vgg16", args={"head": "average"}) == Vgg(head="average")
    assert load_model("vgg11-bn", args={"classes": 5}).stages == (1, 1, 2, 2, 2)
    with refused(ProfileError, "vgg16: model.args: unknown key 'haed'", hint=("'head'",)):
        load_model("vgg16", args={"haed": "average"})
    with refused(ProfileError, "model.args: head: 'mean' is not allowed"):
        load_model("vgg16", args={"head": "mean"})
    with refused(InputRefused, "vgg16 is asked for 3 channels, and model.args.channels is 1"):
        load_model("vgg16", input_shape=(3, 64, 64), args={"channels": 1})


def test_a_network_of_ten_classes_is_refused_another_number_and_given_its_own():
    assert load_model("resnet18", classes=10).output.shape == (10,)
    with refused(InputRefused, "resnet18 has 10 outputs", "cannot have 1000"):
        load_model("resnet18", classes=1000)
