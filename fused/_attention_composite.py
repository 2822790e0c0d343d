"""Attention in plain PyTorch operators, which have every derivative, and the weights themselves."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused import _route

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_HEAD_DIM = 512
_LOW = 0xFFFFFFFF  # 32 bits

Range = tuple[int, int]  # half open


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


class Place(NamedTuple):
    """Where scores lie in the problem that they are a part of."""

    sequence: int = 0  # or row of the batch
    head: int = 0
    row: int = 0
    key: int = 0
    heads: int | None = None  # of the whole problem; None: those that are there are all
    shift: int | None = None  # its keys less its queries; None as above


WHOLE = Place()


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
    return dense_composite(q, k, v, options, enable_gqa)


def _packed_composite(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Attended:
    """One sequence after another."""
    outs, lses = [], []
    dense_options = options._replace(cu_seqlens_q=None, cu_seqlens_k=None)
    last_row = 0
    for index, (rows, keys) in enumerate(sequences(options)):
        one_q, one_k, one_v = (
            t[first:last].transpose(0, 1).unsqueeze(0)
            for t, (first, last) in ((q, rows), (k, keys), (v, keys))
        )
        last_row = rows[1]
        mask = options.attn_mask
        if mask is not None:
            extents = ((0, rows[1] - rows[0]), (0, keys[1] - keys[0]))
            ranges = ((index, index + 1), (0, q.shape[1]), *extents)
            mask = completed(mask_window(mask, ranges), mask.shape, ranges)
        of_one = dense_options._replace(attn_mask=mask)
        attended = dense_composite(one_q, one_k, one_v, of_one, place=Place(sequence=index))
        assert attended.lse is not None
        outs.append(attended.out[0].transpose(0, 1))
        lses.append(attended.lse[0])
    rest, rest_lse = rows_of_no_sequence(q, v, last_row)
    return Attended(torch.cat([*outs, rest]), torch.cat([*lses, rest_lse], dim=-1), None)


def rows_of_no_sequence(q: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The results of packed rows from the first one on that lies behind the last sequence."""
    rows, heads = q.shape[0] - first, q.shape[1]
    lse = q.new_full((heads, rows), -math.inf, dtype=compute_dtype(q))
    return q.new_zeros(rows, heads, v.shape[-1]), lse


def sequences(options: Options) -> list[tuple[Range, Range]]:
    """Where the queries and the keys of each packed sequence lie. Waits for the device."""
    assert options.cu_seqlens_q is not None and options.cu_seqlens_k is not None
    bounds = (cu_seqlens.tolist() for cu_seqlens in (options.cu_seqlens_q, options.cu_seqlens_k))
    return list(zip(*(itertools.pairwise(b) for b in bounds)))


def mask_window(mask: Tensor, ranges: Sequence[Range]) -> Tensor:
    """The view of a mask for these ranges of [B, H, S, T], as far as the mask goes."""
    for dim, (first, last) in zip((-4, -3, -2, -1), ranges, strict=True):
        if mask.dim() >= -dim and mask.shape[dim] != 1:
            first, last = min(first, mask.shape[dim]), min(last, mask.shape[dim])
            mask = mask.narrow(dim, first, last - first)
    return mask


def completed(window: Tensor, shape: Sequence[int], ranges: Sequence[Range]) -> Tensor:
    """The `mask_window` of a mask of this shape, and what it is short of, which is hidden.

    Only a mask of packed sequences is short of anything. Broadcast dimensions stay so.
    """
    missing = []
    for dim in range(-1, -1 - min(len(shape), 2), -1):
        first, last = ranges[dim]
        missing += [0, 0 if shape[dim] == 1 else last - first - window.shape[dim]]
    if not any(missing):
        return window
    return F.pad(window, missing, value=False if window.dtype == torch.bool else -math.inf)


def dense_composite(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    enable_gqa: bool = True,
    place: Place = WHOLE,
) -> Attended:
    with _route.without_autocast(q.device.type):
        scores = _final_scores(q, k, options, enable_gqa, place)
        values = _grouped(_widened(v), q, enable_gqa)
        # Rows without a key: zeros, and no gradient through the log-sum-exp of nothing.
        blind = _blind(scores)
        logits = scores.masked_fill(blind, 0.0)
        if options.sink is not None:
            sink = options.sink.to(logits.dtype)[:, None, None].expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink], dim=-1)
        lse = torch.logsumexp(logits, dim=-1).masked_fill(blind.squeeze(-1), -math.inf)
        weights = torch.softmax(logits, dim=-1)[..., : scores.shape[-1]].masked_fill(blind, 0.0)
        if options.rng is not None:
            weights = weights * dropout_mask(options, weights, place)
        elif options.dropout_p != 0:
            weights = F.dropout(weights, options.dropout_p)
        return Attended((weights @ values).to(q.dtype), lse, weights.to(q.dtype))


def attention_weights(q: Tensor, k: Tensor, options: Options) -> Tensor:
    """The weights [B, H, S, T] of options without a sink, in the dtype of q, dropout applied."""
    assert options.sink is None
    with _route.without_autocast(q.device.type):
        scores = _final_scores(q, k, options, True)
        # Not exp(scores - lse): beside large scores the log-sum-exp has lost what they differ by.
        blind = _blind(scores)
        weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
        if options.rng is not None:
            weights = weights * dropout_mask(options, weights)
        return weights.to(q.dtype)


def _blind(scores: Tensor) -> Tensor:
    """[..., S, 1]: the rows without a key."""
    return (scores == -math.inf).all(-1, keepdim=True)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What the kernels compute in, and give the log-sum-exp in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _grouped(tensor: Tensor, q: Tensor, enable_gqa: bool) -> Tensor:
    if not enable_gqa or q.shape[-3] == tensor.shape[-3]:
        return tensor
    return tensor.repeat_interleave(q.shape[-3] // max(tensor.shape[-3], 1), dim=-3)


def _final_scores(
    q: Tensor, k: Tensor, options: Options, enable_gqa: bool, place: Place = WHOLE
) -> Tensor:
    """[..., H, S, T]: scaled, capped, biased, and -inf where a key is hidden."""
    keys = _grouped(_widened(k), q, enable_gqa)
    scale = options.scale if options.scale is not None else 1 / math.sqrt(max(q.shape[-1], 1))
    scores = (_widened(q) @ keys.transpose(-2, -1)) * scale
    rows = torch.arange(scores.shape[-2], device=q.device).unsqueeze(-1) + place.row
    columns = torch.arange(scores.shape[-1], device=q.device) + place.key
    ahead = rows - columns  # of the key, and of where the row stands among the keys:
    shift = scores.shape[-1] - scores.shape[-2] if place.shift is None else place.shift
    aligned_ahead = ahead + shift
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


def draw_rng(device: torch.device) -> Tensor:
    """(seed, offset) of a dropout mask, drawn on the device: CUDA graphs replay fresh masks."""
    return torch.randint(torch.iinfo(torch.int64).max, (2,), dtype=torch.int64, device=device)


def dropout_mask(options: Options, weights: Tensor, place: Place = WHOLE) -> Tensor:
    """What the kernels multiply `weights` [B, H, S, T] by: 0, or 1 / (1 - dropout_p).

    `dropout_scale` of csrc/attention/attention_score.h for all places at once.
    """
    assert options.rng is not None
    batch, heads, rows, keys = weights.shape

    def count(number: int, first: int) -> Tensor:
        return torch.arange(number, device=weights.device) + first

    sequence = count(batch, place.sequence)[:, None, None, None]
    head = count(heads, place.head)[:, None, None]
    head_of_batch = sequence * (heads if place.heads is None else place.heads) + head
    seed, offset = options.rng.unbind()
    ahead = place.key % 4  # of the first key, in its block of four
    blocks = count((ahead + keys + 3) // 4, place.key // 4)
    counter = (blocks, count(rows, place.row)[:, None], head_of_batch & _LOW, offset & _LOW)
    words = torch.broadcast_tensors(*_philox4x32_10(seed ^ (offset & ~_LOW), counter))
    bits = torch.stack(words, dim=-1).flatten(-2)[..., ahead : ahead + keys]
    kept = bits >= min(int(options.dropout_p * 2**32), _LOW)
    return kept.to(weights.dtype) * (0.0 if options.dropout_p == 1 else 1 / (1 - options.dropout_p))


def _philox4x32_10(key: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """csrc/common/philox.h in int64, whose products wrap around to the bits of unsigned ones."""
    x, y, z, w = counter
    key_x, key_y = key & _LOW, (key >> 32) & _LOW
    for _ in range(10):
        of_x, of_z = x * 0xD2511F53, z * 0xCD9E8D57
        x, z = ((of_z >> 32) & _LOW) ^ y ^ key_x, ((of_x >> 32) & _LOW) ^ w ^ key_y
        y, w = of_z & _LOW, of_x & _LOW
        key_x, key_y = (key_x + 0x9E3779B9) & _LOW, (key_y + 0xBB67AE85) & _LOW
    return x, y, z, w


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
