"""nvcc: whether to use it, where it is, and for which architectures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CudaToolkit:
    nvcc: str
    version: str
    include_dirs: tuple[str, ...]
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    architectures: tuple[str, ...]
