"""Attention's derivatives beyond the kernels', a tile of scores at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from peak_memory import peak_memory, reset_peak_memory
from torch import Tensor

from fused import _attention_tiles, _route
from fused._attention_composite import Options, Place, dropout_mask
from fused._attention_function import AttentionFunction
from fused.functional import scaled_dot_product_attention, varlen_attention
from fused.testing import assert_as_accurate_as_stock
from fused.testing.cases.attention import CASES, VARLEN_CASES, AttentionCase

RNG = torch.tensor([1234567890123, 987654321012])
EVERYTHING = AttentionCase(
    "everything", batch=2, heads=4, heads_kv=2, rows=11, keys=13, head_dim=3, head_dim_v=4,
    mask="additive [B, 1, S, T]", is_causal=True, window=(6, 2), causal_alignment="bottom_right",
    softcap=1.5, alibi=True, sink=True,
)  # fmt: skip
PACKED = replace(EVERYTHING, name="packed", lengths=((5, 7), (0, 3), (11, 6), (4, 0)), rest=2)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda scores: monkeypatch.setattr(_attention_tiles, "TILE", scores)


@pytest.fixture
def by_composite(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From then on derivatives of derivatives are those of all scores at once."""
    return lambda: monkeypatch.setattr(_route, "is_plain", lambda *tensors: False)


def leaves_of(case: AttentionCase, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Everything of a case that may have a gradient; the options by which it is called."""
    tensors, options = case.make(dtype, "cpu")
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    for name in ("attn_mask", "alibi_slopes", "sink"):
        if name in options and options[name].is_floating_point():
            options[name] = options[name].detach().clone().requires_grad_()
            leaves.append(options[name])
    return leaves, {**options, "return_lse": True}


def second_derivatives(
    attend: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor]
) -> list[Tensor | None]:
    """Of both results' gradients, by the inputs and by what came in from behind."""
    out, lse = attend()
    torch.manual_seed(0)
    grads_out = [torch.randn(x.shape, dtype=x.dtype, requires_grad=True) for x in (out, lse)]
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # of rows without keys
    firsts = torch.autograd.grad(
        [out, lse], leaves, grads_out, create_graph=True, allow_unused=True
    )
    firsts = [x for x in firsts if x is not None and x.requires_grad]
    grad_grads = [torch.randn(x.shape, dtype=x.dtype) for x in firsts]  # whatever their strides
    return list(torch.autograd.grad(firsts, [*grads_out, *leaves], grad_grads, allow_unused=True))


def assert_same(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """None is zero."""
    for a, b in zip(actual, expected, strict=True):
        if a is not None or b is not None:
            a, b = (torch.zeros_like(y) if x is None else x for x, y in ((a, b), (b, a)))
            torch.testing.assert_close(a, b)


def assert_tiles_mean_the_whole(
    attend: Callable[..., tuple[Tensor, Tensor]],
    leaves: list[Tensor],
    by_composite: Callable[[], None],
) -> None:
    actual = second_derivatives(attend, leaves)
    by_composite()
    assert_same(actual, second_derivatives(attend, leaves))


@pytest.mark.parametrize("case", [*CASES, *VARLEN_CASES], ids=lambda case: case.name)
def test_tiles_mean_what_the_whole_means(
    case: AttentionCase,
    small_tiles: Callable[[int], None],
    by_composite: Callable[[], None],
) -> None:
    leaves, options = leaves_of(case, torch.float64)
    function = varlen_attention if case.lengths else scaled_dot_product_attention
    small_tiles(max(3 * case.keys + 1, case.rows * case.keys // 5))

    def attend() -> tuple[Tensor, Tensor]:
        return function(*leaves[:3], **options)

    assert_tiles_mean_the_whole(attend, leaves, by_composite)


@pytest.mark.parametrize("case", [EVERYTHING, PACKED], ids=lambda case: case.name)
def test_tiles_drop_what_the_kernel_drops(
    case: AttentionCase,
    small_tiles: Callable[[int], None],
    by_composite: Callable[[], None],
) -> None:
    leaves, options = leaves_of(case, torch.float64)
    ends = [options.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k")]
    constants = Options(*leaves[3:], RNG, *ends, dropout_p=0.4, is_causal=True, softcap=2.0)
    small_tiles(40)

    def attend() -> tuple[Tensor, Tensor]:
        return AttentionFunction.apply(*leaves[:3], *constants)

    assert_tiles_mean_the_whole(attend, leaves, by_composite)


def test_dropout_mask_of_a_part_is_part_of_the_mask() -> None:
    options = Options(rng=RNG, dropout_p=0.4)
    whole = dropout_mask(options, torch.empty(3, 4, 9, 21))
    assert 0.5 < (whole > 0).double().mean() < 0.7
    for key, keys in ((0, 21), (1, 5), (6, 1), (7, 14), (8, 0)):
        part = dropout_mask(options, torch.empty(2, 2, 5, keys), Place(1, 2, 3, key, heads=4))
        assert torch.equal(part, whole[1:, 2:, 3:8, key : key + keys])


def test_the_first_derivative_is_the_kernels() -> None:
    leaves, options = leaves_of(EVERYTHING, torch.float32)
    out, lse = scaled_dot_product_attention(*leaves[:3], **options)
    loss = out.square().sum() + lse.sin().sum()
    plain, again = (
        torch.autograd.grad(loss, leaves, create_graph=flag, retain_graph=True)
        for flag in (False, True)
    )
    for a, b in zip(again, plain, strict=True):
        assert a.requires_grad and torch.equal(a, b)


def test_a_packed_mask_that_is_too_short_hides_the_rest(
    small_tiles: Callable[[int], None], by_composite: Callable[[], None]
) -> None:
    leaves, options = leaves_of(PACKED, torch.float64)
    with torch.no_grad():
        mask = options["attn_mask"][..., :9, :4].clone().requires_grad_()
    leaves[3] = options["attn_mask"] = mask
    small_tiles(10)

    def attend() -> tuple[Tensor, Tensor]:
        return varlen_attention(*leaves[:3], **options)

    assert_tiles_mean_the_whole(attend, leaves, by_composite)


def test_low_precision_adds_up_in_float32(
    small_tiles: Callable[[int], None], by_composite: Callable[[], None]
) -> None:
    """Beside the composite of everything at once, as if it were stock."""
    small_tiles(3)  # a row
    leaves = [torch.rand(1, 1, n, 4).bfloat16() for n in (400, 3, 3, 400, 3)]
    leaves[4][..., 1:, :] = 0  # of one key alone, whose gradient grows with every row

    def second(dtype: torch.dtype) -> Tensor:
        q, k, v, grad_out, grad_grad = (x.detach().to(dtype).requires_grad_() for x in leaves)
        out = scaled_dot_product_attention(q, k, v)
        first = torch.autograd.grad(out, v, grad_out, create_graph=True)
        return torch.autograd.grad(first, k, grad_grad)[0]

    actual = second(torch.bfloat16)
    by_composite()
    assert_as_accurate_as_stock(actual, second(torch.float64), second(torch.bfloat16))


def test_higher_derivatives(small_tiles: Callable[[int], None]) -> None:
    small_tiles(5)
    q, k, v = (torch.randn(1, 1, 3, 2).double().requires_grad_() for _ in range(3))

    def first(*qkv: Tensor) -> tuple[Tensor, ...]:
        out = scaled_dot_product_attention(*qkv, is_causal=True)
        return torch.autograd.grad(out.sin().sum(), qkv, create_graph=True)

    assert torch.autograd.gradcheck(first, (q, k, v))
    assert torch.autograd.gradgradcheck(first, (q, k, v))


def everything(case: AttentionCase) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A scalar loss of one tensor of each kind that may have a gradient."""
    leaves, options = leaves_of(case, torch.float64)
    for name in ("attn_mask", "alibi_slopes", "sink"):
        del options[name]
    function = varlen_attention if case.lengths else scaled_dot_product_attention

    def loss(*x: Tensor) -> Tensor:
        extras = dict(zip(("attn_mask", "alibi_slopes", "sink"), x[3:]))
        out, lse = function(*x[:3], **options, **extras)
        return out.sin().sum() + lse.masked_fill(lse == -torch.inf, 0.0).sin().sum()

    return loss, tuple(x.detach() for x in leaves)


@pytest.mark.parametrize("case", [EVERYTHING, PACKED], ids=lambda case: case.name)
def test_transforms_in_tiles(case: AttentionCase, small_tiles: Callable[[int], None]) -> None:
    loss, inputs = everything(case)
    small_tiles(80)
    places = tuple(range(len(inputs)))
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    gradients = torch.func.grad(loss, places)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    assert_same(list(gradients(*inputs)), list(expected))
    along = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
    torch.testing.assert_close(torch.func.jvp(loss, inputs, tangents)[1], along)
    second = list(torch.autograd.grad(along, leaves))
    assert_same(list(torch.func.jvp(gradients, inputs, tangents)[1]), second)
    other = torch.func.grad(lambda *x: torch.func.jvp(loss, x, tangents)[1], places)
    assert_same(list(other(*inputs)), second)
    many = [torch.stack([x, x / 2]) for x in inputs]
    for i, results in enumerate(zip(*torch.func.vmap(gradients)(*many), strict=True)):
        assert_same(list(results), list(gradients(*(x[i] for x in many))))


def test_transforms_with_dropout_in_tiles(small_tiles: Callable[[int], None]) -> None:
    """What is computed again for a gradient drops the same weights."""
    small_tiles(30)
    q, k, v = torch.randn(3, 1, 2, 9, 7, dtype=torch.float64).unbind()

    def function(*qkv: Tensor) -> Tensor:
        torch.manual_seed(3)
        return scaled_dot_product_attention(*qkv, dropout_p=0.4)

    tangents, grad = tuple(torch.randn(3, 1, 2, 9, 7, dtype=q.dtype)), torch.randn_like(q)
    out, pull = torch.func.vjp(function, q, k, v)
    assert torch.equal((out == 0).all(-1), torch.zeros_like(out[..., 0]) != 0)
    _, pushed = torch.func.jvp(function, (q, k, v), tangents)
    pulled = sum((g * t).sum() for g, t in zip(pull(grad), tangents))
    torch.testing.assert_close(pulled, (pushed * grad).sum())

    def of_one(x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, k, v, dropout_p=0.4)

    for randomness in ("same", "different"):
        one, other = torch.func.vmap(of_one, randomness=randomness)(torch.stack([q, q]))
        assert torch.equal(one, other) == (randomness == "same")


def test_forward_mode_beside_a_graph(small_tiles: Callable[[int], None]) -> None:
    small_tiles(30)
    inputs = tuple(torch.randn(1, 1, 9, 2).double().requires_grad_() for _ in range(3))
    function = lambda *x: scaled_dot_product_attention(*x, window=(3, 2))  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)


def second_derivative(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    firsts = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    penalty = torch.stack([x.square().sum() for x in firsts]).sum()
    return torch.autograd.grad(penalty, (q, k, v))


def forward_mode(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    inputs = (q.detach(), k.detach(), v.detach())
    return torch.func.jvp(lambda *x: scaled_dot_product_attention(*x), inputs, inputs)


@pytest.mark.parametrize("derivative", [second_derivative, forward_mode])
def test_memory(derivative: Callable[..., tuple[Tensor, ...]]) -> None:
    """What docs/attention.md says; a matrix of scores alone would take 64 MiB."""

    def peak(length: int) -> int:
        inputs = [torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3)]
        before = reset_peak_memory()
        results = derivative(*inputs)
        return peak_memory() - before - sum(x.nbytes for x in results)

    peak(64)  # what the first call of all allocates stays
    assert peak(4096) < 40 << 20


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
