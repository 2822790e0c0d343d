"""The one list of benchmark cases; ``python -m fused bench`` and benchmarks/ both run it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

import fused
from fused.bench.attention_cases import attention_cases
from fused.bench.case import (
    Case,
    Runnable,
    Workbench,
    direction,
    forward_backward,
    forward_only,
)
from fused.bench.optim_cases import optim_cases
from fused.models._layers import StockConv2d

OPS = ("attention", "conv", "lstm", "optim")

F32, BF16 = torch.float32, torch.bfloat16


@cache
def all_cases() -> tuple[Case, ...]:
    return (*attention_cases(), *_conv_cases(), *_lstm_cases(), *optim_cases())


def cases(op: str) -> list[Case]:
    return [case for case in all_cases() if case.op == op]


# Convolution


def _conv(
    shape: tuple[int, ...],
    out_channels: int,
    kernel: int,
    *,
    dtype: torch.dtype = F32,
    layout: Literal["", "NCHW", "NHWC"] = "",
    backward: bool = False,
    depthwise: bool = False,
    activation: str | None = "relu",
    pool: bool = False,
    quick: bool = False,
) -> Case:
    batch, channels, *space = shape
    groups = channels if depthwise else 1

    def build(bench: Workbench) -> Runnable:
        x = bench.tensor(*shape)
        layer = bench.module(lambda: _conv_layer(bench, len(space), activation, channels,
            out_channels, kernel, padding=kernel // 2, groups=groups))  # fmt: skip
        if layout == "NHWC":
            x = x.contiguous(memory_format=torch.channels_last)
            # torch's stub knows no `to` for a memory format alone.
            layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if pool:
            layer = nn.Sequential(layer, nn.MaxPool2d(2))
        run_layer = bench.function(layer)
        if not backward:
            return forward_only(lambda: run_layer(x))
        x.requires_grad_()
        with torch.no_grad():
            grad = torch.empty_like(layer(x))
        grad.copy_(bench.tensor(*grad.shape))
        return forward_backward(lambda: run_layer(x), (x, *layer.parameters()), grad)

    pixels = batch * torch.Size(space).numel()
    work = 2 * pixels * out_channels * channels // groups * kernel ** len(space)
    dims = "x".join(map(str, (batch, channels, *space)))
    kind = f"{'depthwise ' if depthwise else ''}conv{len(space)}d"
    target = "" if depthwise else f" to {out_channels}"
    extras = "".join((f"+{activation}" if activation else "", "+max-pool" if pool else ""))
    way = direction(backward)
    words = (kind, dims + target, f"k{kernel}", layout, extras, way)
    name = " ".join(word for word in words if word)
    if depthwise:  # bound by memory: input, output and, backward, their gradients
        moved = dtype.itemsize * pixels * (channels + out_channels) * (3 if backward else 1)
        return Case("conv", name, dtype, build, moved, "GB/s", quick)
    return Case("conv", name, dtype, build, work * (3 if backward else 1), "GFLOP/s", quick)


def _conv_layer(
    bench: Workbench, dims: int, activation: str | None, *args: Any, **options: Any
) -> nn.Module:
    if bench.layers == "fused":
        layer = {1: fused.Conv1d, 2: fused.Conv2d, 3: fused.Conv3d}[dims]
        return layer(*args, activation=activation, **options)
    if dims == 2:
        return StockConv2d(*args, activation=activation, **options)
    stock = {1: nn.Conv1d, 3: nn.Conv3d}[dims](*args, **options)
    return stock if activation is None else nn.Sequential(stock, nn.ReLU())


def _conv_cases() -> Iterator[Case]:
    layouts: tuple[Literal["NCHW", "NHWC"], ...] = ("NCHW", "NHWC")
    for backward in (False, True):
        for layout in layouts:
            yield _conv((4, 3, 224, 224), 32, 5, layout=layout, backward=backward)
            yield _conv((8, 64, 56, 56), 64, 3, layout=layout, backward=backward)
            yield _conv(
                (8, 128, 56, 56), 128, 3, layout=layout, depthwise=True, backward=backward,
                quick=layout == "NHWC",
            )  # fmt: skip
        yield _conv((64, 1, 28, 28), 32, 3, layout="NCHW", pool=True, backward=backward, quick=True)
        yield _conv((8, 256, 1024), 256, 4, depthwise=True, backward=backward)
        yield _conv((2, 16, 16, 32, 32), 32, 3, backward=backward)
    yield _conv((8, 64, 56, 56), 64, 3, layout="NHWC", dtype=BF16)
    yield _conv((8, 64, 56, 56), 64, 3, layout="NHWC", activation=None)


# LSTM


def _lstm_cell(batch: int, size: int, *, backward: bool = False, quick: bool = False) -> Case:
    def build(bench: Workbench) -> Runnable:
        x, h, c = (bench.tensor(batch, size, requires_grad=backward) for _ in range(3))
        grad = bench.tensor(batch, size)
        make = nn.LSTMCell if bench.layers == "stock" else fused.LSTMCell
        cell = bench.module(lambda: make(size, size))
        run_cell = bench.function(cell)

        def step() -> torch.Tensor:
            return run_cell(x, (h, c))[0]

        if not backward:
            return forward_only(step)
        return forward_backward(step, (x, h, c, *cell.parameters()), grad)

    work = 2 * batch * 4 * size * 2 * size * (3 if backward else 1)
    name = f"LSTMCell {batch}x{size} {direction(backward)}"
    return Case("lstm", name, F32, build, work, "GFLOP/s", quick)


def _lstm(
    steps: int,
    batch: int,
    size: int,
    *,
    dtype: torch.dtype = F32,
    num_layers: int = 1,
    bidirectional: bool = False,
    backward: bool = False,
    quick: bool = False,
) -> Case:
    directions = 2 if bidirectional else 1

    def build(bench: Workbench) -> Runnable:
        x = bench.tensor(steps, batch, size, requires_grad=backward)
        grad = bench.tensor(steps, batch, directions * size)
        make = nn.LSTM if bench.layers == "stock" else fused.LSTM
        lstm = bench.module(
            lambda: make(size, size, num_layers=num_layers, bidirectional=bidirectional)
        )
        run_lstm = bench.function(lstm)

        def sequence() -> torch.Tensor:
            return run_lstm(x)[0]

        if not backward:
            return forward_only(sequence)
        return forward_backward(sequence, (x, *lstm.parameters()), grad)

    # Later layers read what all directions of the layer below wrote.
    widths = [size] + [directions * size] * (num_layers - 1)
    products = sum(4 * size * (width + size) for width in widths) * directions
    work = 2 * steps * batch * products * (3 if backward else 1)
    kind = "bidirectional LSTM" if bidirectional else "LSTM"
    layers = "" if num_layers == 1 else f" {num_layers} layers"
    name = f"{kind} {steps}x{batch}x{size}{layers} {direction(backward)}"
    return Case("lstm", name, dtype, build, work, "GFLOP/s", quick)


def _lstm_cases() -> Iterator[Case]:
    for backward in (False, True):
        yield _lstm_cell(1, 128, backward=backward, quick=True)
        yield _lstm_cell(32, 256, backward=backward)
        yield _lstm(64, 32, 256, backward=backward, quick=not backward)
        yield _lstm(64, 32, 256, dtype=BF16, backward=backward)
        yield _lstm(64, 1, 256, backward=backward)
        yield _lstm(32, 16, 128, num_layers=2, bidirectional=True, backward=backward)
