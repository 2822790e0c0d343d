"""The definition of scaled dot-product attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    keep: Tensor | None = None,
    *,
    causal_alignment: str = "top_left",
    window: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(score + mask) v in float64, or what becomes of that in another `dtype`.

    query ``[..., H, S, D]``, key ``[..., G, T, D]``, value ``[..., G, T, Dv]`` with G a divisor of
    H; ``keep`` is dropout's factor, broadcastable to ``[..., H, S, T]``. A row that sees no key is
    zero, and its log-sum-exp -inf.
    """
    q, k, v = (t.to(dtype) for t in (query, key, value))
    group = q.shape[-3] // k.shape[-3] if k.shape[-3] else 1
    k, v = k.repeat_interleave(group, dim=-3), v.repeat_interleave(group, dim=-3)
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    rows, columns = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
    i, j, d = rows[:, None], columns[None, :], len(columns) - len(rows)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * (i + d - j).abs()
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if is_causal:
        visible &= j <= (i if causal_alignment == "top_left" else i + d)
    if window[0] >= 0:
        visible &= j >= i + d - window[0]
    if window[1] >= 0:
        visible &= j <= i + d + window[1]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask.to(dtype)
    scores = scores.masked_fill(~visible, -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    logits = scores.masked_fill(blind, 0.0)
    if sink is not None:
        column = sink.to(dtype)[:, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : len(columns)].masked_fill(blind, 0.0)
    out = (weights if keep is None else weights * keep) @ v
    lse = torch.logsumexp(logits, dim=-1).masked_fill(blind.squeeze(-1), -math.inf)
    return (out, lse) if return_lse else out
