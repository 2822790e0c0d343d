"""Rotary embedding's derivatives of every kind, and what traces it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused.functional import rotary_embedding
from fused.testing.cases.rotary import RotaryCase
from fused.testing.dispatch import OperatorLog

CASES = [
    RotaryCase("halves", batch=1, length=2, head_dim=4),
    RotaryCase("interleaved", length=2, head_dim=4, interleaved=True),
    RotaryCase("part", batch=1, length=2, head_dim=5, pairs=1, table="per sequence"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def leaves(case: RotaryCase, device: torch.device | str = "cpu") -> list[Tensor]:
    return [t.detach().requires_grad_() for t in case.make(torch.float64, device)[0]]


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One tensor of both results, not linear in any argument."""
    q, k = rotary_embedding(q, k, cos, sin)
    return torch.cat([q.square(), k.square()], dim=1)


@each_case
def test_derivatives(case: RotaryCase, backend: torch.device) -> None:
    """Backward, forward mode, and many gradients at once; then derivatives of derivatives."""

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_embedding(*tensors, interleaved=case.interleaved)

    inputs = leaves(case, backend)
    everything = {
        "check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True,
    }  # fmt: skip
    assert torch.autograd.gradcheck(call, inputs, **everything)
    assert torch.autograd.gradgradcheck(call, inputs, check_batched_grad=True)
    # The table a constant, as it mostly is.
    q, k, *table = (t.detach() for t in inputs)
    pair = (q.requires_grad_(), k.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda q, k: call(q, k, *table), pair)


def test_the_second_derivative_is_by_the_kernel() -> None:
    """Forward, backward, and once more for each on the way back through both."""
    q, k, cos, sin = leaves(CASES[0])
    cos, sin = cos.detach(), sin.detach()
    log = OperatorLog()
    with log:
        grads = torch.autograd.grad(turn(q, k, cos, sin).sum(), (q, k), create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k))
    assert log.names.count("fused.rotary.default") == 4


def test_transforms() -> None:
    q, k, cos, sin = (t.detach() for t in leaves(RotaryCase("", batch=3)))

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return turn(q, k, cos, sin).sum()

    def alone(q: Tensor, k: Tensor) -> Tensor:
        return loss(q[None], k[None])

    inputs = (q.requires_grad_(), k.requires_grad_())
    expected = torch.autograd.grad(loss(*inputs), inputs)
    per_sample = torch.func.vmap(torch.func.grad(alone, argnums=(0, 1)))(q, k)
    for one, other in zip(per_sample, expected, strict=True):
        torch.testing.assert_close(one, other)
    _, slope = torch.func.jvp(loss, (q.detach(), k.detach()), (q.detach(), k.detach()))
    torch.testing.assert_close(slope, sum((g * t).sum() for g, t in zip(expected, inputs)).detach())


def test_opcheck() -> None:
    q, k, *table = CASES[0].make(torch.float32, "cpu")[0]
    pair = (q.requires_grad_(), k.requires_grad_())
    torch.library.opcheck(torch.ops.fused.rotary, (*pair, *table, False, False))
    tensors = [t.detach().requires_grad_() for t in CASES[2].make(torch.bfloat16, "cpu")[0]]
    torch.library.opcheck(torch.ops.fused.rotary, (*tensors, True, True))


def test_compiles_whole_with_dynamic_shapes() -> None:
    torch.compiler.reset()
    compiled = torch.compile(turn, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 5), (3, 7), (2, 2)):
        inputs = leaves(RotaryCase("", batch=batch, length=length))
        results = []
        for function in (compiled, turn):
            out = function(*inputs)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def test_exports() -> None:
    class Turn(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            return rotary_embedding(*tensors, interleaved=True)

    tensors = tuple(RotaryCase("").make(torch.float32, "cpu")[0])
    exported = torch.export.export(Turn(), tensors)
    assert "torch.ops.fused.rotary.default" in exported.graph_module.code
    for actual, expected in zip(exported.module()(*tensors), Turn()(*tensors), strict=True):
        assert torch.equal(actual, expected)


def test_a_dispatch_mode_sees_the_op_in_both_directions() -> None:
    log = OperatorLog()
    inputs = leaves(CASES[0])
    with log:
        turn(*inputs).sum().backward()
    assert log.names.count("fused.rotary.default") == 2
    torch.testing.assert_close(inputs[0].grad, torch.autograd.grad(turn(*inputs).sum(), inputs)[0])


def test_a_stale_graph_raises() -> None:
    q, k, cos, sin = leaves(CASES[0])
    cos = cos.detach()
    out = turn(q, k, cos, sin)
    cos.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
