"""Norms inside the step: what clipping reads, what a gradient that is not finite does, and how both
go with GradScaler's tensors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused
from fused import _load, _route

CLASSES = [fused.Adam, fused.AdamW, fused.SGD]
OPTIONS: dict[type, dict[str, Any]] = {
    fused.Adam: {"lr": 0.05, "amsgrad": True},
    fused.AdamW: {"lr": 0.05},
    fused.SGD: {"lr": 0.05, "momentum": 0.9, "dampening": 0.1},
}
EVERYTHING = {"ema_decay": 0.9, "master_weights": "remainder", "state_dtype": "int8"}


def leaves(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(3, 5), (8192 + 3,), (0,), (1,)]
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def set_gradients(params: list[Tensor], step: int, factor: float = 1.0) -> None:
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        p.grad = torch.randn(p.shape, generator=generator).to(p) * factor


def snapshot(params: list[Tensor], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [v for p in params for v in optimizer.state[p].values()]
    return [t.detach().clone() for t in [*params, *states]]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def norm_of(params: list[Tensor]) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))


@pytest.mark.parametrize("cls", CLASSES)
def test_the_norm_of_all_groups_or_of_each(cls: type, backend: torch.device) -> None:
    for scope in ("global", "group"):
        params = leaves(backend)
        groups = [{"params": params[:1]}, {"params": params[1:]}]
        optimizer = cls(groups, **OPTIONS[cls], max_norm=2.0, norm_scope=scope)
        assert optimizer.grad_norm is None
        set_gradients(params, 0)
        norms = (
            [norm_of(params)] if scope == "global" else [norm_of(params[:1]), norm_of(params[1:])]
        )
        by_hand = leaves(backend)
        plain = cls([{"params": by_hand[:1]}, {"params": by_hand[1:]}], **OPTIONS[cls])
        for i, (p, q) in enumerate(zip(params, by_hand, strict=True)):
            norm = norms[0] if scope == "global" or i == 0 else norms[1]
            q.grad = p.grad * min(1.0, 2.0 / (norm + 1e-6))
        optimizer.step()
        plain.step()
        assert optimizer.grad_norm.flatten().tolist() == pytest.approx(norms, rel=1e-6)
        for p, q in zip(params, by_hand, strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_skipped_step_changes_nothing(
    cls: type, value: float, zero_grad: bool, capturable: bool, backend: torch.device
) -> None:
    options = dict(OPTIONS[cls])
    if cls is not fused.SGD and capturable and _route.kernels() is not _load.load():
        options["capturable"] = True
    params = leaves(backend, torch.bfloat16)
    optimizer = cls(params, **options, nonfinite="skip", zero_grad=zero_grad, **EVERYTHING)
    for step in range(4):
        set_gradients(params, step)
        if step in (0, 2):
            params[1].grad[8000] = value
        grads = [p.grad.clone() for p in params]
        before = snapshot(params, optimizer)
        optimizer.step()
        if step == 2:
            assert_equal(before, snapshot(params, optimizer))
        for p, g in zip(params, grads, strict=True):
            expected = torch.zeros_like(g) if zero_grad else g
            assert torch.equal(p.grad.nan_to_num(7.0), expected.nan_to_num(7.0))
    straight = leaves(backend, torch.bfloat16)
    other = cls(straight, **options, **EVERYTHING)
    for step in (1, 3):
        set_gradients(straight, step)
        other.step()
    assert_equal(snapshot(params, optimizer), snapshot(straight, other))


@pytest.mark.parametrize("norm_scope", ["global", "group"])
@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_changes_nothing(cls: type, norm_scope: str, backend: torch.device) -> None:
    params = leaves(backend)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    extras = {"nonfinite": "error", "norm_scope": norm_scope, "zero_grad": True}
    optimizer = cls(groups, **OPTIONS[cls], **extras)
    set_gradients(params, 0)
    optimizer.step()
    set_gradients(params, 1)
    params[0].grad[0, 0] = math.nan
    before = snapshot(params, optimizer)
    with pytest.raises(RuntimeError, match=r'gradients must be finite with nonfinite="error", got'):
        optimizer.step()
    assert_equal(before, snapshot(params, optimizer))
    assert params[1].grad.abs().sum() > 0


@pytest.mark.parametrize("cls", CLASSES)
def test_propagate_is_what_stock_clipping_does(cls: type, backend: torch.device) -> None:
    params, by_hand = leaves(backend), leaves(backend)
    stock = getattr(torch.optim, cls.__name__)
    optimizer, plain = cls(params, **OPTIONS[cls], max_norm=1.0), stock(by_hand, **OPTIONS[cls])
    for tensors in (params, by_hand):
        set_gradients(tensors, 0)
        tensors[0].grad[0, 0] = math.inf
    torch.nn.utils.clip_grad_norm_(by_hand, 1.0)
    optimizer.step()
    plain.step()
    for p, q in zip(params, by_hand, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True)


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_clipping_under_a_gradient_scale(cls: type, zero_grad: bool, backend: torch.device) -> None:
    """The norm is that of the unscaled gradients; a found infinity skips, and clears."""
    params, straight = leaves(backend), leaves(backend)
    extras = {"max_norm": 3.0, "zero_grad": zero_grad, "ema_decay": 0.5}
    scaled, plain = (cls(p, **OPTIONS[cls], **extras) for p in (params, straight))
    for step in range(4):
        scaled.grad_scale = torch.tensor(16.0, device=backend)
        scaled.found_inf = torch.tensor(float(step == 2), device=backend)
        set_gradients(params, step, factor=16.0)
        scaled.step()
        if zero_grad:
            assert not any(p.grad.any() for p in params)
        if step != 2:
            set_gradients(straight, step)
            plain.step()
            assert torch.equal(scaled.grad_norm, plain.grad_norm)
    assert_equal(snapshot(params, scaled), snapshot(straight, plain))


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_are_not_those_that_a_scaler_handles(cls: type, backend: torch.device) -> None:
    """GradScaler skips what it has found, and looks for a scale without overflow; what is not
    finite although it found nothing is an error."""
    params = leaves(backend)
    optimizer = cls(params, **OPTIONS[cls], nonfinite="error")
    scaler = torch.amp.GradScaler(backend.type, init_scale=256.0)
    for step in range(3):
        scaler.scale(sum((p * step).sum() for p in params)).backward()
        if step == 1:
            params[0].grad[0, 0] = math.inf
        before = snapshot(params, optimizer)
        scaler.step(optimizer)
        if step == 1:
            assert_equal(before, snapshot(params, optimizer))
            assert optimizer.grad_norm.isinf()
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 128.0 and not torch.equal(before[0], params[0].detach())
    optimizer.found_inf = torch.tensor(0.0, device=backend)
    params[0].grad = torch.full_like(params[0], math.nan)
    with pytest.raises(RuntimeError, match="gradients must be finite"):
        optimizer.step()


def test_a_group_that_is_refused_is_not_kept() -> None:
    params = leaves(torch.device("cpu"), torch.bfloat16)
    optimizer = fused.AdamW(params[:1], master_weights="remainder")
    with pytest.raises(ValueError, match="params must be bfloat16 for master_weights"):
        optimizer.add_param_group({"params": [params[1].detach().half()]})
    assert [group["params"] for group in optimizer.param_groups] == [params[:1]]
    optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 2


def test_zero_grad_with_gradients_that_share_memory(backend: torch.device) -> None:
    """A gradient that two parameters share is cleared when both have read it."""
    shared = torch.ones(5000, device=backend)
    params = [torch.ones(5000, device=backend, requires_grad=True) for _ in range(2)]
    for p in params:
        p.grad = shared
    fused.SGD(params, lr=0.5, zero_grad=True).step()
    for p in params:
        assert torch.equal(p.detach(), torch.full_like(p, 0.5))
    assert not shared.any()


def test_zero_grad_of_other_layouts(backend: torch.device) -> None:
    p = torch.zeros(4, 6, device=backend, requires_grad=True)
    p.grad = torch.ones(6, 4, device=backend).t()
    fused.SGD([p], lr=1.0, zero_grad=True).step()
    assert torch.equal(p.detach(), -torch.ones_like(p)) and not p.grad.any()


@pytest.mark.parametrize("cls", CLASSES)
def test_gradients_that_are_negative_views(cls: type, backend: torch.device) -> None:
    """Their memory holds the negative of what they say; so it must after the clearing."""
    params = [torch.zeros(4, device=backend, requires_grad=True) for _ in range(2)]
    view = torch.view_as_complex(torch.ones(4, 2, device=backend)).conj().imag
    assert view.is_neg()
    params[0].grad, params[1].grad = view, view.clone()
    for p in params:
        cls([p], **OPTIONS[cls], zero_grad=True).step()
    assert torch.equal(params[0].detach(), params[1].detach())
    assert not params[0].grad.any()


EXTRAS: list[dict[str, Any]] = [
    {"max_norm": 1.0, "nonfinite": "skip"},
    {"ema_decay": 0.5, "master_weights": "float32"},
    {"state_dtype": "int8", "zero_grad": True},
]


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_step_that_fails_changes_nothing(
    cls: type, extras: dict[str, Any], backend: torch.device
) -> None:
    params = leaves(backend, torch.bfloat16)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = cls(groups, **OPTIONS[cls], **extras)
    set_gradients(params, 0)
    optimizer.step()
    set_gradients(params, 1)
    params[-1].data = params[-1].data.double()
    before = snapshot(params, optimizer)
    with pytest.raises(TypeError, match="grad must have the dtype of its parameter"):
        optimizer.step()
    assert_equal(before, snapshot(params, optimizer))
    assert params[0].grad.any()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("max_norm", -1.0, "max_norm must be a finite number"),
        ("max_norm", math.inf, "max_norm must be a finite number"),
        ("norm_scope", "all", 'norm_scope must be "global" or "group"'),
        ("nonfinite", "ignore", 'nonfinite must be "propagate"'),
        ("ema_decay", 1.5, "ema_decay must be None or between 0 and 1"),
        ("master_weights", "float64", 'master_weights must be None, "float32" or "remainder"'),
        ("state_dtype", torch.float16, "state_dtype must be None, torch.float32"),
    ],
)
def test_options_out_of_range(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused.AdamW([torch.ones(2)], **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be given to the constructor"):
        fused.AdamW([{"params": [torch.ones(2)], name: value}])


def test_what_no_kernel_covers_is_refused_with_options(backend: torch.device) -> None:
    p = torch.ones(3, dtype=torch.complex64, device=backend, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = fused.Adam([p], zero_grad=True)
    with pytest.raises(NotImplementedError, match="zero_grad must be left out where stock PyTorch"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones_like(p)) and not optimizer.state[p]


def test_copies_keep_the_options(backend: torch.device) -> None:
    params = leaves(backend, torch.bfloat16)
    optimizer = fused.AdamW(params, max_norm=1.0, **EVERYTHING)
    set_gradients(params, 0)
    optimizer.step()
    copied_params, copied = copy.deepcopy((params, optimizer))
    assert copied.extras == optimizer.extras
    assert torch.equal(copied.grad_norm, optimizer.grad_norm)
    for tensors, kind in ((params, optimizer), (copied_params, copied)):
        set_gradients(tensors, 1)
        kind.step()
    assert_equal(snapshot(params, optimizer), snapshot(copied_params, copied))
