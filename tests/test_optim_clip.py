"""fused.get_total_norm and fused.clip_grad_norm_ in place of torch.nn.utils's."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused
from fused.testing import assert_as_accurate_as_stock

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Scalar, empty, ragged, and longer than a chunk.
SHAPES = [(), (0, 3), (1,), (3, 5), (2, 8192 + 37)]


def parameters(
    device: torch.device, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> list[nn.Parameter]:
    """The last of them has no gradient."""
    torch.manual_seed(0)
    params = []
    for shape in SHAPES:
        params.append(nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        params[-1].grad = (scale * torch.randn(shape, dtype=torch.float64)).to(device, dtype)
    return [*params, nn.Parameter(torch.zeros(3, device=device, dtype=dtype))]


def clip(
    function: Callable[..., Tensor], params: list[nn.Parameter], *args: Any, **options: Any
) -> list[Tensor]:
    """The norm, and the gradients as they are after."""
    norm = function(params, *args, **options)
    return [norm, *(p.grad for p in params if p.grad is not None)]


@pytest.mark.parametrize("name", ["get_total_norm", "clip_grad_norm_"])
def test_signature(name: str) -> None:
    ours, stock = (inspect.signature(getattr(x, name)) for x in (fused, torch.nn.utils))
    assert list(ours.parameters) == list(stock.parameters)
    for parameter, other in zip(ours.parameters.values(), stock.parameters.values(), strict=True):
        assert (parameter.default, parameter.kind) == (other.default, other.kind)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_euclidean_norm(dtype: torch.dtype, max_norm: float, backend: torch.device) -> None:
    stock_dtype = torch.float32 if dtype == torch.float64 else dtype
    ours, stock = parameters(backend, dtype), parameters(torch.device("cpu"), dtype)
    truth = [nn.Parameter(p.detach().double()) for p in stock]
    for p, q in zip(truth, stock, strict=True):
        p.grad = None if q.grad is None else q.grad.double()
    stock = [nn.Parameter(p.detach().to(stock_dtype)) for p in truth]
    for p, q in zip(stock, truth, strict=True):
        p.grad = None if q.grad is None else q.grad.to(stock_dtype)
    actual = clip(fused.clip_grad_norm_, ours, max_norm)
    results = zip(
        actual,
        clip(torch.nn.utils.clip_grad_norm_, truth, max_norm),
        clip(torch.nn.utils.clip_grad_norm_, stock, max_norm),
        strict=True,
    )
    for index, (a, expected, s) in enumerate(results):
        assert a.dtype == dtype and a.device.type == backend.type and a.shape == expected.shape
        assert_as_accurate_as_stock(a.cpu(), expected, s, f"result {index}")


@pytest.mark.parametrize("norm_type", [math.inf, "inf", 1, 2.0, "2", 3.5, 0])
@pytest.mark.parametrize("foreach", [None, False, True])
def test_every_norm(norm_type: Any, foreach: bool | None, backend: torch.device) -> None:
    results = []
    for module in (fused, torch.nn.utils):
        params = parameters(backend)
        del params[1]  # of an empty tensor inf is no norm
        result = clip(module.clip_grad_norm_, params, 0.5, norm_type, foreach=foreach)
        grads = [p.grad for p in parameters(backend) if p.grad is not None and p.numel()]
        results.append([*result, module.get_total_norm(grads, norm_type, foreach=foreach)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_nonfinite(norm_type: float, value: float, backend: torch.device) -> None:
    def broken() -> list[nn.Parameter]:
        params = parameters(backend)
        params[3].grad[1, 1] = value
        return params[2:]

    results = []
    for module in (fused, torch.nn.utils):
        results.append(clip(module.clip_grad_norm_, broken(), 0.5, norm_type))
        params = broken()
        before = [None if p.grad is None else p.grad.clone() for p in params]
        with pytest.raises(RuntimeError, match=rf"norm of order {norm_type} .* is non-finite, so"):
            module.clip_grad_norm_(params, 0.5, norm_type, error_if_nonfinite=True)
        for p, old in zip(params, before, strict=True):
            assert p.grad is None or torch.equal(p.grad.nan_to_num(7), old.nan_to_num(7))
        with pytest.raises(RuntimeError, match="non-finite"):
            module.get_total_norm([p.grad for p in params[:-1]], norm_type, True)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[2:]])
def test_mixed_dtypes(dtypes: list[torch.dtype], backend: torch.device) -> None:
    results = []
    for module in (fused, torch.nn.utils):
        params = [p for dtype in dtypes for p in parameters(backend, dtype) if p.grad is not None]
        truth = torch.cat([p.grad.double().flatten() for p in params]).norm()
        results.append(clip(module.clip_grad_norm_, params, 2.0))
    # The norms of single tensors are rounded to their dtype in stock, here they are not.
    actual, stock = results[0][0].double(), results[1][0].double()
    assert (actual - truth).abs() <= max((stock - truth).abs(), 1e-6 * truth)
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_one_tensor_alone(backend: torch.device) -> None:
    results = []
    for module in (fused, torch.nn.utils):
        alone = parameters(backend)[3]
        norm = module.clip_grad_norm_(alone, 0.1)
        results.append([norm, alone.grad, module.get_total_norm(alone.grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("module", [fused, torch.nn.utils])
def test_nothing_to_clip(module: Any) -> None:
    for params in ([], [nn.Parameter(torch.ones(2))]):
        norm = module.clip_grad_norm_(params, 1.0)
        assert torch.equal(norm, torch.tensor(0.0)) and norm.dtype == torch.float32
    with pytest.warns(UserWarning, match="empty generator") as caught:
        module.clip_grad_norm_((p for p in ()), 1.0)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.clip_grad_norm_(iter([]), 1.0)


def test_a_gradient_that_is_there_twice(backend: torch.device) -> None:
    """Counts twice and is scaled twice, as in stock. Large enough that threads share the work."""
    results = []
    for module in (fused, torch.nn.utils):
        torch.manual_seed(0)
        p, q = (nn.Parameter(torch.empty(40_000, device=backend)) for _ in range(2))
        p.grad = torch.randn(40_000, device=backend)
        q.grad = p.grad
        results.append(clip(module.clip_grad_norm_, [p, q, p], 0.5))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_that_are_not_written_and_versions(backend: torch.device) -> None:
    params = parameters(backend)
    grads = [p.grad for p in params[:-1]]
    before = [(g, g.clone(), g._version) for g in grads]
    fused.clip_grad_norm_(params, 0.5)
    assert all(p.grad is g and g._version > v for p, (g, _, v) in zip(params, before, strict=False))
    assert not torch.equal(grads[3], before[3][1])
    assert fused.get_total_norm(grads).item() == pytest.approx(0.5, rel=1e-5)
    versions = [g._version for g in grads]
    fused.get_total_norm(grads)
    assert versions == [g._version for g in grads]


@pytest.mark.parametrize("kind", ["complex", "sparse"])
def test_what_no_kernel_covers(kind: str) -> None:
    def make() -> list[nn.Parameter]:
        torch.manual_seed(0)
        dtype = torch.complex64 if kind == "complex" else torch.float32
        p, q = (nn.Parameter(torch.randn(4, 3, dtype=dtype)) for _ in range(2))
        p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
        if kind == "sparse":
            p.grad = p.grad.to_sparse()
        return [p, q]

    results = []
    for module in (fused, torch.nn.utils):
        params = make()
        try:
            results.append([t.to_dense() for t in clip(module.clip_grad_norm_, params, 0.5)])
        except (NotImplementedError, RuntimeError) as error:
            results.append([type(error), str(error)])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        assert a == b if not isinstance(a, Tensor) else torch.equal(a, b)


def test_compiled() -> None:
    params = parameters(torch.device("cpu"))
    expected = clip(fused.clip_grad_norm_, copy_of(params), 0.5)
    torch._dynamo.reset()
    compiled = torch.compile(fused.clip_grad_norm_, fullgraph=True)
    for a, b in zip(clip(compiled, params, 0.5), expected, strict=True):
        assert torch.equal(a, b)


def copy_of(params: list[nn.Parameter]) -> list[nn.Parameter]:
    copies = copy.deepcopy(params)
    for p, q in zip(copies, params, strict=True):
        p.grad = None if q.grad is None else q.grad.clone()
    return copies


def test_explain() -> None:
    tensors = [torch.ones(3)]
    assert "kernel" in str(fused.explain(fused.get_total_norm, tensors)).splitlines()[0]
    assert "norm_type is inf" in str(fused.explain(fused.get_total_norm, tensors, math.inf))
