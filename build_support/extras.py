"""Prints the requirements of one of our extras: `python -m build_support.extras dev`.

`pip install "fused-kernels[dev]"` would build the package again just to install a linter.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata


def requirements(extra: str) -> list[str]:
    wanted = re.compile(rf"(.*?)\s*;.*\bextra == ['\"]{re.escape(extra)}['\"]")
    found = map(wanted.fullmatch, metadata.requires("fused-kernels") or [])
    return [match[1] for match in found if match]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
