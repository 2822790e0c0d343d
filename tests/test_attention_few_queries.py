"""Attention of a query or a few, whose keys are split over blocks and threads."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import on_gpus
from torch import Tensor

from fused import _route, reference
from fused._attention_composite import Options, dropout_mask
from fused.functional import attention_with_kv_cache, scaled_dot_product_attention
from fused.testing import assert_as_accurate_as_stock, emulated_cuda
from fused.testing.attention import run_case, run_fused
from fused.testing.cases.attention import LAST, AttentionCase
from fused.testing.cases.attention_cache import CacheCase

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# A chunk is 128 keys on CUDA and up to 256 on the CPU, and a block there has 4 rows of a group.
CASES = [
    AttentionCase("one row", 1, 2, None, 1, 300, 8),
    AttentionCase("a group", 2, 6, 2, 1, 260, 40, head_dim_v=72),
    AttentionCase("a group of five", 1, 5, 1, 3, 129, 20, layout="odd strides"),
    AttentionCase("causal", 1, 1, None, 4, 131, 24, is_causal=True, causal_alignment=LAST),
    AttentionCase("causal from the first key", 1, 2, 1, 4, 300, 8, is_causal=True),
    AttentionCase("window", 1, 1, None, 3, 700, 16, window=(250, 40)),
    AttentionCase("rows before all keys", 3, 4, None, 4, 3, 24, window=(2, 0)),
    AttentionCase("widest", 1, 1, None, 2, 130, 512),
    AttentionCase("narrowest", 1, 2, 1, 2, 257, 1),
    AttentionCase("more columns than a warp has", 1, 1, None, 1, 20, 8, head_dim_v=300),
    AttentionCase("rows off 16 bytes", 1, 1, None, 1, 40, 14),
    AttentionCase("no keys", 1, 2, None, 2, 0, 8),
    AttentionCase("one key", 2, 1, None, 1, 1, 8, layout="heads last"),
    AttentionCase("bool", 2, 4, 2, 2, 300, 8, mask="bool [B, 1, 1, T]"),
    AttentionCase("blind rows", 1, 2, 1, 4, 140, 8, mask="blind [S, T]", return_lse=True),
    AttentionCase(
        "packed, some of them", heads=4, heads_kv=2, head_dim=24, is_causal=True,
        lengths=((1, 700), (4, 300), (0, 5), (70, 90), (3, 0), (2, 128)), rest=2, return_lse=True,
    ),
    AttentionCase(
        "everything", 1, 4, 2, 3, 300, 24, mask="additive [S, T]", softcap=3.0, alibi=True,
        sink=True, return_lse=True, window=(200, -1), scale=0.4,
    ),
]  # fmt: skip


# The gradients are other kernels' work; that they go on from what these leave of a row.
WITH_GRADIENTS = {"a group", "causal", "blind rows"}
in_all_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@in_all_dtypes
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results(case: AttentionCase, dtype: torch.dtype, backend: torch.device) -> None:
    for name, results in run_case(case, dtype, backend).items():
        if not name.startswith("grad") or case.name in WITH_GRADIENTS:
            assert_as_accurate_as_stock(*results, name)


@in_all_dtypes
def test_dropout(dtype: torch.dtype, backend: torch.device) -> None:
    q, k, v = AttentionCase("", 2, 4, 2, 3, 270, 8).make(dtype, backend)[0]
    options = Options(rng=torch.tensor([42, 43], device=backend), dropout_p=0.3)
    keep = dropout_mask(options, q.new_empty(2, 4, 3, 270, dtype=torch.float64))
    truth, stock = (
        reference.scaled_dot_product_attention(q, k, v, keep=keep.to(compute), dtype=compute)
        for compute in (torch.float64, torch.float32 if dtype == torch.float64 else dtype)
    )
    out = _route.kernels().attention_forward(q, k, v, *options)[0]
    assert_as_accurate_as_stock(out, truth, stock)


def test_the_same_bits_in_any_batch_and_cache(backend: torch.device) -> None:
    case = AttentionCase("", 3, 4, 2, 2, 300, 24, is_causal=True, causal_alignment=LAST)
    tensors, options = case.make(torch.float16, backend)
    together, again = (scaled_dot_product_attention(*tensors, **options) for _ in range(2))
    assert torch.equal(together, again)
    for b in range(3):
        alone = [t[b : b + 1] for t in tensors]
        assert torch.equal(scaled_dot_product_attention(*alone, **options), together[b : b + 1])
    caches = [torch.nn.functional.pad(t, (0, 0, 0, 500), value=torch.nan) for t in tensors[1:]]
    lengths = torch.full((3,), 300, dtype=torch.int32, device=backend)
    cached = attention_with_kv_cache(tensors[0], *caches, cache_seqlens=lengths)
    assert torch.equal(cached, together)


def test_nan_and_infinity_stay_in_their_row(backend: torch.device) -> None:
    q = torch.randn(2, 4, 2, 24, device=backend)
    k, v = torch.randn(2, 2, 2, 300, 24, device=backend).unbind()
    q[0, 1, 1, 2], q[1, 0, 0], k[0, 1, 290, 3] = torch.nan, torch.inf, torch.nan
    v[1, 1, 5, 6] = torch.inf
    out, lse = scaled_dot_product_attention(q, k, v, enable_gqa=True, return_lse=True)
    truth = reference.scaled_dot_product_attention(q, k, v, return_lse=True)
    for ours, expected in zip((out, lse), truth, strict=True):
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.isinf(), expected.isinf())


def kernels_of(tensors: list[Tensor]) -> set[str]:
    with emulated_cuda() as launches:
        run_fused(tensors, {}, [torch.randn(*tensors[0].shape[:-1], tensors[2].shape[-1])])
    return {re.sub(r".*::(\w+)<.*", r"\1", name.split("<")[0] + "<") for name in launches.counts()}


def test_which_calls_are_split_in_the_emulator() -> None:
    split = {"attention_split_kernel", "attention_split_merge_kernel"}
    for rows in (1, 4, 5):
        k = torch.randn(1, 2, 30, 8)
        kernels = kernels_of([torch.randn(1, 2, rows, 8), k, k])
        assert (split <= kernels) == (rows <= 4), rows
        assert ("attention_forward_kernel" in kernels) == (rows > 4), rows


@on_gpus
@in_all_dtypes
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_pages(rows: int, dtype: torch.dtype, backend: torch.device) -> None:
    case = CacheCase("", (300, 10, 0), 320, rows, rows, page_size=16)
    tensors, options = case.make(dtype, backend)
    copies = [t.clone() for t in tensors]
    low = torch.float32 if dtype == torch.float64 else dtype
    truth, stock = (
        reference.attention_with_kv_cache(*copies, **options, **kind)
        for kind in ({}, {"dtype": low})
    )
    out = attention_with_kv_cache(*tensors, **options)
    out = out if dtype == torch.float64 else out.to(stock.dtype)
    assert_as_accurate_as_stock(out, truth, stock)
