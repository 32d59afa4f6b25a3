"""The network in every precision, and what it computes in float64: made on the CPU."""

from __future__ import annotations

from typing import Any

from gpu.candidates import BATCH, OUTPUT, PRECISIONS, graph
from gpu.steps import Here


def make(here: Here) -> dict[str, Any]:
    """Write the graphs, the held-out digits' logits in float64, and say what they are."""
    import numpy as np
    import onnx
    import torch
    from safetensors.torch import load_file

    import exporter
    from exporter.parity import collect_outputs
    from exporter.samples import draw, feeds, load_split

    pixels, images = here.settings["pixels"], here.settings["images"]
    model = exporter.load_model("resnet18")
    module = model.module().eval()
    module.load_state_dict(load_file(model.weights))
    source = graph(here.folder, "fp32", pixels)
    given = draw(load_split("digits", source.input.shape, "train"), count=images, seed=0)
    example = torch.from_numpy(given.inputs[:2])
    folded = exporter.fold_batchnorm(module, example).module
    exporter.export_onnx(folded, source.path, input=source.input, output=OUTPUT, batch=BATCH)
    whole = onnx.load(source.path)
    seen = exporter.calibrate(whole, feeds(given.inputs, source.input.name, size=8))
    for name in PRECISIONS[1:]:
        made = exporter.load_precision(name, {}).convert(whole, seen, given.inputs)
        onnx.save(made.model, graph(here.folder, name, pixels).path)
    held_out = load_split("digits", source.input.shape, "held-out")
    truth = collect_outputs(
        exporter.TorchSession.of(module, OUTPUT.name, double=True),
        feeds(held_out.inputs, source.input.name, size=8),
        OUTPUT.name,
        samples=len(held_out.inputs),
    )
    np.save(here.folder / "truth.npy", truth)
    return {
        "network": "resnet18",
        "pixels": pixels,
        "calibrated": given.origin,
        "judged on": held_out.origin,
        "bytes": {
            name: graph(here.folder, name, pixels).path.stat().st_size for name in PRECISIONS
        },
    }
