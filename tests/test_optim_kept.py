"""What a step keeps for the next one: used while nothing has changed, never when something has."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_states import CLASSES, OPTIONS, assert_equal
from torch import Tensor

import fused
from fused import _load, _route
from fused.testing.emulator import emulated_cuda

EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip and clear": {"max_norm": 1.0, "zero_grad": True},
    "everything stored": {
        "ema_decay": 0.9,
        "master_weights": "remainder",
        "state_dtype": "int8",
    },
}


def leaves(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(3, 5), (300,), (0,), (4, 6), ()]
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def write_gradients(params: list[Tensor], step: int) -> None:
    """In place, as a backward pass does after zero_grad(set_to_none=False)."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        value = torch.randn(p.shape, generator=generator).to(p)
        if p.grad is None:
            p.grad = value
        else:
            p.grad.data.copy_(value)


def everything(params: list[Tensor], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [v for p in params for _, v in sorted(optimizer.state[p].items())]
    return [t.detach() for t in [*params, *(p.grad for p in params if p.grad is not None), *states]]


def num_gatherings(optimizer: torch.optim.Optimizer) -> int:
    return optimizer._kept[1].num_gatherings


# --- In the steady state --------------------------------------------------------------------------


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("cls", CLASSES)
def test_nothing_is_gathered_again(cls: type, extra: str) -> None:
    """With gradients in place, and with gradients made anew: those have other memory only."""
    params = leaves(torch.device("cpu"))
    optimizer = cls(
        [{"params": params[:2]}, {"params": params[2:]}], **OPTIONS[cls], **EXTRAS[extra]
    )
    for step in range(6):
        if step == 4:
            kept_alive = [p.grad for p in params]
            optimizer.zero_grad(set_to_none=True)
        write_gradients(params, step)
        optimizer.step()
        if step == 1:
            after_first = num_gatherings(optimizer)
    assert num_gatherings(optimizer) == after_first
    assert all(a is not p.grad for a, p in zip(kept_alive, params, strict=True))


@pytest.mark.parametrize("count", [3, 1100])
def test_of_any_number_of_groups(count: int) -> None:
    params = [torch.ones(3, requires_grad=True) for _ in range(count)]
    optimizer = fused.SGD([{"params": [p]} for p in params], lr=0.1)
    for step in range(4):
        write_gradients(params, 0)
        optimizer.step()
        if step == 1:
            after_first = num_gatherings(optimizer)
    assert num_gatherings(optimizer) == after_first


def test_of_any_number_of_steps_in_the_backward_pass() -> None:
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(3)) for _ in range(1100)])
    fused.optim.step_in_backward(model, fused.SGD, lr=0.1)
    kept = []
    for _ in range(3):
        sum(p.sum() for p in model).backward()
        kept.append([p._in_backward_optimizers[0]._kept[1] for p in model])
    assert kept[0] == kept[2]
    assert all(groups.num_gatherings == 1 for groups in kept[2])


def test_gradients_and_states_are_not_kept_alive() -> None:
    params = leaves(torch.device("cpu"))
    optimizer = fused.AdamW(params)
    for step in range(3):
        write_gradients(params, step)
        optimizer.step()
    gradients = [weakref.ref(p.grad) for p in params]
    states = [weakref.ref(v) for entry in optimizer.state.values() for v in entry.values()]
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    gc.collect()
    assert not any(reference() is not None for reference in [*gradients, *states])


@pytest.mark.parametrize("master", ["float32", "remainder"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_step_keeps_no_reference_to_a_name(cls: type, master: str) -> None:
    """The names of states; from Python 3.12 on they have no count that would tell."""
    params = leaves(torch.device("cpu"))
    optimizer = cls(params, **OPTIONS[cls], master_weights=master, ema_decay=0.9)
    for step in range(2):
        write_gradients(params, step)
        optimizer.step()
    names = [sys.intern(name) for name in optimizer.state[params[1]]]
    before = [sys.getrefcount(name) for name in names]
    steps = 50
    for step in range(steps):
        if step % 2:  # gathers, where the other half finds what was kept
            params[0].grad = None if params[0].grad is not None else torch.ones_like(params[0])
        optimizer.step()
    growth = [sys.getrefcount(name) - count for name, count in zip(names, before, strict=True)]
    assert max(growth) < steps // 4, dict(zip(names, growth, strict=True))


# --- What may happen between two steps ------------------------------------------------------------


def moments(optimizer: Any, p: Tensor) -> list[str]:
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
    return [name for name in names if name in optimizer.state[p]]


def replace_state(name: str) -> Callable[[Any, list[Tensor]], None]:
    def change(optimizer: Any, params: list[Tensor]) -> None:
        entry = optimizer.state[params[1]]
        key = moments(optimizer, params[1])[0] if name == "moment" else name
        if key == "scale":
            key = moments(optimizer, params[1])[-1] + "_scale"
        if key in entry:
            entry[key] = (entry[key].clone().float() * 2).to(entry[key].dtype)

    return change


def new_gradient(optimizer: Any, params: list[Tensor]) -> None:
    params[1].grad = params[1].grad.clone() * 2


def gradient_data(optimizer: Any, params: list[Tensor]) -> None:
    params[1].grad.data = params[1].grad.data.clone() * 2


def gradient_turned(optimizer: Any, params: list[Tensor]) -> None:
    params[3].grad = params[3].grad.t().contiguous().t()


def gradient_gone(optimizer: Any, params: list[Tensor]) -> None:
    params[1].grad = None


def gradients_shared(optimizer: Any, params: list[Tensor]) -> None:
    memory = params[1].grad.clone()
    params[0].grad = memory[:15].view(3, 5)
    params[1].grad = memory


def parameter_data(optimizer: Any, params: list[Tensor]) -> None:
    params[1].data = params[1].data.clone() * 2


def parameters_shared(optimizer: Any, params: list[Tensor]) -> None:
    params[3].data = params[1].data[40:64].view(4, 6)


def parameter_layout(optimizer: Any, params: list[Tensor]) -> None:
    params[1].data = torch.ones(600, dtype=params[1].dtype, device=params[1].device)[::2]


def storage_set(optimizer: Any, params: list[Tensor]) -> None:
    state = optimizer.state[params[1]][moments(optimizer, params[1])[0]]
    state.set_(torch.ones_like(state))


def state_deleted(optimizer: Any, params: list[Tensor]) -> None:
    del optimizer.state[params[1]]


def entry_replaced(optimizer: Any, params: list[Tensor]) -> None:
    entry = optimizer.state[params[1]]
    optimizer.state[params[1]] = {k: v.clone() for k, v in reversed(entry.items())}


def parameters_swapped(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["params"].reverse()


def parameter_added(optimizer: Any, params: list[Tensor]) -> None:
    like = params[1]
    added = torch.ones(9, dtype=like.dtype, device=like.device, requires_grad=True)
    added.grad = torch.full_like(added, 0.5)
    params.append(added)
    optimizer.param_groups[0]["params"].append(added)


def options_edited(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups[0].update(lr=0.3, weight_decay=0.2, maximize=True)


def state_loaded(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def unscaled(optimizer: Any, params: list[Tensor]) -> None:
    device = params[0].device
    optimizer.grad_scale = torch.tensor(4.0, device=device)
    optimizer.found_inf = torch.tensor(0.0, device=device)


CHANGES: dict[str, Callable[[Any, list[Tensor]], None]] = {
    **{
        f"another {name}": replace_state(name)
        for name in ("moment", "scale", "step", "remainder", "ema")
    },
    **{
        change.__name__: change
        for change in (
            new_gradient,
            gradient_data,
            gradient_turned,
            gradient_gone,
            gradients_shared,
            parameter_data,
            parameters_shared,
            parameter_layout,
            storage_set,
            state_deleted,
            entry_replaced,
            parameters_swapped,
            parameter_added,
            options_edited,
            state_loaded,
            unscaled,
        )
    },
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("cls", [fused.Adam, fused.SGD])
def test_every_change_is_found(cls: type, extra: str, change: str, backend: torch.device) -> None:
    """Bit for bit what an optimizer does that keeps nothing."""
    results = []
    for keeps in (True, False):
        params = leaves(backend)
        optimizer = cls(list(params), **OPTIONS[cls], **EXTRAS[extra])
        for step in range(5):
            write_gradients(params, step)
            if step == 3:
                CHANGES[change](optimizer, params)
            if not keeps:
                optimizer._kept = None
            optimizer.step()
        results.append(everything(params, optimizer))
    assert_equal(*results)


def bad_dtype(params: list[Tensor]) -> None:
    params[1].grad.data = params[1].grad.data.double()


def bad_shape(params: list[Tensor]) -> None:
    params[3].grad.data = params[3].grad.data.view(6, 4)  # as many elements, as contiguous


def bad_overlap(params: list[Tensor]) -> None:
    params[1].data = params[1].data[:1].expand(300)


@pytest.mark.parametrize("spoil", [bad_dtype, bad_shape, bad_overlap], ids=lambda f: f.__name__)
@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_refused_is_refused_of_a_kept_step(
    cls: type, spoil: Callable[[list[Tensor]], None], backend: torch.device
) -> None:
    params = leaves(backend)
    optimizer = cls(params, **OPTIONS[cls])
    for step in range(3):
        write_gradients(params, step)
        optimizer.step()
    spoil(params)
    before = [t.clone() for t in everything(params, optimizer)]
    versions = [t._version for t in everything(params, optimizer)]
    with pytest.raises((TypeError, ValueError), match=r"must (have the (dtype|shape)|not hold)"):
        optimizer.step()
    assert_equal(before, everything(params, optimizer))
    assert versions == [t._version for t in everything(params, optimizer)]


@pytest.mark.parametrize("cls", CLASSES)
def test_versions_in_a_kept_step(cls: type, backend: torch.device) -> None:
    params = leaves(backend)
    optimizer = cls(params, **OPTIONS[cls], **EXTRAS["everything stored"])
    for step in range(3):
        write_gradients(params, step)
        optimizer.step()
    states = [v for p in params for v in optimizer.state[p].values()]
    before = [t._version for t in [*params, *states]]
    gradients = [p.grad._version for p in params]
    optimizer.step()
    assert [t._version for t in [*params, *states]] == [version + 1 for version in before]
    assert [p.grad._version for p in params] == gradients


def test_a_lazy_clone_of_a_state_is_left_alone(backend: torch.device) -> None:
    params = leaves(backend, torch.float32)
    optimizer = fused.AdamW(params)
    for step in range(3):
        write_gradients(params, step)
        optimizer.step()
    state = optimizer.state[params[1]]["exp_avg"]
    value, clone = state.clone(), torch._lazy_clone(state)
    optimizer.step()
    assert torch.equal(clone, value)
    assert not torch.equal(optimizer.state[params[1]]["exp_avg"], value)


def test_other_kernels_keep_their_own() -> None:
    """An optimizer that goes from one build of the kernels to another and back."""
    params, straight = leaves(torch.device("cpu")), leaves(torch.device("cpu"))
    optimizer, other = (fused.SGD(p, lr=0.5) for p in (params, straight))
    for step in range(4):
        for p in (params, straight):
            write_gradients(p, step)
        other.step()
        if step % 2:
            with emulated_cuda("forward"):
                optimizer.step()
                assert optimizer._kept[0] is _route.kernels()
        else:
            optimizer.step()
            assert optimizer._kept[0] is _load.load()
    assert_equal(params, straight)
