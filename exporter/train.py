"""Train a built-in network on its own samples, the same way every time.

Four epochs of stochastic gradient descent (Nesterov momentum 0.9, weight decay 5e-4, batches of 32)
under a one-cycle schedule (L. Smith, N. Topin, "Super-Convergence", 2018), convolutions in bfloat16
by autocast. Everything random comes from one seed, and the thread count is fixed, because sums
depend on it: on one kind of CPU two runs write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from exporter.contracts import Model, Progress, silent
from exporter.parity import collect_outputs
from exporter.reference import TorchSession
from exporter.samples import feeds, load_split

SEED = 0
EPOCHS = 4
BATCH = 32
LEARNING_RATE = 0.05
THREADS = 2


class Trained(NamedTuple):
    """The file written, its SHA-256, and the share of held-out samples it labels correctly."""

    path: Path
    sha256: str
    accuracy: float


def train(model: Model, path: Path, *, progress: Progress = silent) -> Trained:
    """Train ``model`` at its own input size and write its weights to ``path``.

    Convolution and linear weights are stored as float16, everything else (BatchNorm, biases) as
    float32; ``accuracy`` is measured after that rounding, in float32, on the held-out samples, and
    recorded in the file's metadata beside the seed.
    """
    import torch
    from safetensors.torch import save
    from torch.nn import functional

    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    module = model.module().train()
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # is missing in torch's stubs
    inputs, labels = map(torch.from_numpy, load_split(model.data, model.input.shape, "train")[:2])
    steps = len(inputs) // BATCH
    optimiser = torch.optim.SGD(
        module.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=EPOCHS * steps
    )
    with progress(f"train {EPOCHS} epochs", EPOCHS * steps) as advance:
        for _ in range(EPOCHS):
            for chosen in torch.randperm(len(inputs))[: steps * BATCH].view(steps, BATCH):
                batch = inputs[chosen].to(memory_format=torch.channels_last)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    logits = module(batch)
                loss = functional.cross_entropy(logits.float(), labels[chosen])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own is unannotated
                optimiser.step()
                schedule.step()
                advance()
    state = {
        key: value.contiguous().half() if value.ndim > 1 else value
        for key, value in module.state_dict().items()
    }
    module.load_state_dict(state)
    held_out = load_split(model.data, model.input.shape, "held-out")
    assert held_out.labels is not None  # what ships has some
    session = TorchSession.of(module.eval(), model.output.name)
    batches = list(feeds(held_out.inputs, model.input.name, size=8))
    with progress("evaluate", len(batches)) as advance:
        logits = collect_outputs(
            session, batches, model.output.name, samples=len(held_out.labels), advance=advance
        )
    accuracy = float((logits.argmax(axis=1) == held_out.labels).mean())
    facts = {"seed": SEED, "held-out accuracy": round(accuracy, 4), "torch": torch.__version__}
    data = save(state, {"trained": json.dumps(facts)})  # one entry: several come in any order
    path.write_bytes(data)
    return Trained(path, hashlib.sha256(data).hexdigest(), accuracy)
