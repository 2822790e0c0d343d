"""Breaks the CUDA kernels one line at a time, and shows that the emulated tests notice.

    python tests/emulator/mutants.py                              all of csrc
    python tests/emulator/mutants.py --files csrc/lstm/*.cuh      some of it
    python tests/emulator/mutants.py --table                      only the table of what was decided

Every barrier and every wait is removed in turn, and a sample of the other lines is broken. Works on
a copy of the tree in build/mutants. A mutant is built with little optimisation and met with the
smallest tests that should notice, then with all of its op's, then with the race detector and the
sanitizers, until one fails. A mutant that no test can kill, because it computes the same, stands in
equivalent_mutants.py with the reason; any other survivor fails the run. What was killed is kept by
the text of the broken file and not met again (--afresh does), so that a run can be broken off and
go on. A mutant takes about a quarter of a minute, half where a header is compiled into many files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from equivalent_mutants import EQUIVALENT

from build_support.emulated import environment

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "mutants"
VERDICTS = TREE / "verdicts.json"
DOES_NOT_COMPILE = "does not compile"  # no mutant, then: it counts for nothing
TIMEOUT = 300  # seconds, building apart; an endless loop is a mutant noticed

# The tests that answer for a file or else its folder, those first that notice most; csrc/common is
# met by its users'. A name may be a pattern; the first that fits counts.
TESTS = {
    "csrc/attention/attention_mma*": [
        "tests/test_attention_tensor_cores.py",
        "tests/test_attention_tf32.py",
        "tests/test_attention_options.py",
        "tests/test_attention_random.py",
    ],
    "csrc/attention/attention_backward_scores.cu": [
        "tests/test_attention_score_parts.py",
        "tests/test_attention.py",
        "tests/test_attention_options.py",
        "tests/test_attention_varlen.py",
        "tests/test_attention_random.py",
    ],
    "csrc/attention/attention_split.cu": [
        "tests/test_attention_few_queries.py",
        "tests/test_attention_cache.py",
        "tests/test_attention_random.py",
    ],
    "csrc/attention/attention_tangent.cu": ["tests/test_attention_tangent.py"],
    "attention": [
        "tests/test_attention.py",
        "tests/test_attention_options.py",
        "tests/test_attention_varlen.py",
        "tests/test_attention_cache.py",
        "tests/test_attention_random.py",
    ],
    "csrc/conv/conv_mma*": ["tests/test_conv_tensor_cores.py"],
    "conv": ["tests/test_conv.py"],
    "lstm": ["tests/test_lstm.py", "tests/test_lstm_graphs.py"],
    "rotary": ["tests/test_rotary.py"],
    "optim": [
        "tests/test_optim.py",
        "tests/test_optim_options.py",
        "tests/test_optim_state.py",
        "tests/test_optim_load.py",
        "tests/test_optim_tensors.py",
        "tests/test_optim_stock.py",
        "tests/test_optim_table.py",
    ],
    "csrc/optim/*table.cu*": ["tests/test_optim.py", "tests/test_optim_table.py"],
    "csrc/optim/norm.cu": ["tests/test_optim_norm.py", "tests/test_optim_clip.py"],
    "csrc/common/mma_*": [
        "tests/test_conv_tensor_cores.py",
        "tests/test_attention_tensor_cores.py",
        "tests/test_attention_tf32.py",
    ],
    "common": [
        "tests/test_attention.py",
        "tests/test_attention_few_queries.py",
        "tests/test_optim.py",
        "tests/test_conv.py",
        "tests/test_lstm.py",
        "tests/test_rotary.py",
    ],
}
FOLDERS = [name for name in TESTS if "/" not in name]

# What is done to a line: a name, what is looked for, what it becomes. One mutant for each line and
# fault, at the first place that fits.
FAULTS: tuple[tuple[str, str, str], ...] = (
    ("barrier removed", r"__sync(threads|warp)\([^()]*\);", ";"),
    ("wait removed", r"(ptx::)?cp_async_wait<[^<>]*>\(\);", ";"),
    ("a wait too few", r"cp_async_wait<([^<>]*)>", r"cp_async_wait<\1 + 1>"),
    ("< to <=", r"(?<=[\w)\]]) < (?=[\w(])", " <= "),
    (">= to >", r" >= ", " > "),
    ("> to >=", r"(?<=[\w)\]]) > (?=[\w(])", " >= "),
    ("index off by one", r"(?<=[\w\])])\[([\w .:+*/%-]*[a-z]\w*)\](?!\()", r"[\1 + 1]"),
    ("+ to -", r" \+ ", " - "),
    ("* to +", r" \* (?=[\w(])", " + "),
    ("xor dropped", r" \^ [\w.]+", ""),
)
ALWAYS = ("barrier removed", "wait removed", "a wait too few")  # the others are sampled


@cache
def source(path: str) -> str:
    """A file as it was when the run began: the working tree may go on."""
    return (ROOT / path).read_text()


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

    @property
    def text(self) -> str:
        """The broken file."""
        lines = source(self.path).splitlines()
        lines[self.line_number] = self.after
        return "\n".join(lines) + "\n"

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.path}\n{self.text}".encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.path}:{self.line_number + 1}  {self.fault}  {self.after.strip()}"


def mutants_of(path: str) -> Iterator[Mutant]:
    for number, line in enumerate(source(path).splitlines()):
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


def choose(paths: Iterable[str], sample: int) -> list[Mutant]:
    chosen = []
    for path in paths:
        found = list(mutants_of(path))
        others = [mutant for mutant in found if mutant.fault not in ALWAYS]
        random.Random(path).shuffle(others)
        sampled = {*others[:sample]}
        chosen += [m for m in found if m.fault in ALWAYS or m in sampled]
    return chosen


def copy_tree() -> None:
    """What git knows, and the built package; objects of an earlier run stay, ccache or not."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    built = [str(path.relative_to(ROOT)) for path in (ROOT / "fused").glob("*.so")]
    if not built:
        raise SystemExit("mutants: the tests need the built package: make install")
    for name in filter(None, [*names, *built, "fused/_build_info.py"]):
        target = TREE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            shutil.copyfile(source, target)


def run_tests(tests: Iterable[str], variant: str, keyword: str) -> tuple[bool, str]:
    """Whether all passed, and else what failed first."""
    build = [sys.executable, "-m", "build_support.emulated", variant]
    built = subprocess.run(build, cwd=TREE, capture_output=True, text=True, check=False)
    if built.returncode != 0:
        if "error: " not in built.stdout + built.stderr:
            raise SystemExit(f"{variant}: the build failed\n{built.stdout}{built.stderr}")
        return False, DOES_NOT_COMPILE
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-k", keyword, "--no-header"]
    command += ["-p", "no:cacheprovider", "-W", "ignore", *tests]
    variables = {**os.environ, **environment(variant)}
    try:
        answer = subprocess.run(
            command,
            cwd=TREE,
            env=variables,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, "does not end"
    if answer.returncode == 0:
        return True, ""
    failed = re.search(r"^(?:FAILED|ERROR) \S+::(\S+(?: \S+)*?)(?: - .*)?$", answer.stdout, re.M)
    if failed:
        return False, failed[1]
    if answer.returncode < 0:
        return False, f"signal {-answer.returncode}"
    # It ends the process with 1, as failed tests do.
    if "ERROR: AddressSanitizer" in answer.stdout + answer.stderr:
        return False, "AddressSanitizer"
    raise SystemExit(f"pytest ended with {answer.returncode}:\n{answer.stdout}{answer.stderr}")


def tests_for(path: str) -> list[str]:
    names = (path, path.split("/")[1])
    return next(tests for name in names for key, tests in TESTS.items() if fnmatch(name, key))


def killer_of(mutant: Mutant) -> str | None:
    """The test that notices, or None."""
    path = TREE / mutant.path
    tests = tests_for(mutant.path)
    # Tensor cores take 16 bits, or float32 as tf32.
    few = f"emulated and ({'float16 or tf32' if 'mma' in mutant.path else 'float32'})"
    try:
        path.write_text(mutant.text)
        for variant, keyword, files in (
            ("quick", few, tests[:1]),
            ("quick", "emulat", tests),
            ("races", few, tests),
            ("sanitized", few, tests),
        ):
            passed, killer = run_tests(files, variant, keyword)
            if not passed:
                return killer if variant == "quick" else f"{killer} ({variant})"
    finally:
        path.write_text(source(mutant.path))
    return None


class Verdicts:
    """What was decided: the killer of each mutant, or None, by the broken file's text."""

    def __init__(self) -> None:
        self._killers: dict[str, str | None] = {}
        if VERDICTS.exists():
            self._killers = json.loads(VERDICTS.read_text())

    def forget(self, mutant: Mutant) -> None:
        self._killers.pop(mutant.digest, None)

    def knows(self, mutant: Mutant) -> bool:
        """A survivor is met again: there may be a new test."""
        return mutant.key in EQUIVALENT or self._killers.get(mutant.digest) is not None

    def decide(self, mutant: Mutant) -> None:
        self._killers[mutant.digest] = killer_of(mutant)
        VERDICTS.write_text(json.dumps(self._killers, indent=1) + "\n")

    def on(self, mutant: Mutant) -> tuple[str, str]:
        """One word, and what it rests on."""
        if mutant.key in EQUIVALENT:
            return "equivalent", EQUIVALENT[mutant.key]
        if mutant.digest not in self._killers:
            return "undecided", ""
        killer = self._killers[mutant.digest]
        if killer == DOES_NOT_COMPILE:
            return "no program", killer
        return ("SURVIVED", "no test fails") if killer is None else ("killed", killer)


def print_table(mutants: Iterable[Mutant], verdicts: Verdicts) -> Counter[str]:
    """Mutants by file and verdict; returns the sums."""
    words = ("killed", "equivalent", "SURVIVED", "undecided", "no program")
    files: dict[str, Counter[str]] = {}
    for mutant in mutants:
        files.setdefault(mutant.path, Counter())[verdicts.on(mutant)[0]] += 1
    sums = sum(files.values(), Counter[str]())
    width = max(map(len, [*files, "all"]))
    print("\n" + "file".ljust(width) + "".join(f"  {word}" for word in words))
    for name, counts in [*files.items(), ("all", sums)]:
        print(name.ljust(width) + "".join(f"  {counts[word]:{len(word)}}" for word in words))
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", nargs="+", help="kernel source; by default all of csrc")
    parser.add_argument("--sample", type=int, default=3, help="of each file, besides its barriers")
    parser.add_argument("--table", action="store_true", help="decide nothing")
    parser.add_argument("--afresh", action="store_true", help="decide again what was decided")
    options = parser.parse_args()
    if not options.table:
        copy_tree()
    every_path = sorted(
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for pattern in ("*.cu", "*.cuh")
        for path in (ROOT / "csrc" / folder).glob(pattern)
    )
    paths = options.files or every_path
    mutants = choose(paths, options.sample)
    stale = EQUIVALENT.keys() - {mutant.key for path in every_path for mutant in mutants_of(path)}
    if stale:
        raise SystemExit(f"equivalent_mutants.py: there is no such line: {sorted(stale)}")
    verdicts = Verdicts()
    if options.afresh:
        for mutant in mutants:
            verdicts.forget(mutant)
    for mutant in mutants:
        start = time.monotonic()
        if not options.table and not verdicts.knows(mutant):
            verdicts.decide(mutant)
        word, reason = verdicts.on(mutant)
        took = f" ({time.monotonic() - start:.0f} s)" if not options.table else ""
        print(f"{mutant}: {word}: {reason}{took}", flush=True)
    sums = print_table(mutants, verdicts)
    sys.exit(1 if sums["SURVIVED"] or sums["undecided"] else 0)


if __name__ == "__main__":
    main()
