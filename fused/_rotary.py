"""Rotary position embedding: signature, routing and derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused import _route
from fused._attention_composite import compute_dtype
from fused._attention_function import empty_heads


def rotary_embedding(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Turns pairs of elements of queries and keys by the angles of their places, in one pass.

    Rotary position embedding (RoFormer, Su et al., arXiv:2104.09864): a pair (a, b) of row s
    becomes ``(a cos - b sin, b cos + a sin)``, computed in float32 (float64 for float64) and
    rounded once. Queries and keys are read as they lie: views of one packed projection need no
    copy. All four tensors have gradients; that of query and key is the rotation back, by the same
    kernel.

    Args:
        query: ``[B, H, S, D]``, float32, float64, float16 or bfloat16, or ``[H, S, D]``, which
            packed rows ``[S, H, D]`` are when transposed.
        key: ``[B, G, S, D]`` or ``[G, S, D]``, as query; G is any number of heads.
        cos: ``[S, R]``, or ``[B, S, R]`` where sequences stand at places of their own; of any
            floating dtype. The first 2 R <= D elements of each row turn, and the rest pass.
        sin: as cos.
        interleaved: pairs are neighbours, 2 i and 2 i + 1, as in GPT-J, instead of i and R + i, as
            in GPT-NeoX and Llama.

    Returns:
        Query and key, turned, in their shapes, laid out as ``[B, S, heads, D]``.

    Raises:
        TypeError: query and key of different dtypes, or a tensor that is not floating.
        ValueError: shapes or devices that do not go together.
    """
    if query.dim() not in (3, 4):
        raise ValueError(f"rotary: query must have 3 or 4 dimensions, got {list(query.shape)}")
    if query.dim() == 3:
        batch = (query.unsqueeze(0), key.unsqueeze(0))
        turned = rotary_embedding(*batch, cos, sin, interleaved=interleaved)
        return turned[0].squeeze(0), turned[1].squeeze(0)
    tensors = (query, key, cos, sin)
    reason = _route.composite_reason(*tensors) or _route.unsupported(*tensors)
    _route.report("rotary", query.device, reason)
    turn = _turn if reason is None else rotary_composite
    return turn(*tensors, interleaved, False)


def _turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """By the kernel."""
    inputs = (q, k, cos, sin, interleaved, inverse)
    if _route.is_traced(q, k, cos, sin):
        return torch.ops.fused.rotary(*inputs)
    if _route.needs_grad(q, k, cos, sin):
        return RotaryFunction.apply(*inputs)
    return _route.kernels().rotary(*inputs)


class RotaryFunction(torch.autograd.Function):
    """The kernel as a differentiable function of q, k, cos and sin."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        _setup_context(ctx, inputs)
        return _route.kernels().rotary(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_q, grad_k)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: object = None) -> None:
    q, k, cos, sin, *ctx.options = inputs
    # The operands matter for the gradient of the table alone.
    operands = (q, k) if any(ctx.needs_input_grad[2:4]) else ()
    ctx.save_for_backward(cos, sin, *operands)


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Those of q and k are turned back, which has a derivative in its turn."""
    cos, sin, *operands = ctx.saved_tensors
    interleaved, inverse = ctx.options
    wanted = ctx.needs_input_grad[:4]
    # Without heads an operand costs nothing.
    grad_q, grad_k = (g if want else g.narrow(1, 0, 0) for g, want in zip(grads, wanted))
    by_kernel = _route.is_traced(*grads) or _route.is_plain(*grads)
    turn = _turn if by_kernel else rotary_composite
    turned = turn(grad_q, grad_k, cos, sin, interleaved, not inverse)
    tables: tuple[Tensor | None, ...] = (None, None)
    if operands:
        tables = _route.composite_gradients(
            rotary_composite, (*operands, cos, sin, *ctx.options), grads,
            needs=(False, False, *wanted[2:], False, False),
        )[2:4]  # fmt: skip
    kept = (grad if want else None for grad, want in zip((*turned, *tables), wanted))
    return (*kept, None, None)


def rotary_composite(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The kernel's results in plain PyTorch operators, which have every derivative."""
    for name, tensor in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if not tensor.is_floating_point():
            raise TypeError(f"rotary: {name} must be floating, got {tensor.dtype}")
        if tensor.shape[-2] != q.shape[-2]:  # which might broadcast
            raise ValueError(
                f"rotary: {name} must have the length of q ({q.shape[-2]}), "
                f"got {list(tensor.shape)}"
            )
    dtype, pairs = compute_dtype(q), cos.shape[-1]
    cos, sin = (table.to(dtype).unsqueeze(-3) for table in (cos, sin))
    sin = -sin if inverse else sin

    def turn(x: Tensor) -> Tensor:
        head, rest = x.split((2 * pairs, x.shape[-1] - 2 * pairs), dim=-1)
        head = head.to(dtype)
        if interleaved:
            a, b = head[..., 0::2], head[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
        else:
            a, b = head.split((pairs, pairs), dim=-1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((turned.reshape(head.shape).to(x.dtype), rest), dim=-1)

    return turn(q), turn(k)


@torch.library.register_fake("fused::rotary")
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_heads(q, q.shape[-1]), empty_heads(k, k.shape[-1])


torch.library.register_autograd("fused::rotary", _gradients, setup_context=_setup_context)
