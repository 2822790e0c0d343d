"""Graphs of emulated kernels: what tests/test_captured_graphs.py rests on."""

from __future__ import annotations

import pytest
import torch

import fused
from fused.functional import attention_with_kv_cache, scaled_dot_product_attention
from fused.testing import emulated_cuda
from fused.testing.emulated_graph import EmulatedGraph


def test_a_capture_runs_nothing() -> None:
    q, cache = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 8, 32)
    before, total = cache.clone(), torch.zeros(())
    lengths = torch.tensor([3], dtype=torch.int32)
    graph = EmulatedGraph()
    with emulated_cuda() as launches:
        with graph.capture():
            attention_with_kv_cache(q, cache, cache, cache_seqlens=lengths, k=q, v=q)
            total += 1
        assert not launches.counts()
        assert torch.equal(cache, before) and total == 0
        graph.replay()
        graph.replay()
        assert launches.counts()
    assert total == 2 and torch.equal(cache[:, :, 3], q[:, :, 0])


def test_the_host_cannot_look() -> None:
    parameter = torch.randn(5).requires_grad_()
    parameter.grad = torch.ones(5)
    optimizer = fused.Adam([parameter], nonfinite="error", max_norm=1.0)
    with emulated_cuda():
        optimizer.step()
        refused = pytest.raises(RuntimeError, match="the host cannot wait for it while a graph")
        with refused, EmulatedGraph().capture():
            optimizer.step()
        with refused, EmulatedGraph().capture():
            parameter.nonzero()
        optimizer.step()  # the capture has ended


def test_a_kernel_that_fails_fails_in_the_replay() -> None:
    x = torch.randn(1, 1, 300, 128)
    graph = EmulatedGraph()
    with emulated_cuda(), graph.capture():
        scaled_dot_product_attention(x, x, x)
    refused = pytest.raises(RuntimeError, match="a block may have 16 bytes of shared memory")
    with emulated_cuda(shared_limit=16), refused:
        graph.replay()
