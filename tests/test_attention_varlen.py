"""Attention over packed sequences: the definition, the bits of each sequence alone, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fused
from fused.functional import scaled_dot_product_attention, varlen_attention
from fused.testing.attention import assert_case, draw_grads, run_fused
from fused.testing.cases.attention import VARLEN_CASES, AttentionCase

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
EVERYTHING = next(case for case in VARLEN_CASES if case.name == "packed everything")


# The other dtypes differ in how a tile is loaded, not in where it lies.
IN_ALL_DTYPES = ("packed", "ragged, odd strides", "packed everything")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, d) for c in VARLEN_CASES for d in DTYPES if d == torch.float32 or c.name in IN_ALL_DTYPES],
    ids=lambda x: str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x.name,
)
def test_forward_and_gradients(
    case: AttentionCase, dtype: torch.dtype, backend: torch.device
) -> None:
    assert_case(case, dtype, backend)


def alone(tensors: list[Tensor], options: dict, grads_out: list[Tensor], index: int) -> dict:
    """What `run_fused` gives for one of the sequences in a batch of its own, [S, H, D]."""
    options = dict(options)
    rows, keys = (
        slice(*options.pop(name)[index : index + 2].tolist())
        for name in ("cu_seqlens_q", "cu_seqlens_k")
    )
    mask = options.pop("attn_mask", None)
    if mask is not None:
        options["attn_mask"] = mask[
            index : index + 1, :, : rows.stop - rows.start, : keys.stop - keys.start
        ]
    operands = [x[part].transpose(0, 1)[None] for x, part in zip(tensors, (rows, keys, keys))]
    grads = [grads_out[0][rows].transpose(0, 1)[None], grads_out[1][:, rows][None]]
    results = run_fused(operands, options, grads)
    return {
        "lse": results["lse"][0],
        "out": results["out"][0].transpose(0, 1),
        "grad of q": results["grad of query"][0].transpose(0, 1),
        "grad of k": results["grad of key"][0].transpose(0, 1),
        "grad of v": results["grad of value"][0].transpose(0, 1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_as_each_sequence_alone(dtype: torch.dtype, backend: torch.device) -> None:
    tensors, options = EVERYTHING.make(dtype, backend)
    grads_out = draw_grads(tensors)
    together = run_fused(tensors, options, grads_out)
    again = run_fused(tensors, options, grads_out)
    assert all(torch.equal(together[name], again[name]) for name in together)
    for index in range(len(EVERYTHING.lengths)):
        rows, keys = (
            slice(*options[name][index : index + 2].tolist())
            for name in ("cu_seqlens_q", "cu_seqlens_k")
        )
        for name, expected in alone(tensors, options, grads_out, index).items():
            whole = together[name]
            part = whole[:, rows] if name == "lse" else whole[keys if name[-1] in "kv" else rows]
            assert torch.equal(part, expected), (name, index)


def test_rows_behind_the_last_sequence_give_zeros_and_get_none(backend: torch.device) -> None:
    q, k, v = (torch.randn(9, 2, 4, device=backend, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        for x in (q, k, v):
            x[6:] = torch.nan
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32, device=backend)
    out, lse = varlen_attention(q, k, v, cu_seqlens, cu_seqlens, return_lse=True)
    assert (out[6:] == 0).all() and (lse[:, 6:] == -torch.inf).all()
    for grad in torch.autograd.grad(out[:6].square().sum(), (q, k, v)):
        assert grad.isfinite().all() and (grad[6:] == 0).all() and (grad[:6] != 0).any()


@pytest.mark.parametrize("rows", [0, 5])
def test_no_sequences(rows: int, backend: torch.device) -> None:
    q = torch.randn(rows, 2, 4, device=backend, requires_grad=True)
    none = torch.zeros(1, dtype=torch.int32, device=backend)
    out = varlen_attention(q, q, q, none, none, sink=torch.zeros(2, device=backend))
    assert out.shape == q.shape and (out == 0).all()
    assert (torch.autograd.grad(out.sum(), q)[0] == 0).all()


def test_nan_and_infinity_stay_in_their_sequence(backend: torch.device) -> None:
    lengths = ((30, 40), (33, 29), (2, 70))
    (q, k, v), options = AttentionCase("nan", lengths=lengths).make(torch.float32, backend)
    clean = run_fused([q, k, v], options, draw_grads([q, k, v]))
    for x, first, last in ((q, 30, 63), (k, 40, 69), (v, 40, 69)):
        x[first:last] = torch.nan
        x[first, 0, 0] = torch.inf
    broken = run_fused([q, k, v], options, draw_grads([q, k, v]))
    for name, first, last in (("q", 30, 63), ("k", 40, 69), ("v", 40, 69)):
        result, expected = broken[f"grad of {name}"], clean[f"grad of {name}"]
        assert torch.equal(result[:first], expected[:first])
        assert torch.equal(result[last:], expected[last:])
    assert torch.equal(broken["out"][:30], clean["out"][:30])
    assert torch.equal(broken["out"][63:], clean["out"][63:])
    assert broken["out"][30:63].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(50, 41), (0, 41), (50, 0)])
def test_a_mask_hides_what_lies_beyond_it(
    rows: int, columns: int, dtype: torch.dtype, backend: torch.device
) -> None:
    (q, k, v), options = AttentionCase("m", lengths=((70, 99), (3, 2))).make(dtype, backend)
    small = torch.randn(2, 1, rows, columns, device=backend).to(dtype).requires_grad_()
    mask = torch.full((2, 1, 70, 99), -torch.inf, dtype=dtype, device=backend)
    mask[:, :, :rows, :columns] = small.detach()
    results, expected = (
        run_fused([q, k, v], options | {"attn_mask": m}, draw_grads([q, k, v]))
        for m in (small, mask)
    )
    expected["grad of attn_mask"] = expected["grad of attn_mask"][:, :, :rows, :columns]
    for name in results:
        assert torch.equal(results[name], expected[name]), name


def test_dropout_is_that_of_the_batch(backend: torch.device) -> None:
    q = torch.randn(2, 3, 40, 4, device=backend)
    torch.manual_seed(5)
    padded = scaled_dot_product_attention(q, q, q, dropout_p=0.4)
    torch.manual_seed(5)
    cu_seqlens = torch.tensor([0, 40, 80], dtype=torch.int32, device=backend)
    packed = q.transpose(1, 2).reshape(80, 3, 4)
    out = varlen_attention(packed, packed, packed, cu_seqlens, cu_seqlens, dropout_p=0.4)
    assert torch.equal(out.view(2, 40, 3, 4).transpose(1, 2), padded)


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (TypeError, "cu_seqlens_q must be int32, got Long", {"cu_seqlens_q": [0, 2, 5]}),
        (
            ValueError,
            "cu_seqlens_q must rise from 0 to at most the rows of q (5), got [0, 2, 6]",
            {"cu_seqlens_q": [0, 2, 6]},
        ),
        (
            ValueError,
            "cu_seqlens_k must rise from 0 to at most the rows of k (7), got [0, 3, 2]",
            {"cu_seqlens_k": [0, 3, 2]},
        ),
        (
            ValueError,
            "cu_seqlens_k must rise from 0 to at most the rows of k (7), got [1, 3, 7]",
            {"cu_seqlens_k": [1, 3, 7]},
        ),
        (
            ValueError,
            "cu_seqlens_k must have the size of cu_seqlens_q (3), got 2",
            {"cu_seqlens_k": [0, 7]},
        ),
        (
            ValueError,
            "cu_seqlens_q must have one element more than there are sequences, got none",
            {"cu_seqlens_q": []},
        ),
        (ValueError, "k must have the heads of q (2) without enable_gqa, got [7, 1, 4]", "heads"),
        (ValueError, "q must have 3 dimensions, got [1, 5, 2, 4]", "dimensions"),
        (ValueError, "attn_mask must be broadcastable to [2, 2, 9, 9], got [3, 2, 9, 9]", "mask"),
    ],
    ids=str,
)
def test_errors(error: type, text: str, change: dict | str, backend: torch.device) -> None:
    (q, k, v), options = AttentionCase("e", lengths=((2, 3), (3, 4)), head_dim=4).make(
        torch.float32, backend
    )
    if isinstance(change, dict):
        dtype = torch.int64 if error is TypeError else torch.int32
        options |= {name: torch.tensor(x, dtype=dtype) for name, x in change.items()}
    elif change == "heads":
        k, v = k[:, :1], v[:, :1]
        options["enable_gqa"] = False
    elif change == "dimensions":
        q = q[None]
    elif change == "mask":
        options["attn_mask"] = torch.zeros(3, 2, 9, 9, device=backend)
    with pytest.raises(error) as caught:
        varlen_attention(q, k, v, **options)
    assert str(caught.value).splitlines()[0] == f"attention: {text}"


def everything() -> tuple:
    lengths = ((2, 3), (0, 2), (3, 0), (2, 4))
    case = AttentionCase(
        "everything", heads=2, heads_kv=1, lengths=lengths, rest=1, head_dim=3, head_dim_v=2,
        mask="additive [B, 1, S, T]", window=(2, 1), softcap=1.5, alibi=True, sink=True,
    )  # fmt: skip
    tensors, options = case.make(torch.float64, "cpu")
    names = ("attn_mask", "alibi_slopes", "sink")
    inputs = [x.detach().requires_grad_() for x in (*tensors, *(options.pop(n) for n in names))]

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        extras = dict(zip(names, inputs[3:]))
        out, lse = varlen_attention(*inputs[:3], **options, **extras, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)  # finite differences need numbers

    return function, inputs, options


def test_every_derivative() -> None:
    function, inputs, _ = everything()
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_transforms() -> None:
    function, inputs, _ = everything()

    def loss(*inputs: Tensor) -> Tensor:
        out, lse = function(*inputs)
        return out.square().sum() + lse.sin().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    detached = [x.detach() for x in inputs]
    places = tuple(range(len(inputs)))
    for a, b in zip(torch.func.grad(loss, argnums=places)(*detached), expected, strict=True):
        torch.testing.assert_close(a, b)
    batch = [torch.stack([x, x + 0.5]) for x in detached]
    for i, results in enumerate(zip(*torch.func.vmap(function)(*batch), strict=True)):
        torch.testing.assert_close(results, tuple(function(*(x[i] for x in batch))))


def test_second_derivative_with_dropout() -> None:
    (q, k, v), options = AttentionCase("d", lengths=((3, 4), (0, 0), (2, 5))).make(
        torch.float64, "cpu"
    )
    q.requires_grad_()

    def function(q: Tensor) -> Tensor:
        torch.manual_seed(0)
        return varlen_attention(q, k, v, dropout_p=0.3, **options)

    assert torch.autograd.gradcheck(function, q)
    assert torch.autograd.gradgradcheck(function, q)


def test_compiled_with_dynamic_shapes() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor, v: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        return varlen_attention(q, k, v, **options, is_causal=True, return_lse=True)

    for lengths in (((2, 3), (4, 5)), ((9, 1), (0, 0), (3, 20))):
        tensors, options = AttentionCase("c", lengths=lengths).make(torch.float32, "cpu")
        options = {name: options[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
        leaves = [x.requires_grad_() for x in tensors]
        results = compiled(*leaves, options)
        expected = varlen_attention(*leaves, **options, is_causal=True, return_lse=True)
        torch.testing.assert_close(results, expected)
        grads = [torch.autograd.grad(r[0].square().sum(), leaves) for r in (results, expected)]
        torch.testing.assert_close(*grads)


def test_opcheck() -> None:
    from fused._attention import make_options

    _, inputs, lengths = everything()
    constants = make_options(
        inputs[0].transpose(0, 1), inputs[3], alibi_slopes=inputs[4], sink=inputs[5]
    )._replace(cu_seqlens_q=lengths["cu_seqlens_q"], cu_seqlens_k=lengths["cu_seqlens_k"])
    forward, backward = torch.ops.fused.attention_forward, torch.ops.fused.attention_backward
    torch.library.opcheck(forward.default, (*inputs[:3], *constants))
    detached = [x.detach() for x in inputs]
    constants = constants._replace(
        attn_mask=detached[3], alibi_slopes=detached[4], sink=detached[5]
    )
    out, _, row_stats = forward(*detached[:3], *constants)
    arguments = (torch.ones_like(out), None, *detached[:3], out, row_stats, *constants, [True] * 6)
    torch.library.opcheck(backward.default, arguments)


def test_explain_says_kernel(backend: torch.device) -> None:
    tensors, options = EVERYTHING.make(torch.float32, backend)
    explained = fused.explain(varlen_attention, *tensors, **options, dropout_p=0.1)
    assert [decision.path != "composite" for decision in explained.decisions] == [True]
