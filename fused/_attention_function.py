"""The attention kernels as one differentiable function, eager and registered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused import _route
from fused._attention_checks import check_inputs
from fused._attention_composite import (
    NUM_TENSORS,
    Options,
    attention_weights,
    compute_dtype,
    draw_rng,
)
from fused._attention_derivatives import gradients
from fused._attention_tangent import attention_with_tangents


def run_attention(
    q: Tensor, k: Tensor, v: Tensor, options: Options, need_weights: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[B, H, S, D] in, or packed [S, H, D], by the kernels: out, log-sum-exp, weights if asked for.

    The random numbers of dropout are drawn here, unless they are given.
    """
    if options.dropout_p > 0 and options.rng is None:
        options = options._replace(rng=draw_rng(q.device))
    mask, slopes, sink = options[:3]
    if _route.is_forward_mode(q, k, v, mask, slopes, sink):
        out, lse = attention_with_tangents(q, k, v, options)
    elif _route.is_traced(q, k, v, mask, slopes, sink):
        out, lse, _ = torch.ops.fused.attention_forward(q, k, v, *options)
    elif _route.needs_grad(q, k, v, mask, slopes, sink):
        out, lse = AttentionFunction.apply(q, k, v, *options)
    else:
        out, lse, _ = _route.kernels().attention_forward(q, k, v, *options)
    weights = attention_weights(q, k, options) if need_weights else None
    return out, lse, weights


class AttentionFunction(torch.autograd.Function):
    """The kernels as one differentiable function of q, k, v, mask, slopes and sink."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        out, lse, row_stats = _route.kernels().attention_forward(q, k, v, *options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, row_stats, *options[:NUM_TENSORS])
        ctx.options = options[NUM_TENSORS:]
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        traced = _route.is_traced(grad_out, grad_lse)
        return _gradients(ctx, torch.ops.fused if traced else _route.kernels(), grad_out, grad_lse)


def _gradients(
    ctx: Any, ops: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs of the op, by `ops.attention_backward` where it can."""
    q, k, v, out, row_stats, *tensors = ctx.saved_tensors
    options, needs = Options(*tensors, *ctx.options), list(ctx.needs_input_grad[:6])
    return gradients(needs, (q, k, v, out, row_stats), options, ops, grad_out, grad_lse)


def empty_heads(like: Tensor, width: int) -> Tensor:
    """Like [B, H, S, D], laid out as [B, S, H, width], or like packed [S, H, D]."""
    if like.dim() == 3:
        return like.new_empty(*like.shape[:-1], width)
    batch, heads, length = like.shape[:-1]
    strides = (length * heads * width, width, heads * width, 1)
    return like.new_empty_strided((batch, heads, length, width), strides)


@torch.library.register_fake("fused::attention_forward")
def _forward_results(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, ...]:
    check_inputs(q, k, v, Options(*options))
    rows = q.shape[:3] if q.dim() == 4 else (q.shape[1], q.shape[0])
    lse = q.new_empty(rows, dtype=compute_dtype(q))
    return empty_heads(q, v.shape[-1]), lse, lse.new_empty(2, *rows)


@torch.library.register_fake("fused::attention_tangent")
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, ...]:
    out, lse, row_stats = _forward_results(q, k, v, *options[: len(Options._fields)])
    return out, lse, row_stats, torch.empty_like(out), torch.empty_like(lse)


@torch.library.register_fake("fused::attention_backward")
def _(grad_out: Tensor, grad_lse: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    q, k, v, _, stats, mask, slopes, sink, *_, needs = inputs
    needs_kv = needs[1] or needs[2]
    grads = [
        empty_heads(t, t.shape[-1]) if needed else t.new_empty(0)
        for t, needed in zip((q, k, v), (needs[0], needs_kv, needs_kv))
    ]
    for t, needed in zip((mask, slopes, sink), needs[3:]):
        needed = needed and t is not None and t.dtype != torch.bool
        grads.append(t.new_empty(t.shape) if needed else stats.new_empty(0))
    return tuple(grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *options = inputs
    out, _, row_stats = output
    ctx.mark_non_differentiable(row_stats)
    ctx.save_for_backward(q, k, v, out, row_stats, *options[:NUM_TENSORS])
    ctx.options = options[NUM_TENSORS:]


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, torch.ops.fused, grad_out, grad_lse)


torch.library.register_autograd("fused::attention_forward", _backward, setup_context=_setup_context)
