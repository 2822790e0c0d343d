"""The compiler and the torch that this build uses."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from build_support.errors import BuildError

MINIMUM_TORCH = (2, 10)
MINIMUM_GCC = 9
MACHINES = ("x86_64", "aarch64")


@dataclass(frozen=True)
class Torch:
    """What the build needs to know of a torch, read without importing it (that takes seconds)."""

    version: str
    cuda: str | None
    root: Path

    @property
    def release(self) -> tuple[int, int]:
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @property
    def include_dirs(self) -> list[str]:
        include = self.root / "include"
        return [str(include), str(include / "torch" / "csrc" / "api" / "include")]

    @property
    def library_dir(self) -> str:
        return str(self.root / "lib")


def find_torch() -> Torch | None:
    """The torch on sys.path, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    facts: dict[str, object] = {}
    exec((root / "version.py").read_text(), facts)
    cuda = facts.get("cuda")
    return Torch(str(facts["__version__"]), None if cuda is None else str(cuda), root)


def require_torch() -> Torch:
    torch = find_torch()
    if torch is None:
        raise BuildError(
            "there is no torch to build against.",
            "Run `pip install torch` first, then install fused with --no-build-isolation.",
        )
    if torch.release < MINIMUM_TORCH:
        need = ".".join(map(str, MINIMUM_TORCH))
        raise BuildError(
            f"found torch {torch.version} in {torch.root.parent}, need {need} or later.",
            "Run `pip install --upgrade torch`.",
        )
    return torch


def require_platform() -> None:
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in MACHINES:
        raise BuildError(
            f"{system} on {machine} is not supported.",
            "fused builds on Linux, on x86-64 and (CPU kernels only) on aarch64.",
        )


def require_ninja() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        raise BuildError(
            "the Python package ninja is missing"
            + (f" ({found} alone does not do: the graph writer comes with the package)." if found else "."),
            "Run `pip install ninja`, or install without --no-build-isolation.",
        ) from None
    return os.path.join(ninja.BIN_DIR, "ninja")


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler as given by CXX, which may name a launcher: CXX="ccache g++"."""

    command: str
    version: str

    @property
    def path(self) -> str:
        """The compiler itself, without a launcher: what nvcc takes as its host compiler."""
        return shlex.split(self.command)[-1]


def require_compiler() -> Compiler:
    command = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), "")
    if not command or shutil.which(shlex.split(command)[0]) is None:
        raise BuildError(
            f"found no C++ compiler (CXX={command!r})." if command else "found no C++ compiler.",
            "Install g++ (Debian and Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`) "
            "or point CXX at one.",
        )
    answer = subprocess.run(
        [*shlex.split(command), "--version"], capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        raise BuildError(f"`{command} --version` fails.", "Point CXX at a C++ compiler that runs.")
    version = answer.stdout.splitlines()[0]
    number = version.split()[-1]
    if "clang" not in version and number.split(".")[0].isdigit():
        if int(number.split(".")[0]) < MINIMUM_GCC:
            raise BuildError(
                f"{version} is too old for torch's headers, which need g++ {MINIMUM_GCC} or later.",
                "Install a newer g++ and point CXX at it.",
            )
    return Compiler(command, version)


def python_include_dir() -> str:
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        raise BuildError(
            f"found no Python.h in {include}.",
            "Install Python's headers (Debian and Ubuntu: `apt install python3-dev`).",
        )
    return include


def extension_suffix() -> str:
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def build_tag(torch: Torch, cuda: str | None) -> str:
    """Names a build folder, so that environments which share a source tree keep their objects."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"{python}-torch{torch.version}" + (f"-cuda{cuda}" if cuda else "")


def jobs() -> int:
    """MAX_JOBS, else one per core this process may use, with 3 GB of memory for each compiler."""
    wanted = os.environ.get("MAX_JOBS")
    if wanted:
        if not wanted.isdigit() or int(wanted) < 1:
            raise BuildError(f"MAX_JOBS must be a positive number, got {wanted!r}.", "Unset it.")
        return int(wanted)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // (3 << 30)))
