"""torch.utils.flop_counter counts for fused's ops what it counts for stock's in their place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fused
from fused.functional import scaled_dot_product_attention, varlen_attention


def flops(function: Callable, *args: object) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def steps(module: nn.Module, *inputs: object) -> list[int]:
    """Of the forward pass, and of both."""

    def both() -> None:
        out = module(*inputs)
        while not isinstance(out, Tensor):
            out = out[0]
        out.sum().backward()

    return [flops(module, *inputs), flops(both)]


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize(
    ("ours", "stock", "size"),
    [(fused.Conv1d, nn.Conv1d, (9,)), (fused.Conv2d, nn.Conv2d, (9, 8)),
     (fused.Conv3d, nn.Conv3d, (5, 6, 7))],
)  # fmt: skip
def test_convolutions(ours: type, stock: type, size: tuple[int, ...], requires_grad: bool) -> None:
    x = torch.randn(2, 4, *size, requires_grad=requires_grad)
    for options in ({"stride": 2}, {"groups": 2, "padding": "same", "dilation": 2}):
        expected = steps(stock(4, 6, 3, **options), x)
        assert expected[0] > 0
        assert steps(ours(4, 6, 3, **options, activation=None), x) == expected


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"proj_size": 2}, {"num_layers": 2, "bidirectional": True}]
)
def test_lstm(options: dict, requires_grad: bool) -> None:
    # In float64: what oneDNN computes in float32 is not counted.
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=requires_grad)
    expected = steps(nn.LSTM(4, 6, **options, dtype=x.dtype), x)
    assert expected[0] > 0
    assert steps(fused.LSTM(4, 6, **options, dtype=x.dtype), x) == expected
    packed = pack_sequence([torch.randn(n, 4, dtype=x.dtype) for n in (5, 3, 2)])
    stock = steps(nn.LSTM(4, 6, dtype=x.dtype), packed)
    assert steps(fused.LSTM(4, 6, dtype=x.dtype), packed) == stock
    assert steps(fused.LSTMCell(4, 6, dtype=x.dtype), x[0]) == steps(
        nn.LSTMCell(4, 6, dtype=x.dtype), x[0]
    )


def test_attention() -> None:
    q, k = torch.randn(2, 4, 6, 8, requires_grad=True), torch.randn(2, 4, 7, 8)
    v = torch.randn(2, 4, 7, 3)
    forward = flops(scaled_dot_product_attention, q, k, v)
    with sdpa_kernel(SDPBackend.MATH):  # stock's kernel for the CPU is not counted
        assert forward == flops(F.scaled_dot_product_attention, q, k, v)
    both = flops(lambda: scaled_dot_product_attention(q, k, v).sum().backward())
    of_flash = flop_registry[torch.ops.aten._scaled_dot_product_flash_attention_backward]
    assert both - forward == of_flash(torch.empty(2, 4, 6, 3), q, k, v, out_val=None)
    grouped = flops(lambda: scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True))
    assert grouped == forward

    packed = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    bounds = [torch.arange(3, dtype=torch.int32) * n for n in (6, 7)]
    assert flops(varlen_attention, *packed, *bounds) == forward
    assert flops(varlen_attention, *(t.to("meta") for t in (*packed, *bounds))) == forward


@pytest.mark.parametrize("first", ["fused", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first: str) -> None:
    code = (
        f"import sys, torch, {first}; assert {first == 'fused'} != "
        "('torch.utils.flop_counter' in sys.modules)\n"
        "import fused; from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.fused.conv_forward in flop_registry"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
