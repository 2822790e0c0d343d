"""Ops inside CUDA graphs: a replay computes from what its inputs hold by then, without the host.

Needs a GPU, and so is not collected with the others: pytest tests/cuda_graphs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_states import assert_equal, everything
from torch import Tensor

import fused
from fused import functional

EVERY_OPTION: dict[str, Any] = {"is_causal": True, "window": (40, 0), "softcap": 5.0}


class Replay:
    """A call, captured once. It runs twice before: what it begins is no part of the graph."""

    WARM_UPS = 2

    def __init__(self, call: Callable[[], list[Tensor]]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = call()

    def __call__(self) -> list[Tensor]:
        self._graph.replay()
        return [result.clone() for result in self._results]


def draw(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def redraw(tensors: list[Tensor]) -> None:
    for x in tensors:
        x.detach().copy_(torch.randn(x.shape, device="cuda"))


def with_gradients(call: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], list[Tensor]]:
    def both() -> list[Tensor]:
        out = call()
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        return [out.detach(), *grads]

    return both


def assert_replays(call: Callable[[], list[Tensor]], inputs: list[Tensor]) -> None:
    replay = Replay(call)
    for _ in range(2):
        redraw(inputs)
        assert_equal(replay(), call())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "options"])
def test_attention(dtype: torch.dtype, options: dict[str, Any]) -> None:
    leaves = [draw(2, 2, 130, 64, dtype=dtype).requires_grad_() for _ in range(3)]
    run = functional.scaled_dot_product_attention
    assert_replays(with_gradients(lambda: run(*leaves, **options), leaves), leaves)


def test_dropout_is_drawn_anew_by_each_replay() -> None:
    q, k, v = (draw(2, 2, 70, 32) for _ in range(3))
    replay = Replay(lambda: [functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)])
    torch.manual_seed(0)
    first, second = replay(), replay()
    torch.manual_seed(0)
    assert_equal(replay(), first)
    assert not torch.equal(*first, *second)


def test_packed_sequences_of_other_lengths() -> None:
    leaves = [draw(90, 2, 32).requires_grad_() for _ in range(3)]
    ends = torch.tensor([0, 30, 40, 90], dtype=torch.int32, device="cuda")
    call = with_gradients(lambda: functional.varlen_attention(*leaves, ends, ends), leaves)
    replay = Replay(call)
    for others in ([0, 0, 80, 90], [0, 1, 2, 3]):
        ends.copy_(torch.tensor(others))
        redraw(leaves)
        assert_equal(replay(), call())


def test_a_cache_that_grows() -> None:
    q, k, v = draw(2, 4, 1, 64), draw(2, 2, 1, 64), draw(2, 2, 1, 64)
    caches = [draw(2, 2, 300, 64) for _ in range(2)]
    lengths = torch.tensor([3, 250], dtype=torch.int32, device="cuda")

    def call(k_cache: Tensor, v_cache: Tensor) -> list[Tensor]:
        options = {"cache_seqlens": lengths, "k": k, "v": v}
        return [functional.attention_with_kv_cache(q, k_cache, v_cache, **options)]

    replay = Replay(lambda: call(*caches))
    for _ in range(3):
        lengths += 1
        redraw([q, k, v])
        copies = [cache.clone() for cache in caches]
        assert_equal([*replay(), *caches], [*call(*copies), *copies])


@pytest.mark.parametrize("op", ["conv", "lstm"])
def test_other_ops(op: str) -> None:
    if op == "conv":
        module: torch.nn.Module = fused.Conv2d(8, 12, 3, padding=1, activation="relu")
        x = draw(2, 8, 9, 9, dtype=torch.float32)
    else:
        module, x = fused.LSTM(16, 24), draw(5, 3, 16, dtype=torch.float32)
    leaves = [x.requires_grad_(), *module.cuda().parameters()]

    def run() -> Tensor:
        result = module(x)
        return result[0] if op == "lstm" else result

    assert_replays(with_gradients(run, leaves), leaves)


@pytest.mark.parametrize("count", [3, 160])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (fused.AdamW, {"capturable": True, "max_norm": 1.0, "zero_grad": True}),
        (fused.SGD, {"momentum": 0.9, "ema_decay": 0.9}),
    ],
    ids=["AdamW", "SGD"],
)
def test_optimizers(cls: type, options: dict[str, Any], count: int) -> None:
    start, grads = ([draw(17, dtype=torch.float32) for _ in range(count)] for _ in range(2))
    sides = []
    for _ in range(2):
        params = [x.clone().requires_grad_() for x in start]
        for p, grad in zip(params, grads):
            p.grad = grad.clone()
        sides.append((params, cls(params, lr=0.1, **options)))
    (eager_params, eager), (params, optimizer) = sides

    def step() -> list[Tensor]:
        optimizer.step()
        return []

    replay = Replay(step)
    for _ in range(Replay.WARM_UPS):
        eager.step()
    for _ in range(3):
        redraw(grads)
        for p in (*eager_params, *params):
            assert p.grad is not None
        for grad, p, q in zip(grads, eager_params, params):
            p.grad.copy_(grad)
            q.grad.copy_(grad)
        replay()
        eager.step()
        assert_equal(everything(params, optimizer), everything(eager_params, eager))
