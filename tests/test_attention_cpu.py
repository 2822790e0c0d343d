"""What is the CPU kernels' own: their tiles and chunks, who works on them, and their memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peak_memory import peak_memory, reset_peak_memory

from fused.functional import scaled_dot_product_attention, varlen_attention
from fused.testing import assert_as_accurate_as_stock
from fused.testing.attention import (
    assert_case,
    draw_grads,
    run_cache_case,
    run_case,
    run_fused,
)
from fused.testing.cases.attention import AttentionCase
from fused.testing.cases.attention_cache import CacheCase

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

GROUPED = AttentionCase(
    "grouped", batch=1, heads=4, heads_kv=2, rows=150, keys=201, head_dim=20, head_dim_v=33,
    is_causal=True, window=(90, 40), causal_alignment="bottom_right", mask="additive [S, T]",
)  # fmt: skip
WINDOWED = AttentionCase(
    "windowed", batch=1, heads=1, rows=300, keys=320, head_dim=9, window=(40, 10)
)
FEW_ROWS = AttentionCase(
    "few rows", heads=4, heads_kv=2, rows=3, keys=600, head_dim=20, head_dim_v=70,
    mask="bool [B, 1, 1, T]", window=(500, 7), softcap=3.0, alibi=True, sink=True, return_lse=True,
)  # fmt: skip

PACKED_FEW_ROWS = AttentionCase(
    "packed few rows", heads=3, heads_kv=1, is_causal=True, causal_alignment="bottom_right",
    lengths=((5, 7), (24, 300), (25, 40), (1, 270), (13, 0)),
)  # fmt: skip
FEW_ROWS_OVER_PAGES = CacheCase(
    "few rows over pages", (3, 0, 290), 320, 9, 9, heads=6, heads_kv=2, page_size=16, mask="bool"
)
PACKED_TOKENS = AttentionCase(
    "packed tokens", heads=4, heads_kv=2, lengths=((1, 700), (4, 300), (0, 5), (70, 90), (3, 0)),
    rest=2, is_causal=True, causal_alignment="bottom_right", return_lse=True,
)  # fmt: skip


def by_name(case: object) -> str:
    return case.name if isinstance(case, AttentionCase) else str(case).removeprefix("torch.")


# More threads than heads split a head's backward pass, and split the masks' too.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
@pytest.mark.parametrize("case", [GROUPED, WINDOWED, FEW_ROWS, PACKED_TOKENS], ids=by_name)
def test_the_same_bits_with_any_number_of_threads(
    case: AttentionCase, dtype: torch.dtype, threads: None
) -> None:
    tensors, options = case.make(dtype, CPU)
    grads_out = draw_grads(tensors)
    torch.set_num_threads(1)
    first = run_fused(tensors, options, grads_out)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        for name, other in run_fused(tensors, options, grads_out).items():
            assert torch.equal(first[name], other), (count, name)


# What a NaN that the window hides spreads to, by 0 * NaN, is no matter of threads or of the batch
# either: one head in parts, or two at a time.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
@pytest.mark.parametrize("window", [(20, 5), (3, 7)], ids=str)
def test_a_hidden_nan_in_any_number_of_threads(
    window: tuple[int, int], dtype: torch.dtype, threads: None
) -> None:
    q, k, v = torch.rand(3, 1, 1, 600, 16, dtype=dtype).unbind()
    k[..., 260, :] = k[..., 300, :] = torch.nan
    results = []
    for count, batch in ((1, 1), (8, 1), (2, 2)):
        torch.set_num_threads(count)
        tensors = [t.repeat(batch, 1, 1, 1) for t in (q, k, v)]
        results.append(run_fused(tensors, {"window": window}, draw_grads(tensors)))
    for name, first in results[0].items():
        for other in results[1:]:
            assert torch.equal(first.isnan(), other[name][:1].isnan()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
def test_a_row_does_not_depend_on_those_that_follow(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 2, 256, 24).to(dtype).unbind()
    options = {"is_causal": True, "window": (70, 0)}
    whole = scaled_dot_product_attention(q, k, v, **options)
    for rows in (30, 64, 80, 150):
        part = scaled_dot_product_attention(*(t[..., :rows, :] for t in (q, k, v)), **options)
        assert torch.equal(part, whole[..., :rows, :]), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("count", [1, 8])
def test_a_head_at_a_time_and_in_parts(count: int, dtype: torch.dtype, threads: None) -> None:
    torch.set_num_threads(count)
    assert_case(GROUPED, dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("keys", [255, 256, 257, 530])
def test_a_new_token_over_chunks_of_keys(keys: int, dtype: torch.dtype) -> None:
    assert_case(AttentionCase("token", rows=1, keys=keys, head_dim=20), dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("case", [FEW_ROWS, PACKED_TOKENS, PACKED_FEW_ROWS], ids=by_name)
def test_a_few_tokens(case: AttentionCase, dtype: torch.dtype) -> None:
    assert_case(case, dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
def test_a_few_tokens_over_pages(dtype: torch.dtype) -> None:
    for name, results in run_cache_case(FEW_ROWS_OVER_PAGES, dtype, CPU).items():
        assert_as_accurate_as_stock(*results, name)


def test_a_token_does_not_depend_on_its_batch() -> None:
    tensors, options = dataclasses.replace(FEW_ROWS, mask=None).make(torch.float32, CPU)
    together, _ = scaled_dot_product_attention(*tensors, **options)
    alone, _ = scaled_dot_product_attention(*(t[1:] for t in tensors), **options)
    assert torch.equal(together[1:], alone)


def test_a_token_sees_nan_and_infinity_of_its_own_head() -> None:
    q, k, v = AttentionCase("token", heads=3, rows=2, keys=530).make(torch.float32, CPU)[0]
    k[0, 1, 300], v[1, 2, 520, 0] = torch.nan, torch.inf
    out = scaled_dot_product_attention(q, k, v)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, 1] = expected[1, 2, :, 0] = True
    assert torch.equal(~out.isfinite(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("rows", [3, 4, 24, 25])
def test_as_many_queries_as_take_each_path(rows: int, dtype: torch.dtype) -> None:
    case = AttentionCase(
        "rows", 2, 4, 2, rows, 530, 40, 20, mask="bool [B, 1, S, T]", is_causal=True,
        causal_alignment="bottom_right", softcap=2.0, alibi=True, sink=True, return_lse=True,
    )  # fmt: skip
    for name, results in run_case(case, dtype, CPU).items():
        if not name.startswith("grad"):
            assert_as_accurate_as_stock(*results, name)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_tiles_that_a_mask_hides_are_left_out(kind: str) -> None:
    """Where they are not computed, what they hold reaches neither results nor gradients."""
    case = AttentionCase("documents", rows=200, keys=200, mask="documents [S, T]")
    tensors, options = case.make(torch.float32, CPU)
    if kind == "additive":
        options["attn_mask"] = torch.zeros(200, 200).masked_fill(~options["attn_mask"], -torch.inf)
    grads_out = draw_grads(tensors)
    clean = run_fused(tensors, options, grads_out)
    for x in (*tensors, *grads_out):
        x[:, :, 192:] = torch.nan
    other = run_fused(tensors, options, grads_out)
    for name in ("out", "grad of query", "grad of key", "grad of value"):
        assert torch.equal(clean[name][:, :, :64], other[name][:, :, :64]), name
        assert other[name][:, :, 192:].isnan().all(), name


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("layout", ["expanded", "columns first", "every other column"])
def test_masks_as_they_lie(kind: str, layout: str) -> None:
    """Contiguous along the keys, along the queries or along neither, beyond a tile in either."""
    case = AttentionCase("mask", heads=1, rows=150, keys=137, mask=f"{kind} [S, T]")
    tensors, options = case.make(torch.float32, CPU)
    mask = options.pop("attn_mask")
    grads_out = draw_grads(tensors)
    plain = run_fused(tensors, {**options, "attn_mask": mask}, grads_out)
    lying = {
        "expanded": mask.expand(2, 1, -1, -1),
        "columns first": mask.t().contiguous().t(),
        "every other column": mask.repeat_interleave(2, 1)[:, ::2],
    }[layout]
    other = run_fused(tensors, {**options, "attn_mask": lying}, grads_out)
    for name in ("out", "grad of query", "grad of key", "grad of value"):
        assert torch.equal(plain[name], other[name]), name
    assert_case(case, torch.float32, CPU)


def test_memory_grows_with_the_length_alone() -> None:
    """32,768 tokens with backward, in what docs/attention.md says; their scores would take 4 GB."""
    length, head_dim = 32768, 8

    def attend(rows: int) -> int:
        """Bytes at the peak beyond the arguments and the results."""
        q, k, v = (torch.randn(1, 1, rows, head_dim, requires_grad=True) for _ in range(3))
        grad_out = torch.randn_like(q)
        before = reset_peak_memory()
        out = scaled_dot_product_attention(q, k, v, is_causal=True, window=(256, 0))
        results = [out, *torch.autograd.grad(out, [q, k, v], grad_out)]
        return peak_memory() - before - sum(x.nbytes for x in results)

    attend(64)  # what the first call of all allocates stays
    per_row = 4 * (4 + 16)  # four numbers, and a row of grad_q with whole vectors
    assert attend(length) < per_row * length + (8 << 20)


def test_many_packed_tokens_take_no_memory_of_their_own() -> None:
    sequences, heads, head_dim = 20_000, 2, 32
    ends = torch.arange(sequences + 1, dtype=torch.int32)
    q, k, v = (torch.randn(sequences, heads, head_dim) for _ in range(3))
    varlen_attention(q[:1], k[:1], v[:1], ends[:2], ends[:2])
    before = reset_peak_memory()
    out = varlen_attention(q, k, v, ends, ends)
    per_row = 4 * 4  # four numbers
    assert peak_memory() - before - out.nbytes < per_row * sequences * heads + (4 << 20)
    torch.testing.assert_close(out, v)  # each sees itself alone
