"""Runs in the peers' own environment: one tool, one setting, one network.

    python worker.py quantise SETTING fp32.onnx calibration.npy out [THREADS]
    python worker.py halve fp32.onnx out.onnx [THREADS]
    python worker.py evaluate model.xml inputs.npy logits.npy
    python worker.py versions

What it says is one line of JSON, the last on stdout: the seconds that quantising or halving took,
calibration included and imports not; or the tools' versions. It imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

TOOLS = ("onnxruntime", "nvidia-modelopt", "nncf", "openvino", "onnx", "torch", "numpy")
PERCENTILE = 99.999
Quantise = Callable[[Path, Any, Path], None]


def versions() -> dict[str, str]:
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found


class Reader:
    """The calibration images, one at a time, as ONNX Runtime asks for them."""

    def __init__(self, name: str, images: Any) -> None:
        self._feeds: Iterator[Any] = iter([{name: image[None]} for image in images])

    def get_next(self) -> Any:
        return next(self._feeds, None)


def onnxruntime(method: str, where: str) -> Quantise:
    """ONNX Runtime: ``where`` is "in" (convolutions and linear layers), "in+Add" or "all"."""

    def quantise(source: Path, images: Any, out: Path) -> None:
        import onnxruntime.quantization as q

        types = {"in": ["Conv", "Gemm"], "in+Add": ["Conv", "Gemm", "Add"]}.get(where)
        options: dict[str, Any] = {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
        }
        if method == "Percentile":
            options["CalibPercentile"] = PERCENTILE
        if types is not None:
            options["OpTypesToExcludeOutputQuantization"] = types
        q.quantize_static(
            source,
            out,
            Reader("input", images),
            quant_format=q.QuantFormat.QDQ,
            op_types_to_quantize=types,
            per_channel=True,
            activation_type=q.QuantType.QInt8,
            weight_type=q.QuantType.QInt8,
            calibrate_method=getattr(q.CalibrationMethod, method),
            extra_options=options,
        )

    return quantise


def modelopt(method: str) -> Quantise:
    """NVIDIA ModelOpt with its own placement; what is not INT8 stays in FP32."""

    def quantise(source: Path, images: Any, out: Path) -> None:
        from modelopt.onnx.quantization import quantize

        quantize(
            str(source),
            quantize_mode="int8",
            calibration_data={"input": images},
            calibration_method=method,
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=str(out),
        )

    return quantise


def nncf(
    *, openvino: bool = False, mixed: bool = False, fast: bool = True, trt: bool = False
) -> Quantise:
    """NNCF on the ONNX graph or on OpenVINO's.

    ``trt`` is what TensorRT can take, and the best found by hand for it: ranges are the largest
    seen and not their mean, weights have their full 8 bits, and UINT8 becomes INT8 afterwards,
    which NNCF cannot be asked for.
    """

    def quantise(source: Path, images: Any, out: Path) -> None:
        import nncf as tool
        from nncf.quantization.advanced_parameters import (
            AdvancedQuantizationParameters,
            OverflowFix,
        )
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        advanced = AdvancedQuantizationParameters()
        if trt:
            advanced = AdvancedQuantizationParameters(
                overflow_fix=OverflowFix.DISABLE,
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            )
        presets = tool.QuantizationPreset
        common = {
            "preset": presets.MIXED if mixed else presets.PERFORMANCE,
            "subset_size": len(images),
            "fast_bias_correction": fast,
            "advanced_parameters": advanced,
        }
        data = [image[None] for image in images]
        if openvino:
            import openvino as ov

            model = ov.convert_model(source)
            ov.save_model(tool.quantize(model, tool.Dataset(data), **common), out)
        else:
            import onnx

            feeds = [{"input": image} for image in data]
            made = tool.quantize(onnx.load(source), tool.Dataset(feeds), **common)
            onnx.save(_signed(made) if trt else made, out)

    return quantise


def _signed(model: Any) -> Any:
    """Return the graph with each UINT8 range [0, 255·s] as the INT8 range [−127·t, 127·t]."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        scale, zero = (numpy_helper.to_array(tensors[name]) for name in node.input[1:3])
        if zero.dtype == np.uint8:
            if zero.any():
                raise ValueError(f"{node.name}: the zero point is not 0")
            signed = (scale * np.float32(255 / 127), zero.astype(np.int8))
            for index, value in enumerate(signed, 1):
                name = f"{node.name}_signed_{index}"
                model.graph.initializer.append(numpy_helper.from_array(value, name))
                node.input[index] = name
    del model.graph.value_info[:]  # which say UINT8
    return model


def warm_up(setting: str, threads: int) -> None:
    """Import the tool, and let ONNX Runtime use so many threads (0: as many as it likes)."""
    import onnxruntime as ort

    import_module("onnxruntime.quantization")
    for tool in ("nncf", "openvino"):
        if tool in setting:
            import_module(tool)
    if "modelopt" in setting:
        import_module("modelopt.onnx.quantization")
    if threads:

        class Options(ort.SessionOptions):  # the tools make their sessions with it
            def __init__(self) -> None:
                super().__init__()
                self.intra_op_num_threads = threads

        ort.SessionOptions = Options


SETTINGS: dict[str, Quantise] = {
    **{
        f"ort-{method.lower()}-{where.lower()}": onnxruntime(method, where)
        for method in ("MinMax", "Percentile", "Entropy")
        for where in ("in", "in+Add", "all")
    },
    "modelopt-max": modelopt("max"),
    "modelopt-entropy": modelopt("entropy"),
    "nncf-onnx": nncf(),
    "nncf-onnx-signed": nncf(trt=True),
    "nncf-onnx-signed-full-bias": nncf(trt=True, fast=False),
    "nncf-openvino": nncf(openvino=True),
    "nncf-openvino-mixed": nncf(openvino=True, mixed=True),
    "nncf-openvino-full-bias": nncf(openvino=True, fast=False),
}


def halve(source: Path, out: Path) -> None:
    """Write the graph in FP16 where ModelOpt's AutoCast finds that it can be, by its defaults."""
    import onnx
    from modelopt.onnx.autocast import convert_to_mixed_precision

    made = convert_to_mixed_precision(
        onnx_path=str(source), low_precision_type="fp16", keep_io_types=True
    )
    onnx.save(made, out)


def evaluate(model: Path, inputs: Any) -> Any:
    """Return the logits of an OpenVINO model, whatever is not INT8 computed in FP32."""
    import openvino as ov

    compiled = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([compiled(image[None])[0] for image in inputs])


def main(arguments: list[str]) -> dict[str, Any]:
    match arguments:
        case ["versions"]:
            return versions()
        case ["evaluate", model, inputs, out]:
            np.save(out, evaluate(Path(model), np.load(inputs)))
            return {}
        case ["halve", source, out, *threads]:
            warm_up("modelopt", int(*threads) if threads else 0)
            import_module("modelopt.onnx.autocast")
            began = perf_counter()
            halve(Path(source), Path(out))
            return {"seconds": perf_counter() - began}
        case ["quantise", setting, source, calibration, out, *threads]:
            images = np.load(calibration)
            warm_up(setting, int(*threads) if threads else 0)
            began = perf_counter()
            SETTINGS[setting](Path(source), images, Path(out))
            return {"seconds": perf_counter() - began}
    raise SystemExit(__doc__)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
