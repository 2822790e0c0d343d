"""Attention with every option: derivatives of all orders, transforms, compiled graphs, autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused.functional import scaled_dot_product_attention

EVERYTHING = {
    "is_causal": True,
    "causal_alignment": "bottom_right",
    "window": (2, 1),
    "softcap": 1.5,
    "enable_gqa": True,
    "return_lse": True,
}


def everything() -> tuple[Callable[..., tuple[Tensor, Tensor]], list[Tensor]]:
    """A call with every option, as a function of all that may have a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 4, 3), (1, 1, 5, 3), (1, 1, 5, 2), (4, 5), (2,), (2,)]
    inputs = [torch.randn(s, generator=generator).double().requires_grad_() for s in shapes]

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor, sink: Tensor):
        options = EVERYTHING | {"alibi_slopes": slopes, "sink": sink}
        return scaled_dot_product_attention(q, k, v, mask, **options)

    return function, inputs


def test_every_derivative_of_everything() -> None:
    function, inputs = everything()
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_transforms_of_everything() -> None:
    function, inputs = everything()
    places = tuple(range(len(inputs)))

    def loss(*inputs: Tensor) -> Tensor:
        out, lse = function(*inputs)
        return out.square().sum() + lse.sin().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    detached = [x.detach() for x in inputs]
    for a, b in zip(torch.func.grad(loss, argnums=places)(*detached), expected, strict=True):
        torch.testing.assert_close(a, b)
    batch = [torch.stack([x, x + 0.5]) for x in detached]
    for i, results in enumerate(zip(*torch.func.vmap(function)(*batch), strict=True)):
        torch.testing.assert_close(results, tuple(function(*(x[i] for x in batch))))


def test_everything_compiled_with_dynamic_shapes() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return function(*inputs)

    function, _ = everything()
    for rows, keys in ((4, 5), (9, 12), (17, 7)):
        shapes = [(1, 2, rows, 3), (1, 1, keys, 3), (1, 1, keys, 2), (rows, keys), (2,), (2,)]
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        results, expected = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(results, expected)
        loss, expected_loss = (
            (out * torch.arange(2.0)).sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()
            for out, lse in (results, expected)
        )
        for a, b in zip(
            torch.autograd.grad(loss, inputs), torch.autograd.grad(expected_loss, inputs)
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("which", [0, 1])
def test_either_result_alone_has_gradients(which: int) -> None:
    function, inputs = everything()
    detached = [x.detach().requires_grad_() for x in inputs]
    alone = torch.autograd.grad(function(*inputs)[which].sum(), inputs, allow_unused=True)
    out, lse = function(*detached)
    both = (out, lse)[which].sum() + 0 * (lse, out)[which].sum()
    for a, b in zip(alone, torch.autograd.grad(both, detached), strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


def test_autocast_keeps_slopes_and_sink() -> None:
    q = torch.randn(1, 2, 3, 4)
    sink, slopes = torch.randn(2, requires_grad=True), torch.rand(2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = scaled_dot_product_attention(
            q, q, q, sink=sink, alibi_slopes=slopes, return_lse=True
        )
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    half = q.bfloat16()
    expected = scaled_dot_product_attention(half, half, half, sink=sink, alibi_slopes=slopes)
    assert torch.equal(out, expected)
    for grad in torch.autograd.grad(out.sum() + lse.sum(), (sink, slopes)):
        assert grad.dtype == torch.float32 and (grad != 0).all()
