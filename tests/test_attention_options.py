"""The options of attention: where each one ends, all at once, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fused
from fused import _route, reference
from fused._attention import make_options
from fused._attention_composite import Options, dropout_mask
from fused._attention_function import AttentionFunction
from fused.functional import (
    attention_with_kv_cache,
    merge_attention,
    scaled_dot_product_attention,
    varlen_attention,
)
from fused.testing.attention import draw_grads, run_fused
from fused.testing.cases.attention import CASES

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
EVERYTHING = next(case for case in CASES if case.name == "everything")


def visible(rows: int, keys: int, options: dict) -> Tensor:
    """Which keys the kernels let each row see: with equal scores they weigh the same."""
    q, k = torch.zeros(1, 1, rows, 1), torch.zeros(1, 1, keys, 1)
    identity = torch.eye(keys)[None, None]
    return scaled_dot_product_attention(q, k, identity, **options)[0, 0] > 0


@pytest.mark.parametrize("causal", ["", "top_left", "bottom_right"])
@pytest.mark.parametrize(
    "window", [None, (0, 0), (0, -1), (-1, 0), (3, 0), (0, 2), (31, 33), (-1, -1)]
)
@pytest.mark.parametrize(("rows", "keys"), [(5, 5), (5, 69), (69, 5), (66, 66), (100, 130)])
def test_who_sees_whom(
    rows: int, keys: int, window: tuple[int, int] | None, causal: str, backend: torch.device
) -> None:
    options = {"window": window}
    if causal:
        options |= {"is_causal": True, "causal_alignment": causal}
    left, right = window or (-1, -1)
    expected = torch.zeros(rows, keys, dtype=torch.bool)
    for i in range(rows):
        middle = i + keys - rows
        for j in range(keys):
            sees = (left < 0 or j >= middle - left) and (right < 0 or j <= middle + right)
            sees = sees and (causal != "top_left" or j <= i)
            expected[i, j] = sees and (causal != "bottom_right" or j <= middle)
    assert torch.equal(visible(rows, keys, options).cpu(), expected)


@pytest.mark.parametrize(("rows", "keys"), [(5, 5), (3, 5), (5, 3)])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_a_causal_bias_is_the_mask_that_it_means(bias: Callable, rows: int, keys: int) -> None:
    of_rows, mask = bias(rows, keys), bias(rows, keys)._materialize()
    q, k, v = torch.randn(2, 4, rows, 8), *torch.randn(2, 2, 4, keys, 8)
    expected = scaled_dot_product_attention(q, k, v, mask, softcap=3.0)
    actual = scaled_dot_product_attention(q, k, v, of_rows, softcap=3.0)
    assert type(actual) is Tensor
    torch.testing.assert_close(actual, expected)
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, of_rows, softcap=3.0), expected)
    assert fused.explain(scaled_dot_product_attention, q, k, v, of_rows).paths[0] != "composite"

    lengths = torch.full((2,), keys, dtype=torch.int32)
    expected = attention_with_kv_cache(q, k, v, cache_seqlens=lengths, attn_mask=mask)
    actual = attention_with_kv_cache(q, k, v, cache_seqlens=lengths, attn_mask=of_rows)
    assert torch.equal(actual, expected)
    packed = [t[0].transpose(0, 1) for t in (q, k, v)]
    bounds = [torch.tensor([0, n], dtype=torch.int32) for n in (rows, keys)]
    expected = varlen_attention(*packed, *bounds, attn_mask=mask)
    assert torch.equal(varlen_attention(*packed, *bounds, attn_mask=of_rows), expected)

    module = fused.Attention(8, 2, batch_first=True)
    for need_weights in (False, True):
        expected, _ = module(q[0], k[0], k[0], None, need_weights, ~mask)
        assert torch.equal(module(q[0], k[0], k[0], None, need_weights, of_rows)[0], expected)


def test_a_causal_bias_of_other_lengths_or_beside_is_causal() -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"lengths of query and key \[3, 3\], got \[3, 5\]"):
        scaled_dot_product_attention(q, q, q, causal_lower_right(3, 5))
    with pytest.raises(ValueError, match=r"^attention: is_causal must be False with a CausalBias"):
        scaled_dot_product_attention(q, q, q, causal_lower_right(3, 3), is_causal=True)


@pytest.mark.parametrize("window", [(40, 24), (0, 0), (-1, 0), (0, -1)])
def test_what_no_row_of_a_tile_sees_is_not_read(
    window: tuple[int, int], backend: torch.device
) -> None:
    # The longest tile of any kernel has 96 own rows and 64 others; what lies further away may be
    # NaN and nobody notices, forward or backward.
    far, length = 96 + 64, 480
    left, right = (length if bound < 0 else bound for bound in window)
    for middle in (0, 200, length - 1):
        q, k, v, grad_out = torch.randn(4, 1, 1, length, 4, device=backend).unbind()
        place = torch.arange(length)
        k[:, :, (place < middle - left - far) | (place > middle + right + far)] = torch.nan
        q[:, :, (place < middle - right - far) | (place > middle + left + far)] = torch.nan
        results = run_fused([q, k, v], {"window": window}, [grad_out])
        # A key's gradient takes in all that is seen by those who see the key.
        bounded = ["grad of key", "grad of value"] if -1 not in window else []
        for name in ["out", "grad of query", *bounded]:
            assert results[name][0, 0, middle].isfinite().all(), name


def test_everything_with_dropout(backend: torch.device) -> None:
    tensors, options = EVERYTHING.make(torch.float64, backend)
    options.pop("enable_gqa"), options.pop("return_lse")
    leaves = [*tensors, *(options[name] for name in ("attn_mask", "alibi_slopes", "sink"))]
    for leaf in leaves:
        leaf.requires_grad_()
    rng = torch.tensor([42, 43], device=backend)
    constants = make_options(tensors[0], dropout_p=0.3, **options)._replace(rng=rng)
    out, _ = AttentionFunction.apply(*tensors, *constants)
    keep = dropout_mask(
        Options(rng=rng, dropout_p=0.3), out.new_empty(*out.shape[:3], tensors[1].shape[2])
    )
    assert 0.6 < (keep > 0).double().mean() < 0.8
    expected = reference.scaled_dot_product_attention(*tensors, keep=keep, **options)
    torch.testing.assert_close(out, expected)
    grad_out = torch.randn_like(out)
    for actual, truth in zip(
        torch.autograd.grad(out, leaves, grad_out), torch.autograd.grad(expected, leaves, grad_out)
    ):
        torch.testing.assert_close(actual, truth)


def test_gradients_of_those_who_ask(backend: torch.device) -> None:
    tensors, options = EVERYTHING.make(torch.float64, backend)
    options.pop("return_lse")
    inputs = dict(zip(("query", "key", "value"), tensors))
    inputs |= {name: x for name, x in options.items() if isinstance(x, Tensor)}
    options = {name: x for name, x in options.items() if name not in inputs}
    grad_out = draw_grads(tensors)[0]

    def gradients(names: list[str]) -> dict[str, Tensor]:
        leaves = {name: x.detach() for name, x in inputs.items()}
        for name in names:
            leaves[name].requires_grad_()
        out = scaled_dot_product_attention(**leaves, **options)
        wanted = [leaves[name] for name in names]
        return dict(zip(names, torch.autograd.grad(out, wanted, grad_out), strict=True))

    everyone = gradients(list(inputs))
    for name in inputs:
        assert torch.equal(gradients([name])[name], everyone[name]), name


def test_the_same_bits_again_and_in_any_batch(backend: torch.device) -> None:
    case = dataclasses.replace(EVERYTHING, mask="additive [S, T]", return_lse=False)
    tensors, options = case.make(torch.float32, backend)
    grads_out = draw_grads(tensors)
    together = run_fused(tensors, options, grads_out)
    again = run_fused(tensors, options, grads_out)
    alone = run_fused([t[1:2] for t in tensors], options, [g[1:2] for g in grads_out])
    for name in together:
        assert torch.equal(together[name], again[name]), name
    for name in ("out", "grad of query", "grad of key", "grad of value"):
        assert torch.equal(together[name][1:2], alone[name]), name


@pytest.mark.usefixtures("threads")
def test_the_same_bits_with_any_number_of_threads() -> None:
    case = dataclasses.replace(EVERYTHING, mask="additive [T]")
    tensors, options = case.make(torch.float32, "cpu")
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run_fused(tensors, options, draw_grads(tensors)))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


def test_a_hidden_nan_has_no_gradient_through_a_softcap(backend: torch.device) -> None:
    q, k, v = torch.randn(3, 1, 1, 9, 4, device=backend).unbind()
    k[..., 4, :] = torch.nan
    mask = torch.ones(9, dtype=torch.bool, device=backend)
    mask[4] = False
    k.requires_grad_()
    out = scaled_dot_product_attention(q, k, v, mask, softcap=2.0)
    assert out.isfinite().all()
    grad = torch.autograd.grad(out.sum(), k)[0]
    assert grad.isfinite().all() and (grad[..., 4, :] == 0).all()


# Of so many queries that they run by each kernel there is: split or decoded, in tiles, and, in
# float16, by tensor cores.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("where", ["query", "mask", "sink"])
def test_a_row_with_a_score_of_infinity_is_nan_and_no_other(
    where: str, queries: int, dtype: torch.dtype, backend: torch.device
) -> None:
    q = torch.rand(1, 2, queries, 8, device=backend).to(dtype)
    k, v = torch.rand(2, 1, 2, 300, 8, device=backend).to(dtype).unbind()
    mask, sink = torch.zeros(2, queries, 1, device=backend), torch.zeros(2, device=backend)
    {"query": q[0, 1], "mask": mask[1], "sink": sink}[where][1] = torch.inf
    out, lse = scaled_dot_product_attention(q, k, v, mask, sink=sink, return_lse=True)
    expected = torch.zeros(1, 2, queries, dtype=torch.bool, device=backend)
    expected[0, 1, slice(None) if where == "sink" else 1] = True
    assert torch.equal(lse.isnan(), expected) and not lse.isinf().any()
    assert torch.equal(out.isnan().all(-1), expected) and torch.equal(out.isnan().any(-1), expected)


def test_a_row_without_keys_gives_the_sink_no_gradient(backend: torch.device) -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 4, device=backend).unbind()
    sink = torch.tensor([1.0, -3.0], device=backend, requires_grad=True)
    mask = torch.zeros(6, 6, dtype=torch.bool, device=backend)
    out, lse = scaled_dot_product_attention(q, k, v, mask, sink=sink, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert (torch.autograd.grad(out.sum() + lse.sum(), sink)[0] == 0).all()


def test_a_mask_and_causality_mean_both_as_on_stocks_cpu() -> None:
    q, k, v = torch.randn(3, 2, 2, 33, 8, dtype=torch.float64).unbind()
    for mask in (torch.rand(33, 33) > 0.3, torch.randn(2, 1, 33, 33, dtype=torch.float64)):
        mask.diagonal(dim1=-2, dim2=-1).fill_(1)
        expected = reference.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
        actual = scaled_dot_product_attention(q, k, v, mask, is_causal=True)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        (ValueError, "window must have bounds of at least -1, got (-2, 0)", {"window": (-2, 0)}),
        (ValueError, "window must have bounds of at least -1, got (0, -2)", {"window": (0, -2)}),
        (ValueError, "window must be (left, right), got 3", {"window": 3}),
        (ValueError, "window must be (left, right), got (1,)", {"window": (1,)}),
        (TypeError, "alibi_slopes must be a tensor, got list", {"alibi_slopes": [0.5, 0.5]}),
        (ValueError, "softcap must be positive and finite, got 0.0", {"softcap": 0.0}),
        (ValueError, "softcap must be positive and finite, got inf", {"softcap": float("inf")}),
        (
            ValueError,
            "causal_alignment must be 'top_left' or 'bottom_right', got 'left'",
            {"causal_alignment": "left"},
        ),
        (
            ValueError,
            "sink must have one value for each head of query (2), got [3]",
            {"sink": torch.zeros(3)},
        ),
        (
            ValueError,
            "alibi_slopes must have one value for each head of query (2), got [2, 1]",
            {"alibi_slopes": torch.zeros(2, 1)},
        ),
        (TypeError, "sink must be floating, got torch.int64", {"sink": torch.zeros(2).long()}),
    ],
    ids=str,
)
def test_errors(error: type, text: str, options: dict) -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(error) as caught:
        scaled_dot_product_attention(q, q, q, **options)
    assert str(caught.value) == f"attention: {text}"


def test_nested_inputs_have_stocks_options_alone() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 2, 4), torch.randn(5, 2, 4)])
    q = nested.transpose(1, 2)
    with pytest.raises(NotImplementedError, match=r"^attention: nested and sparse inputs must"):
        scaled_dot_product_attention(q, q, q, softcap=1.0)


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("window_left must be at least -1, got -2", {"window_left": -2}),
        ("window_right must be at least -1, got -2", {"window_right": -2}),
        ("softcap must be positive and finite, or 0 for none, got -1", {"softcap": -1.0}),
        ("sink must have the shape [2], got [3]", {"sink": torch.zeros(3)}),
        ("alibi_slopes must have the shape [2], got [1]", {"alibi_slopes": torch.zeros(1)}),
        (
            "alibi_slopes must be float32 (float64 for float64), got Double",
            {"alibi_slopes": torch.zeros(2).double()},
        ),
        ("sink must be contiguous, got strides [2]", {"sink": torch.zeros(4)[::2]}),
    ],
    ids=str,
)
def test_errors_of_the_op(text: str, change: dict, backend: torch.device) -> None:
    q = torch.randn(1, 2, 3, 4, device=backend)
    for call in (_route.kernels().attention_forward, torch.ops.fused.attention_forward):
        with pytest.raises((ValueError, TypeError)) as caught:
            call(q, q, q, *Options(**change))
        assert str(caught.value).splitlines()[0] == f"attention: {text}"


def test_lengths_beyond_the_kernels_are_refused(backend: torch.device) -> None:
    short = torch.zeros(1, 1, 1, 1, device=backend)
    long = short.expand(1, 1, 2**30 + 1, 1)
    for q, k, name in ((long, short, "q"), (short, long, "k")):
        with pytest.raises(NotImplementedError) as caught:
            _route.kernels().attention_forward(q, k, k, *Options())
        assert str(caught.value).splitlines()[0] == (
            f"attention: no kernel for a length of {name} above 2^30"
        )
        decision = fused.explain(scaled_dot_product_attention, q, k, k).decisions[0]
        assert decision.path == "composite"
        assert any("(at most 2^30)" in reason for reason in decision.refused.values())
    longest = long[:, :, : 2**30]
    assert fused.explain(scaled_dot_product_attention, longest, longest, longest).paths[0] != (
        "composite"
    )


def merged(q: Tensor, k: Tensor, v: Tensor, parts: list[int], **options: object) -> tuple:
    chunks = zip(k.split(parts, -2), v.split(parts, -2))
    results = [scaled_dot_product_attention(q, *kv, return_lse=True, **options) for kv in chunks]
    return merge_attention([out for out, _ in results], [lse for _, lse in results])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_parts_are_the_whole(dtype: torch.dtype, backend: torch.device) -> None:
    q, k, v = torch.randn(3, 2, 3, 50, 8, device=backend).to(dtype).unbind()
    whole = scaled_dot_product_attention(q, k, v, softcap=3.0, return_lse=True)
    parts = merged(q, k, v, [7, 33, 10], softcap=3.0)
    truth = reference.scaled_dot_product_attention(q, k, v, softcap=3.0, return_lse=True)
    assert parts[0].dtype == dtype and parts[1].dtype == whole[1].dtype
    for part, expected, of_whole in zip(parts, truth, whole):
        unit = torch.finfo(part.dtype).eps
        allowed = 2 * (of_whole - expected).abs().max() + 4 * unit * expected.abs().max()
        assert (part - expected).abs().max() <= allowed


def test_merge_attention_has_derivatives() -> None:
    q, k, v = (torch.randn(1, 1, 4, 2).double().requires_grad_() for _ in range(3))
    function = lambda *qkv: merged(*qkv, [1, 3])  # noqa: E731
    assert torch.autograd.gradcheck(function, (q, k, v))
    assert torch.autograd.gradgradcheck(function, (q, k, v))


def test_merging_rows_without_keys_gives_zeros() -> None:
    outs = [torch.zeros(1, 1, 3, 2, requires_grad=True), torch.randn(1, 1, 3, 2)]
    nothing = torch.full((1, 1, 3), -torch.inf)
    lses = [nothing.clone().requires_grad_(), nothing.clone().requires_grad_()]
    with torch.no_grad():
        lses[1][..., 1] = 0.5
    outs[1][..., [0, 2], :] = 0
    out, lse = merge_attention(outs, lses)
    assert lse.tolist() == [[[-torch.inf, 0.5, -torch.inf]]]
    assert (out[..., [0, 2], :] == 0).all() and torch.equal(out[..., 1, :], outs[1][..., 1, :])
    grads = torch.autograd.grad(out.sum() + lse[..., 1].sum(), [outs[0], *lses])
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(grads[2], torch.tensor([[[0.0, 1.0, 0.0]]]))
    assert (grads[2][..., [0, 2]] == 0).all()


@pytest.mark.parametrize(
    ("outputs", "lses"),
    [([], []), ([(1, 1, 3, 2)], []), ([(1, 1, 3, 2)], [(1, 1, 2)]),
     ([(1, 1, 3, 2), (1, 1, 3, 4)], [(1, 1, 3), (1, 1, 3)])],
)  # fmt: skip
def test_merge_attention_refuses(outputs: list, lses: list) -> None:
    with pytest.raises(ValueError, match=r"^merge_attention: lses must"):
        merge_attention([torch.zeros(s) for s in outputs], [torch.zeros(s) for s in lses])
