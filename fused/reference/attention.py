"""The definition of scaled dot-product attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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
    out = (weights if keep is None else weights * keep.to(dtype)) @ v
    lse = torch.logsumexp(logits, dim=-1).masked_fill(blind.squeeze(-1), -math.inf)
    return (out, lse) if return_lse else out


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    attn_mask: Tensor | None = None,
    keep: Tensor | None = None,
    attend: Callable[..., Any] = scaled_dot_product_attention,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attend` for each of the packed sequences, and zeros for rows behind the last.

    q ``[total_q, H, D]``, k ``[total_k, G, D]``, v ``[total_k, G, Dv]``, cu_seqlens ``[B + 1]``;
    attn_mask and keep broadcastable to ``[B, H, S, T]``, of which a sequence has its first rows and
    columns.
    """
    outs, lses = [], []

    def of_sequence(b: int, whole: Tensor | None, rows: int, keys: int) -> Tensor | None:
        if whole is None:
            return None
        own = whole.reshape(*[1] * (4 - whole.dim()), *whole.shape)
        own = own[b % own.shape[0]][None]
        own = own if own.shape[2] == 1 else own[:, :, :rows]
        return own if own.shape[3] == 1 else own[..., :keys]

    for b in range(len(cu_seqlens_q) - 1):
        rows, keys = (slice(*cu[b : b + 2].tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
        operands = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        extents = operands[0].shape[2], operands[1].shape[2]
        if keep is not None:
            options["keep"] = of_sequence(b, keep, *extents)
        result = attend(*operands, attn_mask=of_sequence(b, attn_mask, *extents), **options)
        out, lse = result if isinstance(result, tuple) else (result, None)
        outs.append(out[0].transpose(0, 1))
        lses += [] if lse is None else [lse[0]]
    rest = q.shape[0] - int(cu_seqlens_q[-1])
    out = torch.cat([*outs, q.new_zeros(rest, q.shape[1], v.shape[2])])
    if not options.get("return_lse"):
        return out
    return out, torch.cat([*lses, q.new_full((q.shape[1], rest), -math.inf)], dim=-1)


def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = True,
    causal_alignment: str = "bottom_right",
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q over what each sequence has in the cache, and the new keys behind that.

    As :func:`fused.functional.attention_with_kv_cache`, but the cache stays as it is.
    """
    parts: list[Any] = []
    for b, length in enumerate(cache_seqlens.tolist()):
        rows = []
        for cache, new in ((k_cache, k), (v_cache, v)):
            if block_table is None:
                held = cache[b, :, :length]
            else:
                held = torch.cat(list(cache[block_table[b].long()]), dim=1)[:, :length]
            rows.append(held if new is None else torch.cat([held, new[b]], dim=1))
        mask = attn_mask
        if mask is not None:
            mask = mask.reshape(*[1] * (4 - mask.dim()), *mask.shape)
            mask = mask[b % mask.shape[0]][None]
            mask = mask if mask.shape[3] == 1 else mask[..., : rows[0].shape[1]]
        causal: dict[str, Any] = {"is_causal": is_causal, "causal_alignment": causal_alignment}
        keys, values = rows[0][None], rows[1][None]
        parts.append(
            scaled_dot_product_attention(q[b : b + 1], keys, values, mask, **causal, **options)
        )
    if options.get("return_lse"):
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    return torch.cat(parts)
