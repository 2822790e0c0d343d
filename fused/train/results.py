"""What a finished training says: a dict for results.json, rows for the table."""

from __future__ import annotations

import math
from typing import Any

from fused._report.text import count, duration, ratio
from fused.train.loop import Training

HEADERS = ("model", "layers", "held out", "time/step", "throughput", "ratio", "max loss difference")


def summarise(training: Training, *, as_intended: bool) -> dict[str, Any]:
    """Evaluates one task's runs. ``as_intended`` says that data and steps are the task's own."""
    task = training.task
    runs: dict[str, Any] = {}
    for name, run in training.runs.items():
        score = run.evaluate()
        seconds = run.seconds_per_step()
        runs[name] = {
            "held_out": score,
            "held_out_text": task.format_score(score),
            "seconds_per_step": seconds,
            "items_per_second": task.items_per_step / seconds,
            "training_seconds": sum(seconds for _, seconds in run.block_seconds),
            "losses": run.losses,
        }
        if as_intended:
            text, reached = task.goal(score)
            runs[name]["goal"] = {"text": text, "reached": reached}
        sample = task.sample(run.model, run.device)
        if sample is not None:
            runs[name]["sample"] = sample
    baseline = task.baseline()
    any_run = next(iter(training.runs.values()))
    return {
        "model": task.name,
        "title": task.title,
        "data": task.data.describe(),
        "parameters": sum(parameter.numel() for parameter in any_run.model.parameters()),
        "steps": training.settings.steps,
        "unit": task.unit,
        "items_per_step": task.items_per_step,
        "metric": task.metric,
        "baseline": None if baseline is None else {"name": baseline[0], "held_out": baseline[1]},
        "runs": runs,
        **_comparison(runs),
    }


def _comparison(runs: dict[str, Any]) -> dict[str, Any]:
    """How fused stands against stock, where both ran."""
    if not {"stock", "fused"} <= runs.keys():
        return {}
    stock, fused = runs["stock"], runs["fused"]
    differences = loss_differences(runs)
    largest = math.inf if any(map(math.isnan, differences)) else max(differences)
    return {
        "ratio": stock["seconds_per_step"] / fused["seconds_per_step"],
        "largest_loss_difference": largest,
        "largest_loss_difference_step": 0 if math.isinf(largest) else differences.index(largest),
    }


def loss_differences(runs: dict[str, Any]) -> list[float]:
    """The distance between the two loss curves at every step."""
    pairs = zip(runs["stock"]["losses"], runs["fused"]["losses"], strict=True)
    return [abs(stock - fused) for stock, fused in pairs]


def table_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """One row per run, and one per baseline."""
    rows = []
    for result in results:
        label = result["title"]
        for name, run in result["runs"].items():
            compared = name == "fused" and "ratio" in result
            rows.append(
                [
                    label,
                    name,
                    run["held_out_text"],
                    duration(run["seconds_per_step"]),
                    f"{count(run['items_per_second'])} {result['unit']}/s",
                    ratio(result["ratio"]) if compared else "",
                    f"{result['largest_loss_difference']:.1e}" if compared else "",
                ]
            )
            label = ""
        if result["baseline"] is not None:
            baseline = result["baseline"]
            rows.append(
                ["", baseline["name"], f"{baseline['held_out']:.4f} nats/byte", "", "", "", ""]
            )
    return rows


def missed_goals(results: list[dict[str, Any]]) -> list[str]:
    """One line per run that did not reach what its task promises."""
    return [
        f"{result['title']} ({name}): {run['held_out_text']} is not {run['goal']['text']}"
        for result in results
        for name, run in result["runs"].items()
        if "goal" in run and not run["goal"]["reached"]
    ]
