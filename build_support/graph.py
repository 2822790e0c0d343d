"""Writes the ninja graph: sources and a toolchain in, libfused.so and _C out.

Every path inside the source tree is relative, and ninja runs at its root: the same file has the
same command in every checkout, so that ccache hits across worktrees. Headers are tracked by the
compilers' own dependency files.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from build_support.cuda import CudaToolkit
from build_support.errors import BuildError
from build_support.sources import (
    ROOT,
    Kind,
    Source,
    binding_sources,
    emulated_sources,
    find_sources,
    library_sources,
)
from build_support.toolchain import (
    Compiler,
    Torch,
    extension_suffix,
    jobs,
    python_include_dir,
    require_ninja,
)

# Hidden by default: what leaves a library says FUSED_API, and the emulated module, which holds the
# same names as libfused.so, can share a process with it.
COMMON_FLAGS = ["-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Icsrc"]
# What g++ needs to vectorise; reductions say so themselves (`omp simd reduction`). Never
# -fassociative-math, which undoes two-step range reductions, nor -ffast-math: the softmax needs
# infinities. Never -march=native: kernels choose their ISA at run time.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]
# nvcc does not reassociate either, so emulated kernels round as the real ones do. -O2: they are
# run once per test, and compile in half the time.
EMULATED_KERNEL_FLAGS = ["-O2", "-fno-math-errno", "-Wno-unknown-pragmas"]
# A misaligned vector access traps on a GPU: here it calls csrc/emulator/access_checks.cpp.
# Kernels read floats as packs of 16 bytes and back, as nvcc lets them.
EMULATED_ONLY_FLAGS = ["-fsanitize=alignment,bounds", "-fno-strict-aliasing"]
KERNEL_STANDARD = "-std=c++17"
GLUE_STANDARD = "-std=c++20"  # torch's headers ask for it


@dataclass(frozen=True)
class Toolchain:
    compiler: Compiler
    torch: Torch
    cuda: CudaToolkit | None = None

    def flags(self, kind: Kind, defines: Sequence[str]) -> list[str]:
        """The g++ flags of a file of this kind."""
        if kind in (Kind.CPU, Kind.CUDA, Kind.EMULATOR):
            kernel = KERNEL_FLAGS if kind is Kind.CPU else EMULATED_KERNEL_FLAGS
            return [KERNEL_STANDARD, *COMMON_FLAGS, *kernel, *defines]
        # torch's pybind11 headers go ahead of any other, CPATH's included (hence -I; and no
        # warnings then, for they would be torch's): another pybind11 has other internals, with
        # which a ValueError thrown in C++ arrives in Python as a RuntimeError.
        binding = kind is Kind.BINDING
        flags = [GLUE_STANDARD, *COMMON_FLAGS, *defines, *(["-w"] if binding else [])]
        option = "-I" if binding else "-isystem "
        flags += [option + quote(directory) for directory in self.torch.include_dirs]
        if self.cuda is not None:
            flags += ["-isystem " + quote(directory) for directory in self.cuda.include_dirs]
        if binding:
            flags.append("-isystem " + quote(python_include_dir()))
        return flags


class Edge(NamedTuple):
    rule: str
    output: str
    inputs: list[str]
    flags: list[str]
    libraries: Sequence[str] = ()  # of ours, which have to be linked first


@dataclass
class Graph:
    """A ninja file in the making: compile() and link() add edges, write() saves it."""

    toolchain: Toolchain
    folder: str  # of the objects, relative to the root of the source tree
    edges: list[Edge] = field(default_factory=list)

    def compile(self, sources: Iterable[Source], defines: Sequence[str] = ()) -> list[str]:
        return [self._compile(source, defines) for source in sources]

    def _compile(self, source: Source, defines: Sequence[str]) -> str:
        output = f"{self.folder}/{source.path}.o"
        use_nvcc = source.kind is Kind.CUDA and "-DFUSED_EMULATED" not in defines
        if use_nvcc:
            assert self.toolchain.cuda is not None
            flags = [*self.toolchain.cuda.flags, *defines]
        else:
            flags = self.toolchain.flags(source.kind, defines)
            if source.kind is Kind.CUDA:
                flags += [*EMULATED_ONLY_FLAGS, "-x c++"]
        rule = "nvcc" if use_nvcc else "cxx"
        self.edges.append(Edge(rule, output, [source.path], flags))
        return output

    def link(
        self, output: str, objects: list[str], flags: list[str], libraries: Sequence[str] = ()
    ) -> str:
        self.edges.append(Edge("link", output, objects, [*libraries, *flags], libraries))
        return output

    def write(self) -> Path:
        from ninja import ninja_syntax

        path = ROOT / self.folder / "build.ninja"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            ninja = ninja_syntax.Writer(file, width=100)
            ninja.variable("ninja_required_version", "1.5")
            ninja.variable("builddir", self.folder)
            compiler = self.toolchain.compiler.command
            compile_command = f"{compiler} -MD -MF $out.d $flags -c $in -o $out"
            ninja.rule("cxx", compile_command, description="CXX $in", depfile="$out.d", deps="gcc")
            if self.toolchain.cuda is not None:
                command = f"{quote(self.toolchain.cuda.nvcc)} -MD -MF $out.d $flags -c $in -o $out"
                ninja.rule("nvcc", command, description="NVCC $in", depfile="$out.d", deps="gcc")
            linker = self.toolchain.compiler.path
            ninja.rule("link", f"{linker} -shared $in $flags -o $out", description="LINK $out")
            for edge in self.edges:
                libraries, flags = list(edge.libraries), {"flags": " ".join(edge.flags)}
                ninja.build(edge.output, edge.rule, edge.inputs, libraries, variables=flags)
        return path

    def run(self) -> None:
        ninja = require_ninja()
        file = self.write().relative_to(ROOT)
        command = [ninja, "-f", str(file), "-j", str(jobs())]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            raise BuildError(
                "compiling failed; the first error above says where.",
                f"Again, with every command shown: cd {ROOT} && ninja -v -f {file}",
            )


def _torch_link_flags(torch: Torch, *libraries: str) -> list[str]:
    return [
        "-L" + quote(torch.library_dir),
        "-Wl,--as-needed",
        *(f"-l{name}" for name in libraries),
    ]


def package_graph(toolchain: Toolchain, folder: str) -> Graph:
    """libfused.so and _C, as they go into the package."""
    graph = Graph(toolchain, folder)
    sources, torch, cuda = find_sources(), toolchain.torch, toolchain.cuda
    defines = ["-DFUSED_WITH_CUDA"] if cuda else []

    objects = graph.compile(library_sources(sources, cuda=cuda is not None), defines)
    flags = _torch_link_flags(torch, "torch", "torch_cpu", "c10")
    if cuda is not None:
        flags += ["-ltorch_cuda", "-lc10_cuda", *cuda.link_flags]
    # -z defs: a symbol that nobody defines is an error here, not at a user's import.
    # The RUNPATH serves programs without Python; under Python torch is loaded already.
    flags += ["-fopenmp", "-Wl,-soname,libfused.so", "-Wl,-z,defs"]
    flags.append("-Wl,-rpath,'$$ORIGIN/../torch/lib'")
    library = graph.link(f"{folder}/libfused.so", objects, flags)

    objects = graph.compile(binding_sources(sources), [*defines, "-DTORCH_EXTENSION_NAME=_C"])
    flags = _torch_link_flags(torch, "torch_python", "torch", "torch_cpu", "c10")
    flags.append("-Wl,-rpath,'$$ORIGIN'")
    graph.link(f"{folder}/_C{extension_suffix()}", objects, flags, libraries=[library])
    return graph


def emulated_graph(
    toolchain: Toolchain,
    folder: str,
    output: str,
    kernel_flags: Mapping[Kind, Sequence[str]],
    link_flags: Sequence[str],
) -> Graph:
    """The tests' module: glue, bindings and CUDA kernels, compiled by g++ for the emulator."""
    graph = Graph(toolchain, folder)
    defines = ["-DFUSED_EMULATED", "-DTORCH_EXTENSION_NAME=_C_emulated"]
    objects = []
    for source in emulated_sources(find_sources()):
        objects += graph.compile([source], [*defines, *kernel_flags.get(source.kind, ())])
    flags = _torch_link_flags(toolchain.torch, "torch_python", "torch", "torch_cpu", "c10")
    graph.link(output, objects, [*flags, "-fopenmp", *link_flags])
    return graph
