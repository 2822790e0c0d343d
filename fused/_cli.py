"""What the subcommands of ``python -m fused`` share: how they fail, how they ask for packages."""

from __future__ import annotations

import argparse
import importlib.util

import torch


class CommandError(Exception):
    """What a command cannot go on from; shown as one line, without a traceback."""


# The name that a package is imported by, where it differs from the one that it is installed by.
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


def require(*modules: str) -> None:
    """Raises CommandError naming the packages of the extra ``train`` that are not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(_DISTRIBUTIONS.get(name, name) for name in missing)
        raise CommandError(f"{names} not installed: pip install 'fused-kernels[train]'")


def parse_device(text: str) -> torch.device:
    """A device of this machine; ``auto`` takes the GPU where there is one."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise CommandError(f"--device must be auto, cpu or cuda[:N], got {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be auto, cpu or cuda[:N], got {text!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise CommandError(
                f"--device {text}: torch {torch.__version__} sees no CUDA device here"
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise CommandError(
                f"--device {text}: there are {torch.cuda.device_count()} CUDA devices, from 0 on"
            )
    return device


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value
