"""Attention over packed sequences of their own lengths: signature and routing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from fused._attention import Extras, make_options, results
from fused._attention_packed import attend_packed

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Options(Extras, total=False):
    attn_mask: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = True,
    causal_alignment: str = "top_left",
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each sequence over itself, the sequences one behind the other and unpadded.

    Sequence b has the queries ``q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]]`` and the keys and values
    ``k[cu_seqlens_k[b] : cu_seqlens_k[b + 1]]``, either of which may be none. What each gets, bit
    for bit and in the gradients of q, k and v too, is what :func:`scaled_dot_product_attention`
    gives it alone, with the same options: positions, alignment and windows count within the
    sequence. No length is read on the CPU when the tensors are on a GPU, so that nothing waits and
    a CUDA graph may be replayed with other lengths.

    Args:
        q: ``[total_q, H, D]``, float32, float64, float16 or bfloat16.
        k: ``[total_k, G, D]``, G a divisor of H.
        v: ``[total_k, G, Dv]``.
        cu_seqlens_q: ``[B + 1]``, int32, on the device of q: rising from 0 to at most total_q.
            Rows behind the last sequence give zeros and get no gradient.
        cu_seqlens_k: ``[B + 1]``, as cu_seqlens_q, for the rows of k and v.
        attn_mask: ``[B, H, S, T]``, dimensions of size 1 or missing in front broadcast. Sequence b
            reads the element of its own query i and key j at ``[b, h, i, j]``; queries and keys
            beyond S and T are hidden.
        enable_gqa: False refuses G other than H.
        dropout_p, is_causal, scale, causal_alignment, window, softcap, alibi_slopes, sink,
            return_lse: as in :func:`scaled_dot_product_attention`.

    Returns:
        ``[total_q, H, Dv]`` in the dtype of q; with ``return_lse`` also the log-sum-exp of each
        row's scores, ``[H, total_q]`` in float32 (float64 for float64).

    Raises:
        TypeError: dtypes that differ or that are not floating, cu_seqlens that is not int32.
        ValueError: shapes or devices that do not go together, an option outside its range, or, for
            tensors on the CPU, cu_seqlens that falls or ends behind the last row.
    """
    options = make_options(
        q.transpose(0, -2), attn_mask, dropout_p, is_causal, scale,
        causal_alignment, window, softcap, alibi_slopes, sink,
    )._replace(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)  # fmt: skip
    if not enable_gqa and q.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"attention: k must have the heads of q ({q.shape[-2]}) without enable_gqa, "
            f"got {list(k.shape)}"
        )
    return results(attend_packed(q, k, v, options), return_lse)
