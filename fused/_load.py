"""Loads the compiled libraries, or says in one error why they do not fit and what to type.

Without this check a fused that was built for another torch fails at import with an undefined
symbol, or later and worse. Everything is compared before a library is touched.
"""

from __future__ import annotations

import importlib
import platform
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

_FOLDER = Path(__file__).resolve().parent


class Target(NamedTuple):
    """What a native library is bound to."""

    python: str
    machine: str
    torch: str
    cuda: str | None  # of torch

    def __str__(self) -> str:
        cuda = f"CUDA {self.cuda}" if self.cuda else "no CUDA"
        return f"Python {self.python}, torch {self.torch} ({cuda}), {self.machine}"


@cache
def build_info() -> ModuleType:
    """The generated module fused._build_info."""
    info: ModuleType | None
    try:
        info = importlib.import_module("fused._build_info")
    except ModuleNotFoundError:
        info = None
    # The finder of an editable install answers for modules that this folder lacks, with those of
    # another tree.
    if info is None or Path(str(info.__file__)).resolve().parent != _FOLDER:
        raise ImportError(
            f"fused: the compiled part is missing in {_FOLDER}. Build it with: {rebuild_command()}"
        )
    return info


def built_for() -> Target:
    info = build_info()
    return Target(info.python, info.machine, info.torch, info.torch_cuda)


def found() -> Target:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Target(python, platform.machine(), str(torch.__version__), torch.version.cuda)


def _series(version: str) -> str:
    """The versions that share an ABI: a minor release with its patches, or one nightly build."""
    public = version.split("+")[0]
    return ".".join(public.split(".")[:2]) if public.replace(".", "").isdigit() else version


def fits(built: Target, here: Target) -> bool:
    return built._replace(torch=_series(built.torch)) == here._replace(torch=_series(here.torch))


@cache
def load() -> ModuleType:
    """Checks, loads libfused.so (which registers torch.ops.fused) and returns fused._C."""
    built, here = built_for(), found()
    if not fits(built, here):
        raise ImportError(
            f"fused: built for {built}\n       but found {here}.\n"
            f"       Build it again: {rebuild_command()}"
        )
    try:
        torch.ops.load_library(str(_FOLDER / "libfused.so"))
        kernels = importlib.import_module("fused._C")
    except (ImportError, OSError) as error:
        raise ImportError(
            f"fused: cannot load the compiled part: {error}\n"
            f"       built for {built}\n       and found {here}.\n"
            f"       Build it again: {rebuild_command()}"
        ) from error
    kernels.isa()  # a FUSED_ISA that names no instruction set is an error now, not in mid-training
    return kernels


def rebuild_command() -> str:
    """The command that builds this installation anew, from where it came.

    --no-cache-dir: pip may hold a wheel that it built for another torch.
    """
    return f"pip install --no-cache-dir --force-reinstall --no-deps {_source()}"


def _source() -> str:
    if (_FOLDER.parent / "setup.py").exists():
        return f"-e {_FOLDER.parent}"
    # Here, because only an error needs it.
    import json
    from importlib import metadata

    try:
        record = metadata.distribution("fused-kernels").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        record = None
    origin = json.loads(record or "{}")
    if "vcs_info" in origin:
        return f"{origin['vcs_info']['vcs']}+{origin['url']}"
    if "dir_info" in origin:
        return str(origin["url"]).removeprefix("file://")
    return "fused-kernels"  # from an index, or a wheel, which cannot be built again
