"""What takes 10 GB of memory and so is not collected with the others: pytest tests/huge.py."""

from __future__ import annotations

import pytest
import torch

import fused
from fused import _route, functional


def test_more_elements_than_32_bits_count() -> None:
    """Steps of 1 from 0, and the norm of ones, on both sides of element 2^31."""
    count = 2**31 + 3 * 8192 + 5
    param = torch.zeros(count, dtype=torch.bfloat16, requires_grad=True)
    param.grad = torch.ones_like(param)
    norm = _route.kernels().total_norm([param.grad])
    assert norm.item() == pytest.approx(count**0.5, rel=1e-12)
    optimizer = fused.SGD([param], lr=1.0, zero_grad=True)
    for step in range(2):  # one gathered, one kept
        optimizer.step()
        for part in param.detach().split(2**28):
            assert part.min() == part.max() == -1.0 - step
        assert not any(part.any() for part in param.grad.split(2**28))
        param.grad.fill_(1.0)


def test_rotary_embedding_beyond_32_bits() -> None:
    """Rows on both sides of element 2^31, of an input that repeats itself and takes no memory."""
    length, width = 2**21 + 3, 1024
    row = torch.randn(1, 1, 1, width, dtype=torch.bfloat16)
    table = torch.randn(2, 1, width // 2).expand(2, length, -1)
    q, k = row.expand(1, 1, length, width), row.expand(1, 0, length, width)
    turned, none = functional.rotary_embedding(q, k, *table)
    one, _ = functional.rotary_embedding(row, row, *table[:, :1])
    assert turned.numel() > 2**31 and none.numel() == 0
    assert (turned[0, 0, 0] == one).all()
    for part in turned.split(2**18, dim=2):
        assert torch.equal(part, one.expand_as(part))
