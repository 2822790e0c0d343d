"""The benchmark cases of the optimizers: all bound by memory, or by what a call costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

import fused
from fused.bench.case import Case, Runnable, Workbench

Stock = Literal["loop", "foreach", "fused"]

F32 = torch.float32

_LARGE = (16, (1024, 1024))  # 17 million parameters in 16 tensors
_SMALL = (500, (256,))  # tensors that are mostly overhead
_SINGLE = (2000, (1,))  # nothing but overhead: what a step costs the host

_MAX_NORM = 1.0

# Floats that a step moves for each parameter: it and each state are read and written, the gradient
# is read.
_MOVED = {"Adam": 7, "AdamW": 7, "SGD": 5}


def optim_cases() -> Iterator[Case]:
    stocks: tuple[Stock, ...] = ("loop", "foreach", "fused")
    for stock in stocks:
        yield step_case("AdamW", _LARGE, stock)
        yield step_case("AdamW", _SMALL, stock, quick=True)
    yield step_case("AdamW", _SINGLE, "fused")
    yield step_case("Adam", _LARGE, "fused", weight_decay=0.01)
    yield step_case("Adam", _SMALL, "fused", weight_decay=0.01)
    yield step_case("SGD", _LARGE, "fused", momentum=0.9)
    yield step_case("SGD", _SMALL, "fused", momentum=0.9, quick=True)
    yield clip_case(_LARGE)
    yield clip_case(_SMALL, quick=True)
    yield step_case("AdamW", _LARGE, "fused", clip=True)
    yield step_case("AdamW", _SMALL, "fused", clip=True)
    yield master_case(_LARGE)
    yield master_case(_SMALL, quick=True)


def _parameters(bench: Workbench, tensors: tuple[int, tuple[int, ...]]) -> list[torch.Tensor]:
    """Parameters and their gradients."""
    count, shape = tensors
    parameters = [bench.tensor(*shape, requires_grad=True) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = bench.tensor(*shape)
    return parameters


def _make_large(parameters: list[torch.Tensor]) -> None:
    """Gives the gradients a norm to clip: there is no backward pass that makes new ones."""
    assert parameters[0].grad is not None
    parameters[0].grad.view(-1)[0] = 100 * _MAX_NORM


def step_case(
    name: Literal["Adam", "AdamW", "SGD"],
    tensors: tuple[int, tuple[int, ...]],
    stock: Stock,
    *,
    clip: bool = False,
    quick: bool = False,
    **options: Any,
) -> Case:
    """A step; with ``clip`` also what a training loop does before and after it, or ours inside."""
    stock_options = {"foreach": stock == "foreach", "fused": stock == "fused"}

    def build(bench: Workbench) -> Runnable:
        parameters = _parameters(bench, tensors)
        ours = bench.layers == "fused"
        if ours:
            extras = {"max_norm": _MAX_NORM, "zero_grad": True} if clip else {}
            optimizer = getattr(fused, name)(parameters, lr=1e-3, **options, **extras)
        else:
            optimizer = getattr(torch.optim, name)(parameters, lr=1e-3, **options, **stock_options)

        def step() -> None:
            if clip:
                _make_large(parameters)
            if clip and not ours:
                torch.nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
            optimizer.step()
            if clip and not ours:
                optimizer.zero_grad(set_to_none=False)  # in place, for there is no backward pass

        run_step = bench.function(step)

        def run() -> list[torch.Tensor]:
            run_step()
            return parameters

        return run

    parts = f"{'clip + ' if clip else ''}{name}", _described(tensors), ", zero_grad" * clip
    row = f"{parts[0]} {parts[1]}{parts[2]}, stock {stock}"
    # To clip and to clear, the gradient is read once more and written.
    moved = _elements(tensors) * 4 * (_MOVED[name] + 2 * clip)
    return Case("optim", row, F32, build, moved, "GB/s", quick)


def clip_case(tensors: tuple[int, tuple[int, ...]], *, quick: bool = False) -> Case:
    """clip_grad_norm_: gradients are read for the norm, then read and written."""

    def build(bench: Workbench) -> Runnable:
        parameters = _parameters(bench, tensors)
        functions = fused if bench.layers == "fused" else torch.nn.utils

        def clip() -> None:
            _make_large(parameters)
            functions.clip_grad_norm_(parameters, _MAX_NORM)

        run_clip = bench.function(clip)

        def run() -> list[torch.Tensor]:
            run_clip()
            return [parameter.grad for parameter in parameters if parameter.grad is not None]

        return run

    row = f"clip_grad_norm_ {_described(tensors)}"
    return Case("optim", row, F32, build, _elements(tensors) * 4 * 3, "GB/s", quick)


def master_case(tensors: tuple[int, tuple[int, ...]], *, quick: bool = False) -> Case:
    """AdamW on bfloat16 parameters with float32 masters, which stock leaves to the caller."""

    def build(bench: Workbench) -> Runnable:
        parameters = _parameters(bench, tensors)
        if bench.layers == "fused":
            step: Any = fused.AdamW(parameters, lr=1e-3, master_weights="remainder").step
        else:
            step = _step_of_masters(parameters)
        run_step = bench.function(step)

        def run() -> list[torch.Tensor]:
            run_step()
            return parameters

        return run

    row = f"AdamW {_described(tensors)}, remainder master, stock by hand"
    # The gradient is read; parameter, remainder and two float32 moments are read and written.
    return Case("optim", row, torch.bfloat16, build, _elements(tensors) * 26, "GB/s", quick)


def _step_of_masters(parameters: list[torch.Tensor]) -> Callable[[], None]:
    own = [parameter.detach() for parameter in parameters]
    # In the exact run the parameters are float64, and so are their masters.
    masters = [p.to(torch.promote_types(p.dtype, F32), copy=True).requires_grad_() for p in own]
    for master in masters:
        master.grad = torch.empty_like(master)
    optimizer = torch.optim.AdamW(masters, lr=1e-3, fused=True)

    @torch.no_grad()
    def step() -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_copy_([master.grad for master in masters if master.grad is not None], grads)
        optimizer.step()
        torch._foreach_copy_(own, [master.detach() for master in masters])

    return step


def _described(tensors: tuple[int, tuple[int, ...]]) -> str:
    return f"{tensors[0]} tensors of {'x'.join(map(str, tensors[1]))}"


def _elements(tensors: tuple[int, tuple[int, ...]]) -> int:
    return tensors[0] * torch.Size(tensors[1]).numel()
