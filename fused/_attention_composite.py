"""Attention in plain PyTorch operators, which have every derivative, and the weights themselves."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused import _route

MAX_HEAD_DIM = 512


class Options(NamedTuple):
    """What the kernels take after q, k and v, in their order and of their meaning.

    csrc/attention/attention.h defines it.
    """

    attn_mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sink: Tensor | None = None
    rng: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    softcap: float = 0.0
    window_left: int = -1
    window_right: int = -1


NUM_TENSORS = Options._fields.index("dropout_p")


class Attended(NamedTuple):
    """Results, of which those that nobody asked for may be missing."""

    out: Tensor
    lse: Tensor | None
    weights: Tensor | None


def attention_composite(
    q: Tensor, k: Tensor, v: Tensor, options: Options, enable_gqa: bool = True
) -> Attended:
    """The kernels' results and the weights, [..., H, S, T].

    Takes what PyTorch's own function takes, not just four dimensions, and packed sequences, whose
    weights stay unsaid. Without ``options.rng`` the dropout mask comes from PyTorch's generator.
    """
    if options.cu_seqlens_q is not None:
        return _packed_composite(q, k, v, options)
    return _dense_composite(q, k, v, options, enable_gqa)


def _packed_composite(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Attended:
    """One sequence after another. Waits for the device to learn where they lie."""
    assert options.cu_seqlens_q is not None and options.cu_seqlens_k is not None
    bounds = [cu_seqlens.tolist() for cu_seqlens in (options.cu_seqlens_q, options.cu_seqlens_k)]
    outs, lses = [], []
    for index, ((q0, q1), (k0, k1)) in enumerate(zip(*(itertools.pairwise(b) for b in bounds))):
        one_q, one_k, one_v = (
            t[first:last].transpose(0, 1).unsqueeze(0)
            for t, first, last in ((q, q0, q1), (k, k0, k1), (v, k0, k1))
        )
        of_one = options._replace(
            attn_mask=_mask_of_one(options.attn_mask, index, q1 - q0, k1 - k0),
            cu_seqlens_q=None,
            cu_seqlens_k=None,
        )
        attended = _dense_composite(one_q, one_k, one_v, of_one, True, index)
        assert attended.lse is not None
        outs.append(attended.out[0].transpose(0, 1))
        lses.append(attended.lse[0])
    rest = q.shape[0] - bounds[0][-1]  # rows of no sequence
    outs.append(q.new_zeros(rest, q.shape[1], v.shape[-1]))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lses.append(q.new_full((q.shape[1], rest), -math.inf, dtype=dtype))
    return Attended(torch.cat(outs), torch.cat(lses, dim=-1), None)


def _mask_of_one(mask: Tensor | None, index: int, rows: int, keys: int) -> Tensor | None:
    """A packed problem's mask for one of its sequences: what it is short of is hidden."""
    if mask is None:
        return None
    if mask.dim() == 4:
        mask = mask[index if mask.shape[0] != 1 else 0].unsqueeze(0)
    for dim, extent in ((-1, keys), (-2, rows)):
        if mask.dim() < -dim or mask.shape[dim] == 1:
            continue
        mask = mask.narrow(dim, 0, min(extent, mask.shape[dim]))
        missing = [0, 0] * (-dim - 1) + [0, extent - mask.shape[dim]]
        mask = F.pad(mask, missing, value=False if mask.dtype == torch.bool else -math.inf)
    return mask


def _dense_composite(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    enable_gqa: bool,
    sequence: int | None = None,
) -> Attended:
    with _route.without_autocast(q.device.type):
        scores = _final_scores(q, k, options, enable_gqa)
        values = _grouped(_widened(v), q, enable_gqa)
        # Rows without a key: zeros, and no gradient through the log-sum-exp of nothing.
        blind = (scores == -math.inf).all(-1, keepdim=True)
        logits = scores.masked_fill(blind, 0.0)
        if options.sink is not None:
            sink = options.sink.to(logits.dtype)[:, None, None].expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink], dim=-1)
        lse = torch.logsumexp(logits, dim=-1).masked_fill(blind.squeeze(-1), -math.inf)
        weights = torch.softmax(logits, dim=-1)[..., : scores.shape[-1]].masked_fill(blind, 0.0)
        if options.rng is not None:
            weights = weights * dropout_mask(options, weights, sequence)
        elif options.dropout_p != 0:
            weights = F.dropout(weights, options.dropout_p)
        return Attended((weights @ values).to(q.dtype), lse, weights.to(q.dtype))


def attention_weights(q: Tensor, k: Tensor, lse: Tensor, options: Options) -> Tensor:
    """The weights [B, H, S, T] that gave `lse`, in the dtype of q, with dropout applied."""
    with _route.without_autocast(q.device.type):
        scores = _final_scores(q, k, options, True)
        # A row without a key has nothing but scores of -inf: anything finite gives it zeros.
        finite_lse = lse.masked_fill(lse == -math.inf, 0.0)
        weights = torch.exp(scores - finite_lse.unsqueeze(-1))
        if options.rng is not None:
            weights = weights * dropout_mask(options, weights)
        return weights.to(q.dtype)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _grouped(tensor: Tensor, q: Tensor, enable_gqa: bool) -> Tensor:
    if not enable_gqa:
        return tensor
    return tensor.repeat_interleave(q.shape[-3] // max(tensor.shape[-3], 1), dim=-3)


def _final_scores(q: Tensor, k: Tensor, options: Options, enable_gqa: bool) -> Tensor:
    """[..., H, S, T]: scaled, capped, biased, and -inf where a key is hidden."""
    keys = _grouped(_widened(k), q, enable_gqa)
    scale = options.scale if options.scale is not None else 1 / math.sqrt(max(q.shape[-1], 1))
    scores = (_widened(q) @ keys.transpose(-2, -1)) * scale
    rows = torch.arange(scores.shape[-2], device=q.device).unsqueeze(-1)
    columns = torch.arange(scores.shape[-1], device=q.device)
    ahead = rows - columns  # of the key, and of where the row stands among the keys:
    aligned_ahead = ahead + (scores.shape[-1] - scores.shape[-2])
    if options.softcap != 0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.to(scores.dtype)[:, None, None]
        scores = scores - slopes * aligned_ahead.abs().to(scores.dtype)
    mask = options.attn_mask
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    if options.is_causal:
        scores = scores.masked_fill(ahead < 0, -math.inf)
    if options.window_left >= 0:
        scores = scores.masked_fill(aligned_ahead > options.window_left, -math.inf)
    if options.window_right >= 0:
        scores = scores.masked_fill(-aligned_ahead > options.window_right, -math.inf)
    return scores


def dropout_mask(options: Options, weights: Tensor, sequence: int | None = None) -> Tensor:
    """What the kernels multiply `weights` [B, H, S, T] by: 0, or 1 / (1 - dropout_p).

    Or [1, H, S, T] of one packed sequence. The kernels tell it themselves: with q = 0 every key of
    a row has the weight 1 / T, and with the identity as v the output is the matrix of weights.
    """
    _, heads, rows, keys = weights.shape
    if weights.numel() == 0:
        return torch.ones_like(weights)
    options = Options(rng=options.rng, dropout_p=options.dropout_p, scale=1.0)
    q = weights.new_zeros(*weights.shape[:3], 1, dtype=torch.float32)
    k = q.new_zeros(*weights.shape[:2], keys, 1)
    if sequence is not None:  # all sequences before it are empty
        q, k = q[0].transpose(0, 1), k[0].transpose(0, 1)
        bounds = [
            F.pad(q.new_full((1,), n, dtype=torch.int32), (sequence + 1, 0)) for n in (rows, keys)
        ]
        options = options._replace(cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1])
    columns = []
    for start in range(0, keys, MAX_HEAD_DIM):
        width = min(MAX_HEAD_DIM, keys - start)
        v = q.new_zeros(keys, width)
        v[start : start + width] = torch.eye(width, device=q.device)
        shape = (*weights.shape[:2], keys, width)
        v = v.expand(shape) if sequence is None else v[:, None].expand(keys, heads, width)
        with torch.no_grad():
            run = (
                torch.ops.fused.attention_forward
                if _route.is_traced(options.rng)
                else (_route.kernels().attention_forward)
            )
            columns.append(run(q, k, v, *options)[0])
    kept = torch.cat(columns, dim=-1) != 0
    kept = kept if sequence is None else kept.transpose(0, 1).unsqueeze(0)
    return kept.to(weights.dtype) * (0.0 if options.dropout_p == 1 else 1 / (1 - options.dropout_p))


def merge_attention(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from attention over parts of them. Differentiable.

    For keys that lie on several devices (ring attention, context parallelism) or come in chunks:
    each part calls :func:`scaled_dot_product_attention` with ``return_lse=True`` for the same
    queries and its own keys. A `sink` belongs to one part alone.

    Args:
        outputs: of each part, ``[..., H, S, Dv]``; a list, or a tensor with the parts first.
        lses: of each part, ``[..., H, S]``, float32 or float64.

    Returns:
        The output in the dtype of the parts' and its log-sum-exp. A row that sees no key in any
        part gives zeros and −inf, and no gradient.

    Raises:
        ValueError: no parts, or not as many lses as outputs, or shapes that do not go together.
    """
    if len(outputs) != len(lses) or len(outputs) == 0:
        raise ValueError(
            "merge_attention: lses must be as many as outputs, and one at least, got "
            f"{len(lses)} and {len(outputs)}"
        )
    for out, lse in zip(outputs, lses):
        if out.shape[:-1] != lse.shape or out.shape != outputs[0].shape:
            raise ValueError(
                f"merge_attention: lses must have the shape {list(outputs[0].shape[:-1])} of every "
                f"output's rows, got {list(lse.shape)} beside {list(out.shape)}"
            )
    parts = torch.stack(list(lses))
    blind = (parts == -math.inf).all(0)
    lse = torch.logsumexp(parts.masked_fill(blind, 0.0), dim=0)
    weights = torch.exp(parts - lse).masked_fill(blind, 0.0).unsqueeze(-1)
    merged = (torch.stack(list(outputs)).to(weights.dtype) * weights).sum(0)
    return merged.to(outputs[0].dtype), lse.masked_fill(blind, -math.inf)
