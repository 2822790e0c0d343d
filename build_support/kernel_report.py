"""What can be known of the CUDA kernels without a GPU: the compiler's own report.

    python -m build_support.kernel_report             compile, print, compare with the table
    python -m build_support.kernel_report --update    ... and write the table anew

Compiles every kernel for the architectures below and reads registers, stack and spills from ptxas,
and from the machine code how global memory is read, whether local memory is touched in a loop, and
where the tensor cores are used. kernel_report.txt says what is expected of each kernel; the check
fails when one takes more registers or stack, starts to spill, or when any of its instances loses a
16-byte load or a tensor-core instruction. A kernel that touches local memory needs a reason in
LOCAL_MEMORY_BECAUSE, table or not.

nvdisasm reads the machine code: from PATH, the toolkit, or `pip install nvidia-cuda-nvdisasm`.
Without it those columns are neither checked nor written, and the report says so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build_support.cuda import nvcc_flags
from build_support.errors import BuildError
from build_support.kernels import find_kernels
from build_support.sources import ROOT, Kind, find_sources
from build_support.toolchain import Compiler, jobs, require_compiler

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
FOLDER = ROOT / "build" / "kernel_report"
TABLE = ROOT / "build_support" / "kernel_report.txt"

# Columns of the table, and whether more is worse.
COLUMNS: Mapping[str, bool] = {
    "registers": True,
    "stack": True,  # bytes
    "spills": True,  # bytes stored and loaded
    "local_in_loops": True,  # instructions that touch local memory, inside a loop
    "wide_loads": False,  # global loads of 16 bytes or more
    "tensor": False,  # matrix instructions
}
# Kernels that may have a stack, spill, or touch local memory in a loop, and why.
LOCAL_MEMORY_BECAUSE: Mapping[str, str] = {
    "conv_mma_correlate_kernel": "a few words of the sums on their way out, once a tile, in some "
    "instances on sm_100 and sm_120, so that two blocks have room on a multiprocessor",
}
FROM_MACHINE_CODE = ("local_in_loops", "wide_loads", "tensor")


@dataclass
class Instance:
    """One instance of a kernel template on one architecture."""

    name: str  # as in the source
    signature: str  # with template arguments
    architecture: str
    figures: dict[str, int]


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    found = [*candidates, shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for path in found:
        if path and os.access(path, os.X_OK):
            return path
    raise BuildError("the report needs nvcc.", "Install a CUDA toolkit; no GPU is needed.")


def find_nvdisasm(nvcc: str) -> str | None:
    folders = [str(Path(nvcc).resolve().parent)]
    folders += [str(path) for entry in sys.path for path in Path(entry).glob("nvidia/cu*/bin")]
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=os.pathsep.join(folders))


def demangle(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    answer = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return dict(zip(names, answer.stdout.splitlines(), strict=True))


def short_name(demangled: str) -> tuple[str, str]:
    """The kernel's own name, and with it its template arguments."""
    text = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    match = re.match(r"(?:\w+::)*(\w+)(<.*>)?\(", text)
    if match is None:
        return demangled, demangled
    return match[1], match[1] + (match[2] or "").replace("fused::", "")


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Registers, stack and spills of each entry function, by mangled name."""
    figures: dict[str, dict[str, int]] = {}
    entry = ""
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            entry = match[1]
            figures[entry] = {}
        elif entry and (match := re.search(r"(\d+) bytes stack frame, (\d+) .* (\d+) ", line)):
            figures[entry]["stack"] = int(match[1])
            figures[entry]["spills"] = int(match[2]) + int(match[3])
        elif entry and (match := re.search(r"Used (\d+) registers", line)):
            figures[entry]["registers"] = int(match[1])
    return figures


def parse_machine_code(text: str) -> dict[str, dict[str, int]]:
    """What nvdisasm shows of each function, by mangled name."""
    return {
        match[1]: count_instructions(match[2].splitlines())
        for match in re.finditer(
            r"^\s*\.section\s+\.text\.(\w+),.*?$(.*?)(?=^\s*\.section\s|\Z)", text, re.M | re.S
        )
    }


def count_instructions(lines: list[str]) -> dict[str, int]:
    labels: dict[str, int] = {}
    in_loop = [False] * len(lines)
    for number, line in enumerate(lines):
        if match := re.match(r"\s*(\.L\w+):", line):
            labels[match[1]] = number
        # A branch back to a label that we have passed closes a loop. One to itself ends a kernel.
        elif (match := re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)) and match[1] in labels:
            start = labels[match[1]]
            in_loop[start:number] = [True] * (number - start)
    local = [bool(re.search(r"\b(LDL|STL)\b", line)) for line in lines]
    return {
        "local_in_loops": sum(a and b for a, b in zip(local, in_loop, strict=True)),
        "wide_loads": sum(bool(re.search(r"\bLDG\S*\.(128|256)\b", line)) for line in lines),
        "tensor": sum(
            bool(re.search(r"\b([HIDQ]MMA|[HIQ]GMMA|UTC\wMMA)\b", line)) for line in lines
        ),
    }


def compile_one(
    source: str, architecture: str, nvcc: str, nvdisasm: str | None, compiler: Compiler
) -> list[Instance]:
    output = FOLDER / architecture / (Path(source).stem + ".cubin")
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [nvcc, *nvcc_flags([], compiler), f"-arch={architecture}", "-Xptxas", "-v"]
    command += ["-cubin", "-o", str(output), source]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise BuildError(f"{source} does not compile for {architecture}:", answer.stderr)
    figures = parse_ptxas(answer.stderr)
    if nvdisasm is not None:
        text = subprocess.run(
            [nvdisasm, "-c", str(output)], capture_output=True, text=True, check=True
        ).stdout
        for name, counts in parse_machine_code(text).items():
            if name in figures:
                figures[name] |= counts
    names = demangle(figures)
    return [
        Instance(*short_name(names[mangled]), architecture, values)
        for mangled, values in figures.items()
    ]


def compile_all(architectures: Iterable[str], nvdisasm: str | None, nvcc: str) -> list[Instance]:
    compiler = require_compiler()
    sources = [source.path for source in find_sources() if source.kind is Kind.CUDA]
    with ThreadPoolExecutor(jobs()) as pool:
        tasks = [
            pool.submit(compile_one, source, architecture, nvcc, nvdisasm, compiler)
            for source in sources
            for architecture in architectures
        ]
        return [instance for task in tasks for instance in task.result()]


def worst(instances: Iterable[Instance]) -> dict[str, dict[str, int]]:
    """For each kernel, the worst figure of any instance on any architecture. Of what is wanted, the
    sum over all instances, each on its worst architecture: many an instance has no 16-byte loads,
    and the least would hide that another lost its own."""
    instances = list(instances)
    least: dict[tuple[str, str, str], int] = {}
    found: dict[str, dict[str, int]] = {one.name: {} for one in instances}
    for one in instances:
        kernel = found[one.name]
        for column, value in one.figures.items():
            if COLUMNS[column]:
                kernel[column] = max(kernel.get(column, value), value)
            else:
                key = (one.name, column, one.signature)
                least[key] = min(least.get(key, value), value)
    for (name, column, _), value in least.items():
        found[name][column] = found[name].get(column, 0) + value
    return found


def read_table(text: str) -> dict[str, dict[str, int]]:
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    header, *rows = lines
    cells = ((row[0], zip(header[1:], row[1:], strict=True)) for row in rows)
    return {name: {column: int(text) for column, text in row if text != "-"} for name, row in cells}


def format_table(rows: Mapping[str, Mapping[str, int]]) -> str:
    width = max(map(len, rows), default=0)
    head = "kernel".ljust(width) + "".join(f"  {column}" for column in COLUMNS)
    body = [
        name.ljust(width)
        + "".join(f"  {rows[name].get(column, '-'):>{len(column)}}" for column in COLUMNS)
        for name in sorted(rows)
    ]
    return "\n".join([head, *body]) + "\n"


def compare(
    found: Mapping[str, Mapping[str, int]], expected: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """What is worse than the table says, in words."""
    complaints = [f"{name}: is not in the table" for name in found if name not in expected]
    complaints += [f"{name}: is in the table alone" for name in expected if name not in found]
    for name in sorted(found.keys() & expected.keys()):
        for column in COLUMNS:
            if column not in found[name] or column not in expected[name]:
                continue
            value, limit = found[name][column], expected[name][column]
            if value > limit if COLUMNS[column] else value < limit:
                word = "at most" if COLUMNS[column] else "at least"
                complaints.append(f"{name}: {column} must be {word} {limit}, got {value}")
    return complaints


def unexplained(found: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Kernels in local memory without a word why, and words for kernels that are not."""
    columns = ("stack", "spills", "local_in_loops")
    local = {name for name, figures in found.items() if any(figures.get(c, 0) for c in columns)}
    explained = LOCAL_MEMORY_BECAUSE.keys() & found.keys()
    return [
        *(f"{name}: touches local memory, and no reason is given" for name in local - explained),
        *(
            f"{name}: touches no local memory, for which a reason is given"
            for name in explained - local
        ),
    ]


HEADING = """\
# What the compiler may make of each kernel. The worst of all its instances on all architectures: at
# most so many registers, bytes of stack and of spills, and local-memory instructions in loops. All
# instances together: at least so many 16-byte global loads and tensor-core instructions.
# Compared and written by `python -m build_support.kernel_report`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m build_support.kernel_report")
    parser.add_argument("--update", action="store_true", help="write the table anew")
    parser.add_argument("--all", action="store_true", help="print every instance")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES))
    options = parser.parse_args()
    nvcc = find_nvcc()
    nvdisasm = find_nvdisasm(nvcc)
    instances = compile_all(options.architectures, nvdisasm, nvcc)
    if options.all:
        rows = {f"{one.signature} {one.architecture}": one.figures for one in instances}
        print(format_table(rows))
    found = worst(instances)
    print(format_table(found))
    unseen = find_kernels().keys() - found.keys()
    complaints = [f"{name}: was not compiled" for name in sorted(unseen)]
    if nvdisasm is None:
        print(f"no nvdisasm: {', '.join(FROM_MACHINE_CODE)} not checked")
    complaints += unexplained(found)
    expected = read_table(TABLE.read_text())
    if options.update:  # what nvdisasm was not there to count stays as it was, or "-"
        rows = {name: expected.get(name, {}) | figures for name, figures in found.items()}
        TABLE.write_text(HEADING + format_table(rows))
    else:
        complaints += compare(found, expected)
    print("\n".join(complaints) or f"{len(instances)} instances as expected")
    sys.exit(1 if complaints else 0)


if __name__ == "__main__":
    main()
