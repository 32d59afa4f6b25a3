"""Whatever is traced computes what the module does, at any batch size; the rest says why not."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from copy import deepcopy

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import disturb, refused
from msgspec import structs
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from exporter.errors import GraphError
from exporter.fold import fold_batchnorm
from exporter.fold.tracing import trace
from exporter.records import BatchRange, TensorSpec
from exporter.to_onnx import export_onnx

EXACT = 1e-12
PICTURES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ready(module: nn.Module) -> nn.Module:
    return disturb(module).double().eval()


def distance(module: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    """Return the largest relative distance of one output; outputs must have the same structure."""
    with torch.inference_mode():
        answers = [pytree.tree_flatten_with_path(net(x.clone()))[0] for net in (module, other)]
    want, got = ({path: y for path, y in answer if y is not None} for answer in answers)
    assert got.keys() == want.keys()
    return max(float((got[k] - y).norm() / (y.norm() or 1.0)) for k, y in want.items())


def check(module: nn.Module, *, folded: int, example: bool = True, batches=(1, 2, 3, 7)) -> list:
    """Trace and fold; compare both with the module at several sizes of batch; return the fates."""
    module = ready(module)
    given = PICTURES if example else None
    before = {key: value.clone() for key, value in module.state_dict().items()}
    traced, _ = trace(module, (given,) if example else None)
    result = fold_batchnorm(module, given)
    for batch in batches:
        x = PICTURES.repeat(2, 1, 1, 1)[:batch]
        assert distance(module, traced, x) <= 1e-15
        assert distance(module, result.module, x) <= EXACT
    assert [fate.folded for fate in result.fates].count(True) == folded, result.fates
    after = module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return [str(structs.replace(fate, error=None)) for fate in result.fates]


class Block(nn.Module):
    """A convolution and its BatchNorm, called in a way that the classes below vary."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(x))


# ── What torch.fx follows ───────────────────────────────────────────────────────────


class ManyModules(Block):
    def __init__(self):
        super().__init__()
        self.rest = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)) for _ in range(2)
        )

    def forward(self, x):
        x = super().forward(x)
        for i, layer in enumerate(self.rest):
            assert isinstance(layer, nn.Module), f"layer {i} of {len(self.rest)} is {layer}"
            x = layer(x)
        return {"out": x, "both": [x.mean(), (x, x + 1)]}


class ShapeArithmetic(Block):
    """A channel shuffle, as ShuffleNet has it."""

    def forward(self, x):
        x = super().forward(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return x.view(batch, -1, height, width)


class Defaults(Block):
    def forward(self, x, mask=None, *, scale=2.0):
        x = super().forward(x)
        return x * scale if mask is None else x * mask


class ReadsItsWeightsShape(Block):
    def forward(self, x):
        x = super().forward(x)
        return x * 2 if self.conv.weight.shape[0] > 3 else x


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize(
    ("module", "folded"),
    [(Block(), 1), (ManyModules(), 3), (ShapeArithmetic(), 1), (Defaults(), 1)],
    ids=lambda value: type(value).__name__,
)
def test_what_torch_fx_follows_needs_no_example(module, folded, example):
    check(module, folded=folded, example=example)
    check(ReadsItsWeightsShape(), folded=1, example=example)


# ── What only torch.export follows ──────────────────────────────────────────────────


class AsksForChannels(Block):
    def forward(self, x):
        if x.size(1) != 3:
            raise ValueError(x.shape)
        return super().forward(x)


class Asserts(Block):
    def forward(self, x):
        assert x.dim() == 4, f"a picture has 4 axes, not {x.dim()}"
        return super().forward(x)


class AsksForType(Block):
    """As DenseNet does; torch.fx would take the other branch without a word."""

    def forward(self, x):
        parts = [x] if isinstance(x, torch.Tensor) else [x, x]
        return super().forward(sum(parts))


class TakesAnything(Block):
    def forward(self, *inputs, **options):
        return super().forward(inputs[0] if len(inputs) == 1 else inputs[1])


class CountsPictures(Block):
    def forward(self, x):
        assert len(x.shape) == 2 * len(self._modules)
        return super().forward(x).reshape(len(x), -1).view(len(x), 6, 8, 8)


class Iterates(Block):
    def forward(self, x):
        channels = list(x.unbind(1)) if len(x.shape) == 4 else []
        return super().forward(torch.stack([c for c in channels if c is not None], dim=1))


class IteratesATensor(Block):
    def forward(self, x):
        return torch.stack([row * 2 for row in super().forward(x).transpose(0, 1)], dim=1)


class CountsChannels(Block):
    def forward(self, x):
        channels = int(x.shape[1])
        for _ in range(channels):
            x = x + channels
        return super().forward(x)


class Rearranges(Block):
    def forward(self, x):
        y = super().forward(x) if x.shape[1] == 3 else x
        y = y[:, 1:5, ::2, -3:].unsqueeze(1).squeeze(1).flip(1).movedim(1, 2).transpose(1, 2)
        y = torch.cat(
            [*y.split(1, 1), *y.split([1, 3], 1), y[:, None].expand(-1, 2, -1, -1, -1)[:, 1]], 1
        )
        y = functional.pixel_shuffle(functional.channel_shuffle(y, 2), 2)[:]
        y = functional.pad(functional.pad(y, (1, 0, 0, 2)), (1, 1, 1, 1), "replicate")
        return functional.pad(y, (0, 1), value=2.0), y.unflatten(1, (1, -1)).narrow(2, 1, 2)[..., 0]


class Checkpointed(Block):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Ignored(Block):
    @torch.jit.ignore
    def stem(self, x):
        return super().forward(x) if x.shape[-1] == 8 else x

    def forward(self, x):
        if not torch.jit.is_scripting():
            return OrderedDict(out=self.stem(x), none=None)
        return self.stem(x)


class InPlace(Block):
    """Views and in-place calls, which a fold must not move anything across."""

    def forward(self, x):
        y = super().forward(x) if x.shape[1] == 3 else x
        y[:, 0] = 2.0
        y += 1
        functional.relu_(y)
        functional.hardtanh_(y, -1.0, 1.5)
        y[:, 1].mul_(0.5)
        with torch.no_grad():
            return y.clone().detach(), functional.leaky_relu_(y - 1, 0.1)


EXPORTED = [
    (AsksForChannels(), 1),
    (Asserts(), 1),
    (AsksForType(), 1),
    (TakesAnything(), 1),
    (CountsPictures(), 1),
    (Iterates(), 1),
    (IteratesATensor(), 1),
    (CountsChannels(), 1),
    (Rearranges(), 1),
    (Checkpointed(), 1),
    (Ignored(), 1),
    (InPlace(), 1),
]


@pytest.mark.parametrize(("module", "folded"), EXPORTED, ids=lambda m: type(m).__name__)
def test_what_torch_fx_cannot_follow_is_exported_and_lifted(module, folded):
    (said,) = check(module, folded=folded)
    assert said == "bn: Conv → BatchNorm: scale and shift into conv"


class Everything(nn.Module):
    """One of each layer that is lifted, in an order in which most BatchNorms can go."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, padding=(1, 2), dilation=2, groups=1, bias=False),
            *(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2, 1, 1)),
            nn.Conv2d(8, 8, 3, padding="same", groups=4),
            *(nn.ReLU6(inplace=True), nn.BatchNorm2d(8), nn.LeakyReLU(0.2, inplace=True)),
            nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
            *(nn.BatchNorm2d(6), nn.PReLU(6), nn.BatchNorm2d(6), nn.AvgPool2d(2, 1, 1)),
            nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2),
            *(nn.BatchNorm2d(4), nn.Hardsigmoid(), nn.Dropout(0.5), nn.AdaptiveMaxPool2d(4)),
            *(nn.BatchNorm2d(4), nn.Hardtanh(-0.5, 2.0), nn.BatchNorm2d(4, affine=False)),
            *(nn.Conv2d(4, 4, 1), nn.LeakyReLU(0.1), nn.BatchNorm2d(4), nn.Hardswish()),
        )
        self.volume = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2)
        )
        self.sequence = nn.Sequential(
            *(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.AvgPool1d(2)),
            *(nn.ConvTranspose1d(4, 4, 2), nn.BatchNorm1d(4), nn.AdaptiveAvgPool1d(2)),
        )
        self.head = nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        self.tied = self.head[2]

    def forward(self, x):
        if x.shape[2:] != (8, 8):
            raise ValueError(x.shape)
        x = self.stem(x)
        x = torch.cat([x, x.clamp(-0.25, 0.25)], 1).permute(0, 2, 3, 1).reshape(x.size(0), 4, -1)
        y = self.volume(x.view(x.size(0), 1, 4, 8, 4))
        x = self.sequence(x) - functional.adaptive_avg_pool2d(x.unsqueeze(1), (4, 2)).squeeze(1)
        y = functional.adaptive_avg_pool3d(y, (1, 1, 1)).view(x.size(0), -1)
        x = torch.flatten(x, 1)
        return self.tied(self.head[:2](torch.cat([x, y / 2 * y], dim=1))).mean((1,), keepdim=True)


def test_every_kind_of_layer_is_lifted_and_computes_the_same():
    said = check(Everything(), folded=12)
    assert len(said) == 12
    module = ready(Everything())
    traced, uncalled = trace(module, (PICTURES,))
    assert not uncalled
    layers = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.PReLU)
    want = {n: str(m) for n, m in module.named_modules() if isinstance(m, layers)}
    got = {n: str(m) for n, m in traced.named_modules() if isinstance(m, layers)}
    del want["stem.8"], got["stem.8"]  # whose padding by reflection is a call of its own
    assert got == want
    assert not {n.target for n in traced.graph.nodes if "dropout" in str(n.target)}


class Guarded(nn.Module):
    """A network that torch.fx cannot trace, around one that it can."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        if x.dim() != 4:
            raise ValueError(x.shape)
        return self.net(x)


def test_both_ways_to_trace_the_documents_network_fold_it_to_the_same_bits(tiny_module):
    x = torch.randn(4, 1, 32, 32)
    by_fx, by_export = (
        fold_batchnorm(tiny_module, x),
        fold_batchnorm(Guarded(tiny_module).eval(), x),
    )
    names = [f"net.{fate.name}" for fate in by_fx.fates if fate.folded]
    assert [fate.name for fate in by_export.fates if fate.folded] == names
    assert len(names) == 5
    for batch in (1, 2, 7):
        x = torch.randn(batch, 1, 32, 32)
        with torch.inference_mode():
            assert torch.equal(by_export.module(x), by_fx.module(x))


class Shared(Block):
    def __init__(self):
        super().__init__()
        self.again, self.last = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x):
        x = super().forward(x) if x.size(1) == 3 else x
        return self.last(self.again(self.again(x))) + functional.conv2d(
            x, self.again.weight, stride=1, padding=0
        )


def test_a_layer_called_twice_is_still_seen_to_be_one_layer():
    first, last = check(Shared(), folded=1)
    assert first.startswith("bn: Conv")
    assert last == (
        "last: Conv → BatchNorm: kept: again is called 2 times; "
        "no layer behind it can take it: add comes first; "
        "copy_weights=True would fold it: scale and shift into a copy of again"
    )


@pytest.mark.parametrize("decomposed", [False, True])
def test_what_torch_export_made_is_a_network_like_another(decomposed):
    module = ready(Everything())
    sizes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(module, (PICTURES,), dynamic_shapes=sizes)
    if decomposed:  # into calls of fewer kinds, with several results
        program = program.run_decompositions()
    for example in (None, PICTURES):
        result = fold_batchnorm(program.module(), example)
        names = [fate.name for fate in result.fates if fate.folded]
        assert {"stem.1", "stem.9", "stem.14", "sequence.5", "volume.1"} <= {*names}
        assert ("head.1" in names) == (example is not None)  # which needs the shape
        assert len(result.fates) == 12
        for batch in (1, 2, 7):
            x = PICTURES.repeat(2, 1, 1, 1)[:batch]
            assert distance(module, result.module, x) <= EXACT


def test_an_exported_network_goes_on_to_onnx_under_its_layers_names(tmp_path):
    module = disturb(Everything()).eval()
    module.stem[17] = nn.MaxPool2d((4, 3), (2, 3)).eval()  # as ONNX has no adaptive one
    folded = fold_batchnorm(module, torch.randn(4, 3, 8, 8)).module
    written = export_onnx(
        folded,
        tmp_path / "net.onnx",
        input=TensorSpec("input", (3, 8, 8)),
        output=TensorSpec("out", (1,)),
        batch=BatchRange(1, 2, 8),
    )
    names = {node.name for node in onnx.load(written.path).graph.node}
    assert {"stem.0", "stem.4", "stem.12/AveragePool", "head.0", "head.2"} <= names
    session = ort.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        with torch.inference_mode():
            want = module(x).numpy()
        (got,) = session.run(None, {"input": x.numpy()})
        assert np.abs(got - want).max() <= 1e-5 * max(1.0, np.abs(want).max())


# ── BatchNorms in other clothes ─────────────────────────────────────────────────────


class AsFunctions(nn.Module):
    def __init__(self, *, of_bn: bool = True):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.01)
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6, 1, 1)), nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.slope, self.matrix = nn.Parameter(torch.rand(4)), nn.Linear(4, 2, bias=False)

    def forward(self, x):
        bn = self.bn
        x = functional.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
        x = functional.batch_norm(
            *(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, bn.eps)
        )
        x = functional.conv2d(x, self.weight)
        x = functional.batch_norm(x, self.mean, self.var, bias=self.bias)
        x = functional.prelu(x, self.slope)
        return functional.linear(x.mean((2, 3)), self.matrix.weight)


@pytest.mark.parametrize("example", [True, False])
def test_functions_of_the_networks_own_tensors_are_layers(example):
    said = check(AsFunctions(), folded=2, example=example)
    assert said[0] == "bn: Conv → BatchNorm: scale and shift into conv"
    assert said[1] == "batch_norm_1: Conv → BatchNorm: scale and shift into conv2d_1"


class Lenient(nn.BatchNorm2d):
    """It is nn.BatchNorm2d but for what it was made with and for what it refuses."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-3)
        self.note = "mine"

    def _check_input_dim(self, input):
        pass


class Renamed(nn.BatchNorm2d):
    pass


class Louder(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Weighted(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.half = 0.5

    def __getattr__(self, name):
        found = super().__getattr__(name)
        return 2 * found if name == "weight" else found


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("kind", [Lenient, Renamed, nn.SyncBatchNorm])
def test_a_batchnorm_by_another_name_is_one(kind, example):
    (said,) = check(
        nn.Sequential(nn.Conv2d(3, 6, 3), kind(6), nn.ReLU()), folded=1, example=example
    )
    assert said == "1: Conv → BatchNorm: scale and shift into 0"


@pytest.mark.parametrize("kind", [Louder, Weighted])
def test_a_batchnorm_with_arithmetic_of_its_own_stays(kind):
    (said,) = check(nn.Sequential(nn.Conv2d(3, 6, 3), kind(6)), folded=0)
    assert said == f"1: {kind.__name__}: kept: a {kind.__name__}, whose arithmetic is its own"


def test_other_normalisations_are_no_batchnorms():
    layers = [nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.GroupNorm(2, 6)]
    assert check(nn.Sequential(*layers), folded=0) == []


class NeverCalled(Block):
    def __init__(self):
        super().__init__()
        self.spare = nn.Sequential(nn.BatchNorm2d(6))
        self.same = self.bn


def test_a_batchnorm_that_is_never_called_is_reported():
    used, spare = check(NeverCalled(), folded=1)
    assert used.startswith("bn: Conv")
    assert spare == "spare.0: BatchNorm2d: kept: never called"


class Autocast(Block):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def test_a_region_of_another_arithmetic_is_kept_and_its_batchnorm_reported():
    module = disturb(Autocast()).eval()
    result = fold_batchnorm(module, PICTURES.float())
    (said,) = map(str, result.fates)
    assert said == (
        "bn: BatchNorm2d: kept: its tensors go into wrap_with_autocast, which is no BatchNorm"
    )
    for batch in (1, 2, 3):
        x = PICTURES[:batch].float()
        with torch.inference_mode():
            assert torch.equal(result.module(x), module(x))
    with refused(GraphError, "torch.fx would lose its autocast", hint=("example",)):
        fold_batchnorm(module)


class Encoder(nn.Module):
    """A BatchNorm inside a container of torch.nn's own."""

    def __init__(self):
        super().__init__()
        layer = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
        self.parallel = nn.DataParallel(layer)
        self.wrapped = nn.TransformerEncoder(Mixer(), 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.wrapped(self.parallel(x))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(6, 2)  # of which the container reads settings
        self.conv, self.bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, src, src_mask=None, is_causal=None, src_key_padding_mask=None):
        return self.bn(self.conv(src))


def test_torch_nns_own_containers_hide_no_batchnorm():
    said = check(Encoder(), folded=3)
    assert said[0] == "parallel.1: Conv → BatchNorm: scale and shift into parallel.0"
    said = check(Encoder(), folded=1, example=False)
    assert said[1:] == [
        f"wrapped.layers.{i}.bn: BatchNorm2d: kept: inside wrapped, which cannot be traced into"
        for i in range(2)
    ]


def test_wrappers_that_change_no_value_come_off():
    check(nn.DataParallel(Block()), folded=1)
    check(torch.compile(Block()), folded=1)
    check(nn.Sequential(torch.compile(Block())), folded=1)
    compiled = Block()
    compiled.compile(backend="eager")
    check(nn.Sequential(compiled), folded=1)


# ── Weights that are computed, hooks, and forwards that were replaced ───────────────


@pytest.mark.parametrize(
    "parametrise",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("kind", [Block, AsksForChannels])
def test_a_convolution_whose_weights_are_computed_takes_nothing(parametrise, kind):
    module = kind()
    parametrise(module.conv)
    (said,) = check(module, folded=0)
    assert "kept" in said


def test_hooks_are_kept_with_a_layer_and_refused_anywhere_else():
    module = Block()
    module.conv.register_forward_hook(lambda layer, given, found: found.abs())
    (said,) = check(module, folded=0)
    assert "conv has hooks, which may change what it computes" in said
    for kind in (ManyModules, type("Lists", (ManyModules, AsksForChannels), {})):
        module = kind().eval()
        module.rest[1].register_forward_pre_hook(lambda layer, given: given)
        with refused(GraphError, "rest.1 has hooks, which a traced copy would not run"):
            fold_batchnorm(module, PICTURES.float())


def test_global_hooks_are_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda *given: None)
    try:
        with refused(GraphError, "global module hooks"):
            fold_batchnorm(Block().eval())
    finally:
        handle.remove()


def test_a_method_replaced_on_an_instance_is_refused_by_name():
    for path, name in (("", "forward"), ("conv", "forward"), ("conv", "_conv_forward")):
        module = Block().eval()
        setattr(module.get_submodule(path), name, lambda *given: given[0])
        with refused(GraphError, f"{path or 'Block'}.{name} was replaced on the instance"):
            fold_batchnorm(module)


def test_what_cannot_be_folded_by_its_nature_is_refused():
    with refused(GraphError, "1 has no weights yet", hint=("one batch",)):
        fold_batchnorm(nn.Sequential(nn.Conv2d(3, 6, 3), nn.LazyBatchNorm2d()).eval())
    with refused(GraphError, "0 is TorchScript", hint=("made from",)):
        fold_batchnorm(nn.Sequential(torch.jit.script(nn.ReLU())).eval())
    with refused(GraphError, "0 is quantised", hint=("before",)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated, said once a process
            quantised = torch.ao.nn.quantized.Conv2d(3, 6, 3)
        fold_batchnorm(nn.Sequential(quantised).eval())


# ── What cannot be traced at all ────────────────────────────────────────────────────


class BranchesOnValues(Block):
    def forward(self, x):
        x = super().forward(x)
        if x.sum() > 0:
            return x
        return -x


def test_the_line_in_the_way_is_named_with_and_without_an_example(capfd):
    line = BranchesOnValues.forward.__code__.co_firstlineno + 2
    place = f'BranchesOnValues: test_tracing.py, line {line}, "if x.sum() > 0:": '
    module = BranchesOnValues().eval()
    said = f"torch.fx cannot trace {place}symbolically traced variables"
    with refused(GraphError, said, hint=("example", "torch.export")):
        fold_batchnorm(module)
    said = f"neither torch.fx nor torch.export can trace {place}"
    with refused(GraphError, f"{said}which way it goes depends on the values", hint=None):
        fold_batchnorm(module, PICTURES.float())
    assert capfd.readouterr() == ("", "")


def test_a_default_example_cannot_help_a_forward_of_two_inputs():
    class Two(Block):
        def forward(self, x, y):
            return super().forward(x + y)

    with refused(GraphError, "cannot trace Two", "missing 1 required positional argument: 'y'"):
        fold_batchnorm(Two().eval())


class OneByOne(Block):
    def forward(self, x):
        return torch.stack([super(OneByOne, self).forward(row[None])[0] for row in x])


class OnePicture(Block):
    def forward(self, x):
        x = super().forward(x)
        return x if x.shape[0] != 1 else -x


class ManyPictures(Block):
    def forward(self, x):
        x = super().forward(x)
        return -x if x.shape[0] > 2 else x


class VeryManyPictures(Block):
    def forward(self, x):
        x = super().forward(x)
        return -x if x.shape[0] > 64 else x


def test_a_network_that_asks_for_the_batch_is_not_traced_for_one_batch():
    with refused(GraphError, "OneByOne was traced by torch.export for a batch of 4 alone"):
        fold_batchnorm(OneByOne().eval(), PICTURES.float())
    with refused(GraphError, "OnePicture takes another way for a batch of 1 than for 4"):
        fold_batchnorm(OnePicture().eval(), PICTURES.float())
    with refused(GraphError, "VeryManyPictures was traced by torch.export for at most 64 at once"):
        fold_batchnorm(VeryManyPictures().eval(), PICTURES.float())
    with refused(GraphError, "ManyPictures takes another way for a batch of 1 than for 4"):
        fold_batchnorm(ManyPictures().eval(), PICTURES.float())


def test_an_example_that_the_network_does_not_take_is_refused():
    with refused(GraphError, "Block does not take the example: Given groups=1"):
        fold_batchnorm(Block().eval(), torch.zeros(2, 5, 8, 8))


def test_a_batch_of_one_as_an_example_is_not_taken_for_a_constant():
    module = ready(AsksForChannels())
    result = fold_batchnorm(module, PICTURES[:1])
    assert all(distance(module, result.module, PICTURES[:n]) <= EXACT for n in (1, 3))


def test_a_random_network_is_held_against_itself_with_the_same_random_numbers():
    class Random(AsksForChannels):
        def forward(self, x):
            return functional.dropout(super().forward(x), 0.5, training=True)

    assert fold_batchnorm(ready(Random()), PICTURES).fates[0].folded


def test_tracing_leaves_no_trace_in_the_argument():
    class Remembers(AsksForChannels):
        def forward(self, x):
            self.last = x
            return super().forward(x)

    module = ready(Remembers())
    before = deepcopy(vars(module)).keys()
    fold_batchnorm(module, PICTURES)
    assert vars(module).keys() == before


# ── BatchNorms that join an activation ──────────────────────────────────────────────


class NormAndActivation(nn.BatchNorm2d):
    """The way image-model libraries write it: a BatchNorm with layers of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        training = self.training or (self.running_mean is None and self.running_var is None)
        x = functional.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            training,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


@pytest.mark.parametrize("example", [False, True])
def test_a_batchnorm_that_joins_an_activation_folds_under_its_own_name_and_once(example):
    layers = [nn.Conv2d(3, 6, 3), NormAndActivation(6), nn.Conv2d(6, 4, 1), NormAndActivation(4)]
    assert check(nn.Sequential(*layers), folded=2, example=example) == [
        "1: Conv → BatchNorm: scale and shift into 0",
        "3: Conv → BatchNorm: scale and shift into 2",
    ]
