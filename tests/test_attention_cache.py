"""Attention over a cache: the definition, what is written, who depends on whom, errors, graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused
from fused.functional import attention_with_kv_cache, scaled_dot_product_attention
from fused.testing import assert_as_accurate_as_stock
from fused.testing.attention import run_cache_case
from fused.testing.cases.attention_cache import CASES, CacheCase

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BY_NAME = {case.name: case for case in CASES}
IN_ALL_DTYPES = (
    "one token", "pages of 7, odd strides", "pages beyond tiles", "everything in pages",
)  # fmt: skip


def results(function: Callable, tensors: list[Tensor], options: dict) -> tuple[Tensor, ...]:
    result = function(*tensors, **options)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, d) for c in CASES for d in DTYPES if d == torch.float32 or c.name in IN_ALL_DTYPES],
    ids=lambda x: str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x.name,
)
def test_results_and_what_is_written(
    case: CacheCase, dtype: torch.dtype, backend: torch.device
) -> None:
    if not case.lengths:
        tensors, options = case.make(dtype, backend)
        assert attention_with_kv_cache(*tensors, **options).shape == (0, 2, 1, 8)
        return
    for name, compared in run_cache_case(case, dtype, backend).items():
        assert_as_accurate_as_stock(*compared, name)


@pytest.mark.parametrize("name", ["several tokens", "everything", "everything in pages"])
def test_the_same_bits_as_each_sequence_alone(name: str, backend: torch.device) -> None:
    tensors, options = BY_NAME[name].make(torch.float32, backend)
    together = attention_with_kv_cache(*tensors, **options)
    again = attention_with_kv_cache(*tensors, **options)
    together, again = (x if isinstance(x, tuple) else (x,) for x in (together, again))
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    paged = "block_table" in options
    for b in range(len(tensors[0])):
        one = dict(options)
        for key in ("cache_seqlens", "k", "v", "block_table"):
            if key in one:
                one[key] = one[key][b : b + 1]
        if "attn_mask" in one and one["attn_mask"].dim() == 4:
            one["attn_mask"] = one["attn_mask"][b : b + 1]
        caches = tensors[1:] if paged else [x[b : b + 1] for x in tensors[1:]]
        alone = results(attention_with_kv_cache, [tensors[0][b : b + 1], *caches], one)
        assert all(torch.equal(a[b : b + 1], x) for a, x in zip(together, alone, strict=True))


def test_the_bits_of_pages_of_any_size_and_of_none(backend: torch.device) -> None:
    (q, k_cache, v_cache), options = BY_NAME["full"].make(torch.float32, backend)
    expected = attention_with_kv_cache(q, k_cache, v_cache, **options)
    keys = k_cache[0:1, :, :70], v_cache[0:1, :, :70]
    assert torch.equal(
        expected[:1],
        scaled_dot_product_attention(q[:1], *keys, is_causal=True, causal_alignment="bottom_right"),
    )
    for size in (1, 14, 35, 70):
        pages = [
            x.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1) for x in (k_cache, v_cache)
        ]
        table = torch.arange(len(pages[0]), dtype=torch.int32, device=backend).view(2, -1)
        paged = options | {"block_table": table}
        assert torch.equal(attention_with_kv_cache(q, *pages, **paged), expected)


def test_nan_stays_in_its_sequence(backend: torch.device) -> None:
    (q, k_cache, v_cache), options = BY_NAME["several tokens"].make(torch.float32, backend)
    clean = attention_with_kv_cache(q, k_cache, v_cache, **options)
    k_cache[2, 1, 5], options["v"][0, 0, 1] = torch.nan, torch.inf
    out = attention_with_kv_cache(q, k_cache, v_cache, **options)
    assert torch.equal(out[1], clean[1]) and torch.equal(out[0, 1], clean[0, 1])
    assert torch.equal(out[2, 0], clean[2, 0])
    assert out[2, 1].isnan().all() and not out[0, 0].isfinite().all()


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (TypeError, "cache_seqlens must be int32, got Long",
         {"cache_seqlens": torch.zeros(3).long()}),
        (ValueError, "cache_seqlens must have the shape [3], got [2]",
         {"cache_seqlens": torch.zeros(2, dtype=torch.int32)}),
        (ValueError, "cache_seqlens must be at least 0 and leave room for 1 of 70 keys, got 70",
         {"cache_seqlens": torch.tensor([0, 70, 1], dtype=torch.int32)}),
        (ValueError, "cache_seqlens must be at least 0 and leave room for 1 of 70 keys, got -1",
         {"cache_seqlens": torch.tensor([0, -1, 1], dtype=torch.int32)}),
        (ValueError, "k and v must be given together, got one", {"v": None}),
        (ValueError, "k must have the shape [3, 2, 1, 8], got [3, 1, 1, 8]",
         {"k": torch.zeros(3, 1, 1, 8)}),
        (TypeError, "v must have the dtype of q (Float), got Double",
         {"v": torch.zeros(3, 2, 1, 8).double()}),
        (ValueError, "block_table must name one of 3 pages, got 3",
         {"block_table": torch.tensor([[0], [1], [3]], dtype=torch.int32)}),
        (ValueError, "k_cache must have the head_dim of q (8), got [3, 2, 70, 9]", "wide"),
        (ValueError, "k_cache must have the batch of q (3), got [2, 2, 70, 8]", "batch"),
        (RuntimeError, "inputs must not ask for a derivative of attention_with_kv_cache, but an "
         "input requires one; use torch.no_grad()", "grad"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_come_before_anything_is_written(
    error: type, text: str, change: dict | str, backend: torch.device
) -> None:
    tensors, options = BY_NAME["one token"].make(torch.float32, backend)
    if isinstance(change, dict):
        options |= change
    elif change == "wide":
        tensors[1] = torch.zeros(3, 2, 70, 9)
    elif change == "batch":
        tensors[1:] = [x[:2] for x in tensors[1:]]
    elif change == "grad":
        tensors[0].requires_grad_()
    versions = [x._version for x in tensors]
    with pytest.raises(error) as caught:
        attention_with_kv_cache(*tensors, **options)
    assert str(caught.value).splitlines()[0] == f"attention: {text}"
    assert versions == [x._version for x in tensors]


@pytest.mark.parametrize("batch", [0, 2])
def test_a_mask_of_its_own_length(batch: int, backend: torch.device) -> None:
    """Whatever room the cache has, and for no sequence too."""
    q, k, v = torch.randn(3, batch, 2, 5, 8, device=backend).unbind()
    caches = torch.zeros(2, batch, 2, 9, 8, device=backend).unbind()
    lengths = torch.full((batch,), 3, dtype=torch.int32, device=backend)
    for keys in (8, 12):
        mask = torch.randn(5, keys, device=backend)
        out = attention_with_kv_cache(q, *caches, cache_seqlens=lengths, k=k, v=v, attn_mask=mask)
        joined = [F.pad(x, (0, 0, 3, 0)) for x in (k, v)]
        expected = scaled_dot_product_attention(q, *joined, mask[:, :8], window=(-1, 0))
        torch.testing.assert_close(out, expected)


def test_the_cache_is_marked_as_changed(backend: torch.device) -> None:
    tensors, options = BY_NAME["one token"].make(torch.float32, backend)
    before = [x._version for x in tensors]
    attention_with_kv_cache(*tensors, **options)
    after = [x._version for x in tensors]
    assert after[0] == before[0] and after[1] > before[1] and after[2] > before[2]


@pytest.mark.parametrize("name", ["everything", "everything in pages"])
def test_opcheck(name: str) -> None:
    (q, k_cache, v_cache), options = BY_NAME[name].make(torch.float32, "cpu")
    k_cache, v_cache = k_cache.nan_to_num(), v_cache.nan_to_num()
    arguments = (
        q, k_cache, v_cache, options["cache_seqlens"], options["k"], options["v"],
        options.get("block_table"), options["attn_mask"], options["alibi_slopes"], options["sink"],
        False, None, 0.0, -1, 0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fused.attention_with_kv_cache.default, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_with_dynamic_shapes(compiler: str) -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend=compiler)
    def compiled(tensors: list[Tensor], options: dict) -> Tensor:
        return attention_with_kv_cache(*tensors, **options) * 2

    for rows in (3, 1):
        case = CacheCase("c", new=rows, rows=rows, page_size=16)
        tensors, options = case.make(torch.float32, "cpu")
        copies = [x.clone() for x in tensors]
        expected = attention_with_kv_cache(*tensors, **options) * 2
        torch.testing.assert_close(compiled(copies, options), expected)
        for a, b in zip(copies, tensors):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_explain_says_kernel(backend: torch.device) -> None:
    tensors, options = BY_NAME["everything in pages"].make(torch.float32, backend)
    explained = fused.explain(attention_with_kv_cache, *tensors, **options)
    assert [decision.path != "composite" for decision in explained.decisions] == [True]
