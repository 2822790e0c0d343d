"""Where a measurement was taken: without it, a figure says nothing."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from fused._version import __version__


def environment(device: torch.device) -> list[tuple[str, str]]:
    """Versions, device, threads, commit and date, for people and for JSON alike."""
    rows = [
        ("fused", f"{__version__} ({_commit()})"),
        ("torch", torch.__version__),
        ("CPU", f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"),
        ("threads", str(torch.get_num_threads())),
    ]
    if device.type == "cuda":
        rows += [
            ("GPU", torch.cuda.get_device_name(device)),
            ("CUDA", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"),
        ]
    rows += [
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("date", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    return rows


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the checkout that this package lies in, where it lies in one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return "installed"
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "commit unknown"
