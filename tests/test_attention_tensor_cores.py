"""The tensor-core kernels of attention: every instance of them, and which calls they take."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from conftest import on_gpus
from torch import Tensor

from fused import reference
from fused._attention_composite import Options, dropout_mask
from fused._attention_function import AttentionFunction
from fused.functional import attention_with_kv_cache, scaled_dot_product_attention
from fused.testing import assert_as_accurate_as_stock, emulated_cuda
from fused.testing.attention import (
    Run,
    assert_case,
    draw_grads,
    run_fused,
    run_reference,
    run_stock,
    run_stock_in_tf32,
)
from fused.testing.cases.attention import LAST, AttentionCase
from fused.testing.tf32 import Tf32Products, round_to_tf32, tf32_allowed

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "tf32"}
EVERY_OPTION = {"softcap": 3.0, "alibi": True, "sink": True, "return_lse": True}
# Each instance in both passes, with more tiles of queries and of keys than there are places for in
# shared memory; head dims that fill it and some that it pads.
CASES = [
    AttentionCase("32", 1, 2, 1, 140, 150, 32, window=(90, 70)),
    AttentionCase("64", 1, 1, None, 133, 135, 64, is_causal=True),
    AttentionCase("64, padded", 1, 1, None, 5, 70, 40, head_dim_v=8),
    AttentionCase("64, odd", 2, 2, 1, 9, 70, 33, head_dim_v=50, layout="heads last", scale=0.3),
    AttentionCase("32, one", 1, 2, 1, 70, 9, 1, mask="additive [S, T]", **EVERY_OPTION),
    AttentionCase("96", 1, 1, None, 131, 70, 96, window=(30, 40)),
    AttentionCase("128", 1, 2, 1, 70, 99, 128, is_causal=True, causal_alignment=LAST),
    AttentionCase("128, padded", 1, 1, None, 9, 40, 104, layout="heads last"),
    AttentionCase("192", 1, 1, None, 66, 67, 192, is_causal=True),
    AttentionCase("256", 1, 1, None, 66, 67, 256, head_dim_v=200, window=(20, 3)),
    AttentionCase("32, options", 1, 2, 1, 70, 140, 32, mask="additive [S, T]", **EVERY_OPTION),
    AttentionCase("32, -1e9", 1, 1, None, 34, 140, 32, mask="-1e9 [B, 1, 1, T]"),
    AttentionCase("32, lowest", 1, 1, None, 34, 140, 32, mask="lowest [B, 1, 1, T]"),
    AttentionCase("32, scale below 0", 1, 1, None, 34, 70, 32, scale=-0.3),
    AttentionCase("64, options", 1, 1, None, 70, 135, 64, mask="bool [S, T]", is_causal=True),
    AttentionCase("96, options", 1, 1, None, 67, 67, 88, mask="blind [S, T]", window=(50, 9)),
    AttentionCase("128, options", 1, 1, None, 67, 70, 128, mask="additive [H, 1, T]"),
    AttentionCase("192, options", 1, 1, None, 34, 67, 192, softcap=3.0, return_lse=True),
    AttentionCase("256, options", 1, 1, None, 34, 35, 256, mask="float32 [S, T]", alibi=True),
]


@pytest.fixture(params=DTYPES, ids=DTYPES.get)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """What tensor cores multiply; float32 in tf32."""
    with tf32_allowed():
        yield request.param


def stock_of(dtype: torch.dtype) -> Run:
    return run_stock_in_tf32 if dtype == torch.float32 else run_stock


LARGE_SCORES = AttentionCase("32, scale of 1e10", 1, 1, None, 34, 70, 32, scale=1e10)


@on_gpus
@pytest.mark.parametrize("case", [*CASES, LARGE_SCORES], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=DTYPES.get)
def test_forward_and_gradients(
    case: AttentionCase, dtype: torch.dtype, backend: torch.device
) -> None:
    assert_case(case, dtype, backend)


def path_of(counts: dict[str, int]) -> set[str]:
    """Which kernels made the output and the gradients of q, k and v."""
    names = {re.sub(r".*::(\w+)<.*", r"\1", name.split("<")[0] + "<") for name in counts}
    parts = {
        name: re.fullmatch(r"attention_(mma_)?(forward|backward)_kernel", name) for name in names
    }
    return {f"{'mma' if m[1] else 'portable'} {m[2]}" for m in parts.values() if m}


def launched(tensors: list[Tensor], architecture: int = 80) -> set[str]:
    with emulated_cuda(architecture=architecture) as launches:
        run_fused(tensors, {}, draw_grads(tensors))
    return path_of(launches.counts())


MMA, PORTABLE = {"mma forward", "mma backward"}, {"portable forward", "portable backward"}


def draw(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape).to(dtype)


def test_what_they_take_in_the_emulator() -> None:
    q = draw(1, 2, 5, 16)
    assert launched([q, q, q]) == MMA
    assert launched([q.bfloat16()] * 3) == MMA
    assert launched([draw(2, 5, 1, 16).transpose(1, 2)] * 3) == MMA
    # Head dims of no whole 16 bytes are padded.
    assert launched([draw(1, 1, 5, 12)] * 3) == MMA
    assert launched([draw(1, 1, 5, 1)] * 3) == MMA
    assert launched([q, q, draw(1, 2, 5, 12)]) == MMA
    assert launched([draw(1, 2, 5, 17), draw(1, 2, 5, 17), q]) == MMA
    # A stride that is never used, because there is one of it, may be anything.
    assert launched([draw(1, 1, 85).as_strided((1, 1, 5, 16), (85, 85, 16, 1))] * 3) == MMA
    for others in (
        [q.float()] * 3,
        [draw(1, 1, 5, 264)] * 3,
        [draw(1, 1, 5, 257)] * 3,
        [draw(1, 2, 5, 17)[..., :16], q, q],
        [q, draw(1, 2, 5, 17)[..., :16], q],
        [q, q, draw(1, 2, 5, 17)[..., :16]],
        [draw(1, 2, 5, 24)[..., 4:20], q, q],
    ):
        assert launched(others) == PORTABLE, [t.shape for t in others]
    for old in (q, draw(1, 2, 5, 12)):
        assert launched([old, old, old], architecture=75) == PORTABLE
    # An unaligned gradient of the output is the backward pass's alone.
    leaf = draw(2, 2, 5, 16).requires_grad_()
    with emulated_cuda() as launches:
        out = scaled_dot_product_attention(leaf, leaf, leaf)
        torch.autograd.grad(out, leaf, draw(2, 2, 5, 17)[..., :16])
    assert path_of(launches.counts()) == {"mma forward", "portable backward"}


@pytest.mark.parametrize("forward", [75, 80])
def test_either_backward_after_either_forward(forward: int, dtype: torch.dtype) -> None:
    # Scores in the hundreds: what the forward pass leaves of a row must mean the same to both.
    case = AttentionCase("far", 1, 1, None, 20, 70, 16, scale=60.0, sink=True)
    tensors, options = case.make(dtype, "cpu")
    if dtype == torch.float32:  # the scores are then those of full precision
        tensors = [round_to_tf32(t) for t in tensors]
    grads_out = draw_grads(tensors)[:1]
    expected, stock = (run(tensors, options, grads_out) for run in (run_reference, stock_of(dtype)))
    leaves = [t.requires_grad_() for t in tensors]
    with emulated_cuda(architecture=forward):
        out = scaled_dot_product_attention(*leaves, **options)
    with emulated_cuda(architecture=155 - forward) as launches:
        grads = torch.autograd.grad(out, leaves, grads_out)
    assert path_of(launches.counts()) < (MMA if forward == 75 else PORTABLE)
    for name, grad in zip(("query", "key", "value"), grads, strict=True):
        name = f"grad of {name}"
        assert_as_accurate_as_stock(grad, expected[name], stock[name].to(dtype), name)


@on_gpus
def test_dropout(dtype: torch.dtype, backend: torch.device) -> None:
    tensors, _ = AttentionCase("", 2, 2, 1, 37, 70, 16).make(dtype, backend)
    grad_out = draw_grads(tensors)[0]
    rng = torch.tensor([42, 43], device=backend)
    options = Options(rng=rng, dropout_p=0.3)
    keep = dropout_mask(options, grad_out.new_empty(2, 2, 37, 70, dtype=torch.float64))

    def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]

    results = []
    for compute in (dtype, torch.float64):
        leaves = [t.detach().to(compute).requires_grad_() for t in tensors]
        with Tf32Products():
            out = reference.scaled_dot_product_attention(
                *leaves, keep=keep.to(compute), dtype=compute
            )
            results.append(gradients(out, leaves))
    leaves = [t.requires_grad_() for t in tensors]
    out = AttentionFunction.apply(*leaves, *options)[0]
    for actual, stock, truth in zip(gradients(out, leaves), *results, strict=True):
        assert_as_accurate_as_stock(actual, truth, stock)


@on_gpus
@pytest.mark.parametrize("head_dim", [24, 96])
def test_nothing_is_read_beyond_the_ends(head_dim: int, backend: torch.device) -> None:
    def inside_nan(length: int) -> Tensor:
        around = torch.full((1, 1, length + 200, head_dim + 8), torch.nan, device=backend).half()
        around[:, :, :length, :head_dim] = torch.randn(length, head_dim)
        return around[:, :, :length, :head_dim]

    tensors = [inside_nan(length) for length in (37, 70, 70)]
    results = run_fused(tensors, {}, [inside_nan(37)])
    assert all(result.isfinite().all() for result in results.values())


@on_gpus
@pytest.mark.parametrize("window", [(40, 24), (0, 0), (-1, 0), (0, -1)])
def test_what_no_row_of_a_tile_sees_is_not_read(
    window: tuple[int, int], backend: torch.device
) -> None:
    # The longest tiles are of 128 own rows and 64 others.
    far, length = 128 + 64 + 8, 600
    left, right = (length if bound < 0 else bound for bound in window)
    place = torch.arange(length)
    for middle in (300, length - 1):
        q, k, v, grad_out = torch.randn(4, 1, 1, length, 8, device=backend).half().unbind()
        k[:, :, (place < middle - left - far) | (place > middle + right + far)] = torch.nan
        q[:, :, (place < middle - right - far) | (place > middle + left + far)] = torch.nan
        results = run_fused([q, k, v], {"window": window}, [grad_out])
        bounded = ["grad of key", "grad of value"] if -1 not in window else []
        for name in ["out", "grad of query", *bounded]:
            assert results[name][0, 0, middle].isfinite().all(), name


@on_gpus
@pytest.mark.parametrize("head_dim", [16, 18])
def test_the_same_bits_in_any_batch(
    head_dim: int, dtype: torch.dtype, backend: torch.device
) -> None:
    case = AttentionCase("", 3, 2, 1, 40, 70, head_dim, is_causal=True, causal_alignment=LAST)
    tensors, options = case.make(dtype, backend)
    grads_out = draw_grads(tensors)
    together, again = (run_fused(tensors, options, grads_out) for _ in range(2))
    alone = run_fused([t[1:2] for t in tensors], options, [g[1:2] for g in grads_out])
    for name in together:
        assert torch.equal(together[name], again[name]), name
        assert torch.equal(together[name][1:2], alone[name]), name


@on_gpus
@pytest.mark.parametrize("wanted", ["query", "key", "value"])
def test_one_gradient_alone_of_padded_rows(wanted: str, backend: torch.device) -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 18, device=backend).half()
    grad_out = draw_grads([q, k, v])[0]
    results = run_fused([q, k, v], {}, [grad_out])
    leaf = {"query": q, "key": k, "value": v}[wanted].requires_grad_()
    (grad,) = torch.autograd.grad(scaled_dot_product_attention(q, k, v), leaf, grad_out)
    assert torch.equal(grad, results[f"grad of {wanted}"])


@on_gpus
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_the_bits_of_pages_and_of_none(
    head_dim: int, dtype: torch.dtype, backend: torch.device
) -> None:
    """With an option that changes scores, for pages have no instance without."""
    q = torch.randn(2, 2, 9, head_dim, device=backend).to(dtype)
    caches = torch.randn(2, 2, 1, 140, head_dim, device=backend).to(dtype).unbind()
    lengths = torch.tensor([133, 20], dtype=torch.int32, device=backend)
    for cache in caches:
        cache[1, :, 20:] = torch.nan
    options = {"cache_seqlens": lengths, "softcap": 2.0, "window": (59, -1), "return_lse": True}
    expected = attention_with_kv_cache(q, *caches, **options)
    # [B * 7, 1, 20, D] in another order, and the table that says in which.
    table = torch.randperm(14).view(2, 7)
    pages = [
        x.unflatten(2, (7, 20)).transpose(1, 2).flatten(0, 1)[table.flatten().argsort()]
        for x in caches
    ]
    options["block_table"] = table.to(backend, torch.int32)
    for ours, same in zip(attention_with_kv_cache(q, *pages, **options), expected, strict=True):
        assert torch.equal(ours, same)


def test_which_pages_they_take_in_the_emulator() -> None:
    def kernels_of(rows: int, pages: Tensor) -> set[str]:
        table = torch.arange(len(pages), dtype=torch.int32).view(1, -1)
        lengths = torch.tensor([12], dtype=torch.int32)
        with emulated_cuda() as launches:
            q = draw(1, 2, rows, pages.shape[-1])
            attention_with_kv_cache(q, pages, pages, cache_seqlens=lengths, block_table=table)
        return path_of(launches.counts())

    assert kernels_of(5, draw(3, 2, 4, 16)) == {"mma forward"}
    assert kernels_of(5, draw(1, 2, 12, 16)) == {"mma forward"}
    assert kernels_of(4, draw(3, 2, 4, 16)) == set()  # split over the keys
    for pages in (
        draw(3, 2, 4, 12),  # a cache is not copied
        draw(3, 2, 4, 17)[..., :16],
        draw(3, 2 * 4 * 16 + 4)[:, 4:].view(3, 2, 4, 16),
        draw(3, 2 * 4 * 16 + 4)[:, :-4].view(3, 2, 4, 16),
    ):
        assert kernels_of(5, pages) == {"portable forward"}, pages.stride()


@on_gpus
def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype, backend: torch.device) -> None:
    q, k, v = torch.randn(3, 2, 2, 40, 8, device=backend).to(dtype).unbind()
    q[0, 1, 3, 2], q[1, 0, 7] = torch.nan, torch.inf
    v[1, 1, 5, 6] = torch.inf
    out, lse = scaled_dot_product_attention(q, k, v, return_lse=True)
    truth = reference.scaled_dot_product_attention(q, k, v, return_lse=True)
    for ours, expected in zip((out, lse), truth, strict=True):
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.isinf(), expected.isinf())


@on_gpus
def test_a_scale_that_is_zero_in_float_hides_no_less(
    dtype: torch.dtype, backend: torch.device
) -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 8, device=backend).to(dtype).unbind()
    tiny, zero = (
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for scale in (1e-50, 0.0)
    )
    assert tiny.isfinite().all()
    assert torch.equal(tiny, zero)
