"""Which GPU code a library holds, read from its fatbin headers (cuobjdump is not in the wheels).

`python -m build_support.fatbin fused/libfused.so` prints e.g. "sm_80 x12, compute_75 x12".
"""

from __future__ import annotations

import struct
import sys
from collections import Counter
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
FILE_HEADER = struct.Struct("<IHHQ")  # magic, version, header bytes, bytes that follow
ENTRY_HEADER = struct.Struct(
    "<HHIQIIHHI"
)  # kind, -, header bytes, payload bytes, ..., architecture
KINDS = {1: "compute", 2: "sm"}  # PTX, machine code


def contents(library: Path) -> Counter[str]:
    """How many images there are for each architecture, one for each compiled .cu file."""
    data, found = library.read_bytes(), Counter[str]()
    start = data.find(MAGIC)
    while start >= 0:
        _, _, header, size = FILE_HEADER.unpack_from(data, start)
        entry, end = start + header, start + header + size
        while entry < end:
            kind, _, header, payload, *_, architecture = ENTRY_HEADER.unpack_from(data, entry)
            found[f"{KINDS.get(kind, kind)}_{architecture}"] += 1
            entry += header + payload
        start = data.find(MAGIC, end)
    return found


if __name__ == "__main__":
    counts = contents(Path(sys.argv[1]))
    print(", ".join(f"{name} x{count}" for name, count in sorted(counts.items())) or "no GPU code")
