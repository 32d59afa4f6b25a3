"""A module in memory, exported in one call: what comes of it, and that nothing becomes of it."""

from __future__ import annotations

import asyncio
import copy
import random
import re
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import disturb, refused
from torch import nn

import exporter
from exporter.cli import main
from exporter.data import open_data
from exporter.errors import BuildError, ExportError, GraphError, InputRefused, UnknownName
from exporter.live import live_model, shapes_of, usual_torch
from exporter.profile import load_profile
from exporter.records import Report, TensorSpec
from exporter.renderers import record

SHAPE = (3, 12, 12)
EXAMPLE = torch.zeros(1, *SHAPE)


class Net(nn.Module):
    """Two convolutions, the second's bias shared with a scale behind it, and four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)
        self.fc.scale = self.again.bias

    def forward(self, x):
        y = torch.relu(self.bn(self.conv(x)))
        return self.fc(torch.relu(self.again(y)).mean((2, 3)) * self.fc.scale)


class Second(Net):
    def forward(self, x):
        return super().forward(x), self.conv(x)


class Counting(Net):
    def forward(self, x):
        return super().forward(x).argmax(dim=1)


def make(kind: type[Net] = Net, seed: int = 3) -> Net:
    """Return one that gives every class to about as many samples of noise."""
    torch.manual_seed(seed)
    module = disturb(kind()).eval()
    noise = torch.randn(64, *SHAPE)
    with torch.no_grad():
        scores = Net.forward(module, noise)
        module.fc.weight /= scores.std(dim=0)[:, None]
        module.fc.bias -= Net.forward(module, noise).mean(dim=0)
    return module


def settings(**more) -> exporter.Profile:
    quick = {"timing.runs": 3, "timing.warmup": 1, "calibration.images": 16, "parity.random": 4}
    none = {"precision.fp32.tolerance": {"sqnr_db": 90}, "precision.int8.tolerance": {"sqnr_db": 9}}
    return load_profile("default", {**quick, **none, "batch.max": 8, **more})


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(80, *SHAPE, generator=generator)
    return images, torch.arange(80) % 4


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("notebook") / "build"
    asked = {"precision": ["fp32", "int8"], "data": data, "profile": settings()}
    return exporter.export(make(), EXAMPLE, out=out, **asked)


# ── What comes of it ────────────────────────────────────────────────────────────────


def test_its_artefacts_compute_what_the_module_computes(made, data):
    images, _ = data
    want = make().double()(images.double()).detach().numpy()
    for precision, most in (("fp32", 1e-5), ("int8", 0.1)):
        with made.session(precision) as run:
            got = run({"input": images.numpy()})["output"]
        assert np.linalg.norm(got - want) < most * np.linalg.norm(want)


def test_its_report_is_the_bundles_and_says_what_was_given(made):
    assert record.parse((made.folder / "report.json").read_bytes()) == made.report
    source = made.report.source
    assert (source.model, source.factory) == ("net", None)
    assert source.given == f"{__name__}.Net"
    assert source.weights == f"as {__name__}.Net held them"
    assert (source.weights_format, source.weights_changes) == ("in memory", ())
    assert {path.name for path in made.folder.glob("*.onnx")} == {"net.fp32.onnx", "net.int8.onnx"}
    page = (made.folder / "report.md").read_text("utf-8")
    assert re.search(r"^- given as a module, test\\_notebook\.Net$", page, re.MULTILINE)
    assert "data: the data in memory, in memory: 80 samples, labels of 4 classes" in page
    made.raise_for_parity()


class Compared(Net):
    def forward(self, left, right, sharpen=None):
        return super().forward(left) - super().forward(right)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_module_of_several_inputs_is_exported_and_checked_again(tmp_path, by_name):
    module, images = make(Compared), torch.rand(40, *SHAPE)
    example = {"right": EXAMPLE, "left": EXAMPLE} if by_name else (EXAMPLE, EXAMPLE)
    inputs = {"left": images.numpy(), "right": images.flip(0).numpy()}
    made = exporter.export(
        module, example, out=tmp_path / "b", profile=settings(), precision="fp32", data=inputs
    )
    assert [spec.name for spec in made.report.source.inputs] == ["left", "right"]
    with made.session() as run, torch.no_grad():
        got = run({name: value[:3] for name, value in inputs.items()})["output"]
        want = module(images[:3], images.flip(0)[:3]).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    again = exporter.check_bundle(made.folder, model=module, data=inputs)
    assert again.artefacts[0].rung.fidelity.verdict == "pass"


def test_inputs_that_forward_does_not_have_are_refused(tmp_path):
    example = {"left": EXAMPLE, "middle": EXAMPLE}
    said = "was given the inputs left, middle, and its forward() takes left, right, sharpen"
    with refused(InputRefused, said, hint=("example",)):
        exporter.export(make(Compared), example, out=tmp_path / "b", profile=settings())


def test_each_of_several_outputs_is_judged(tmp_path):
    module = make(Second)
    made = exporter.export(
        module, EXAMPLE, out=tmp_path / "b", profile=settings(), precision="fp32"
    )
    assert [spec.name for spec in made.report.source.outputs] == ["output_0", "output_1"]
    image = torch.rand(1, *SHAPE)
    with made.session() as run, torch.no_grad():
        got = run({"input": image.numpy()})
        for name, want in zip(("output_0", "output_1"), module(image), strict=True):
            np.testing.assert_allclose(got[name], want.numpy(), rtol=1e-4, atol=1e-5)


def test_all_of_it_has_a_default_and_nothing_is_printed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    made = exporter.export(make(), (EXAMPLE,), profile=settings(), precision="fp32")
    monkeypatch.chdir(tmp_path.parent)
    assert made.folder == tmp_path / "build"
    assert made.session() is not None
    assert capfd.readouterr() == ("", "")
    said = "no data were given, and the 360 held-out digits in 3 channels that it is judged on"
    assert any(doubt.startswith(said) for doubt in made.report.doubts)


def test_a_name_is_that_of_its_files_and_no_other_than_a_name(tmp_path):
    assert live_model(make(), SHAPE, name="mine-2.1").name == "mine-2.1"
    for name in ("", "../up", "a/b", "a b", "-x", "x" * 65, "a\nb"):
        with refused(InputRefused, "cannot be the name of a network", hint=("64",)):
            live_model(make(), SHAPE, name=name)


def test_bars_are_shown_where_they_are_asked_for(tmp_path, capsys):
    exporter.export(
        make(), EXAMPLE, out=tmp_path / "b", profile=settings(), precision="fp32", progress=True
    )
    assert "export to ONNX" in capsys.readouterr().out


# ── That nothing becomes of the module, or of PyTorch ───────────────────────────────


def state(module: nn.Module) -> list[object]:
    """Return all of a module that an export could change."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [
        [
            (k, id(t), t.tolist(), t.dtype, t.device, t.stride(), t.requires_grad)
            for k, t in tensors
        ],
        [(k, None if p.grad is None else p.grad.tolist()) for k, p in module.named_parameters()],
        [(name, id(child), child.training) for name, child in module.named_modules()],
        [[*child._backward_hooks.values()] for child in module.modules()],
        [sorted(vars(child)) for child in module.modules()],
    ]


def surroundings() -> list[object]:
    return [
        torch.random.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
    ]


def test_a_module_in_the_middle_of_training_is_left_as_it_was(tmp_path, data):
    module = make().to(memory_format=torch.channels_last)
    module.train()
    module.again.eval()
    module(data[0][:4]).sum().backward()
    module.conv.weight.requires_grad_(False)
    handle = module.fc.register_full_backward_hook(lambda *_: pytest.fail("it ran"))
    before, around = state(module), surroundings()
    made = exporter.export(
        module, EXAMPLE, out=tmp_path / "b", profile=settings(), precision="int8", data=data
    )
    assert state(module) == before
    assert surroundings() == around
    handle.remove()
    changes = made.report.source.weights_changes
    assert changes == ("given in training mode, and exported in eval mode",)


def test_what_a_program_has_chosen_of_pytorch_changes_nothing_and_comes_back(tmp_path, made, data):
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            around = surroundings()
            again = exporter.export(
                with_tensors_on_the_cpu(),
                EXAMPLE,
                out=tmp_path / "b",
                profile=settings(),
                data=data,
                precision=["fp32", "int8"],
            )
            checked = exporter.check_bundle(
                again.folder, model=with_tensors_on_the_cpu(), data=data
            )
            assert surroundings() == around
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    assert again.report.source == made.report.source
    assert [a.parity for a in checked.artefacts] == [a.parity for a in again.report.artefacts]
    for name in ("net.fp32.onnx", "net.int8.onnx"):
        assert (again.folder / name).read_bytes() == (made.folder / name).read_bytes()


def with_tensors_on_the_cpu() -> Net:
    with usual_torch():
        return make()


def test_ctrl_c_leaves_the_module_and_no_folder(tmp_path, data):
    module = make().train()
    before, around = state(module), surroundings()

    def interrupted(what: str, total: int | None = None):
        if what.startswith("calibrate"):
            raise KeyboardInterrupt
        return exporter.contracts.silent(what, total)

    with pytest.raises(KeyboardInterrupt):
        exporter.export(
            module,
            EXAMPLE,
            out=tmp_path / "new/b",
            profile=settings(),
            data=data,
            progress=interrupted,
        )
    assert state(module) == before
    assert surroundings() == around
    assert list(tmp_path.iterdir()) == []


def test_a_running_loop_is_none_of_its_business(tmp_path):
    async def cell() -> exporter.Exported:
        return exporter.export(
            make(), EXAMPLE, out=tmp_path / "b", profile=settings(), precision="fp32"
        )

    assert asyncio.run(cell()).folder == tmp_path / "b"


def test_code_that_is_in_no_file_is_run_once_and_images_are_decoded_beside_it(tmp_path):
    """As in a notebook: a class without source, and processes that must not import the main one."""
    code = """
        with open("runs", "a") as runs:
            runs.write("once ")
        import numpy as np, torch, exporter
        from pathlib import Path
        from PIL import Image
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
            def forward(self, x):
                if x.shape[1] != 3:
                    raise ValueError(x.shape)
                return self.fc(torch.relu(self.conv(x)).mean((2, 3)))

        Path("photos").mkdir()
        for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (24, 12, 12, 3))):
            Image.fromarray(pixels.astype(np.uint8)).save(f"photos/{number}.png")
        scale = {"preprocess.mean": [0.5] * 3, "preprocess.std": [0.2] * 3, "timing.runs": 2}
        profile = exporter.load_profile("default", {**scale, "calibration.images": 8})
        made = exporter.export(Net(), torch.zeros(1, 3, 12, 12), profile=profile, data="photos")
        print(made.report.data.samples, made.report.source.given)
    """
    done = subprocess.run(
        [sys.executable, "-"],
        input=textwrap.dedent(code).encode(),
        capture_output=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(exporter.__file__).parents[1])},
        check=False,
    )
    assert done.stdout.decode().split() == ["24", "__main__.Net"], done.stderr.decode()
    assert (tmp_path / "runs").read_text() == "once "


# ── Modules in any state ────────────────────────────────────────────────────────────


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile()
    return module


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        (lambda net: net, ()),
        (lambda net: net.train(), ("given in training mode, and exported in eval mode",)),
        (lambda net: net.to(memory_format=torch.channels_last), ()),
        (nn.DataParallel, ()),
        (torch.compile, ()),
        (lambda net: torch.compile(nn.DataParallel(net)), ()),
        (compiled_in_place, ()),
        (lambda net: net.requires_grad_(requires_grad=False), ()),
    ],
)
def test_the_same_network_is_exported_whatever_it_is_wrapped_in(given, changes, data):
    plain, model = live_model(make(), SHAPE), live_model(given(make()), SHAPE)
    assert (model.name, model.output) == ("net", TensorSpec("output", (4,)))
    assert model.changes == changes
    assert torch.equal(model.module()(data[0]), plain.module()(data[0]))
    assert model.module().fc.scale is not model.network.fc.scale
    assert model.network.fc.scale is model.network.again.bias
    assert not any(child.training for child in model.network.modules())
    assert model.network.conv.weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_exactly(dtype, data):
    half = make().to(dtype)
    model = live_model(half, SHAPE)
    name = str(dtype).removeprefix("torch.")
    assert model.changes == (f"{name} read as float32, which is exact",)
    for key, value in half.state_dict().items():
        assert torch.equal(model.network.state_dict()[key].to(value.dtype), value)
    assert shapes_of(EXAMPLE.to(dtype), half) == SHAPE


def test_a_program_that_torch_export_made_is_a_module_too(data):
    program = torch.export.export(
        make(), (torch.zeros(2, *SHAPE),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    got = live_model(program.module(), SHAPE).module()(data[0])
    torch.testing.assert_close(got, make()(data[0]))
    with refused(InputRefused, "type ExportedProgram was given", hint=("program.module()",)):
        live_model(program, SHAPE)


def hooked(module: nn.Module, kind: str, where: str = "conv") -> nn.Module:
    getattr(module.get_submodule(where), f"register_{kind}")(lambda *_: pytest.fail("it ran"))
    return module


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(4)).eval()


def strange() -> nn.Module:
    module = make()
    module.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    return module


def without_values() -> nn.Module:
    return make().to("meta")


def uncopyable() -> nn.Module:
    module = make()
    module.lock = (value for value in ())
    return module


@pytest.mark.parametrize(
    ("module", "kind", "said", "hint"),
    [
        (lambda: 3, InputRefused, "an object of type int was given, and no torch.nn.Module", None),
        (lambda: Net, InputRefused, "an object of type type was given", None),
        (lambda: make().double(), InputRefused, "Net: tensor 'conv.weight' is float64", "float()"),
        (strange, InputRefused, "Net: tensor 'phase' is complex64", "float()"),
        (without_values, InputRefused, "Net: tensor 'conv.weight' is on meta, where it has no", None),
        (lazy, GraphError, "1 has no weights yet", "run one batch"),
        (uncopyable, GraphError, "cannot copy Net: ", None),
        (lambda: torch.jit.trace(make(), EXAMPLE), GraphError, "is TorchScript", "was made from"),
        (lambda: hooked(make(), "forward_hook"), GraphError, "conv has a hook", "handle.remove()"),
        (lambda: hooked(make(), "forward_pre_hook"), GraphError, "conv has a hook", "handle.remove()"),
        (lambda: hooked(make(), "forward_hook", ""), GraphError, "Net has hooks of its own", None),
        (lambda: make(Counting), InputRefused, "Counting gives a tensor of int64", "of your own"),
        (lambda: nn.Conv2d(1, 2, 3), InputRefused, "Conv2d cannot take one input of 3 × 12 × 12", "example"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.*TorchScript")
def test_a_module_that_cannot_be_exported_is_refused_before_it_runs(module, kind, said, hint):
    with refused(kind, said, hint=None if hint is None else (hint,)):
        live_model(module(), SHAPE)


def test_global_hooks_and_values_that_are_not_finite_are_refused(tmp_path):
    module = make()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: pytest.fail("it ran"))
    try:
        with refused(GraphError, "there are global module hooks", hint=None):
            live_model(module, SHAPE)
    finally:
        handle.remove()
    module.fc.bias.data[1] = torch.nan
    with refused(InputRefused, "net: tensor 'fc.bias' holds 1 values that are NaN", hint=None):
        exporter.export(module, EXAMPLE, out=tmp_path / "b", profile=settings(), precision="fp32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("example", "said", "hint"),
    [
        (torch.zeros(SHAPE), "the example must be (N, C, H, W), found (3, 12, 12)", "example[None]"),
        (torch.zeros(2, 3), "found (2, 3)", None),
        (torch.zeros(0, *SHAPE), "found (0, 3, 12, 12)", None),
        (EXAMPLE.double(), "the example is float64", "example.float()"),
        (EXAMPLE.byte(), "the example is uint8", "example.float()"),
        (EXAMPLE.numpy(), "an object of type ndarray, and no tensor", "torch.from_numpy(array)"),
        ((EXAMPLE, EXAMPLE), "the example has 2 inputs, and the module's forward() takes x", "for each"),
        ((), "the example has 0 inputs", "for each"),
        ({}, "an object of type dict, and no tensor", None),
        ({"x": None}, "an object of type NoneType, and no tensor", None),
        (None, "an object of type NoneType, and no tensor", None),
    ],
)  # fmt: skip
def test_an_example_that_is_none_is_refused(example, said, hint):
    with refused(InputRefused, said, hint=None if hint is None else (hint,)):
        shapes_of(example, make())


# ── Samples in memory ───────────────────────────────────────────────────────────────


class Pairs(torch.utils.data.Dataset):
    def __init__(self, images, labels):
        self.pairs = list(zip(images, labels.tolist(), strict=True))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


def opened(given):
    fits = ("repeated-digits", [TensorSpec("input", SHAPE)], TensorSpec("output", (4,)), settings())
    return open_data(given, *fits)


def test_the_same_samples_are_judged_on_wherever_they_lie(data, tmp_path):
    images, labels = data
    np.savez(tmp_path / "own.npz", inputs=images.numpy(), labels=labels.numpy())
    want = opened(tmp_path / "own.npz")
    for given in (data, (images.numpy(), labels), Pairs(*data)):
        got = opened(given)
        assert got.record.sha256 == want.record.sha256
        assert (got.record.kind, got.record.name) == ("in memory", "the data in memory")
        for split in ("train", "held-out"):
            assert np.array_equal(got.load(split).inputs, want.load(split).inputs)
            assert np.array_equal(got.load(split).labels, want.load(split).labels)
    assert opened(images).load("train").labels is None


@pytest.mark.parametrize(
    ("given", "said", "hint"),
    [
        (lambda x, y: (x, y[:-1]), "80 samples, and labels of shape (79,)", None),
        (lambda x, y: (x, y + 1), "labels of 1 to 4, and the network's outputs are 0 to 3", None),
        (lambda x, y: x.permute(0, 2, 3, 1), "found (80, 12, 12, 3)", "transpose(0, 3, 1, 2)"),
        (lambda x, y: x.double(), "found (80, 3, 12, 12) float64", "astype"),
        (lambda x, y: x.bfloat16(), "the data in memory raised TypeError", "float32"),
        (lambda x, y: x / 0, "sample 0 holds values that are NaN or infinite", None),
        (lambda x, y: x[:0], "no samples in it", None),
        (lambda x, y: [x, y], "the samples must be (N, 3, 12, 12)", None),
        (lambda x, y: iter(x), "gives an object of type", "a dataset with a length"),
        (lambda x, y: [], "no samples in it", None),
    ],
)  # fmt: skip
def test_samples_that_cannot_be_used_are_refused(data, given, said, hint):
    with refused(InputRefused, "the data in memory", said, hint=None if hint is None else (hint,)):
        opened(given(*data))


def test_calibration_data_may_be_in_memory_too(tmp_path, data):
    more = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(1))
    asked = {"profile": settings(), "precision": "int8", "data": data}
    for given, said in (
        (more, "40 samples of the given array, SHA-256 "),
        (
            (more, torch.zeros(40, dtype=torch.int64)),
            "16 of the 40 train samples of the data in mem",
        ),
    ):
        made = exporter.export(make(), EXAMPLE, out=tmp_path / "b", calibration=given, **asked)
        assert made.report.calibration.startswith(said)
        assert made.report.data.held_out == 80
    with refused(
        InputRefused, "of the 80 calibration samples are among", hint=("--allow-overlap",)
    ):
        exporter.export(make(), EXAMPLE, out=tmp_path / "b", calibration=data[0], **asked)


# ── What it shows ───────────────────────────────────────────────────────────────────


class Page(HTMLParser):
    """What a page shows, and that every tag that opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.shown: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.shown.append(data)


def test_it_is_one_line_of_text_and_a_page_that_fetches_nothing(made):
    assert repr(made) == f"<Exported net: pass; fp32, int8 in {str(made.folder)!r}>"
    page = Page(made._repr_html_())
    assert set(page.tags) <= {"div", "p", "b", "span", "table", "tr", "th", "td"}
    assert {name for name, _ in page.attributes} == {"style"}
    assert not any(re.search(r"url|@|//", value or "") for _, value in page.attributes)
    reasons = {artefact.not_run for artefact in made.report.artefacts if artefact.not_run}
    for said in ("net", "pass", "fp32 on ort-cpu", str(made.folder / "report.md"), *reasons):
        assert any(said in shown for shown in page.shown), said
    assert made._repr_markdown_().startswith("# net: PASS\n")
    assert "| int8 on ort-cpu |" in made._repr_markdown_()


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "</p><img src=x>", "&amp;", '"x'])
def test_names_are_shown_as_they_are(made, name):
    import msgspec

    odd = msgspec.structs.replace(
        made.report,
        source=msgspec.structs.replace(made.report.source, model=name),
        doubts=(name,),
    )
    page = Page(exporter.Exported(odd, Path(name))._repr_html_())
    shown = "".join(page.shown)
    assert shown.count(name) == 3
    assert set(page.tags) <= {"div", "p", "b", "span", "table", "tr", "th", "td"}


def contrast(one: str, other: str) -> float:
    """Return WCAG's ratio of two colours, #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_verdicts_can_be_read_on_any_page():
    from exporter.renderers.html import _COLOURS
    from exporter.renderers.terminal import COLOURS

    assert _COLOURS.keys() == COLOURS.keys()
    assert all(contrast("#ffffff", colour) >= 4.5 for colour in _COLOURS.values())


def test_a_hint_stands_below_a_traceback():
    with pytest.raises(ExportError) as caught:
        shapes_of(torch.zeros(SHAPE), make())
    assert caught.value.__notes__ == ["Hint: one sample is a batch of one: example[None]"]


# ── What it opens ───────────────────────────────────────────────────────────────────


def test_an_artefact_is_opened_by_its_names_and_only_as_it_was_made(made, data):
    with refused(UnknownName, "no artefact named 'fp16 on ort-cpu'", hint=("'int8 on ort-cpu'",)):
        made.session("fp16", "ort-cpu")
    with refused(UnknownName, "no artefact named 'ort-cuda'"):
        made.session(runtime="ort-cuda")
    rtx = next(a for a in made.report.artefacts if a.runtime == "tensorrt-rtx")
    if rtx.not_run:
        with refused(exporter.errors.RuntimeMissing, "fp32 on tensorrt-rtx cannot run here"):
            made.session("fp32", "tensorrt-rtx")
    whole = (made.folder / "net.fp32.onnx").read_bytes()
    try:
        (made.folder / "net.fp32.onnx").write_bytes(whole[:-1])
        with refused(GraphError, "net.fp32.onnx is not the file that the export made"):
            made.session("fp32")
    finally:
        (made.folder / "net.fp32.onnx").write_bytes(whole)


def test_one_that_was_not_made_says_why(made):
    import msgspec

    variants = tuple(
        msgspec.structs.replace(
            variant,
            artefacts=tuple(msgspec.structs.replace(a, refused="no") for a in variant.artefacts),
        )
        for variant in made.report.variants
    )
    changed: Report = msgspec.structs.replace(made.report, variants=variants)
    with refused(BuildError, "fp32 on ort-cpu was not made: no", hint=None):
        exporter.Exported(changed, made.folder).session()


# ── The bundle, once more ───────────────────────────────────────────────────────────


def test_a_bundle_is_compared_again_with_the_module_alone(made, data):
    again = exporter.check_bundle(made.folder, model=make().train(), data=data)
    assert again.verdict == "pass"
    with refused(
        InputRefused,
        "was given in memory, as a test_notebook.Net",
        hint=("--model", "model=module"),
    ):
        exporter.check_bundle(made.folder, data=data)
    with refused(InputRefused, "the bundle was made from weights 'as test_notebook.Net held them'"):
        exporter.check_bundle(made.folder, model=make(seed=4), data=data)
    done = CliRunner().invoke(main, ["parity", str(made.folder)])
    assert done.exit_code == 3
    assert "the bundle does not hold it" in done.output


def test_a_built_in_network_of_the_same_name_is_not_taken_for_it(tmp_path):
    made = exporter.export(
        make(), EXAMPLE, out=tmp_path / "b", profile=settings(), precision="fp32", name="resnet18"
    )
    with refused(InputRefused, "was given in memory"):
        exporter.check_bundle(made.folder)


def test_weights_from_elsewhere_are_not_what_a_module_holds(tmp_path):
    model = live_model(make(), SHAPE)
    for weights in ("random", "factory"):
        with refused(InputRefused, f"so that there are no {weights} weights", hint=("its own",)):
            exporter.run(model, settings().only(("fp32",)), tmp_path / "b", weights=weights)


# ── The page that tells of it ───────────────────────────────────────────────────────


def test_the_example_in_the_documentation_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/notebooks.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, "notebooks.md", "exec"), names)
    made = names["made"]
    assert isinstance(made, exporter.Exported)
    assert made.folder == tmp_path / "build"
    assert {a.fidelity for a in made.report.artefacts if not a.not_run} == {"pass"}
    assert names["scores"].shape == (4, 10)
    assert copy.copy(made) == made
