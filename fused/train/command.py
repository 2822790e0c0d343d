"""``python -m fused train``: the reference models, stock and fused, on real data."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fused._cli import CommandError, parse_device, positive_int, require
from fused._report.environment import describe, environment
from fused._report.files import write_json
from fused._report.page import require_report_packages
from fused._report.text import duration, table
from fused.models._layers import LayerName
from fused.train.data import ImageData, TextData, load_digits, load_path, load_standard_library
from fused.train.loop import DTYPES, Interrupted, Settings, Training
from fused.train.page import write_report
from fused.train.results import HEADERS, missed_goals, summarise, table_rows
from fused.train.tasks import IMAGE_TASKS, LANGUAGE_TASKS, TASK_NAMES, Task

_SECONDS_BETWEEN_LINES = 10.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fused train",
        description="Trains the reference models twice from the same seed, with stock and with "
        "fused layers, compares loss curves and speed, and writes a report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=("all", *TASK_NAMES), default="all", help="which model to train")
    add("--layers", choices=("both", "stock", "fused"), default="both", help="which form of it")
    add(
        "--data",
        type=Path,
        metavar="PATH",
        help="a folder with MNIST or CIFAR-10 as torchvision keeps them (for convnet), or any text "
        "file (for lstm and gpt); without it, scikit-learn's digits and the source text of the "
        "Python standard library",
    )
    add("--steps", type=positive_int, metavar="N", help="steps, instead of each model's own")
    add("--seed", type=int, default=0, help="for parameters and data order")
    add("--device", default="auto", help="auto, cpu or cuda[:N]")
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="the parameters' type, or (bfloat16, float16) the one that autocast casts to",
    )
    add("--dropout", type=float, default=0.0, help="stock and fused draw different random numbers")
    add("--compile", action="store_true", help="train through torch.compile, both forms")
    add("--out", type=Path, default=Path("out/train"), metavar="FOLDER", help="where results go")
    add(
        "--resume",
        action="store_true",
        help="go on, bit for bit, from the checkpoints in the output folder",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if not 0.0 <= args.dropout < 1.0:
        raise CommandError(f"--dropout must be at least 0 and below 1, got {args.dropout}")
    require("tqdm")
    require_report_packages()
    device = parse_device(args.device)
    _make_folder(args.out)
    tasks = _choose_tasks(args)
    info = environment()
    described = describe(info, device)
    print("\n".join(f"{name:<8} {value}" for name, value in described), flush=True)
    if device.type == "cuda":
        # A run that is resumed must repeat what it would have done; some cuDNN algorithms do not.
        torch.backends.cudnn.deterministic = True

    start = time.monotonic()
    try:
        results = [_run(training, args) for training in _prepare(args, tasks, device)]
    except Interrupted:
        print(f"fused train: interrupted; go on with --resume --out {args.out}", file=sys.stderr)
        return 130
    minutes, seconds = divmod(round(time.monotonic() - start), 60)

    print("\n" + table(HEADERS, table_rows(results)))
    files = _write_results(args, results, info, described)
    print(f"\n{minutes} min {seconds} s; see {files[0]}, {files[1]}")
    missed = missed_goals(results)
    for line in missed:
        print(f"fused train: {line}", file=sys.stderr)
    return 1 if missed else 0


def _make_folder(folder: Path) -> None:
    """Before the training, so that a result that cannot be written costs nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out {folder}: cannot be made ({error.strerror})") from None


def _choose_tasks(args: argparse.Namespace) -> list[Task]:
    """What to train, with its data. One data set fits one kind of model; the other is left out."""
    chosen = TASK_NAMES if args.model == "all" else (args.model,)
    images = [IMAGE_TASKS[name] for name in chosen if name in IMAGE_TASKS]
    languages = [LANGUAGE_TASKS[name] for name in chosen if name in LANGUAGE_TASKS]
    data = None if args.data is None else load_path(args.data)
    if isinstance(data, ImageData):
        languages = []
    elif isinstance(data, TextData):
        images = []
    tasks: list[Task] = []
    if images:
        image_data = data if isinstance(data, ImageData) else load_digits()
        tasks += [make(image_data, args.seed, args.dropout) for make in images]
    if languages:
        text_data = data if isinstance(data, TextData) else load_standard_library()
        tasks += [make(text_data, args.seed, args.dropout) for make in languages]
    if not tasks and data is not None:
        raise CommandError(
            f"--data {args.data}: {args.model} cannot be trained on {data.describe()}"
        )
    return tasks


def _prepare(
    args: argparse.Namespace, tasks: list[Task], device: torch.device
) -> Iterator[Training]:
    """The trainings one by one, at the point that their checkpoint holds if that is asked for."""
    layers: tuple[LayerName, ...] = ("stock", "fused") if args.layers == "both" else (args.layers,)
    checkpoints = [args.out / f"{task.name}.pt" for task in tasks]
    if args.resume and not any(path.exists() for path in checkpoints):
        raise CommandError(f"--resume: no checkpoint of {args.model} in {args.out}")
    for task, checkpoint in zip(tasks, checkpoints, strict=True):
        settings = Settings(
            steps=args.steps or task.steps,
            seed=args.seed,
            device=str(device),
            dtype=args.dtype,
            compile=args.compile,
            dropout=args.dropout,
        )
        training = Training(task, layers, settings, checkpoint)
        if args.resume and checkpoint.exists():  # the interrupt may have come before this model
            training.resume()
        yield training


def _run(training: Training, args: argparse.Namespace) -> dict[str, Any]:
    """Trains one task under a progress bar, or a line now and then where nobody watches."""
    task, steps = training.task, training.settings.steps
    print(f"\n{task.title} on {task.data.describe()}", flush=True)
    bar = tqdm(
        total=steps,
        initial=training.step,
        disable=None,  # where stderr is no terminal
        unit="step",
        bar_format="{percentage:3.0f}% {bar:24} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}",
    )
    next_line = 0.0

    def after_block(training: Training) -> None:
        nonlocal next_line
        status = ", ".join(
            f"{name} {run.losses[-1]:.4f} ({duration(run.seconds_per_step())})"
            for name, run in training.runs.items()
        )
        bar.set_postfix_str(status, refresh=False)
        bar.update(training.step - bar.n)
        if bar.disable and (time.monotonic() >= next_line or training.step == steps):
            print(f"  step {training.step:>5}/{steps}: loss {status}", flush=True)
            next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    try:
        training.train(after_block)
    finally:
        bar.close()
    as_intended = args.data is None and args.steps is None and args.dropout == 0
    return summarise(training, as_intended=as_intended)


def _write_results(
    args: argparse.Namespace,
    results: list[dict[str, Any]],
    info: dict[str, Any],
    described: list[tuple[str, str]],
) -> tuple[Path, Path]:
    settings = {name: getattr(args, name) for name in ("seed", "dtype", "dropout", "compile")}
    content = {"environment": info, "settings": settings, "models": results}
    json_path, page_path = args.out / "results.json", args.out / "report.html"
    write_json(json_path, content)
    text = ", ".join(f"{name} {value}" for name, value in settings.items())
    write_report(page_path, results, text, described)
    return page_path, json_path
