"""`python -m fused info`: what is here, what was built for it, and what is missing.

The text answers a user's first questions; --json is what a bug report carries.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fused import _load
from fused._version import __version__

# What `python -m fused train` imports when it runs, and the names to install them by.
_TRAIN_NEEDS = ("jinja2", "matplotlib", "numpy", "sklearn", "tqdm")
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
# Machine code runs on its own and on later minor versions of its major version; PTX is compiled by
# the driver for any later architecture; a suffix ("9.0a") binds both to that one architecture.
_ARCHITECTURE = re.compile(r"(?P<major>\d+)\.(?P<minor>\d)(?P<suffix>[af]?)(?P<kind>[+-]PTX)?")


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for e.g. "9.0a", "8.0+PTX" or "7.5-PTX" run on a device."""
    match = _ARCHITECTURE.fullmatch(architecture)
    if match is None:
        return False
    built = int(match["major"]), int(match["minor"])
    if match["suffix"]:
        return built == capability
    machine_code = match["kind"] != "-PTX"
    if machine_code and built[0] == capability[0] and built[1] <= capability[1]:
        return True
    return match["kind"] is not None and built <= capability


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    architectures = _load.build_info().cuda_architectures
    gpus = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        gpus.append(
            {
                "name": torch.cuda.get_device_name(index),
                "architecture": f"{capability[0]}.{capability[1]}",
                "memory_gib": round(torch.cuda.get_device_properties(index).total_memory / 2**30),
                "has_kernels": any(runs_on(name, capability) for name in architectures),
            }
        )
    return gpus


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


def _missing(info: dict[str, Any]) -> list[str]:
    """What this installation lacks, each with the way to get it."""
    built, missing = info["built_for"], []
    again = _load.rebuild_command()
    if info["torch_cuda"] and not built["cuda"]:
        missing.append(f"CUDA kernels: {built['without_cuda_because']}. Then: {again}")
    missing += [
        f"CUDA kernels for {gpu['name']} ({gpu['architecture']}): built for "
        f"{', '.join(built['cuda_architectures'])} only. "
        f'Run: TORCH_CUDA_ARCH_LIST="{gpu["architecture"]}" {again}'
        for gpu in info["gpus"]
        if built["cuda"] and not gpu["has_kernels"]
    ]
    if info["torch_cuda"] and not info["gpus"]:
        missing.append("a GPU: torch finds none, so everything runs on the CPU.")
    absent = [name for name in _TRAIN_NEEDS if importlib.util.find_spec(name) is None]
    if absent:
        missing.append(
            f"{', '.join(absent)} for `python -m fused train`: "
            f"pip install {' '.join(_DISTRIBUTIONS.get(name, name) for name in absent)}"
        )
    if info["torch_cuda"] is None and _driver():
        missing.append(f"a CUDA build of torch for the GPU here: install one, then {again}")
    return missing


def collect() -> dict[str, Any]:
    """Everything `info` prints, as plain data."""
    built = _load.build_info()
    info: dict[str, Any] = {
        "fused": __version__,
        "location": os.fspath(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "driver": _driver(),
        "gpus": _gpus(),
        "cpu": _cpu_name(),
        "cpu_isa": _load.load().isa(),
        "threads": torch.get_num_threads(),
        "built_for": {
            "python": built.python,
            "torch": built.torch,
            "compiler": built.compiler,
            "cuda": built.cuda,
            "cuda_architectures": list(built.cuda_architectures),
            "without_cuda_because": built.without_cuda_because,
        },
    }
    info["missing"] = _missing(info)
    return info


def _lines(info: dict[str, Any]) -> list[str]:
    built = info["built_for"]
    cuda = f"CUDA {info['torch_cuda']}" if info["torch_cuda"] else "no CUDA"
    cudnn = f", cuDNN {info['cudnn']}" if info["cudnn"] else ""
    x86 = platform.machine() == "x86_64"
    kernels = "CPU (generic, avx2, avx512, avx512_bf16)" if x86 else "CPU (generic)"
    if built["cuda"]:
        kernels += f", CUDA {built['cuda']} for {', '.join(built['cuda_architectures'])}"
    rows = [
        ("fused", f"{info['fused']} in {info['location']}"),
        ("Python", info["python"]),
        ("torch", f"{info['torch']} ({cuda}{cudnn})"),
        ("CPU", f"{info['cpu']}; kernels in use: {info['cpu_isa']}; {info['threads']} threads"),
    ]
    rows += [
        (
            "GPU",
            f"{gpu['name']}, {gpu['memory_gib']} GiB, architecture {gpu['architecture']}: "
            + ("has kernels" if gpu["has_kernels"] else "no kernels built for it"),
        )
        for gpu in info["gpus"]
    ]
    rows += [
        ("kernels", kernels),
        ("compiler", built["compiler"]),
        *(("missing", line) for line in info["missing"] or ["nothing"]),
    ]
    return [f"{name + ':':<10}{value}" for name, value in rows]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fused info", description="What is here, what was built, what is missing."
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for bug reports")
    info_as_json = parser.parse_args(argv).json
    info = collect()
    print(json.dumps(info, indent=2) if info_as_json else "\n".join(_lines(info)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
