"""The benchmark cases of the optimizers: all bound by memory, or by what a call costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

import fused
from fused.bench.case import Case, Runnable, Workbench

Stock = Literal["loop", "foreach", "fused"]

F32 = torch.float32

_LARGE = (16, (1024, 1024))  # 17 million parameters in 16 tensors
_SMALL = (500, (256,))  # tensors that are mostly overhead

# Floats that a step moves for each parameter: it and each state are read and written, the gradient
# is read.
_MOVED = {"Adam": 7, "AdamW": 7, "SGD": 5}


def optim_cases() -> Iterator[Case]:
    stocks: tuple[Stock, ...] = ("loop", "foreach", "fused")
    for stock in stocks:
        yield step_case("AdamW", _LARGE, stock)
        yield step_case("AdamW", _SMALL, stock, quick=True)
    yield step_case("Adam", _LARGE, "fused", weight_decay=0.01)
    yield step_case("Adam", _SMALL, "fused", weight_decay=0.01)
    yield step_case("SGD", _LARGE, "fused", momentum=0.9)
    yield step_case("SGD", _SMALL, "fused", momentum=0.9, quick=True)
    yield clip_case(_LARGE)
    yield clip_case(_SMALL, quick=True)
    yield step_case("AdamW", _LARGE, "fused", clip=True)
    yield step_case("AdamW", _SMALL, "fused", clip=True)


def _parameters(bench: Workbench, tensors: tuple[int, tuple[int, ...]]) -> list[torch.Tensor]:
    """Parameters and their gradients."""
    count, shape = tensors
    parameters = [bench.tensor(*shape, requires_grad=True) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = bench.tensor(*shape)
    return parameters


def _clip(bench: Workbench, parameters: list[torch.Tensor]) -> None:
    # There is no backward pass that would make new gradients: this one has to be clipped again.
    assert parameters[0].grad is not None
    parameters[0].grad.view(-1)[0] = 100.0
    clip = (fused if bench.layers == "fused" else torch.nn.utils).clip_grad_norm_
    clip(parameters, 1.0)


def step_case(
    name: Literal["Adam", "AdamW", "SGD"],
    tensors: tuple[int, tuple[int, ...]],
    stock: Stock,
    *,
    clip: bool = False,
    quick: bool = False,
    **options: Any,
) -> Case:
    """A step; with ``clip`` also what a training loop does before and after it."""
    stock_options = {"foreach": stock == "foreach", "fused": stock == "fused"}

    def build(bench: Workbench) -> Runnable:
        parameters = _parameters(bench, tensors)
        if bench.layers == "fused":
            optimizer = getattr(fused, name)(parameters, lr=1e-3, **options)
        else:
            optimizer = getattr(torch.optim, name)(parameters, lr=1e-3, **options, **stock_options)

        def step() -> None:
            if clip:
                _clip(bench, parameters)
            optimizer.step()
            if clip:
                optimizer.zero_grad(set_to_none=False)  # in place, for there is no backward pass

        run_step = bench.function(step)

        def run() -> list[torch.Tensor]:
            run_step()
            return parameters

        return run

    parts = f"{'clip + ' if clip else ''}{name}", _described(tensors), ", zero_grad" * clip
    row = f"{parts[0]} {parts[1]}{parts[2]}, stock {stock}"
    moved = _elements(tensors) * 4 * _MOVED[name]
    return Case("optim", row, F32, build, moved, "GB/s", quick)


def clip_case(tensors: tuple[int, tuple[int, ...]], *, quick: bool = False) -> Case:
    """clip_grad_norm_: gradients are read for the norm, then read and written."""

    def build(bench: Workbench) -> Runnable:
        parameters = _parameters(bench, tensors)
        run_clip = bench.function(lambda: _clip(bench, parameters))

        def run() -> list[torch.Tensor]:
            run_clip()
            return [parameter.grad for parameter in parameters if parameter.grad is not None]

        return run

    row = f"clip_grad_norm_ {_described(tensors)}"
    return Case("optim", row, F32, build, _elements(tensors) * 4 * 3, "GB/s", quick)


def _described(tensors: tuple[int, tuple[int, ...]]) -> str:
    return f"{tensors[0]} tensors of {'x'.join(map(str, tensors[1]))}"


def _elements(tensors: tuple[int, tuple[int, ...]]) -> int:
    return tensors[0] * torch.Size(tensors[1]).numel()
