"""nvcc: whether to use it, where it is, and for which architectures.

FUSED_CUDA=0|1         without CUDA kernels; or with them or not at all. Unset: with them where
                       torch is a CUDA build and there is an nvcc of its major version.
CUDA_HOME, CUDA_PATH   the toolkit to use, ahead of PATH and of PyPI's wheels.
TORCH_CUDA_ARCH_LIST   as for torch's own extensions: "8.0 9.0a 12.0+PTX"
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from build_support.errors import BuildError
from build_support.toolchain import Compiler, Torch

# The driver compiles PTX for GPUs that no machine code is for: that of 10.0, with tensor cores,
# from Blackwell on, that of 7.5 for any from Turing on. None is left without.
DEFAULT_ARCHITECTURES = "8.0 9.0a 10.0+PTX 12.0 7.5-PTX"
MINIMUM_ARCHITECTURE = 75
# The names that torch's own extensions take in TORCH_CUDA_ARCH_LIST.
NAMED_ARCHITECTURES = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0 8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX",
}
# The wheels that make up a compiler from CUDA 13 on. Those for CUDA 12 hold ptxas and no nvcc.
FIRST_CUDA_WITH_WHEELS = 13
COMPILER_WHEELS = (
    "nvidia-cuda-nvcc",
    "nvidia-nvvm",
    "nvidia-cuda-crt",
    "nvidia-cuda-cccl",
    "nvidia-cuda-runtime",
)


@dataclass(frozen=True)
class Architecture:
    """One entry of the list: machine code for it, PTX that the driver compiles, or both."""

    number: int  # 90 for 9.0
    suffix: str = ""  # "a" (this architecture and no other) or "f" (this family)
    machine_code: bool = True
    ptx: bool = False

    def __str__(self) -> str:
        kind = "" if not self.ptx else "+PTX" if self.machine_code else "-PTX"
        return f"{self.number // 10}.{self.number % 10}{self.suffix}{kind}"

    @property
    def gencode(self) -> list[str]:
        name = f"{self.number}{self.suffix}"
        flags = [f"-gencode=arch=compute_{name},code=sm_{name}"] if self.machine_code else []
        if self.ptx:
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
        return flags


def parse_architectures(text: str) -> list[Architecture]:
    """The architectures of "8.0;9.0a 12.0+PTX"; "7.5-PTX" is our own word for PTX alone."""
    found: list[Architecture] = []
    for word in re.split(r"[;,\s]+", text.strip()):
        for item in NAMED_ARCHITECTURES.get(word.removesuffix("+PTX"), word).split():
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)([+-]PTX)?", item)
            number = int(match[1]) * 10 + int(match[2]) if match else 0
            if match is None or number < MINIMUM_ARCHITECTURE:
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST must list architectures from 7.5 on, got {item!r}.",
                    'Example: TORCH_CUDA_ARCH_LIST="8.0 9.0a+PTX".',
                )
            arch = Architecture(number, match[3], match[4] != "-PTX", match[4] is not None)
            if arch not in found:
                found.append(arch)
    return found


def _architectures_of_gpus() -> str:
    """What the driver says of the GPUs in this machine, or nothing."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    found = sorted(set(re.findall(r"^\d+\.\d$", answer.stdout, re.MULTILINE)))
    # Hopper's matrix instructions are in its "a" variant alone.
    names = ["9.0a" if name == "9.0" else name for name in found]
    return " ".join(names) if answer.returncode == 0 else ""


def choose_architectures(nvcc: str) -> list[Architecture]:
    """TORCH_CUDA_ARCH_LIST, else the GPUs present, else those of the default that nvcc knows."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or _architectures_of_gpus()
    if given:
        return parse_architectures(given)
    answer = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"compute_(\d+)", answer.stdout))
    return [a for a in parse_architectures(DEFAULT_ARCHITECTURES) if str(a.number) in known]


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that runs, and the layout that it reports itself (wheels have lib and no lib64)."""

    path: str
    version: str
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


def _describe(path: str) -> Nvcc | None:
    """Asks nvcc for its version and folders; None if it does not run."""
    command = [path, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    try:
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
        dry_run = subprocess.run(command, capture_output=True, text=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    number = re.search(r"release (\d+\.\d+)", version.stdout)
    facts = dict(re.findall(r"^#\$ (\w+)=(.*)$", dry_run.stderr, re.MULTILINE))
    if number is None or "TOP" not in facts:
        return None
    top = Path(facts["TOP"]).resolve()
    words = shlex.split(facts.get("INCLUDES", "") + " " + facts.get("SYSTEM_INCLUDES", ""))
    includes = [word.removeprefix("-I") for word in words if word != "-isystem"]
    libraries = [word[2:] for word in shlex.split(facts.get("LIBRARIES", "")) if word[:2] == "-L"]
    libraries += [str(top / "lib64"), str(top / "lib")]
    return Nvcc(path, number[1], _existing(includes), _existing(libraries))


def _existing(folders: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(Path(f).resolve()) for f in folders if Path(f).is_dir()))


def _candidates(torch: Torch) -> Iterator[str]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield os.path.join(os.environ[variable], "bin", "nvcc")
    if on_path := shutil.which("nvcc"):
        yield on_path
    # PyPI's wheels, in the build environment or beside torch.
    for folder in [*sys.path, str(torch.root.parent)]:
        yield os.path.join(folder, "nvidia", f"cu{_major(torch)}", "bin", "nvcc")


def _major(torch: Torch) -> int:
    return int(str(torch.cuda).split(".")[0])


def find_nvcc(torch: Torch) -> tuple[Nvcc | None, str]:
    """The first nvcc of torch's CUDA major version, else None and what was found instead."""
    refused: dict[str, str] = {}
    for path in _candidates(torch):
        if path in refused or not os.access(path, os.X_OK):
            continue
        nvcc = _describe(path)
        if nvcc is not None and nvcc.major == _major(torch):
            return nvcc, ""
        refused[path] = f"{path} is CUDA {nvcc.version}" if nvcc else f"{path} does not run"
    need = f"torch {torch.version} needs nvcc of CUDA {_major(torch)}"
    return None, f"{need}, but " + ("; ".join(refused.values()) if refused else "there is none")


def compiler_requirements(torch: Torch | None) -> list[str]:
    """What an isolated build has to fetch so that there is an nvcc; nothing if there is one.

    Without a torch to match (None) the extras of cuda-toolkit do it: a CUDA torch pins that
    package to its own CUDA version, so the resolver picks the compiler of the torch it picks.
    """
    if os.environ.get("FUSED_CUDA") == "0":
        return []
    if torch is None:
        return ["cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]"] if shutil.which("nvcc") is None else []
    if torch.cuda is None or _major(torch) < FIRST_CUDA_WITH_WHEELS:
        return []
    if find_nvcc(torch)[0] is not None:
        return []
    minor = ".".join(torch.cuda.split(".")[:2])
    return [f"{wheel}=={minor}.*" for wheel in COMPILER_WHEELS]


def how_to_get_nvcc(torch: Torch) -> str:
    if _major(torch) >= FIRST_CUDA_WITH_WHEELS:
        minor = ".".join(str(torch.cuda).split(".")[:2])
        wheels = " ".join(f'"{wheel}=={minor}.*"' for wheel in COMPILER_WHEELS)
        return f"Install without --no-build-isolation, or run `pip install {wheels}`."
    return (
        f"Install NVIDIA's CUDA toolkit {torch.cuda} (PyPI has no nvcc for CUDA {_major(torch)}; "
        f'conda has: `conda install -c nvidia "cuda-nvcc={torch.cuda}"`) and set CUDA_HOME to it.'
    )


@dataclass(frozen=True)
class CudaToolkit:
    nvcc: str
    version: str
    include_dirs: tuple[str, ...]
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    architectures: tuple[str, ...]


def nvcc_flags(architectures: list[Architecture], compiler: Compiler) -> list[str]:
    """The flags of a kernel file; `Toolchain` adds the defines."""
    flags = ["-O3", "-std=c++17", "-Icsrc", "--expt-relaxed-constexpr", f"-ccbin={compiler.path}"]
    flags.append("-Xcompiler=-fPIC,-fvisibility=hidden,-fopenmp,-Wall")
    return flags + [flag for arch in architectures for flag in arch.gencode]


def _check_host_compiler(nvcc: Nvcc, compiler: Compiler) -> None:
    """Compiles an empty kernel: nvcc refuses host compilers newer than itself."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("__global__ void probe() {}\n")
        command = [nvcc.path, f"-ccbin={compiler.path}", "-c", str(source), "-o", f"{source}.o"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        lines = (answer.stderr + answer.stdout).strip().splitlines() or ["no message"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(
            f"{nvcc.path} (CUDA {nvcc.version}) cannot compile with {compiler.version}: {reason}",
            "Point CXX at a g++ that this CUDA supports, or set FUSED_CUDA=0 for CPU kernels only.",
        )


def choose_cuda(torch: Torch, compiler: Compiler) -> tuple[CudaToolkit | None, str]:
    """The toolkit to build the CUDA kernels with, or None and the reason to do without."""
    wanted = os.environ.get("FUSED_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise BuildError(f"FUSED_CUDA must be 0 or 1, got {wanted!r}.", "Unset it for the default.")
    if wanted == "0":
        return None, "FUSED_CUDA=0"
    if torch.cuda is None:
        if wanted == "1":
            raise BuildError(
                f"FUSED_CUDA=1, but torch {torch.version} in {torch.root.parent} has no CUDA.",
                "Install a CUDA build of torch first, or unset FUSED_CUDA.",
            )
        return None, f"torch {torch.version} has no CUDA"
    nvcc, reason = find_nvcc(torch)
    if nvcc is None:
        if wanted == "1":
            raise BuildError(f"FUSED_CUDA=1, but {reason}.", how_to_get_nvcc(torch))
        return None, f"{reason}. {how_to_get_nvcc(torch)}"
    _check_host_compiler(nvcc, compiler)
    return _toolkit(nvcc, choose_architectures(nvcc.path), compiler, torch.root.parent), ""


def kernel_toolkit(path: str, architectures: list[Architecture], compiler: Compiler) -> CudaToolkit:
    """The nvcc at `path` for kernels alone, which no torch has to match."""
    nvcc = _describe(path)
    if nvcc is None:
        raise BuildError(f"{path} does not run.", "Point CUDA_HOME at a CUDA toolkit.")
    _check_host_compiler(nvcc, compiler)
    return _toolkit(nvcc, architectures, compiler, Path(os.devnull))


def _toolkit(
    nvcc: Nvcc, architectures: list[Architecture], compiler: Compiler, site_packages: Path
) -> CudaToolkit:
    # ATen's CUDA headers want cuBLAS' and others', which lie beside torch.
    beside_torch = site_packages / "nvidia" / f"cu{nvcc.major}"
    includes = _existing([*nvcc.include_dirs, str(beside_torch / "include")])
    libraries = _existing([*nvcc.library_dirs, str(beside_torch / "lib")])
    # By its full name: the wheels have no libcudart.so to link to. torch loads the same file.
    link_flags = [
        *("-L" + shlex.quote(folder) for folder in libraries),
        f"-l:libcudart.so.{nvcc.major}",
    ]
    return CudaToolkit(
        nvcc.path,
        nvcc.version,
        includes,
        tuple(nvcc_flags(architectures, compiler)),
        tuple(link_flags),
        tuple(str(arch) for arch in architectures),
    )
