"""Weights: loaded exactly, or refused by name, and a refusal leaves the network as it was."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from conftest import disturb, refused
from safetensors.torch import save_file
from torch import nn

from exporter.checkpoints import Checkpoint
from exporter.contracts import silent
from exporter.errors import InputRefused
from exporter.job import Job
from exporter.weights import Loaded, fit_weights, load_weights


def network(seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Linear(width, 2))
    return disturb(layers, seed).eval()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def state(seed: int = 1) -> dict[str, torch.Tensor]:
    return dict(network(seed).state_dict())


@pytest.fixture
def refuse(path):
    """Return a function that loads ``path``, expects a refusal, and an untouched network."""

    def load(*words: str, hint: tuple[str, ...] | None = (), file=path):
        module = network()
        before = {key: value.clone() for key, value in module.state_dict().items()}
        with refused(InputRefused, file.name, *words, hint=hint):
            load_weights(module, file)
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())

    return load


# ── What is loaded ──────────────────────────────────────────────────────────────────


def test_float32_weights_load_bit_for_bit_and_the_files_hash_comes_back(path):
    save_file(state(), path)
    module = network()
    loaded = load_weights(module, path)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.format == "safetensors, which has no checksum"
    assert loaded.changes == ()
    want = state()
    assert all(torch.equal(value, want[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_load_exactly(path, dtype):
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state().items()}
    save_file(stored, path)
    module = network()
    load_weights(module, path)
    for key, value in module.state_dict().items():
        assert value.dtype == (torch.float32 if stored[key].is_floating_point() else torch.int64)
        assert torch.equal(value.double(), stored[key].double())


def test_every_finite_half_is_a_float32(path):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16)
    halves = halves[halves.isfinite()]
    assert len(halves) == 2 * 31 * 1024
    save_file({"weight": halves[None].contiguous()}, path)
    module = nn.Linear(len(halves), 1, bias=False)
    load_weights(module, path)
    assert torch.equal(module.weight.data[0].double(), halves.double())


def test_the_order_of_the_keys_and_extra_metadata_do_not_matter(path):
    save_file(dict(reversed(state().items())), path, {"trained": "yes"})
    module = network()
    load_weights(module, path)
    assert torch.equal(module.state_dict()["0.weight"], state()["0.weight"])


# ── What is refused ─────────────────────────────────────────────────────────────────


def test_a_file_that_is_not_there_is_refused(refuse):
    refuse("no such weights file")


def test_a_folder_is_refused(refuse, path):
    path.mkdir()
    refuse("not a file, so it holds no weights")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.004, 0.01, 0.05, 0.5, 0.9, 0.999])
def test_a_file_cut_short_anywhere_is_refused(refuse, path, share):
    save_file(state(), path)
    whole = path.read_bytes()
    path.write_bytes(left := whole[: int(share * len(whole))])
    if not left:
        refuse("an empty file", hint=("fetch it again",))
    elif len(left) <= 8:  # the header's length alone
        refuse("truncated, damaged or of no format that is known here")
    else:
        refuse("a safetensors file that is", hint=("fetch it again",))


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"these are not weights\n", "a text file"),
        (b"\0" * 100, "nothing but zeros at its beginning"),
        (header(b"{}", 1 << 60), "truncated, damaged or of no format that is known here"),
        (header(b"[]"), "truncated, damaged or of no format that is known here"),
        (header(b"{"), "a safetensors file whose header is damaged"),
        (header(b"{}", 1 << 30), "a safetensors file that is cut short: its header has 1,073,741,"),
        (
            header(
                json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}).encode()
            ),
            "a safetensors file that is truncated or damaged",
        ),
        (
            header(
                json.dumps({"a": {"dtype": "F33", "shape": [], "data_offsets": [0, 4]}}).encode()
            )
            + b"\0" * 4,
            "a safetensors file that is truncated or damaged",
        ),
        (header(b'{"a": ' * 100_000), "a safetensors file whose header is damaged"),
        (
            header(
                b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
                b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
            )
            + b"\0" * 4,
            "its header has the name 'a' twice",
        ),
    ],
)
def test_what_is_no_safetensors_file_is_refused_for_what_it_is(refuse, path, data, said):
    path.write_bytes(data)
    refuse(said)


def test_one_byte_too_many_is_refused(refuse, path):
    save_file(state(), path)
    path.write_bytes(path.read_bytes() + b"\0")
    refuse("a safetensors file that is truncated or damaged")


def test_another_networks_weights_are_refused_with_the_first_keys_that_differ(refuse, path):
    save_file({f"fc{i}.weight": torch.ones(1) for i in range(7)}, path)
    refuse(
        "not this network's weights",
        "lacks '0.weight', '0.bias', '1.weight', '1.bias', '1.running_mean', '1.running_var',",
        "has unknown 'fc0.weight', 'fc1.weight', 'fc2.weight', 'fc3.weight', 'fc4.weight',",
        hint=("'0.weight' may be its 'fc0.weight'",),
    )


def test_an_empty_file_of_weights_is_another_networks(refuse, path):
    save_file({}, path)
    refuse("not this network's weights", "lacks '0.weight'")


def test_a_missing_key_is_named(refuse, path):
    weights = state()
    del weights["1.running_var"]
    save_file(weights, path)
    refuse("not this network's weights: it lacks '1.running_var'")


def test_an_extra_key_is_named(refuse, path):
    save_file({**state(), "3.weight": torch.ones(2)}, path)
    refuse("not this network's weights: it has unknown '3.weight'")


@pytest.mark.parametrize("shape", [(4, 1, 3, 2), (4, 9), (36,), (4, 1, 3, 3, 1), ()])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(refuse, path, shape):
    save_file({**state(), "0.weight": torch.ones(shape)}, path)
    refuse("not this network's weights", f"0.weight is {shape}, needs (4, 1, 3, 3)")


def test_a_wider_network_is_refused_by_its_first_shapes(refuse, path):
    save_file(dict(network(width=8).state_dict()), path)
    refuse("0.weight is (8, 1, 3, 3), needs (4, 1, 3, 3)", "; 2.weight is (2, 8), needs (2, 4)")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["0.weight", "1.running_var", "2.bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_tensor(refuse, path, key, bad, dtype):
    weights = state()
    weights[key] = weights[key].to(dtype)
    weights[key].view(-1)[1] = bad
    save_file(weights, path)
    refuse(f"tensor {key!r} holds 1 values that are NaN or infinite")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "float64"),
        (torch.int32, "int32"),
        (torch.int8, "int8"),
        (torch.uint8, "uint8"),
        (torch.bool, "bool"),
        (torch.float8_e4m3fn, "float8_e4m3fn"),
        (torch.complex64, "complex64"),
    ],
)
def test_weights_of_a_type_that_is_not_taken_are_refused_by_tensor_and_type(
    refuse, path, dtype, name
):
    weights = state()
    weights["2.bias"] = torch.ones(2).to(dtype)
    save_file(weights, path)
    refuse("tensor '2.bias'", name, hint=("float32, float16 or bfloat16",))


def test_integers_are_not_rounded_into_float_weights(refuse, path):
    save_file({**state(), "2.bias": torch.tensor([(1 << 24) + 1, 3])}, path)
    refuse("tensor '2.bias' is int64")


def test_fractions_are_not_cut_off_into_integer_buffers(refuse, path):
    save_file({**state(), "1.num_batches_tracked": torch.tensor(2.5)}, path)
    refuse("tensor '1.num_batches_tracked' is float32")


# ── Names ───────────────────────────────────────────────────────────────────────────


def fit(tensors: dict, module: nn.Module | None = None) -> tuple[nn.Module, Loaded]:
    """Load nested dicts of tensors as those of a checkpoint, and return the network and what was.

    The network must have the weights of `state` then, or of ``module``'s own kind.
    """
    module = module or network()
    return module, fit_weights(module, Checkpoint("net.pth", "12" * 32, "a file", flat(tensors)))


def flat(held: dict, *outer: str) -> dict[tuple[str, ...], torch.Tensor]:
    found = {}
    for key, value in held.items():
        found |= flat(value, *outer, key) if isinstance(value, dict) else {(*outer, key): value}
    return found


def under(prefix: str, more: dict | None = None) -> dict[str, torch.Tensor]:
    return {**{prefix + key: value for key, value in state().items()}, **(more or {})}


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("held", "changes"),
    [
        (under(""), ()),
        (under("module."), ("'module.' taken off 9 names",)),
        (under("model."), ("'model.' taken off 9 names",)),
        (under("_orig_mod."), ("'_orig_mod.' taken off 9 names",)),
        (
            under("module._orig_mod."),
            ("'module.' taken off 9 names", "'_orig_mod.' taken off 9 names"),
        ),
        (
            under("module.", {"n_averaged": ONE}),
            ("'module.' taken off 9 names, n_averaged left out",),
        ),
        ({"state_dict": under("")}, ("taken from its ['state_dict']",)),
        ({"model": under(""), "rng": ONE}, ("taken from its ['model']",)),
        ({"ema": {"module": under("")}}, ("taken from its ['ema']['module']",)),
        (
            {"state_dict": under("model.")},
            ("taken from its ['state_dict']", "'model.' taken off 9 names"),
        ),
        (
            {"state_dict": under(""), "best": {"0.weight": ONE}},
            ("taken from its ['state_dict']",),
        ),
        (
            {k: v for k, v in under("").items() if "tracked" not in k},
            ("it lacks num_batches_tracked, which no inference reads: 0 in 1 layers",),
        ),
        (
            under("", {"aux1.fc.weight": ONE, "aux2.fc.weight": ONE}),
            ("2 tensors left out, that training alone reads: 'aux1.fc.weight', 'aux2.fc.weight'",),
        ),
    ],
)
def test_a_known_wrapper_is_taken_off_and_stated(held, changes):
    module, loaded = fit(held)
    assert loaded == Loaded("12" * 32, "a file", changes)
    for key, value in module.state_dict().items():
        untracked = "tracked" in key and "tracked, which no" in " ".join(changes)
        assert torch.equal(value, torch.zeros_like(value) if untracked else state()[key])


def test_a_network_whose_own_names_have_a_known_prefix_takes_them_as_they_are():
    wrapped = nn.ModuleDict({"model": network()})
    module, loaded = fit(under("model."), wrapped)
    assert loaded.changes == ()
    assert torch.equal(module["model"][0].weight, state()["0.weight"])


def test_the_names_of_torchvisions_older_densenet_are_brought_up_to_date():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.conv1 = nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1, bias=False)

    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return disturb(nn.ModuleDict({"denselayer1": Layer(), "norm5": nn.BatchNorm2d(2)}), seed)

    wanted = net(1).state_dict()
    old = {key.replace("norm1", "norm.1").replace("conv1", "conv.1"): wanted[key] for key in wanted}
    module, loaded = fit({k: v for k, v in old.items() if "tracked" not in k}, net(0))
    assert loaded.changes == (
        "5 names of torchvision's older DenseNet renamed",
        "it lacks num_batches_tracked, which no inference reads: 0 in 2 layers",
    )
    assert torch.equal(module["denselayer1"].conv1.weight, wanted["denselayer1.conv1.weight"])
    assert torch.equal(module["denselayer1"].norm1.bias, wanted["denselayer1.norm1.bias"])


@pytest.mark.parametrize(
    ("held", "words", "hint"),
    [
        (
            {"state_dict": under(""), "state_dict_ema": under("")},
            "2 times: taken from its ['state_dict']; or taken from its ['state_dict_ema']",
            "say which are meant with --weights-key, 'state_dict' or 'state_dict_ema'",
        ),
        (
            {**under("model."), **under("ema.")},
            "2 times: 'model.' taken off 9 names; or 'ema.' taken off 9 names",
            "--weights-key, 'model' or 'ema'",
        ),
        (
            {**under(""), "ema": under("module.")},
            "2 times: as they are; or taken from its ['ema'], ",
            "--weights-key, '.' or 'ema.module'",
        ),
        (
            {"ema.module": under(""), "ema": {"module": under("")}},
            "2 times: taken from its ['ema.module']; or taken from its ['ema']['module']",
            "save the ones that are meant alone",
        ),
    ],
)
def test_weights_that_are_in_a_file_twice_are_refused_with_where_and_their_keys(held, words, hint):
    with refused(InputRefused, "net.pth: this network's weights are in it", words, hint=(hint,)):
        fit(held)


def of_seed(seed: int, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state(seed).items()}


TIMM = {"state_dict": of_seed(1), "state_dict_ema": of_seed(2), "epoch": ONE}
TORCHVISION = {
    "model": of_seed(1),
    "model_ema": of_seed(2, "module.") | {"n_averaged": ONE},
    "optimizer": {"state": {"0": {"momentum_buffer": ONE}}},
}
FLAT = {**of_seed(1, "model."), **of_seed(2, "ema.")}
BESIDE = {**of_seed(1), "ema": of_seed(2, "module.")}
NESTED = {"ema": {**of_seed(2), "module": of_seed(1)}}


@pytest.mark.parametrize(
    ("held", "asked", "seed", "key", "others"),
    [
        (TIMM, "state_dict", 1, "state_dict", "'state_dict_ema'"),
        (TIMM, "state_dict_ema", 2, "state_dict_ema", "'state_dict'"),
        (TORCHVISION, "model", 1, "model", "'model_ema.module'"),
        (TORCHVISION, "model_ema", 2, "model_ema.module", "'model'"),
        (TORCHVISION, "model_ema.module", 2, "model_ema.module", "'model'"),
        (FLAT, "model", 1, "model", "'ema'"),
        (FLAT, "ema", 2, "ema", "'model'"),
        (BESIDE, ".", 1, ".", "'ema.module'"),
        (BESIDE, "ema", 2, "ema.module", "'.'"),
        (NESTED, "ema", 2, "ema", "'ema.module'"),
        (NESTED, "ema.module", 1, "ema.module", "'ema'"),
    ],
)
def test_of_weights_that_are_there_twice_those_by_the_key_are_taken_and_the_others_named(
    held, asked, seed, key, others
):
    module = network()
    loaded = fit_weights(module, Checkpoint("net.pth", "12" * 32, "a file", flat(held)), key=asked)
    assert all(torch.equal(v, state(seed)[k]) for k, v in module.state_dict().items())
    assert loaded.key == key
    assert loaded.changes[0] == (
        f"'{key}' was asked for, and not {others}, which would fit as well"
    )


def test_a_key_of_the_only_weights_is_no_mistake():
    module = network()
    held = Checkpoint("net.pth", "12" * 32, "a file", flat({"ema": of_seed(2)}))
    loaded = fit_weights(module, held, key="ema")
    assert (loaded.key, loaded.changes[0]) == ("ema", "'ema' was asked for")
    assert torch.equal(module[0].weight, state(2)["0.weight"])


@pytest.mark.parametrize(
    ("held", "key", "words", "hint"),
    [
        (TIMM, "ema", "have the key 'ema', only 'state_dict', 'state_dict_ema', '.'", None),
        (TIMM, "state_dict_em", "have the key 'state_dict_em', only", "mean 'state_dict_ema'?"),
        (TIMM, "", "have the key '', only", None),
        (FLAT, "ema.", "have the key 'ema.', only 'model', 'ema', '.'", "mean 'ema'?"),
        (TORCHVISION, "optimizer", "it lacks '0.weight'", None),
        (
            {"ema": {"a": of_seed(1), "b": of_seed(2)}, "model": of_seed(3)},
            "ema",
            "2 times by the key 'ema': taken from its ['ema']['a']; or taken",
            "'ema.a' or 'ema.b'",
        ),
    ],
)
def test_a_key_that_names_no_weights_or_several_is_refused_with_those_there_are(
    held, key, words, hint
):
    module = network()
    said = None if hint is None else (hint,)
    with refused(InputRefused, "net.pth: ", words, hint=said):
        fit_weights(module, Checkpoint("net.pth", "12" * 32, "a file", flat(held)), key=key)
    assert torch.equal(module[0].weight, network()[0].weight)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (under("", {"head.weight": ONE}), "it has unknown 'head.weight'"),
        (under("backbone."), "it lacks '0.weight', "),
        (
            {"state_dict": under("module.", {"module.head.weight": ONE})},
            "(taken from its ['state_dict'], 'module.' taken off 10 names): it has unknown 'head.w",
        ),
        (under("module.", {"head.weight": ONE}), "it lacks '0.weight', "),
        (
            under("", {"aux1.fc.weight": ONE, "head.weight": ONE}),
            "it has unknown 'aux1.fc.weight', 'head.weight'",
        ),
        (
            {k: v for k, v in under("").items() if k not in ("1.num_batches_tracked", "2.bias")},
            "it lacks '1.num_batches_tracked', '2.bias'",
        ),
        ({"0.weight": {"0.weight": ONE}}, "it lacks '0.bias'"),
        ({}, "it lacks '0.weight'"),
    ],
)
def test_what_no_known_wrapper_explains_is_refused(held, words):
    with refused(InputRefused, "net.pth: not this network's weights", words):
        fit(held)


def test_twenty_differences_are_shown_and_the_rest_counted():
    many = {f"layer{i}.weight": ONE for i in range(40)}
    with pytest.raises(InputRefused) as caught:
        fit(many)
    said = str(caught.value)
    assert said.count("layer") == 11  # nine are lacking
    assert said.endswith("'layer10.weight' and 29 more")


def test_the_nearest_names_are_said():
    held = under("")
    held["0.wieght"] = held.pop("0.weight")
    held["1.runing_mean"] = held.pop("1.running_mean")
    said = ("'0.weight' may be its '0.wieght'", "'1.running_mean' may be its '1.runing_mean'")
    with refused(InputRefused, "it lacks '0.weight', '1.running_mean'", hint=said):
        fit(held)


def test_sizes_that_no_memory_holds_are_refused_by_shape():
    held = under("")
    held["2.bias"] = torch.empty(0, 1 << 62)
    with refused(InputRefused, "2.bias is (0, 4611686018427387904), needs (2,)", hint=None):
        fit(held)


HOSTILE = [
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "a\0b",
        "a\nb",
        "a\r\nb",
        "\x1b[31mred\x1b[0m",
        "\x1b]0;t\a",
    ),
    *(
        "<script>alert(1)</script>",
        "a|b|c",
        "`a`",
        "[a](http://b)",
        "\u202egnp.exe",
        "\u2066a\u2069",
    ),
    *("x" * 10_000, "a\udcffb", "-rf", "=cmd()", "%s%n", "\u200b", "\u0000\u0007", "é模型🚀"),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_shown_on_one_line_short_and_with_nothing_hidden(name):
    for held in (
        {**under(""), name: ONE},
        {name: under("module.")},
        {name: under(""), "ema": under("")},
    ):
        try:
            said = " ".join(fit(held)[1].changes)
        except InputRefused as error:
            said = f"{error} {error.hint}"
        assert name[:3] in said or repr(name)[1:4] in said
        assert said.isprintable()
        assert len(said) < 1000


def test_the_report_records_the_files_name_digest_and_kind_and_what_came_off_but_not_its_folder(
    tiny_module, tiny_model, quick_profile, tmp_path
):
    path = tmp_path / "secret" / "net.safetensors"
    path.parent.mkdir()
    save_file({f"module.{k}": v for k, v in tiny_module.state_dict().items()}, path)
    source = Job.resolve(
        tiny_model,
        quick_profile,
        weights=path,
        input_shape=None,
        calibration=None,
        progress=silent,
        builds=False,
    ).source()
    assert source.weights == "net.safetensors"
    assert source.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.weights_format == "safetensors, which has no checksum"
    count = len(tiny_module.state_dict())
    assert source.weights_changes == (f"'module.' taken off {count} names",)
    assert "secret" not in str(source)
