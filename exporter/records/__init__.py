"""The nouns: what flows between stages. Frozen, serialisable, and without behaviour.

Numbers that were measured are fields; numbers that follow from them are properties, and
``renderers/record.py`` writes those too, for readers that only have the JSON.
"""

from __future__ import annotations

from exporter.records.asked import (
    FEW_IMAGES,
    LEAST_IMAGES,
    BatchRange,
    Calibration,
    ParityInputs,
    TensorSpec,
    Timing,
    Tolerance,
    check_threads,
)
from exporter.records.base import SCHEMA, Array, Asked, Feed, Found, Outputs, Verdict, rank, worst
from exporter.records.calibration import Convergence, Curve
from exporter.records.checkup import Checkup, Diagnosis, Trial
from exporter.records.cost import Cost, Latency, LayerCost
from exporter.records.execution import Executed, Execution
from exporter.records.fidelity import Fidelity, Flip, LayerError, Rung, WorstCase
from exporter.records.made import Fate, File, OnnxModel
from exporter.records.quality import Parity
from exporter.records.quantised import Quantised, Repair
from exporter.records.report import Artefact, FoldRecord, Report, Source, Stage, Variant
from exporter.records.roofline import Bandwidth, Ceilings, Kernel, Roofline
from exporter.records.tune import Budget, Candidate, Objective, Sensitivity, TuneReport
from exporter.records.worth import Comparison, Recommendation

__all__ = [
    "FEW_IMAGES",
    "LEAST_IMAGES",
    "SCHEMA",
    "Array",
    "Artefact",
    "Asked",
    "Bandwidth",
    "BatchRange",
    "Budget",
    "Calibration",
    "Candidate",
    "Ceilings",
    "Checkup",
    "Comparison",
    "Convergence",
    "Cost",
    "Curve",
    "Diagnosis",
    "Executed",
    "Execution",
    "Fate",
    "Feed",
    "Fidelity",
    "File",
    "Flip",
    "FoldRecord",
    "Found",
    "Kernel",
    "Latency",
    "LayerCost",
    "LayerError",
    "Objective",
    "OnnxModel",
    "Outputs",
    "Parity",
    "ParityInputs",
    "Quantised",
    "Recommendation",
    "Repair",
    "Report",
    "Roofline",
    "Rung",
    "Sensitivity",
    "Source",
    "Stage",
    "TensorSpec",
    "Timing",
    "Tolerance",
    "Trial",
    "TuneReport",
    "Variant",
    "Verdict",
    "WorstCase",
    "check_threads",
    "rank",
    "worst",
]
