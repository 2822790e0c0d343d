"""How long `import fused` takes beyond torch's own import: at most 50 ms is the aim.

Prints the least and the median of several fresh processes, and the slowest modules.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

CODE = """
import time, torch
began, began_cpu = time.perf_counter(), time.process_time()
import fused
print((time.perf_counter() - began) * 1000, (time.process_time() - began_cpu) * 1000)
"""
RUNS = 7


def main() -> None:
    python = [sys.executable]
    answers = [subprocess.check_output([*python, "-c", CODE], text=True) for _ in range(RUNS + 1)]
    # The first compiles byte code. On a busy machine the processor's time says more.
    wall, cpu = zip(*(map(float, answer.split()) for answer in answers[1:]))
    print(f"import fused after torch: {min(wall):.1f} ms at least,", end=" ")
    print(f"{statistics.median(wall):.1f} ms in the median; processor {min(cpu):.1f} ms")
    report = subprocess.run(
        [*python, "-X", "importtime", "-c", "import torch, fused"], capture_output=True, text=True
    )
    lines = report.stderr.splitlines()
    torch_done = next(i for i, line in enumerate(lines) if line.endswith("| torch"))
    after = [line.split("|") for line in lines[torch_done + 1 :]]
    slowest = sorted(
        ((int(self_us.split(":")[1]), name) for self_us, _, name in after), reverse=True
    )
    for microseconds, name in slowest[:5]:
        print(f"  {microseconds / 1000:6.1f} ms  {name.strip()}")


if __name__ == "__main__":
    main()
