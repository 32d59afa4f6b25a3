"""The real peers, installed into an environment of their own, and what they make of a network.

Everything is kept in ``benchmarks/.cache``, under a hash of all that it depends on: the network,
the calibration images, the setting, the tools' versions and the worker's code that calls the tool.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from exporter.records import Array
from quantization import worker
from quantization.networks import CACHE, Network
from quantization.worker import SETTINGS, TOOLS

WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = CACHE / "peers"
PYTHON = ENVIRONMENT / "bin" / "python"

# An open range of torch would pull several GB of CUDA packages.
_TORCH = "torch==2.13.0"
_TOOLS = ("onnxruntime==1.32.0", "onnx==1.21.*", "nncf==3.4.*", "openvino==2026.4.*", _TORCH)
# ModelOpt's "onnx" extra wants onnxruntime-gpu and cupy; its own pins otherwise.
_MODELOPT = "nvidia-modelopt==0.47.0"
_MODELOPT_NEEDS = (
    *("ml_dtypes", "ninja", "nvidia-ml-py", "omegaconf", "onnx-graphsurgeon>=0.6.1", "pulp<4"),
    *("onnxconverter-common==1.16.*", "onnxscript", "onnxslim>=0.1.76", "polygraphy>=0.53.4"),
    *("pydantic>=2", "PyYAML", "regex", "rich", "safetensors", "scipy", "setuptools>=80", "tqdm"),
    *("cppimport", "lief"),
)


class Made(NamedTuple):
    """What a peer made: the file, or why there is none, and the seconds that it took."""

    setting: str
    path: Path | None
    seconds: float | None = None
    refused: str | None = None


def install() -> dict[str, str]:
    """Return the peers' versions, installing them first if they are not there."""
    if not (ENVIRONMENT / "ready").exists():
        print(f"installing the peers into {ENVIRONMENT.name}, once", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        with TemporaryDirectory() as folder:
            constraints = Path(folder, "constraints.txt")
            constraints.write_text(_TORCH, "utf-8")
            pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "-c", str(constraints)]
            subprocess.run([*pip, *_TOOLS, *_MODELOPT_NEEDS], check=True)
            subprocess.run([*pip, "--no-deps", _MODELOPT], check=True)
        (ENVIRONMENT / "ready").touch()
    found: dict[str, str] = _call("versions")
    return {tool: found[tool] for tool in TOOLS if tool in found}


def make(setting: str, network: Network, versions: dict[str, str], *, threads: int = 0) -> Made:
    """Return what a peer makes of a network, from the cache if it was made before."""
    key = _key(setting, network, versions)
    folder = CACHE / "made" / network.name
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{setting}-{key}"
    said = folder / f"{name}.json"
    out = folder / f"{name}.{'xml' if 'openvino' in setting else 'onnx'}"
    if not said.exists():
        said.write_text(json.dumps(quantise(setting, network, out, threads=threads)), "utf-8")
    return Made(setting, out if out.exists() else None, **json.loads(said.read_text("utf-8")))


def quantise(setting: str, network: Network, out: Path, *, threads: int = 0) -> dict[str, Any]:
    """Let a peer write ``out``, and return the seconds it took or why it refused."""
    with TemporaryDirectory() as name:
        folder = Path(name)  # some write more than they are asked for, beside either file
        made = folder / f"made{out.suffix}"
        np.save(folder / "calibration.npy", network.calibration)
        copyfile(network.graph, folder / "fp32.onnx")
        given = (folder / "fp32.onnx", folder / "calibration.npy")
        try:
            said: dict[str, Any] = _call("quantise", setting, *given, made, threads)
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if line.strip()]
            return {"refused": lines[-1] if lines else f"exit status {error.returncode}"}
        for suffix in {out.suffix, ".bin"}:  # OpenVINO keeps weights in a .bin
            if made.with_suffix(suffix).exists():
                copyfile(made.with_suffix(suffix), out.with_suffix(suffix))
    return said


def evaluate(path: Path, inputs: Array) -> Array:
    """Return the logits of an OpenVINO model, computed in the peers' environment."""
    with TemporaryDirectory() as folder:
        given, got = Path(folder, "inputs.npy"), Path(folder, "logits.npy")
        np.save(given, inputs)
        _call("evaluate", path, given, got)
        logits: Array = np.load(got)
    return logits


def _call(*arguments: object) -> Any:
    command = [str(PYTHON), str(WORKER), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _key(setting: str, network: Network, versions: dict[str, str]) -> str:
    digest = hashlib.sha256(network.graph.read_bytes())
    digest.update(network.calibration.tobytes())
    digest.update(inspect.getsource(_family(setting)).encode())
    digest.update(json.dumps([setting, versions], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _family(setting: str) -> Callable[..., worker.Quantise]:
    """Return the function of the worker that knows the setting's tool."""
    family: Callable[..., worker.Quantise] = getattr(
        worker, SETTINGS[setting].__qualname__.split(".")[0]
    )
    return family


__all__ = ["SETTINGS", "Made", "evaluate", "install", "make", "quantise"]
