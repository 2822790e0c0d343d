"""Attention where others look at it: derivatives, opcheck, compiled and exported graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fused
from fused._attention import make_options
from fused._attention_composite import Options
from fused.functional import scaled_dot_product_attention
from fused.testing.cases.attention import CASES, AttentionCase
from fused.testing.dispatch import OperatorLog

SMALL = [
    AttentionCase("small", 1, 2, 1, rows=3, keys=4, head_dim=3, head_dim_v=2, mask="bool [S, T]")
]


def double_inputs(case: AttentionCase) -> tuple[list[Tensor], dict]:
    tensors, options = case.make(torch.float64, "cpu")
    return [t.detach().requires_grad_() for t in tensors], options


@pytest.mark.parametrize("causal", [False, True])
def test_first_and_second_derivatives(causal: bool) -> None:
    # test_forward_and_gradients judges the first derivative of every backend, and the second is the
    # same composite on all.
    inputs, options = double_inputs(SMALL[0])
    if causal:
        options = {"is_causal": True, "enable_gqa": True}

    def function(*qkv: Tensor) -> Tensor:
        return scaled_dot_product_attention(*qkv, **options)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivative_with_dropout() -> None:
    from fused._attention_function import AttentionFunction

    inputs, _ = double_inputs(AttentionCase("dropout", 1, 1, rows=4, keys=6, head_dim=2))
    rng = torch.tensor([5, 6])

    def function(*qkv: Tensor) -> Tensor:
        return AttentionFunction.apply(*qkv, *Options(rng=rng, dropout_p=0.3))[0]

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivative_with_dropout_and_another_default_dtype() -> None:
    q = torch.randn(1, 1, 4, 2, requires_grad=True)
    torch.set_default_dtype(torch.float64)
    try:
        out = scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        grad = torch.autograd.grad(out.sum(), q, create_graph=True)[0]
        assert torch.autograd.grad(grad.sum(), q)[0].isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)


def test_forward_mode_and_functorch() -> None:
    (q, k, v), _ = AttentionCase("plain").make(torch.float64, "cpu")

    def loss(q: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v).square().sum()

    expected = torch.autograd.functional.jacobian(loss, q)
    torch.testing.assert_close(torch.func.grad(loss)(q), expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        tangent = forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(tangent, expected.sum())
    batched = torch.func.vmap(lambda x: scaled_dot_product_attention(x, x, x))(q)
    torch.testing.assert_close(batched, scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if c.name
        in (
            "causal",
            "grouped heads",
            "bool [S, T]",
            "blind [S, T] beyond tiles",
            "additive [T]",
            "scale",
            "no keys",
            "expanded",
            "window, causal",
            "bottom right tall",
            "sink, blind [S, T]",
            "everything, bool",
        )
    ],
    ids=lambda c: c.name,
)
def test_transforms_mean_what_the_op_means(case: AttentionCase) -> None:
    (q, k, v), options = case.make(torch.float64, "cpu")
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    grad_out = torch.randn(*q.shape[:-1], v.shape[-1], dtype=q.dtype)

    def loss(*qkv: Tensor) -> Tensor:
        return (scaled_dot_product_attention(*qkv, **options) * grad_out).sum()

    options.pop("return_lse", None)
    transformed = torch.func.grad(loss, argnums=(0, 1, 2))
    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    for a, b in zip(transformed(q, k, v), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_in_a_batch() -> None:
    inputs, options = double_inputs(SMALL[0])
    out = scaled_dot_product_attention(*inputs, **options)
    grad_outs = torch.randn(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, inputs, grad_outs, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, inputs, g, retain_graph=True) for g in grad_outs]
    for a, b in zip(batched, map(torch.stack, zip(*one_by_one, strict=True)), strict=True):
        torch.testing.assert_close(a, b)


OPCHECK_CASES = [
    "plain",
    "causal wide",
    "grouped heads",
    "bool [H, 1, T]",
    "additive [S, T]",
    "heads last",
    "no rows",
    "wide values",
    "window, causal",
    "everything",
    "everything, bool",
]


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in OPCHECK_CASES], ids=lambda c: c.name
)
def test_opcheck(case: AttentionCase) -> None:
    (q, k, v), options = case.make(torch.float32, "cpu")
    options.pop("enable_gqa", None)
    options.pop("return_lse", None)
    constants = make_options(q, **options)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    differentiable = [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in constants[:3]
    ]
    forward, backward = torch.ops.fused.attention_forward, torch.ops.fused.attention_backward
    torch.library.opcheck(forward.default, (*leaves, *differentiable, *constants[3:]))
    out, _, row_stats = forward(q, k, v, *constants)
    for needs in ([True] * 6, [False, True, False, False, False, True]):
        inputs = (torch.ones_like(out), None, q, k, v, out, row_stats, *constants, needs)
        torch.library.opcheck(backward.default, inputs)


def test_compiled_graph_with_dynamic_shapes() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    for rows in (5, 9, 17):
        q, k, v = (torch.randn(2, 2, rows, 8, requires_grad=True) for _ in range(3))
        out, expected = compiled(q, k, v), scaled_dot_product_attention(q, k, v, is_causal=True) * 2
        torch.testing.assert_close(out, expected)
        grad_out = torch.randn_like(out)
        for a, b in zip(
            torch.autograd.grad(out, (q, k, v), grad_out),
            torch.autograd.grad(expected, (q, k, v), grad_out),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


class Parent(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.attention = fused.Attention(16, 4, batch_first=True, **options)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return (
            x
            + self.attention(
                self.norm(x), self.norm(x), self.norm(x), key_padding_mask=mask, need_weights=False
            )[0]
        )


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_module_in_a_compiled_parent(dropout: float) -> None:
    parent = Parent(dropout=dropout)
    compiled = torch.compile(parent, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (4, 7):
        x = torch.randn(2, length, 16)
        mask = torch.zeros(2, length, dtype=torch.bool)
        mask[0, -2:] = True
        out = compiled(x, mask)
        out.sum().backward()
        assert all(p.grad.isfinite().all() for p in parent.parameters())
        if dropout == 0:
            torch.testing.assert_close(out, parent(x, mask))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_module(strict: bool) -> None:
    parent, length = Parent().eval(), torch.export.Dim("length")
    program = torch.export.export(
        parent,
        (torch.randn(2, 5, 16), torch.randn(2, 5)),
        dynamic_shapes={"x": {1: length}, "mask": {1: length}},
        strict=strict,
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert "fused.attention_forward.default" in targets
    # There is no longest length that a caller would have to name.
    assert all(constraint.upper > 2**40 for constraint in program.range_constraints.values())
    x, mask = torch.randn(2, 70, 16), torch.randn(2, 70)
    torch.testing.assert_close(program.module()(x, mask), parent(x, mask))


def test_fake_tensors_and_subclasses_take_the_registered_op() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    log = OperatorLog()
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    with log:
        scaled_dot_product_attention(q, q, q).sum().backward()
    assert "fused.attention_forward.default" in log.names
    assert "fused.attention_backward.default" in log.names
    inputs, options = double_inputs(SMALL[0])
    with log:
        assert torch.autograd.gradgradcheck(
            lambda *qkv: scaled_dot_product_attention(*qkv, **options), inputs
        )
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
        out = scaled_dot_product_attention(fake, fake, fake)
    assert type(out) is type(fake) and out.shape == q.shape


def test_meta_tensors() -> None:
    module = fused.Attention(8, 2, device="meta")
    x = torch.randn(3, 2, 8, device="meta", requires_grad=True)
    out = module(x, x, x, need_weights=False)[0]
    assert out.shape == x.shape and out.is_meta
    out.sum().backward()
    assert x.grad is not None and x.grad.is_meta


def test_zeros_without_memory() -> None:
    zero = torch._efficientzerotensor((1, 2, 3, 5))
    assert torch.equal(scaled_dot_product_attention(zero, zero, zero), torch.zeros(1, 2, 3, 5))


def test_stale_graph_raises() -> None:
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    k = torch.randn(1, 2, 3, 4)
    out = scaled_dot_product_attention(q, k, k)
    k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("registered", [False, True])
def test_output_can_be_changed_in_place_where_it_is_not_needed(registered: bool) -> None:
    v = torch.randn(1, 2, 3, 4, requires_grad=True)
    q = v.detach()

    def attend() -> Tensor:
        if registered:
            return torch.ops.fused.attention_forward(q, q, v, *Options())[0]
        return scaled_dot_product_attention(q, q, v)

    out = attend()
    out.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = attend()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.mul_(2).sum().backward()
    with torch.no_grad():
        expected = attend() + 1
        torch.testing.assert_close(attend().add_(1), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_profiler_names_the_kernel_once(compiled: bool) -> None:
    function = scaled_dot_product_attention
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    function(q, q, q)
    with torch.profiler.profile() as profile:
        function(q, q, q).sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["fused::attention_forward"] == counts["fused::attention_backward"] == 1


def test_checkpointing_replays_the_same_dropout() -> None:
    from torch.utils.checkpoint import checkpoint

    q = torch.randn(1, 2, 30, 8, dtype=torch.float64, requires_grad=True)

    def block(q: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    grads = []
    for run in (block, lambda q: checkpoint(block, q, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(q).sum(), q)[0])
    assert torch.equal(*grads)


def test_autocast_casts_as_stock_does() -> None:
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scaled_dot_product_attention(q, q, q)
        stock = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert out.dtype == stock.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32
