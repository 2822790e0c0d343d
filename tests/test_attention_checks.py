"""What the kernels refuse is refused in every way in which no kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused.functional import (
    attention_with_kv_cache,
    scaled_dot_product_attention,
    varlen_attention,
)

Attend = Callable[..., Any]


def as_it_is(attend: Attend, q: Tensor, *others: Any, **options: Any) -> None:
    attend(q, *others, **options)


def under_grad(attend: Attend, q: Tensor, *others: Any, **options: Any) -> None:
    torch.func.grad(lambda q: attend(q, *others, **options).sum())(q)


def under_vmap(attend: Attend, q: Tensor, *others: Any, **options: Any) -> None:
    run = lambda q: attend(q, *others, **options)  # noqa: E731
    torch.func.vmap(run, randomness="different")(q[None])


def of_fakes(attend: Attend, *tensors: Any, **options: Any) -> None:
    with FakeTensorMode() as mode:
        fake = lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x  # noqa: E731
        attend(*map(fake, tensors), **{name: fake(x) for name, x in options.items()})


EVERY_WAY = pytest.mark.parametrize(
    "call", [as_it_is, under_grad, under_vmap, of_fakes], ids=lambda call: call.__name__
)
A = torch.zeros(1, 4, 3, 8)
INT_MASK = torch.ones(3, 3, dtype=torch.int32)


@EVERY_WAY
@pytest.mark.parametrize("d", [8, 513])
@pytest.mark.parametrize(
    ("error", "text", "key", "value", "options"),
    [
        (ValueError, "attn_mask must be broadcastable to [1, 4, 3, 3], got [2, 2]",
         (4, 3), (4, 3), {"attn_mask": torch.zeros(2, 2)}),
        (TypeError, "attn_mask must be", (4, 3), (4, 3), {"attn_mask": INT_MASK}),
        (TypeError, "attn_mask must be", (4, 3), (4, 3), {"attn_mask": INT_MASK, "softcap": 1.0}),
        (ValueError, "dropout_p must be between 0 and 1, got 1.5", (4, 3), (4, 3),
         {"dropout_p": 1.5}),
        (ValueError, "query, key and value must have heads that broadcast", (2, 3), (2, 3), {}),
        (ValueError, "k must have a number of heads that divides that of q (4), got",
         (3, 3), (3, 3), {"enable_gqa": True}),
        (ValueError, "v must have the length of k (3), got", (4, 3), (4, 2), {}),
    ],
)  # fmt: skip
def test_what_does_not_go_together(
    call: Attend, d: int, error: type, text: str, key: tuple, value: tuple, options: dict
) -> None:
    q, k, v = (torch.zeros(1, *sizes, d) for sizes in ((4, 3), key, value))
    with pytest.raises(error) as caught:
        call(scaled_dot_product_attention, q, k, v, **options)
    assert str(caught.value).startswith(f"attention: {text}")


@EVERY_WAY
@pytest.mark.parametrize(
    ("error", "text", "key"),
    [
        (ValueError, "k must have the head_dim of q", torch.zeros(1, 4, 3, 9)),
        (TypeError, "k must have the dtype of q", A.double()),
        (ValueError, "k must be on the device of q (cpu), got meta", A.to("meta")),
    ],
)
def test_keys_that_do_not_go_with_the_query(
    call: Attend, error: type, text: str, key: Tensor
) -> None:
    with pytest.raises(error) as caught:
        call(scaled_dot_product_attention, A, key, A)
    assert str(caught.value).startswith(f"attention: {text}")


@pytest.mark.parametrize("options", [{}, {"softcap": 1.0}])
def test_a_query_that_no_kernel_takes(options: dict) -> None:
    for q, error in ((A.int(), TypeError), (A.cfloat(), TypeError), (A[0, 0, 0], ValueError)):
        with pytest.raises(error, match=r"^attention: q must"):
            scaled_dot_product_attention(q, q, q, **options)


@EVERY_WAY
@pytest.mark.parametrize("d", [8, 513])
@pytest.mark.parametrize(
    ("error", "text", "ends", "rows_of_v", "mask"),
    [
        (TypeError, "cu_seqlens_q must be int32, got", torch.tensor([0, 2, 5]), 5, None),
        (ValueError, "cu_seqlens_q must", torch.zeros(1, 3, dtype=torch.int32), 5, None),
        (ValueError, "v must have the length of k (5), got [4, 2,",
         torch.tensor([0, 5], dtype=torch.int32), 4, None),
        (ValueError, "attn_mask must be broadcastable to [1, 2, 3, 3], got [3, 1, 3, 3]",
         torch.tensor([0, 5], dtype=torch.int32), 5, torch.zeros(3, 1, 3, 3)),
    ],
)  # fmt: skip
def test_packed_sequences(
    call: Attend, d: int, error: type, text: str, ends: Tensor, rows_of_v: int, mask: Tensor | None
) -> None:
    q, v = torch.zeros(5, 2, d), torch.zeros(rows_of_v, 2, d)
    with pytest.raises(error) as caught:
        call(varlen_attention, q, q, v, ends, ends, attn_mask=mask)
    assert str(caught.value).startswith(f"attention: {text}")


@pytest.mark.parametrize("call", [as_it_is, under_grad, under_vmap])
@pytest.mark.parametrize("ends", [[0, 9], [0, 3, 2], [1, 5]])
def test_ends_of_packed_sequences_that_fall_or_go_too_far(call: Attend, ends: list[int]) -> None:
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    for d in (8, 513):
        q = torch.zeros(5, 2, d)
        with pytest.raises(ValueError, match=r"^attention: cu_seqlens_q must rise from 0 to"):
            call(varlen_attention, q, q, q, cu_seqlens, cu_seqlens)


def test_a_short_mask_hides_the_rest_of_packed_sequences_alone() -> None:
    q, ends = torch.randn(5, 2, 8), torch.tensor([0, 5], dtype=torch.int32)
    run = lambda q: varlen_attention(q, q, q, ends, ends, attn_mask=torch.zeros(2, 2))  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(run)(q[None])[0], run(q))


def test_a_cache_on_another_device() -> None:
    lengths, meta = torch.zeros(1, dtype=torch.int32), A.to("meta")
    for caches in ((meta, A), (A, meta)):
        with pytest.raises(ValueError, match=r"^attention: ._cache must be on the device of q"):
            attention_with_kv_cache(A, *caches, cache_seqlens=lengths)
