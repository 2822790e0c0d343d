"""Builds the tests' module, in which the CUDA kernels run on the CPU, and prints its path.

    python -m build_support.emulated [plain | races | sanitized | coverage | quick]
    env $(python -m build_support.emulated --environment sanitized) python -m pytest -k emulat

docs/emulator.md says what the variants are for; `make check-full` runs the suite on each.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from build_support.graph import Toolchain, emulated_graph
from build_support.sources import ROOT, Kind
from build_support.toolchain import extension_suffix, require_compiler, require_torch

_SANITIZE = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g1")

# What a variant adds to the flags of each kind of file.
VARIANTS: Mapping[str, Mapping[Kind, tuple[str, ...]]] = {
    "plain": {},
    # g++ calls a hook at every access, and csrc/emulator/races.cpp answers, not libtsan.
    "races": {
        Kind.CUDA: ("-fsanitize=thread", "-g1"),
        Kind.EMULATOR: ("-DFUSED_EMULATOR_RACES", "-g1"),
    },
    "sanitized": {Kind.CUDA: _SANITIZE, Kind.EMULATOR: _SANITIZE},
    # To be compiled once and run little, as tests/emulator/mutants.py does.
    "quick": {Kind.CUDA: ("-O1",)},
    # Not optimised, so that a line that ran is a line that counts.
    "coverage": {Kind.CUDA: ("--coverage", "-O0", "-g")},
}
LINK_FLAGS: Mapping[str, tuple[str, ...]] = {
    "sanitized": ("-fsanitize=address,undefined",),
    "coverage": ("--coverage",),
}


def environment(variant: str) -> dict[str, str]:
    """What the tests of a variant need in their environment."""
    variables = {"FUSED_EMULATED_VARIANT": variant}
    if variant == "sanitized":
        # Python itself is not compiled with the sanitizers, and never frees all that it allocates.
        # libstdc++ goes ahead too, for AddressSanitizer looks up __cxa_throw when the process
        # begins. It writes to the descriptor that pytest would capture and lose at the process's
        # end: hence PYTEST_ADDOPTS.
        compiler = require_compiler().path
        libraries = [
            subprocess.run(
                [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("libasan.so", "libstdc++.so.6")
        ]
        variables |= {
            "LD_PRELOAD": ":".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            "PYTEST_ADDOPTS": "--capture=sys",
        }
    return variables


def build(variant: str = "plain") -> Path:
    """Builds what is out of date (nothing, in half a second, if nothing is)."""
    folder = "build/emulated" if variant == "plain" else f"build/emulated-{variant}"
    module = f"{folder}/_C_emulated{extension_suffix()}"
    graph = emulated_graph(
        Toolchain(require_compiler(), require_torch()),
        folder,
        module,
        VARIANTS[variant],
        LINK_FLAGS.get(variant, ()),
    )
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    # Several test processes may want it at once.
    with open(ROOT / folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        graph.run()
    return ROOT / module


if __name__ == "__main__":
    if sys.argv[1:2] == ["--environment"]:
        print(*(f"{name}={value}" for name, value in environment(sys.argv[2]).items()))
    else:
        print(build(*sys.argv[1:]))
