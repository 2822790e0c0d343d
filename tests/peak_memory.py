"""The memory that this process held at most."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def peak_memory() -> int:
    """Bytes that the process held at most since the last reset_peak_memory()."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return 1024 * int(match[1])


def reset_peak_memory() -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not reset the peak of a process's memory")
    return peak_memory()
