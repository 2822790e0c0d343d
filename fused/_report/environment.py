"""Where a measurement was taken: without it, a figure says nothing."""

from __future__ import annotations

import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fused import _info


def environment() -> dict[str, Any]:
    """What ``python -m fused info`` knows, and the commit and the date, for JSON."""
    return {
        **_info.collect(),
        "commit": _commit(),
        "cpu_capability_of_torch": torch.backends.cpu.get_cpu_capability(),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def describe(info: dict[str, Any], device: torch.device) -> list[tuple[str, str]]:
    """The same in a few lines for people, with the device that was used."""
    cuda = f", CUDA {info['torch_cuda']}, cuDNN {info['cudnn']}" if info["torch_cuda"] else ""
    rows = [
        ("fused", f"{info['fused']}, {info['commit']}"),
        ("torch", f"{info['torch']}{cuda}"),
        (
            "CPU",
            f"{info['cpu']}, {info['threads']} threads; fused runs {info['cpu_isa']}, "
            f"torch {info['cpu_capability_of_torch']}",
        ),
    ]
    if device.type == "cuda":
        rows.append(("GPU", torch.cuda.get_device_name(device)))
    return [*rows, ("Python", f"{info['python']} on {info['platform']}"), ("date", info["date"])]


def _commit() -> str:
    """The commit of the checkout that this package lies in, where it lies in one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return "installed"
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "commit unknown"
    return f"commit {answer.strip()}"
