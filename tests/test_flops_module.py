"""PyTorch modules counted, against torch's own counter, the exported graph, and hand counts."""

from __future__ import annotations

from copy import deepcopy

import onnx
import pytest
import torch
from conftest import TinyModel, refused
from test_flops import NETS
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from exporter.errors import InputRefused
from exporter.flops import count_flops, count_module
from exporter.fold import fold_batchnorm


class Written(nn.Module):
    """A module that is the function it is given."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def ops(cost) -> list[str]:
    return [layer.op for layer in cost.layers]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("net", "x", "_"), NETS.values(), ids=NETS)
def test_torchs_own_counter_finds_as_many(net, x, _, device):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(1, *x))
    cost = count_module(deepcopy(net).to(device), x)
    assert cost.flops == counter.get_total_flops() > 0
    assert cost.parameters == sum(p.numel() for p in net.parameters())
    assert cost.uncounted == {}


def test_a_folded_network_counts_as_its_exported_graph(tiny_module, tiny_onnx):
    module = fold_batchnorm(tiny_module).module
    ours, graphs = count_module(module, (1, 32, 32)), count_flops(onnx.load(tiny_onnx.path))
    weighted = ("Conv", "Gemm")
    assert [(c.name, c.macs, c.output_shape) for c in ours.layers if c.macs] == [
        (c.name, c.macs, c.output_shape) for c in graphs.layers if c.op in weighted
    ]
    assert ours.peak_bytes == graphs.peak_bytes
    convolutions = [
        [(c.read_bytes, c.activation_bytes, c.alive_bytes) for c in cost.layers if c.macs]
        for cost in (ours, graphs)
    ]
    assert convolutions[0] == convolutions[1]


def test_a_batchnorm_reads_its_statistics_which_are_no_parameters():
    net = nn.Sequential(nn.BatchNorm2d(4))
    (layer,) = count_module(net, (4, 3, 3)).layers
    assert (layer.parameters, layer.weight_bytes) == (8, 64)
    assert layer.read_bytes == 4 * 36 + 64


def test_a_view_moves_nothing_and_holds_nothing():
    net = Written(lambda x: x.flatten(1).unsqueeze(1)[:, :, 2:].transpose(1, 2) * 2)
    cost = count_module(net, (1, 2, 5))
    assert ops(cost) == ["mul"]
    assert cost.layers[0].read_bytes == 4 * 8  # of the ten, two are sliced off
    assert cost.peak_bytes == 4 * 10 + 4 * 8  # and held all the same


def test_what_is_computed_in_place_is_moved_and_not_held_twice():
    net = Written(lambda x: functional.relu(x * 2, inplace=True) + 1)
    cost = count_module(net, (1, 2, 5))
    assert ops(cost) == ["mul", "relu", "add"]
    assert [layer.activation_bytes for layer in cost.layers] == [40, 40, 40]
    assert [layer.alive_bytes for layer in cost.layers] == [80, 40, 80]


def test_what_is_written_into_a_part_of_a_tensor_is_free_and_held_once():
    def shifted(x):
        y = torch.zeros(1, 2, 5)
        y[:, 1:] = x[:, :1]
        return y + 1

    cost = count_module(Written(shifted), (2, 5))
    assert cost.uncounted == {}
    assert ops(cost) == ["zeros", "setitem", "add"]
    assert [layer.alive_bytes for layer in cost.layers] == [80, 80, 80]


def test_a_dropout_that_is_off_is_nothing():
    assert count_module(nn.Sequential(nn.Dropout()), (3,)).layers == ()


def test_a_call_is_named_after_the_innermost_module_that_makes_it():
    cost = count_module(TinyModel().module(), (1, 32, 32))
    names = [layer.name for layer in cost.layers]
    assert names[:2] == ["block1.0", "block1.1/relu"]
    assert {"block2.0.relu/relu", "block2.0.relu/relu.2", "block2.0/add"} <= set(names)
    assert len(set(names)) == len(names)


def test_a_function_of_unknown_cost_is_named_and_not_zero_in_silence():
    net = Written(lambda x: torch.erf(torch.erf(x)) + torch.special.gammaln(x))
    cost = count_module(net, (3,))
    assert cost.uncounted == {"erf": 2, "special_gammaln": 1}


def test_a_product_whose_bias_comes_first_counts_the_same():
    weight, bias = torch.ones(5, 7), torch.ones(7)
    cost = count_module(Written(lambda x: torch.addmm(bias, x, weight)), (5,))
    assert cost.macs == 35


def test_weights_that_two_layers_share_are_stored_once():
    layer = nn.Linear(5, 5, bias=False)
    cost = count_module(nn.Sequential(layer, layer), (5,))
    assert (cost.macs, cost.parameters, cost.weight_bytes) == (50, 25, 100)


def test_the_module_is_left_as_it_was():
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Sequential(nn.ReLU(), nn.ReLU()).eval()).train()
    net[1][0].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    training = [part.training for part in net.modules()]
    count_module(net, (1, 4, 4))
    assert [part.training for part in net.modules()] == training
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_a_module_of_halves_is_counted_in_halves():
    cost = count_module(nn.Sequential(nn.Conv2d(1, 2, 3)).half(), (1, 8, 8))
    assert (cost.weight_bytes, cost.activation_bytes) == (2 * 20, 2 * 72)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32), (1, 32, 32, 32)])
def test_a_shape_that_the_network_does_not_take_is_refused(shape):
    with refused(InputRefused, "tiny cannot take an input of", " × ".join(map(str, shape))):
        count_module(TinyModel().module(), shape, name="tiny")
