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
) -> Tensor:
    """softmax(scale * q k^T + mask) v in float64.

    query ``[..., H, S, D]``, key ``[..., G, T, D]``, value ``[..., G, T, Dv]`` with G a divisor of
    H; ``keep`` is dropout's factor, broadcastable to ``[..., H, S, T]``. A row that sees no key is
    zero.
    """
    q, k, v = (t.double() for t in (query, key, value))
    group = q.shape[-3] // k.shape[-3] if k.shape[-3] else 1
    k, v = k.repeat_interleave(group, dim=-3), v.repeat_interleave(group, dim=-3)
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        rows, columns = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
        scores = scores.masked_fill(columns > rows[:, None], -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
    blind = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return (weights if keep is None else weights * keep) @ v
