"""Attention in forward mode: one kernel pass against the definition, and what lies around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fused
from fused import _route, reference
from fused._attention_composite import Options, dropout_mask
from fused.functional import scaled_dot_product_attention, varlen_attention
from fused.testing import emulated_cuda
from fused.testing.attention import assert_case, draw_tangents, run_fused, run_tangents
from fused.testing.cases.attention import CASES, VARLEN_CASES, AttentionCase

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# PyTorch makes no dual of a tensor whose elements share memory.
OF_FORWARD_MODE = [case for case in CASES + VARLEN_CASES if case.layout != "expanded"]
# Few and small: the emulator is slow. Together they have every option.
EMULATED = [
    AttentionCase("plain", 1, 1, None, 5, 7, 3),
    AttentionCase("two tiles each way, wide", 1, 1, None, 66, 35, 34, 66, alibi=True),
    AttentionCase(
        "everything", 2, 2, 1, 9, 37, 5, 6, mask="additive [B, 1, S, T]", is_causal=True,
        causal_alignment="bottom_right", window=(30, 2), softcap=1.5, alibi=True, sink=True,
        return_lse=True,
    ),
    AttentionCase("blind", 1, 2, None, 6, 9, 3, mask="blind [S, T]", sink=True, return_lse=True),
    AttentionCase(
        "packed", 1, 2, None, head_dim=3, lengths=((5, 7), (0, 3), (2, 0), (3, 34)), rest=2,
        mask="additive [B, 1, S, T]", is_causal=True, return_lse=True,
    ),
    AttentionCase("no keys", 1, 1, keys=0, sink=True),
]  # fmt: skip
EVERYTHING = EMULATED[2]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", OF_FORWARD_MODE, ids=lambda c: c.name)
def test_results_and_tangents(case: AttentionCase, dtype: torch.dtype) -> None:
    assert_case(case, dtype, torch.device("cpu"), forward_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", EMULATED, ids=lambda c: c.name)
def test_results_and_tangents_emulated(case: AttentionCase, dtype: torch.dtype) -> None:
    with emulated_cuda() as launches:
        assert_case(case, dtype, torch.device("cpu"), forward_mode=True)
    assert {name for name in launches.counts() if "tangent" in name}


def function_of(case: AttentionCase) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """A case as a function of all that may have a tangent, in float64."""
    tensors, options = case.make(torch.float64, "cpu")
    floating = [
        name for name, x in options.items() if isinstance(x, Tensor) and x.is_floating_point()
    ]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        own = options | dict(zip(floating, inputs[3:], strict=True)) | {"return_lse": True}
        attend = varlen_attention if case.lengths else scaled_dot_product_attention
        out, lse = attend(*inputs[:3], **own)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    return function, [*tensors, *(options[name] for name in floating)]


@pytest.mark.parametrize("case", EMULATED, ids=lambda c: c.name)
def test_gradcheck(case: AttentionCase, backend: torch.device) -> None:
    function, inputs = function_of(case)
    leaves = [x.to(backend).requires_grad_() for x in inputs]
    options = {"check_backward_ad": False, "check_forward_ad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(function, leaves, **options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the attention kernels that are called, in order."""
    names: list[str] = []
    module = _route.kernels()

    def spy(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            names.append(name)
            return getattr(module, name)(*args)

        return call

    spies = {name: spy(name) for name in dir(module) if name.startswith("attention_")}
    spied = SimpleNamespace(**{**vars(module), **spies})
    monkeypatch.setattr(_route, "_kernels", spied)
    return names


def test_one_pass_by_either_interface(calls: list[str]) -> None:
    function, inputs = function_of(EVERYTHING)
    tangents = [torch.randn_like(x) for x in inputs]
    results, pushed = torch.func.jvp(function, tuple(inputs), tuple(tangents))
    assert calls == ["attention_tangent"]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        pairs = [forward_ad.unpack_dual(x) for x in function(*duals)]
    assert calls == ["attention_tangent"] * 2
    for result, tangent, pair in zip(results, pushed, pairs, strict=True):
        assert torch.equal(result, pair.primal) and torch.equal(tangent, pair.tangent)


@pytest.mark.parametrize("case", [EVERYTHING, EMULATED[4]], ids=lambda c: c.name)
def test_explain_says_kernel(case: AttentionCase) -> None:
    function, inputs = function_of(case)
    pushed = lambda *x: torch.func.jvp(function, x, x)  # noqa: E731

    def by_duals(*inputs: Tensor) -> tuple[Tensor, ...]:
        with forward_ad.dual_level():
            return function(*(forward_ad.make_dual(x, x.clone()) for x in inputs))

    for call in (pushed, by_duals):
        (path,) = fused.explain(call, *inputs).paths
        assert path.startswith("CPU kernel")


@pytest.mark.parametrize("which", range(6))
def test_one_tangent_alone(which: int, backend: torch.device) -> None:
    """What has no tangent is a constant, for which the kernels leave products out."""
    function, inputs = function_of(EVERYTHING)
    inputs = [x.to(backend) for x in inputs]
    order = [0, 1, 2, 5, 3, 4]  # of q, k, v, slopes, sink and mask
    zeros = [torch.zeros_like(x) for x in inputs]
    tangent = torch.randn_like(inputs[which])
    zeros[which] = tangent
    _, expected = torch.func.jvp(function, tuple(inputs), tuple(zeros))

    def of_one(x: Tensor) -> tuple[Tensor, ...]:
        return function(*inputs[:which], x, *inputs[which + 1 :])

    _, alone = torch.func.jvp(of_one, (inputs[which],), (tangent,))
    torch.testing.assert_close(alone, expected)
    assert all(x.count_nonzero() for x in alone) or order[which] == 2


def test_the_bits_of_a_repeated_run_and_of_a_batch(backend: torch.device) -> None:
    q, k, v = torch.randn(3, 3, 2, 70, 8, device=backend).unbind()
    options = {"is_causal": True, "return_lse": True}
    tangents = draw_tangents([q, k, v], {})
    first, second = (run_fused([q, k, v], options, tangents, run_tangents) for _ in range(2))
    alone = run_fused(
        [x[1:2] for x in (q, k, v)], options, [x[1:2] for x in tangents], run_tangents
    )
    plain = scaled_dot_product_attention(q, k, v, **options)
    for name, result in first.items():
        assert torch.equal(result, second[name])
        assert torch.equal(result[1:2], alone[name])
    assert torch.equal(first["out"], plain[0]) and torch.equal(first["lse"], plain[1])


def test_dropout(backend: torch.device) -> None:
    q, k, v = (torch.randn(2, 2, n, 4, device=backend).double() for n in (9, 37, 37))
    tangents = [torch.randn_like(x) for x in (q, k, v)]
    options = Options(rng=torch.tensor([42, 43], device=backend), dropout_p=0.3)
    keep = dropout_mask(options, q.new_empty(2, 2, 9, 37))
    _, _, _, actual, _ = _route.kernels().attention_tangent(
        q, k, v, *options, *tangents, None, None, None
    )
    function = lambda *x: reference.scaled_dot_product_attention(*x, keep=keep)  # noqa: E731
    torch.testing.assert_close(actual, torch.func.jvp(function, (q, k, v), tuple(tangents))[1])


def test_nan_and_infinity_stay_in_their_row(backend: torch.device) -> None:
    q, k, v = torch.randn(3, 2, 2, 40, 8, device=backend).unbind()
    tangents = draw_tangents([q, k, v], {})
    tangents[0][0, 1, 3, 2] = torch.nan
    tangents[0][1, 0, 7] = torch.inf
    results = run_fused([q, k, v], {"return_lse": True}, tangents, run_tangents)
    expected = torch.zeros(2, 2, 40, dtype=torch.bool, device=backend)
    expected[0, 1, 3] = expected[1, 0, 7] = True
    assert torch.equal(results["tangent of lse"].isfinite(), ~expected)
    assert torch.equal(results["tangent of out"].isfinite().all(-1), ~expected)
    assert results["out"].isfinite().all()


def loss_of(function: Callable[..., tuple[Tensor, ...]], tangents: list[Tensor]) -> Callable:
    """A loss that has results and tangents in it, as training on both has."""

    def loss(*inputs: Tensor) -> Tensor:
        results, pushed = torch.func.jvp(function, inputs, tuple(tangents))
        return sum((x.sin() + t.sin() * x).sum() for x, t in zip(results, pushed, strict=True))

    return loss


def test_reverse_over_forward(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = function_of(EVERYTHING)
    tangents = [torch.randn_like(x) for x in inputs]
    loss = loss_of(function, tangents)
    leaves = [x.clone().requires_grad_() for x in inputs]
    by_autograd = torch.autograd.grad(loss(*leaves), leaves)
    by_func = torch.func.grad(loss, tuple(range(6)))(*inputs)
    assert calls == ["attention_tangent"] * 2
    monkeypatch.setattr(_route, "is_forward_mode", lambda *_: False)
    expected = torch.func.grad(loss, tuple(range(6)))(*inputs)
    torch.testing.assert_close(by_autograd, expected)
    torch.testing.assert_close(by_func, expected)


def test_gradients_of_the_tangents_themselves() -> None:
    function, inputs = function_of(EVERYTHING)

    def pushed(*inputs_and_tangents: Tensor) -> tuple[Tensor, ...]:
        of = inputs_and_tangents
        return torch.func.jvp(function, of[:6], of[6:])[1]

    leaves = [x.clone().requires_grad_() for x in (*inputs, *(torch.randn_like(x) for x in inputs))]
    assert torch.autograd.gradcheck(pushed, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(pushed, leaves, fast_mode=True)


def test_a_detached_tangent_leaves_the_backward_pass_to_the_kernels(calls: list[str]) -> None:
    # Fewer queries have a forward pass of their own, of other bits.
    function, inputs = function_of(dataclasses.replace(EVERYTHING, rows=25))
    leaves = [x.clone().requires_grad_() for x in inputs]
    tangents = tuple(torch.randn_like(x) for x in inputs)
    (out, lse), (out_tangent, _) = torch.func.jvp(function, tuple(leaves), tangents)
    target = out_tangent.detach()
    grads = torch.autograd.grad((out * target).sum() + lse.sum(), leaves)
    assert calls == ["attention_tangent", "attention_backward"]
    out, lse = function(*leaves)
    expected = torch.autograd.grad((out * target).sum() + lse.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("mapped", [(0,), (0, 1, 2), (5,), (3, 4), (0, 5)], ids=str)
@pytest.mark.parametrize("examples", [1, 3])
def test_vmap(mapped: tuple[int, ...], examples: int, calls: list[str]) -> None:
    function, inputs = function_of(EVERYTHING)
    tangents = [torch.randn_like(x) for x in inputs]
    in_dims = tuple(0 if i in mapped else None for i in range(6))
    many = [torch.stack([x + i for i in range(examples)]) if i in mapped else x
            for i, x in enumerate(inputs)]  # fmt: skip

    def pushed(*inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(function, inputs, tuple(tangents))[1]

    results = torch.func.vmap(pushed, in_dims)(*many)
    assert calls == ([] if {3, 4} & {*mapped} else ["attention_tangent"])
    for i in range(examples):
        one = pushed(*(x[i] if n in mapped else x for n, x in enumerate(many)))
        torch.testing.assert_close(tuple(x[i] for x in results), one)


def test_jacfwd_and_hessian() -> None:
    function, inputs = function_of(EMULATED[0])
    of_q = lambda q: function(q, *inputs[1:])[0]  # noqa: E731
    torch.testing.assert_close(
        torch.func.jacfwd(of_q)(inputs[0]), torch.func.jacrev(of_q)(inputs[0])
    )
    loss = lambda q: of_q(q).sin().sum()  # noqa: E731
    hessian = torch.func.hessian(loss)(inputs[0])
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacfwd(loss))(inputs[0]), hessian)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacfwd(loss))(inputs[0]), hessian)


def test_a_gradient_that_carries_a_tangent() -> None:
    """The tangent of a backward pass that nobody differentiates again."""
    q, k, v, weight, tangent = torch.randn(5, 1, 2, 7, 4, dtype=torch.float64).unbind()
    q.requires_grad_()
    with forward_ad.dual_level():
        out = scaled_dot_product_attention(q, k, v)
        dual = forward_ad.make_dual(weight, tangent)
        (grad,) = torch.autograd.grad((out * dual).sum(), q)
        actual = forward_ad.unpack_dual(grad).tangent
    out = scaled_dot_product_attention(q, k, v)
    assert actual is not None
    torch.testing.assert_close(actual, torch.autograd.grad(out, q, tangent)[0])


@pytest.mark.parametrize("case", [EVERYTHING, EMULATED[4]], ids=lambda c: c.name)
def test_opcheck(case: AttentionCase) -> None:
    (q, k, v), options = case.make(torch.float32, "cpu")
    mask = options["attn_mask"]
    lengths = [options.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k")]
    given = (q, k, v, *Options(mask, None, None, None, *lengths), q, k, v, mask, None, None)
    torch.library.opcheck(torch.ops.fused.attention_tangent.default, given)


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (
            ValueError,
            "q_tangent must have the shape [2, 2, 5, 8], got [2, 2, 5, 7]",
            {0: (2, 2, 5, 7)},
        ),
        (ValueError, "sink_tangent must come with sink, got None", {5: (2,)}),
        (TypeError, "k_tangent must have the dtype of k (Float), got Double", {1: torch.float64}),
        (TypeError, "attn_mask_tangent must come with a floating attn_mask, got Bool", {3: None}),
    ],
)
def test_errors(error: type, text: str, change: dict[int, Any], backend: torch.device) -> None:
    (q, k, v), options = AttentionCase("plain", mask="bool [S, T]").make(torch.float32, backend)
    mask = options["attn_mask"]
    tangents: list[Tensor | None] = [None] * 6
    for i, wrong in change.items():
        if isinstance(wrong, tuple):
            tangents[i] = torch.zeros(wrong, device=backend)
        else:
            tangents[i] = mask if wrong is None else k.to(wrong)
    for call in (_route.kernels().attention_tangent, torch.ops.fused.attention_tangent):
        with pytest.raises(error) as caught:
            call(q, k, v, *Options(mask), *tangents)
        assert str(caught.value).splitlines()[0] == f"attention: {text}"
