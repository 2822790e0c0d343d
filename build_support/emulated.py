"""Builds the tests' module, in which the CUDA kernels run on the CPU, and prints its path.

Run by the tests, or by hand with `python -m build_support.emulated`.
"""

from __future__ import annotations

from pathlib import Path

from build_support.graph import Toolchain, emulated_graph
from build_support.sources import ROOT
from build_support.toolchain import extension_suffix, require_compiler, require_torch

FOLDER = "build/emulated"


def build() -> Path:
    """Builds what is out of date (nothing, in half a second, if nothing is)."""
    emulated_graph(Toolchain(require_compiler(), require_torch()), FOLDER).run()
    return ROOT / FOLDER / f"_C_emulated{extension_suffix()}"


if __name__ == "__main__":
    print(build())
