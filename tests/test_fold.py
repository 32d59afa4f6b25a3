"""Every fold is compared, in float64, with the network it came from."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from conftest import disturb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional

from exporter.errors import GraphError
from exporter.fold import fold_batchnorm

EXACT = 1e-12


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    scale = want.norm()
    return float((got.double() - want).norm() / (scale if scale else 1.0))


def folding_error(module: nn.Module, x: torch.Tensor) -> float:
    """Return the relative error of the fold, in float64 all the way."""
    module = deepcopy(module).double().eval()
    with torch.inference_mode():
        return relative_error(fold_batchnorm(module).module(x.double()), module(x.double()))


def batchnorms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


def test_every_batchnorm_of_the_documents_network_goes_and_nothing_changes(tiny_module):
    folded = fold_batchnorm(tiny_module)
    assert batchnorms(folded.module) == 0
    assert all(fate.folded for fate in folded.fates)
    assert len(folded.fates) == batchnorms(tiny_module) == 5
    assert folding_error(tiny_module, torch.randn(4, 1, 32, 32)) < EXACT


def test_in_float32_the_fold_adds_no_error_worth_speaking_of(tiny_module):
    x = torch.randn(16, 1, 32, 32)
    with torch.inference_mode():
        want = deepcopy(tiny_module).double()(x.double())
        unfolded = relative_error(tiny_module(x), want)
        folded = relative_error(fold_batchnorm(tiny_module).module(x), want)
    assert folded <= 3 * unfolded + 1e-7


def test_the_argument_is_left_as_it_was(tiny_module):
    before = {key: value.clone() for key, value in tiny_module.state_dict().items()}
    fold_batchnorm(tiny_module)
    after = tiny_module.state_dict()
    assert batchnorms(tiny_module) == 5
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.requires_grad for parameter in tiny_module.parameters())


def test_folding_twice_changes_nothing_more(tiny_module):
    assert fold_batchnorm(fold_batchnorm(tiny_module).module).fates == ()


def test_each_fate_says_where_its_batchnorm_went(tiny_module):
    said = [str(fate) for fate in fold_batchnorm(tiny_module).fates]
    assert said[0] == (
        "block1.2: Conv → ReLU → BatchNorm: scale into block1.0, sign of 4 channels with γ < 0 by "
        "one multiplication, shift by one addition behind block1.3"
    )
    assert said[1] == "block2.0.bn1: Conv → BatchNorm: scale and shift into block2.0.conv1"


# ── Behind a ReLU ───────────────────────────────────────────────────────────────────


def stem(gamma: list[float], *rest: nn.Module) -> nn.Sequential:
    norm = nn.BatchNorm2d(len(gamma))
    disturb(norm)
    norm.weight.data = torch.tensor(gamma)
    return nn.Sequential(nn.Conv2d(1, len(gamma), 3, padding=1), nn.ReLU(), norm, *rest).eval()


@pytest.mark.parametrize(
    "gamma",
    [
        [1.0, 2.0, 0.5],
        [-1.0, -2.0, -0.5],
        [1.0, -1.0, 0.0],
        [0.0, 0.0, 0.0],
        [-0.0, 1e-30, -1e-30],
        [1e6, -1e6, 1e-6],
    ],
)
@pytest.mark.parametrize("pool", [[], [nn.MaxPool2d(3, 2, 1)], [nn.AvgPool2d(2)]], ids=len)
def test_a_batchnorm_behind_a_relu_folds_exactly_for_any_sign(gamma, pool):
    module = stem(gamma, *pool)
    assert batchnorms(fold_batchnorm(module).module) == 0
    assert folding_error(module, torch.randn(8, 1, 9, 9)) < EXACT


def test_where_all_gammas_are_positive_no_multiplication_is_left():
    folded = fold_batchnorm(stem([1.0, 2.0], nn.MaxPool2d(2))).module
    called = [node.target for node in folded.graph.nodes if node.op == "call_module"]
    kinds = [type(folded.get_submodule(name)).__name__ for name in called]
    assert kinds == ["Conv2d", "ReLU", "MaxPool2d", "ChannelShift"]


def test_the_usual_fold_would_have_been_wrong_there():
    """The mistake this avoids: scale and shift into the convolution, in front of the ReLU."""
    module = stem([-1.0, 2.0])
    conv, relu, norm = deepcopy(module).double()
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias - scale * norm.running_mean
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    z = conv(x) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    assert relative_error(relu(z).detach(), module.double()(x).detach()) > 0.1


def test_arguments_given_by_name_are_arguments_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.bn = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(input=self.relu(input=self.conv(input=x)))

    module = disturb(Net()).eval()
    assert batchnorms(fold_batchnorm(module).module) == 0
    assert folding_error(module, torch.randn(4, 2, 8, 8)) < EXACT


@pytest.mark.parametrize("relu", [functional.relu, torch.relu, lambda x: x.relu()])
def test_a_relu_is_a_relu_however_it_is_called(relu):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(relu(self.conv(x)))

    module = disturb(Net()).eval()
    assert batchnorms(fold_batchnorm(module).module) == 0
    assert folding_error(module, torch.randn(4, 2, 8, 8)) < EXACT


def test_a_maxpool_that_returns_its_indices_keeps_them():
    module = stem([1.0, -1.0], nn.MaxPool2d(2, return_indices=True)).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    with torch.inference_mode():
        (want, where), (got, found) = module(x), fold_batchnorm(module).module(x)
    assert relative_error(got, want) < EXACT
    assert torch.equal(found, where)


# ── Any convolution, any statistics ─────────────────────────────────────────────────

numbers = st.floats(-1e3, 1e3, width=32)
variances = st.one_of(st.just(0.0), st.floats(2.0**-40, 1e6, width=32))


@st.composite
def layers(draw) -> tuple[nn.Module, torch.Tensor]:
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        4,
        4 * draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 3])),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "circular"])),
    )
    channels = conv.out_channels
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](
        channels, affine=draw(st.booleans()), eps=draw(st.sampled_from([1e-5, 1e-3]))
    )

    def tensor(of) -> torch.Tensor:
        return torch.tensor(draw(st.lists(of, min_size=channels, max_size=channels)))

    if norm.affine:
        norm.weight.data, norm.bias.data = tensor(numbers), tensor(numbers)
    norm.running_mean, norm.running_var = tensor(numbers), tensor(variances)
    between = [nn.ReLU()] if draw(st.booleans()) else []
    behind = [(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1](2)]
    behind = behind if draw(st.booleans()) else []
    module = nn.Sequential(conv, *between, norm, *behind).double().eval()
    return module, torch.randn(2, 4, *[7] * dims, dtype=torch.float64)


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(layers())
def test_random_convolutions_fold_exactly_whatever_their_statistics(drawn):
    module, x = drawn
    folded = fold_batchnorm(module)
    assert all(fate.folded for fate in folded.fates)
    with torch.inference_mode():
        want, got = module(x), folded.module(x)
    # Relative to what was added up, since c = β − a·μ may cancel almost completely.
    norm = next(m for m in module if isinstance(m, nn.modules.batchnorm._BatchNorm))
    scale = (norm.weight if norm.affine else 1) / torch.sqrt(norm.running_var + norm.eps)
    terms = want.norm() + (scale * norm.running_mean).norm() + scale.norm() * x.norm()
    assert (got - want).norm() <= EXACT * terms


# ── What is left in place, and why ──────────────────────────────────────────────────


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)
        self.bn = nn.BatchNorm2d(1)

    def forward(self, x):
        return self.bn(self.second(self.bn(self.first(x))))


class ConvCalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1)

    def forward(self, x):
        return self.bn(self.conv(self.conv(x)))


class SharedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.other, self.bn = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1)
        self.other.weight = self.conv.weight

    def forward(self, x):
        return self.bn(self.conv(self.other(x)))


class ReluReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        y = torch.relu(self.conv(x))
        return self.bn(y) + y


class AsFunction(nn.Module):
    def __init__(self, training=False):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.how = training

    def forward(self, x):
        bn = self.bn
        return functional.batch_norm(
            self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, training=self.how
        )


class WeightsReadAlone(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x):
        x = torch.cat([x, x], dim=1)
        return self.bn(self.conv(x)) + functional.conv2d(x, self.conv.weight, padding=1)


class ScaleReadAlone(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        return self.bn(self.conv(x).relu()) * self.bn.weight.view(-1, 1, 1)


def hooked() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    module[0].register_forward_hook(lambda layer, given, found: found.abs())
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (hooked(), "0 has hooks, which may change what it computes"),
        (WeightsReadAlone(), "conv's weights are also read by themselves"),
        (nn.Sequential(nn.BatchNorm2d(1), nn.Sigmoid()), "the network's input is in front of it"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.BatchNorm2d(2)), "Sigmoid stands"),
        (TwoReaders(), "conv is also read by add"),
        (ReluReadTwice(), "relu is also read by add"),
        (ConvCalledTwice(), "conv is called 2 times; "),
        (
            ConvCalledTwice(),
            "; copy_weights=True would fold it: scale and shift into a copy of conv",
        ),
        (SharedWeights(), "conv shares its weights with another module"),
        (AsFunction(training=True), "a function call that is not plainly a BatchNorm's"),
        (
            nn.Sequential(nn.ReLU(), nn.SyncBatchNorm(1)),  # of which shape is not known
            "a SyncBatchNorm, whose arithmetic is its own",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_batchnorm_that_stays_says_why_and_the_answer_stays_too(module, reason):
    module = disturb(module).eval()
    folded = fold_batchnorm(module)
    assert [fate.folded for fate in folded.fates] == [False] * len(folded.fates) != []
    assert reason in folded.fates[0].detail
    x = torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(folded.module(x), module(x))


@pytest.mark.parametrize("module", [CalledTwice(), ScaleReadAlone()])
def test_a_batchnorm_that_others_use_goes_since_it_is_not_changed(module):
    module = disturb(module).eval()
    folded = fold_batchnorm(module)
    assert all(fate.folded for fate in folded.fates)
    assert folding_error(module, torch.randn(2, 1, 8, 8)) < EXACT


class NormAndAct(nn.BatchNorm2d):
    """A BatchNorm that brings its activation, and calls the function by itself."""

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        x = functional.batch_norm(x, mean, var, self.weight, self.bias, False, 0.1, self.eps)
        return functional.leaky_relu(x, -0.5)


@pytest.mark.parametrize("module", [AsFunction(), nn.Sequential(nn.Conv2d(1, 2, 3), NormAndAct(2))])
def test_a_function_call_is_a_batchnorm_too(module):
    module = disturb(module).eval()
    (fate,) = fold_batchnorm(module).fates
    assert fate.folded
    assert fate.name in ("bn", "1")
    assert folding_error(module, torch.randn(2, 1, 8, 8)) < EXACT


def test_each_call_of_a_batchnorm_has_a_fate_of_its_own():
    fates = fold_batchnorm(disturb(CalledTwice()).eval()).fates
    assert [fate.name for fate in fates] == ["bn (call 1 of 2)", "bn (call 2 of 2)"]


# ── What is refused ─────────────────────────────────────────────────────────────────


def broken(field: str, value: float) -> nn.Module:
    module = disturb(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))).eval()
    getattr(module[1], field).data[2] = value
    return module


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (broken("running_var", float("nan")), "1.running_var is nan in channel 2"),
        (broken("running_mean", float("inf")), "1.running_mean is inf in channel 2"),
        (broken("weight", float("nan")), "1.weight is nan in channel 2"),
        (broken("running_var", -1.0), "1.running_var + eps is not above 0 in channel 2 (-1)"),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)).eval(),
            "1 has no running statistics",
        ),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "in training mode"),
    ],
)
def test_statistics_that_mean_nothing_are_refused_by_layer_and_channel(module, said):
    with pytest.raises(GraphError) as refusal:
        fold_batchnorm(module)
    assert said in str(refusal.value)


def test_one_batchnorm_left_in_training_mode_is_refused():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    module[1].train()
    with pytest.raises(GraphError, match=r"(?m)^1 is in training mode$"):
        fold_batchnorm(module)


def test_a_variance_of_zero_or_a_little_below_is_not_refused_while_epsilon_covers_it():
    module = broken("running_var", -5e-6)
    assert folding_error(module, torch.randn(2, 1, 8, 8)) < EXACT


def test_what_cannot_be_copied_says_so():
    """The old weight_norm keeps a computed tensor where a parameter was."""
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(module[0])
    with pytest.raises(GraphError, match="cannot copy Sequential: Only Tensors created explicitly"):
        fold_batchnorm(module)


def test_a_network_of_mixed_types_is_refused():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3).half()).eval()
    with pytest.raises(GraphError, match=r"mixes torch\.float16, torch\.float32"):
        fold_batchnorm(module)


def test_the_result_is_a_module_that_torch_fx_can_still_work_with(tiny_module):
    folded = fold_batchnorm(tiny_module).module
    assert isinstance(folded, fx.GraphModule)
    folded.graph.lint()
