"""Breaks the CUDA kernels one line at a time, and shows that the emulated tests notice.

    python tests/emulator/mutants.py [--files csrc/lstm/lstm_cell_forward.cuh ...] [--per-file 8]

Works on a copy of the tree in build/mutants. Each mutant is built and met with the tests of its op,
first as they are; one that survives is run once more with the race detector. A mutant that no test
can kill, because it computes the same, stands in EQUIVALENT with the reason; any other survivor
fails the run. Takes about a quarter of a minute for each mutant that dies early.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "mutants"
TIMEOUT = 900  # seconds; an endless loop is a mutant noticed

# The tests that answer for a folder of kernels; csrc/common is met by all of them.
TESTS = {
    "attention": ["tests/test_attention.py"],
    "conv": ["tests/test_conv.py"],
    "lstm": ["tests/test_lstm.py"],
    "optim": ["tests/test_optim.py"],
    "common": ["tests/test_attention.py", "tests/test_optim.py"],
}

# What is done to a line: a name, what is looked for, what it becomes. One mutant for each line and
# fault, at the first place that fits.
FAULTS: tuple[tuple[str, str, str], ...] = (
    ("barrier removed", r"__sync(threads|warp)\(\);", ";"),
    ("< to <=", r"(?<=[\w)\]]) < (?=[\w(])", " <= "),
    (">= to >", r" >= ", " > "),
    ("> to >=", r"(?<=[\w)\]]) > (?=[\w(])", " >= "),
    ("index off by one", r"(?<=[\w\])])\[([\w .:+*/%-]*[a-z]\w*)\](?!\()", r"[\1 + 1]"),
    ("+ to -", r" \+ ", " - "),
    ("* to +", r" \* (?=[\w(])", " + "),
)
ALWAYS = ("barrier removed",)  # the others are sampled

# Lines that compute the same with the fault: (file, fault, line) to the reason.
FORWARD, BACKWARD = "csrc/attention/attention_forward.cu", "csrc/attention/attention_backward.cu"
TILE, PACKS, WARP = (
    "csrc/attention/attention_tile.cuh",
    "csrc/common/vector_load.cuh",
    "csrc/common/warp.cuh",
)
TABLE = "csrc/optim/tensor_table.cuh"
TOO_LARGE = "tells 2^31 - 1 blocks from 2^31, which no machine that tests has the memory for"
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        path,
        "> to >=",
        'if (blocks > INT32_MAX) return "the problem needs 2^31 blocks or more";',
    ): TOO_LARGE
    for path in (FORWARD, BACKWARD)
} | {
    (
        FORWARD,
        "> to >=",
        "new_max = running.max[r] > new_max ? running.max[r] : new_max;",
    ): "of two equal maxima either will do",
    (
        WARP,
        "> to >=",
        "value = (other > value || other != other) ? other : value;",
    ): "of two equal maxima either will do",
    (
        FORWARD,
        "< to <=",
        "row < p.seqlen_q && column < p.seqlen_k",
    ): "the row behind the last is computed from zeros and never stored",
    (
        FORWARD,
        "< to <=",
        "if (p.maybe_rng != nullptr && row < p.seqlen_q && column < p.seqlen_k) {",
    ): "the row behind the last is never stored",
    (
        TILE,
        ">= to >",
        "aligned && inside >= kSize ? load_pack(source) : load_pack_partly(source, inside);",
    ): "a whole pack is read element by element: slower, the same",
    (
        TABLE,
        "< to <=",
        "return {low, begin, begin + (rest < kOptimChunk ? rest : kOptimChunk)};",
    ): "equal values, either is chosen",
}


@dataclass(frozen=True)
class Mutant:
    path: str
    line_number: int
    fault: str
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.path, self.fault, self.before.strip()


def mutants_of(path: str) -> Iterator[Mutant]:
    for number, line in enumerate((TREE / path).read_text().splitlines()):
        code = line.split("//")[0]
        declares = re.match(r"\s*(#|template|static|using|constexpr|struct)", code)
        # Declarations of arrays and parameters look like subscripts, and sizes may just grow.
        if declares or re.match(r"\s*[\w:]+(<\w+>)?\*? \w+\[", code) or "(&" in code:
            continue
        # A loop of a fixed length over registers: the bounds check ends every such mutant.
        unrolled = re.match(r"\s*for \(int (\w+) = 0; \1 < (k\w+|[A-Z]|Pack<T>::kSize|\d);", code)
        for fault, pattern, replacement in FAULTS:
            if unrolled and fault == "< to <=":
                continue
            changed = re.sub(pattern, replacement, code, count=1)
            if changed != code:
                yield Mutant(path, number, fault, line, changed)


def choose(paths: list[str], per_file: int) -> list[Mutant]:
    chosen = []
    for path in paths:
        found = list(mutants_of(path))
        always = [mutant for mutant in found if mutant.fault in ALWAYS]
        others = [mutant for mutant in found if mutant.fault not in ALWAYS]
        random.Random(path).shuffle(others)
        chosen += always + others[: max(0, per_file - len(always))]
    return chosen


def copy_tree() -> None:
    """What git knows, and the built package; objects of an earlier run stay, ccache or not."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    built = [str(path.relative_to(ROOT)) for path in (ROOT / "fused").glob("*.so")]
    for name in filter(None, [*names, *built, "fused/_build_info.py"]):
        target = TREE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            shutil.copyfile(source, target)


def run_tests(tests: list[str], variant: str) -> tuple[bool, str]:
    """Whether all passed, and else what failed first."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-k", "emulated", "--no-header"]
    command += ["-p", "no:cacheprovider", "-W", "ignore", *tests]
    environment = {**os.environ, "FUSED_EMULATED_VARIANT": variant}
    try:
        answer = subprocess.run(
            command,
            cwd=TREE,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, "does not end"
    if answer.returncode == 0:
        return True, ""
    if "the build failed" in answer.stdout:
        raise SystemExit(f"the mutant does not compile:\n{answer.stdout[-3000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) \S+::(\S+(?: \S+)*?)(?: - .*)?$", answer.stdout, re.M)
    if failed:
        return False, failed[1]
    if answer.returncode < 0:
        return False, f"signal {-answer.returncode}"
    raise SystemExit(f"pytest ended with {answer.returncode}:\n{answer.stdout}{answer.stderr}")


def verdict_on(mutant: Mutant) -> tuple[bool, str]:
    """Whether it was killed, and by what."""
    path = TREE / mutant.path
    original = path.read_text()
    lines = original.splitlines()
    lines[mutant.line_number] = mutant.after
    path.write_text("\n".join(lines) + "\n")
    tests = TESTS[mutant.path.split("/")[1]]
    try:
        passed, reason = run_tests(tests, "quick")
        if passed:
            passed, reason = run_tests(tests, "races")
            reason = reason and f"race detector: {reason}"
    finally:
        path.write_text(original)
    return not passed, reason


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", nargs="+", help="kernel source; by default all of csrc")
    parser.add_argument("--per-file", type=int, default=4, help="mutants at least, barriers first")
    parser.add_argument("--list", action="store_true", help="only say what would be done")
    options = parser.parse_args()
    copy_tree()
    folders = [f for f in TESTS if (TREE / "csrc" / f).is_dir()]
    paths = options.files or sorted(
        str(path.relative_to(TREE))
        for folder in folders
        for pattern in ("*.cu", "*.cuh")
        for path in (TREE / "csrc" / folder).glob(pattern)
    )
    mutants = choose(paths, options.per_file)
    survivors = 0
    for mutant in mutants:
        start = time.monotonic()
        where = f"{mutant.path}:{mutant.line_number + 1}"
        if options.list:
            verdict = ""
        elif mutant.key in EQUIVALENT:
            verdict = f"equivalent: {EQUIVALENT[mutant.key]}"
        else:
            killed, reason = verdict_on(mutant)
            survivors += not killed
            verdict = f"killed by {reason}" if killed else "SURVIVED"
            verdict += f" ({time.monotonic() - start:.0f} s)"
        print(f"{where}  {mutant.fault}  {mutant.after.strip()}  {verdict}", flush=True)
    print(f"{len(mutants)} mutants, {survivors} unexplained survivors")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
