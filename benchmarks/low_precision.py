"""Draws docs/low_precision.svg: a GPT trained in float32, and in bfloat16 with and without masters.

    python benchmarks/low_precision.py [--steps N] [--out PATH]

The same small GPT, data, order and learning rates, three times. What differs is where the weights
live: in float32; in bfloat16 with the 16 bits beside them that make a float32 of each
(`master_weights="remainder"`); in bfloat16 alone, where an update below half a unit in the last
place of its weight is lost. Under three minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import fused
from fused._report.charts import curves_chart
from fused.models import GPT
from fused.train.data import TextData, load_standard_library

RUNS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16 with remainder master": (torch.bfloat16, {"master_weights": "remainder"}),
    "bfloat16": (torch.bfloat16, {}),
}
LENGTH, BATCH, SEED = 64, 16, 0
LEARNING_RATE, WARMUP = 3e-4, 50


def train(data: TextData, dtype: torch.dtype, options: dict[str, Any], steps: int) -> list[float]:
    """The loss of every step, in nats per byte."""
    torch.manual_seed(SEED)
    model = GPT(context_length=LENGTH, embed_dim=128, num_heads=4, num_layers=2).to(dtype)
    optimizer = fused.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), max_norm=1.0, **options
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    losses = []
    for step in range(steps):
        windows = data.batch(step, BATCH, LENGTH, SEED)
        logits = model(windows[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def _rate(step: int, steps: int) -> float:
    """Up in a line, then down in half a cosine."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("docs/low_precision.svg"))
    args = parser.parse_args()
    data = load_standard_library()
    curves = {}
    for name, (dtype, options) in RUNS.items():
        start = time.monotonic()
        curves[name] = train(data, dtype, options, args.steps)
        last = curves[name][-max(1, args.steps // 10) :]
        print(
            f"{name:32} loss of the last tenth {sum(last) / len(last):.4f} nats/byte, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
    args.out.write_bytes(curves_chart(curves, "training loss, nats per byte"))
    print(f"see {args.out}")


if __name__ == "__main__":
    main()
