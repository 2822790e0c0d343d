"""Jagged nested tensors in scaled_dot_product_attention, by the kernels for packed sequences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused
from fused.functional import scaled_dot_product_attention, varlen_attention


def jagged(lengths: list[int], heads: int, width: int, device: torch.device) -> Tensor:
    """[B, lengths, heads, width]"""
    parts = [torch.randn(n, heads, width, device=device) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


def test_what_stock_says(backend: torch.device) -> None:
    inputs = [jagged([3, 70, 1], 2, 8, backend) for _ in range(3)]

    def run(function) -> list[Tensor]:
        out = function(*(x.transpose(1, 2) for x in inputs), scale=0.3)
        assert out.shape == inputs[0].transpose(1, 2).shape
        grads = torch.autograd.grad(out.values().square().sum(), inputs)
        return [out.values(), *(grad.values() for grad in grads)]

    decision = fused.explain(
        scaled_dot_product_attention, *(x.transpose(1, 2) for x in inputs)
    ).decisions[0]
    assert decision.path != "composite"
    ours, stock = run(scaled_dot_product_attention), run(F.scaled_dot_product_attention)
    for actual, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_bits_of_packed_sequences_with_every_option(backend: torch.device) -> None:
    q = jagged([3, 0, 40], 4, 8, backend)
    k, v = jagged([5, 2, 33], 2, 8, backend), jagged([5, 2, 33], 2, 6, backend)
    options = {
        "attn_mask": torch.randn(3, 1, 40, 33, device=backend),
        "window": (9, 3),
        "softcap": 2.0,
        "alibi_slopes": torch.rand(4, device=backend),
        "sink": torch.randn(4, device=backend),
        "enable_gqa": True,
        "return_lse": True,
    }
    nested = [x.transpose(1, 2) for x in (q, k, v)]
    out, lse = scaled_dot_product_attention(*nested, **options)
    assert out.shape[:3] == lse.shape == nested[0].shape[:3]
    ends = [x.offsets().int() for x in (q, k)]
    expected = varlen_attention(q.values(), k.values(), v.values(), *ends, **options)
    assert torch.equal(out.transpose(1, 2).values(), expected[0])
    assert torch.equal(lse.values(), expected[1])


def test_in_a_compiled_graph() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q: Tensor) -> Tensor:
        q = q.transpose(1, 2)
        return scaled_dot_product_attention(q, q, q, window=(2, 0))

    for lengths in ([3, 5], [7, 1, 2]):
        q = jagged(lengths, 2, 4, torch.device("cpu"))
        nested = q.transpose(1, 2)
        expected = scaled_dot_product_attention(nested, nested, nested, window=(2, 0))
        torch.testing.assert_close(compiled(q).values(), expected.values())


@pytest.mark.parametrize("compiled", [False, True])
def test_values_have_the_lengths_of_the_keys(compiled: bool) -> None:
    attend = scaled_dot_product_attention
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    q, k, same, others, fewer = (
        jagged(lengths, 2, 4, torch.device("cpu")).detach().transpose(1, 2)
        for lengths in ([3, 5], [4, 6], [4, 6], [6, 4], [10])
    )
    expected = scaled_dot_product_attention(q, k, same)
    torch.testing.assert_close(attend(q, k, same).values(), expected.values())
    for v in (others, fewer):
        with pytest.raises((ValueError, RuntimeError), match="value must have the lengths of key"):
            attend(q, k, v)


def test_what_is_jagged_otherwise_is_refused_or_stocks() -> None:
    q = jagged([3, 5], 2, 4, torch.device("cpu"))
    holes = torch.nested.narrow(
        torch.randn(2, 6, 2, 4), 1, torch.tensor([0, 1]), torch.tensor([3, 2]), layout=torch.jagged
    )
    for x in (q, holes.transpose(1, 2)):
        with pytest.raises(NotImplementedError, match=r"^attention: nested and sparse inputs must"):
            scaled_dot_product_attention(x, x, x, softcap=1.0)
