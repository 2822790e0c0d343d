"""Scaled dot-product attention: signature, routing and derivative."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused import _route

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 512


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of each query over all keys, without a score matrix in memory.

    Signature and meaning of :func:`torch.nn.functional.scaled_dot_product_attention`. The forward
    pass is the online softmax of Milakov & Gimelshein (arXiv:1805.02867), tiled as in
    FlashAttention (arXiv:2205.14135); the backward pass recomputes the probabilities. Both are
    deterministic.

    Args:
        query: ``[..., H, S, D]``, float32, float64, float16 or bfloat16.
        key: ``[..., G, T, D]``; G equals H, or divides it with ``enable_gqa``.
        value: ``[..., G, T, Dv]``.
        attn_mask: broadcastable to ``[..., H, S, T]``. Bool: True lets a query see a key. Floating
            (of any dtype): added to the scaled scores.
        dropout_p: probability with which each attention weight is dropped. Applied always: pass 0
            in evaluation. The mask is a function of a pair of numbers drawn from the generator of
            the query's device.
        is_causal: query i sees keys 0 to i. May not be combined with ``attn_mask``.
        scale: multiplies the scores; ``1 / sqrt(D)`` by default.
        enable_gqa: groups of H / G query heads share a key and value head.

    Returns:
        ``[..., H, S, Dv]`` in the query's dtype. A query that sees no key gives zeros, and no
        gradient.

    Raises:
        TypeError: dtypes that differ or that are not floating.
        ValueError: shapes or devices that do not go together, or a dropout_p outside [0, 1].
        RuntimeError: both ``attn_mask`` and ``is_causal``.
    """
    query, key, value = _route.autocast(query.device.type, query, key, value)  # type: ignore
    if attn_mask is not None and is_causal:
        raise RuntimeError("attention: is_causal must be False where attn_mask is given, got both")
    transform = _route.composite_reason(query, key, value, attn_mask)
    reason = transform or _unsupported(query, key, value, attn_mask, enable_gqa)
    _route.report("attention", query.device, reason)
    if transform is not None:
        constants = (attn_mask, None, dropout_p, is_causal, scale, enable_gqa)
        return attention_composite(query, key, value, *constants)[0]
    if reason is not None:
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(query.dtype)
        arguments = (query, key, value, attn_mask, dropout_p, is_causal)
        return F.scaled_dot_product_attention(*arguments, scale=scale, enable_gqa=enable_gqa)
    if query.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]:
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
    batch = _broadcast_batch(query, key, value)
    q, k, v = (_to_four_dims(t, batch) for t in (query, key, value))
    if attn_mask is not None and attn_mask.dim() > 3:
        if attn_mask.dim() - 3 > len(batch):
            raise ValueError(
                "attention: attn_mask must have at most as many dimensions as the output "
                f"({len(batch) + 3}), got {list(attn_mask.shape)}"
            )
        attn_mask = _to_four_dims(attn_mask, batch)
    out = _attention(q, k, v, attn_mask, dropout_p, is_causal, scale)
    return out.reshape(*batch, *query.shape[-3:-1], value.shape[-1])


def _broadcast_batch(query: Tensor, key: Tensor, value: Tensor) -> torch.Size:
    try:
        return torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        raise ValueError(
            "attention: query, key and value must have a batch that broadcasts, got "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        ) from None


def _to_four_dims(tensor: Tensor, batch: torch.Size) -> Tensor:
    """[..., H, S, D] with any number of batch dimensions as [B, H, S, D], a view where possible."""
    tensor = tensor.expand(*batch, *tensor.shape[-3:]) if tensor.dim() > 3 or batch else tensor
    return tensor.reshape(math.prod(batch), *tensor.shape[-3:])


def _unsupported(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> str | None:
    """Why no kernel takes these arguments, or None. PyTorch's own operator takes what is left."""
    tensors = (query, key, value)
    if any(t.is_nested or t.layout != torch.strided for t in tensors):
        return "an input is nested or sparse"
    if query.device.type not in ("cpu", "cuda", "meta"):
        return f"no kernel for device {query.device.type}"
    if any(t.dtype not in _DTYPES for t in tensors):
        return f"no kernel for dtype {query.dtype}"
    if min(t.dim() for t in tensors) < 3:
        return "an input has fewer than three dimensions"
    if not 1 <= query.shape[-1] <= _MAX_HEAD_DIM or not 1 <= value.shape[-1] <= _MAX_HEAD_DIM:
        return f"no kernel for head_dim {query.shape[-1]} and {value.shape[-1]} (1 to 512)"
    heads = (query.shape[-3], key.shape[-3], value.shape[-3])
    if enable_gqa and heads[1] != heads[2]:
        return f"heads {heads}: key and value are in groups of their own"
    if not enable_gqa and not heads[0] == heads[1] == heads[2]:
        return f"heads {heads} are broadcast, which enable_gqa=True would make a group"
    if attn_mask is not None:
        if attn_mask.requires_grad and torch.is_grad_enabled():
            return "attn_mask requires a gradient"
        if attn_mask.dtype != torch.bool and attn_mask.dtype not in _DTYPES:
            return f"no kernel for an attn_mask of dtype {attn_mask.dtype}"
        if attn_mask.is_nested or attn_mask.layout != torch.strided:
            return "attn_mask is nested or sparse"
    return None


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """[B, H, S, D] in, [B, H, S, Dv] out, by the kernels."""
    rng = _draw_rng(q.device) if dropout_p > 0 else None
    constants = (attn_mask, rng, dropout_p, is_causal, scale)
    if _route.is_traced(q, k, v, attn_mask):
        return torch.ops.fused.attention_forward(q, k, v, *constants)[0]
    if _route.needs_grad(q, k, v):
        return AttentionFunction.apply(q, k, v, *constants)
    return _route.kernels().attention_forward(q, k, v, *constants)[0]


def _draw_rng(device: torch.device) -> Tensor:
    """(seed, offset) of a dropout mask, drawn on the device: CUDA graphs replay fresh masks."""
    return torch.randint(torch.iinfo(torch.int64).max, (2,), dtype=torch.int64, device=device)


class AttentionFunction(torch.autograd.Function):
    """The kernels as one differentiable function of q, k and v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *constants: Any) -> Tensor:
        out, lse = _route.kernels().attention_forward(q, k, v, *constants)
        attn_mask, rng, *ctx.options = constants
        ctx.save_for_backward(q, k, v, out, lse, attn_mask, rng)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        traced = _route.is_traced(grad_out)
        return _gradients(ctx, torch.ops.fused if traced else _route.kernels(), grad_out, None)


def _gradients(
    ctx: Any, ops: Any, grad_out: Tensor, maybe_grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs of the op, by `ops.attention_backward` where it can."""
    q, k, v, out, lse, attn_mask, rng = ctx.saved_tensors
    constants = (attn_mask, rng, *ctx.options)
    if _route.needs_composite_gradients(grad_out, maybe_grad_lse):

        def composite(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return attention_composite(q, k, v, *constants)

        grads = _route.composite_gradients(composite, (q, k, v), (grad_out, maybe_grad_lse))
    else:
        grads = ops.attention_backward(grad_out, maybe_grad_lse, q, k, v, out, lse, *constants)
    return (*grads, *[None] * len(constants))


def attention_composite(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool = True,
) -> tuple[Tensor, Tensor]:
    """The kernels' (out, lse) in plain PyTorch operators, which have every derivative.

    Takes what PyTorch's own function takes, not just four dimensions. Without `rng` the dropout
    mask comes from PyTorch's generator.
    """
    with _route.without_autocast(q.device.type):
        return _attention_composite(
            q, k, v, attn_mask, rng, dropout_p, is_causal, scale, enable_gqa
        )


def _attention_composite(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor]:
    queries, keys, values = (
        t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (q, k, v)
    )
    if enable_gqa:
        keys, values = (
            t.repeat_interleave(q.shape[-3] // max(t.shape[-3], 1), dim=-3) for t in (keys, values)
        )
    scale = scale if scale is not None else 1 / math.sqrt(max(q.shape[-1], 1))
    scores = (queries @ keys.transpose(-2, -1)) * scale
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    # Rows without a key: zeros, and no gradient through the log-sum-exp of nothing.
    hidden = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(hidden, 0.0)
    weights = torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(hidden.squeeze(-1), -math.inf)
    if rng is not None:
        weights = weights * dropout_mask(rng, dropout_p, weights)
    elif dropout_p != 0:
        weights = F.dropout(weights, dropout_p)
    return (weights @ values).to(q.dtype), lse


def dropout_mask(rng: Tensor, dropout_p: float, weights: Tensor) -> Tensor:
    """What the kernels multiply `weights` [B, H, S, T] by: 0, or 1 / (1 - dropout_p).

    The kernels tell it themselves: with q = 0 every key of a row has the weight 1 / T, and with the
    identity as v the output is the matrix of weights.
    """
    batch, heads, rows, keys = weights.shape
    q = weights.new_zeros(batch, heads, rows, 1, dtype=torch.float32)
    k = q.new_zeros(batch, heads, keys, 1)
    columns = []
    for start in range(0, keys, _MAX_HEAD_DIM):
        width = min(_MAX_HEAD_DIM, keys - start)
        v = q.new_zeros(keys, width)
        v[start : start + width] = torch.eye(width, device=q.device)
        v = v.expand(batch, heads, keys, width)
        with torch.no_grad():
            run = (
                torch.ops.fused.attention_forward
                if _route.is_traced(rng)
                else (_route.kernels().attention_forward)
            )
            columns.append(run(q, k, v, None, rng, dropout_p, False, 1.0)[0])
    kept = torch.cat(columns, dim=-1) != 0
    return kept.to(weights.dtype) * (0.0 if dropout_p == 1 else 1 / (1 - dropout_p))


def _empty_heads(like: Tensor, batch: int, heads: int, length: int, width: int) -> Tensor:
    """[B, H, S, D], laid out as [B, S, H, D]."""
    strides = (length * heads * width, width, heads * width, 1)
    return like.new_empty_strided((batch, heads, length, width), strides)


@torch.library.register_fake("fused::attention_forward")
def _(q, k, v, attn_mask, rng, dropout_p, is_causal, scale):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, length = q.shape[:3]
    out = _empty_heads(q, batch, heads, length, v.shape[-1])
    return out, q.new_empty(q.shape[:3], dtype=dtype)


@torch.library.register_fake("fused::attention_backward")
def _(grad_out, grad_lse, q, k, v, *rest):  # type: ignore[no-untyped-def]
    return tuple(_empty_heads(t, *t.shape) for t in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, attn_mask, rng, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, attn_mask, rng)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, torch.ops.fused, grad_out, grad_lse)


torch.library.register_autograd("fused::attention_forward", _backward, setup_context=_setup_context)
