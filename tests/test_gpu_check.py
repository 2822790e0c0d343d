"""What benchmarks/gpu_check.sh finds is counted; the script itself needs a GPU."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_findings.py"
CASE = '<testcase name="test_one[{}]">{}</testcase>'


@pytest.fixture
def findings(tmp_path: Path) -> dict[str, Any]:
    functions = runpy.run_path(str(SCRIPT))
    functions["note"].__globals__["WORK"] = tmp_path
    return functions


def record(path: Path, *cases: tuple[str, str]) -> None:
    inside = "".join(CASE.format(*case) for case in cases)
    path.write_text(f"<testsuites><testsuite>{inside}</testsuite></testsuites>")


def test_tests_of_all_parts_are_counted(findings: dict[str, Any], tmp_path: Path) -> None:
    assert findings["test_counts"]() == {}
    record(tmp_path / "tests-cuda.xml", ("cuda", ""), ("3-cuda", "<failure/>"))
    record(tmp_path / "tests-others.xml", ("cpu", ""), ("emulated", "<skipped/>"), ("x", ""))
    assert findings["test_counts"]() == {
        "cpu": {"passed": 1},
        "cuda": {"passed": 1, "failed": 1},
        "emulated": {"skipped": 1},
        "other": {"passed": 1},
    }


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (0, "passed"),
        (1, "failed"),
        (124, "not finished in time"),
        (127, "not run: not installed"),
        (137, "not finished in time"),
    ],
)
def test_outcomes(findings: dict[str, Any], status: int, outcome: str, tmp_path: Path) -> None:
    findings["note"]("bench-lstm", str(status), "7")
    noted = json.loads((tmp_path / "bench-lstm.part.json").read_text())
    assert noted == {"outcome": outcome, "seconds": 7}


def test_what_only_tests_import_is_not_missing(findings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "helpers.py").touch()
    (tmp_path / "folder").mkdir()
    path = tmp_path / "test_one.py"
    path.write_text(
        "import torch\nfrom helpers import x\nimport folder.y\nfrom no_such_package.y import z\n"
    )
    assert findings["missing_packages"](path) == ["no_such_package"]
