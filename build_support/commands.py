"""setuptools' build_ext over our own ninja graph.

Not torch's BuildExtension: libfused.so is a library without Python, kernel files include no torch
header, and nvcc may come from a wheel, in a layout where torch does not look.
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools.command.build_ext import build_ext

from build_support.graph import Toolchain, package_graph
from build_support.sources import ROOT, find_sources
from build_support.toolchain import (
    build_tag,
    extension_suffix,
    require_compiler,
    require_platform,
    require_torch,
)


class BuildExt(build_ext):
    """Builds libfused.so, _C and _build_info.py into the wheel's folder or, in place, the tree."""

    def run(self) -> None:
        require_platform()
        torch = require_torch()
        toolchain = Toolchain(require_compiler(), torch)
        folder = f"build/{build_tag(torch, None)}"
        destination = self._package_folder()
        package_graph(toolchain, folder, os.path.relpath(destination, ROOT)).run()

    def _package_folder(self) -> Path:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return (ROOT if in_place else Path(self.build_lib).resolve()) / "fused"

    def get_source_files(self) -> list[str]:
        return [source.path for source in find_sources()]

    def get_outputs(self) -> list[str]:
        names = ("libfused.so", f"_C{extension_suffix()}", "_build_info.py")
        return [str(Path(self.build_lib) / "fused" / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}
