"""Rotary embedding against the definition: every case, dtype and backend, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused
from fused import reference
from fused._rotary import rotary_composite
from fused.functional import rotary_embedding
from fused.testing import assert_as_accurate_as_stock
from fused.testing.cases.rotary import CASES, RotaryCase

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = ("query", "key", "grad_query", "grad_key", "grad_cos", "grad_sin")
Rotary = Callable[..., tuple[Tensor, Tensor]]


def run(function: Rotary, tensors: list[Tensor], grads: list[Tensor], **options: Any) -> Any:
    inputs = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*inputs, **options)
    grads = [g.to(out.dtype) for g, out in zip(grads, outputs, strict=True)]
    return (*outputs, *torch.autograd.grad(outputs, inputs, grads))


def composite(*tensors: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    return rotary_composite(*tensors, interleaved)


def assert_case(
    case: RotaryCase, dtype: torch.dtype, device: torch.device, function: Rotary
) -> None:
    tensors, options = case.make(dtype, device)
    # Laid out as an attention leaves them.
    grads = [torch.randn_like(t.transpose(1, 2)).transpose(1, 2) for t in tensors[:2]]
    low = torch.float32 if dtype == torch.float64 else dtype
    stock = [t.to(low) for t in tensors]
    expected = run(reference.rotary_embedding, tensors, grads, **options)
    yardstick = run(reference.rotary_embedding, stock, grads, dtype=low, **options)
    actual = run(function, tensors, grads, **options)
    for name, a, e, s in zip(NAMES, actual, expected, yardstick, strict=True):
        assert a.dtype == (tensors[2].dtype if name in ("grad_cos", "grad_sin") else dtype), name
        assert_as_accurate_as_stock(a.to(dtype), e, s, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_forward_and_gradients(case: RotaryCase, dtype: torch.dtype, backend: torch.device) -> None:
    assert_case(case, dtype, backend, rotary_embedding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_composite(case: RotaryCase, dtype: torch.dtype) -> None:
    assert_case(case, dtype, torch.device("cpu"), composite)


def test_results_lie_as_attention_lays_its_own(backend: torch.device) -> None:
    (q, k, cos, sin), _ = RotaryCase("", heads=6, heads_kv=2).make(torch.float32, backend)
    for turned in rotary_embedding(q, k, cos, sin):
        assert turned.transpose(1, 2).is_contiguous()


def test_packed_rows(backend: torch.device) -> None:
    """[S, H, D], as `varlen_attention` takes them, each row at a place of its own."""
    (q, k, cos, sin), _ = RotaryCase("", batch=1, heads=3).make(torch.float32, backend)
    packed = [x[0].transpose(0, 1) for x in (q, k)]
    turned = rotary_embedding(*(x.transpose(0, 1) for x in packed), cos, sin)
    for one, other in zip(turned, rotary_embedding(q, k, cos, sin), strict=True):
        assert torch.equal(one, other[0])
        assert one.transpose(0, 1).is_contiguous()


def test_one_gradient_alone(backend: torch.device) -> None:
    tensors, _ = RotaryCase("", heads=3, heads_kv=3).make(torch.float64, backend)
    wanted = run(reference.rotary_embedding, tensors, tensors[:2])[2:]
    for place in range(4):
        inputs = [t.detach().requires_grad_(i == place) for i, t in enumerate(tensors)]
        turned = rotary_embedding(*inputs)
        of_one = (turned[place % 2], tensors[place % 2])
        loss = sum((a * b).sum() for a, b in (zip(turned, tensors) if place > 1 else [of_one]))
        (grad,) = torch.autograd.grad(loss, inputs[place])
        torch.testing.assert_close(grad, wanted[place])


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_not_finite_stays_in_its_pair(interleaved: bool, backend: torch.device) -> None:
    (q, k, cos, sin), _ = RotaryCase("", head_dim=16).make(torch.float32, backend)
    q, k = q.clone(), k.clone()
    q[0, 0, 1, 3], k[1, 0, 2, 4] = torch.nan, torch.inf
    options = {"interleaved": interleaved}
    expected = reference.rotary_embedding(q, k, cos, sin, **options)
    for a, e in zip(rotary_embedding(q, k, cos, sin, **options), expected, strict=True):
        assert (~e.isfinite()).sum() == 2
        assert_as_accurate_as_stock(a, e, e.float())


@pytest.mark.usefixtures("threads")
def test_result_does_not_depend_on_the_threads() -> None:
    (q, k, cos, sin), _ = RotaryCase("", length=700, head_dim=64).make(torch.float32, "cpu")
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(rotary_embedding(q, k, cos, sin))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_kernel_runs_whatever_the_options() -> None:
    for case in CASES:
        tensors, options = case.make(torch.float32, "cpu")
        (decision,) = fused.explain(rotary_embedding, *tensors, **options).decisions
        assert decision.op == "rotary" and decision.path.startswith("CPU kernel"), case


def test_autocast_leaves_it_alone() -> None:
    """As it leaves PyTorch's own products of elements."""
    (q, k, cos, sin), _ = RotaryCase("").make(torch.float32, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turned = rotary_embedding(q, k, cos, sin)
    for one, other in zip(turned, rotary_embedding(q, k, cos, sin), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


Q, K, COS = (1, 2, 5, 8), (1, 1, 5, 8), (5, 4)
WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "query must have 3 or 4 dimensions, got [5, 8]", {"q": (5, 8)}),
    (ValueError, "k must have 4 dimensions, got [5, 8]", {"k": (5, 8)}),
    (
        ValueError,
        "k must have the batch, length and head_dim of q ([1, 2, 5, 8]), got [1, 1, 4, 8]",
        {"k": (1, 1, 4, 8)},
    ),
    (
        ValueError,
        "cos must have the length and at most half the head_dim of q ([1, 2, 5, 8]), and its batch "
        "or none, got [1, 4]",
        {"cos": (1, 4)},
    ),
    *(
        (
            ValueError,
            "sin must have the length and at most half the head_dim of q ([1, 2, 5, 8]), and its "
            f"batch or none, got {list(shape)}",
            {"sin": shape},
        )
        for shape in ((4,), (5, 5), (2, 5, 4), (1, 1, 5, 4))
    ),
    (ValueError, "sin must have the shape of cos ([5, 4]), got [5, 3]", {"sin": (5, 3)}),
    (TypeError, "k must have the dtype of q (Float), got Double", {"k": K, "dtype": torch.float64}),
    (TypeError, "cos must be floating, got torch.int64", {"cos": COS, "dtype": torch.int64}),
    (TypeError, "q must be floating, got torch.int64", {"q": Q, "dtype": torch.int64}),
    (
        NotImplementedError,
        "heads times head_dim must be at most 4194304, got 4194312",
        {"q": (1, 2**19, 5, 8)},
    ),
    (
        ValueError,
        "batch times length must be less than 2^31, got 2147483648",
        {"q": (2**31, 1, 1, 8), "k": (2**31, 1, 1, 8), "cos": (1, 4), "sin": (1, 4)},
    ),
]


@pytest.mark.parametrize("kind, message, changes", WRONG, ids=[text for _, text, _ in WRONG])
def test_errors(
    kind: type[Exception], message: str, changes: dict[str, Any], backend: torch.device
) -> None:
    shapes = {"q": Q, "k": K, "cos": COS, "sin": COS}
    dtype = changes.get("dtype", torch.float32)
    arguments = [
        torch.ones((), dtype=dtype if name in changes else torch.float32, device=backend).expand(
            changes.get(name, shape)
        )
        for name, shape in shapes.items()
    ]
    with pytest.raises(kind) as caught:
        rotary_embedding(*arguments)
    assert str(caught.value).splitlines()[0] == f"rotary: {message}"


def test_errors_of_the_composite() -> None:
    """Where tensors of one row would broadcast."""
    q, k, cos = torch.ones(Q), torch.ones(K), torch.ones(1, 4)
    for tangents in ((cos, torch.ones(COS)), (torch.ones(COS), cos)):
        with pytest.raises(ValueError, match=r"rotary: (cos|sin) must have the length of q \(5\)"):
            torch.func.jvp(lambda x, t=tangents: rotary_embedding(x, k, *t)[0], (q,), (q,))
