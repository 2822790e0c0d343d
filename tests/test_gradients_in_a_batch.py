"""`is_grads_batched=True`: many gradients of an output in one tensor, for every op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fused

X = torch.randn(3, 2, 4, dtype=torch.float64)
MODULES = [
    fused.Conv1d(2, 3, 3, padding=1, activation="gelu"),
    fused.LSTMCell(4, 5),
    fused.LSTM(4, 5, bidirectional=True),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)
def test_gradients_in_a_batch(module: nn.Module) -> None:
    module = module.double()
    inputs = X[0] if isinstance(module, nn.LSTMCell) else X
    result = module(inputs)
    out: Tensor = result if isinstance(result, Tensor) else result[0]
    params = list(module.parameters())
    grad_outs = torch.randn(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, params, grad_outs, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, params, g, retain_graph=True) for g in grad_outs]
    for a, b in zip(batched, map(torch.stack, zip(*one_by_one, strict=True)), strict=True):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad
