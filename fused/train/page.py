"""The HTML report of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fused._report import charts
from fused._report.page import Listing, Page, Picture, Section, Table, Tile, write_page
from fused._report.text import count, ratio
from fused.train.results import HEADERS, loss_differences, table_rows


def write_report(
    path: Path, results: list[dict[str, Any]], settings: str, environment: list[tuple[str, str]]
) -> None:
    compared = [result for result in results if "ratio" in result]
    tiles = [
        Tile(
            result["title"],
            ratio(result["ratio"]),
            f"as fast as stock; curves at most {result['largest_loss_difference']:.1e} apart",
        )
        for result in compared
    ]
    summary = Section(
        "Summary",
        "Time per step is the median over blocks of steps, in which stock and fused took turns. "
        "A ratio above 1 means that fused is faster. The last column is the largest distance "
        "between the two training loss curves at any step.",
        [Table(HEADERS, table_rows(results))],
    )
    page = Page(
        title="Stock and fused, side by side",
        subtitle="Each model was trained twice from the same parameters on the same batches: once "
        "built from stock PyTorch layers and optimizers, once from fused ones.",
        tiles=tiles,
        sections=[summary, *(_model_section(result) for result in results)],
        environment=[*environment, ("settings", settings)],
    )
    write_page(path, page)


def _model_section(result: dict[str, Any]) -> Section:
    curves = {name: run["losses"] for name, run in result["runs"].items()}
    baseline = result["baseline"]
    levels = {}
    if baseline is not None:
        levels[f"{baseline['name']} model, held out"] = baseline["held_out"]
    if result["metric"] == "loss":
        name, run = list(result["runs"].items())[-1]
        levels[f"{name}, held out"] = run["held_out"]
    section = Section(
        result["title"],
        f"{result['data']}. {count(result['parameters'])} parameters, {result['steps']:,} steps of "
        f"{result['items_per_step']:,} {result['unit']}.",
        [
            Picture(
                charts.loss_chart(curves, levels),
                f"Training loss of {result['title']}: smoothed, with every step's loss behind it.",
            )
        ],
    )
    if "ratio" in result:
        step = result["largest_loss_difference_step"] + 1
        section.blocks.append(
            Picture(
                charts.difference_chart(loss_differences(result["runs"])),
                "Distance between the two loss curves. Rounding differs from the first step on and "
                f"training amplifies it; it is largest at step {step}.",
            )
        )
    section.blocks += [
        Listing(f"What the {name} model writes after “def ”", run["sample"])
        for name, run in result["runs"].items()
        if "sample" in run
    ]
    return section
