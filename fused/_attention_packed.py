"""Packed sequences on the kernels, and jagged nested tensors, which are packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused import _route
from fused._attention_checks import check_inputs
from fused._attention_composite import MAX_HEAD_DIM, Attended, Options, attention_composite
from fused._attention_derivatives import transformed_attention
from fused._attention_function import run_attention
from fused._attention_sharded import attend_sharded


def attend_packed(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Attended:
    """q [S, H, D], k [T, G, D], v [T, G, Dv] with the cu_seqlens of checked options."""
    q, k, v = _route.autocast(q.device.type, q, k, v)
    if _route.is_sharded(q):
        return attend_sharded(attend_packed, q, k, v, options)
    transform = _route.composite_reason(q, k, v, *options[:3], forward_mode=True)
    reason = transform
    if reason is None and max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        reason = f"no kernel for head_dim {q.shape[-1]} and {v.shape[-1]} (1 to {MAX_HEAD_DIM})"
    _route.report("attention", q.device, reason)
    if transform is not None:
        return transformed_attention(q, k, v, options)
    if reason is not None:
        check_inputs(q, k, v, options)
        return attention_composite(q, k, v, options)
    out, lse, _ = run_attention(q, k, v, options)
    return Attended(out, lse, None)


# Any stands for nested tensors, whose methods Tensor's stubs do not have.
def is_packed(query: Any, key: Any, value: Any, enable_gqa: bool) -> bool:
    """Whether these are jagged [B, H, lengths, D] that attend_jagged takes."""
    tensors = (query, key, value)
    if not all(t.layout == torch.jagged and t.dim() == 4 for t in tensors):
        return False
    # Holes between the sequences have lengths of their own; the ragged dimension may be another.
    if not all(t.lengths() is None and t.values().shape[0] == t.shape[1] for t in tensors):
        return False
    heads, groups = query.shape[1], key.shape[1]
    return bool(value.shape[1] == groups and (groups == heads or enable_gqa))


def attend_jagged(query: Any, key: Any, value: Any, options: Options) -> Attended:
    """Jagged [B, H, lengths, D] in and out; the log-sum-exp is jagged [B, H, lengths]."""
    _check_lengths(key, value)
    options = options._replace(
        cu_seqlens_q=query.offsets().to(torch.int32), cu_seqlens_k=key.offsets().to(torch.int32)
    )
    q, k, v = (t.values().transpose(0, 1) for t in (query, key, value))
    attended = attend_packed(q, k, v, options)
    assert attended.lse is not None

    def jagged(values: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor_from_jagged(values, query.offsets(), jagged_dim=1)
        return nested.transpose(1, 2)

    return Attended(jagged(attended.out), jagged(attended.lse.transpose(0, 1)), None)


def _check_lengths(key: Any, value: Any) -> None:
    """That each sequence has as many values as keys.

    Tensors of offsets of their own are compared: for that a GPU is waited for, unless it is a graph
    that is traced or captured, which compares them, and fails, when it runs.
    """
    of_key, of_value = key.offsets(), value.offsets()
    if of_key is of_value or key.shape[2] == value.shape[2]:
        return
    rule = "attention: value must have the lengths of key"
    if of_key.shape != of_value.shape:
        raise ValueError(f"{rule}, of {key.shape[0]} sequences, got {value.shape[0]}")
    if not _route.is_readable(of_key, of_value, waits=True):
        torch._assert_async((of_key == of_value).all(), f"{rule}, got others")
    elif not torch.equal(of_key, of_value):
        raise ValueError(f"{rule} {of_key.diff().tolist()}, got {of_value.diff().tolist()}")
