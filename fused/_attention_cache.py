"""Attention over a cache of keys and values: signature and routing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from fused import _route
from fused._attention import Extras, make_options, results
from fused._attention_checks import check_device
from fused._attention_composite import Attended, Options, compute_dtype
from fused._attention_function import empty_heads
from fused._attention_sharded import attend_cache_sharded

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Options(Extras, total=False):
    k: Tensor | None
    v: Tensor | None
    block_table: Tensor | None
    attn_mask: Tensor | None
    is_causal: bool
    scale: float | None


@overload
def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


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
    scale: float | None = None,
    causal_alignment: str = "bottom_right",
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new tokens over the keys and values of those before them. Has no derivative.

    Sequence b has ``cache_seqlens[b]`` keys in the cache. New ones, where given, are written behind
    them, in place, and count; the cache is all that is changed, ``cache_seqlens`` is not. With T
    keys then, query i stands at key i + T - S: the last query sees all. No length is read on the
    CPU when the tensors are on a GPU.

    Args:
        q: ``[B, H, S, D]``, float32, float64, float16 or bfloat16; one or several new tokens.
        k_cache: ``[B, G, C, D]``, G a divisor of H; or pages, ``[num_pages, G, page_size, D]``. Of
            any strides whose last is 1.
        v_cache: ``[B, G, C, Dv]``, or ``[num_pages, G, page_size, Dv]``.
        cache_seqlens: ``[B]``, int32, on the device of q.
        k: ``[B, G, N, D]``, new keys; N need not be S.
        v: ``[B, G, N, Dv]``, new values.
        block_table: ``[B, pages]``, int32: the pages of each sequence, in order. Key j lies in page
            ``block_table[b, j // page_size]``. Entries behind the last key are not read. Sequences
            may share pages that none of them writes.
        attn_mask: ``[B, H, S, T]``, dimensions of size 1 or missing in front broadcast; keys
            beyond its T are hidden.
        is_causal: True by default.
        causal_alignment: ``"bottom_right"`` by default.
        scale, window, softcap, alibi_slopes, sink, return_lse: as in
            :func:`fused.functional.scaled_dot_product_attention`.

    Returns:
        ``[B, H, S, Dv]`` in the dtype of q; with ``return_lse`` also ``[B, H, S]``.

    Raises:
        TypeError: dtypes that differ or that are not floating; cache_seqlens or block_table that
            are not int32.
        ValueError: shapes, strides or devices that do not go together, an option outside its
            range, or, for tensors on the CPU, lengths beyond the cache and pages that are none.
        NotImplementedError: head_dim above 512.
        RuntimeError: an input that requires a gradient, or a torch.func transform.
    """
    options = make_options(
        q, attn_mask, 0.0, is_causal, scale, causal_alignment, window, softcap, alibi_slopes, sink
    )
    others = (k_cache, v_cache, cache_seqlens, k, v, block_table, options)
    if _route.is_sharded(q):
        return results(attend_cache_sharded(_attend_cache, q, *others), return_lse)
    return results(_attend_cache(q, *others), return_lse)


def _attend_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    k: Tensor | None, v: Tensor | None, block_table: Tensor | None, options: Options,
) -> Attended:  # fmt: skip
    """What `attention_with_kv_cache` does, for checked options."""
    q, k, v = _route.autocast(q.device.type, q, k, v)
    inputs = (q, k_cache, v_cache, k, v, *options[:3])
    reason = _route.composite_reason(*inputs)
    if reason is None and _route.needs_grad(*inputs):
        reason = "an input requires one"
    if reason is not None:
        raise RuntimeError(
            f"attention: inputs must not ask for a derivative of attention_with_kv_cache, but "
            f"{reason}; use torch.no_grad()"
        )
    _route.report("attention", q.device, None)
    ops: Any = torch.ops.fused if _route.is_traced(*inputs) else _route.kernels()
    out, lse = ops.attention_with_kv_cache(
        q, k_cache, v_cache, cache_seqlens, k, v, block_table, *options[:3], options.is_causal,
        options.scale, options.softcap, options.window_left, options.window_right,
    )  # fmt: skip
    return Attended(out, lse, None)


@torch.library.register_fake("fused::attention_with_kv_cache")
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    check_device("k_cache", k_cache, q)
    check_device("v_cache", v_cache, q)
    lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q))
    return empty_heads(q, v_cache.shape[-1]), lse
