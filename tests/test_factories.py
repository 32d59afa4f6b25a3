"""Networks of one's own: code that the command line names, and none that a file does."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import TinyModel, refused
from safetensors.torch import save_file

import exporter
from exporter import load_factory
from exporter.cli import main
from exporter.contracts import silent
from exporter.counting import count_all
from exporter.errors import InputRefused, ProfileError, UnknownName
from exporter.initial import digest, from_seed
from exporter.job import Job
from exporter.profile import load_profile
from exporter.recheck import check_bundle
from exporter.renderers import record

CODE = """
    import sys
    import torch
    from torch import nn

    ANSWER = 42

    class Net(nn.Module):
        def __init__(self, width=4, classes=3):
            super().__init__()
            self.conv = nn.Conv2d(3, width, 3, stride=2, bias=False)
            self.bn = nn.BatchNorm2d(width)
            self.fc = nn.Linear(width, classes)

        def forward(self, x):
            return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))

        @staticmethod
        def narrow(classes):
            return Net(1, classes)

    class Several(Net):
        def forward(self, x):
            y = super().forward(x)
            return {"logits": y, "twice": 2 * y} if self.fc.out_features == 3 else (y, y)

    class Dense(Net):
        def forward(self, x):
            return self.conv(x)

    class Flat(Net):
        def forward(self, x):
            return super().forward(x).flatten()

    class Two(Net):
        def forward(self, x, mask):
            return super().forward(x * mask)

    class Whole(Net):
        def forward(self, x):
            return super().forward(x).argmax(1)

    def make(width=4, *, classes=3):
        return Net(width, classes)

    def double():
        return Net().double()

    def infinite():
        net = Net()
        net.fc.bias.data[1] = float("inf")
        return net

    def anything(**given):
        return Net(**given)

    def another(width):
        torch.rand(1)
        return Net(width)

    def boom():
        raise RuntimeError("no luck.\\nmore")

    def leave():
        sys.exit(3)

    def nothing():
        return 3

    net = Net()
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("own") / "net.py"
    path.write_text(textwrap.dedent(CODE), "utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def _search_path(monkeypatch):
    """Give every test a search path and modules of its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def load(code: str, args=None, shape=(3, 16, 16)):
    return load_factory(code, args or {}, input_shape=shape)


def test_a_file_and_a_module_are_called_with_the_arguments(net, tmp_path, monkeypatch):
    (tmp_path / "given").mkdir()
    (tmp_path / "given/nets.py").write_text(Path(net).read_text("utf-8"), "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for code, said in ((f"{net}:make", "net.py:make"), ("given.nets:make", "given.nets:make")):
        model = load(code, {"width": 7, "classes": 5})
        assert (model.name, model.code) == ("make", f"{said}(width=7, classes=5)")
        assert (model.input.shape, model.output.shape) == ((3, 16, 16), (5,))
        module = model.module()
        assert module.conv.weight.shape == (7, 3, 3, 3)
        assert not module.training
        with torch.inference_mode():
            assert module(torch.zeros(4, 3, 16, 16)).shape == (4, 5)


def test_a_class_and_what_is_in_it_are_factories_too(net):
    assert load(f"{net}:Net").name == "Net"
    narrow = load(f"{net}:Net.narrow", {"classes": 2})
    assert (narrow.name, narrow.module().conv.out_channels) == ("narrow", 1)
    assert load(f"{net}:anything", {"width": 2}).module().conv.out_channels == 2


def test_what_is_drawn_at_random_is_so_from_a_seed_and_leaves_the_generator_alone(net):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, other = (load(f"{net}:make").module().state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_files_neighbours_are_found_and_hide_nothing(tmp_path):
    (tmp_path / "beside.py").write_text("from torch import nn\nmade = nn.Linear\n", "utf-8")
    (tmp_path / "json.py").write_text("raise RuntimeError('hidden')\n", "utf-8")
    sys.modules.pop("json", None)
    (tmp_path / "own.py").write_text(
        "import json\nfrom beside import made\nfrom torch import nn\n"
        "def make(): return nn.Sequential(nn.Flatten(), made(3 * 16, 2))\n",
        "utf-8",
    )
    assert load(f"{tmp_path}/own.py:make", shape=(3, 4, 4)).output.shape == (2,)


def test_the_current_folder_is_not_searched(tmp_path, monkeypatch):
    (tmp_path / "lying_around.py").write_text("raise SystemExit('run')\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with refused(InputRefused, "no module named 'lying_around'", hint=("net.py:factory",)):
        load("lying_around:make")


@pytest.mark.parametrize(
    ("code", "args", "kind", "said", "hint"),
    [
        ("{net}:mak", {}, UnknownName, "no factory in net.py named 'mak'", "'make'"),
        ("{net}:Net.wide", {}, UnknownName, "named 'wide'", "narrow"),
        ("{net}:make", {"widht": 3}, ProfileError, "net.py:make: model.args: unknown key 'widht'", "'width'"),
        ("{net}:Net.narrow", {}, ProfileError, "the key 'classes' is missing", "--set model.args.classes=…"),
        ("{net}:make", {"width": "x"}, InputRefused, "net.py:make raised TypeError: ", "--debug"),
        ("{net}:boom", {}, InputRefused, "net.py:boom raised RuntimeError: no luck", "--debug"),
        ("{net}:leave", {}, InputRefused, "net.py:leave raised SystemExit: 3", "--debug"),
        ("{net}:nothing", {}, InputRefused, "net.py:nothing gives an object of type int, and no torch.nn.Module", None),
        ("{net}:net", {}, InputRefused, "is a network, where a factory is needed", "in place of net"),
        ("{net}:ANSWER", {}, InputRefused, "is an object of type int, and no factory", None),
        ("{net}:double", {}, InputRefused, "tensor 'conv.weight' is float64", "network.float()"),
        ("{net}:Flat", {}, InputRefused, "gives a tensor of 6 for a batch of 2", "a module of your own"),
        ("{net}:Whole", {}, InputRefused, "gives a tensor of int64", "a module of your own"),
        ("{net}:Two", {}, InputRefused, "missing 1 required positional argument: 'mask'", "several inputs"),
        ("{net}:", {}, InputRefused, "names no factory", "package.module:factory"),
        (":make", {}, InputRefused, "':make' names no factory", "package.module:factory"),
        ("no where:make", {}, InputRefused, "'no where' is neither a module's name nor a .py", "file.py:factory"),
        ("no.where.py:make", {}, InputRefused, "no.where.py: no such file", None),
        ("no.where:make", {}, InputRefused, "no.where cannot be imported: there is no module named 'no'", "net.py:factory"),
    ],
)  # fmt: skip
def test_what_is_no_factory_of_a_network_is_refused(net, code, args, kind, said, hint):
    with refused(kind, said.format(net=net), hint=None if hint is None else (hint,)):
        load(code.format(net=net), args)


def test_an_input_is_asked_for_and_must_fit(net):
    with refused(InputRefused, "does not say what its network takes", hint=("--input",)):
        load(f"{net}:make", shape=None)
    with refused(
        InputRefused, "net.py:make cannot take one input of 1 × 16 × 16", hint=("--input",)
    ):
        load(f"{net}:make", shape=(1, 16, 16))
    with refused(InputRefused, "net.py:make cannot take an input of 3 × 0 × 16"):
        load(f"{net}:make", shape=(3, 0, 16))


def test_code_that_does_not_import_says_where_it_fails(tmp_path):
    (tmp_path / "bad.py").write_text("def make(:\n", "utf-8")
    with refused(InputRefused, "importing bad.py raised SyntaxError", "line 1"):
        load(f"{tmp_path}/bad.py:make")
    (tmp_path / "lacks.py").write_text("import not_there_at_all\n", "utf-8")
    with refused(InputRefused, "ModuleNotFoundError: No module named 'not_there_at_all'"):
        load(f"{tmp_path}/lacks.py:make")


# ── Weights ─────────────────────────────────────────────────────────────────────────


def resolve(model, *, weights=None, profile=None, **more) -> Job:
    return Job.resolve(
        model,
        profile or load_profile("default").only(("fp32",)),
        weights=weights,
        calibration=None,
        progress=silent,
        builds=False,
        **{"input_shape": None, **more},
    )


def test_untrained_values_are_taken_only_where_they_are_asked_for_and_the_report_says_so(net):
    model = load(f"{net}:make")
    with refused(InputRefused, "make ships without weights", hint=("--weights factory",)):
        resolve(model)
    kept, drawn = (resolve(model, weights=word) for word in ("factory", "random"))
    assert kept.source().weights == "as net.py:make() made them, from seed 0"
    assert kept.doubts() == ()
    assert drawn.source().weights == "random, as net.py:make() made them, from seed 0"
    assert drawn.doubts()[0].startswith("nobody trained the weights (random, as net.py:make()")
    assert kept.source().factory == drawn.source().factory == "net.py:make()"
    assert kept.loaded.sha256 == drawn.loaded.sha256 == digest(model.network, name="")


def test_a_built_in_network_is_initialised_from_a_seed_as_pytorch_does(net):
    request = {"input_shape": (4, 32, 32), "classes": 7, "weights": "random"}
    profile = load_profile("default", {"model.args.stages": [1, 1, 1, 1]}).only(("fp32",))
    job = resolve("resnet18-imagenet", profile=profile, **request)
    assert job.source().weights == "random, as PyTorch initialises them, from seed 0"
    assert job.source().output.shape == (7,)
    assert job.held_out.inputs.shape == (360, 4, 32, 32)
    assert len(job.start.module.get_submodule("layer1")) == 1
    torch.manual_seed(0)
    again = job.model.module()
    for key, value in job.start.module.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    with refused(InputRefused, "resnet50 is built in", hint=("--weights random",)):
        resolve("resnet50", weights="factory")
    with refused(InputRefused, "resnet18 has 10 outputs, and cannot have 5"):
        resolve("resnet18", classes=5)


def test_a_file_of_weights_goes_into_a_factorys_network(net, tmp_path):
    torch.manual_seed(9)
    model = load(f"{net}:make")
    trained = {
        key: torch.rand_like(v.float()).to(v) for key, v in model.network.state_dict().items()
    }
    save_file(trained, path := tmp_path / "w.safetensors")
    job = resolve(model, weights=path)
    assert job.weights == "w.safetensors"
    assert all(torch.equal(v, trained[k]) for k, v in job.start.module.state_dict().items())
    assert not torch.equal(model.network.fc.weight, trained["fc.weight"])


def test_the_digest_of_values_is_of_names_shapes_and_every_bit(net):
    def build():
        return load(f"{net}:make").module()

    module = from_seed(build)
    first = digest(module, name="net")
    assert digest(from_seed(build), name="net") == first
    module.fc.bias.data[0] = module.fc.bias.data[0].nextafter(torch.tensor(1.0))
    assert digest(module, name="net") != first
    with refused(
        InputRefused, "infinite: tensor 'fc.bias' holds 1 values that are NaN or infinite"
    ):
        resolve(load(f"{net}:infinite"), weights="factory")


def test_what_a_factorys_network_cannot_change_is_refused(net):
    model = load(f"{net}:make")
    with refused(InputRefused, "make has 3 outputs, not 5", hint=("model.args.num_classes",)):
        resolve(model, weights="random", classes=5)
    with refused(InputRefused, "was made for an input of 3 × 16 × 16, not 3 × 32 × 32"):
        resolve(model, weights="random", input_shape=(3, 32, 32))
    profile = load_profile("default", {"model.args.width": 8}).only(("fp32",))
    with refused(InputRefused, "make is not built with the profile's model.args"):
        resolve(model, weights="random", profile=profile)


def test_a_model_that_gives_more_outputs_or_others_than_it_says_is_refused(tmp_path):
    class Twice(TinyModel, frozen=True):
        def module(self):
            module = super().module()
            module.register_forward_hook(lambda *given: (given[-1], given[-1]))
            return module

    with refused(InputRefused, "twice says that it gives 10 values, not 10 and 10"):
        resolve(Twice(), weights="random")

    class Fewer(TinyModel, frozen=True):
        output = exporter.TensorSpec("logits", (4,))

    with refused(InputRefused, "fewer says that it gives 4 values, not 10"):
        resolve(Fewer(), weights="random")


# ── Code is named on the command line, and nowhere else ─────────────────────────────

HEAD = 'about = "x"\n[runtime.ort-cpu]\n[precision.fp32]\n'


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ('[model]\nfactory = "net.py:make"\n', "'factory'"),
        ('[model]\nname = "resnet50"\n', "'name'"),
        ('[model.code]\nfile = "net.py"\n', "'code'"),
        ('[model]\nargs = {}\nmodule = "os"\n', "'module'"),
    ],
)
def test_a_profile_that_names_code_is_refused(tmp_path, table, named):
    (tmp_path / "sent.toml").write_text(HEAD + table, "utf-8")
    with refused(
        ProfileError, "sent.toml: model: ", "never which or by what code", named, hint=("--model",)
    ):
        load_profile(tmp_path / "sent.toml")
    (tmp_path / "sent.toml").write_text('model = "net.py:make"\n' + HEAD, "utf-8")
    with refused(ProfileError, "found 'net.py:make'", hint=("--model",)):
        load_profile(tmp_path / "sent.toml")


@pytest.mark.parametrize(
    ("args", "key", "what"),
    [
        ('url = "https://example.org/net.pth"', "model.args.url", "a URL, or name code"),
        ('url = "//example.org/net.pth"', "model.args.url", "a URL, or name code"),
        ('name = "hf-hub:someone/net"', "model.args.name", "a URL, or name code"),
        ('act = "os:system"', "model.args.act", "a URL, or name code"),
        ('act = " data:text/x-python,1"', "model.args.act", "a URL, or name code"),
        ('blocks = [{ file = "/etc/passwd" }]', "model.args.blocks[0].file", "a path that leaves"),
        ('file = "..\\\\weights.pth"', "model.args.file", "a path that leaves"),
        ('file = "a/../../b"', "model.args.file", "a path that leaves"),
        ('file = "C:\\\\weights.pth"', "model.args.file", "a URL, or name code"),
        ('file = "~/weights.pth"', "model.args.file", "a path that leaves"),
        ('file = "$HOME/w"', "model.args.file", "an environment variable"),
        ('file = "%HOME%"', "model.args.file", "an environment variable"),
        ('[model.args.kw]\n"file:///x" = 1', "model.args.kw.file:///x", "a URL, or name code"),
    ],
)
def test_arguments_of_a_profile_name_nothing_outside_it(tmp_path, args, key, what):
    (tmp_path / "sent.toml").write_text(f"{HEAD}[model.args]\n{args}\n", "utf-8")
    with refused(ProfileError, f"sent.toml: {key}: this may be {what}", hint=("--model",)):
        load_profile(tmp_path / "sent.toml")


def test_words_are_no_paths_and_no_urls():
    words = {"norm": "batch norm", "act": "relu6", "stages": ["a.b", "3x3/2", "50 %", "é: wide"]}
    profile = load_profile("default", {f"model.args.{key}": word for key, word in words.items()})
    assert profile.model.args == words


def test_arguments_of_a_profile_come_back_from_what_it_is_written_as(tmp_path):
    profile = load_profile("default", {"model.args.stages": [1, 2], "model.args.wide": True})
    (tmp_path / "again.toml").write_text(profile.to_toml(), "utf-8")
    assert load_profile(tmp_path / "again.toml") == profile
    assert profile.model.args == {"stages": [1, 2], "wide": True}


def test_the_library_takes_no_code_for_a_name(tmp_path, net):
    with refused(UnknownName, f"no model named '{net}:make'"):
        exporter.run(f"{net}:make", load_profile("default"), tmp_path / "out")


QUICK = "--input 3x16x16 --set timing.runs=3 --set timing.warmup=0 --set parity.random=4"


@pytest.fixture(scope="module")
def made(net, tmp_path_factory):
    """Return a bundle of a factory's network, made by the command, and what that printed."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "mine.toml").write_text(HEAD + "[model.args]\nwidth = 6\n", "utf-8")
    asked = ["--model", f"{net}:make", "--weights", "random", "--out", str(folder / "bundle")]
    asked += [*QUICK.split(), "--profile", str(folder / "mine.toml")]
    return folder / "bundle", CliRunner().invoke(main, asked)


def test_a_file_and_a_factory_are_exported_from_the_command_line(made):
    out, done = made
    assert done.exit_code in (0, 1), done.output  # random weights may tell no classes apart
    report = record.parse((out / "report.json").read_bytes())
    assert {a.name: a.rung.fidelity.verdict for a in report.artefacts if a.rung} == {
        "fp32 on ort-cpu": "pass"
    }
    assert report.source.factory == "net.py:make(width=6)"
    assert (out / "make.fp32.onnx").is_file()
    page = (out / "report.md").read_text("utf-8")
    assert re.search(r"^- made by net\.py:make\(width=6\)$", page, re.MULTILINE)
    assert "weights random, as net.py:make(width=6) made them, from seed 0, SHA-256" in page
    assert "In doubt: nobody trained the weights" in page
    assert "360 held-out digits in 3 channels" in page


def test_a_bundles_word_runs_no_code_and_the_command_lines_does(made, net):
    out, _ = made
    with refused(InputRefused, "net.py:make(width=6)", "does not run code", hint=("--model",)):
        check_bundle(out, weights="random")
    again = ["parity", str(out), "--model", f"{net}:make"]
    done = CliRunner().invoke(main, [*again, "--weights", "random"])
    assert done.exit_code in (0, 1), done.output
    assert re.search(r"^fp32 on ort-cpu .* pass ", done.stdout, re.MULTILINE)
    done = CliRunner().invoke(main, again)
    assert done.exit_code == 3
    assert "make ships without weights" in done.output


def test_another_factory_than_the_bundles_is_found_out(made, net):
    out, _ = made
    for factory, said in (
        ("another", "has "),
        ("Several", "and this one 'logits' N×3 and 'twice' N×3"),
    ):
        asked = ["--model", f"{net}:{factory}", "--weights", "random"]
        done = CliRunner().invoke(main, ["parity", str(out), *asked])
        assert done.exit_code == 3
        assert said in done.output


def test_a_bundle_of_a_built_in_network_says_enough_to_check_it(tmp_path):
    """Its channels, its classes and its arguments; that its values are random is said again."""
    (tmp_path / "mine.toml").write_text(HEAD + "[model.args]\nstages = [1, 1, 1, 1]\n", "utf-8")
    settings = {"timing.runs": 2, "timing.warmup": 0, "parity.random": 4, "batch.max": 8}
    profile = load_profile(tmp_path / "mine.toml", {**settings, "batch.opt": 8})
    asked = {"weights": "random", "input_shape": (4, 16, 16), "classes": 5}
    made = exporter.run("resnet18-imagenet", profile, tmp_path / "out", **asked)
    assert (made.source.input.shape, made.source.output.shape) == ((4, 16, 16), (5,))
    assert made.source.factory is None
    checked = check_bundle(tmp_path / "out", weights="random")
    assert checked.source == made.source
    assert [a.rung.fidelity.verdict for a in checked.artefacts] == ["pass"]


# ── What it costs ───────────────────────────────────────────────────────────────────


def test_a_factorys_network_is_counted_beside_a_built_in_one(net):
    """27 multiply-accumulates for each of 4 × 7 × 7 values, and 4 for each of 3 outputs."""
    written, folded, *other = count_all([load(f"{net}:make"), "resnet18"])
    assert written.name == "make in PyTorch"
    assert written.cost.macs == folded.cost.macs == 27 * 4 * 49 + 4 * 3
    assert other[0].name == "resnet18 in PyTorch"
    with refused(InputRefused, "make has 3 outputs, not 10"):
        count_all([load(f"{net}:make")], classes=10)


def test_the_command_counts_and_compares_it(net, tmp_path):
    done = CliRunner().invoke(main, ["flops", f"{net}:make", "--input", "3x16x16"])
    assert done.exit_code == 0, done.output
    assert "make in PyTorch, folded" in done.stdout
    asked = ["--input", "3x16x16", "--runs", "2", "--plot", str(tmp_path / "c.svg")]
    done = CliRunner().invoke(main, ["compare", f"{net}:make", "resnet18", *asked])
    assert done.exit_code == 1
    assert re.search(r"^net\.py:make\(\) +3×16×16 +3 ", done.stdout, re.MULTILINE)
    assert re.search(r"^resnet18 +3×16×16 +refused$", done.stdout, re.MULTILINE)
