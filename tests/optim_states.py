"""What the tests of stored states share: parameters, ways of storing, steps, comparisons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fused

CLASSES = [fused.Adam, fused.AdamW, fused.SGD]
OPTIONS: dict[type, dict[str, Any]] = {
    fused.Adam: {"lr": 0.05, "amsgrad": True},
    fused.AdamW: {"lr": 0.05},
    fused.SGD: {"lr": 0.05, "momentum": 0.9},
}
STORED: dict[str, dict[str, Any]] = {
    "plain": {},
    "float32 master": {"master_weights": "float32"},
    "remainder": {"master_weights": "remainder", "ema_decay": 0.9},
    "bfloat16": {"state_dtype": torch.bfloat16, "ema_decay": 0.9},
    "int8": {"state_dtype": "int8"},
    "int8 beside a remainder": {"master_weights": "remainder", "state_dtype": "int8"},
}


def leaves(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(3, 5), (8192 + 3,), (0,), (7, 130)]
    tensors = [torch.randn(s, device=device).to(dtype) for s in shapes]
    tensors[3] = tensors[3].t()
    return [t.detach().requires_grad_() for t in tensors]


def run(params: list[Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(1000 * step + i)
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        optimizer.step()


def everything(params: list[Tensor], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [v for p in params for _, v in sorted(optimizer.state[p].items())]
    return [t.detach() for t in [*params, *states]]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)
