"""Data of one's own: what the result is judged on, and what scales are calibrated from.

    words ── gather ──▶ samples, digests, labels ── split by digest ──▶ held out │ for calibration

`digits` are the built-in samples; a folder is of images, in folders of their classes or in a heap;
then ``.npy``, ``.npz`` and safetensors files, and ``package.module:factory`` or
``file.py:factory``; and what a program holds in memory (`exporter.data.held`). A sample is held out
if its digest, as a fraction of all there could be, is below `data.held_out`: so it always is,
whatever else is there, and one that is there twice is on one side both times. Images are told apart
by their decoded pixels, and arrays by their bytes.
"""

from exporter.data.calibration import choose_calibration
from exporter.data.pictures import check_scale_said
from exporter.data.sets import (
    Data,
    DataSet,
    Given,
    Part,
    is_built_in,
    open_data,
    shared_samples,
)

__all__ = [
    "Data",
    "DataSet",
    "Given",
    "Part",
    "check_scale_said",
    "choose_calibration",
    "is_built_in",
    "open_data",
    "shared_samples",
]
