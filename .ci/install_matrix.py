"""Installs the package in every way that the README promises, each into a fresh environment.

Usage: python .ci/install_matrix.py [CASE ...] [--work FOLDER]

Prints each case's time and ends with a table; exits with 1 if a case failed. `make check-full` runs
all of them. Case `cuda` downloads several GB (a CUDA build of torch); no case needs a GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = os.environ.get("TORCH", "torch==2.13.0")
CUDA_TORCH = os.environ.get("CUDA_TORCH", "torch==2.14.1")
OLD_TORCH, OLD_PYTHON = "torch==2.11.0", "3.12"
NOTHING: Mapping[str, str] = {}

# Each kernel family, forward and backward, beside stock.
SMOKE = """
import copy, torch, fused
from torch import nn
layers = (
    (nn.MultiheadAttention(16, 4), [torch.randn(9, 2, 16)] * 3),
    (nn.LSTM(16, 8), [torch.randn(9, 2, 16)]),
    (nn.Conv2d(4, 8, 3, padding="same"), [torch.randn(2, 4, 9, 7)]),
)
for stock, inputs in layers:
    parent = nn.Sequential(copy.deepcopy(stock))
    replaced = fused.patch(parent).replaced
    assert len(replaced) == 1, replaced
    results = []
    for layer, optimizer in ((stock, torch.optim.AdamW), (parent[0], fused.AdamW)):
        out = layer(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        optimizer(layer.parameters(), eps=1e-2).step()  # some gradients are rounding alone
        results.append([out, *layer.parameters()])
    for ours, expected in zip(*reversed(results)):
        torch.testing.assert_close(ours, expected)
assert fused.__file__.startswith({location!r}), fused.__file__
"""


class Failure(Exception):
    """A case that did not do what it should; the message says what."""


class Environment:
    """A fresh virtual environment and the commands that a user would type in it."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.folder = folder
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
        self.python = str(folder / "bin" / "python")
        # Not in the source tree, where `import fused` would find the tree and not the package.
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()

    def run(
        self,
        *command: str,
        expect: int | None = 0,
        cwd: Path | None = None,
        env: Mapping[str, str] = NOTHING,
    ) -> str:
        """Runs a command and returns its output; `expect` is its exit status, None for any."""
        print(f"  $ {' '.join(env_prefix(env) + [shorten(word) for word in command])}", flush=True)
        answer = subprocess.run(
            command,
            cwd=cwd or self.elsewhere,
            env={**base_environment(), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if expect is not None and answer.returncode != expect:
            raise Failure(f"exit status {answer.returncode}, expected {expect}:\n{answer.stdout}")
        return answer.stdout

    def pip(self, *arguments: str, expect: int | None = 0, env: Mapping[str, str] = NOTHING) -> str:
        return self.run(self.python, "-m", "pip", *arguments, expect=expect, env=env)

    def smoke(self, source: Path | None = None) -> None:
        """SMOKE, and `info`, with the package where it should be."""
        location = str(source or self.folder)
        self.run(self.python, "-W", "error::ImportWarning", "-c", SMOKE.format(location=location))
        print(
            "    " + self.run(self.python, "-m", "fused", "info").replace("\n", "\n    ").rstrip()
        )


def base_environment() -> dict[str, str]:
    hidden = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "FUSED_CUDA", "CXX")
    return {name: value for name, value in os.environ.items() if name not in hidden}


def env_prefix(env: Mapping[str, str]) -> list[str]:
    return [f"{name}={shorten(value)}" for name, value in env.items()]


def shorten(word: str) -> str:
    return word if len(word) < 60 else word[:20] + " ... " + word[-30:]


def expect_in(text: str, *words: str) -> None:
    for word in words:
        if word not in text:
            raise Failure(f"expected {word!r} in:\n{text}")


def constraint(work: Path) -> dict[str, str]:
    """Makes every resolver pick TORCH, in build environments too (newer pips need the second)."""
    file = work / "constraint.txt"
    file.write_text(f"{TORCH}\n")
    return {"PIP_CONSTRAINT": str(file), "PIP_BUILD_CONSTRAINT": str(file)}


# The cases. Each takes the work folder and a clean clone of the source tree.


def plain(work: Path, source: Path) -> None:
    """pip install . into an environment that has torch, with the pip that came and the newest."""
    env = Environment(work / "plain")
    env.pip("install", "-q", TORCH, "numpy")
    for pip in ("the pip that comes with Python", "the newest pip"):
        print(f"  with {pip}: {env.pip('--version').split()[1]}")
        expect_in(env.pip("install", "-v", str(source)), "CPU kernels only")
        env.smoke()
        env.pip("uninstall", "-q", "-y", "fused-kernels")
        env.pip("install", "-q", "--upgrade", "pip")


def no_torch(work: Path, source: Path) -> None:
    """pip install . where there is no torch: the build and the package agree on one."""
    env = Environment(work / "no_torch")
    env.pip("install", "-q", str(source), "numpy", env=constraint(work))
    env.smoke()


def editable(work: Path, source: Path) -> None:
    """pip install -e . : the package is the source tree."""
    env = Environment(work / "editable")
    env.pip("install", "-q", TORCH, "numpy")
    env.pip("install", "-q", "-e", str(source))
    env.smoke(source)


def offline(work: Path, source: Path) -> None:
    """--no-build-isolation --no-index, plain and editable; and what is said if ninja is missing."""
    env = Environment(work / "offline")
    env.pip("install", "-q", TORCH, "numpy", "setuptools>=77")
    flags = ["install", "--no-build-isolation", "--no-index", str(source)]
    expect_in(env.pip(*flags, expect=1), "the Python package ninja is missing", "pip install ninja")
    env.pip("install", "-q", "ninja")
    env.pip(*flags)
    env.smoke()
    env.pip("uninstall", "-q", "-y", "fused-kernels")
    env.pip(*flags[:-1], "-e", str(source))
    env.smoke(source)


def distributions(work: Path, source: Path) -> None:
    """python -m build: the wheel comes from the sdist, both have one version, and it installs."""
    env = Environment(work / "distributions")
    env.pip("install", "-q", TORCH, "numpy", "build")
    out = work / "dist"
    command = [env.python, "-m", "build", "-q", "--outdir", str(out), str(source)]
    env.run(*command, env={"VIRTUAL_ENV": str(env.folder)})
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    version = sdist.name.removesuffix(".tar.gz").split("-")[1]
    expect_in(wheel.name, f"-{version}-")
    if any(name.endswith((".so", "_build_info.py")) for name in archive_names(sdist)):
        raise Failure(f"{sdist.name} carries what a build made")
    env.pip("install", "-q", str(wheel))
    env.smoke()
    expect_in(env.pip("show", "fused-kernels"), f"Version: {version}", "Requires: torch")


def archive_names(path: Path) -> list[str]:
    import tarfile

    with tarfile.open(path) as archive:
        return archive.getnames()


def git_url(work: Path, source: Path) -> None:
    """pip install git+URL."""
    env = Environment(work / "git_url")
    env.pip("install", "-q", TORCH, "numpy")
    env.pip("install", "-q", "--no-cache-dir", f"git+file://{source}")
    env.smoke()


def uv(work: Path, source: Path) -> None:
    """uv pip install . : one command, by the settings in pyproject.toml."""
    env = Environment(work / "uv")
    env.pip("install", "-q", "uv")
    tool = str(env.folder / "bin" / "uv")
    target = ["--python", env.python]
    # uv does not read pip's settings: tell it where this machine keeps its wheels, if it does.
    links = env.pip("config", "get", "global.find-links", expect=None).strip()
    extra = {"UV_FIND_LINKS": links} if os.path.isdir(links) else {}
    env.run(tool, "pip", "install", "-q", *target, exact(links), "numpy", cwd=source, env=extra)
    env.run(tool, "pip", "install", "-q", *target, ".", cwd=source, env=extra)
    env.smoke()


def exact(links: str) -> str:
    """TORCH with the local version of the wheel at hand, which uv wants to be named."""
    name, _, version = TORCH.partition("==")
    found = sorted(Path(links).glob(f"torch-{version}+*.whl")) if os.path.isdir(links) else []
    return f"{name}=={found[0].name.split('-')[1]}" if found else TORCH


def cuda(work: Path, source: Path) -> None:
    """A CUDA build of torch and no nvcc in sight: the compiler comes as a build requirement.

    First a wheel built for another torch, whose import has to say so.
    """
    env = Environment(work / "cuda")
    began = time.monotonic()
    env.pip("install", "-q", CUDA_TORCH, "numpy")
    print(f"  {CUDA_TORCH} installed in {time.monotonic() - began:.0f} s")
    moved_wheel(env, work, source)

    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(f for f in folders if not os.path.exists(os.path.join(f, "nvcc")))
    hidden = {"PATH": path, "CUDA_HOME": "", "CUDA_PATH": ""}
    began = time.monotonic()
    output = env.pip("install", "-v", "--force-reinstall", "--no-deps", str(source), env=hidden)
    expect_in(output, "with CUDA", "8.0, 9.0a, 10.0+PTX, 12.0, 7.5-PTX")
    print(f"  five architectures built in {time.monotonic() - began:.0f} s")
    env.smoke()
    library = next(env.folder.glob("lib/python*/site-packages/fused/libfused.so"))
    command = [env.python, "-m", "build_support.fatbin", str(library)]
    code = env.run(*command, cwd=source)
    print(f"  GPU code: {code.strip()}")
    expect_in(code, "sm_80", "sm_90", "sm_100", "sm_120", "compute_75")

    flags = ["install", "--no-build-isolation", "--no-index", str(source)]
    env.pip("install", "-q", "setuptools>=77", "ninja")
    text = env.pip(
        *flags, "--force-reinstall", "--no-deps", expect=1, env={**hidden, "FUSED_CUDA": "1"}
    )
    expect_in(text, "FUSED_CUDA=1, but torch", "there is none", "nvidia-cuda-nvcc==")


def moved_wheel(env: Environment, work: Path, source: Path) -> None:
    """A wheel built for TORCH, forced into an environment with another."""
    builder = Environment(work / "builder")
    builder.pip("install", "-q", TORCH, "numpy")
    builder.pip("wheel", "-q", "--no-deps", "-w", str(work / "moved"), str(source))
    (wheel,) = (work / "moved").glob("*.whl")
    env.pip("install", "-q", "--no-deps", str(wheel))
    error = env.run(env.python, "-c", "import fused.functional", expect=1)
    expect_in(
        error,
        "ImportError: fused: built for Python",
        f"torch {TORCH.partition('==')[2]}",
        f"torch {CUDA_TORCH.partition('==')[2]}",
        "pip install --no-cache-dir --force-reinstall --no-deps",
    )
    print("    " + error[error.rindex("ImportError") :].rstrip().replace("\n", "\n    "))


def old(work: Path, source: Path) -> None:
    """Python 3.12 with torch 2.11, the oldest torch that is tested."""
    python = find_python(OLD_PYTHON)
    if python is None:
        raise Failure(f"found no Python {OLD_PYTHON}")
    env = Environment(work / "old", python)
    env.pip("install", "-q", OLD_TORCH, "numpy")
    env.pip("install", "-q", str(source), env={"FUSED_CUDA": "0"})
    env.smoke()


def find_python(version: str) -> str | None:
    kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(kept[-1]) if kept else shutil.which(f"python{version}")


Case = Callable[[Path, Path], None]
CASES: dict[str, Case] = {
    case.__name__: case
    for case in (plain, no_torch, editable, offline, distributions, git_url, uv, cuda, old)
}


def run_case(case: Case, work: Path, source: Path) -> tuple[str, float]:
    print(f"== {case.__name__}: {(case.__doc__ or '').splitlines()[0]}", flush=True)
    began, result = time.monotonic(), "passed"
    try:
        case(work, source)
    except (Failure, subprocess.CalledProcessError) as error:
        print(f"FAILED: {error}")
        result = "FAILED"
    seconds = time.monotonic() - began
    print(f"== {case.__name__}: {result} in {seconds:.0f} s", flush=True)
    return result, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one)")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    results = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        for name in arguments.cases or CASES:
            # A clean clone for each, so that its time is that of a first build.
            source = work / f"source_{name}"
            subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
            results[name] = run_case(CASES[name], work, source)
            shutil.rmtree(work / name, ignore_errors=True)
    for name, (result, seconds) in results.items():
        print(f"{name:<14}{result:<8}{seconds:6.0f} s")
    return int(any(result != "passed" for result, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
