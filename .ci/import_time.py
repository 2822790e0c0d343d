"""How long `import fused` takes beyond torch's own import; fails above 50 ms of processor time.

Prints the least and the median of several fresh processes, and the slowest modules. The byte code
is cached, as in any second run of a program, even where PYTHONDONTWRITEBYTECODE is set.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

CODE = """
import time, torch
began, began_cpu = time.perf_counter(), time.process_time()
import fused
print((time.perf_counter() - began) * 1000, (time.process_time() - began_cpu) * 1000)
"""
RUNS = 7
LIMIT_MS = 50


def main() -> None:
    with tempfile.TemporaryDirectory() as byte_code:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        sys.exit(measure(env | {"PYTHONPYCACHEPREFIX": byte_code}))


def measure(env: dict[str, str]) -> str | None:
    """Prints the figures; returns what is wrong with them, or None."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True)

    answers = [run("-c", CODE).stdout for _ in range(RUNS + 1)]
    # The first writes the byte code. On a busy machine the processor's time says more.
    wall, cpu = zip(*(map(float, answer.split()) for answer in answers[1:]))
    print(f"import fused after torch: {min(wall):.1f} ms at least,", end=" ")
    print(f"{statistics.median(wall):.1f} ms in the median; processor {min(cpu):.1f} ms")
    lines = run("-X", "importtime", "-c", "import torch, fused").stderr.splitlines()
    torch_done = next(i for i, line in enumerate(lines) if line.endswith("| torch"))
    after = [line.split("|") for line in lines[torch_done + 1 :]]
    slowest = sorted(
        ((int(self_us.split(":")[1]), name) for self_us, _, name in after), reverse=True
    )
    for microseconds, name in slowest[:5]:
        print(f"  {microseconds / 1000:6.1f} ms  {name.strip()}")
    return f"import fused takes more than {LIMIT_MS} ms" if min(cpu) > LIMIT_MS else None


if __name__ == "__main__":
    main()
