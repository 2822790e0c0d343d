"""Which file under csrc is compiled how, and into which product.

The kind of a file follows from its name alone, so that adding an op needs no change here:

csrc/bindings/module.cpp    BINDING  pybind11: the only files that know Python
csrc/emulator/bindings.cpp  BINDING
csrc/emulator/*.cpp         EMULATOR runs .cu files on the CPU; only in the tests' module
csrc/<op>/*_cpu*.cpp        CPU      CPU kernels; no torch header, kernel flags
csrc/<op>/*.cu              CUDA     nvcc, or g++ for the emulator; no torch header
every other .cpp            GLUE     the checks, allocations and ATen calls of an op
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Kind(enum.Enum):
    GLUE = "glue"
    BINDING = "binding"
    CPU = "cpu"
    CUDA = "cuda"
    EMULATOR = "emulator"


@dataclass(frozen=True)
class Source:
    path: str  # relative to the root of the source tree, as the compiler sees it
    kind: Kind


def classify(path: Path) -> Kind:
    if path.suffix == ".cu":
        return Kind.CUDA
    if path.name in ("module.cpp", "bindings.cpp"):
        return Kind.BINDING
    if path.parent.name == "emulator":
        return Kind.EMULATOR
    return Kind.CPU if "_cpu" in path.stem else Kind.GLUE


def find_sources(root: Path = ROOT) -> list[Source]:
    """Every translation unit of csrc in a stable order."""
    paths = [*root.glob("csrc/*/*.cpp"), *root.glob("csrc/*/*.cu")]
    return [Source(os.fspath(p.relative_to(root)), classify(p)) for p in sorted(paths)]


def _select(sources: Iterable[Source], *kinds: Kind) -> list[Source]:
    return [source for source in sources if source.kind in kinds]


def library_sources(sources: Iterable[Source], *, cuda: bool) -> list[Source]:
    """libfused.so: no Python in it, so that a program without an interpreter can load it."""
    kinds = (Kind.GLUE, Kind.CPU, Kind.CUDA) if cuda else (Kind.GLUE, Kind.CPU)
    return _select(sources, *kinds)


def binding_sources(sources: Iterable[Source]) -> list[Source]:
    """fused/_C: the list of functions, linked to libfused.so."""
    units = _select(sources, Kind.BINDING)
    return [unit for unit in units if "/emulator/" not in unit.path]


def emulated_sources(sources: Iterable[Source]) -> list[Source]:
    """The tests' module: the same glue and CUDA kernels, on the CPU.

    It registers nothing with torch.library (library.cpp stays out), for libfused.so has the names.
    """
    units = _select(sources, Kind.GLUE, Kind.BINDING, Kind.CUDA, Kind.EMULATOR)
    return [unit for unit in units if not unit.path.endswith("bindings/library.cpp")]
