"""What ops keep for their backward pass: each tensor is read once, as a checkpoint wants it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fused
from fused import functional
from fused.testing.dispatch import OperatorLog

DOUBLE = {"dtype": torch.float64}
CONV = fused.Conv1d(5, 2, 3, activation="gelu", **DOUBLE)
CELL, LSTM = fused.LSTMCell(4, 4, **DOUBLE), fused.LSTM(4, 3, 2, bidirectional=True, **DOUBLE)


def attention(x: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def packed_attention(x: Tensor) -> Tensor:
    tokens, offsets = x[0].transpose(0, 1), torch.tensor([0, 2, 5], dtype=torch.int32)
    return functional.varlen_attention(tokens, tokens, tokens, offsets, offsets)


def rotary(x: Tensor) -> Tensor:
    return torch.cat(functional.rotary_embedding(x, x, x[0, 0, :, :2], x[0, 0, :, 2:]))


def packed_lstm(x: Tensor) -> Tensor:
    return LSTM(pack_padded_sequence(x[0].transpose(0, 1), [5, 3]))[0].data


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": attention,
    "packed attention": packed_attention,
    "rotary": rotary,
    "convolution": lambda x: CONV(x[0]),
    "cell": lambda x: torch.cat(CELL(x[0, 0])),
    "lstm": lambda x: LSTM(x[0])[0],
    "packed lstm": packed_lstm,
}

each_op = pytest.mark.parametrize("name", OPS)


@each_op
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_a_saved_tensor_is_unpacked_once(name: str, traced: bool) -> None:
    x = torch.randn(1, 2, 5, 4, **DOUBLE, requires_grad=True)
    packed: list[Tensor] = []
    unpacked: Counter[int] = Counter()

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach())
        return len(packed) - 1

    def unpack(index: int) -> Tensor:
        unpacked[index] += 1
        return packed[index]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        with OperatorLog() if traced else contextlib.nullcontext():
            out = OPS[name](x)
        torch.autograd.grad(out.sum(), x)
    assert unpacked and set(unpacked.values()) == {1}


@each_op
def test_a_checkpoint_changes_no_gradient(name: str) -> None:
    x = torch.randn(1, 2, 5, 4, **DOUBLE, requires_grad=True)
    outputs = OPS[name](x), checkpoint(OPS[name], x, use_reentrant=False)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outputs]
    assert torch.equal(*grads)
