"""What gpu_check.sh found, gathered into benchmarks/results/<gpu>.json.

python benchmarks/gpu_findings.py note PART STATUS SECONDS
python benchmarks/gpu_findings.py ignored     pytest options for tests whose package is missing
python benchmarks/gpu_findings.py report
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu_check"
NOT_FOUND = 127  # the status with which a part says that its tool is not installed


def note(part: str, status: str, seconds: str) -> None:
    late = dict.fromkeys((124, 137), "not finished in time")  # interrupted, or killed after that
    outcome = {0: "passed", NOT_FOUND: "not run: not installed"} | late
    finding = {"outcome": outcome.get(int(status), "failed"), "seconds": int(seconds)}
    (WORK / f"{part}.part.json").write_text(json.dumps(finding))


def missing_packages(path: Path) -> list[str]:
    """The modules that a test file imports at its top and this machine has not got."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.append(node.module)
    own = {"fused", "build_support", *(each.stem for each in path.parent.iterdir())}
    tops = {name.split(".")[0] for name in names} - own
    return sorted(top for top in tops if importlib.util.find_spec(top) is None)


def tests_not_run() -> dict[str, list[str]]:
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    found = {path.name: missing_packages(path) for path in paths}
    return {name: missing for name, missing in found.items() if missing}


def test_counts() -> dict[str, dict[str, int]]:
    """Passed, failed and skipped tests by backend, from pytest's own record."""
    counts: dict[str, Counter[str]] = {}
    records = [ElementTree.parse(path) for path in sorted(WORK.glob("tests-*.xml"))]
    for case in (case for record in records for case in record.iter("testcase")):
        words = re.findall(r"\w+", case.get("name", ""))
        backend = next((b for b in ("cuda", "emulated", "cpu") if b in words), "other")
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "passed"
        outcome = "skipped" if "skipped" in tags else outcome
        counts.setdefault(backend, Counter())[outcome] += 1
    return {backend: dict(count) for backend, count in sorted(counts.items())}


def first_line(*command: str) -> str:
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "not found"
    return (answer.stdout.strip().splitlines() or ["unknown"])[-1]


def benchmarks() -> dict[str, Any] | None:
    """The figures of every op that finished, with the environment of the first."""
    found = [json.loads(path.read_text()) for path in sorted(WORK.glob("*.bench.json"))]
    if not found:
        return None
    return found[0] | {"cases": [case for one in found for case in one["cases"]]}


def report() -> None:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu_check: torch finds no GPU here; nothing is written")
    gpu = torch.cuda.get_device_name()
    parts = {
        path.name.removesuffix(".part.json"): json.loads(path.read_text())
        for path in sorted(WORK.glob("*.part.json"))
    }
    findings: dict[str, Any] = {
        "gpu": gpu,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": first_line("nvcc", "--version"),
        "fused": importlib.metadata.version("fused-kernels"),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": first_line("git", "rev-parse", "HEAD"),
        "changed_files": first_line("git", "status", "--porcelain") != "unknown",
        "parts": parts,
        "tests": test_counts(),
        "tests_not_run": tests_not_run(),
        "benchmarks": benchmarks(),
    }
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    target = ROOT / "benchmarks" / "results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(findings, indent=1) + "\n")
    print(f"written: {target.relative_to(ROOT)}")


def main() -> None:
    command, *arguments = sys.argv[1:]
    if command == "note":
        note(*arguments)
    elif command == "ignored":
        print(*(f"--ignore=tests/{name}" for name in tests_not_run()))
    else:
        report()


if __name__ == "__main__":
    main()
