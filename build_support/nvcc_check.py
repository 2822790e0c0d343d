"""Compiles the CUDA build's own files where there is an nvcc, whatever torch is installed.

Kernels include no torch header, so `python -m build_support.nvcc_check 8.0 9.0a` needs neither a
GPU nor a CUDA build of torch. It compiles every .cu with nvcc, and the glue with its CUDA branches.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time

from build_support.cuda import CudaToolkit, kernel_toolkit, parse_architectures
from build_support.graph import Graph, Toolchain
from build_support.sources import ROOT, Kind, find_sources, library_sources
from build_support.toolchain import require_compiler, require_torch

FOLDER = "build/nvcc"
# The one header of torch's that a CPU build of torch leaves out.
GENERATED_HEADER = "c10/cuda/impl/cuda_cmake_macros.h"


def _check(cuda: CudaToolkit) -> int:
    header = ROOT / FOLDER / "include" / GENERATED_HEADER
    header.parent.mkdir(parents=True, exist_ok=True)
    if not header.exists():  # written once: everything that includes it depends on its date
        header.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    graph = Graph(Toolchain(require_compiler(), require_torch(), cuda), FOLDER)
    units = [s for s in library_sources(find_sources(), cuda=True) if s.kind is not Kind.CPU]
    graph.compile(units, ["-DFUSED_WITH_CUDA", f"-isystem {FOLDER}/include"])
    graph.run()
    return sum(unit.kind is Kind.CUDA for unit in units)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m build_support.nvcc_check")
    parser.add_argument("architectures", nargs="*", default=["8.0"], help="such as 8.0 9.0a")
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("no nvcc on PATH: kernels not compiled")
        return 0
    architectures = parse_architectures(" ".join(arguments.architectures))
    cuda = kernel_toolkit(nvcc, architectures, require_compiler())
    began = time.monotonic()
    number = _check(cuda)
    names = ", ".join(cuda.architectures)
    print(f"CUDA {cuda.version} compiled {number} .cu files for {names}", end=" ")
    print(f"in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
