"""What a step refuses, and that a step which fails changes nothing."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from test_optim_tensors import CLASSES, OPTIONS, leaf, set_gradients
from torch import Tensor

import fused


def snapshot(params: list[Tensor], optimizer: torch.optim.Optimizer) -> list[Any]:
    state = copy.deepcopy(optimizer.state_dict()["state"])
    return [[p.detach().clone() for p in params], [p._version for p in params], state]


def assert_unchanged(before: list[Any], after: list[Any]) -> None:
    for a, b in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b)
    assert before[1] == after[1]
    assert str(before[2]) == str(after[2])


def break_grad_shape(params: list[Tensor], state: dict) -> None:
    params[-1].data = params[-1].data[:2].clone()


def break_grad_dtype(params: list[Tensor], state: dict) -> None:
    params[-1].data = params[-1].data.double()


def break_state_shape(params: list[Tensor], state: dict) -> None:
    name = next(n for n in state[params[-1]] if n != "step")
    state[params[-1]][name] = torch.zeros(99)


def break_state_dtype(params: list[Tensor], state: dict) -> None:
    name = next(n for n in state[params[-1]] if n != "step")
    state[params[-1]][name] = state[params[-1]][name].double()


def break_state_type(params: list[Tensor], state: dict) -> None:
    name = next(n for n in state[params[-1]] if n != "step")
    state[params[-1]][name] = 0.5


def break_overlap(params: list[Tensor], state: dict) -> None:
    params[-1].data = torch.ones(1).expand(5)


REFUSALS = {
    "grad shape": (break_grad_shape, ValueError, r": grad must have the shape \[2\], got \[5\]"),
    "grad dtype": (break_grad_dtype, TypeError, r": grad must have the dtype of its parameter"),
    "state shape": (break_state_shape, ValueError, r" must have the shape \[5\], got \[99\]"),
    "state dtype": (break_state_dtype, TypeError, r" must have the dtype of its parameter"),
    "state type": (break_state_type, TypeError, r": state must hold tensors, got float"),
    "overlap": (break_overlap, ValueError, r": params must not hold one memory location twice"),
}


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_step_that_fails_changes_nothing(
    cls: type, name: str, num_groups: int, backend: torch.device
) -> None:
    break_it, error, message = REFUSALS[name]
    params = [leaf(torch.randn(5, device=backend)) for _ in range(3)]
    groups = [params] if num_groups == 1 else [params[:2], params[2:]]
    optimizer = cls([{"params": group} for group in groups], **OPTIONS[cls])
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    break_it(params, optimizer.state)
    before = snapshot(params, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_unchanged(before, snapshot(params, optimizer))


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("intruder", [None, "weight"])
@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_no_tensor_among_the_parameters(
    cls: type, intruder: object, max_norm: float | None, backend: torch.device
) -> None:
    params = [leaf(torch.randn(5, device=backend)) for _ in range(2)]
    optimizer = cls(list(params), **OPTIONS[cls], max_norm=max_norm)
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["params"].append(intruder)
    kind = type(intruder).__name__
    with pytest.raises(TypeError, match=f"params must hold tensors, got {kind}"):
        optimizer.step()
    assert all(map(torch.equal, before, params))


@pytest.mark.parametrize("entry", [None, [1.0]])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_that_is_no_dict(cls: type, entry: object, backend: torch.device) -> None:
    param = leaf(torch.ones(3, device=backend))
    optimizer = cls([param], **OPTIONS[cls])
    for step in range(2):
        set_gradients([param], step)
        optimizer.step()
    before = param.detach().clone()
    optimizer.state[param] = entry
    kind = type(entry).__name__
    with pytest.raises(TypeError, match=f"state must hold a dict for each parameter, got {kind}"):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_first_step_that_fails_makes_no_state(cls: type, backend: torch.device) -> None:
    params = [leaf(torch.randn(5, device=backend)) for _ in range(3)]
    optimizer = cls([{"params": params[:2]}, {"params": params[2:]}], **OPTIONS[cls])
    set_gradients(params, 0)
    break_grad_shape(params, optimizer.state)
    before = snapshot(params, optimizer)
    with pytest.raises(ValueError, match="grad must have the shape"):
        optimizer.step()
    after = snapshot(params, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert not any(optimizer.state_dict()["state"].values())


def test_adam_refuses_sparse_gradients_before_it_touches_anything(backend: torch.device) -> None:
    dense, table = leaf(torch.ones(3, device=backend)), leaf(torch.ones(4, 2, device=backend))
    optimizer = fused.Adam([{"params": [dense]}, {"params": [table]}])
    dense.grad = torch.ones_like(dense)
    table.grad = torch.ones_like(table).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3, device=backend))
    assert not optimizer.state


@pytest.mark.parametrize("cls", [fused.Adam, fused.AdamW])
def test_a_missing_state_is_named(cls: type, backend: torch.device) -> None:
    param = leaf(torch.ones(3, device=backend))
    optimizer = cls([param])
    set_gradients([param], 0)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    before = snapshot([param], optimizer)
    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        optimizer.step()
    assert str(snapshot([param], optimizer)) == str(before)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("allocations", [0, 1, 3])
def test_no_memory_for_the_states(
    cls: type, allocations: int, backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first step that runs out of memory has made no state, and may be tried again."""
    params = [leaf(torch.randn(5, device=backend)) for _ in range(4)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer, other = (cls(copy.deepcopy(groups), **OPTIONS[cls]) for _ in range(2))
    optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = (
        params[:2],
        params[2:],
    )
    set_gradients(params, 0)
    zeros_like, left = torch.zeros_like, [allocations]

    def scarce(*args: Any, **kwargs: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no memory")
        return zeros_like(*args, **kwargs)

    before = snapshot(params, optimizer)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros_like", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    assert_unchanged(before, snapshot(params, optimizer))
    optimizer.step()
    others = [p for group in other.param_groups for p in group["params"]]
    set_gradients(others, 0)
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize(
    ("cls", "when"), [(fused.Adam, "later"), (fused.AdamW, "first"), (fused.SGD, "first")]
)
def test_no_memory_for_a_copy(cls: type, when: str) -> None:
    """A gradient in another layout is copied, in the second group, where the address space ends."""
    resource = pytest.importorskip("resource")
    side = 4500  # 81 MB
    params = [leaf(torch.ones(5)), leaf(torch.ones(side, side))]
    optimizer = cls([{"params": [p]} for p in params], **OPTIONS[cls])
    set_gradients(params, 0)
    if when == "later":
        optimizer.step()
    params[1].grad = params[1].grad.t()
    num_states = 0 if when == "later" else len(optimizer._moments(optimizer.param_groups[1]))
    before = snapshot(params, optimizer)
    gc.collect()  # found during the step, garbage of earlier tests would be room for the copy
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    room = side * side * (1 + 4 * num_states)
    no_memory = r"not enough memory|alloc"
    resource.setrlimit(resource.RLIMIT_AS, (used + room, limits[1]))
    try:
        # malloc may have kept any amount of what earlier tests freed: it is all taken, then what
        # the states need is given back.
        taken: list[Tensor] = []
        with pytest.raises(RuntimeError, match=no_memory):
            while True:
                taken.append(torch.empty(side, side))
        del taken[:num_states]
        with pytest.raises(RuntimeError, match=no_memory):
            optimizer.step()
        del taken
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert_unchanged(before, snapshot(params, optimizer))
    optimizer.step()
    assert all(p._version > version for p, version in zip(params, before[1], strict=True))
