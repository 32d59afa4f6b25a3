"""The nouns: what flows between stages. Frozen, serialisable, and without behaviour.

Numbers that were measured are fields; numbers that follow from them are properties, and
``renderers/record.py`` writes those too, for readers that only have the JSON.
"""

from __future__ import annotations

from exporter.records.asked import (
    FEW_IMAGES,
    LEAST_IMAGES,
    SEED,
    SIDES,
    THREADS,
    BatchRange,
    Calibration,
    FreeAxis,
    ParityInputs,
    SizeRange,
    TensorSpec,
    Timing,
    Tolerance,
    TopK,
)
from exporter.records.base import (
    SCHEMA,
    Array,
    Asked,
    Feed,
    Found,
    Outputs,
    Range,
    Ranges,
    Verdict,
    rank,
    whole,
    worst,
)
from exporter.records.bench import (
    BenchAsked,
    BenchReport,
    Checked,
    Fit,
    Gpu,
    Knee,
    Noise,
    NotTimed,
    Timed,
)
from exporter.records.calibration import Convergence, Curve
from exporter.records.checkup import Checkup, Diagnosis, Trial
from exporter.records.cost import Cost, LayerCost
from exporter.records.data import DataChoice, DataRecord, Postprocess, Preprocess, Unfit
from exporter.records.execution import Executed, Execution
from exporter.records.fidelity import Fidelity, Flip, LayerError, Rung, WorstCase
from exporter.records.latency import Figure, Latency
from exporter.records.made import Fate, File, OnnxModel
from exporter.records.networks import (
    Claim,
    Claims,
    Contender,
    Contest,
    Counted,
    Gradients,
    Standing,
)
from exporter.records.quality import Parity
from exporter.records.quantised import Quantised, Repair
from exporter.records.report import Artefact, FoldRecord, Part, Report, Source, Stage, Variant
from exporter.records.roofline import Bandwidth, Ceilings, Kernel, Roofline
from exporter.records.size import SizeCheck, SizeRecord
from exporter.records.tune import Budget, Candidate, Objective, Sensitivity, TuneReport, worst_of
from exporter.records.worth import Comparison, Recommendation

__all__ = [
    "FEW_IMAGES",
    "LEAST_IMAGES",
    "SCHEMA",
    "SEED",
    "SIDES",
    "THREADS",
    "Array",
    "Artefact",
    "Asked",
    "Bandwidth",
    "BatchRange",
    "BenchAsked",
    "BenchReport",
    "Budget",
    "Calibration",
    "Candidate",
    "Ceilings",
    "Checked",
    "Checkup",
    "Claim",
    "Claims",
    "Comparison",
    "Contender",
    "Contest",
    "Convergence",
    "Cost",
    "Counted",
    "Curve",
    "DataChoice",
    "DataRecord",
    "Diagnosis",
    "Executed",
    "Execution",
    "Fate",
    "Feed",
    "Fidelity",
    "Figure",
    "File",
    "Fit",
    "Flip",
    "FoldRecord",
    "Found",
    "FreeAxis",
    "Gpu",
    "Gradients",
    "Kernel",
    "Knee",
    "Latency",
    "LayerCost",
    "LayerError",
    "Noise",
    "NotTimed",
    "Objective",
    "OnnxModel",
    "Outputs",
    "Parity",
    "ParityInputs",
    "Part",
    "Postprocess",
    "Preprocess",
    "Quantised",
    "Range",
    "Ranges",
    "Recommendation",
    "Repair",
    "Report",
    "Roofline",
    "Rung",
    "Sensitivity",
    "SizeCheck",
    "SizeRange",
    "SizeRecord",
    "Source",
    "Stage",
    "Standing",
    "TensorSpec",
    "Timed",
    "Timing",
    "Tolerance",
    "TopK",
    "Trial",
    "TuneReport",
    "Unfit",
    "Variant",
    "Verdict",
    "WorstCase",
    "rank",
    "whole",
    "worst",
    "worst_of",
]
