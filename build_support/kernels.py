"""The CUDA kernels of the tree, by name, from a look at the source."""

from __future__ import annotations

import re
from pathlib import Path

from build_support.sources import ROOT

_LAUNCH_BOUNDS = re.compile(r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)")


def kernels_in(text: str) -> list[str]:
    """The names of the __global__ functions that C++ source defines."""
    names = []
    text = re.sub(r"//.*", "", text)
    for after in text.split("__global__")[1:]:
        head = _LAUNCH_BOUNDS.sub("", after)
        name = re.match(r"[\w\s]*?(\w+)\s*\(", head)
        end = re.search(r"[{;]", head)
        if name and end and end.group() == "{":
            names.append(name.group(1))
    return names


def find_kernels(root: Path = ROOT) -> dict[str, str]:
    """The file that defines each kernel, relative to the root."""
    paths = sorted([*root.glob("csrc/*/*.cu"), *root.glob("csrc/*/*.cuh")])
    return {
        name: str(path.relative_to(root)) for path in paths for name in kernels_in(path.read_text())
    }
