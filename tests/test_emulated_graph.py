"""Graphs of emulated kernels: what tests/test_captured_graphs.py rests on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize(
    "look", [Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.nonzero, Tensor.__bool__]
)
def test_the_host_cannot_look(look: Callable[[Tensor], Any]) -> None:
    x = torch.ones(1)
    with emulated_cuda():
        refused = pytest.raises(RuntimeError, match="the host cannot wait for it while a graph")
        with refused, EmulatedGraph().capture():
            look(x)
        look(x)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"capturable": True, "nonfinite": "error", "max_norm": 1.0}, "the host cannot wait"),
        ({"capturable": False}, "Attempting CUDA graph capture of step.*capturable is False"),
    ],
)
def test_steps_that_wait_are_refused(options: dict[str, Any], refusal: str) -> None:
    parameter = torch.randn(5).requires_grad_()
    parameter.grad = torch.ones(5)
    with emulated_cuda():
        optimizer = fused.Adam([parameter], **options)
        optimizer.step()
        with pytest.raises(RuntimeError, match=refusal), EmulatedGraph().capture():
            optimizer.step()
        optimizer.step()  # the capture has ended


def test_shapes_and_indices() -> None:
    x, index = torch.arange(6.0).view(2, 3), torch.tensor([1, 1])
    graph = EmulatedGraph()
    with emulated_cuda():
        with graph.capture():
            turned = x.clone().t_()
            total = torch.zeros(3).add_(1)
            torch._assert_async((total * 0 == 0).all())
            picked = x[index]
        assert turned.shape == (3, 2)
        for _ in range(2):
            x += 1
            index.zero_()
            graph.replay()
            assert torch.equal(turned, x.t()) and torch.equal(total, torch.ones(3))
            assert torch.equal(picked, x[:1].expand(2, 3))


def test_registered_ops_and_second_captures_are_refused() -> None:
    x = torch.randn(1, 1, 8, 8)
    with emulated_cuda():
        graph = EmulatedGraph()
        begun = pytest.raises(RuntimeError, match="a graph is being captured already")
        with graph.capture(), begun, EmulatedGraph().capture():
            pass
        with pytest.raises(RuntimeError, match="holds a graph already"), graph.capture():
            pass
        looks_on = FlopCounterMode(display=False)
        refused = pytest.raises(RuntimeError, match="would run the CPU's kernel")
        with EmulatedGraph().capture(), looks_on, refused:
            scaled_dot_product_attention(x, x, x)


def test_a_kernel_that_fails_fails_in_the_replay() -> None:
    x = torch.randn(1, 1, 300, 128)
    graph = EmulatedGraph()
    with emulated_cuda(), graph.capture():
        scaled_dot_product_attention(x, x, x)
    refused = pytest.raises(RuntimeError, match="a block may have 16 bytes of shared memory")
    with emulated_cuda(shared_limit=16), refused:
        graph.replay()
