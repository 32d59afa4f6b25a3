"""The catalogue of conversion bugs: what goes wrong between PyTorch and a file, made on purpose.

batchnorm    ε, statistics, γ, β, and the fold
weights      lost, permuted, rounded, in another layout
wiring       activations, padding, pools, branches, inputs
precision    halves and integers
float8       FP8
"""

from __future__ import annotations

from mutation.bugs import batchnorm, float8, precision, weights, wiring
from mutation.bugs.site import CATALOGUE, Bug, Mutant

__all__ = ["CATALOGUE", "Bug", "Mutant", "batchnorm", "float8", "precision", "weights", "wiring"]
