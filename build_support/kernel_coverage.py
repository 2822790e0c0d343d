"""Which lines of the kernel source the emulated tests ran, by gcov.

    FUSED_EMULATED_VARIANT=coverage python -m pytest -k emulat
    python -m build_support.kernel_coverage

Prints a line per file and the lines that never ran, and fails below 95 %.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict

from build_support.errors import BuildError
from build_support.sources import ROOT

FOLDER = ROOT / "build" / "emulated-coverage"
REQUIRED = 0.95


def is_kernel_source(path: str) -> bool:
    return path.startswith("csrc/") and path.endswith((".cu", ".cuh"))


def line_counts() -> dict[str, dict[int, int]]:
    """How often each line ran, by file; instances of a template count together."""
    data = sorted(FOLDER.rglob("*.gcda"))
    if not data:
        raise BuildError(
            "there is no coverage data.",
            "Run FUSED_EMULATED_VARIANT=coverage python -m pytest -k emulat first.",
        )
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for path in data:
        answer = subprocess.run(
            ["gcov", "--json-format", "--stdout", str(path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for document in filter(None, answer.stdout.splitlines()):
            for file in json.loads(document)["files"]:
                if is_kernel_source(file["file"]):
                    for line in file["lines"]:
                        counts[file["file"]][line["line_number"]] += line["count"]
    return counts


def ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] to "1-3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def main() -> None:
    counts = line_counts()
    width = max(map(len, counts))
    num_lines = num_run = 0
    for file in sorted(counts):
        lines = counts[file]
        missed = sorted(number for number, count in lines.items() if count == 0)
        run = len(lines) - len(missed)
        num_lines += len(lines)
        num_run += run
        print(f"{file:{width}}  {run / len(lines):6.1%}  {ranges(missed)}".rstrip())
    share = num_run / num_lines
    print(f"{'all kernel source':{width}}  {share:6.1%}  of {num_lines} lines")
    sys.exit(0 if share >= REQUIRED else 1)


if __name__ == "__main__":
    main()
