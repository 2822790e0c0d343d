"""Groups of one optimizer: a step that fails in any of them, at any stage, changes none of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_optim_refusals import assert_unchanged, snapshot
from test_optim_tensors import CLASSES, OPTIONS, leaf, set_gradients
from torch import Tensor

import fused
from fused.testing.dispatch import OperatorLog

EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip and clear": {"max_norm": 0.1, "zero_grad": True},
    "clip groups": {"max_norm": 0.1, "norm_scope": "group", "nonfinite": "skip"},
    "stored": {"ema_decay": 0.9, "master_weights": "remainder", "state_dtype": "int8"},
    "master": {"master_weights": "float32", "state_dtype": torch.bfloat16, "ema_decay": 0.9},
    "rounded": {"stochastic_rounding": True, "zero_grad": True},
}


def three_groups(cls: type, extra: str, backend: torch.device) -> tuple[list[Tensor], Any]:
    """The second group's gradients and parameters are copied, for they are not dense."""
    torch.manual_seed(0)
    values = [torch.randn(3, 40, device=backend).bfloat16() for _ in range(4)]
    params = [leaf(v) for v in (values[0], values[1][:, ::2], values[2].t(), values[3][0])]
    groups = [{"params": params[:1]}, {"params": params[1:3]}, {"params": params[3:]}]
    return params, cls(groups, **OPTIONS[cls], **EXTRAS[extra])


class Failing:
    """In the place of what an optimizer calls: raises at call number `at`, and counts."""

    def __init__(self, call: Any, at: int) -> None:
        self.call, self.left, self.count = call, at, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("no memory")
        return self.call(*args, **kwargs)


STAGES = [
    *(("_kernel_call", extra) for extra in EXTRAS),
    ("_new_states", "stored"),
    ("_norm", "clip and clear"),
    ("_norm", "clip groups"),
    ("_draw_rng", "rounded"),
]


@pytest.mark.parametrize(("stage", "extra"), STAGES)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_failure_at_any_call(cls: type, extra: str, stage: str, backend: torch.device) -> None:
    """Each call that makes something ready fails in turn, at a first step and at a third one."""
    params, optimizer = three_groups(cls, extra, backend)
    straight_params, straight = three_groups(cls, extra, backend)
    failures = 0
    for step in range(3):
        set_gradients(params, step)
        set_gradients(straight_params, step)
        for at in range(99 if step != 1 else 0):
            call = Failing(getattr(optimizer, stage), at)
            setattr(optimizer, stage, call)
            torch.manual_seed(step)
            before = [*snapshot(params, optimizer), [p.grad.clone() for p in params]]
            try:
                optimizer.step()
            except torch.OutOfMemoryError:
                failures += 1
            else:
                break
            finally:
                delattr(optimizer, stage)
            assert_unchanged(before, snapshot(params, optimizer))
            assert all(torch.equal(g, p.grad) for g, p in zip(before[3], params, strict=True))
        else:
            assert step == 1, "it never succeeds"
            torch.manual_seed(step)
            optimizer.step()
        torch.manual_seed(step)
        straight.step()
    assert failures >= {"_kernel_call": 6, "_draw_rng": 6, "_new_states": 3, "_norm": 2}[stage]
    for a, b in zip(params, straight_params, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_new_state_that_does_not_fit(cls: type, backend: torch.device) -> None:
    """Found when the last group's step is made ready, behind states that have begun."""
    params, optimizer = three_groups(cls, "master", backend)
    make = optimizer._new_states

    def spoilt(group: Any) -> Any:
        states = make(group)
        if group is optimizer.param_groups[-1]:
            states[-1][1]["ema"] = torch.zeros(99, device=backend)
        return states

    set_gradients(params, 0)
    before = snapshot(params, optimizer)
    optimizer._new_states = spoilt
    with pytest.raises(ValueError, match="ema must have the shape"):
        optimizer.step()
    assert_unchanged(before, snapshot(params, optimizer))
    assert not optimizer.state
    del optimizer._new_states
    optimizer.step()
    assert all(len(optimizer.state[p]) >= 3 for p in params)


def test_states_that_were_there_stay(backend: torch.device) -> None:
    """Of a parameter whose buffer alone begins, the rest is as it was."""
    params = [leaf(torch.ones(4, device=backend)), leaf(torch.ones(4, device=backend))]
    optimizer = fused.SGD([{"params": [p]} for p in params], lr=0.1, ema_decay=0.9)
    set_gradients(params, 0)
    optimizer.step()
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    before = snapshot(params, optimizer)
    optimizer._kernel_call = Failing(optimizer._kernel_call, 3)  # the last that makes ready
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert optimizer._kernel_call.count == 4
    assert_unchanged(before, snapshot(params, optimizer))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_tensor_replaced_during_a_step(cls: type, backend: torch.device) -> None:
    """By another thread, say, when its group's step is ready: memory that is gone is not read."""
    params = [leaf(torch.ones(4, device=backend)) for _ in range(2)]
    optimizer = cls([{"params": [p]} for p in params], **OPTIONS[cls])
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    call = optimizer._kernel_call

    def replace(**arguments: Any) -> Any:
        outcome = call(**arguments)
        if arguments["params"][0] is params[1]:
            params[0].grad = None
        return outcome

    before = snapshot(params, optimizer)
    optimizer._kernel_call = replace
    with pytest.raises(ValueError, match="groups must stay as they are during a step"):
        optimizer.step()
    assert_unchanged(before, snapshot(params, optimizer))
    del optimizer._kernel_call
    optimizer.step()
    assert torch.equal(params[0], before[0][0]) and not torch.equal(params[1], before[0][1])


@pytest.mark.parametrize("cls", CLASSES)
def test_a_group_that_fails_under_a_mode(cls: type) -> None:
    """Has no states that it had not before."""
    params = [leaf(torch.ones(4)), leaf(torch.ones(4))]
    optimizer = cls(params, **OPTIONS[cls])
    set_gradients(params, 0)
    params[1].data = torch.ones(3)
    with pytest.raises(ValueError, match="grad must have the shape"), OperatorLog():
        optimizer.step()
    assert not optimizer.state and torch.equal(params[0], torch.ones(4))


def test_stock_steps_come_before_any_other(backend: torch.device) -> None:
    """Stock's functions may fail in the middle: the kernels' groups are then as they were."""
    params = [leaf(torch.ones(4, 2, device=backend)) for _ in range(2)]
    optimizer = fused.SGD([{"params": [p]} for p in params], lr=0.1, momentum=0.9)
    set_gradients(params, 0)
    params[1].grad = params[1].grad.to_sparse()
    before = snapshot(params, optimizer)
    optimizer._composite_step = Failing(optimizer._composite_step, 0)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert_unchanged(before, snapshot(params, optimizer))
    del optimizer._composite_step
    optimizer.step()
    assert not any(torch.equal(p, torch.ones_like(p)) for p in params)


@pytest.mark.parametrize("cls", CLASSES)
def test_groups_that_overlap_are_stepped_in_order(cls: type, backend: torch.device) -> None:
    """A copy is filled when its group's step is made, not when it is made ready."""
    results = []
    for together in (True, False):
        torch.manual_seed(0)
        memory = torch.randn(40, device=backend)
        params = [leaf(memory[:20]), leaf(memory[::2])]
        groups = [{"params": [p]} for p in params]
        optimizers = [
            cls(g, **OPTIONS[cls]) for g in ([groups] if together else map(list, zip(groups)))
        ]
        for step in range(3):
            set_gradients(params, step)
            for optimizer in optimizers:
                optimizer.step()
        results.append(memory)
    assert torch.equal(*results)


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("sequence", [tuple, lambda params: dict.fromkeys(params).keys()])
@pytest.mark.parametrize("cls", CLASSES)
def test_parameters_in_another_sequence(
    cls: type, sequence: Any, max_norm: float | None, backend: torch.device
) -> None:
    results = []
    for make in (list, sequence):
        torch.manual_seed(0)
        params = [leaf(torch.randn(5, device=backend)) for _ in range(2)]
        optimizer = cls(params, **OPTIONS[cls], max_norm=max_norm)
        optimizer.param_groups[0]["params"] = make(params)
        for step in range(4):
            set_gradients(params, step)
            optimizer.step()
        results.append(params)
        kept = optimizer._kept[1].num_gatherings
        optimizer.step()
        assert optimizer._kept[1].num_gatherings == kept
    assert all(map(torch.equal, *results))
