"""Attention in float32 on tensor cores: who allows tf32, and what it does to the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import on_gpus
from test_attention_tensor_cores import CASES, MMA, PORTABLE, draw, launched, path_of
from torch import Tensor

from fused.functional import scaled_dot_product_attention
from fused.testing import emulated_cuda
from fused.testing.attention import Judgement, run_case, run_stock_in_tf32
from fused.testing.cases.attention import CASES as ALL_CASES
from fused.testing.cases.attention import RAGGED, VARLEN_CASES
from fused.testing.tf32 import round_to_tf32, tf32_allowed

# Each instance, and all options in the narrowest one.
IN_TF32 = [
    *(case for case in CASES if case.head_dim <= 128),
    *(case for case in ALL_CASES if case.head_dim == 8 and case.rows * case.keys > 2000),
    *(case for case in VARLEN_CASES if case.lengths == RAGGED and case.layout == "contiguous"),
]


@on_gpus
def test_forward_and_gradients_in_tf32(backend: torch.device) -> None:
    judgement = Judgement()
    with tf32_allowed():
        for case in IN_TF32:
            judgement.add(run_case(case, torch.float32, backend, run_stock_in_tf32))
    judgement.assert_as_accurate_as_stock()


@on_gpus
def test_factors_are_rounded_to_tf32(backend: torch.device) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        leaves = [x.clone().to(backend).requires_grad_() for x in (q, k, v)]
        out, lse = scaled_dot_product_attention(*leaves, scale=1.0, return_lse=True)
        grad_v = torch.autograd.grad(out, leaves[2], grad_out.to(backend))[0]
        return [x.detach().cpu() for x in (out, lse, grad_v)]

    # Of one key the score is the log-sum-exp and the weight 1. Halfway numbers are among these.
    q = 1 + (torch.arange(64) / 2**12).view(1, 1, 8, 8)
    k = 1 + (torch.arange(8) / 2**11).view(1, 1, 1, 8)
    grad_out = torch.zeros(1, 1, 8, 8)
    grad_out[:, :, 5] = q[:, :, 5] * 3
    with tf32_allowed():
        out, lse, grad_v = run(q, k, k)
    scores = round_to_tf32(q).double() @ round_to_tf32(k).double().mT
    for actual, expected in (
        (out, round_to_tf32(k).expand_as(out)),
        (lse, scores.float().squeeze(-1)),
        (grad_v, round_to_tf32(grad_out).sum(2, keepdim=True)),
    ):
        torch.testing.assert_close(actual, expected, rtol=5e-7, atol=0)

    # Of two keys the weight of the lesser one is rounded before it meets its value.
    q = torch.arange(1, 9)[:, None] * torch.eye(8)[0] + torch.zeros(1, 1, 8, 8)
    k = torch.stack([torch.zeros(8), -torch.eye(8)[0] / 8])[None, None]
    with tf32_allowed():
        out = run(q, k, torch.eye(8)[None, None, :2])[0]
    weights = torch.exp(-torch.arange(1, 9) / 8)
    torch.testing.assert_close(
        out[0, 0, :, 1] / out[0, 0, :, 0], round_to_tf32(weights), rtol=5e-7, atol=0
    )


@pytest.fixture
def untouched_flags() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"
    set_precision_of_all("none")


def set_precision_of_all(precision: str) -> None:
    """`torch.backends.fp32_precision`, which PyTorch's own test tools forbid to set by its name."""
    torch._C._set_fp32_precision_setter("generic", "all", precision)


def older_flag(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed


def precision_of_matmul(allowed: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"


def precision_of_all(allowed: bool) -> None:
    set_precision_of_all("tf32" if allowed else "ieee")


def oldest_function(allowed: bool) -> None:
    torch.set_float32_matmul_precision("high" if allowed else "highest")


@pytest.mark.usefixtures("untouched_flags")
@pytest.mark.parametrize(
    "allow", [older_flag, precision_of_matmul, precision_of_all, oldest_function]
)
def test_whoever_allows_tf32_in_the_emulator(allow: Callable[[bool], None]) -> None:
    tensors = [draw(1, 2, 5, 16, dtype=torch.float32)] * 3
    assert launched(tensors) == PORTABLE
    allow(True)
    assert launched(tensors) == MMA
    allow(False)
    assert launched(tensors) == PORTABLE


@pytest.mark.usefixtures("untouched_flags")
@pytest.mark.parametrize("allowed", [False, True])
def test_flags_that_disagree_do_not_raise_in_the_emulator(allowed: bool) -> None:
    older_flag(not allowed)
    precision_of_matmul(allowed)
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        _ = torch.backends.cuda.matmul.allow_tf32
    assert launched([draw(1, 2, 5, 16, dtype=torch.float32)] * 3) == (MMA if allowed else PORTABLE)


def test_what_they_take_in_tf32_in_the_emulator() -> None:
    def floats(*shape: int) -> Tensor:
        return draw(*shape, dtype=torch.float32)

    q = floats(1, 2, 5, 12)
    with tf32_allowed():
        assert launched([q, q, floats(1, 2, 5, 128)]) == MMA
        assert launched([floats(1, 2, 5, 20)[..., 4:16], q, q]) == MMA
        assert launched([floats(1, 1, 5, 14)] * 3) == MMA
        for others in (
            [q.double()] * 3,
            [floats(1, 1, 5, 132)] * 3,
            [q, q, floats(1, 2, 5, 132)],
            [floats(1, 2, 5, 14)[..., :12], q, q],
            [floats(1, 2, 5, 16)[..., 1:13], q, q],
        ):
            assert launched(others) == PORTABLE, [t.shape for t in others]
        assert launched([q, q, q], architecture=75) == PORTABLE


@pytest.mark.parametrize("forward", [False, True])
def test_each_pass_asks_for_itself_in_the_emulator(forward: bool) -> None:
    leaf = draw(1, 2, 5, 12, dtype=torch.float32).requires_grad_()
    with emulated_cuda() as launches:
        with tf32_allowed(forward):
            out = scaled_dot_product_attention(leaf, leaf, leaf)
        with tf32_allowed(not forward):
            torch.autograd.grad(out, leaf, torch.ones_like(out))
    kinds = ("mma", "portable") if forward else ("portable", "mma")
    assert path_of(launches.counts()) == {f"{kinds[0]} forward", f"{kinds[1]} backward"}


def test_the_cpu_knows_no_tf32() -> None:
    tensors = [draw(1, 2, 70, 16, dtype=torch.float32) for _ in range(3)]
    expected = scaled_dot_product_attention(*tensors)
    with tf32_allowed():
        assert torch.equal(scaled_dot_product_attention(*tensors), expected)
