"""setuptools' commands over our own ninja graph.

Not torch's BuildExtension: libfused.so is a library without Python, kernel files include no torch
header, and nvcc may come from a wheel, in a layout where torch does not look.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

from build_support import build_info
from build_support.cuda import choose_cuda
from build_support.graph import Toolchain, package_graph
from build_support.sources import ROOT, find_sources
from build_support.toolchain import (
    build_tag,
    extension_suffix,
    require_compiler,
    require_platform,
    require_torch,
)

PRODUCTS = ("libfused.so", f"_C{extension_suffix()}", "_build_info.py")


class Build(build):
    """setuptools' build in an empty folder, so that no file of an earlier one gets into a wheel."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if Path(self.build_lib).resolve().is_relative_to(ROOT / "build"):
            shutil.rmtree(self.build_lib, ignore_errors=True)


class BuildExt(build_ext):
    """Builds libfused.so, _C and _build_info.py and puts them into the wheel or the source tree.

    Objects and products stay in build/<tag>, so that a second build compiles what changed.
    """

    def run(self) -> None:
        require_platform()
        torch, compiler = require_torch(), require_compiler()
        cuda, reason = choose_cuda(torch, compiler)
        toolchain = Toolchain(compiler, torch, cuda)
        folder = f"build/{build_tag(torch, cuda.version if cuda else None)}"
        package_graph(toolchain, folder).run()
        info = build_info.collect(toolchain, reason)
        build_info.write(ROOT / folder / "_build_info.py", info)
        for name in PRODUCTS:
            _install(ROOT / folder / name, self._package_folder() / name)
        print(build_info.summary(info), flush=True)

    def _package_folder(self) -> Path:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return (ROOT if in_place else Path(self.build_lib)) / "fused"

    def get_source_files(self) -> list[str]:
        return [source.path for source in find_sources()]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "fused" / name) for name in PRODUCTS]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def _install(source: Path, destination: Path) -> None:
    """Copies by way of a rename: a process that has the old library loaded keeps it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}")
    shutil.copyfile(source, temporary)
    shutil.copymode(source, temporary)
    os.replace(temporary, destination)
