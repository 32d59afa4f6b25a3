"""Claims: verdicts from figures, and the figures against hand counts and published ones."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from exporter.claims import check_claims, costs, gradients, layers
from exporter.claims.summary import summarise
from exporter.claims.verdicts import of_parts, rounds_to
from exporter.cli import main
from exporter.models.resnet18 import ResNet18
from exporter.records import Claim, Claims, Gradients
from exporter.renderers import claims as renderer


@pytest.mark.parametrize(
    ("found", "said", "right"),
    [
        (15.47, "15.5", True),
        (15.451, "15.5", True),
        (15.449, "15.5", False),
        (30.94, "15.5", False),
        (138.357544, "138", True),
        (123.642856, "122", False),
        (122.49, "122", True),
        (122.6, "122", False),
    ],
)
def test_a_figure_is_what_was_said_to_the_digits_that_were_said(found, said, right):
    assert rounds_to(found, said) == right


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ([True], "holds"),
        ([True, True], "holds"),
        ([True, False], "holds in part"),
        ([False, False], "does not hold"),
    ],
)
def test_a_claim_holds_where_all_its_parts_do(parts, verdict):
    assert of_parts(parts) == verdict


# ── Costs ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def of_costs() -> dict[str, Claim]:
    return {claim.says: claim for claim in costs.check()}


def test_vgg16_needs_15_5_g_multiply_accumulates_and_twice_the_flops(of_costs):
    claim = of_costs["VGG-16 needs 15.5 G FLOPs at 224×224"]
    assert claim.figures == {"macs": 15_470_264_320, "flops": 30_940_528_640}
    assert claim.verdict == "holds in part"
    assert "15.47 G multiply-accumulates" in claim.measured


def test_the_formula_gives_what_pytorch_counts(of_costs):
    claim = of_costs["the arithmetic is Σ K²·C_in·C_out·H·W over the layers"]
    assert claim.verdict == "holds"
    assert claim.figures["ResNet-18 by formula"] == 839_269_952


def test_the_linear_layers_have_124_m_parameters_and_not_over_90_percent(of_costs):
    assert of_costs["VGG-16 has 138 M parameters"].verdict == "holds"
    count = of_costs["122 M of them are in its three linear layers"]
    by_hand = 25088 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    assert count.figures == {"linear parameters": by_hand}
    assert count.verdict == "does not hold"
    share = of_costs["that is over 90 % of them"]
    assert share.verdict == "does not hold"
    assert share.figures["share"] == pytest.approx(by_hand / 138_357_544)
    assert share.figures["ResNet-18's share"] == pytest.approx(5130 / 11_178_378)


def test_the_linear_layers_are_a_cost_of_memory_and_not_of_arithmetic(of_costs):
    claim = of_costs["the three linear layers of VGG-16 cost a huge amount"]
    macs = 25088 * 4096 + 4096 * 4096 + 4096 * 1000
    assert claim.figures["share of MACs"] == pytest.approx(macs / 15_470_264_320)
    assert claim.figures["share of weight bytes"] == pytest.approx(0.8936, abs=1e-4)
    assert claim.verdict == "holds in part"


def test_an_average_pool_saves_what_the_linear_layers_had(of_costs):
    claim = of_costs["an adaptive average pool in place of the linear layers saves parameters"]
    assert claim.figures["parameters after"] == 14_714_688 + 512 * 1000 + 1000
    assert claim.verdict == "holds"


# ── Layers ──────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def of_layers() -> dict[str, Claim]:
    return {claim.says: claim for claim in layers.check()}


def test_a_pool_gives_one_size_and_linear_layers_take_one_size(of_layers):
    claim = of_layers["adaptive average pooling gives outputs of one size for inputs of any size"]
    assert claim.figures == {"output sizes": 1, "taken with": 4, "without": 1}
    assert claim.verdict == "holds"


def test_every_batchnorm_of_the_network_is_an_affine_map(of_layers):
    claim = of_layers["at inference BatchNorm is one affine map per channel"]
    assert (claim.figures["folded"], claim.figures["of"]) == (17, 17)
    assert claim.verdict == "holds"


def test_a_batchnorm_can_be_undone(of_layers):
    claim = of_layers["with its γ and β a BatchNorm can undo its normalisation"]
    assert claim.verdict == "holds"
    assert claim.figures["error before"] > 0.1


def test_a_sum_leaves_channels_and_a_concatenation_adds_them_up(of_layers):
    both = of_layers["x + y needs equal shapes, and leaves them as they are"]
    assert both.figures == {"channels": 64, "takes twice as many": False, "takes one": True}
    assert both.verdict == "holds in part"
    assert of_layers["torch.cat adds up the channels"].figures == {
        "channels": 192,
        "GoogLeNet's": 256,
    }


def test_a_concatenation_costs_twice_and_can_compute_the_sum(of_layers):
    claim = of_layers["neither join can stand for the other"]
    parameters, macs = 64 * 64 * 9, 64 * 64 * 9 * 38 * 38
    assert claim.figures["parameters behind the sum"] == parameters
    assert claim.figures["MACs behind the concatenation"] == 2 * macs
    assert claim.figures["error"] < 1e-12
    assert claim.verdict == "holds in part"


# ── Gradients ───────────────────────────────────────────────────────────────────────


def test_a_gradient_is_the_product_of_the_jacobians_behind_it():
    """Scalars: L = −log softmax(w₃·relu(w₂·w₁·x)), so ∂L/∂h₂ = w₃ᵀ(p − y), ∂L/∂h₁ = w₂·∂L/∂h₂."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        for layer, weight in ((net[0], [[2.0]]), (net[1], [[0.5]]), (net[3], [[1.0], [3.0]])):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.zero_()
    found = gradients.measure("net", net, torch.tensor([[1.0]]), torch.tensor([0]))
    p = 1 / (1 + math.exp(-(3 - 1)))  # of the second class, at h₂ = 1
    assert found.layers == ("0", "1", "3")
    assert found.norms == pytest.approx((0.5 * 2 * p, 2 * p, math.hypot(p, p)), rel=1e-6)
    assert found.first_to_last == pytest.approx(0.5 * 2 / math.sqrt(2), rel=1e-6)


def test_every_weighted_layer_is_measured_once():
    torch.manual_seed(0)
    found = gradients.measure(
        "ResNet-18", ResNet18().module(), torch.randn(4, 1, 32, 32), torch.arange(4)
    )
    assert len(found.layers) == len(set(found.layers)) == 21
    assert (found.layers[0], found.layers[-1]) == ("block1.0", "block6.2")
    assert all(norm > 0 for norm in found.norms)


def test_a_network_without_shortcuts_computes_its_branches_alone():
    torch.manual_seed(0)
    net = gradients._residual(shortcuts=False).double().eval()
    block, x = net.get_submodule("block2.0"), torch.randn(2, 64, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        branch = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
        assert torch.equal(block(x), branch.relu())


def test_the_networks_differ_in_what_their_names_say():
    made = {name: build() for name, build in gradients.NETWORKS.items()}

    def count(name, kind):
        return sum(isinstance(part, kind) for part in made[name].modules())

    assert count(gradients.PLAIN, nn.ReLU) == count(gradients.SIGMOID, nn.Sigmoid) == 18
    assert count(gradients.SIGMOID, nn.ReLU) == 0
    assert count(gradients.RESIDUAL, nn.BatchNorm2d) == 17
    assert count(gradients.NO_BATCHNORM, nn.BatchNorm2d) == 0
    variance = made[gradients.PLAIN_HE].features[2].weight.var().item()
    assert variance == pytest.approx(2 / (64 * 9), rel=0.05)
    doubled = made[gradients.DOUBLED].features[2].weight.var().item()
    assert doubled == pytest.approx(8 / (64 * 9), rel=0.05)


def judged(**ratios: float) -> dict[str, str]:
    names = dict.fromkeys(gradients.NETWORKS, 1.0) | {
        getattr(gradients, name): ratio for name, ratio in ratios.items()
    }
    found = [Gradients(name, ("a", "b"), (ratio, 1.0)) for name, ratio in names.items()]
    return {claim.says: claim.verdict for claim in gradients.judge(found)}


def test_verdicts_follow_from_how_much_of_the_gradient_is_left():
    vanishes = "in deep plain networks the gradient vanishes towards the first layers"
    assert judged(PLAIN=1e-8, PLAIN_HE=1e-5)[vanishes] == "holds"
    assert judged(PLAIN=1e-8)[vanishes] == "holds in part"
    assert judged()[vanishes] == "does not hold"
    explodes = "with factors below 1, as sigmoids have, it vanishes; above 1 it explodes"
    assert judged(SIGMOID=1e-9, DOUBLED=1e5)[explodes] == "holds"
    keep = "residual networks keep it"
    assert judged(RESIDUAL=0.1)[keep] == "holds"
    assert judged(RESIDUAL=1e-6)[keep] == judged(RESIDUAL=1e6)[keep] == "does not hold"
    shortcuts = "it is the shortcuts that let it through"
    assert judged(NO_SHORTCUTS=1e-6, NEITHER=1e-9)[shortcuts] == "holds"
    assert judged(NEITHER=1e-9)[shortcuts] == "holds in part"


# ── The layer table, as torchsummary 1.5.1 printed it ───────────────────────────────

SMALL = """\
----------------------------------------------------------------
        Layer (type)               Output Shape         Param #
================================================================
            Conv2d-1              [-1, 4, 6, 6]              36
       BatchNorm2d-2              [-1, 4, 6, 6]               8
             PReLU-3              [-1, 4, 6, 6]               1
           Flatten-4                  [-1, 144]               0
            Linear-5                    [-1, 3]             435
================================================================
Total params: 480
Trainable params: 444
Non-trainable params: 36
----------------------------------------------------------------
Input size (MB): 0.00
Forward/backward pass size (MB): 0.00
Params size (MB): 0.00
Estimated Total Size (MB): 0.01
----------------------------------------------------------------
"""
SUMS = """\
================================================================
Total params: 11,178,378
Trainable params: 11,178,378
Non-trainable params: 0
----------------------------------------------------------------
Input size (MB): 0.19
Forward/backward pass size (MB): 28.51
Params size (MB): 42.64
Estimated Total Size (MB): 71.34
----------------------------------------------------------------
"""


def test_a_table_reads_as_torchsummary_prints_it():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.PReLU(),
        nn.Flatten(),
        nn.Linear(144, 3),
    )
    net[0].weight.requires_grad = False
    assert summarise(net, (1, 8, 8)) == SMALL


def test_the_documents_network_has_the_rows_and_sums_that_torchsummary_prints():
    said = summarise(ResNet18().module(), (1, 224, 224))
    assert said.endswith(SUMS)
    rows = said.split("=" * 64 + "\n")[1].splitlines()
    assert len(rows) == 66
    assert rows[0].split() == ["Conv2d-1", "[-1,", "64,", "75,", "75]", "3,200"]
    assert rows[23].split() == ["Conv2d-24", "[-1,", "128,", "19,", "19]", "8,320"]
    assert rows[63].split() == ["AdaptiveAvgPool2d-64", "[-1,", "512,", "1,", "1]", "0"]


# ── All of it ───────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def found() -> Claims:
    return check_claims()


def test_what_would_take_training_is_listed_and_not_checked(found):
    unchecked = [claim for claim in found.claims if claim.verdict == "not checked"]
    assert len(unchecked) == 3
    assert all("training" in claim.measured and not claim.figures for claim in unchecked)


def test_gradients_vanish_in_vgg19_as_pytorch_initialises_and_in_no_resnet18(found):
    left = {one.network: one.first_to_last for one in found.gradients}
    assert left[gradients.PLAIN] < 1e-5
    assert left[gradients.RESIDUAL] > 1e-1
    assert left[gradients.NEITHER] < 1e-5 < 1e-3 < left[gradients.NO_BATCHNORM]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_command_prints_them(found, options, monkeypatch):
    monkeypatch.setattr("exporter.claims.check_claims", lambda **_: found)
    done = CliRunner().invoke(main, ["claims", *options])
    assert done.exit_code == 0
    expected = renderer.render_json(found) if options else renderer.render(found)
    assert done.stdout == expected


def test_every_claim_is_in_the_text_and_every_figure_in_the_json(found):
    said = " ".join(renderer.render(found).split())
    for claim in found.claims:
        assert claim.verdict in said
        assert claim.says.split()[0] in said
    for one in found.gradients:
        assert one.network in said
        assert f"{one.norms[0]:.1e}" in said
    table = json.loads(renderer.render_json(found))
    assert len(table["claims"]) == len(found.claims)
    assert table["gradients"][0]["first_to_last"] == found.gradients[0].first_to_last
    assert table["summary"].endswith(SUMS)
