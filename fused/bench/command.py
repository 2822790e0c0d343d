"""``python -m fused bench``: speed of every op against stock PyTorch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fused._cli import CommandError, parse_device, positive_int
from fused._report.environment import describe, environment
from fused._report.files import write_json
from fused._report.page import require_report_packages
from fused._report.text import table
from fused.bench import results as report
from fused.bench.case import Case
from fused.bench.cases import OPS, all_cases
from fused.bench.measure import Result, run_case

_SECONDS = 0.5  # for each contender of a case
_QUICK_SECONDS = 0.05


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fused bench",
        description="Times every op against stock PyTorch in the same process, in turns, after a "
        "check for correctness. A ratio above 1 means that fused is faster.",
    )
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help=f"{', '.join(OPS)}; all of them by default")
    add("--match", metavar="TEXT", help="only cases whose name contains TEXT")
    add("--list", action="store_true", help="print the cases' names and do nothing")
    add("--device", default="auto", help="auto, cpu or cuda[:N]")
    add(
        "--threads",
        type=positive_int,
        metavar="N",
        help="CPU threads, instead of torch's own choice",
    )
    add("--quick", action="store_true", help="fewer cases, less time for each")
    add("--compile", action="store_true", help="a column for stock under torch.compile")
    add("--json", type=Path, metavar="PATH", help="write everything measured")
    add("--report", type=Path, metavar="PATH", help="write an HTML page with bar charts")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    cases = _choose(args.ops, args.match, quick=args.quick)
    if args.list:
        print("\n".join(map(str, cases)))
        return 0
    device = parse_device(args.device)
    if args.report is not None:
        require_report_packages()
    for path in (args.json, args.report):
        if path is not None and path.is_dir():
            raise CommandError(f"{path}: is a folder, must be a file to write")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    info = environment()
    described = describe(info, device)
    print("\n".join(f"{name:<8} {value}" for name, value in described), flush=True)

    results = _run(cases, device, args)
    if args.json is not None:
        data = [report.as_data(result) for result in results]
        write_json(args.json, {"environment": info, "device": str(device), "cases": data})
    if args.report is not None:
        report.write_report(args.report, results, described, compiled=args.compile)
    return _verdict(results)


def _choose(ops: list[str], match: str | None, *, quick: bool) -> list[Case]:
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise CommandError(f"OP must be one of {', '.join(OPS)}, got {unknown[0]!r}")
    cases = [
        case
        for case in all_cases()
        if (not ops or case.op in ops)
        and (match is None or match in str(case))
        and (case.quick or not quick)
    ]
    if not cases:
        raise CommandError(f"--match: no case's name contains {match!r}")
    return cases


def _run(cases: list[Case], device: torch.device, args: argparse.Namespace) -> list[Result]:
    """All cases; each op's table is printed when it is complete, progress until then."""
    seconds = _QUICK_SECONDS if args.quick else _SECONDS
    results: list[Result] = []
    for op in OPS:
        chosen = [case for case in cases if case.op == op]
        rows = []
        for number, case in enumerate(chosen, 1):
            _show_progress(f"{op} {number}/{len(chosen)}: {case}")
            result = run_case(case, device, seconds, compiled=args.compile)
            rows.append(report.row(result, compiled=args.compile))
            results.append(result)
        _show_progress("")
        if rows:
            print("\n" + table(report.headers(compiled=args.compile), rows, left=1), flush=True)
    return results


def _show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _verdict(results: list[Result]) -> int:
    """Prints what is slower or wrong; the exit status."""
    ratios = [result.ratio() for result in results]
    slower = [result for result in results if result.ratio() < 1]
    print(
        f"\n{len(results)} cases, {len(results) - len(slower)} at least as fast as stock; "
        f"geometric mean of the ratios {report.geometric_mean(ratios):.2f}x"
    )
    for result in slower:
        print(f"slower: {result.case} ({result.ratio():.2f}x)")
    for result in results:
        for contender, reason in result.failed.items():
            print(f"{contender} failed: {result.case}: {reason}")
    wrong = [result for result in results if result.wrong is not None]
    for result in wrong:
        print(f"fused bench: {result.case} is wrong: {result.wrong}", file=sys.stderr)
    return 1 if wrong else 0
