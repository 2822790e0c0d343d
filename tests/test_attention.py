"""The attention kernels against the definition: every case, dtype and backend, with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused import reference
from fused._attention_composite import Options, dropout_mask
from fused._attention_function import AttentionFunction
from fused.functional import scaled_dot_product_attention
from fused.testing import assert_as_accurate_as_stock
from fused.testing.attention import assert_case, draw_grads, run_fused
from fused.testing.cases.attention import CASES, AttentionCase

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_forward_and_gradients(
    case: AttentionCase, dtype: torch.dtype, backend: torch.device
) -> None:
    assert_case(case, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_log_sum_exp(dtype: torch.dtype, backend: torch.device) -> None:
    from fused import _route

    tensors, _ = CASES[5].make(dtype, backend)
    q, k, v = tensors
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=backend)
    mask[3] = False
    _, lse, _ = _route.kernels().attention_forward(q, k, v, *Options(mask))
    scores = (q.double() @ k.double().transpose(-2, -1)) * q.shape[-1] ** -0.5
    expected = torch.logsumexp(scores.masked_fill(~mask, -torch.inf), -1)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert lse.dtype == compute
    low = torch.logsumexp(scores.float().masked_fill(~mask, -torch.inf), -1)
    assert_as_accurate_as_stock(lse, expected, low)


def test_dropout_is_one_function_of_its_pair_on_every_backend(backend: torch.device) -> None:
    from fused import _route

    rng = torch.tensor([1234567890123, 987654321012], device=backend)
    q = torch.zeros(2, 3, 70, 1, device=backend)
    k = torch.zeros(2, 3, 41, 1, device=backend)
    v = torch.eye(41, device=backend).expand(2, 3, 41, 41)
    kept = _route.kernels().attention_forward(q, k, v, *Options(rng=rng, dropout_p=0.25))[0] > 0
    # The first elements of head (1, 2), from an implementation of the paper in Python integers.
    expected = [
        [philox_keeps(rng.tolist(), 1 * 3 + 2, i, j, 0.25) for j in range(41)] for i in range(70)
    ]
    assert kept[1, 2].tolist() == expected
    assert abs(kept.double().mean().item() - 0.75) < 0.02


def philox_keeps(rng: list[int], head: int, row: int, column: int, p: float) -> bool:
    """Salmon et al. 2011, Philox4x32-10, written down a second time."""
    seed, offset = rng
    key = seed ^ (offset & 0xFFFFFFFF00000000)
    k = [key & 0xFFFFFFFF, key >> 32]
    c = [column // 4, row, head, offset & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[column % 4] >= int(p * 2**32)


@pytest.mark.parametrize("dropout_p", [0.2, 1.0])
def test_dropout_forward_and_gradients(dropout_p: float, backend: torch.device) -> None:
    tensors, _ = CASES[5].make(torch.float64, backend)
    rng = torch.tensor([42, 43], device=backend)
    inputs = [t.requires_grad_() for t in tensors]
    out, _ = AttentionFunction.apply(*inputs, *Options(rng=rng, dropout_p=dropout_p))
    keep = dropout_mask(
        Options(rng=rng, dropout_p=dropout_p), out.new_empty(*out.shape[:3], tensors[1].shape[2])
    )
    expected = reference.scaled_dot_product_attention(*inputs, keep=keep)
    grad_out = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    for a, e in zip(
        torch.autograd.grad(out, inputs, grad_out), torch.autograd.grad(expected, inputs, grad_out)
    ):
        torch.testing.assert_close(a, e)


def test_dropout_follows_the_generator(backend: torch.device) -> None:
    q = torch.randn(1, 2, 30, 8, device=backend)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_a_repeated_run_is_bitwise_equal(backend: torch.device) -> None:
    tensors, options = CASES[7].make(torch.float32, backend)
    grads_out = draw_grads(tensors)
    first, second = (run_fused(tensors, options, grads_out) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_sequence_does_not_depend_on_its_batch(backend: torch.device) -> None:
    q = torch.randn(3, 2, 70, 16, device=backend)
    grad_out = torch.randn_like(q)
    options = {"is_causal": True}
    together = run_fused([q, q + 1, q - 1], options, [grad_out])
    alone = run_fused([t[1:2] for t in (q, q + 1, q - 1)], options, [grad_out[1:2]])
    assert all(torch.equal(together[name][1:2], alone[name]) for name in alone)


def test_nan_and_infinity_stay_in_their_row(backend: torch.device) -> None:
    q, k, v = (torch.randn(2, 2, 40, 8, device=backend) for _ in range(3))
    q[0, 1, 3, 2] = torch.nan
    q[1, 0, 7] = torch.inf
    out = scaled_dot_product_attention(q, k, v)
    stock = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert torch.equal(out.isnan(), stock.isnan())
    assert out[0, 1, 3].isnan().all() and out[1, 0, 7].isnan().all()


def test_inputs_that_are_not_what_their_memory_holds(backend: torch.device) -> None:
    x = torch.randn(4, 1, 2, 3, 5, device=backend)
    negative, plain = [torch._neg_view(t) for t in x[:3]], [-t for t in x[:3]]
    mask = torch._neg_view(torch.randn(3, 3, device=backend))
    grad_out = torch._neg_view(x[3])
    first = run_fused(negative, {"attn_mask": mask}, [grad_out])
    second = run_fused(plain, {"attn_mask": mask.resolve_neg()}, [-x[3]])
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (ValueError, "attention: v must have the length of k (7), got [2, 2, 6, 8]", "v short"),
        (ValueError, "attention: k must have the head_dim of q (8), got [2, 2, 7, 9]", "k wide"),
        (ValueError, "attention: v must have the heads of k (2), got [2, 1, 7, 8]", "v heads"),
        (TypeError, "attention: k must have the dtype of q (Float), got Double", "k double"),
        (TypeError, "attention: q must be float32, float64, float16 or bfloat16, got Int", "int"),
        (ValueError, "attention: attn_mask must be broadcastable to [2, 2, 5, 7], got [5, 6]", "m"),
        (ValueError, "attention: dropout_p must be between 0 and 1, got 1.5", "p"),
        (ValueError, "attention: q must have 4 dimensions, got [2, 5, 8]", "q 3"),
        (
            NotImplementedError,
            "attention: no kernel for head_dim above 512",
            "wide",
        ),
    ],
)
def test_errors(error: type, text: str, change: str, backend: torch.device) -> None:
    from fused import _route

    (q, k, v), _ = AttentionCase("plain").make(torch.float32, backend)
    mask, p = None, 0.0
    if change == "v short":
        v = v[:, :, :6]
    elif change == "k wide":
        k = torch.cat([k, k[..., :1]], -1)
    elif change == "v heads":
        v = v[:, :1]
    elif change == "k double":
        k = k.double()
    elif change == "int":
        q, k, v = (t.int() for t in (q, k, v))
    elif change == "m":
        mask = torch.ones(5, 6, dtype=torch.bool, device=backend)
    elif change == "p":
        p = 1.5
    elif change == "q 3":
        q = q[:, 0]
    elif change == "wide":
        q, k = (t.repeat(1, 1, 1, 65) for t in (q, k))
    calls = [_route.kernels().attention_forward, torch.ops.fused.attention_forward]
    for call in calls:
        with pytest.raises(error) as caught:
            call(q, k, v, *Options(mask, dropout_p=p))
        assert str(caught.value).splitlines()[0] == text
        assert type(caught.value) is error


@pytest.mark.parametrize(
    ("text", "key_shape", "mask_shape"),
    [
        ("query, key and value must have a batch that broadcasts, got", (3, 2, 7, 8), None),
        ("attn_mask must be broadcastable to", (2, 7, 8), (1, 2, 5, 7)),
    ],
)
def test_errors_of_the_function(
    text: str, key_shape: tuple[int, ...], mask_shape: tuple[int, ...] | None
) -> None:
    q, k = torch.randn(2, 2, 5, 8), torch.randn(key_shape)
    q = q[0] if k.dim() == 3 else q
    mask = None if mask_shape is None else torch.randn(mask_shape)
    with pytest.raises(ValueError, match=f"^attention: {text}"):
        scaled_dot_product_attention(q, k, k, mask)


def test_key_and_value_in_groups_of_their_own() -> None:
    q, k, v = torch.randn(3, 1, 6, 4, 8).unbind()
    k, v = k[:, :3], v[:, :2]
    actual = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_keys_without_a_batch(batch: int, groups: int, backend: torch.device) -> None:
    """All sequences share them, as many heads as there are sequences or not."""
    q = torch.randn(batch, 4, 5, 8, device=backend)
    k, v = torch.randn(2, groups, 7, 8, device=backend).unbind()
    actual = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    expected = scaled_dot_product_attention(
        q, k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1), enable_gqa=True
    )
    assert actual.shape == q.shape and torch.equal(actual, expected)
