"""The compiler and the torch that this build uses."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from build_support.errors import BuildError

MINIMUM_TORCH = (2, 10)
MINIMUM_GCC = 9
MINIMUM_SETUPTOOLS = 77  # the first to know pyproject.toml's `license` as an expression
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
    """The torch to build against, or None.

    First the one importable here; then, for builds in isolation, the one in the environment that
    is being installed into.
    """
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else None
    for python in _target_pythons():
        origin = origin or _torch_of(python)
    if origin is None:
        return None
    root = Path(origin).parent
    facts: dict[str, object] = {}
    exec((root / "version.py").read_text(), facts)
    cuda = facts.get("cuda")
    return Torch(str(facts["__version__"]), None if cuda is None else str(cuda), root)


def _target_pythons() -> list[str]:
    """Interpreters whose environment may be the target.

    pip runs the build under the target's own interpreter and hides its packages by PYTHONPATH; uv
    and `build` make an environment with another interpreter, but leave the active one's name.
    """
    prefixes = filter(None, map(os.environ.get, ("VIRTUAL_ENV", "CONDA_PREFIX")))
    return [sys.executable, *(os.path.join(prefix, "bin", "python") for prefix in prefixes)]


def _torch_of(python: str) -> str | None:
    """The file of the torch that a fresh interpreter of our version would import."""
    code = (
        "import importlib.util as u, sys\n"
        f"same = sys.version_info[:2] == {sys.version_info[:2]!r}\n"
        "spec = u.find_spec('torch') if same else None\n"
        "print(spec.origin if spec and spec.origin else '')"
    )
    hidden = ("PYTHONPATH", "PYTHONHOME", "PYTHONNOUSERSITE", "PYTHONSAFEPATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    try:
        # From / so that no folder called torch beside us is taken for it.
        answer = subprocess.run(
            [python, "-c", code], env=environment, cwd="/", capture_output=True, text=True
        )
    except OSError:
        return None
    return answer.stdout.strip() or None


def torch_requirement(torch: Torch | None) -> str:
    """What the package asks of torch: the minor version it is compiled for, or any we support."""
    if torch is None:
        return f"torch>={MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}"
    public = torch.version.split("+")[0]
    if re.fullmatch(r"\d+\.\d+\.\d+", public) is None:
        return f"torch=={public}"  # a nightly build promises nothing to the next
    return f"torch=={torch.release[0]}.{torch.release[1]}.*"


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


def require_setuptools() -> None:
    """For builds without isolation, where nobody checks pyproject.toml's build requirements."""
    try:
        found = metadata.version("setuptools")
    except metadata.PackageNotFoundError:
        found = "none"
    if found == "none" or int(found.split(".")[0]) < MINIMUM_SETUPTOOLS:
        raise BuildError(
            f"found setuptools {found}, need {MINIMUM_SETUPTOOLS} or later.",
            f'Run `pip install "setuptools>={MINIMUM_SETUPTOOLS}" ninja`, or install without '
            "--no-build-isolation.",
        )


def require_ninja() -> str:
    try:
        import ninja
    except ImportError:
        raise BuildError(
            "the Python package ninja is missing (it brings the writer of the build graph).",
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
    major = version.split()[-1].split(".")[0]
    if "clang" not in version and major.isdigit() and int(major) < MINIMUM_GCC:
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
