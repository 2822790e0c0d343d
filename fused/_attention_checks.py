"""What the glue of attention's kernels refuses, refused in its words where no kernel runs.

csrc/attention/attention_glue.cpp checks what reaches a kernel. These are for PyTorch's operators,
for traced graphs, and for DTensors, of which the glue would see one rank's part.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from fused import _route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fused._attention_composite import Options


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, options: Options, enable_gqa: bool = True
) -> None:
    """Of [..., H, S, D], or packed [S, H, D]: devices, dtypes, shapes, lengths and dropout_p."""
    is_packed = options.cu_seqlens_q is not None
    _check_operands(q, k, v, least=3 if enable_gqa else 2, most=3 if is_packed else None)
    scores: tuple[int, ...]
    if is_packed:
        scores = _packed_scores(q, k, v, options)
    elif enable_gqa:
        _check_groups(q.shape[-3], k.shape[-3], v.shape[-3])
        scores = (*broadcast_batch(q, k, v), *q.shape[-3:-1], k.shape[-2])
    else:
        scores = (*broadcast_batch(q, k, v, last=2), q.shape[-2], k.shape[-2])
    if options.attn_mask is not None:
        check_mask(options.attn_mask, q, scores)
    if not 0 <= options.dropout_p <= 1:
        raise ValueError(f"attention: dropout_p must be between 0 and 1, got {options.dropout_p}")


def check_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    k: Tensor | None, v: Tensor | None, block_table: Tensor | None, attn_mask: Tensor | None,
) -> None:  # fmt: skip
    """Of `attention_with_kv_cache`: shapes, and lengths and pages where reading them is free."""
    if (k is None) != (v is None):
        raise ValueError("attention: k and v must be given together, got one")
    new = [] if k is None or v is None else [("k", k, k_cache), ("v", v, v_cache)]
    for argument, x in [
        ("q", q),
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        *(n[:2] for n in new),
    ]:
        _check_dim(argument, x, least=4, most=4)
    if block_table is not None:
        _check_dim("block_table", block_table, least=2, most=2)
    batch, heads, _, head_dim = q.shape
    if k_cache.shape[3] != head_dim:
        raise ValueError(
            f"attention: k_cache must have the head_dim of q ({head_dim}), "
            f"got {list(k_cache.shape)}"
        )
    if block_table is None and k_cache.shape[0] != batch:
        raise ValueError(
            f"attention: k_cache must have the batch of q ({batch}), got {list(k_cache.shape)}"
        )
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"attention: v_cache must have the first three sizes of k_cache {list(k_cache.shape)}, "
            f"got {list(v_cache.shape)}"
        )
    num_new_keys = 0 if k is None else k.shape[2]
    shapes = [("cache_seqlens", cache_seqlens, [batch])]
    if block_table is not None:
        shapes.append(("block_table", block_table, [batch, block_table.shape[1]]))
    for argument, x, cache in new:
        shapes.append((argument, x, [batch, cache.shape[1], num_new_keys, cache.shape[3]]))
    for argument, x, shape in shapes:
        if list(x.shape) != shape:
            raise ValueError(
                f"attention: {argument} must have the shape {shape}, got {list(x.shape)}"
            )
    if attn_mask is not None:
        check_mask(attn_mask, q, (batch, heads, *attn_mask.shape[-2:]))
    if cache_seqlens.dtype == torch.int32 and _route.is_readable(cache_seqlens, block_table):
        _check_lengths(k_cache, cache_seqlens, num_new_keys, block_table)


def _check_lengths(
    k_cache: Tensor, cache_seqlens: Tensor, num_new_keys: int, block_table: Tensor | None
) -> None:
    num_pages, _, page_size, _ = k_cache.shape
    room = page_size if block_table is None else page_size * block_table.shape[1]
    for sequence, length in enumerate(cache_seqlens.tolist()):
        keys = length + num_new_keys
        if length < 0 or keys > room:
            raise ValueError(
                f"attention: cache_seqlens must be at least 0 and leave room for {num_new_keys} of "
                f"{room} keys, got {length}"
            )
        if block_table is None:
            continue
        pages = -(-keys // page_size) if keys > 0 else 0
        for page in block_table[sequence, :pages].tolist():
            if not 0 <= page < num_pages:
                raise ValueError(
                    f"attention: block_table must name one of {num_pages} pages, got {page}"
                )


def check_mask(mask: Tensor, q: Tensor, scores: Sequence[int]) -> None:
    """That it goes with q and broadcasts to the shape of the scores."""
    check_device("attn_mask", mask, q)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention: attn_mask must be bool or floating, got {mask.dtype}")
    pairs = zip(reversed(mask.shape), reversed(scores))
    if mask.dim() > len(scores) or any(own != 1 and own != size for own, size in pairs):
        raise ValueError(
            f"attention: attn_mask must be broadcastable to {list(scores)}, got {list(mask.shape)}"
        )


def check_device(argument: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(
            f"attention: {argument} must be on the device of q ({q.device}), got {tensor.device}"
        )


def broadcast_batch(query: Tensor, key: Tensor, value: Tensor, last: int = 3) -> torch.Size:
    """The batch of all three, which is what comes before the `last` dimensions."""
    try:
        return torch.broadcast_shapes(*(x.shape[:-last] for x in (query, key, value)))
    except RuntimeError:
        rule = "a batch that broadcasts" if last == 3 else "heads that broadcast"
        raise ValueError(
            f"attention: query, key and value must have {rule}, got {list(query.shape)}, "
            f"{list(key.shape)} and {list(value.shape)}"
        ) from None


def _check_dim(argument: str, x: Tensor, least: int, most: int | None) -> None:
    if x.dim() < least or (most is not None and x.dim() > most):
        number = f"{least} or more" if most is None else most
        raise ValueError(
            f"attention: {argument} must have {number} dimensions, got {list(x.shape)}"
        )


def _check_operands(q: Tensor, k: Tensor, v: Tensor, least: int, most: int | None) -> None:
    if not q.is_floating_point():
        raise TypeError(f"attention: q must be floating, got {q.dtype}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_dim(name, x, least, most)
        check_device(name, x, q)
        if x.dtype != q.dtype:
            raise TypeError(
                f"attention: {name} must have the dtype of q ({q.dtype}), got {x.dtype}"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"attention: k must have the head_dim of q ({q.shape[-1]}), got {list(k.shape)}"
        )
    length_dim = -2 if most is None else 0
    if v.shape[length_dim] != k.shape[length_dim]:
        raise ValueError(
            f"attention: v must have the length of k ({k.shape[length_dim]}), got {list(v.shape)}"
        )


def _check_groups(heads: int, *groups: int) -> None:
    for name, number in zip("kv", groups):
        if heads % number if number else heads:
            raise ValueError(
                f"attention: {name} must have a number of heads that divides that of q ({heads}), "
                f"got {number}"
            )


def _packed_scores(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[int, ...]:
    """[sequences, H, S, T], the last two of which the mask brings itself."""
    of_q, of_k, mask = options.cu_seqlens_q, options.cu_seqlens_k, options.attn_mask
    assert of_q is not None
    if of_k is None:
        raise ValueError("attention: cu_seqlens_q and cu_seqlens_k must be given together, got one")
    _check_cu_seqlens("cu_seqlens_q", of_q, "q", q)
    _check_cu_seqlens("cu_seqlens_k", of_k, "k", k)
    if of_q.shape != of_k.shape:
        raise ValueError(
            f"attention: cu_seqlens_k must have the size of cu_seqlens_q ({of_q.shape[0]}), "
            f"got {of_k.shape[0]}"
        )
    _check_groups(q.shape[1], k.shape[1], v.shape[1])
    extents = () if mask is None else mask.shape[-2:]
    return (of_q.shape[0] - 1, q.shape[1], *(1,) * (2 - len(extents)), *extents)


def _check_cu_seqlens(argument: str, cu_seqlens: Tensor, operand: str, rows: Tensor) -> None:
    check_device(argument, cu_seqlens, rows)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"attention: {argument} must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"attention: {argument} must have one dimension, and one element more than there are "
            f"sequences, got {list(cu_seqlens.shape)}"
        )
    if not _route.is_readable(cu_seqlens):
        return
    values = cu_seqlens.tolist()
    falls = any(last < first for first, last in itertools.pairwise(values))
    if values[0] != 0 or falls or values[-1] > rows.shape[0]:
        raise ValueError(
            f"attention: {argument} must rise from 0 to at most the rows of {operand} "
            f"({rows.shape[0]}), got {values}"
        )
