"""What the measurements say: rows for the table, plain data for JSON, the HTML report."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from fused._report.text import duration, ratio, three_digits
from fused.bench.cases import OPS
from fused.bench.measure import Result

_TITLES = {"attention": "Attention", "conv": "Convolution", "lstm": "LSTM", "optim": "Optimizers"}
_MACHINE = {"GB/s": "memory", "GFLOP/s": "torch.mm"}  # what the machine is measured by


def headers(*, compiled: bool) -> tuple[str, ...]:
    extra = ("compiled", "its ratio") if compiled else ()
    return ("case", "stock", "fused", "ratio", *extra, "rate, stock to fused", "stock runs")


def row(result: Result, *, compiled: bool) -> list[str]:
    unit = result.case.unit
    extra = []
    if compiled:
        ran = "compiled" in result.timings
        time = duration(result.timings["compiled"].median) if ran else "failed"
        extra = [time, ratio(result.ratio("compiled")) if ran else ""]
    return [
        str(result.case),
        duration(result.timings["stock"].median),
        duration(result.timings["fused"].median),
        ratio(result.ratio()) if result.wrong is None else "WRONG",
        *extra,
        f"{three_digits(result.rate('stock'))} → {three_digits(result.rate('fused'))} {unit}"
        + _share_of_machine(result),
        result.stock_kernel,
    ]


def _share_of_machine(result: Result) -> str:
    if result.machine_rate is None:
        return ""
    share = result.rate("fused") / result.machine_rate
    return f" ({share:.0%} of {_MACHINE[result.case.unit]})"


def as_data(result: Result) -> dict[str, Any]:
    """For JSON: one case with everything that was measured."""
    quartiles = statistics.quantiles(result.ratios(), n=4)
    return {
        "op": result.case.op,
        "case": str(result.case),
        "seconds": {name: timing.median for name, timing in result.timings.items()},
        "rounds": len(result.timings["stock"].rounds),
        "ratio": result.ratio(),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "rate": {name: result.rate(name) for name in result.timings},
        "unit": result.case.unit,
        "machine_rate": result.machine_rate,
        "stock_kernel": result.stock_kernel,
        "wrong": result.wrong,
        "failed": result.failed,
    }


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def write_report(
    path: Path, results: list[Result], environment: list[tuple[str, str]], *, compiled: bool
) -> None:
    from fused._report import charts
    from fused._report.page import Page, Picture, Section, Table, Tile, write_page

    tiles, sections = [], []
    for op in OPS:
        chosen = [result for result in results if result.case.op == op]
        if not chosen:
            continue
        ratios = [result.ratio() for result in chosen]
        faster = sum(value >= 1 for value in ratios)
        tiles.append(
            Tile(
                _TITLES[op],
                ratio(geometric_mean(ratios)),
                f"faster in {faster} of {len(ratios)} cases",
            )
        )
        labels = [str(r.case) + (" (WRONG)" if r.wrong is not None else "") for r in chosen]
        chart = charts.ratio_chart(labels, ratios)
        rows = [row(result, compiled=compiled) for result in chosen]
        sections.append(
            Section(
                _TITLES[op],
                blocks=[
                    Picture(
                        chart, "How many times as fast as stock; longer to the right is better."
                    ),
                    Table(headers(compiled=compiled), rows, left=1),
                ],
            )
        )
    page = Page(
        title="Speed against stock PyTorch",
        subtitle="Every case was checked for correctness, then stock and fused were timed in turns "
        "within one process. Times are medians, ratios the median over rounds; the figures on top "
        "are geometric means of the ratios.",
        tiles=tiles,
        sections=sections,
        environment=environment,
    )
    write_page(path, page)
