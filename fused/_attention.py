"""Scaled dot-product attention: signature, routing and derivative."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, TypeGuard, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fused import _route
from fused._attention_checks import broadcast_batch, check_inputs, check_mask
from fused._attention_composite import (
    MAX_HEAD_DIM,
    Attended,
    Options,
    attention_composite,
    compute_dtype,
)
from fused._attention_derivatives import transformed_attention
from fused._attention_function import run_attention
from fused._attention_packed import attend_jagged, is_packed
from fused._attention_sharded import attend_sharded

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias
    from typing_extensions import Unpack

_ALIGNMENTS = {"UPPER_LEFT": "top_left", "LOWER_RIGHT": "bottom_right"}  # of a CausalBias
_MAX_LENGTH = 2**30
# Bound here: users put our function in the place of this one, and calls must not come back to us.
_STOCK = F.scaled_dot_product_attention


class Extras(TypedDict, total=False):
    """The keyword-only options that all attention functions share."""

    causal_alignment: str
    window: tuple[int, int] | None
    softcap: float | None
    alibi_slopes: Tensor | None
    sink: Tensor | None


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: Literal[False] = False,
    **extras: Unpack[Extras],
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: Literal[True],
    **extras: Unpack[Extras],
) -> tuple[Tensor, Tensor]: ...


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "top_left",
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query over all keys, without a score matrix in memory.

    Signature and meaning of :func:`torch.nn.functional.scaled_dot_product_attention`, and
    keyword-only extras that combine freely. The forward pass is the online softmax of Milakov &
    Gimelshein (arXiv:1805.02867), tiled as in FlashAttention (arXiv:2205.14135); the backward pass
    recomputes the probabilities. Both are deterministic, and a sequence's result does not depend
    on the batch that it comes in. All floating inputs have gradients, and tangents in forward mode.

    The score of query i and key j is ``scale * q·k``, then ``softcap * tanh(score / softcap)``,
    then ``- alibi_slopes[h] * |i + T - S - j|``, then ``+ attn_mask``; then keys are hidden.

    Args:
        query: ``[..., H, S, D]``, float32, float64, float16 or bfloat16. Or jagged nested tensors,
            ``[B, H, lengths, D]``, as :func:`fused.functional.varlen_attention` takes packed ones.
        key: ``[..., G, T, D]``; G equals H, or divides it with ``enable_gqa``.
        value: ``[..., G, T, Dv]``.
        attn_mask: broadcastable to ``[..., H, S, T]``. Bool: True lets a query see a key. Floating
            (of any dtype): added to the scores. A :class:`torch.nn.attention.bias.CausalBias`
            makes no mask: it is ``is_causal``, of its alignment.
        dropout_p: probability with which each attention weight is dropped. Applied always: pass 0
            in evaluation. The mask is a function of a pair of numbers drawn from the generator of
            the query's device.
        is_causal: query i sees keys 0 to i, beside what the mask says.
        scale: multiplies the scores; ``1 / sqrt(D)`` by default.
        enable_gqa: groups of H / G query heads share a key and value head.
        causal_alignment: ``"top_left"``, or ``"bottom_right"``: query i then sees keys 0 to
            i + T - S, so that the last query sees all.
        window: ``(left, right)``: query i sees keys i + T - S - left to i + T - S + right; -1 for
            no bound.
        softcap: bounds the scores to its size, by a tanh. Positive.
        alibi_slopes: ``[H]``, floating (Press et al., arXiv:2108.12409).
        sink: ``[H]``, floating: a logit that joins each row's denominator, and nothing else.
        return_lse: also return the log-sum-exp of each row's scores, sink included: NaN, as the
            output, where one of them is +inf.

    Returns:
        ``[..., H, S, Dv]`` in the query's dtype. A query that sees no key gives zeros, and no
        gradient. With ``return_lse`` also ``[..., H, S]`` in float32 (float64 for float64): -inf
        for a query that sees no key.

    Raises:
        TypeError: dtypes that differ or that are not floating.
        ValueError: shapes or devices that do not go together, or an option outside its range.
        NotImplementedError: keyword-only extras with sparse tensors, or nested ones that are not
            jagged along the length alone.
    """
    if is_causal_bias(attn_mask):
        causal_alignment = _alignment(attn_mask, query, key, is_causal)
        attn_mask, is_causal = None, True
    options = make_options(
        query, attn_mask, dropout_p, is_causal, scale,
        causal_alignment, window, softcap, alibi_slopes, sink,
    )  # fmt: skip
    attended = attend(query, key, value, options, enable_gqa, need_lse=return_lse)
    return results(attended, return_lse)


def results(attended: Attended, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """What an attention function returns."""
    if not return_lse:
        return attended.out
    assert attended.lse is not None
    return attended.out, attended.lse


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    enable_gqa: bool,
    need_lse: bool = False,
    need_weights: bool = False,
) -> Attended:
    """What `scaled_dot_product_attention` does, for checked options; `rng` is drawn here."""
    if query.is_nested and not need_weights and is_packed(query, key, value, enable_gqa):
        return attend_jagged(query, key, value, options)
    query, key, value = _route.autocast(query.device.type, query, key, value)
    if _route.is_sharded(query):

        def attend_part(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Attended:
            return attend(q, k, v, options, enable_gqa, need_lse, need_weights)

        return attend_sharded(attend_part, query, key, value, options, enable_gqa)
    transform = _route.composite_reason(query, key, value, *options[:3], forward_mode=True)
    unsupported = _unsupported(query, key, value, options.attn_mask, enable_gqa)
    _route.report("attention", query.device, transform or unsupported)
    if unsupported is not None or (transform is not None and need_weights):
        stock = transform is None and not need_lse and not need_weights
        return _without_kernel(query, key, value, options, enable_gqa, stock)

    def run(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Attended:
        if transform is not None:
            return transformed_attention(q, k, v, options)
        return Attended(*run_attention(q, k, v, options, need_weights))

    if query.dim() == key.dim() == value.dim() == 4 and (
        query.shape[0] == key.shape[0] == value.shape[0]
    ):
        return run(query, key, value, options)
    batch = broadcast_batch(query, key, value)
    q, k, v = (_to_four_dims(t, batch) for t in (query, key, value))
    mask = options.attn_mask
    if mask is not None and mask.dim() > 3:
        check_mask(mask, query, (*batch, *query.shape[-3:-1], key.shape[-2]))
        options = options._replace(attn_mask=_to_four_dims(mask, batch))
    out, lse, weights = run(q, k, v, options)
    assert lse is not None
    shape = (*batch, *query.shape[-3:-1])
    if weights is not None:
        weights = weights.reshape(*shape, key.shape[-2])
    return Attended(out.reshape(*shape, value.shape[-1]), lse.reshape(shape), weights)


def make_options(
    query: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    causal_alignment: str = "top_left",
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
) -> Options:
    """What `scaled_dot_product_attention` was given, checked, as the kernels take it."""
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(
            "attention: causal_alignment must be 'top_left' or 'bottom_right', "
            f"got {causal_alignment!r}"
        )
    if window is not None and not (isinstance(window, Sequence) and len(window) == 2):
        raise ValueError(f"attention: window must be (left, right), got {window}")
    left, right = (-1, -1) if window is None else window
    if left < -1 or right < -1:
        raise ValueError(f"attention: window must have bounds of at least -1, got {window}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"attention: softcap must be positive and finite, got {softcap}")
    if is_causal and causal_alignment == "bottom_right":  # a window that ends at the row
        is_causal, right = False, 0
    if is_causal_bias(attn_mask):
        attn_mask = mask_of(attn_mask, query.device)
    if alibi_slopes is not None:
        alibi_slopes = _head_values("alibi_slopes", alibi_slopes, query)
    if sink is not None:
        sink = _head_values("sink", sink, query)
    return Options(
        attn_mask, alibi_slopes, sink, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
        softcap=0.0 if softcap is None else softcap, window_left=left, window_right=right,
    )  # fmt: skip


def is_causal_bias(mask: Tensor | None) -> TypeGuard[CausalBias]:
    """Whether this is a CausalBias: a tensor whose data nobody has set, for all is in attributes.

    Does not import its module, which takes a while.
    """
    if mask is None or type(mask) is Tensor:  # all that torch.compile need look at
        return False
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(mask, module.CausalBias)


def _alignment(bias: CausalBias, query: Tensor, key: Tensor, is_causal: bool) -> str:
    """The causal_alignment that says the same."""
    if is_causal:  # stock's rule
        raise ValueError("attention: is_causal must be False with a CausalBias, got True")
    lengths = [*query.shape[-2:-1], *key.shape[-2:-1]]
    if [bias.seq_len_q, bias.seq_len_kv] != lengths:
        raise ValueError(
            f"attention: a CausalBias must have the lengths of query and key {lengths}, "
            f"got {[bias.seq_len_q, bias.seq_len_kv]}"
        )
    return _ALIGNMENTS[bias.variant.name]


def mask_of(bias: CausalBias, device: torch.device) -> Tensor:
    """The bool mask that it means, where `is_causal` would mean another."""
    last = 0 if _ALIGNMENTS[bias.variant.name] == "top_left" else bias.seq_len_kv - bias.seq_len_q
    ones = torch.ones(bias.seq_len_q, bias.seq_len_kv, dtype=torch.bool, device=device)
    return ones.tril(last)


def _head_values(argument: str, values: Tensor, query: Tensor) -> Tensor:
    """Slopes or sink [H], checked, in the dtype that the kernels compute in."""
    if not isinstance(values, Tensor):
        raise TypeError(f"attention: {argument} must be a tensor, got {type(values).__name__}")
    heads = query.shape[-3] if query.dim() >= 3 else None
    if values.dim() != 1 or values.shape[0] != heads:
        raise ValueError(
            f"attention: {argument} must have one value for each head of query ({heads}), "
            f"got {list(values.shape)}"
        )
    if not values.is_floating_point():
        raise TypeError(f"attention: {argument} must be floating, got {values.dtype}")
    if values.device != query.device:
        raise ValueError(
            f"attention: {argument} must be on the device of query ({query.device}), "
            f"got {values.device}"
        )
    return values.to(compute_dtype(query)).contiguous()


def _without_kernel(
    query: Tensor, key: Tensor, value: Tensor, options: Options, enable_gqa: bool, stock: bool
) -> Attended:
    """By PyTorch's own operator where that may be and has the options, else by the composite."""
    is_strided = all(t.layout == torch.strided and not t.is_nested for t in (query, key, value))
    if is_strided:
        check_inputs(query, key, value, options, enable_gqa)
    mask, causal = options.attn_mask, options.is_causal
    stock = stock and options.alibi_slopes is None and options.sink is None
    stock = stock and options.softcap == 0 and options.window_left < 0 and options.window_right < 0
    if stock and (mask is None or not causal):
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
        arguments = (query, key, value, mask, options.dropout_p, causal)
        out = _STOCK(*arguments, scale=options.scale, enable_gqa=enable_gqa)
        return Attended(out, None, None)
    if not is_strided:
        raise NotImplementedError(
            "attention: nested and sparse inputs must come with no option beyond "
            "PyTorch's own, got one"
        )
    return attention_composite(query, key, value, options, enable_gqa)


def _to_four_dims(tensor: Tensor, batch: torch.Size) -> Tensor:
    """[..., H, S, D] with any number of batch dimensions as [B, H, S, D], a view where possible."""
    tensor = tensor.expand(*batch, *tensor.shape[-3:]) if tensor.dim() > 3 or batch else tensor
    return tensor.reshape(math.prod(batch), *tensor.shape[-3:])


def _unsupported(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> str | None:
    """Why no kernel takes these arguments, or None. PyTorch's own operator takes what is left."""
    tensors = (query, key, value)
    if (reason := _route.unsupported(*tensors)) is not None:
        return reason
    if min(t.dim() for t in tensors) < 3:
        return "an input has fewer than three dimensions"
    if not 1 <= query.shape[-1] <= MAX_HEAD_DIM or not 1 <= value.shape[-1] <= MAX_HEAD_DIM:
        return f"no kernel for head_dim {query.shape[-1]} and {value.shape[-1]} (1 to 512)"
    # While a graph is traced that would be a guard, or a bound that torch.export asks for: when the
    # graph runs, the glue refuses what is longer.
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and max(query.shape[-2], key.shape[-2]) > _MAX_LENGTH:
        return f"no kernel for lengths {query.shape[-2]} and {key.shape[-2]} (at most 2^30)"
    heads = (query.shape[-3], key.shape[-3], value.shape[-3])
    if enable_gqa and heads[1] != heads[2]:
        return f"heads {heads}: key and value are in groups of their own"
    if not enable_gqa and not heads[0] == heads[1] == heads[2]:
        return f"heads {heads} are broadcast, which enable_gqa=True would make a group"
    if attn_mask is not None:
        reason = _route.unsupported(attn_mask, bool_too=True)
        return None if reason is None else f"attn_mask: {reason}"
    return None
