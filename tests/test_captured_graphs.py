"""Ops inside CUDA graphs: a replay computes from what its inputs hold by then, without the host.

On a GPU torch's own graphs; emulated, graphs of emulated kernels (fused/testing/emulated_graph.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import on_gpus
from optim_states import STORED, assert_equal, everything
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fused
from fused import functional
from fused.functional import attention_with_kv_cache, scaled_dot_product_attention
from fused.optim import step_in_backward
from fused.testing.emulated_graph import EmulatedGraph

pytestmark = on_gpus


class Replay:
    """A call, captured once. It runs twice before: what it begins is no part of the graph."""

    WARM_UPS = 2

    def __init__(self, call: Callable[[], list[Tensor]], device: torch.device) -> None:
        if device.type == "cuda":
            self._capture_on_gpu(call)
            return
        for _ in range(self.WARM_UPS):
            call()
        graph = EmulatedGraph()
        with graph.capture():
            self._results = call()
        assert graph.num_launches > 0
        self._run = graph.replay

    def _capture_on_gpu(self, call: Callable[[], list[Tensor]]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._results = call()
        self._run = graph.replay

    def __call__(self) -> list[Tensor]:
        self._run()
        return [result.clone() for result in self._results]


def draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def redraw(tensors: list[Tensor]) -> None:
    for x in tensors:
        x.detach().copy_(torch.randn(x.shape, device=x.device))


def with_gradients(
    call: Callable[[], Tensor | tuple[Tensor, ...]], leaves: list[Tensor]
) -> Callable[[], list[Tensor]]:
    def both() -> list[Tensor]:
        results = call()
        results = results if isinstance(results, tuple) else (results,)
        loss = sum(x.float().square().sum() for x in results)
        return [*(x.detach() for x in results), *torch.autograd.grad(loss, leaves)]

    return both


def assert_replays(call: Callable[[], list[Tensor]], inputs: list[Tensor]) -> None:
    replay = Replay(call, inputs[0].device)
    for _ in range(3):
        redraw(inputs)
        assert_equal(replay(), call())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_options", [False, True], ids=["plain", "options"])
def test_attention(dtype: torch.dtype, has_options: bool, backend: torch.device) -> None:
    leaves = [draw(backend, 2, 2, 70, 64, dtype=dtype).requires_grad_() for _ in range(3)]
    options: dict[str, Any] = {"return_lse": True}
    if has_options:
        mask = draw(backend, 2, 1, 70, 70, dtype=torch.float32).requires_grad_()
        sink, slopes = (draw(backend, 2, dtype=torch.float32).requires_grad_() for _ in range(2))
        options |= {"is_causal": True, "window": (40, 0), "softcap": 5.0}
        options |= {"attn_mask": mask, "sink": sink, "alibi_slopes": slopes}
        leaves += [mask, sink, slopes]
    run = with_gradients(lambda: scaled_dot_product_attention(*leaves[:3], **options), leaves)
    assert_replays(run, leaves)


def test_dropout_is_drawn_anew_by_each_replay(backend: torch.device) -> None:
    q, k, v = (draw(backend, 2, 2, 70, 32) for _ in range(3))
    replay = Replay(lambda: [scaled_dot_product_attention(q, k, v, dropout_p=0.5)], backend)
    torch.manual_seed(0)
    first, second = replay(), replay()
    torch.manual_seed(0)
    assert_equal(replay(), first)
    assert not torch.equal(*first, *second)


def test_packed_sequences_of_other_lengths(backend: torch.device) -> None:
    leaves = [draw(backend, 90, 2, 32).requires_grad_() for _ in range(3)]
    ends = torch.tensor([0, 30, 40, 90], dtype=torch.int32, device=backend)
    call = with_gradients(lambda: functional.varlen_attention(*leaves, ends, ends), leaves)
    replay = Replay(call, backend)
    for others in ([0, 0, 80, 90], [0, 1, 2, 3]):
        ends.copy_(torch.tensor(others))
        redraw(leaves)
        assert_equal(replay(), call())


def test_jagged_keys_with_offsets_of_their_own(backend: torch.device) -> None:
    packed = [draw(backend, 90, 2, 32) for _ in range(3)]
    offsets = [torch.tensor([0, 30, 40, 90], device=backend) for _ in range(3)]

    def call() -> list[Tensor]:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(x, ends, min_seqlen=1, max_seqlen=90)
            for x, ends in zip(packed, offsets)
        )
        out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return [out.transpose(1, 2).values()]

    replay = Replay(call, backend)
    for ends in ([0, 30, 40, 90], [0, 5, 60, 90]):
        redraw(packed)
        for of_one in offsets:
            of_one.copy_(torch.tensor(ends))
        assert_equal(replay(), call())
    if backend.type == "cpu":  # a GPU that an assertion stops is of no use to the tests behind
        offsets[2].copy_(torch.tensor([0, 30, 40, 90]))
        with pytest.raises(RuntimeError, match="value must have the lengths of key"):
            replay()


@pytest.mark.parametrize("is_paged", [False, True], ids=["contiguous", "pages"])
def test_a_cache_that_grows(is_paged: bool, backend: torch.device) -> None:
    q, k, v = (draw(backend, 2, heads, 1, 64) for heads in (4, 2, 2))
    caches = [draw(backend, *((40, 2, 16) if is_paged else (2, 2, 300)), 64) for _ in range(2)]
    lengths = torch.tensor([3, 250], dtype=torch.int32, device=backend)
    options: dict[str, Any] = {"cache_seqlens": lengths, "k": k, "v": v}
    if is_paged:
        table = torch.arange(38, dtype=torch.int32, device=backend).view(2, 19)
        options["block_table"] = table

    def call(k_cache: Tensor, v_cache: Tensor) -> list[Tensor]:
        return [attention_with_kv_cache(q, k_cache, v_cache, **options)]

    replay = Replay(lambda: call(*caches), backend)
    for _ in range(3):
        lengths += 1
        if is_paged:
            table.copy_(torch.randperm(40)[:38].view(2, 19))
        redraw([q, k, v])
        copies = [cache.clone() for cache in caches]
        assert_equal([*replay(), *caches], [*call(*copies), *copies])


def test_attention_in_parts(backend: torch.device) -> None:
    leaves = [draw(backend, 1, 2, 40, 32).requires_grad_() for _ in range(5)]

    def call() -> tuple[Tensor, ...]:
        q, *parts = leaves
        attended = [
            scaled_dot_product_attention(q, *parts[i : i + 2], return_lse=True) for i in (0, 2)
        ]
        return functional.merge_attention(*zip(*attended))

    assert_replays(with_gradients(call, leaves), leaves)


MODULES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "Conv1d": (lambda: fused.Conv1d(8, 8, 4, groups=8, activation="silu"), (2, 8, 30)),
    "Conv2d": (lambda: fused.Conv2d(8, 12, 3, padding=1, activation="relu"), (2, 8, 9, 9)),
    "Conv3d": (lambda: fused.Conv3d(3, 4, 3), (1, 3, 5, 6, 7)),
    "LSTM": (lambda: fused.LSTM(16, 24, 2, bidirectional=True), (5, 3, 16)),
    "LSTMCell": (lambda: fused.LSTMCell(16, 24), (3, 16)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, backend: torch.device) -> None:
    make, shape = MODULES[name]
    module, x = make().to(backend), draw(backend, *shape, dtype=torch.float32)
    leaves = [x.requires_grad_(), *module.parameters()]

    def run() -> tuple[Tensor, ...]:
        return tuple(tree_leaves(module(x)))

    assert_replays(with_gradients(run, leaves), leaves)


def test_attention_with_other_angles(backend: torch.device) -> None:
    module = fused.Attention(64, 4, num_kv_heads=2, is_causal=True, batch_first=True).to(backend)
    x = draw(backend, 2, 20, 64, dtype=torch.float32)
    leaves = [x.requires_grad_(), *module.parameters()]
    rotary = (torch.rand(20, 8, device=backend), torch.rand(20, 8, device=backend))
    call = with_gradients(lambda: module(x, x, x, rotary=rotary)[0], leaves)
    assert_replays(call, [*leaves, *rotary])


OPTIMIZERS: dict[str, tuple[type, torch.dtype, dict[str, Any]]] = {
    "AdamW": (fused.AdamW, torch.float32, {"max_norm": 1.0, "zero_grad": True}),
    "Adam": (fused.Adam, torch.float32, {"amsgrad": True, "max_norm": 1.0, "nonfinite": "skip"}),
    "SGD": (fused.SGD, torch.float32, {"momentum": 0.9, "ema_decay": 0.9, "max_norm": 1.0}),
    "rounding": (fused.AdamW, torch.bfloat16, {"stochastic_rounding": True}),
    **{name: (fused.AdamW, torch.bfloat16, stored) for name, stored in STORED.items()},
}


@pytest.mark.parametrize("count", [3, 160])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, count: int, backend: torch.device) -> None:
    cls, dtype, options = OPTIMIZERS[name]
    options = options if cls is fused.SGD else {**options, "capturable": True}
    start, grads = ([draw(backend, 17, dtype=dtype) for _ in range(count)] for _ in range(2))
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

    torch.manual_seed(0)
    replay = Replay(step, backend)
    torch.manual_seed(0)
    for _ in range(Replay.WARM_UPS):
        eager.step()
    for turn in range(4):
        redraw(grads)
        if options.get("nonfinite") == "skip" and turn == 1:
            grads[0][0] = float("nan")
        for grad, p, q in zip(grads, eager_params, params):
            assert p.grad is not None and q.grad is not None
            p.grad.copy_(grad)
            q.grad.copy_(grad)
        for run in (replay, eager.step):
            torch.manual_seed(turn)
            run()
        assert_equal(everything(params, optimizer), everything(eager_params, eager))


@pytest.mark.parametrize("cls", [fused.AdamW, fused.SGD])
def test_steps_in_the_backward_pass(cls: type, backend: torch.device) -> None:
    start, x = (draw(backend, 9, dtype=torch.float32) for _ in range(2))
    options: dict[str, Any] = {"momentum": 0.9} if cls is fused.SGD else {"capturable": True}
    sides = []
    for _ in range(2):
        network = torch.nn.ParameterList([start.clone()])
        sides.append((network, step_in_backward(network, cls, lr=0.1, **options)))

    def train(network: torch.nn.ParameterList) -> list[Tensor]:
        (network[0] * x).square().sum().backward()
        return []

    (network, optimizer), (eager_network, eager) = sides
    replay = Replay(lambda: train(network), backend)
    for _ in range(Replay.WARM_UPS):
        train(eager_network)
    for _ in range(3):
        redraw([x])
        replay()
        train(eager_network)
        assert_equal(everything([*network], optimizer), everything([*eager_network], eager))


def test_counts_on_the_host_are_refused_in_the_backward_pass_too(backend: torch.device) -> None:
    """A replay would correct the bias of every step as of the one that was captured."""
    network = torch.nn.ParameterList([draw(backend, 9, dtype=torch.float32)])
    step_in_backward(network, fused.AdamW, lr=0.1)

    def train() -> list[Tensor]:
        network[0].square().sum().backward()
        return []

    with pytest.raises(RuntimeError, match=r"graph capture of step.*capturable is False"):
        Replay(train, backend)
    before = network[0].detach().clone()
    train()  # the capture has ended
    assert not torch.equal(network[0], before)


def test_a_learning_rate_that_changes(backend: torch.device) -> None:
    parameter = draw(backend, 9, dtype=torch.float32).requires_grad_()
    parameter.grad = torch.ones_like(parameter)
    rate = torch.tensor(0.1, device=backend)
    optimizer = fused.AdamW([parameter], lr=rate, capturable=True, weight_decay=0.0)

    def step() -> list[Tensor]:
        optimizer.step()
        return [parameter.detach()]

    replay = Replay(step, backend)
    before = parameter.detach().clone()
    assert not torch.equal(*replay(), before)
    rate.zero_()
    before = parameter.detach().clone()
    assert_equal(replay(), [before])


def test_clipping(backend: torch.device) -> None:
    parameter = draw(backend, 9000, dtype=torch.float32).requires_grad_()
    grad = parameter.grad = draw(backend, 9000, dtype=torch.float32)

    def call() -> list[Tensor]:
        return [fused.clip_grad_norm_([parameter], 1.0)]

    replay = Replay(call, backend)
    for _ in range(2):
        redraw([grad])
        expected = grad.norm()
        torch.testing.assert_close(*replay(), expected)
        torch.testing.assert_close(grad.norm(), torch.ones_like(expected))
