"""What the document behind this project claims of networks, measured: ``resnet-export claims``.

    costs       arithmetic, parameters and bytes of VGG-16 and of ResNet-18
    gradients   how much of the gradient reaches the first layers, at initialisation
    layers      BatchNorm, average pooling, and the two ways to join branches
    summary     the layer table that torchsummary prints

A verdict is computed from figures that are measured in the same run. What would take training to
show is listed, and not checked.
"""

from __future__ import annotations

from exporter import environment
from exporter.claims import costs, gradients, layers
from exporter.claims.summary import summarise
from exporter.contracts import Progress, silent
from exporter.plugins import load_model
from exporter.records import Claim, Claims
from exporter.version import TOOL

UNCHECKED = {
    "beyond about 20 layers, plain networks get worse, and not by overfitting": (
        "takes training a plain and a residual network of the same depth"
    ),
    "VGG-19's training stalls late": "takes training it",
    "138 M parameters overfit small data sets": "takes training it",
}


def check_claims(*, progress: Progress = silent) -> Claims:
    """Return every claim with what was measured and what that makes of it."""
    model = load_model("resnet18")
    with progress("count VGG-16 and ResNet-18", None):
        counted = costs.check()
    with progress("try layers", None):
        tried = layers.check()
    networks = gradients.NETWORKS
    with progress(f"measure gradients in {len(networks)} networks", len(networks)) as advance:
        measured = gradients.measure_all(advance)
    unchecked = [Claim(says, why, "not checked") for says, why in UNCHECKED.items()]
    return Claims(
        tool=TOOL,
        environment=environment.capture(),
        claims=(*counted, *tried, *gradients.judge(measured), *unchecked),
        gradients=measured,
        summary=summarise(model.module(), model.input.shape),
    )
