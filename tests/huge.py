"""What takes 10 GB of memory and so is not collected with the others: pytest tests/huge.py."""

from __future__ import annotations

import pytest
import torch

import fused
from fused import _route


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
