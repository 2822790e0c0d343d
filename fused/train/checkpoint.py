"""Checkpoints: written whole or not at all, read without running code, refused where unfit."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from fused._cli import CommandError

_FORMAT = 1


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content`` to a file beside ``path``, then renames it: a crash leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        torch.save({"format": _FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """What ``save_checkpoint`` wrote, on the CPU; CommandError if it is not there or is broken.

    ``load_checkpoint("out/train/gpt.pt")["runs"]["fused"]["model"]`` is a ``state_dict`` for either
    form of the model.
    """
    path = Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CommandError(f"{path}: no such checkpoint") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CommandError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CommandError(f"{path}: not a checkpoint of this version of fused")
    return content


def check_same_settings(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """A run can go on bit for bit only under the settings that it began with."""
    for key, value in current.items():
        if saved.get(key) != value:
            raise CommandError(
                f"{path}: cannot resume with another {key}: was {saved.get(key)!r}, now {value!r}"
            )
