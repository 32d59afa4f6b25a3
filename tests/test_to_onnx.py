from __future__ import annotations

import getpass
import platform
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from exporter.errors import GraphError
from exporter.fold import fold_batchnorm
from exporter.records import BatchRange, TensorSpec
from exporter.to_onnx import export_onnx

INPUT, OUTPUT = TensorSpec("input", (1, 32, 32)), TensorSpec("logits", (10,))


def export(module: nn.Module, path: Path, **options) -> onnx.ModelProto:
    wanted = {"input": INPUT, "output": OUTPUT, "batch": BatchRange(1, 2, 8), **options}
    return onnx.load(export_onnx(module, path, **wanted).path)


@pytest.fixture(scope="module")
def model(tiny_onnx) -> onnx.ModelProto:
    return onnx.load(tiny_onnx.path)


def test_the_file_computes_what_the_unfolded_module_does_at_any_batch_size(tiny_onnx, tiny_module):
    session = ort.InferenceSession(tiny_onnx.path, providers=["CPUExecutionProvider"])
    for size in (1, 2, 7):
        x = np.random.default_rng(size).standard_normal((size, 1, 32, 32), dtype=np.float32)
        with torch.inference_mode():
            want = tiny_module(torch.from_numpy(x)).numpy()
        (got,) = session.run(["logits"], {"input": x})
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_input_and_output_are_named_and_the_batch_is_free(model):
    (given,), (found,) = model.graph.input, model.graph.output
    assert (given.name, found.name) == ("input", "logits")
    assert given.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [d.dim_value for d in given.type.tensor_type.shape.dim][1:] == [1, 32, 32]
    assert found.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_no_batchnorm_is_left_and_the_opset_is_the_one_asked_for(model, tiny_module, tmp_path):
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    other = export(fold_batchnorm(tiny_module).module, tmp_path / "x.onnx", opset=22)
    assert [o.version for o in other.opset_import] == [22]


def test_nodes_are_named_uniquely_after_the_modules_they_came_from(model):
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    assert convolutions[:3] == ["block1.0", "block2.0.conv1", "block2.0.conv2"]
    assert next(n.name for n in model.graph.node if n.op_type == "Gemm") == "block4.2"


def test_the_file_says_nothing_of_the_machine_that_wrote_it(tiny_onnx, model):
    data = tiny_onnx.path.read_bytes()
    here = Path(__file__).resolve().parents[1]
    secrets = [str(here), str(Path.home()), str(Path(torch.__file__).parent), platform.node()]
    secrets.append(f"/{getpass.getuser()}/")
    for secret in filter(None, secrets):
        assert secret.encode() not in data, secret
    assert b'File "' not in data
    for holder in (model, model.graph, *model.graph.node, *model.graph.initializer):
        assert not holder.metadata_props
        assert not holder.doc_string


def test_two_exports_into_two_folders_write_the_same_bytes(tiny_module, tmp_path, monkeypatch):
    found = []
    for name in ("here", "there/deeper"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)
        export(fold_batchnorm(tiny_module).module, folder / "net.onnx")
        found.append((folder / "net.onnx").read_bytes())
    assert found[0] == found[1]


def test_what_cannot_be_exported_is_refused_in_one_sentence(tmp_path):
    class Sorts(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x.mean(dim=1)).real

    with pytest.raises(GraphError, match=r"^torch\.onnx cannot export the network: .+") as refusal:
        export(Sorts().eval(), tmp_path / "x.onnx")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "x.onnx").exists()
