"""Builds the emulator with one file of small kernels, for ctypes."""

from __future__ import annotations

import ctypes
from pathlib import Path

from build_support.emulated import VARIANTS
from build_support.graph import Graph, Toolchain
from build_support.sources import ROOT, Kind, Source, find_sources
from build_support.toolchain import require_compiler, require_torch


def load_library(file: str, variant: str = "plain") -> ctypes.CDLL:
    """The library of tests/emulator/<file>, which exports functions with C linkage."""
    folder = f"build/emulator_cases-{variant}"
    graph = Graph(Toolchain(require_compiler(), require_torch()), folder)
    sources = [source for source in find_sources() if source.kind is Kind.EMULATOR]
    sources.append(Source(f"tests/emulator/{file}", Kind.CUDA))
    objects = []
    for source in sources:
        flags = VARIANTS[variant].get(source.kind, ())
        objects += graph.compile([source], ["-DFUSED_EMULATED", *flags])
    library = f"{folder}/{Path(file).stem}.so"
    graph.link(library, objects, ["-pthread"])
    graph.run()
    return ctypes.CDLL(str(ROOT / library))
